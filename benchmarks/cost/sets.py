"""Gradients of the shapes that real models have, for the benchmarks."""

from collections.abc import Iterable, Sequence

import torch
from torch.nn import Parameter

Shapes = list[tuple[int, ...]]


def transformer(width: int) -> Shapes:
    """One block as GPT-2 and ViT have it."""
    norm = [(width,), (width,)]
    attention = [(3 * width, width), (3 * width,), (width, width), (width,)]
    return [*norm, *attention, *norm, (4 * width, width), (4 * width,), (width, 4 * width), (width,)]


def resnet50() -> Shapes:
    shapes: Shapes = [(64, 3, 7, 7), (64,), (64,)]
    channels = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            for out, taken, size in ((width, channels, 1), (width, width, 3), (4 * width, width, 1)):
                shapes += [(out, taken, size, size), (out,), (out,)]
            if block == 0:
                shapes += [(4 * width, channels, 1, 1), (4 * width,), (4 * width,)]
            channels = 4 * width
    return [*shapes, (1000, 2048), (1000,)]


GPT2: Shapes = [(50257, 768), (1024, 768), *transformer(768) * 12, (768,), (768,)]
RESNET50: Shapes = resnet50()
VIT_TINY: Shapes = [(1, 1, 192), (1, 197, 192), (192, 3, 16, 16), (192,), *transformer(192) * 12]
VIT_TINY += [(192,), (192,), (1000, 192), (1000,)]
MANY: Shapes = [(1000,)] * 2000
MLP: Shapes = [(10, 32), (10,), (32,)]

SETS: dict[str, tuple[Shapes, torch.dtype]] = {
    "GPT-2 small, 148 tensors, 124M float32": (GPT2, torch.float32),
    "ResNet-50, 161 tensors, 25.6M float32": (RESNET50, torch.float32),
    "2,000 tensors of 1,000": (MANY, torch.float32),
    "MLP, 3 tensors, 362": (MLP, torch.float32),
    "GPT-2 small, 148 tensors, 124M bfloat16": (GPT2, torch.bfloat16),
}


def parameters(shapes: Iterable[Sequence[int]], dtype: torch.dtype = torch.float32, size: float = 1e-3) -> list:
    """Parameters whose weights are never read, with normally distributed gradients of this size, always the same."""
    made = [Parameter(torch.empty(tuple(shape), dtype=dtype)) for shape in shapes]
    generator = torch.Generator().manual_seed(0)
    for one in made:
        one.grad = torch.randn(one.shape, generator=generator).mul_(size).to(dtype)
    return made


def named(params: Iterable[Parameter]) -> list[tuple[str, Parameter]]:
    return [(f"p{i}", one) for i, one in enumerate(params)]
