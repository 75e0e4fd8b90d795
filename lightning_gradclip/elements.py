"""Single entries as scopes: bounds that every entry of a gradient is clamped to."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_gradclip import pnorm, reduce, write
from lightning_gradclip.limit import Gradients, Limiter, Outcome
from lightning_gradclip.measure import Meter
from lightning_gradclip.select import Selection
from lightning_gradclip.stats import pack_elements

# Entries compared at once, so that what is compared is small beside the gradients, and on CPU stays in the cache.
_CHUNK, _CHUNK_ON_DEVICE = 2**18, 2**24
# No entry exceeds the 2-norm, but for the norm's rounding.
_ROUNDING = 1e-5


@dataclass(slots=True)
class Clamping(Outcome):
    """One step of a method with bounds.

    Attributes:
        low: Smallest entry allowed.
        high: Largest entry allowed.
        touched: Indices of the parameters that may have entries outside.
    """

    low: float
    high: float
    touched: tuple[int, ...]


class ElementLimiter(Limiter):
    """Runs a method over single entries. The one size is the joint norm, the one limit the upper bound."""

    def serve(self, selection: Selection) -> None:
        super().serve(selection)
        for name, parameter in zip(selection.names, selection.params, strict=True):
            if parameter.is_complex():
                raise TypeError(
                    f"parameter {name!r} is complex, and complex numbers have no order to clamp by; "
                    f"leave it out with exclude={name!r}, or clip it by norm"
                )

    def write(self, outcome: Outcome) -> None:
        """Clamp the gradients that have entries outside the bounds."""
        if isinstance(outcome, Clamping):
            write.clamp_([self._params[i] for i in outcome.touched], outcome.low, outcome.high)

    def excess(self, outcome: Outcome) -> str:
        """Which share of the entries is outside, in words."""
        if not isinstance(outcome, Clamping) or isinstance(outcome.row, Tensor):
            return super().excess(outcome)
        return f"{outcome.row.clipped:.3g} of the entries lie outside [{outcome.low:g}, {outcome.high:g}]"

    def _outcome(self, gradients: Gradients, local_norms: Tensor, step: int, scale: float | Tensor) -> Outcome:
        p = self._method.norm_type
        norms = reduce.global_sizes(local_norms) / scale
        joint = pnorm.joint_norm(norms, p)
        limits = self._method.limit(joint.view(1), None, step)
        low, high = self._method.bounds(step)
        touched, counts, clamped = self._outside(gradients, local_norms, low * float(scale), high * float(scale))
        after = joint
        if touched:
            places = pnorm.integers_on(touched, norms.device)
            after = pnorm.joint_norm(norms.index_copy(0, places, clamped / scale), p)
        total = max(1, sum(gradient.numel() for gradient in gradients if gradient is not None))
        row = pack_elements(joint, after, high, counts.sum().to(joint.dtype) / total)
        measured = self._measured_norms(gradients, norms)
        return Clamping(joint.view(1), limits, None, self._on_host_if_asked(row), measured, low, high, touched)

    def _outside(
        self, gradients: Gradients, norms: Tensor, low: float, high: float
    ) -> tuple[tuple[int, ...], Tensor, Tensor]:
        """The parameters with entries outside the bounds, how many each has, and its norm when they are clamped.

        On devices, where looking would make the host wait, all parameters with a gradient.
        """
        on_cpu = norms.device.type == "cpu"
        places = [i for i, gradient in enumerate(gradients) if gradient is not None]
        if on_cpu:
            bound = min(-low, high) * (1 - _ROUNDING)
            far = [not norm <= bound for norm in norms.tolist()]  # NaN is far
            places = [i for i in places if far[i]]
        counts, clamped = [norms.new_zeros(0)], [norms.new_zeros(0)]
        touched: list[int] = []
        for i in places:
            values = pnorm.dense_values(gradients[i])  # pyright: ignore[reportArgumentType]
            least, most = write.stored_bounds(values.dtype, low, high)
            if on_cpu and _is_within(values, least, most):
                continue
            count, norm = _compared(values, least, most, self._method.norm_type)
            if on_cpu and not count:
                continue
            touched.append(i)
            counts.append(count.view(1).to(norms))
            clamped.append(norm.view(1).to(norms))
        return tuple(touched), torch.cat(counts), torch.cat(clamped)


def _is_within(values: Tensor, low: float, high: float) -> bool:
    least, most = torch.aminmax(values)
    return low <= least.item() and most.item() <= high


def _compared(values: Tensor, low: float, high: float, norm_type: float) -> tuple[Tensor, Tensor]:
    """The number of entries outside the bounds, and the norm when they are clamped, both 0-d."""
    flat = pnorm.in_memory_order(values).reshape(-1)
    size = _CHUNK if values.device.type == "cpu" else _CHUNK_ON_DEVICE
    counts, norms = [], []
    for chunk in flat.split(size):
        counts.append(((chunk < low) | (chunk > high)).sum())
        norms.append(Meter(norm_type).each([chunk.clamp(low, high)]))
    return torch.stack(counts).sum(), pnorm.joint_norm(torch.cat(norms), norm_type)
