"""Plain PyTorch: a loop by hand, with autocast and a GradScaler as PyTorch's guide to mixed precision writes them."""

import contextlib

import numpy as np
import torch
from torch.nn import functional

from benchmarks import torch_models, works
from benchmarks.frame import Case

torch.backends.cudnn.allow_tf32 = False  # as for matrix products: float32 is float32 for everybody; for Lightning too
DTYPES = {"mixed_bfloat16": torch.bfloat16, "mixed_float16": torch.float16}


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def tensors(work: works.Work) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns inputs and targets of all examples; images are channels first."""
    inputs, targets = (torch.from_numpy(array) for array in works.data(work))
    if inputs.ndim == 4:
        inputs = inputs.permute(0, 3, 1, 2).contiguous()
    return inputs, targets.long()


def loss_of(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(logits.float().flatten(0, -2), targets.flatten())


def run(case: Case, gate) -> None:
    numbers = torch.from_numpy(np.load(case.numbers))
    inputs, targets = (tensor.to(device()) for tensor in tensors(case.work))
    model = torch_models.build(case.work).to(device())
    optimizer = torch.optim.Adam(model.parameters(), works.LEARNING_RATE, eps=1e-7)
    # The others begin at 2**15, at which PyTorch's float16 convolution overflows in the first step and skips it.
    scaler = torch.amp.GradScaler(device(), init_scale=2.0**10, enabled=case.precision == "mixed_float16")
    dtype = DTYPES.get(case.precision)
    step = 0
    for steps in gate:
        losses, right = torch.zeros((), device=device()), torch.zeros((), device=device())
        for _ in range(steps):
            rows = numbers[step % len(numbers)].to(device())
            x, y = inputs[rows], targets[rows]
            with torch.autocast(device(), dtype) if dtype else contextlib.nullcontext():
                logits = model(x)
                loss = loss_of(logits, y)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            losses += loss.detach()
            right += (logits.argmax(-1) == y).float().mean()
            step += 1
        gate.done(losses.item() / steps)
