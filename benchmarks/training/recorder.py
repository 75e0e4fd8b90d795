"""Watches a run from outside of what is studied: norms, spikes and time come from here, whatever clips."""

import math
import statistics
import time
from collections.abc import Sequence

import torch
from lightning.pytorch import Callback

SPIKE, BEFORE, AT_LEAST = 5.0, 50, 10
PATIENCE = 20


class Recorder(Callback):
    """Measures every gradient before anything clips it, so it comes before what clips.

    A run ends after 20 losses in a row that are not finite.

    Attributes:
        norms: For each optimizer the norm of every step's gradient before clipping.
        largest: The same for the gradient's largest absolute entry, with `entries`.
        seconds: CPU time from the start of each batch to the start of the next.
    """

    def __init__(self, entries: bool = False):
        self.entries = entries
        self.norms: dict[int, list[float]] = {}
        self.largest: dict[int, list[float]] = {}
        self.seconds: list[float] = []
        self._began: float | None = None
        self._bad_losses = 0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        now = time.process_time()
        if self._began is not None:
            self.seconds.append(now - self._began)
        self._began = now

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        index = next(index for index, one in enumerate(trainer.optimizers) if one is optimizer)
        gradients = [weight.grad for group in optimizer.param_groups for weight in group["params"]]
        gradients = [gradient for gradient in gradients if gradient is not None]
        self.norms.setdefault(index, []).append(float(torch.nn.utils.get_total_norm(gradients)))
        if self.entries:
            self.largest.setdefault(index, []).append(float(torch.nn.utils.get_total_norm(gradients, math.inf)))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        loss = float(trainer.callback_metrics["train/loss"])
        self._bad_losses = 0 if math.isfinite(loss) else self._bad_losses + 1
        if self._bad_losses >= PATIENCE:
            trainer.should_stop = True

    @property
    def steps(self) -> int:
        """Of all optimizers."""
        return sum(map(len, self.norms.values()))

    @property
    def nonfinite(self) -> int:
        """Steps whose gradient was NaN or infinite."""
        return sum(not math.isfinite(norm) for norms in self.norms.values() for norm in norms)

    @property
    def spikes_per_1000(self) -> float:
        """Of 1,000 optimizer steps, those whose gradient was a spike."""
        return 1000 * sum(count_spikes(norms) for norms in self.norms.values()) / self.steps

    @property
    def ms_per_step(self) -> float:
        """CPU milliseconds of a batch, by the median; NaN after a single one."""
        return 1000 * statistics.median(self.seconds) if self.seconds else math.nan


def count_spikes(norms: Sequence[float]) -> int:
    """Norms that are not finite, or over 5 times the median of the finite ones among the 50 before.

    The first 10 are no spikes: there is nothing to compare them with.
    """
    count = 0
    for place in range(AT_LEAST, len(norms)):
        before = [norm for norm in norms[max(0, place - BEFORE) : place] if math.isfinite(norm)]
        ordinary = statistics.median(before) if before else math.inf
        count += not math.isfinite(norms[place]) or norms[place] > SPIKE * ordinary
    return count
