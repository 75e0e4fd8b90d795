"""Output units as scopes: a limit for each slice of a weight along dim 0."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_gradclip.gradients import norms as pnorm
from lightning_gradclip.gradients import write
from lightning_gradclip.gradients.ranks import Reduced, Reducer
from lightning_gradclip.gradients.units import UnitMeter
from lightning_gradclip.limit.limiter import Gradients, Limiter, Outcome
from lightning_gradclip.select import layout
from lightning_gradclip.select.parameters import Selection
from lightning_gradclip.select.scopes import Units


class UnitLimiter(Limiter):
    """Runs a method over output units."""

    def write(self, outcome: Outcome) -> None:
        """Scale the units as the coefficients say; parameters of which no unit is over its limit are not written."""
        coefs = outcome.coefs
        if isinstance(coefs, Tensor):
            held = coefs if self._reducer is None else coefs[self._places_on(coefs.device)]
            write.scale_units_(self._params, self._held_units.rows, held)

    def serve(self, selection: Selection, reducer: Reducer | None = None) -> None:
        super().serve(selection, reducer)
        self._held_units = self._units
        if reducer is not None:
            held = [layout.local(parameter) for parameter in selection.params]
            self._held_units = Units.of(selection.names, held)
            self._places = {torch.device("cpu"): _places(self._units)}
        p = self._method.norm_type
        self._of_gradients, self._of_weights = UnitMeter(self._held_units, p), UnitMeter(self._held_units, p)

    def _scopes_of(self, selection: Selection) -> Units:
        self._units = selection.units()
        return self._units

    def _norms(self, gradients: Gradients, *, exact: bool = False) -> Tensor:
        if exact:
            return self._of_gradients.exact(gradients)
        return self._alike(self._of_gradients.norms(gradients), gradients)

    def _weights(self) -> Tensor:
        return self._of_weights.norms(self._held())

    def _alike(self, norms: Tensor, gradients: Gradients) -> Tensor:
        """The same in a dtype that does not depend on which gradients a rank happens to have."""
        if self._reducer is None:
            return norms
        kinds = {pnorm.accumulator(one.dtype, self._method.norm_type) or one.dtype for one in self._params}
        usual = torch.float64 if kinds & {torch.float64, torch.complex128} else torch.float32
        absent = all(gradient is None for gradient in gradients)
        return norms.to(usual if absent else torch.promote_types(norms.dtype, usual))

    def _reduced(self, gradients: Gradients, norms: Sequence[Tensor], counts: Sequence[Tensor] = ()) -> Reduced:
        if self._reducer is None:
            return Reduced(tuple(norms))
        present = [gradient is not None for gradient in gradients]
        # Each rank puts what it holds of the units in their places among all units.
        device = self._reducer.device
        places = self._places_on(device)
        spread = [
            torch.zeros(self._units.count, dtype=one.dtype, device=device).index_copy_(0, places, one.to(device))
            for one in norms
        ]
        return self._reducer.reduce(spread, present, self._method.norm_type, counts, self._units.index_on(device))

    def _places_on(self, device: torch.device) -> Tensor:
        if device not in self._places:
            self._places[device] = self._places[torch.device("cpu")].to(device)
        return self._places[device]

    def _scope_norms(self, local: Tensor) -> Tensor:
        return local

    def _root_counts(self, gradients: Gradients, known: Reduced, norms: Tensor) -> Tensor:
        counts = tuple(
            max(1, one.numel() // max(1, rows)) for one, rows in zip(self._params, self._units.rows, strict=True)
        )
        index = self._units.index_on(norms.device)
        return pnorm.integers_on(counts, norms.device)[index].to(norms.dtype).sqrt()

    def _parameter_norms(self, norms: Tensor) -> Tensor:
        wide = norms.to(pnorm.widest(norms.device))
        index = self._units.index_on(norms.device)
        return pnorm.grouped_norms(wide, index, len(self._params), self._method.norm_type)


def _places(units: Units) -> Tensor:
    """Of the units that this rank holds a part of, the index among all units."""
    pieces: list[Tensor] = []
    for parameter, start, count in zip(units.params, units.starts, units.rows, strict=False):
        rows = layout.rows(parameter)
        held = torch.arange(count, device="cpu") if rows is None else rows.cpu()
        pieces.append(held + start)
    return torch.cat(pieces)
