"""Handwritten digits as batches of images."""

import numpy as np
import torch
from batches import RandomBatches
from lightning.pytorch import LightningDataModule
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset


class Digits(LightningDataModule):
    """The 1,797 images of 8x8 pixels that come with scikit-learn; the last ones are kept for validation."""

    def __init__(self, batch_size: int, val_fraction: float, seed: int):
        super().__init__()
        digits = load_digits()
        images = torch.tensor(digits.images, dtype=torch.float32)[:, None]  # (N, 1, 8, 8)
        self.labels = torch.tensor(digits.target)
        self.train_size = round(len(images) * (1 - val_fraction))
        if not batch_size <= self.train_size < len(images):
            raise ValueError(
                f"data.val_fraction={val_fraction:g} leaves {self.train_size} of {len(images)} images to train on, and "
                f"a step takes data.batch_size={batch_size} different ones; make one of the two smaller"
            )
        self.std, self.mean = torch.std_mean(images[: self.train_size])
        self.images = (images - self.mean) / self.std
        self.batch_size, self.seed = batch_size, seed

    def facts(self) -> dict[str, int]:
        """What the model has to know."""
        return {"classes": 10}

    def describe(self) -> str:
        return f"scikit-learn's digits, {self.train_size:,} images and {len(self.labels) - self.train_size} to validate"

    def guessing(self) -> dict[str, float]:
        """What guessing labels by their frequency alone achieves."""
        shares = torch.bincount(self.labels[: self.train_size], minlength=10) / self.train_size
        labels = self.labels[self.train_size :]
        right = (labels == shares.argmax()).float()
        return {"val/loss": -shares.log()[labels].mean().item(), "val/accuracy": right.mean().item()}

    def draw(self, random: np.random.Generator) -> np.ndarray:
        return random.permutation(self.train_size)[: self.batch_size]

    def examples(self, chosen: Tensor) -> tuple[Tensor, Tensor]:
        return self.images[chosen], self.labels[chosen]

    def train_dataloader(self) -> DataLoader:
        return DataLoader(RandomBatches(self, self.train_size // self.batch_size), batch_size=None)

    def val_dataloader(self) -> DataLoader:
        mine = slice(self.train_size + self.trainer.global_rank, None, self.trainer.world_size)
        return DataLoader(TensorDataset(self.images[mine], self.labels[mine]), self.batch_size)
