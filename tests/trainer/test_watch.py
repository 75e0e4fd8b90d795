"""What passes the callback by is said: steps without its hook or without a gradient, and who writes after it."""

import copy
import inspect
import math
import pickle
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import SGD, Optimizer
from torch.optim import optimizer as hooks

from kit.boring import Adversaries, Gradient, Manual, Prescribed, csv_rows, fit, gradients
from lightning_gradclip import Clipper, GradientClipping, History, NormClip, ValueClip

LIMIT = 0.1
SCALED = {"plugins": lambda: MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=4.0))}


def clipping(**options: Any) -> GradientClipping:
    return GradientClipping(NormClip(max_norm=LIMIT), **options)


def said(module: LightningModule, batches: Any, *callbacks: Any, **options: Any) -> list[str]:
    """What a fit says of the callback, one text for each warning."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(module, batches, *callbacks, **{name: one() if callable(one) else one for name, one in options.items()})
    return [str(one.message) for one in caught if "gradclip" in str(one.message)]


class Bare(Prescribed):
    """Steps the optimizer itself, past the hooks."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        optimizer.optimizer.step(closure=optimizer_closure)


class ClosureFirst(Prescribed):
    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        optimizer_closure()
        optimizer.optimizer.step()


class ManualBare(Manual):
    """Steps what the trainer keeps, and not what `optimizers()` returns."""

    def training_step(self, batch: Sequence[Gradient], batch_idx: int) -> None:
        for gradient in batch:
            (optimizer,) = self.trainer.optimizers
            optimizer.zero_grad()
            self.manual_backward(self.loss(gradient))
            optimizer.step()


