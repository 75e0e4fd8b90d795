"""Folding: a fused optimizer that is handed the coefficient trains as if its gradients had been clipped."""

import inspect
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer

from kit.boring import Manual, Prescribed, Regression, csv_rows, equal, fit, gradients, norm, regression_data, weights
from kit.gradients import Witness, named, same_bits
from lightning_gradclip import (
    AGC,
    ClipMethod,
    Clipper,
    GradientClipping,
    Normalize,
    NormClip,
    QuantileClip,
    StepStats,
    ValueClip,
    ZClip,
)

STEPS = 200
GIVEN = gradients(STEPS)
# Half of them are over it.
LIMIT = sorted(map(norm, GIVEN))[STEPS // 2]
# A power of two: scaling is exact.
SCALE = 2.0**16
# Times the scale it leaves the range of float32; alone it does not.
OVERFLOWING = 1e35

MAKE: Mapping[str, Callable[[Any], Optimizer]] = {
    "adam": lambda params: Adam(params, lr=0.01, fused=True),
    "adam with weight decay": lambda params: Adam(params, lr=0.01, weight_decay=0.1, amsgrad=True, fused=True),
    "adamw": lambda params: AdamW(params, lr=0.01, weight_decay=0.1, fused=True),
    "sgd": lambda params: SGD(params, lr=1e-3, fused=True),
    "momentum": lambda params: SGD(params, lr=1e-3, momentum=0.9, dampening=0.1, weight_decay=0.1, fused=True),
    "nesterov": lambda params: SGD(params, lr=1e-3, momentum=0.9, nesterov=True, weight_decay=0.1, fused=True),
    "adagrad": lambda params: Adagrad(params, lr=0.1, weight_decay=0.1, fused=True),
}
METHODS: Mapping[str, Callable[[], ClipMethod]] = {
    "norm": lambda: NormClip(max_norm=LIMIT),
    "rms": lambda: NormClip(max_norm=LIMIT / 26**0.5, statistic="rms"),
    "normalize": lambda: Normalize(target=LIMIT),
    "zclip": lambda: ZClip(warmup=10, z_threshold=0.5),
    "quantile": lambda: QuantileClip(q=0.6, window=20),
}
# Each optimizer with one method, and each method with one optimizer.
PAIRS = [*((make, "norm") for make in MAKE), *(("adamw", method) for method in METHODS if method != "norm")]
every_pair = pytest.mark.parametrize(("make", "method"), PAIRS, ids=map(" ".join, PAIRS))
every_optimizer = pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)


class Loop:
    """A plain loop over given gradients, so that no rounding comes back through the weights."""

    def __init__(
        self,
        make: Callable[[Any], Optimizer] = MAKE["adamw"],
        method: ClipMethod | None = None,
        *,
        scaler: GradScaler | None = None,
        **options: Any,
    ) -> None:
        self.net = Prescribed()
        self.optimizer = make(self.net.parameters())
        self.scaler = GradScaler("cpu", enabled=False) if scaler is None else scaler
        method = NormClip(max_norm=LIMIT) if method is None else method
        self.clipper = Clipper(self.net.named_parameters(), method, optimizer=self.optimizer, **options)
        self._given = iter(GIVEN)

    def backward(self, factor: float = 1.0) -> Witness:
        given = next(self._given)
        for name, parameter in self.net.named_parameters():
            # In a dtype of its own: the default one may have changed.
            parameter.grad = self.scaler.scale(given[name] * factor).to(parameter.dtype)
        return Witness(list(self.net.named_parameters()))

    def step(self, factor: float = 1.0) -> StepStats:
        self.backward(factor)
        stats = self.clipper.step(self.scaler)
        self.finish()
        return stats

    def finish(self) -> None:
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def everything(self) -> list[Tensor]:
        state = self.optimizer.state_dict()["state"]
        tensors = [value for entry in state.values() for value in entry.values() if isinstance(value, Tensor)]
        return [tensor.detach().clone() for tensor in (*self.net.parameters(), *tensors)]


def handed(optimizer: Optimizer) -> dict[str, Any]:
    """The attributes that a fused optimizer looks at."""
    return {name: vars(optimizer)[name] for name in ("grad_scale", "found_inf") if name in vars(optimizer)}


def leaves(tree: Any) -> list[Tensor]:
    if isinstance(tree, Tensor):
        return [tree]
    branches = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, (list, tuple)) else ()
    return [leaf for branch in branches for leaf in leaves(branch)]


