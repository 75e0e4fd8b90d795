"""Which limiter runs a method: what is smaller than a parameter is measured and written in its own way."""

from torch.optim import Optimizer

from lightning_gradclip.limit.entries import EntryLimiter
from lightning_gradclip.limit.limiter import Limiter, ScopeLimiter
from lightning_gradclip.limit.spikes import SpikeLimiter
from lightning_gradclip.limit.units import UnitLimiter
from lightning_gradclip.methods.method import ClipMethod


def limiter_for(method: ClipMethod, measure_per: str | None, optimizer: Optimizer | None) -> Limiter:
    """The limiter of this method, which measures scopes of another kind too where that is asked for."""
    if method.per == "element":
        kind: type[Limiter] = SpikeLimiter if method.needs_moments else EntryLimiter
    else:
        kind = UnitLimiter if method.per == "unit" else ScopeLimiter
    return kind(method, measure_per, optimizer)
