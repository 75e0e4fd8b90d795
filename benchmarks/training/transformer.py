"""A small causal transformer, after GPT-2, and text of which some batches have gone wrong, as happens to large corpora.

Normalization comes before each layer, positions are learned.
"""

from collections.abc import Callable, Iterable

import numpy as np
import torch
from char_data import CharData
from char_model import NextCharacter
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention
from torch.optim import Optimizer


class Layer(nn.Module):
    """Attention to what came before, then two linear maps; each is added to its input."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attend = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.expand = nn.Linear(width, 4 * width)
        self.contract = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        queries, keys, values = self.attend(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        seen = scaled_dot_product_attention(queries, keys, values, is_causal=True)  # (N, heads, T, width / heads)
        x = x + self.project(seen.transpose(1, 2).flatten(-2))
        return x + self.contract(gelu(self.expand(self.norm2(x))))


class Transformer(NextCharacter):
    """Predicts each character from those before it in its window."""

    def __init__(
        self,
        characters: int,
        length: int,
        width: int,
        heads: int,
        layers: int,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
    ):
        super().__init__(optimizer)
        self.embedding = nn.Embedding(characters, width)
        self.positions = nn.Embedding(length, width)
        self.layers = nn.Sequential(*(Layer(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, characters)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, codes: Tensor) -> tuple[Tensor, None]:
        x = self.embedding(codes) + self.positions(torch.arange(codes.shape[1], device=codes.device))
        return self.head(self.norm(self.layers(x))), None


class NoisyText(CharData):
    """Random windows of a text; a share of the training batches is noise: characters drawn at random."""

    def __init__(self, noise: float, **options):
        if not 0 <= noise < 1:
            raise ValueError(f"data.noise must be at least 0 and below 1, got {noise}; 0.01 spoils 1 % of the batches")
        super().__init__(**options)
        self.noise = noise

    def draw(self, random: np.random.Generator) -> np.ndarray:
        starts = super().draw(random)
        # A negative start stands for a window of noise, and seeds it.
        return -1 - starts if random.random() < self.noise else starts

    def examples(self, starts: Tensor) -> tuple[Tensor, Tensor]:
        if starts[0] >= 0:
            return super().examples(starts)
        random = np.random.default_rng(-starts.numpy())
        noise = torch.from_numpy(random.integers(len(self.characters), size=(len(starts), self.length + 1)))
        return noise[:, :-1], noise[:, 1:]
