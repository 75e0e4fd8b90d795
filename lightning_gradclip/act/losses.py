"""Losses that stand out, for a rule that drops the steps of such batches too: the other half of OLMo's rule."""

from collections import deque
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from lightning_gradclip.gradients import ranks
from lightning_gradclip.methods.sigma import SigmaClip


class Losses:
    """Remembers the last losses of a run, and says which are more than k standard deviations above their mean."""

    def __init__(self, method: SigmaClip) -> None:
        self._method = method
        self._seen: deque[float] = deque(maxlen=method.window)

    def of(self, loss: Tensor | float | None) -> float:
        """The loss of this step, averaged over all ranks, which ask together; the host waits for it.

        Raises:
            ValueError: If there is none.
        """
        if loss is None:
            raise ValueError(
                f"{self._method!r} looks at the loss too, and was given none; write clipper.step(loss=loss)"
            )
        value = torch.as_tensor(loss).detach()
        return ranks.average(value.to(torch.float64 if value.device.type != "mps" else torch.float32).mean())

    def excess(self, loss: float) -> str | None:
        """That a loss is over its limit, in words; None where it is not, or too few were seen."""
        if len(self._seen) < self._method.warmup:
            return None
        seen = np.array(self._seen)
        limit = float(seen.mean() + self._method.k * seen.std(ddof=1))
        return f"the loss {loss:g} is over its limit {limit:g}" if loss > limit else None

    def learn(self, loss: float) -> None:
        """Remember a loss, also of a step that is dropped for its size; not one that is not finite."""
        if np.isfinite(loss):
            self._seen.append(loss)

    def state(self) -> list[float]:
        """The remembered losses, oldest first."""
        return list(self._seen)

    def resume(self, losses: Iterable[float]) -> None:
        """Go on from these."""
        self._seen.clear()
        self._seen.extend(losses)
