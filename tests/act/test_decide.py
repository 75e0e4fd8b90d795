"""What is done about a step: what a mended one ends, and what a dropped one leaves for the others."""

import math
import warnings

import pytest
import torch

from kit.gradients import named
from kit.running_max import RunningMax
from lightning_gradclip import Clipper, NormClip


def test_a_step_whose_entries_were_replaced_ends_a_row_of_dropped_ones() -> None:
    pairs = named({"a": torch.zeros(2)})
    clipper = Clipper(pairs, NormClip(max_norm=1.0), action="skip", nonfinite="zero", max_consecutive_skips=1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "dropped optimizer step")
        dropped = []
        for gradient in ([3.0, 4.0], [math.nan, 0.5], [3.0, 4.0]):
            pairs[0][1].grad = torch.tensor(gradient)
            dropped.append(bool(clipper.step().skipped))
        assert dropped == [True, False, True]
        # Two in a row are one too many.
        pairs[0][1].grad = torch.tensor([3.0, 4.0])
        with pytest.raises(FloatingPointError, match="2 optimizer steps in a row"):
            clipper.step()


@pytest.mark.parametrize("action", ["clip", "skip"])
def test_nobody_learns_from_a_step_that_is_not_finite(action: str) -> None:
    """Not the scope beside it either, which is clipped, or whose size has the step dropped."""
    pairs = named({"a": torch.zeros(1), "b": torch.zeros(1)})
    clipper = Clipper(pairs, RunningMax(per="parameter"), action=action, nonfinite="ignore")
    limits = []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "dropped optimizer step")
        for a, b in ((1.0, 1.0), (math.nan, 5.0), (1.0, 1.0)):
            for (_, parameter), value in zip(pairs, (a, b), strict=True):
                parameter.grad = torch.tensor([value])
            limits.append(clipper.step().limits.tolist())
    assert limits[1:] == [[1.0, 1.0], [1.0, 1.0]]
