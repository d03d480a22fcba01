"""The models of the comparison in PyTorch: the same sizes and initial weights as those of `models.py`."""

import math

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from benchmarks import works


def build(work: works.Work) -> nn.Module:
    """Returns the work's model with its initial weights; images are channels first."""
    model = {"mlp": _Mlp, "cnn": _Cnn, "resnet": _ResNet, "transformer": _Transformer}[work.name](work)
    number = 0
    for module in model.in_order_of_keras():
        for parameter in (getattr(module, "weight", None), getattr(module, "bias", None)):
            if parameter is None:
                continue
            value = works.weight(number, _keras_shape(module, parameter))
            if value is not None:
                parameter.data = torch.from_numpy(_torch_layout(module, value))
            elif parameter is module.bias:
                nn.init.zeros_(parameter)
            number += 1
        number += 2 * isinstance(module, nn.BatchNorm2d)  # Keras counts the moving statistics as weights
    return model


def _keras_shape(module: nn.Module, parameter: nn.Parameter) -> tuple[int, ...]:
    shape = tuple(parameter.shape)
    if isinstance(module, nn.Conv2d) and len(shape) == 4:
        return (*shape[2:], shape[1], shape[0])
    return shape[::-1] if isinstance(module, nn.Linear) else shape


def _torch_layout(module: nn.Module, value: np.ndarray) -> np.ndarray:
    if isinstance(module, nn.Conv2d):
        return np.ascontiguousarray(value.transpose(3, 2, 0, 1))
    return np.ascontiguousarray(value.T) if isinstance(module, nn.Linear) else value


class _Model(nn.Module):
    def in_order_of_keras(self) -> list[nn.Module]:
        """Returns the modules with weights in the order in which Keras lists those of its model."""
        return [module for module in self.modules() if not list(module.children())]


class _Mlp(_Model):
    def __init__(self, work):
        super().__init__()
        width = work.sizes["width"]
        self.dense = nn.ModuleList([nn.Linear(math.prod(work.shape), width), nn.Linear(width, width)])
        self.logits = nn.Linear(width, work.classes)

    def forward(self, x):
        for layer in self.dense:
            x = functional.relu(layer(x))
        return self.logits(x)


class _Cnn(_Model):
    def __init__(self, work):
        super().__init__()
        filters, (height, width, channels) = work.sizes["filters"], work.shape
        left = ((height - 4) // 2 - 4) // 2 * (((width - 4) // 2 - 4) // 2) * 2 * filters
        self.conv = nn.ModuleList([nn.Conv2d(channels, filters, 5), nn.Conv2d(filters, 2 * filters, 5)])
        self.dense = nn.Linear(left, work.sizes["width"])
        self.logits = nn.Linear(work.sizes["width"], work.classes)

    def forward(self, x):
        for layer in self.conv:
            x = functional.max_pool2d(functional.relu(layer(x)), 2)
        x = x.permute(0, 2, 3, 1).flatten(1)  # as Keras flattens, so that the weights fit
        return self.logits(functional.relu(self.dense(x)))


class _Convolution(nn.Module):
    def __init__(self, channels, filters, size, stride):
        super().__init__()
        self.conv = nn.Conv2d(channels, filters, size, stride, bias=False)
        self.norm = nn.BatchNorm2d(filters, eps=1e-3, momentum=0.01)
        self.size, self.stride = size, stride

    def forward(self, x):
        total = max(self.size - self.stride, 0)  # what "same" adds to an even number of pixels
        x = functional.pad(x, [total // 2, total - total // 2] * 2)
        return self.norm(self.conv(x))


class _Block(nn.Module):
    def __init__(self, channels, filters, stride):
        super().__init__()
        self.first = _Convolution(channels, filters, 3, stride)
        self.shortcut = _Convolution(channels, filters, 1, stride) if stride > 1 else nn.Identity()
        self.second = _Convolution(filters, filters, 3, 1)

    def forward(self, x):
        return functional.relu(self.shortcut(x) + self.second(functional.relu(self.first(x))))


class _ResNet(_Model):
    def __init__(self, work):
        super().__init__()
        base, channels = work.sizes["filters"], work.sizes["filters"]
        self.stem = _Convolution(work.shape[-1], base, 3, 1)
        blocks = []
        for times in (1, 2, 4):
            for block in range(work.sizes["blocks"]):
                blocks.append(_Block(channels, times * base, 2 if times > 1 and block == 0 else 1))
                channels = times * base
        self.blocks = nn.ModuleList(blocks)
        self.logits = nn.Linear(channels, work.classes)

    def forward(self, x):
        x = functional.relu(self.stem(x))
        for block in self.blocks:
            x = block(x)
        return self.logits(x.mean((2, 3)))

    def in_order_of_keras(self):
        ordered = [self.stem.conv, self.stem.norm]
        for block in self.blocks:  # Keras lists layers by depth: the shortcut stands before the second convolution
            ordered += [block.first.conv, block.first.norm]
            if isinstance(block.shortcut, nn.Identity):
                ordered += [block.second.conv, block.second.norm]
            else:
                ordered += [block.shortcut.conv, block.second.conv, block.shortcut.norm, block.second.norm]
        return [*ordered, self.logits]


class _Positions(nn.Module):
    def __init__(self, places, width):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(places, width))

    def forward(self, x):
        return x + self.weight


class _Layer(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.qkv, self.mix = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm2, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        batch, places, width = x.shape
        split = self.qkv(self.norm1(x)).reshape(batch, places, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(*split, is_causal=True)
        x = x + self.mix(mixed.transpose(1, 2).reshape(batch, places, width))
        return x + self.down(functional.gelu(self.up(self.norm2(x))))


class _Transformer(_Model):
    def __init__(self, work):
        super().__init__()
        width = work.sizes["width"]
        self.embedding = nn.Embedding(work.classes, width)
        self.positions = _Positions(work.shape[0], width)
        self.layers = nn.ModuleList([_Layer(width, work.sizes["heads"]) for _ in range(work.sizes["layers"])])
        self.norm = nn.LayerNorm(width)
        self.logits = nn.Linear(width, work.classes)

    def forward(self, x):
        x = self.positions(self.embedding(x))
        for layer in self.layers:
            x = layer(x)
        return self.logits(self.norm(x))
