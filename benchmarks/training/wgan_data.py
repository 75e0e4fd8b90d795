"""The digits as samples of a distribution, without their labels."""

import torch
from digits_data import Digits
from torch import Tensor
from torch.utils.data import DataLoader

DIRECTIONS = 128


class DigitSamples(Digits):
    """Images as vectors of pixels; how close generated ones come is measured on those kept for validation."""

    def facts(self) -> dict[str, int]:
        """What the model has to know."""
        return {"pixels": self.images[0].numel()}

    def guessing(self) -> dict[str, float]:
        """What the mean image alone achieves."""
        mean = self.images[: self.train_size].flatten(1).mean(0)
        held_out = self.held_out()
        return {"val/distance": sliced_distance(mean.expand_as(held_out), held_out).item()}

    def held_out(self) -> Tensor:
        return self.images[self.train_size :].flatten(1)

    def examples(self, chosen: Tensor) -> Tensor:
        return self.images[chosen].flatten(1)

    def val_dataloader(self) -> DataLoader:
        # All at once: a distance between distributions is no mean over batches.
        return DataLoader([self.held_out()], batch_size=None)


def sliced_distance(some: Tensor, others: Tensor) -> Tensor:
    """The 1-Wasserstein distance along random directions, on average; exact in each, since there sorting is enough.

    Bonneel et al. 2015, doi.org/10.1007/s10851-014-0506-3; (N, D) and (N, D), the same directions at every call.
    """
    random = torch.Generator().manual_seed(0)
    directions = torch.randn(some.shape[1], DIRECTIONS, generator=random)
    directions /= directions.norm(dim=0)
    return ((some @ directions).sort(0).values - (others @ directions).sort(0).values).abs().mean()
