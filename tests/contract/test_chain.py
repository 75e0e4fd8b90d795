"""Limits that fall from one clip to the next leave what the last of them leaves alone."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from kit.gradients import named, normal
from lightning_gradclip import AGC, ClipMethod, Clipper, NormClip, ValueClip

LIMITS = [*np.geomspace(50.0, 0.02, 50)]
CHAINS: dict[str, Callable[[float], ClipMethod]] = {
    **{
        f"norm of p {p:g} per {per}": lambda limit, p=p, per=per: NormClip(max_norm=limit, norm_type=p, per=per)
        for p in (1.0, 2.0, torch.inf)
        for per in ("model", "layer", "parameter")
    },
    "rms": lambda limit: NormClip(max_norm=limit, statistic="rms", per="parameter"),
    "value": lambda limit: ValueClip(max_value=limit),
    **{f"agc per {per}": lambda limit, per=per: AGC(clip_factor=limit, per=per) for per in AGC.scopes},
}


@pytest.mark.parametrize("make", CHAINS.values(), ids=CHAINS)
def test_fifty_falling_limits_equal_one_clip(make: Callable[[float], ClipMethod]) -> None:
    chain, once = named(normal(0)), named(normal(0))
    before = [parameter.grad.clone() for _, parameter in once]
    for limit in LIMITS:
        Clipper(chain, make(limit)).step()
    Clipper(once, make(LIMITS[-1])).step()
    assert not all(torch.equal(one, parameter.grad) for one, (_, parameter) in zip(before, once, strict=True))
    for (name, ours), (_, theirs) in zip(chain, once, strict=True):
        # NormClip adds 1e-6 to a norm before it divides, as torch does, each time.
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-9, msg=name)