def assert_close(one: Any, other: Any) -> None:
    """Equal to a millionth of the largest entry of each tensor."""
    pairs = list(zip(leaves(one), leaves(other), strict=True))
    assert pairs
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6 * b.abs().max().item())


def assert_same(one: list[Tensor], other: list[Tensor]) -> None:
    assert len(one) == len(other) >= 4
    assert all(same_bits(a, b) for a, b in zip(one, other, strict=True))


def assert_same_row(one: StepStats, other: StepStats) -> None:
    assert tuple(one.row) == pytest.approx(tuple(other.row), rel=1e-5, abs=1e-6)


class TestTraining:
    @every_pair
    def test_it_is_that_with_clipped_gradients(self, make: str, method: str) -> None:
        folding, writing = (Loop(MAKE[make], METHODS[method](), fold=fold) for fold in (True, False))
        for _ in range(STEPS):
            assert_same_row(folding.step(), writing.step())
        assert_close(folding.everything(), writing.everything())
        metrics = folding.clipper.metrics()
        assert metrics == pytest.approx(writing.clipper.metrics(), rel=1e-5)
        # Steps that clip and steps that do not.
        assert (0.0 < metrics["clip_rate"] < 1.0) is (method != "normalize")

    def test_it_is_not_that_without_clipping(self) -> None:
        folding, bare = Loop(fold=True), Loop()
        for _ in range(STEPS):
            folding.step()
            bare.backward()
            bare.finish()
        assert max((a - b).abs().max() for a, b in zip(folding.everything(), bare.everything(), strict=True)) > 1e-2

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
    def test_parameters_of_other_dtypes(self, dtype: torch.dtype) -> None:
        folded, written = ([(name, one) for name, one in named(small(dtype))] for _ in range(2))
        for pairs, fold in ((folded, True), (written, False)):
            optimizer = SGD([parameter for _, parameter in pairs], lr=0.1, fused=True)
            assert Clipper(pairs, NormClip(max_norm=0.5), optimizer=optimizer, fold=fold).step().clipped
            optimizer.step()
        for (_, one), (_, other) in zip(folded, written, strict=True):
            rtol = 1e-7 if dtype == torch.float64 else 2 * torch.finfo(dtype).eps
            torch.testing.assert_close(one, other, rtol=rtol, atol=0)

    def test_another_default_dtype_changes_nothing(self) -> None:
        folding, writing = Loop(fold=True), Loop()
        torch.set_default_dtype(torch.float64)
        try:
            assert sum(folding.step().clipped.item() for _ in range(20)) > 0
            for _ in range(20):
                writing.step()
        finally:
            torch.set_default_dtype(torch.float32)
        assert_close(folding.everything(), writing.everything())

    def test_several_groups_have_one_coefficient(self) -> None:
        def make(params: Any) -> Optimizer:
            first, *rest = params
            return AdamW([{"params": [first]}, {"params": rest, "lr": 0.1}], lr=0.01, fused=True)

        folding, writing = Loop(make, fold=True), Loop(make)
        for _ in range(20):
            folding.step()
            writing.step()
        assert_close(folding.everything(), writing.everything())


