"""A text as batches of character codes."""

from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, TensorDataset


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

    def loss_of_guessing(self) -> float:
        """The validation loss of guessing characters by their frequency alone."""
        counts = torch.bincount(self.train_codes, minlength=len(self.characters)) + 1.0
        return -(counts / counts.sum()).log()[self.val_codes].mean().item()

    def train_dataloader(self) -> DataLoader:
        return DataLoader(RandomWindows(self), batch_size=None)

    def val_dataloader(self) -> DataLoader:
        windows = self.val_codes.unfold(0, self.length + 1, self.length)
        mine = windows[self.trainer.global_rank :: self.trainer.world_size]
        return DataLoader(TensorDataset(mine[:, :-1], mine[:, 1:]), self.batch_size)


class RandomWindows(IterableDataset):
    """The training batches of one rank.

    A batch depends on its number and the seed alone: a resumed run goes on where the first one
    stopped, and several ranks share out the windows that one process would take.
    """

    def __init__(self, data: CharData):
        trainer = data.trainer
        if data.batch_size % trainer.world_size:
            raise MisconfigurationException(
                f"data.batch_size={data.batch_size} cannot be shared equally by "
                f"{trainer.world_size} ranks; make it a multiple of {trainer.world_size}"
            )
        self.data, self.trainer = data, trainer
        if trainer.max_steps > 0:
            self.batches = trainer.max_steps * trainer.accumulate_grad_batches
        else:
            self.batches = len(data.train_codes) // (data.batch_size * data.length)

    def __len__(self) -> int:
        return self.batches

    def __iter__(self):
        data, codes = self.data, self.data.train_codes
        offsets = torch.arange(data.length + 1)
        first = self.trainer.global_step * self.trainer.accumulate_grad_batches
        for number in range(first, first + self.batches):
            random = np.random.default_rng([data.seed, number])
            starts = torch.from_numpy(random.integers(len(codes) - data.length, size=data.batch_size))
            mine = starts[self.trainer.global_rank :: self.trainer.world_size]
            windows = codes[mine[:, None] + offsets]
            yield windows[:, :-1], windows[:, 1:]


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
