"""Where in its data a fit is, and what its losses are."""

from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler


class Progress:
    """Where in the data a step is, and what its loss was: for histories, which alone ask.

    A loss is what was differentiated since the step before, which is a mean over the accumulated batches under
    automatic optimization; with several optimizers since the last step of any.
    """

    def __init__(self) -> None:
        self._loss: Tensor | None = None
        self._losses = 0
        self._stepped = False
        # Of each optimizer that has stepped the first batch after that.
        self._begun: dict[int, tuple[int, int]] = {}
        self._waiting: set[int] = set()
        self._start = (0, 0)
        self._any = False

    def begin(self, epoch: int, batch: int) -> None:
        """A batch of this index begins."""
        if not self._any:
            self._any, self._start = True, (epoch, batch)
        for index in self._waiting:
            self._begun[index] = (epoch, batch)
        self._waiting.clear()

    def differentiated(self, loss: Tensor, scaler: GradScaler | None) -> None:
        """A loss is about to be differentiated, multiplied by what the scaler scales by."""
        loss = loss.detach()
        if scaler is not None and scaler.is_enabled():
            loss = loss / scaler.scale(torch.ones((), device=loss.device))
        if self._stepped or self._loss is None:
            self._loss, self._losses, self._stepped = loss, 0, False
        else:
            self._loss = self._loss + loss
        self._losses += 1

    def of_step(self, index: int, accumulated: int) -> dict[str, Any]:
        """What to tell a clipper of the step of this optimizer; losses were divided by `accumulated`."""
        epoch, batch = self._begun.get(index, self._start)
        loss = self._loss
        if loss is not None and self._losses < accumulated:
            # The last step of an epoch has fewer batches.
            loss = loss * (accumulated / self._losses)
        self._stepped = True
        self._waiting.add(index)
        return {"loss": loss, "batch": batch, "epoch": epoch}
