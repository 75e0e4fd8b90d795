"""The same steps of a clipper on ranks that hold pieces, and on one process that holds whole gradients."""

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from kit import layouts, workers
from kit.pieces import digest
from lightning_gradclip import (
    AGC,
    ClipMethod,
    Clipper,
    EmaClip,
    Normalize,
    NormClip,
    QuantileClip,
    SigmaClip,
    StepStats,
    ValueClip,
    ZClip,
)

# What each step multiplies the gradients by: powers of two, which are exact in any order of summing up.
STREAM = (1.0, 0.5, 4.0, 1.0, 0.25, 1.0, 8.0, 2.0)

# More than a rank holds of one gradient.
_APART = 2**12
_BASE = 2**7


class Case(NamedTuple):
    """A clipper, and by what each of its steps multiplies the gradients."""

    method: ClipMethod | None
    options: Mapping[str, Any] = {}
    factors: Sequence[float] = (1.0,)


def _limits() -> Iterator[tuple[str, Case]]:
    for per in ("model", "group", "layer", "parameter"):
        for p in (1.0, 2.0, 3.0, math.inf):
            limit = {1.0: 3.0, 2.0: 0.9, 3.0: 0.6, math.inf: 0.3}[p]
            yield f"norm {per} p={p:g}", Case(NormClip(max_norm=limit, norm_type=p, per=per))
        yield f"rms {per}", Case(NormClip(max_norm=0.1, statistic="rms", per=per))
        yield f"min_norm {per}", Case(NormClip(max_norm=20.0, min_norm=1.0 if per == "parameter" else 5.0, per=per))
        yield f"normalize {per}", Case(Normalize(target=0.7, per=per))
    yield "value", Case(ValueClip(max_value=0.1))
    yield "value unlike", Case(ValueClip(min_value=-0.02, max_value=0.3))
    for per in AGC.scopes:
        yield f"agc {per}", Case(AGC(clip_factor=0.5, per=per))
        yield f"agc {per} small", Case(AGC(clip_factor=1e-3, eps=1e-2, per=per))


def _learners() -> Iterator[tuple[str, Case]]:
    for per in ("model", "parameter"):
        yield f"quantile {per}", Case(QuantileClip(q=0.6, window=4, per=per), factors=STREAM)
        yield (
            f"quantile of all {per}",
            Case(QuantileClip(q=0.6, window=None, include_current=True, per=per), {}, STREAM),
        )
        yield f"sigma {per}", Case(SigmaClip(k=1.0, window=5, warmup=3, per=per), factors=STREAM)
        yield f"zclip {per}", Case(ZClip(warmup=3, z_threshold=0.5, per=per), factors=STREAM)
        yield f"ema {per}", Case(EmaClip(warmup=3, beta=0.9, per=per), factors=STREAM)


def _with_options() -> Iterator[tuple[str, Case]]:
    for action in ("skip", "observe"):
        for name, method in {
            "norm model": NormClip(max_norm=1.0),
            "norm parameter": NormClip(max_norm=0.9, per="parameter"),
            "norm within": NormClip(max_norm=100.0, norm_type=math.inf),
            "value": ValueClip(max_value=0.1),
            "agc unit": AGC(clip_factor=0.5),
            "agc parameter": AGC(clip_factor=0.5, per="parameter"),
        }.items():
            yield f"{action} {name}", Case(method, {"action": action})
        for per in ("model", "parameter"):
            yield f"{action} quantile {per}", Case(QuantileClip(q=0.6, window=4, per=per), {"action": action}, STREAM)
    for kind in ("group", "layer", "parameter"):
        for name, method in {
            "only": None,
            "norm": NormClip(),
            "value": ValueClip(max_value=0.1),
            "norm layer p=3": NormClip(norm_type=3.0, per="layer"),
        }.items():
            yield f"measure {kind} {name}", Case(method, {"measure_per": kind})
    yield "agc measured", Case(AGC(clip_factor=0.5), {"measure_per": "layer"})
    yield "some included", Case(NormClip(max_norm=0.5), {"include": "*.weight", "exclude": ["head.*"]})
    yield "agc without the head", Case(AGC(clip_factor=0.1), {"exclude": "head.*"})
    yield "one parameter", Case(NormClip(max_norm=0.5, statistic="rms"), {"include": "head.bias"})
    yield "schedule", Case(NormClip(max_norm={0: 8.0, 7: 0.5}), {"measure_per": "parameter"}, STREAM)


