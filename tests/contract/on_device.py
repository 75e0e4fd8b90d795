"""On an accelerator: how often the host waits for it, and the same results as on the CPU.

The accelerator is a fake one, so that this runs everywhere; where there is CUDA, test_real_cuda.py asks torch itself.
test_device.py runs this file; to run a part of it, name it: `pytest tests/contract/on_device.py -k Folding`.
"""

import math
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.amp import GradScaler
from torch.nn import Parameter
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer

from kit.fake_device import AVAILABLE, NAME, Device, attached
from kit.gradients import SHAPES, Witness, normal
from kit.methods import SUBJECTS, WITH_ACTIONS, every_case, mixed, optimizer_of, subject
from kit.streams import LEARNERS
from lightning_gradclip import ClipMethod, Clipper, Normalize, NormClip, StepStats, ValueClip
from lightning_gradclip.gradients.ranks import Meeting
from lightning_gradclip.gradients.reduce import Reduced, Reducer
from lightning_gradclip.select.layout import Layout
from lightning_gradclip.select.parameters import Selection

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="this torch cannot register a device that is written in Python")

FUSED: Mapping[str, Callable[[Any], Optimizer]] = {
    "adam": lambda params: Adam(params, lr=0.1, amsgrad=True, fused=True),
    "adamw": lambda params: AdamW(params, lr=0.1, fused=True),
    "sgd": lambda params: SGD(params, lr=0.1, weight_decay=0.1, fused=True),
    "momentum": lambda params: SGD(params, lr=0.1, momentum=0.9, nesterov=True, fused=True),
    "adagrad": lambda params: Adagrad(params, lr=0.1, fused=True),
}
every_fused = pytest.mark.parametrize("make", FUSED.values(), ids=FUSED)
KINDS = ("group", "layer", "parameter")


@pytest.fixture
def device() -> Iterator[Device]:
    with attached() as device:
        yield device


@pytest.fixture(autouse=True)
def _reads_squares(request: pytest.FixtureRequest) -> None:
    """What an optimizer remembers is read of plain tensors only: others may be quantized."""
    cls = request.node.callspec.params.get("cls") if hasattr(request.node, "callspec") else None
    if cls is not None and cls.needs_moments:
        pytest.skip("squares of an optimizer in plain tensors, which the device of this test does not have")


class Model:
    """The model in small on the device, or on the CPU, and its clipper."""

    def __init__(
        self,
        device: Device | None,
        method: ClipMethod | None,
        make: Callable[[Any], Optimizer] | None = None,
        dtype: torch.dtype = torch.float32,
        on_host: Collection[str] = (),
        **options: Any,
    ) -> None:
        self.device, self.on_host = device, on_host
        zeros = {name: torch.full(shape, 0.5, dtype=dtype) for name, shape in SHAPES.items()}
        self.pairs = [(name, Parameter(self.place(name, values))) for name, values in zeros.items()]
        params = [parameter for _, parameter in self.pairs]
        self.optimizer = optimizer_of(method, self.pairs) if make is None else make(params)
        self.clipper = Clipper(self.pairs, method, optimizer=self.optimizer, **options)

    def place(self, name: str, tensor: Tensor) -> Tensor:
        """Where the parameter of this name lives."""
        return tensor.clone() if name in self.on_host else self.put(tensor)

    def put(self, tensor: Tensor) -> Tensor:
        return tensor.clone() if self.device is None else self.device.put(tensor)

    def get(self, tensor: Tensor) -> Tensor:
        here = self.device is None or tensor.device.type == "cpu"
        return tensor.detach().clone() if here else self.device.get(tensor)

    def give(self, gradients: Mapping[str, Tensor | None]) -> None:
        for name, parameter in self.pairs:
            gradient = gradients[name]
            parameter.grad = None if gradient is None else self.place(name, gradient)

    @pytest.mark.filterwarnings("ignore")
    def step(self, gradients: Mapping[str, Tensor | None], scaler: GradScaler | None = None) -> StepStats:
        self.give(gradients)
        return self.clipper.step(scaler)

    def waits(self, gradients: Mapping[str, Tensor | None], scaler: GradScaler | None = None) -> list[str]:
        """What made the host wait in one step, the looks at its statistics included."""
        self.give(gradients)
        self.device.waits.clear()
        stats = self.clipper.step(scaler)
        for name in ("norm", "norm_clipped", "limit", "coef", "clipped", "finite", "skipped", "sizes", "limits"):
            assert isinstance(getattr(stats, name), Tensor)
        return list(self.device.waits)

    def gradients(self) -> list[Tensor | None]:
        return [None if parameter.grad is None else self.get(parameter.grad) for _, parameter in self.pairs]

    def weights(self) -> list[Tensor]:
        return [self.get(parameter) for _, parameter in self.pairs]

    def learned(self) -> list[Tensor]:
        return [self.get(value) for value in self.clipper.state_dict()["learned"]["values"].values()]


