"""What to do about non-finite gradients and dropped steps: words for people, and a bound in a row."""

import warnings
from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

_NAMED = 5


def offenders(names: Sequence[str], flags: Sequence[bool]) -> str:
    """The first parameters whose gradient is not finite, as text."""
    bad = [name for name, one in zip(names, flags, strict=True) if one]
    listed = ", ".join(bad[:_NAMED])
    more = f" and {len(bad) - _NAMED} more" if len(bad) > _NAMED else ""
    return f"{listed}{more}" if bad else "no parameter: every entry is finite and their norm overflows"


def fail(step: int, culprits: str) -> NoReturn:
    """What nonfinite="raise" comes to."""
    raise FloatingPointError(
        f"non-finite gradients at optimizer step {step} in {culprits}; "
        "lower the learning rate, check the data of this batch, or use nonfinite='skip'"
    )


class Skips:
    """Counts dropped steps in a row, warns at the first, and ends training when there are too many."""

    def __init__(self, most: int | None) -> None:
        self.most = most
        self.in_a_row = 0
        self._warned = False
        self.noted: tuple[Tensor, Tensor] | None = None

    def reset(self) -> None:
        self.in_a_row = 0
        if self.noted is not None:
            self.note(torch.zeros_like(self.noted[0]))

    def count(self) -> int:
        """Steps dropped in a row up to now; looks at what was noted, which makes the host wait for the device."""
        return self.in_a_row if self.noted is None else int(self.noted[0].item())

    def resume(self, in_a_row: int) -> None:
        """Go on from this count."""
        self.in_a_row, self.noted = in_a_row, None

    def note(self, dropped: Tensor) -> None:
        """Count a step that a device may have dropped, 1 or 0, 0-d, without looking."""
        if self.noted is None:
            self.noted = torch.full_like(dropped, self.in_a_row), torch.zeros_like(dropped)
        in_a_row = (self.noted[0] + 1) * dropped
        self.noted = in_a_row, torch.maximum(self.noted[1], in_a_row)

    def review(self, step: int) -> None:
        """Look at what was noted, which makes the host wait for the device, and raise if it is too many."""
        if self.noted is not None:
            self.in_a_row, longest = map(int, torch.stack(self.noted).tolist())
            self.noted = None
            self._require_few(longest, step, "not finite or over the limit")

    def speaks(self) -> bool:
        """Whether the next `add` says why: finding out costs more than counting."""
        return not self._warned or (self.most is not None and self.in_a_row >= self.most)

    def add(self, step: int, reason: str, *, warn: bool) -> None:
        """Count one dropped step; none that a GradScaler drops, which finds its scale by overflowing."""
        if self.noted is not None:
            self.note(torch.ones_like(self.noted[0]))
        self.in_a_row = self.in_a_row + 1 if self.noted is None else self.count()
        self._require_few(self.in_a_row, step, reason)
        first, self._warned = not self._warned, True
        if first and warn:
            warnings.warn(
                f"dropped optimizer step {step}: {reason}. Parameters and optimizer state stay as they are; "
                "further dropped steps are counted, not announced",
                RuntimeWarning,
                stacklevel=2,
            )

    def _require_few(self, in_a_row: int, step: int, reason: str) -> None:
        if self.most is not None and in_a_row > self.most:
            raise FloatingPointError(
                f"{in_a_row} optimizer steps in a row were dropped, the last at optimizer step {step}: {reason}; "
                "training makes no progress. Lower the learning rate, check the data, raise the limit, "
                f"or raise max_consecutive_skips (now {self.most})"
            )