class Sharpness(SGD):
    """Has its steps taken by another optimizer inside, as the usual code of SAM does."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=0.1)
        self.base = SGD(self.param_groups, lr=0.1)

    def second_step(self) -> None:
        self.base.step()


class Sharp(Manual):
    def __init__(self) -> None:
        super().__init__()
        self.make_optimizer = Sharpness

    def training_step(self, batch: Sequence[Gradient], batch_idx: int) -> None:
        for gradient in batch:
            self.optimizers().zero_grad()
            self.manual_backward(self.loss(gradient))
            self.optimizers().second_step()


class Clearing(Manual):
    """Clears the gradients before the step instead of after it."""

    def training_step(self, batch: Sequence[Gradient], batch_idx: int) -> None:
        for gradient in batch:
            self.manual_backward(self.loss(gradient))
            self.optimizers().zero_grad()
            self.optimizers().step()


class Elsewhere(Prescribed):
    """Gives the optimizer the parameters of a model that is rebuilt."""

    def configure_optimizers(self) -> Any:
        return SGD(copy.deepcopy(self).parameters(), lr=0.1)


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (Bare, r"Bare\.optimizer_step takes them past the hooks.*write optimizer\.step\(closure=optimizer_closure\)"),
        (ClosureFirst, r"ClosureFirst\.optimizer_step takes them past the hooks"),
        (ManualBare, r"told of none of them; step the optimizers that self\.optimizers\(\) returns"),
        (Sharp, r"told of none of them; step the optimizers that self\.optimizers\(\) returns"),
        (Clearing, r"no parameter that it serves had a gradient; call manual_backward\(\) before the step"),
        (Elsewhere, r"had a gradient; return a loss from training_step.*parameters that the loss depends on"),
    ],
)
@pytest.mark.parametrize("count", [3, 25])
def test_clipping_that_does_nothing_is_said_within_twenty_steps(
    module: type[Prescribed], reason: str, count: int
) -> None:
    given = gradients(count)
    seen: list[int] = []

    class Noting(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            seen.append(len(caught))

    with pytest.warns(UserWarning, match=reason) as caught:
        fit(module(), [[one] for one in given] if issubclass(module, Manual) else given, clipping(), Noting())
    (text,) = [str(one.message) for one in caught if "gradclip" in str(one.message)]
    kind = "Sharpness" if module is Sharp else "SGD"
    steps = min(count, 20)
    assert f"GradientClipping(name='gradclip') has clipped nothing in {steps} steps of optimizer 0 ({kind})" in text
    # Not at the end alone.
    assert count < 20 or seen[18] < seen[19]


def test_an_inner_loop_is_told_of_before_its_batch_ends() -> None:
    class Loop(ManualBare):
        def training_step(self, batch: Sequence[Gradient], batch_idx: int) -> None:
            with pytest.warns(UserWarning, match="clipped nothing in 20 steps"):
                super().training_step(batch, batch_idx)

    assert said(Loop(), [gradients(30)], clipping()) == []


def test_each_optimizer_is_spoken_of_by_itself() -> None:
    class Half(Adversaries):
        def training_step(self, batch: tuple[Gradient, Gradient], batch_idx: int) -> None:
            served, bare = self.optimizers()[0], self.trainer.optimizers[1]
            for optimizer, gradient in zip((served, bare), batch, strict=True):
                optimizer.zero_grad()
                self.manual_backward(self.loss(gradient))
                optimizer.step()

    given = [gradients(2, seed=i) for i in range(3)]
    (text,) = said(Half(), given, clipping())
    assert "clipped nothing in 3 steps of optimizer 1 (SGD)" in text
    # Whoever serves the other only has nothing to complain of.
    assert said(Half(), given, clipping(optimizer=0)) == []
    assert said(Half(), given, clipping(include="encoder.*")) == []
    (text,) = said(Half(), given, GradientClipping(None, optimizer=1))
    assert "has measured nothing in 3 steps of optimizer 1 (SGD)" in text


def test_an_optimizer_that_is_never_stepped() -> None:
    class Lazy(Adversaries):
        def training_step(self, batch: tuple[Gradient, Gradient], batch_idx: int) -> None:
            self.optimizers()[0].zero_grad()
            self.manual_backward(self.loss(batch[0]))
            self.optimizers()[0].step()

    callback = clipping()
    # Of the second fit the batches of the first are no part.
    for batches in (3, 2):
        (text,) = said(Lazy(), [gradients(2, seed=i) for i in range(batches)], callback)
        expected = f"has clipped nothing in {batches} batches of optimizer 1 (SGD): it was never stepped; step it, or"
        assert expected in text


@pytest.mark.parametrize("other", [True, False])
def test_an_optimizer_that_the_trainer_was_not_given(other: bool) -> None:
    class Private(Prescribed):
        """Keeps an optimizer to itself, beside one that the trainer has or not."""

        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.own = SGD(self.head.parameters(), lr=0.1)

        def training_step(self, batch: Gradient, batch_idx: int) -> None:
            self.zero_grad()
            self.manual_backward(self.loss(batch))
            self.own.step()
            if other:
                self.optimizers().step()

        def configure_optimizers(self) -> Any:
            return SGD(self.encoder.parameters(), lr=0.1) if other else []

    (text,) = said(Private(), gradients(3), clipping())
    assert text == (
        "SGD steps head.weight, head.bias but is none of the trainer's optimizers, so nothing of that is clipped by "
        "GradientClipping(name='gradclip'); return it from configure_optimizers"
    )
    assert said(Private(), gradients(3), clipping(include="encoder.*")) == []


def test_a_search_in_the_middle_of_a_fit_runs_without_callbacks() -> None:
    class Searching(Callback):
        def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            kept, trainer.callbacks = trainer.callbacks, []
            for gradient in gradients(20):
                pl_module.loss(gradient).backward()
                trainer.optimizers[0].step()
            trainer.callbacks = kept

    (text,) = said(Prescribed(), gradients(1), clipping(), Searching())
    assert "nothing in 20 steps of optimizer 0 (SGD): they were taken without the callbacks of the trainer" in text


def scale_(module: LightningModule) -> None:
    for parameter in module.parameters():
        parameter.grad.mul_(0.5)


def replace(module: LightningModule) -> None:
    for parameter in module.parameters():
        parameter.grad = parameter.grad * 0.5


def remove(module: LightningModule) -> None:
    module.head.bias.grad = None


class After(Callback):
    """Writes from a batch on, behind the clipping."""

    def __init__(self, write: Callable[[Any], Any], start: int = 0) -> None:
        self.write, self.start = write, start

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        if trainer.fit_loop.batch_idx >= self.start:
            self.write(pl_module)


class ByItself(Prescribed):
    def on_before_optimizer_step(self, optimizer: Any) -> None:
        clip_grad_norm_(self.parameters(), 0.01)


class ByClipper(Prescribed):
    def on_before_optimizer_step(self, optimizer: Any) -> None:
        Clipper(self, ValueClip(max_value=1e-3)).step()


class ManualByItself(Manual):
    on_before_optimizer_step = ByItself.on_before_optimizer_step


class Later(Callback):
    """Has the trainer or the module clip when training has begun already."""

    def __init__(self, what: str) -> None:
        self.what = what

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if self.what == "trainer":
            trainer.gradient_clip_val = 0.01
        else:
            pl_module.configure_gradient_clipping = lambda *_, **__: clip_grad_norm_(pl_module.parameters(), 0.01)


class HookOfOptimizer(Prescribed):
    def configure_optimizers(self) -> Optimizer:
        optimizer = super().configure_optimizers()
        optimizer.register_step_pre_hook(self.clip)
        return optimizer

    def clip(self, *_: Any) -> None:
        clip_grad_norm_(self.parameters(), 0.01)


WRITERS: dict[str, tuple[Callable[[], Prescribed], list[Callable[[], Any]], dict[str, Any], str]] = {
    "another callback": (Prescribed, [lambda: After(scale_)], {}, "by After"),
    "gradients are replaced": (Prescribed, [lambda: After(replace)], {}, "by After"),
    "gradients are removed": (Prescribed, [lambda: After(remove)], {}, r"those of head\.bias, by After"),
    "the module": (ByItself, [], {}, r"by ByItself\.on_before_optimizer_step"),
    "a clipper of the module": (ByClipper, [], {}, r"by ByClipper\.on_before_optimizer_step"),
    "under manual optimization": (ManualByItself, [], {}, r"by ManualByItself\.on_before_optimizer_step"),
    "the trainer, later": (
        Prescribed,
        [lambda: Later("trainer")],
        {},
        "by trainer.gradient_clip_val, which is",
    ),
    "the module, later": (Prescribed, [lambda: Later("module")], {}, r"by Prescribed\.configure_gradient_clipping"),
    "under a scaler": (ByItself, [], SCALED, r"by ByItself\.on_before_optimizer_step"),
    "a hook of the optimizer under a scaler": (HookOfOptimizer, [], SCALED, "by a hook of the optimizer"),
    "with accumulation": (ByItself, [], {"accumulate_grad_batches": 2}, r"by ByItself\.on_before_optimizer_step"),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_who_writes_after_the_callback_is_noticed_in_the_first_step(tmp_path: Path, kind: str) -> None:
    module, others, options, by = WRITERS[kind]
    csv, model, given = CSVLogger(tmp_path / "logs"), module(), gradients(4)
    batches = [[one] for one in given] if isinstance(model, Manual) else given
    options = {**options, "logger": csv, "log_every_n_steps": 1}
    (text,) = said(model, batches, clipping(history=str(tmp_path / "history")), *[one() for one in others], **options)
    with pytest.raises(AssertionError, match=rf"gradients of optimizer 0 \(SGD\) were written once more.*{by}"):
        raise AssertionError(text)
    assert "Let one of the two clip: remove the other, or watch it with action='observe'" in text
    # The norm that the optimizer receives is not known, from the first step on; the one before clipping is.
    rows = [values for _, values in csv_rows(csv)]
    assert rows
    assert all("gradclip/norm_clipped" not in values and "gradclip/norm" in values for values in rows)
    assert all(map(math.isnan, History(tmp_path / "history").steps["norm_clipped"]))
    # Whoever only watches does not care who writes.
    watching = clipping(action="observe")
    assert said(module(), batches, watching, *[one() for one in others], **options | {"logger": False}) == []


def test_who_begins_to_write_later_is_noticed_after_a_log_event() -> None:
    given = gradients(130)
    assert said(Prescribed(), given, clipping(), After(scale_, start=101), log_every_n_steps=50) == []
    (text,) = said(Prescribed(), given, clipping(), After(scale_, start=60), log_every_n_steps=50)
    assert "written once more" in text


def many(kind: type[Optimizer], **options: Any) -> Callable[[Any], Optimizer]:
    return lambda params: kind(params, **options)


class Lookahead(Optimizer):
    """Wraps another optimizer and writes gradients before that steps."""

    def __init__(self, inner: Optimizer) -> None:
        super().__init__(inner.param_groups, inner.defaults)
        self.inner = inner

    def step(self, closure: Any = None) -> Any:
        loss = None if closure is None else closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad.mul_(0.5)
        self.inner.step()
        return loss


class Wrapper:
    """Looks like an optimizer and is none, as schedulefree's wrapper; leaves its closure to the one inside."""

    def __init__(self, base: Optimizer) -> None:
        self.base = base

    def step(self, closure: Any = None) -> Any:
        return self.base.step(closure=closure)

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["base"], name)


