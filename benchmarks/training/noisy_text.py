"""Text of which some batches have gone wrong, as happens to large corpora."""

import numpy as np
import torch
from char_data import CharData
from torch import Tensor


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