CASES = dict([*_limits(), *_learners(), *_with_options()])
# Some of each kind.
CORE = [
    *(f"norm {per} p=2" for per in ("model", "group", "layer", "parameter")),
    *(
        "norm layer p=inf",
        "norm model p=inf",
        "norm model p=1",
        "norm model p=3",
        "rms model",
        "rms parameter",
        "min_norm layer",
        "normalize parameter",
    ),
    *("value", "value unlike", "agc unit", "agc parameter", "quantile parameter", "sigma model", "zclip parameter"),
    *("ema model", "skip norm model", "observe agc unit", "observe value", "skip quantile model", "some included"),
    *("measure parameter only", "measure layer norm"),
]


class Taken(NamedTuple):
    """What some steps of a clipper have left.

    Attributes:
        steps: The statistics of each step.
        gradients: Whole gradients after the last.
        state: The clipper's state.
        metrics: Its metrics.
    """

    steps: list[dict[str, Tensor]]
    gradients: Any
    state: dict[str, Any]
    metrics: dict[str, float]


def shown(stats: StepStats) -> dict[str, Tensor]:
    names = ("norm", "norm_clipped", "limit", "coef", "clipped", "finite", "skipped", "sizes", "limits")
    return {name: getattr(stats, name) for name in names}


def two_groups(module: nn.Module) -> Optimizer:
    """Biases in a group of their own."""
    pairs = list(module.named_parameters())
    groups = [[one for name, one in pairs if name.endswith("bias") is biases] for biases in (False, True)]
    return SGD([{"params": some} for some in groups], lr=0.1)