def both(device: Device, make_method: Callable[[], ClipMethod | None], *args: Any, **options: Any) -> Sequence[Model]:
    return [Model(where, make_method(), *args, **options) for where in (device, None)]


def assert_same_step(model: Model, other: Model, gradients: Mapping[str, Tensor | None]) -> StepStats:
    """Both take this step with the same result; returned are the statistics on the CPU."""
    one, two = model.step(gradients), other.step(gradients)
    for name in ("norm", "norm_clipped", "limit", "coef", "clipped", "finite", "skipped", "sizes", "limits"):
        assert_close(model.get(getattr(one, name)), getattr(two, name))
    assert_close(model.gradients(), other.gradients())
    return two


def assert_close(one: Any, other: Any) -> None:
    if isinstance(one, list):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_close(a, b)
    elif one is None or other is None:
        assert one is other
    else:
        # Sizes of single units are float32 in both places.
        one, other = one.to(torch.float64), other.to(torch.float64)
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-12, equal_nan=True)


class TestFakeDevice:
    """The device itself: were it blind, the tests below would say nothing."""

    @pytest.mark.parametrize(
        "look",
        [
            Tensor.item,
            lambda x: x.tolist(),
            bool,
            float,
            int,
            Tensor.cpu,
            lambda x: x.to("cpu"),
            lambda x: torch.zeros(()).copy_(x),
            lambda x: torch.equal(x, x),
            Tensor.nonzero,
            lambda x: x.view(1)[x.view(1) > 0],
            lambda x: x.masked_select(x > 0),
            Tensor.unique,
            lambda x: x.view(1)[torch.tensor([0])],
            lambda x: 1 if x > 0 else 0,
            lambda x: x.fill_(1).copy_(torch.ones(())),
            lambda x: torch.tensor(1.0, device=x.device),
            lambda x: torch.ones(1).to(x.device),
        ],
    )
    def test_it_notices_waiting(self, device: Device, look: Callable[[Tensor], Any]) -> None:
        x = device.put(torch.ones(()))
        assert device.waits == []
        look(x)
        assert device.waits
        assert all(" at on_device.py:" in one for one in device.waits)

    def test_it_notices_nothing_else(self, device: Device) -> None:
        x = device.put(torch.arange(6.0).view(2, 3))
        y = torch.where(x > 1, x.sum() * torch.tensor(2.0), 0.0).sqrt().to(torch.float64) + torch.zeros(3, device=NAME)
        y[0].mul_(2.0)
        assert y.device.type == x.device.type == NAME
        assert (y.shape, y.dtype, y.stride()) == ((2, 3), torch.float64, (3, 1))
        assert device.waits == []
        root = math.sqrt(30)
        torch.testing.assert_close(device.get(y).tolist(), [[0.0, 0.0, 2 * root], [root, root, root]])

    def test_it_refuses_what_cuda_refuses(self, device: Device) -> None:
        x = device.put(torch.ones(2))
        for mixture in (lambda: x + torch.ones(2), lambda: torch.stack([x[0], torch.ones(())])):
            with pytest.raises(RuntimeError, match=f"tensors on {NAME} and on cpu"):
                mixture()

    def test_it_writes_in_place(self, device: Device) -> None:
        x = device.put(torch.ones(2))
        version = x._version
        assert x.mul_(3.0) is x
        assert x._version > version
        torch._foreach_mul_([x], torch.full((), 2.0, device=NAME))
        assert device.get(x).tolist() == [6.0, 6.0]


