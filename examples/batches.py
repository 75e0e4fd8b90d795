"""Training batches that are drawn at random."""

from collections.abc import Iterator

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import IterableDataset


class RandomBatches(IterableDataset):
    """The training batches of one rank.

    `data.draw(random)` chooses the examples of a batch for all ranks, `data.examples(chosen)` makes the batch. It
    depends on its number and the seed alone: a resumed run goes on where the first one stopped, and several ranks
    share out the examples that one process would take.
    """

    def __init__(self, data: LightningDataModule, batches_per_epoch: int):
        trainer = data.trainer
        if data.batch_size % trainer.world_size:
            raise MisconfigurationException(
                f"data.batch_size={data.batch_size} cannot be shared equally by "
                f"{trainer.world_size} ranks; make it a multiple of {trainer.world_size}"
            )
        self.data, self.trainer = data, trainer
        # With a number of steps the whole run is one epoch.
        self.batches = batches_per_epoch
        if trainer.max_steps > 0:
            self.batches = trainer.max_steps * trainer.accumulate_grad_batches

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        first = self.trainer.global_step * self.trainer.accumulate_grad_batches
        for number in range(first, first + self.batches):
            chosen = self.data.draw(np.random.default_rng([self.data.seed, number]))
            yield self.data.examples(torch.from_numpy(chosen[self.trainer.global_rank :: self.trainer.world_size]))
