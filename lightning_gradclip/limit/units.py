"""Output units as scopes: a limit for each slice of a weight along dim 0."""

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from lightning_gradclip.gradients import norms
from lightning_gradclip.gradients.norms import Tensors
from lightning_gradclip.gradients.reduce import Reduced, reduced
from lightning_gradclip.gradients.units import UnitMeter
from lightning_gradclip.gradients.write import ScaleUnits
from lightning_gradclip.limit.limiter import Limiter, Outcome, Sizes
from lightning_gradclip.select import layout
from lightning_gradclip.select.parameters import Selection
from lightning_gradclip.select.scopes import Units


@final
class UnitLimiter(Limiter):
    """Runs a method over output units."""

    def judge(
        self, gradients: Tensors, step: int, scale: float | Tensor = 1.0, *, on_host: bool, detailed: bool
    ) -> Outcome:
        sizes = self._sizes(gradients, self._of_gradients.each(gradients), scale)
        outcome = self._limited(gradients, sizes, step, self._change, on_host=on_host)
        if self._is_lost(outcome):
            sizes = self._sizes(gradients, self._of_gradients.exact(gradients), scale)
            outcome = self._limited(gradients, sizes, step, self._change, on_host=on_host)
        return outcome

    def _serve(self, served: Selection) -> Units:
        self._units = self._held_units = served.units()
        if self._reducer is not None:
            here = self._reducer.here(range(len(served.params)))
            self._held_units = Units(tuple(served.names[i] for i in here), tuple(map(layout.local, self._params)))
            self._places = {torch.device("cpu"): _places(self._units, here)}
        p = self._method.norm_type
        self._of_gradients, self._of_weights = UnitMeter(self._held_units, p), UnitMeter(self._held_units, p)
        return self._units

    def _change(self, coefs: Tensor) -> ScaleUnits:
        held = coefs if self._reducer is None else coefs[self._places_on(coefs.device)]
        return ScaleUnits(held, self._held_units.counts)

    def _sizes(self, gradients: Tensors, local: Tensor, scale: float | Tensor) -> Sizes:
        method, p = self._method, self._method.norm_type
        vectors = [self._alike(local, gradients).to(self._home())]
        if method.needs_weight:
            vectors.append(self._of_weights.each(self._held()))
        known = self._known(gradients, vectors)
        each = known.norms[0]
        if isinstance(scale, Tensor) or scale != 1.0:
            each = each / scale
        sizes = each / self._root_counts(each) if method.statistic == "rms" else each
        measured = None
        if self.measured is not None:
            wide = each.to(norms.widest(each.device))
            of_parameters = norms.grouped_norms(wide, self._units.index_on(each.device), len(self.served.params), p)
            measured = self._measured_norms(gradients, known, of_parameters)
        joint = each[0].to(norms.widest(each.device)) if len(each) == 1 else norms.joint_norm(each, p)
        return Sizes(each, joint, sizes, known.norms[1] if method.needs_weight else None, measured, known)

    def _alike(self, found: Tensor, gradients: Tensors) -> Tensor:
        """The same in a dtype that does not depend on which gradients a rank happens to have."""
        if self._reducer is None:
            return found
        kinds = {norms.accumulator(one.dtype, self._method.norm_type) or one.dtype for one in self.served.params}
        usual = torch.float64 if kinds & {torch.float64, torch.complex128} else torch.float32
        absent = all(gradient is None for gradient in gradients)
        return found.to(usual if absent else torch.promote_types(found.dtype, usual))

    def _known(self, gradients: Tensors, vectors: list[Tensor]) -> Reduced:
        if self._reducer is None:
            return Reduced(tuple(vectors))
        # Each rank puts what it holds of the units in their places among all units.
        device = self._reducer.device
        places = self._places_on(device)
        spread = [
            torch.zeros(self._units.count, dtype=one.dtype, device=device).index_copy_(0, places, one.to(device))
            for one in vectors
        ]
        owner = self._units.index_on(device)
        return reduced(self._reducer, gradients, spread, self._method.norm_type, owner=owner)

    def _places_on(self, device: torch.device) -> Tensor:
        if device not in self._places:
            self._places[device] = self._places[torch.device("cpu")].to(device)
        return self._places[device]

    def _root_counts(self, each: Tensor) -> Tensor:
        """Square root of the number of elements of each unit, `(S,)`."""
        counts = tuple(
            max(1, one.numel() // max(1, count))
            for one, count in zip(self.served.params, self._units.counts, strict=True)
        )
        index = self._units.index_on(each.device)
        return norms.integers_on(counts, each.device)[index].to(each.dtype).sqrt()


def _places(units: Units, here: Sequence[int]) -> Tensor:
    """Of the units of the parameters at these places that this rank holds a part of, the index among all units."""
    pieces = [torch.zeros(0, dtype=torch.long, device="cpu")]
    for place in here:
        slices = layout.slices(units.params[place])
        held = torch.arange(units.counts[place], device="cpu") if slices is None else slices.cpu()
        pieces.append(held + units.starts[place])
    return torch.cat(pieces)