# The first parameter on the CPU and the second on the device, and the other way round.
HALVES = [tuple(list(SHAPES)[0::2]), tuple(list(SHAPES)[1::2])]


@pytest.mark.product
@pytest.mark.filterwarnings("ignore:dropped optimizer step:RuntimeWarning")
class TestTwoDevices:
    """Parameters on the CPU beside others on a device, in both orders: the first one does not stand for all."""

    @pytest.mark.parametrize("on_host", HALVES, ids=["cpu first", "device first"])
    @pytest.mark.parametrize(("cls", "per", "action"), WITH_ACTIONS)
    def test_the_results_are_those_of_one(
        self, device: Device, cls: type[ClipMethod], per: str, action: str, on_host: Collection[str]
    ) -> None:
        options = {"action": action, "measure_per": "layer", "max_consecutive_skips": None}
        model = Model(device, subject(cls, per), on_host=on_host, **options)
        other = Model(None, subject(cls, per), **options)
        for seed in range(4):
            assert_same_step(model, other, mixed(seed))
        assert_close([model.get(one) for one in model.learned()], other.learned())
        assert model.clipper.metrics() == pytest.approx(other.clipper.metrics(), rel=1e-6, nan_ok=True)

    @pytest.mark.parametrize("on_host", HALVES, ids=["cpu first", "device first"])
    @pytest.mark.parametrize("nonfinite", ["skip", "zero", "ignore"])
    @pytest.mark.parametrize(("cls", "per"), SUBJECTS)
    def test_so_are_those_of_gradients_that_are_not_finite(
        self, device: Device, cls: type[ClipMethod], per: str, nonfinite: str, on_host: Collection[str]
    ) -> None:
        model = Model(device, subject(cls, per), on_host=on_host, nonfinite=nonfinite)
        other = Model(None, subject(cls, per), nonfinite=nonfinite)
        for name in ("encoder.weight", "encoder.bias"):
            assert_same_step(model, other, {**mixed(1), name: torch.full(SHAPES[name], math.nan)})

    @pytest.mark.parametrize("on_host", HALVES, ids=["cpu first", "device first"])
    @pytest.mark.parametrize("absent", ["encoder.weight", "encoder.bias"])
    @pytest.mark.parametrize(("cls", "per"), SUBJECTS)
    def test_so_are_those_beside_absent_gradients_of_any_scale(
        self, device: Device, cls: type[ClipMethod], per: str, absent: str, on_host: Collection[str]
    ) -> None:
        model, other = Model(device, subject(cls, per), on_host=on_host), Model(None, subject(cls, per))
        for scale in (1.0, 1e-25, 1e25):
            assert_same_step(model, other, {**normal(2, scale), absent: None})

    @pytest.mark.parametrize("on_host", HALVES, ids=["cpu first", "device first"])
    @pytest.mark.parametrize(("cls", "per"), SUBJECTS)
    def test_so_are_those_of_steps_in_which_one_device_has_none(
        self, device: Device, cls: type[ClipMethod], per: str, on_host: Collection[str]
    ) -> None:
        model = Model(device, subject(cls, per), on_host=on_host, measure_per="layer", nonfinite="ignore")
        other = Model(None, subject(cls, per), measure_per="layer", nonfinite="ignore")
        for seed, half in enumerate([HALVES[0], HALVES[1], (), HALVES[0]]):
            assert_same_step(model, other, {**normal(seed), **dict.fromkeys(half)})
        assert model.clipper.metrics() == pytest.approx(other.clipper.metrics(), rel=1e-6, nan_ok=True)

    @pytest.mark.parametrize("on_host", HALVES, ids=["cpu first", "device first"])
    @pytest.mark.parametrize("detailed", [True, False])
    def test_entries_are_compared_where_they_are(
        self, device: Device, detailed: bool, on_host: Collection[str]
    ) -> None:
        model = Model(device, ValueClip(max_value=0.1), on_host=on_host, nonfinite="ignore")
        other = Model(None, ValueClip(max_value=0.1), nonfinite="ignore")
        model.clipper.detailed = other.clipper.detailed = detailed
        for seed in range(2):
            assert_same_step(model, other, normal(seed))