def small(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Gradients of norm 5."""
    return {"a": torch.tensor([3.0, 0.0], dtype=dtype), "b": torch.tensor([[0.0], [4.0]], dtype=dtype)}


class TestGradients:
    """Only the optimizer writes them, as it does for every GradScaler."""

    @pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
    def test_the_clipper_does_not_write_them(self, method: Callable[[], ClipMethod]) -> None:
        loop = Loop(method=method(), fold=True)
        changed = 0
        for _ in range(30):
            witness = loop.backward()
            changed += loop.clipper.step().coef.item() != 1
            assert witness.written() == set()
            loop.finish()
        assert changed > 0

    def test_nothing_is_handed_over_where_nothing_is_to_be_clipped(self) -> None:
        loop = Loop(method=NormClip(max_norm=1e6), fold=True)
        for _ in range(3):
            loop.backward()
            loop.clipper.step()
            assert handed(loop.optimizer) == {}
            loop.finish()

    def test_what_is_handed_over_divides(self) -> None:
        pairs = named(small())
        optimizer = SGD([parameter for _, parameter in pairs], lr=0.1, fused=True)
        stats = Clipper(pairs, NormClip(max_norm=0.5), optimizer=optimizer, fold=True).step()
        (scale,) = handed(optimizer).values()
        assert (scale.dtype, scale.shape, scale.item()) == (torch.float32, (), pytest.approx(10.0, rel=1e-6))
        assert stats.coef.item() == pytest.approx(0.1, rel=1e-6)
        assert stats.norm_clipped.item() == pytest.approx(0.5, rel=1e-6)

    def test_a_coefficient_of_zero_stops_the_gradients(self) -> None:
        pairs = named(small())
        optimizer = SGD([parameter for _, parameter in pairs], lr=0.1, fused=True)
        method = NormClip(max_norm={0: 1e-320})
        assert Clipper(pairs, method, optimizer=optimizer, fold=True).step().clipped
        optimizer.step()
        assert all((parameter == 0.5).all() for _, parameter in pairs)


class TestAttributes:
    @every_optimizer
    def test_they_are_gone_after_the_step(self, make: Callable[[Any], Optimizer]) -> None:
        loop = Loop(make, Normalize(), fold=True)
        for _ in range(3):
            loop.backward()
            loop.clipper.step()
            assert set(handed(loop.optimizer)) == {"grad_scale"}
            loop.finish()
            assert handed(loop.optimizer) == {}
            # Else the next step without clipping would divide again.
            assert not hasattr(loop.optimizer, "grad_scale")

    def test_a_step_that_was_left_out_leaves_nothing_behind(self) -> None:
        folding, writing = Loop(fold=True), Loop()
        for loop in (folding, writing):
            loop.backward(factor=1e3)
            assert loop.clipper.step().clipped
            # The user goes on without optimizer.step().
            loop.backward(factor=1e-6)
            assert not loop.clipper.step().clipped
        assert handed(folding.optimizer) == {}
        folding.finish()
        writing.finish()
        assert_same(folding.everything(), writing.everything())

    def test_the_last_of_two_clippings_counts(self) -> None:
        pairs = named(small())
        optimizer = SGD([parameter for _, parameter in pairs], lr=1.0, fused=True)
        clipper = Clipper(pairs, NormClip(max_norm=0.5), optimizer=optimizer, fold=True)
        for _ in range(2):
            assert clipper.step().norm.item() == pytest.approx(5.0)
        optimizer.step()
        assert pairs[0][1].tolist() == pytest.approx([0.5 - 0.3, 0.5], rel=1e-6)

    def test_a_step_without_gradients_withdraws(self) -> None:
        loop = Loop(method=Normalize(), fold=True)
        loop.backward()
        loop.clipper.step()
        loop.optimizer.zero_grad()
        loop.clipper.step()
        assert handed(loop.optimizer) == {}

    def test_under_a_scaler_that_did_not_step(self) -> None:
        loop = Loop(method=Normalize(), fold=True, scaler=GradScaler("cpu", init_scale=SCALE))
        for _ in range(2):
            loop.backward()
            loop.clipper.step(loop.scaler)
            assert set(handed(loop.optimizer)) == {"grad_scale"}
        loop.finish()
        assert handed(loop.optimizer) == {}


def constructed(kind: type[Optimizer], parameter: Tensor) -> Optimizer | None:
    """A fused optimizer of this class, or None where it takes no such argument or refuses it."""
    if "fused" not in inspect.signature(kind).parameters:
        return None
    try:
        return kind([parameter], fused=True)
    except (RuntimeError, TypeError):
        return None


OF_TORCH = [
    kind
    for kind in vars(torch.optim).values()
    if inspect.isclass(kind) and issubclass(kind, Optimizer) and kind is not Optimizer
]


def matrix() -> tuple[list[tuple[str, nn.Parameter]], nn.Parameter]:
    (pair,) = named({"weight": torch.tensor([[3.0, 0.0], [0.0, 4.0]])})
    return [pair], pair[1]


class TestOptimizers:
    """Every optimizer of torch either trains as with clipped gradients or is refused by name."""

    def test_the_walk_finds_them(self) -> None:
        assert {Adam, AdamW, SGD, Adagrad, torch.optim.RMSprop, torch.optim.LBFGS} <= set(OF_TORCH)
        fused = {kind for kind in OF_TORCH if constructed(kind, matrix()[1]) is not None}
        assert {Adam, AdamW, SGD, Adagrad} <= fused < set(OF_TORCH)

    @pytest.mark.parametrize("kind", OF_TORCH)
    def test_one_that_can_be_fused(self, kind: type[Optimizer]) -> None:
        results = []
        for fold in (True, False):
            pairs, parameter = matrix()
            optimizer = constructed(kind, parameter)
            if optimizer is None:
                break
            clipper = Clipper(pairs, NormClip(max_norm=0.1), optimizer=optimizer, fold=fold)
            for i in range(5):
                parameter.grad = torch.tensor([[1.0, 0.1 * i], [-1.0, 0.02]]) * (i != 2)
                clipper.step()
                optimizer.step()
            results.append(parameter.detach())
        if len(results) == 2:
            assert not (results[0] == 0.5).all()
            assert_close(*results)

    @pytest.mark.parametrize("kind", OF_TORCH)
    def test_one_that_is_not_fused_is_refused_by_name(self, kind: type[Optimizer]) -> None:
        pairs, parameter = matrix()
        with pytest.raises(ValueError, match=rf"but {kind.__name__} would ignore it; use .*fused=True, or fold=False"):
            Clipper(pairs, NormClip(), optimizer=kind([parameter]), fold=True)

    def test_one_group_that_is_not_fused_is_enough(self) -> None:
        pairs = named(small())
        groups = [{"params": [pairs[0][1]]}, {"params": [pairs[1][1]], "fused": False}]
        with pytest.raises(ValueError, match="SGD would ignore it"):
            Clipper(pairs, NormClip(), optimizer=SGD(groups, lr=0.1, fused=True), fold=True)

    def test_one_that_is_fused_no_more_is_refused_when_it_matters(self) -> None:
        loop = Loop(fold=True)
        loop.step()
        loop.optimizer.param_groups[0]["fused"] = False
        loop.backward(factor=1e6)
        with pytest.raises(ValueError, match="AdamW would ignore it"):
            loop.clipper.step()

    def test_two_clippers_of_one_optimizer(self) -> None:
        loop = Loop(fold=True)
        other = Clipper(loop.net.named_parameters(), NormClip(max_norm=1e-3), optimizer=loop.optimizer, fold=True)
        loop.backward(factor=1e3)
        assert loop.clipper.step().clipped
        before = handed(loop.optimizer)
        with pytest.raises(RuntimeError, match=r"AdamW\.grad_scale is set already, so another clipper"):
            other.step()
        assert handed(loop.optimizer) == before

    def test_a_wrapper_that_keeps_attributes_to_itself(self) -> None:
        results = []
        for fold in (True, False):
            fabric = Fabric(accelerator="cpu", devices=1)
            module = Prescribed()
            net, optimizer = fabric.setup(module, MAKE["adamw"](module.parameters()))
            net.mark_forward_method("loss")
            clipper = Clipper(module.named_parameters(), NormClip(max_norm=LIMIT), optimizer=optimizer, fold=fold)
            for gradient in GIVEN[:10]:
                optimizer.zero_grad()
                fabric.backward(net.loss(gradient))
                clipper.step()
                optimizer.step()
            assert clipper.metrics()["clip_rate"] not in (0.0, 1.0)
            assert handed(optimizer.optimizer) == {}
            results.append(weights(module))
        assert_close(*results)


class TestArguments:
    @pytest.mark.parametrize(
        ("method", "options", "message"),
        [
            (None, {}, "nothing is to be clipped; use fold=False"),
            (NormClip(), {"action": "observe"}, "nothing is to be clipped; use fold=False"),
            (NormClip(per="layer"), {}, "has one for each layer; use fold=False"),
            (NormClip(per="parameter"), {}, "has one for each parameter"),
            (NormClip(per="group"), {}, "has one for each group"),
            (AGC(), {}, "has one for each unit"),
            (ValueClip(), {}, "has one for each element"),
        ],
    )
    def test_what_cannot_be_one_coefficient_is_refused(
        self, method: ClipMethod | None, options: dict[str, Any], message: str
    ) -> None:
        pairs = named(small())
        optimizer = SGD([parameter for _, parameter in pairs], lr=0.1, fused=True)
        with pytest.raises(ValueError, match=f"^fold=True .*{message}"):
            Clipper(pairs, method, optimizer=optimizer, fold=True, **options)
        with pytest.raises(ValueError, match=f"^fold=True .*{message}"):
            GradientClipping(method, fold=True, **options)

    @pytest.mark.parametrize("options", [{"exclude": "a"}, {"include": ["b"]}])
    def test_patterns_that_leave_out_a_parameter_are_refused(self, options: dict[str, Any]) -> None:
        pairs = named(small())
        optimizer = SGD([parameter for _, parameter in pairs], lr=0.1, fused=True)
        with pytest.raises(ValueError, match="include and exclude leave out 1 of its 2 parameters; use fold=False"):
            Clipper(pairs, NormClip(), optimizer=optimizer, fold=True, **options)

    def test_a_group_added_later_is_refused_where_the_patterns_leave_it_out(self) -> None:
        pairs = named(small())
        optimizer = SGD([pairs[0][1]], lr=0.1, fused=True)
        clipper = Clipper(pairs, NormClip(), optimizer=optimizer, exclude="b", fold=True)
        clipper.step()
        optimizer.step()
        optimizer.add_param_group({"params": [pairs[1][1]]})
        with pytest.raises(ValueError, match="leave out 1 of its 2"):
            clipper.step()

    def test_it_needs_an_optimizer(self) -> None:
        with pytest.raises(ValueError, match="this clipper has none; pass optimizer="):
            Clipper(named(small()), NormClip(), fold=True)


class TestPolicies:
    """On the host, where nothing is left to the optimizer but the coefficient."""

    def test_a_step_over_the_limit_is_dropped(self) -> None:
        folding, writing = (Loop(action="skip", max_consecutive_skips=None, fold=fold) for fold in (True, False))
        for loop in (folding, writing):
            with pytest.warns(RuntimeWarning, match="is over its limit"):
                dropped = [loop.step().skipped.item() for _ in range(20)]
            assert 0 < sum(dropped) < 20
        assert_same(folding.everything(), writing.everything())
        assert folding.clipper.metrics() == writing.clipper.metrics()

    def test_too_many_dropped_steps_end_the_run(self) -> None:
        loop = Loop(action="skip", max_consecutive_skips=0, fold=True)
        loop.backward(factor=1e6)
        with pytest.raises(FloatingPointError, match="1 optimizer steps in a row were dropped"):
            loop.clipper.step()

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("nonfinite", ["skip", "zero", "ignore"])
    def test_steps_that_are_not_finite(self, nonfinite: str, bad: float) -> None:
        folding, writing = (Loop(nonfinite=nonfinite, fold=fold) for fold in (True, False))
        rows = []
        for loop in (folding, writing):
            loop.step()
            loop.backward(factor=1e3)
            loop.net.encoder.weight.grad[1, 2] = bad
            if nonfinite == "skip":
                with pytest.warns(RuntimeWarning, match=r"non-finite gradients in encoder\.weight"):
                    rows.append(loop.clipper.step())
            else:
                rows.append(loop.clipper.step())
            loop.finish()
        assert not rows[0].finite
        assert tuple(rows[0].row) == pytest.approx(tuple(rows[1].row), rel=1e-5, nan_ok=True)
        assert handed(folding.optimizer) == {}
        if nonfinite == "ignore":
            assert not folding.net.encoder.weight[1, 2].isfinite()
        else:
            for loop in (folding, writing):
                loop.step()
        for one, other in zip(folding.everything(), writing.everything(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6, equal_nan=True)

    def test_raising_hands_nothing_over(self) -> None:
        loop = Loop(nonfinite="raise", fold=True)
        witness = loop.backward(factor=math.nan)
        with pytest.raises(FloatingPointError, match=r"non-finite gradients at optimizer step 0 in encoder\.weight"):
            loop.clipper.step()
        assert handed(loop.optimizer) == {}
        assert witness.written() == set()

    def test_zeroed_and_still_over_the_limit(self) -> None:
        loop = Loop(nonfinite="zero", action="skip", fold=True)
        before = loop.everything()
        loop.backward(factor=1e6)
        loop.net.encoder.weight.grad[1, 2] = math.nan
        with pytest.warns(RuntimeWarning, match="over its limit"):
            assert loop.clipper.step().skipped
        loop.finish()
        assert_same(loop.everything(), before)


class TestScaler:
    @every_pair
    def test_it_trains_as_without_folding(self, make: str, method: str) -> None:
        # Not the first: torch's fused SGD would leave its momentum uninitialised, with or without a clipper.
        overflows = (3, 7, 8, 31)
        loops = []
        for fold in (True, False):
            scaler = GradScaler("cpu", init_scale=SCALE, growth_interval=16)
            loop = Loop(MAKE[make], METHODS[method](), scaler=scaler, fold=fold)
            skipped = [loop.step(OVERFLOWING if i in overflows else 1.0).skipped.item() for i in range(60)]
            assert [i for i, one in enumerate(skipped) if one] == list(overflows)
            assert handed(loop.optimizer) == {}
            loops.append(loop)
        folding, writing = loops
        assert folding.scaler.get_scale() == writing.scaler.get_scale()
        assert_close(folding.everything(), writing.everything())
        assert folding.clipper.metrics(reset=False) == pytest.approx(writing.clipper.metrics(reset=False), rel=1e-5)
        assert folding.clipper.metrics()["overflows"] == len(overflows)

    def test_it_does_not_unscale(self) -> None:
        loop = Loop(scaler=GradScaler("cpu", init_scale=SCALE), fold=True)
        witness = loop.backward(factor=1e3)
        assert loop.clipper.step(loop.scaler).clipped
        assert witness.written() == set()
        # Raises if they are unscaled already.
        loop.scaler.unscale_(loop.optimizer)

    def test_gradients_that_the_user_has_unscaled(self) -> None:
        loops = []
        for unscales in (True, False):
            loop = Loop(scaler=GradScaler("cpu", init_scale=SCALE), fold=True)
            for _ in range(20):
                loop.backward()
                if unscales:
                    loop.scaler.unscale_(loop.optimizer)
                loop.clipper.step(loop.scaler)
                loop.finish()
            assert loop.clipper.metrics()["clip_rate"] not in (0.0, 1.0)
            loops.append(loop.everything())
        assert_close(*loops)

    @pytest.mark.parametrize("nonfinite", ["skip", "zero", "raise", "ignore"])
    def test_an_overflow_is_the_scalers_business(self, nonfinite: str) -> None:
        loop = Loop(scaler=GradScaler("cpu", init_scale=SCALE), fold=True, nonfinite=nonfinite, max_consecutive_skips=0)
        before = [parameter.detach().clone() for parameter in loop.net.parameters()]
        for i in range(3):
            stats = loop.step(OVERFLOWING)
            assert (stats.finite.item(), stats.skipped.item()) == (False, True)
            assert loop.scaler.get_scale() == SCALE / 2 ** (i + 1)
        assert_same([parameter.detach() for parameter in loop.net.parameters()], before)

    def test_a_step_over_the_limit_is_dropped(self) -> None:
        loop = Loop(scaler=GradScaler("cpu", init_scale=SCALE), action="skip", fold=True)
        loop.step(factor=1e-3)
        before = loop.everything()
        loop.backward(factor=1e3)
        with pytest.warns(RuntimeWarning, match="over its limit"):
            assert loop.clipper.step(loop.scaler).skipped
        loop.finish()
        assert_same(loop.everything(), before)
        assert loop.scaler.get_scale() == SCALE


def clipping(method: ClipMethod | None = None, **options: Any) -> GradientClipping:
    return GradientClipping(NormClip(max_norm=LIMIT) if method is None else method, **options)


def trained(given: Any, fold: bool, module: Any = Prescribed, **options: Any) -> tuple[Any, Any]:
    """Weights after training, and the optimizer's state; the folded run must have left nothing behind."""
    module = module(MAKE["adamw"])
    method = options.pop("method", None)
    trainer = fit(module, given, clipping(method, fold=fold), **options)
    (optimizer,) = trainer.optimizers
    assert handed(optimizer) == {}
    return weights(module), optimizer.state_dict()["state"]


class Stepping(Manual):
    """Manual optimization with an optimizer of choice."""

    def __init__(self, make: Callable[[Any], Optimizer]) -> None:
        super().__init__()
        self.make_optimizer = make


class Unwritten(Callback):
    """Listed after the clipping: sees what it has done."""

    def __init__(self) -> None:
        self.coefficients: list[float] = []
        self.norms: list[float] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: nn.Module, optimizer: Optimizer) -> None:
        grads = {name: parameter.grad for name, parameter in pl_module.named_parameters()}
        self.norms.append(norm(grads))
        self.coefficients.append(1 / handed(optimizer)["grad_scale"].item() if handed(optimizer) else 1.0)


