"""One step of a clipper over given gradients, and what it should have left of them."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kit import reference
from kit.gradients import named, two_groups
from lightning_gradclip import ClipMethod, Clipper, StepStats


def clip(
    gradients: Mapping[str, Tensor | None], method: ClipMethod, **options: Any
) -> tuple[dict[str, Tensor], StepStats]:
    """Clip copies of these gradients as one model of two parameter groups; absent ones are left out of the result."""
    pairs = named({name: None if one is None else one.clone() for name, one in gradients.items()})
    stats = Clipper(pairs, method, optimizer=two_groups(pairs) if len(pairs) > 1 else None, **options).step()
    return {name: parameter.grad for name, parameter in pairs if parameter.grad is not None}, stats


def arrays(gradients: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: reference.array(gradient) for name, gradient in gradients.items()}


def assert_clipped(clipped: Mapping[str, Tensor], exact: Mapping[str, np.ndarray], rtol: float = 1e-6) -> None:
    assert clipped.keys() == exact.keys()
    for name, expected in exact.items():
        # Below 1e-38 float32 has fixed steps of 1.4e-45.
        np.testing.assert_allclose(reference.array(clipped[name]), expected, rtol=rtol, atol=1.5e-45, err_msg=name)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normally distributed entries."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