def test_a_state_may_be_loaded_onto_the_device(device: Device) -> None:
    model, resumed = (Model(device, NormClip(), measure_per="parameter") for _ in range(2))
    model.step(normal(0))
    state = model.clipper.state_dict()
    window = {key: device.put(one) if isinstance(one, Tensor) else one for key, one in state["window"].items()}
    resumed.clipper.load_state_dict({**state, "window": window})
    assert resumed.clipper.metrics() == model.clipper.metrics()


class LargestUnit(ClipMethod):
    """A rule of somebody else: the largest entry of a unit is at most 0.3."""

    per, norm_type = "unit", math.inf

    def limit(self, size: Tensor, weight: Tensor | None, step: int) -> Tensor:
        return torch.full_like(size, 0.3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_largest_entries_of_units_are_limited_in_float32(device: Device, dtype: torch.dtype) -> None:
    parameter = Parameter(device.put(torch.zeros(2, 3, dtype=dtype)))
    parameter.grad = device.put(torch.full((2, 3), 2.0, dtype=dtype))
    stats = Clipper([("w", parameter)], LargestUnit()).step()
    assert stats.sizes.dtype is torch.float32
    assert device.get(stats.limits).tolist() == pytest.approx([0.3, 0.3], rel=1e-7)


def test_a_scale_on_the_device_divides_norms_on_the_cpu(device: Device) -> None:
    there, here = Parameter(device.put(torch.zeros(3))), Parameter(torch.zeros(3))
    scaler = GradScaler(NAME, init_scale=4.0)
    scaler.scale(device.put(torch.ones(())))
    options = {"action": "observe", "include": "here", "measure_per": "parameter"}
    clipper = Clipper([("there", there), ("here", here)], NormClip(), optimizer=SGD([there, here], lr=0.1), **options)
    there.grad, here.grad = device.put(torch.ones(3)), torch.full((3,), 4.0)
    stats = clipper.step(scaler)
    assert stats.norm.item() == pytest.approx(math.sqrt(3), rel=1e-6)
    assert stats.measured.tolist() == pytest.approx([math.sqrt(3)], rel=1e-6)


@pytest.mark.product
@pytest.mark.filterwarnings("ignore:dropped optimizer step:RuntimeWarning")
class TestWaiting:
    @every_case
    def test_never_or_once_in_a_step(
        self, device: Device, cls: type[ClipMethod], per: str, action: str, nonfinite: str
    ) -> None:
        options = {"action": action, "nonfinite": nonfinite, "max_consecutive_skips": None}
        model = Model(device, subject(cls, per), **options)
        # The first step moves what it needs to the device, and the first dropped one says why.
        model.step(mixed(0))
        model.step(mixed(1))
        expected = 0 if nonfinite == "ignore" and action != "skip" else 1
        waits = model.waits(mixed(2))
        assert len(waits) == expected, waits

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize(("cls", "per"), SUBJECTS)
    def test_measuring_more_does_not_wait(self, device: Device, cls: type[ClipMethod], per: str, kind: str) -> None:
        model = Model(device, subject(cls, per), measure_per=kind, nonfinite="ignore")
        absent = {**mixed(0), "head.bias": None}
        model.step(absent)
        for gradients in (absent, absent):
            assert model.waits(gradients) == []

    @pytest.mark.parametrize(("cls", "per"), SUBJECTS)
    def test_observing_under_a_scaler_does_not_wait(self, device: Device, cls: type[ClipMethod], per: str) -> None:
        model, other = both(device, lambda: subject(cls, per), action="observe")
        scaler = GradScaler(NAME, init_scale=1024.0)
        scaler.scale(torch.ones((), device=NAME))
        for seed in range(2):
            scaled = {name: 1024.0 * gradient for name, gradient in mixed(seed).items()}
            one, two = model.step(scaled, scaler), other.step(mixed(seed))
            for name in ("norm", "norm_clipped", "clipped", "sizes", "limits"):
                assert_close(model.get(getattr(one, name)), getattr(two, name))
        assert model.waits(scaled, scaler) == []

    @pytest.mark.parametrize("detailed", [True, False])
    def test_without_details(self, device: Device, detailed: bool) -> None:
        model = Model(device, ValueClip(), nonfinite="ignore")
        model.clipper.detailed = detailed
        model.step(mixed(0))
        assert model.waits(mixed(1)) == []

    @pytest.mark.parametrize(
        ("options", "copies"),
        [({}, ["rows"]), ({"measure_per": "parameter"}, ["rows and norms"]), ({"fold": True}, ["rows", "dropped"])],
    )
    def test_metrics_wait_as_often_however_many_the_steps(
        self, device: Device, options: dict[str, Any], copies: list[str]
    ) -> None:
        counts = []
        for steps in (3, 40):
            model = Model(
                device,
                NormClip(),
                FUSED["adamw"],
                **{"nonfinite": "skip" if "fold" in options else "ignore", **options},
            )
            for seed in range(steps):
                model.step(normal(seed))
            device.waits.clear()
            assert model.clipper.metrics()["norm"] > 0
            counts.append(len(device.waits))
        assert counts == [len(copies)] * 2, device.waits

    def test_metrics_are_those_of_the_cpu(self, device: Device) -> None:
        model, other = both(device, NormClip, nonfinite="ignore", measure_per="layer")
        for seed in range(20):
            for one in (model, other):
                one.step(mixed(seed))
        assert model.clipper.metrics() == pytest.approx(other.clipper.metrics(), rel=1e-6)


@pytest.mark.product
@pytest.mark.filterwarnings("ignore:dropped optimizer step:RuntimeWarning")
class TestResults:
    @pytest.mark.parametrize(("cls", "per", "action"), WITH_ACTIONS)
    @pytest.mark.parametrize("nonfinite", ["ignore", None])
    def test_they_are_those_of_the_cpu(
        self, device: Device, cls: type[ClipMethod], per: str, action: str, nonfinite: str | None
    ) -> None:
        model, other = both(device, lambda: subject(cls, per), action=action, nonfinite=nonfinite)
        for seed in range(2):
            assert_same_step(model, other, {**mixed(seed), **({"head.bias": None} if seed == 1 else {})})

    @pytest.mark.parametrize("per", ["model", "parameter"])
    @pytest.mark.parametrize("make", LEARNERS.values(), ids=LEARNERS)
    def test_what_is_learned_is_that_of_the_cpu(
        self, device: Device, make: Callable[..., ClipMethod], per: str
    ) -> None:
        model, other = both(device, lambda: make(per=per), nonfinite="ignore")
        clipped = 0.0
        for seed in range(20):
            gradients = normal(seed, scale=math.exp(math.sin(seed)))
            if seed == 12:
                gradients["scale"] = torch.tensor(math.nan)
            clipped += assert_same_step(model, other, gradients).clipped.item()
        assert clipped > 0
        for one, two in zip(model.learned(), other.learned(), strict=True):
            # Infinities fill rows, which on the device are not cut, and which nobody keeps in order.
            assert_close(*(values[values.isfinite()].sort().values for values in (one, two)))

    @pytest.mark.parametrize(("nonfinite", "bad"), [("skip", math.nan), ("zero", math.nan), ("ignore", math.inf)])
    @pytest.mark.parametrize(("cls", "per"), SUBJECTS)
    def test_bad_steps_are_those_of_the_cpu(
        self, device: Device, cls: type[ClipMethod], per: str, nonfinite: str, bad: float
    ) -> None:
        model, other = both(device, lambda: subject(cls, per), nonfinite=nonfinite)
        gradients = mixed(0)
        gradients["head.weight"][1, 2] = bad
        assert not assert_same_step(model, other, gradients).finite
        assert_same_step(model, other, mixed(1))

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize(("cls", "per"), SUBJECTS)
    def test_of_other_dtypes(self, device: Device, cls: type[ClipMethod], per: str, dtype: torch.dtype) -> None:
        model, other = both(device, lambda: subject(cls, per), dtype=dtype)
        gradients = normal(0, dtype=dtype)
        one, two = model.step(gradients), other.step(gradients)
        assert_close(model.get(one.sizes), two.sizes)
        for a, b in zip(model.gradients(), other.gradients(), strict=True):
            assert a.dtype == dtype
            # Half a unit in the last place may be rounded either way.
            torch.testing.assert_close(a, b, rtol=max(1e-6, torch.finfo(dtype).eps), atol=0)

    def test_gradients_within_their_limit_keep_their_bits(self, device: Device) -> None:
        model = Model(device, NormClip(max_norm=1e6), nonfinite="skip")
        model.give(mixed(0))
        witness = Witness([(name, Parameter(model.get(parameter.grad))) for name, parameter in model.pairs])
        assert witness.written() == set()
        model.clipper.step()
        for gradient, (name, expected) in zip(model.gradients(), mixed(0).items(), strict=True):
            assert torch.equal(gradient, expected), name


class Training:
    """A model whose optimizer steps too."""

    def __init__(self, device: Device | None, make: Callable[[Any], Optimizer], **options: Any) -> None:
        self.model = Model(device, options.pop("method", NormClip(max_norm=3.0)), make, **options)

    def step(self, gradients: Mapping[str, Tensor | None]) -> StepStats:
        stats = self.model.step(gradients)
        self.model.optimizer.step()
        assert not {"grad_scale", "found_inf"} & vars(self.model.optimizer).keys()
        return stats

    def everything(self) -> list[Tensor]:
        states = [self.model.optimizer.state[parameter] for _, parameter in self.model.pairs]
        tensors = [value for state in states for value in state.values() if isinstance(value, Tensor)]
        return [*self.model.weights(), *map(self.model.get, tensors)]


def spoiled(seed: int, bad: float = math.nan) -> dict[str, Tensor]:
    gradients = normal(seed)
    gradients["encoder.bias"][2] = bad
    return gradients


@pytest.mark.filterwarnings("ignore:dropped optimizer step:RuntimeWarning")
class TestFolding:
    @every_fused
    @pytest.mark.parametrize("method", [NormClip(max_norm=6.0), Normalize(), LEARNERS["quantile"]()], ids=repr)
    def test_it_trains_as_the_cpu_does_by_writing(
        self, device: Device, make: Callable[[Any], Optimizer], method: ClipMethod
    ) -> None:
        folding = Training(device, make, method=method, fold=True)
        writing = Training(None, make, method=method)
        for seed in range(20):
            gradients = spoiled(seed, math.inf) if seed in (7, 8) else normal(seed)
            one, other = folding.step(gradients), writing.step(gradients)
            for name in ("norm", "norm_clipped", "coef", "clipped", "finite", "skipped"):
                assert_close(folding.model.get(getattr(one, name)), getattr(other, name))
            assert_trained_alike(folding, writing)
        metrics = folding.model.clipper.metrics()
        assert metrics == pytest.approx(writing.model.clipper.metrics(), rel=1e-6)
        assert (metrics["skipped"], metrics["nonfinite"]) == (2.0, 2.0)

    def test_a_step_over_the_limit_is_left_out(self, device: Device) -> None:
        folding = Training(device, FUSED["adamw"], method=NormClip(max_norm=6.0), action="skip", fold=True)
        writing = Training(None, FUSED["adamw"], method=NormClip(max_norm=6.0), action="skip")
        for seed, scale in enumerate((0.1, 10.0, 0.1, 10.0, 10.0, 0.1)):
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "dropped optimizer step")
                one, other = (training.step(normal(seed, scale=scale)) for training in (folding, writing))
            assert (float(folding.model.get(one.skipped)), float(other.skipped)) == (scale == 10.0,) * 2
            assert_trained_alike(folding, writing)

    @every_fused
    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    def test_a_first_step_that_is_left_out(self, device: Device, make: Callable[[Any], Optimizer], bad: float) -> None:
        folding, writing = Training(device, make, fold=True), Training(None, make)
        for training in (folding, writing):
            training.step(spoiled(0, bad))
        assert all((weight == 0.5).all() for weight in folding.model.weights())
        for seed in range(1, 4):
            folding.step(normal(seed))
            writing.step(normal(seed))
        assert_trained_alike(folding, writing)

    @pytest.mark.parametrize("nonfinite", ["skip", "ignore"])
    @pytest.mark.parametrize("action", ["clip", "skip"])
    @every_fused
    def test_the_host_never_waits(
        self, device: Device, make: Callable[[Any], Optimizer], action: str, nonfinite: str
    ) -> None:
        training = Training(device, make, action=action, nonfinite=nonfinite, fold=True)
        # Within the limit, so that the optimizer makes its state.
        training.step(normal(0, scale=0.1))
        for seed in range(1, 4):
            bad = seed == 2 and nonfinite == "skip"
            assert training.model.waits(spoiled(seed) if bad else normal(seed)) == []
            versions = [parameter.grad._version for _, parameter in training.model.pairs]
            assert len(set(versions)) == 1
            device.waits.clear()
            training.model.optimizer.step()
            assert device.waits == []

    @pytest.mark.parametrize("nonfinite", ["raise", "zero"])
    def test_the_host_waits_once_where_it_must_look(self, device: Device, nonfinite: str) -> None:
        training = Training(device, FUSED["adamw"], nonfinite=nonfinite, fold=True)
        training.step(normal(0))
        assert len(training.model.waits(normal(1))) == 1

    def test_the_clipper_writes_no_gradient(self, device: Device) -> None:
        model = Model(device, Normalize(), FUSED["adamw"], fold=True)
        for gradients in (normal(0), spoiled(1)):
            model.give(gradients)
            versions = [parameter.grad._version for _, parameter in model.pairs]
            model.clipper.step()
            assert [parameter.grad._version for _, parameter in model.pairs] == versions
            for gradient, expected in zip(model.gradients(), gradients.values(), strict=True):
                torch.testing.assert_close(gradient, expected, rtol=0, atol=0, equal_nan=True)

    def test_steps_over_the_limit_are_left_out(self, device: Device) -> None:
        folding = Training(device, FUSED["adamw"], action="skip", fold=True, max_consecutive_skips=None)
        writing = Training(None, FUSED["adamw"], action="skip", max_consecutive_skips=None)
        for seed in range(6):
            gradients = normal(seed, scale=0.1 if seed % 2 else 10.0)
            folding.step(gradients)
            writing.step(gradients)
            assert_trained_alike(folding, writing)
        assert folding.model.clipper.metrics() == pytest.approx(writing.model.clipper.metrics(), rel=1e-6)

    @pytest.mark.parametrize(("bad", "bound", "raises"), [(3, 2, True), (3, 3, False), (1, 0, True), (5, None, False)])
    def test_too_many_steps_left_out_show_when_somebody_looks(
        self, device: Device, bad: int, bound: int | None, raises: bool
    ) -> None:
        training = Training(device, FUSED["adamw"], fold=True, max_consecutive_skips=bound)
        training.step(normal(0))
        for seed in range(bad):
            training.step(spoiled(seed))
        # The bound is over the longest run, which may be over.
        training.step(normal(1))
        if not raises:
            assert training.model.clipper.metrics()["skipped"] == bad
            return
        with pytest.raises(FloatingPointError, match=rf"^{bad} optimizer steps in a row were dropped"):
            training.model.clipper.metrics()
        # Said once.
        assert training.model.clipper.metrics()["skipped"] == bad

    def test_a_run_of_dropped_steps_goes_on_after_a_look_and_after_resuming(self, device: Device) -> None:
        training = Training(device, FUSED["adamw"], fold=True, max_consecutive_skips=3)
        for seed in range(2):
            training.step(spoiled(seed))
        training.model.clipper.metrics()
        training.step(spoiled(2))
        resumed = Training(device, FUSED["adamw"], fold=True, max_consecutive_skips=3)
        resumed.model.clipper.load_state_dict(training.model.clipper.state_dict())
        for one in (training, resumed):
            one.step(spoiled(3))
            with pytest.raises(FloatingPointError, match=r"^4 optimizer steps in a row"):
                one.model.clipper.metrics()

    @every_fused
    def test_under_a_scaler(self, device: Device, make: Callable[[Any], Optimizer]) -> None:
        everything = []
        for where, fold in ((device, True), (None, False)):
            model = Model(where, NormClip(max_norm=3.0), make, fold=fold)
            scaler = GradScaler("cpu" if where is None else NAME, init_scale=2.0**16, growth_interval=5)
            scaler.scale(model.put(torch.ones(())))
            for seed in range(12):
                gradients = spoiled(seed, math.inf) if seed in (4, 5) else normal(seed)
                scale = scaler.get_scale()
                model.give({name: scale * one for name, one in gradients.items()})
                device.waits.clear()
                model.clipper.step(scaler)
                assert seed == 0 or device.waits == []
                scaler.step(model.optimizer)
                scaler.update()
            metrics = model.clipper.metrics()
            assert metrics["overflows"] == 2.0
            everything.append((model.weights(), scaler.get_scale(), metrics))
        (one, scale, metrics), (other, expected, rest) = everything
        for here, there in zip(one, other, strict=True):
            # Updates that cancel leave weights that are small beside the rounding of each.
            torch.testing.assert_close(here, there, rtol=1e-6, atol=1e-6)
        assert scale == expected
        assert metrics == pytest.approx(rest, rel=1e-6)


