"""A text as batches of character codes."""

from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import torch
from batches import RandomBatches
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset


class CharData(LightningDataModule):
    """Random windows of a text for training, the end of the text for validation."""

    def __init__(self, path: str | None, length: int, batch_size: int, val_fraction: float, seed: int):
        super().__init__()
        text = python_manual() if path is None else read_text(path)
        self.source = "the Python manual" if path is None else path
        split = round(len(text) * (1 - val_fraction))
        if min(split, len(text) - split) <= length:
            raise ValueError(
                f"the text of data.path={path} has {len(text)} characters, too few to train and "
                f"validate on windows of data.length={length} characters with "
                f"data.val_fraction={val_fraction:g}; give a longer text or a smaller data.length"
            )
        self.characters = sorted(set(text))
        self.length, self.batch_size, self.seed = length, batch_size, seed
        codes = self.encode(text)
        self.train_codes, self.val_codes = codes[:split], codes[split:]

    def encode(self, text: str) -> Tensor:
        code = {character: i for i, character in enumerate(self.characters)}
        return torch.tensor([code[character] for character in text if character in code])

    def decode(self, codes: Tensor) -> str:
        return "".join(self.characters[code] for code in codes.tolist())

    def facts(self) -> dict[str, int]:
        """What the model has to know."""
        return {"characters": len(self.characters)}

    def describe(self) -> str:
        size = len(self.train_codes) + len(self.val_codes)
        return f"{self.source}, {size:,} characters, {len(self.characters)} different ones"

    def guessing(self) -> dict[str, float]:
        """What guessing characters by their frequency alone achieves."""
        counts = torch.bincount(self.train_codes, minlength=len(self.characters)) + 1.0
        return {"val/loss": -(counts / counts.sum()).log()[self.val_codes].mean().item()}

    def draw(self, random: np.random.Generator) -> np.ndarray:
        return random.integers(len(self.train_codes) - self.length, size=self.batch_size)

    def examples(self, starts: Tensor) -> tuple[Tensor, Tensor]:
        windows = self.train_codes[starts[:, None] + torch.arange(self.length + 1)]
        return windows[:, :-1], windows[:, 1:]

    def train_dataloader(self) -> DataLoader:
        batches = len(self.train_codes) // (self.batch_size * self.length)
        return DataLoader(RandomBatches(self, batches), batch_size=None)

    def val_dataloader(self) -> DataLoader:
        windows = self.val_codes.unfold(0, self.length + 1, self.length)
        mine = windows[self.trainer.global_rank :: self.trainer.world_size]
        return DataLoader(TensorDataset(mine[:, :-1], mine[:, 1:]), self.batch_size)


def python_manual() -> str:
    """The language reference inside `pydoc`, without the paragraphs that it repeats."""
    paragraphs = "\n\n".join(topics.values()).split("\n\n")
    return "\n\n".join(dict.fromkeys(paragraphs))


def read_text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error.reason
        raise ValueError(
            f"cannot read data.path={path}: {reason}; give a UTF-8 text file, or data.path=null for the Python manual"
        ) from error
