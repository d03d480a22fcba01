"""PyTorch Lightning: a LightningModule and a DataLoader, trained by `Trainer.fit` with its logging and saving off.

As its guides have it, the DataLoader takes one example after another and puts them together; tuned, it gathers a batch at once.
"""

import logging

import lightning
import numpy as np
import torch
from torch.utils.data import DataLoader, TensorDataset

from benchmarks import torch_models, works
from benchmarks.contestants import torch_loop
from benchmarks.frame import Case

PRECISIONS = {"float32": "32-true", "mixed_bfloat16": "bf16-mixed", "mixed_float16": "16-mixed"}


class Batches(TensorDataset):
    """Gathers all examples of a batch at once, which a DataLoader asks for where it can be asked for."""

    def __getitems__(self, rows: list[int]) -> tuple[torch.Tensor, ...]:
        return tuple(tensor[rows] for tensor in self.tensors)


class Module(lightning.LightningModule):
    """The comparison's model, its loss and its optimizer."""

    def __init__(self, work: works.Work):
        super().__init__()
        self.model = torch_models.build(work)

    def training_step(self, batch, number):
        inputs, targets = batch
        logits = self.model(inputs)
        loss = torch_loop.loss_of(logits, targets)
        self.log("loss", loss)
        self.log("accuracy", (logits.argmax(-1) == targets).float().mean())
        return loss

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), works.LEARNING_RATE, eps=1e-7)


class Turns(lightning.Callback):
    """Waits before each turn's first batch."""

    def __init__(self, gate):
        self.gate = gate
        self.left = 0

    def on_train_batch_start(self, trainer, module, batch, number):
        if self.left == 0:
            self.steps = self.left = self.gate.enter()
            self.losses = 0.0

    def on_train_batch_end(self, trainer, module, outputs, batch, number):
        self.losses = self.losses + outputs["loss"].detach()
        self.left -= 1
        if self.left == 0:
            self.gate.done(float(self.losses) / self.steps)


def run(case: Case, gate, tuned: str = "") -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    total = sum(case.turns)
    rows = np.load(case.numbers)[:total].tolist()
    tensors = torch_loop.tensors(case.work)
    if tuned:
        loader = DataLoader(Batches(*tensors), batch_sampler=rows, collate_fn=tuple)
    else:
        loader = DataLoader(TensorDataset(*tensors), batch_sampler=rows)
    trainer = lightning.Trainer(
        max_steps=total,
        max_epochs=-1,
        precision=PRECISIONS[case.precision],
        accelerator="auto",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Turns(gate)],
    )
    trainer.fit(Module(case.work), loader)