class Centering(SGD):
    """Centers gradients in its own step, before that of its base class."""

    def step(self, closure: Any = None) -> Any:
        loss = None if closure is None else closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad.sub_(parameter.grad.mean())
        super().step()
        return loss


class TwoSteps(SGD):
    """Climbs first and has its closure called again, as SAM does, twice in each step."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for sign in (-1.0, 1.0):
            loss = torch.enable_grad()(closure)()
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.grad.mul_(sign)
            super().step()
        return loss


FLAGS: list[dict[str, Any]] = [{}, {"foreach": True}, {"foreach": False}, {"fused": True}, {"maximize": True}]
FLAGS += [{"capturable": True}, {"differentiable": True}, {"weight_decay": 0.1}, {"amsgrad": True}, {"decoupled": True}]
FLAGS += [{"foreach": True, "maximize": True, "weight_decay": 0.1}, {"weight_decay": 0.1, "maximize": True}]
FLAGS += [{"momentum": 0.9, "nesterov": True}, {"momentum": 0.9, "nesterov": True, "foreach": True}, {"centered": True}]
FLAGS += [{"momentum": 0.9, "nesterov": True, "weight_decay": 0.1, "foreach": True, "maximize": True}]
KINDS = [one for one in vars(torch.optim).values() if isinstance(one, type) and issubclass(one, Optimizer)]


def ways(kind: type[Optimizer]) -> dict[str, Callable[[Any], Optimizer]]:
    """Every way to make it that its constructor and this machine know."""
    known = inspect.signature(kind).parameters
    return {str(flags): many(kind, **flags) for flags in FLAGS if flags.keys() <= known.keys() and works(kind, flags)}


def works(kind: type[Optimizer], flags: dict[str, Any]) -> bool:
    module = Prescribed()
    try:
        optimizer = kind(module.parameters(), **flags)
        optimizer.step(closure=lambda: module.loss(gradients(1)[0]).backward() or 1.0)
    except (RuntimeError, ValueError, AssertionError):
        return False
    return True


@pytest.mark.parametrize("kind", [one for one in KINDS if one is not Optimizer], ids=lambda kind: kind.__name__)
def test_no_optimizer_of_torch_raises_a_false_alarm(kind: type[Optimizer]) -> None:
    module: Any = Prescribed
    if kind.__name__ in ("SparseAdam", "Muon"):
        module = Sparse if kind.__name__ == "SparseAdam" else Matrices
        tried = {"{}": kind}
    else:
        tried = ways(kind)
    for flags, make in tried.items():
        assert said(module(make), gradients(3), clipping(), log_every_n_steps=1) == [], flags
    assert tried


class Matrices(Prescribed):
    """What Muon takes: no biases."""

    def configure_optimizers(self) -> Any:
        return self.make_optimizer([self.encoder.weight, self.head.weight])


class Sparse(Matrices):
    """An embedding whose gradients are sparse."""

    def __init__(self, make: Any) -> None:
        super().__init__(make)
        self.encoder = nn.Embedding(4, 3, sparse=True)

    def training_step(self, batch: Gradient, batch_idx: int) -> Tensor:
        return self.encoder(torch.tensor([0, 2, 2])).square().sum()

    def configure_optimizers(self) -> Any:
        return self.make_optimizer([self.encoder.weight])


WRAPPING: dict[str, Callable[[Any], Any]] = {
    "writes before the optimizer inside": lambda params: Lookahead(SGD(params, lr=0.1)),
    "is no optimizer": lambda params: Wrapper(torch.optim.AdamW(params)),
    "writes before its base class": many(Centering, lr=0.1),
    "takes two steps in one": many(TwoSteps, lr=0.1),
}


@pytest.mark.parametrize("kind", WRAPPING)
def test_no_optimizer_that_wraps_another_raises_a_false_alarm(kind: str) -> None:
    assert said(Prescribed(WRAPPING[kind]), gradients(3), clipping(), log_every_n_steps=1) == []
    if kind != "is no optimizer":
        (text,) = said(ByItself(WRAPPING[kind]), gradients(3), clipping())
        assert "written once more" in text


@pytest.mark.parametrize(
    "make", [many(SGD, lr=0.1), many(torch.optim.AdamW, fused=True), many(SGD, lr=0.1, fused=True)]
)
@pytest.mark.parametrize("options", [{}, {"fold": True}, {"action": "observe"}, {"action": "skip"}])
def test_no_scaler_raises_a_false_alarm(make: Any, options: dict[str, Any]) -> None:
    if options.get("fold") and not make([nn.Parameter(torch.ones(1))]).defaults["fused"]:
        return
    given = gradients(4)
    # Overflows: the scaler takes no step.
    given[1]["head.bias"] = torch.full((2,), math.inf)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "dropped optimizer step")
        assert said(Prescribed(make), given, clipping(**options), **SCALED) == []


@pytest.mark.parametrize("options", [{"nonfinite": "zero"}, {"nonfinite": "skip"}, {"action": "skip"}])
def test_steps_that_are_dropped_or_mended_are_served(options: dict[str, Any]) -> None:
    given = gradients(25)
    for gradient in given[:21]:
        gradient["head.bias"] = torch.full((2,), math.nan)
    assert said(Prescribed(), given, clipping(max_consecutive_skips=None, **options)) == []


def test_nothing_watches_once_it_is_over() -> None:
    def registered() -> int:
        return len(hooks._global_optimizer_pre_hooks) + len(hooks._global_optimizer_post_hooks)

    during: list[int] = []

    class Counting(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            during.append(registered())

    callback = clipping()
    trainer = fit(Prescribed(), gradients(60), callback, Counting(), log_every_n_steps=30)
    # After twenty steps, and the one that follows a log event, nothing is in the way of a step any more.
    assert [batch for batch, count in enumerate(during) if count == 0] == [*range(20, 29), *range(31, 60)]
    assert not trainer.optimizers[0]._optimizer_step_pre_hooks
    assert registered() == 0
    with pytest.raises(ZeroDivisionError):
        fit(Prescribed(), gradients(3), clipping(), After(lambda _: 1 / 0))
    assert registered() == 0


def test_a_copy_that_is_made_in_the_middle_watches_its_own_fit() -> None:
    copies: list[Any] = []

    class Copying(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            copies.append(copy.deepcopy(callback._watch))
            copies.append(pickle.loads(pickle.dumps(callback._watch)))

    callback = clipping()
    fit(Prescribed(), gradients(1), callback, Copying())
    assert copies == [None, None]


def two(**second: Any) -> tuple[GradientClipping, GradientClipping]:
    return clipping(), GradientClipping(ValueClip(max_value=1e-4), name="gradclip_2", **second)


def test_two_callbacks_that_clip_the_same_parameters_are_named(tmp_path: Path) -> None:
    csv = CSVLogger(tmp_path)
    texts = said(Prescribed(), gradients(3), *two(include="*.weight"), logger=csv, log_every_n_steps=1)
    assert texts == [
        "two callbacks clip the same parameters: encoder.weight, head.weight by name='gradclip' and then by "
        "name='gradclip_2'. norm_clipped of 'gradclip' is left out, since the optimizer receives what the other "
        "leaves; have them share nothing by include= and exclude=, or let one watch with action='observe'"
    ]
    for _, values in csv_rows(csv):
        assert "gradclip/norm" in values
        assert "gradclip/norm_clipped" not in values
    assert [values["gradclip_2/norm_clipped"] < 1e-3 for _, values in csv_rows(csv, "gradclip_2/")] == [True] * 3


def test_two_callbacks_that_share_nothing_or_watch_are_welcome() -> None:
    assert said(Prescribed(), gradients(2), clipping(exclude="head.*"), two(include="head.*")[1]) == []
    assert said(Prescribed(), gradients(2), *two(action="observe")) == []
    pairs = [(pair, pair) for pair in gradients(2)]
    assert said(Adversaries(), pairs, clipping(optimizer=0), two(optimizer=1)[1]) == []
    texts = said(Adversaries(), pairs, clipping(), two(optimizer=1)[1])
    assert len(texts) == 1
    assert "head.weight, head.bias by name='gradclip' and then" in texts[0]