class TestTrainer:
    @pytest.mark.parametrize("accumulate", [1, 3])
    @pytest.mark.parametrize("method", [lambda: NormClip(max_norm=LIMIT), METHODS["zclip"]], ids=["norm", "zclip"])
    def test_automatic_optimization(self, tmp_path: Path, method: Callable[[], ClipMethod], accumulate: int) -> None:
        results, logs = [], []
        for fold in (True, False):
            csv = CSVLogger(tmp_path, name=str(fold))
            options = {"logger": csv, "log_every_n_steps": 20, "accumulate_grad_batches": accumulate}
            results.append(trained(GIVEN, fold, method=method(), **options))
            logs.append(csv_rows(csv))
        assert_close(*results)
        assert len(logs[0]) >= STEPS // accumulate // 20
        assert any(0 < values["gradclip/clip_rate"] < 1 for _, values in logs[0])
        for (step, values), (other, expected) in zip(*logs, strict=True):
            assert (step, values) == (other, pytest.approx(expected, rel=1e-5))

    def test_manual_optimization(self) -> None:
        batches = [GIVEN[i : i + 4] for i in range(0, STEPS, 4)]
        assert_close(*(trained(batches, fold, Stepping) for fold in (True, False)))

    @pytest.mark.parametrize("accumulate", [1, 2])
    def test_mixed_precision(self, accumulate: int) -> None:
        given = gradients(STEPS)
        for step in (0, 50, 52):
            given[step]["head.weight"][1, 2] = OVERFLOWING
        results = []
        for fold in (True, False):
            plugin = MixedPrecision("16-mixed", "cpu", GradScaler("cpu", init_scale=SCALE, growth_interval=40))
            options = {"plugins": [plugin], "accumulate_grad_batches": accumulate}
            results.append((trained(given, fold, **options), plugin.scaler.get_scale()))
        assert_close(*results)

    @pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
    def test_hooks_that_come_later_see_gradients_before_clipping(self, precision: str) -> None:
        later = Unwritten()
        module = Prescribed(MAKE["adamw"])
        given = GIVEN[:10]
        fit(module, given, clipping(fold=True), later, precision=precision)
        sizes = [norm(gradient) for gradient in given]
        assert later.norms == pytest.approx(sizes, rel=1e-6)
        expected = [min(1.0, LIMIT / size) for size in sizes]
        assert later.coefficients == pytest.approx(expected, rel=1e-5)
        assert 0 < sum(one < 1 for one in expected) < 10

    def test_steps_over_the_limit_are_dropped(self) -> None:
        results = []
        for fold in (True, False):
            module = Prescribed(MAKE["adamw"])
            with pytest.warns(RuntimeWarning, match="over its limit"):
                fit(module, GIVEN[:20], clipping(action="skip", max_consecutive_skips=None, fold=fold))
            results.append(weights(module))
        assert equal(*results)

    @pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning")
    def test_resuming_is_going_on(self, tmp_path: Path) -> None:
        data = regression_data(12)

        def run(steps: int, *callbacks: Any, **options: Any) -> tuple[Any, Any]:
            module = Regression(MAKE["adamw"])
            method = ZClip(warmup=3, z_threshold=0.5)
            options = {"max_epochs": -1, "max_steps": steps, "enable_checkpointing": bool(callbacks), **options}
            callback = clipping(method, fold=True)
            trainer = fit(module, data, callback, *callbacks, **options)
            return (weights(module), trainer.optimizers[0].state_dict()["state"]), callback.state_dict()

        straight = run(12)
        run(6, ModelCheckpoint(tmp_path, filename="half", every_n_train_steps=6, save_top_k=-1))
        resumed = run(12, ckpt_path=tmp_path / "half.ckpt", weights_only=False)
        assert equal(straight, resumed)

    @pytest.mark.parametrize("make", [lambda params: AdamW(params), lambda params: torch.optim.RMSprop(params)])
    def test_an_optimizer_that_is_not_fused_is_refused_at_the_first_step(self, make: Any) -> None:
        with pytest.raises(ValueError, match=r"fold=True .* would ignore it"):
            fit(Regression(make), regression_data(2), clipping(fold=True))

    @pytest.mark.filterwarnings("ignore:two callbacks clip the same parameters")
    def test_two_callbacks_cannot_both_fold(self) -> None:
        with pytest.raises(RuntimeError, match="another clipper has handed this optimizer a coefficient"):
            fit(
                Prescribed(MAKE["adamw"]),
                GIVEN[:20],
                clipping(fold=True),
                clipping(fold=True, name="second"),
            )