class Spread:
    """The network under one layout on this rank, with gradients that can be had again."""

    def __init__(self, name: str, rank: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> None:
        self.module = layouts.spread(name, layouts.net(dtype))
        way = layouts.SPREADS[name]
        self.optimizer = two_groups(self.module)
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(8, 4, layouts.WIDTHS["features"], generator=generator, dtype=torch.float64).to(dtype)
        y = torch.randn(8, 4, layouts.WIDTHS["outputs"], generator=generator, dtype=torch.float64).to(dtype)
        mine = slice(way.part(rank) * 8 // way.parts, (way.part(rank) + 1) * 8 // way.parts)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            (3 * (self.module(x[mine]) - y[mine]).square().mean()).backward()
        self.params = list(self.module.parameters())
        self._given = [parameter.grad for parameter in self.params]
        self._values = [None if one is None else held(one).clone() for one in self._given]

    def give(self, factor: float = 1.0) -> None:
        """The same gradients once more, each the same object as before."""
        self._put(None if values is None else values * factor for values in self._values)

    def whole(self) -> dict[str, Tensor | None]:
        """Whole gradients; all ranks ask together."""
        return layouts.whole(self.module, gradients=True)

    def pieces(self) -> list[Tensor | None]:
        """What this rank holds of the gradients, copied, `(n,)` each."""
        gradients = [parameter.grad for parameter in self.params]
        return [
            None if one is None else (added_up(one) if is_partial(one) else held(one)).flatten().clone()
            for one in gradients
        ]

    def places(self) -> dict[str, tuple[Tensor, Tensor]]:
        """For each entry of the whole gradients a rank that holds it, and its place there."""
        found = {name: torch.zeros(one.shape, dtype=torch.long) for name, one in self.whole().items()}
        # Digit by digit, which any dtype holds exactly.
        for digit in (_BASE, 1):
            self._put(map(partial(self._labels, digit), self._given, self._values))
            for name, one in self.whole().items():
                found[name] += digit * one.long()
        self.give()
        return {name: (one // _APART, one % _APART) for name, one in found.items()}

    def _labels(self, digit: int, gradient: Tensor | None, values: Tensor | None) -> Tensor | None:
        if gradient is None or values is None:
            return None
        if is_partial(gradient) and dist.get_rank() > 0:
            return torch.zeros_like(values)
        labels = torch.arange(values.numel()) + _APART * dist.get_rank()
        return (labels // digit % _BASE).view(values.shape).to(values.dtype)

    def _put(self, values: Iterable[Tensor | None]) -> None:
        with torch.no_grad():
            for parameter, gradient, value in zip(self.params, self._given, values, strict=True):
                parameter.grad = gradient
                if gradient is not None:
                    held(gradient).copy_(value)

    def take(self, case: Case) -> Taken:
        clipper = Clipper(self.module, case.method, optimizer=self.optimizer, **case.options)
        return _take(clipper, case, self.give, self.pieces)


def _take(clipper: Clipper, case: Case, give: Any, whole: Any) -> Taken:
    steps = []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "dropped optimizer step")
        for factor in case.factors:
            give(factor)
            steps.append(shown(clipper.step()))
    return Taken(steps, whole(), clipper.state_dict(), clipper.metrics())


def held(gradient: Tensor) -> Tensor:
    """What this rank holds of it."""
    return gradient.to_local() if hasattr(gradient, "to_local") else gradient


def is_partial(gradient: Tensor) -> bool:
    """Whether what the ranks hold is still to be added up."""
    return any(one.is_partial() for one in getattr(gradient, "placements", ()))


def added_up(gradient: Any) -> Tensor:
    return gradient.full_tensor()


def joined(
    pieces: Sequence[Sequence[Tensor | None]], places: Mapping[str, tuple[Tensor, Tensor]]
) -> dict[str, Tensor | None]:
    """Whole gradients from what each rank holds of them."""
    result: dict[str, Tensor | None] = {}
    for (name, (ranks, entries)), of_ranks in zip(places.items(), zip(*pieces, strict=True), strict=True):
        flat = torch.zeros(len(of_ranks), max(0 if one is None else len(one) for one in of_ranks))
        result[name] = None
        if all(one is None for one in of_ranks):
            continue
        flat = flat.to(next(one.dtype for one in of_ranks if one is not None))
        for rank, one in enumerate(of_ranks):
            if one is not None:
                flat[rank, : len(one)] = one
        result[name] = flat[ranks, entries]
    return result


def dense(case: Case, gradients: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> Taken:
    """What one process makes of whole gradients."""
    module = layouts.net(dtype)
    params = dict(module.named_parameters())

    def give(factor: float) -> None:
        for name, parameter in params.items():
            parameter.grad = gradients[name] * factor

    clipper = Clipper(module, case.method, optimizer=two_groups(module), **case.options)
    return _take(clipper, case, give, lambda: {name: one.grad for name, one in params.items()})


class Run(NamedTuple):
    """All cases under one layout.

    Attributes:
        gradients: Whole gradients before clipping.
        taken: For each rank what was left, by case; an error where one was raised.
        bits: Those of the gradients.
    """

    gradients: dict[str, Tensor]
    taken: list[dict[str, Taken | Exception]]
    bits: bytes


def run_all(
    cases: Mapping[str, Mapping[str, Case]], dtype: torch.dtype = torch.float32, seed: int = 0
) -> dict[str, Run]:
    """By layout its cases, all in one go."""

    def work(rank: int, name: str) -> Any:
        spread = Spread(name, rank, dtype, seed)
        before, places = spread.whole(), spread.places()
        taken: dict[str, Any] = {}
        for label, case in cases[name].items():
            try:
                taken[label] = spread.take(case)
            except ValueError as error:
                taken[label] = error
        return before, places, taken

    answers = workers.run_each(work, {name: layouts.SPREADS[name].world for name in cases})
    return {name: _put_together(ranks) for name, ranks in answers.items()}


def _put_together(answers: Sequence[Any]) -> Run:
    before, places, _ = answers[0]
    taken = [answer[2] for answer in answers]
    for label in taken[0]:
        of_ranks = [one[label] for one in taken]
        if not isinstance(of_ranks[0], Exception):
            whole = joined([one.gradients for one in of_ranks], places)
            for one in taken:
                one[label] = one[label]._replace(gradients=whole)
    return Run(before, taken, digest(before))
