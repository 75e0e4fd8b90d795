"""Output units as scopes: a limit for each slice of a weight along dim 0."""

from torch import Tensor

from lightning_gradclip import pnorm, write
from lightning_gradclip.limit import Gradients, Limiter, Outcome
from lightning_gradclip.scopes import Units
from lightning_gradclip.select import Selection
from lightning_gradclip.unit_norms import UnitMeter


class UnitLimiter(Limiter):
    """Runs a method over output units."""

    def write(self, outcome: Outcome) -> None:
        """Scale the units as the coefficients say; parameters of which no unit is over its limit are not written."""
        if isinstance(outcome.coefs, Tensor):
            write.scale_units_(self._params, self._units.rows, outcome.coefs)

    def _scopes_of(self, selection: Selection) -> Units:
        self._units = selection.units()
        p = self._method.norm_type
        self._unit_meters = UnitMeter(self._units, p), UnitMeter(self._units, p)
        return self._units

    def _norms(self, tensors: Gradients, *, exact: bool = False) -> Tensor:
        of_gradients, of_weights = self._unit_meters
        meter = of_weights if tensors is self._params else of_gradients
        return meter.exact(tensors) if exact else meter.norms(tensors)

    def _scope_norms(self, local: Tensor) -> Tensor:
        return local

    def _root_counts(self, gradients: Gradients, local: Tensor) -> Tensor:
        counts = tuple(
            max(1, one.numel() // max(1, rows)) for one, rows in zip(self._params, self._units.rows, strict=True)
        )
        index = self._units.index_on(local.device)
        return pnorm.integers_on(counts, local.device)[index].to(local.dtype).sqrt()

    def _parameter_norms(self, local: Tensor) -> Tensor:
        wide = local.to(pnorm.widest(local.device))
        index = self._units.index_on(local.device)
        return pnorm.grouped_norms(wide, index, len(self._params), self._method.norm_type)