def assert_trained_alike(one: Training, other: Training) -> None:
    pairs = zip(one.everything(), other.everything(), strict=False)
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


class TestPieces:
    """Where ranks hold pieces: the ranks of this run exchange tensors of the host, and only that makes it wait."""

    @pytest.fixture(autouse=True)
    def alone(self) -> Iterator[None]:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        yield
        dist.destroy_process_group()

    @pytest.mark.parametrize("p", [1.0, 2.0, 8.0, math.inf])
    @pytest.mark.parametrize("owner", [None, (0, 0, 1)])
    def test_only_the_exchange_makes_the_host_wait(
        self, device: Device, p: float, owner: tuple[int, ...] | None
    ) -> None:
        params = [device.put(torch.zeros(3)), device.put(torch.zeros(2))]
        layouts = (Layout(6, pieces=2, piece=-1), Layout())
        selection = Selection(tuple(params), ("a", "b"), ("root",) * 2, ("group0",) * 2, tuple(params), layouts, ())
        reducer = Reducer(selection, Meeting())
        count = 2 if owner is None else len(owner)
        norms = [torch.arange(1.0, count + 1) * factor for factor in (1.0, 2.0)]
        places = None if owner is None else device.put(torch.tensor(owner))
        numbers = [] if math.isinf(p) else [torch.tensor([3.0, 4.0])]

        def reduce() -> Reduced:
            return reducer.reduce(
                list(map(device.put, norms)), [True, False], p, list(map(device.put, numbers)), places
            )

        reduce()
        device.waits.clear()
        known = reduce()
        exchanged = [wait.partition(" at ")[0] for wait in device.waits]
        assert exchanged == ["copy from the device", "copy to the device"], device.waits
        assert not known.nothing
        assert device.get(known.present).tolist() == [1.0, 0.0]
        # Of the first nothing is here.
        shares = torch.tensor([0.0, 1.0])[[0, 1] if owner is None else list(owner)]
        for found, one in zip(known.norms, norms, strict=True):
            expected = one if math.isinf(p) else one * shares.pow(1 / p)
            assert_close(device.get(found), expected)
            assert found.dtype == one.dtype
        assert [device.get(one).item() for one in known.totals] == ([] if math.isinf(p) else [4.0])
