"""Clipping in the Trainer of Hugging Face Transformers, by a callback."""

# Transformers is not installed where types are checked.
# pyright: reportMissingImports=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownParameterType=false, reportUntypedBaseClass=false

import base64
import dataclasses
import importlib
import logging
import os
import sys
from collections.abc import Mapping
from inspect import signature
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers.trainer_callback import (
    CallbackHandler,
    ExportableState,
    TrainerCallback,
    TrainerControl,
    TrainerState,
)
from transformers.training_args import TrainingArguments

from lightning_gradclip import checks
from lightning_gradclip.act.policy import REQUIRED, Options
from lightning_gradclip.clipper import Clipper
from lightning_gradclip.methods.method import ClipMethod
from lightning_gradclip.record.tally import Tally, history_in

_log = logging.getLogger("lightning_gradclip")

# Where a class is named in a configuration, as in Hydra's.
_TARGET = "_target_"


class GradientClippingCallback(TrainerCallback, ExportableState):
    """Clips gradients before each optimizer step of a Trainer, logs what it did, and resumes from its checkpoints.

    It takes over from `max_grad_norm`, which the Trainer sets to 1.0 by default: that is 0 while it trains. Metrics go
    where the Trainer's go, at the same steps: to its reporters, `state.log_history` and the progress line.

    Args:
        method: How to clip; None measures only.
        name: What the names of the metrics begin with.
        summary: Whether to print at the end what the steps were, a limit, and where the history is.
        options: The others of `Clipper`, such as `action`, `nonfinite`, `exclude`, `measure_per` and `history`.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If an argument is out of range, or, when training begins, DeepSpeed clips by itself.
    """

    def __init__(
        self,
        method: ClipMethod | Mapping[str, Any] | None = REQUIRED,
        *,
        name: str = "gradclip",
        summary: bool = True,
        **options: Any,
    ) -> None:
        self._method = _method_of(method) if isinstance(method, Mapping) else method
        self._name, self._options = name, options
        self._summary = checks.flag("summary", summary)
        if unknown := options.keys() - _OPTIONS:
            names = ", ".join(map(repr, sorted(unknown)))
            known = ", ".join(sorted(_OPTIONS))
            raise TypeError(
                f"{type(self).__name__} has no argument {names}; its arguments are method, name, summary, {known}"
            )
        # Refused here, and not after the data was loaded.
        Options(self._method, **{key: value for key, value in options.items() if key in _CHECKED})
        self._clipper: Clipper | None = None
        self._before: float | None = None
        self._losses: _Losses | None = None
        self.saved: dict[str, Any] | None = None

    @property
    def clipper(self) -> Clipper | None:
        """The clipper of this training; None before it begins."""
        return self._clipper

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        optimizer: Optimizer | None = None,
        **_: Any,
    ) -> None:
        """Make the clipper, for the optimizer as the Trainer has prepared it."""
        if getattr(args, "deepspeed", None):
            raise ValueError(
                "DeepSpeed steps and clips by itself, and a callback would see no gradients; set gradient_clipping in "
                "its configuration, or train with DDP or FSDP"
            )
        assert model is not None
        assert optimizer is not None
        self._take_over(args)
        handler, trainer = _calling()
        self._come_first(handler)
        self._listen(trainer)
        inner = getattr(optimizer, "optimizer", optimizer)
        self._scaler = getattr(optimizer, "scaler", None)
        self._clipper = Clipper(model, self._method, optimizer=inner, **self._options)
        self._tally = Tally()
        self._clipper.tell(self._tally.take)
        self.saved = _saved_in(state, type(self).__name__, self._name)
        if self.saved is not None:
            self._clipper.load_state_dict(_decoded(self.saved))
            self.saved = None

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """Clip."""
        assert self._clipper is not None
        if self._losses is None:
            self._clipper.step(self._scaler)
            return
        epoch, batch = _place(state.epoch, given["train_dataloader"])
        self._clipper.step(self._scaler, loss=self._losses.take(), epoch=epoch, batch=batch)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Add the metrics to what the Trainer logs of the training; the reporters come after this callback."""
        if self._clipper is None or logs is None or not _IN_TRAINING & logs.keys() or not self._clipper.has_news:
            return
        metrics = self._clipper.take().keyed(self._name)
        logs.update(metrics)
        if state.log_history:
            # The Trainer has kept a copy by now.
            state.log_history[-1].update(metrics)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Write the rest of a history, and give `max_grad_norm` back: without this callback the Trainer clips again."""
        if self._losses is not None:
            self._losses.leave()
            self._losses = None
        if self._clipper is not None:
            self._clipper.close()
            if self._summary and self._tally.steps and state.is_world_process_zero:
                self._say()
        if self._before is not None:
            args.max_grad_norm, self._before = self._before, None

    def _say(self) -> None:
        """Print it where the Trainer prints its own last words: below the level of warnings its log shows nothing."""
        observed = self._method is None or self._options.get("action") == "observe"
        print(f"{self._name}: {self._tally.sentence(observed=observed)}")  # noqa: T201
        if history := self._options.get("history"):
            print(f"{self._name}: {history_in(os.fspath(history))}")  # noqa: T201

    def state(self) -> dict[str, Any]:
        """What a checkpoint of the Trainer keeps: arguments of this callback, and what the clipper knows."""
        saved = self.saved if self._clipper is None else _encoded(self._clipper.state_dict())
        args = {"method": _described(self._method), "name": self._name, "summary": self._summary}
        args |= _plain(self._options)
        return {"args": args, "attributes": {"saved": saved}}

    def _take_over(self, args: TrainingArguments) -> None:
        if args.max_grad_norm:
            _log.warning(
                "max_grad_norm=%g gives way to %r, which would else be given gradients that are clipped already; "
                "write max_grad_norm=0 to say so yourself",
                args.max_grad_norm,
                self._method,
            )
            self._before, args.max_grad_norm = args.max_grad_norm, 0.0

    def _come_first(self, handler: CallbackHandler | None) -> None:
        """Go before the reporters, which the Trainer puts first, so that they are given the metrics."""
        if handler is None or self not in handler.callbacks:
            _log.warning(
                "the callbacks of this Trainer are called in a way of its own, so that reporters may not be given the "
                "metrics; write trainer.callback_handler.callbacks.insert(0, callback)"
            )
            return
        handler.callbacks.remove(self)
        handler.callbacks.insert(0, self)

    def _listen(self, trainer: Any) -> None:
        """For a history: the Trainer tells its callbacks no losses."""
        if self._losses is not None:
            # A training before this one ended with an error.
            self._losses.leave()
            self._losses = None
        if self._options.get("history") and trainer is not None:
            self._losses = _Losses(trainer)


class _Losses:
    """The losses since the last step of the optimizer, as a Trainer gets them from its own `training_step`."""

    def __init__(self, trainer: Any) -> None:
        self._trainer, self._ask = trainer, trainer.training_step
        # Somebody may have given this one Trainer a function of his own.
        self._before = vars(trainer).get("training_step")
        self._loss: Tensor | None = None
        trainer.training_step = self._training_step

    def take(self) -> Tensor | None:
        """The loss that the gradients are of; accumulated batches are summed, as each is its share already."""
        loss, self._loss = self._loss, None
        return loss

    def leave(self) -> None:
        """Give the Trainer its method back."""
        if self._before is None:
            vars(self._trainer).pop("training_step", None)
        else:
            self._trainer.training_step = self._before

    def _training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = self._ask(*args, **kwargs)
        self._loss = loss if self._loss is None else self._loss + loss
        return loss


# What a clipper is told besides its parameters, method and optimizer.
_OPTIONS = signature(Clipper).parameters.keys() - {"named_parameters", "method", "optimizer"}
_CHECKED = {field.name for field in dataclasses.fields(Options) if field.init}
# One of these is in what the Trainer logs of the training, none in what it logs of an evaluation.
_IN_TRAINING = {"loss", "train_loss"}


def _calling() -> tuple[CallbackHandler | None, Any]:
    """The handler that calls, and its Trainer, which hands callbacks everything but itself and their list."""
    handler = None
    frame = sys._getframe(1)  # pyright: ignore[reportPrivateUsage]
    while frame is not None:
        caller = frame.f_locals.get("self")
        if handler is None and isinstance(caller, CallbackHandler):
            handler = caller
        elif handler is not None and getattr(caller, "callback_handler", None) is handler:
            return handler, caller
        frame = frame.f_back
    return handler, None


def _place(passed: float | None, loader: Any) -> tuple[int | None, int | None]:
    """Epoch, and index in it of the first batch of a step, before which so many epochs have passed."""
    if passed is None:
        return None, None
    epoch = int(passed)
    try:
        return epoch, round((passed - epoch) * len(loader))
    except TypeError:
        # Of a stream nobody knows how long it is.
        return epoch, None


def _saved_in(state: TrainerState, kind: str, name: str) -> Any:
    """What a checkpoint has of the callback of this name."""
    # A Trainer saves callbacks that its checkpoint knows, and no others.
    found: Any = cast("dict[str, Any]", state.stateful_callbacks).setdefault(kind, [])
    # Of several callbacks of a class it keeps what they were at each checkpoint, one after the other.
    several = cast("list[dict[str, Any]]", found if isinstance(found, list) else [found])
    return next((one["attributes"]["saved"] for one in reversed(several) if one["args"]["name"] == name), None)


def _described(method: ClipMethod | None) -> dict[str, Any] | None:
    """A method as JSON takes it: its class and its arguments."""
    if method is None:
        return None
    fields = dataclasses.fields(method) if dataclasses.is_dataclass(method) else ()
    arguments = {field.name: getattr(method, field.name) for field in fields if field.init}
    return {_TARGET: f"{type(method).__module__}.{type(method).__qualname__}", **_plain(arguments)}


def _method_of(described: Mapping[str, Any]) -> ClipMethod:
    """A method from its class, under the key `_target_`, and its arguments."""
    arguments = dict(described)
    module, _, name = str(arguments.pop(_TARGET, "")).rpartition(".")
    kind = getattr(importlib.import_module(module), name, None) if module else None
    if not (isinstance(kind, type) and issubclass(kind, ClipMethod)):
        raise TypeError(
            f"method={dict(described)!r} names no clipping method; write method=NormClip(max_norm=1.0), or "
            "{'_target_': 'lightning_gradclip.NormClip', 'max_norm': 1.0}"
        )
    # JSON knows strings as keys only, and schedules have steps.
    return kind(
        **{
            key: {int(step): one for step, one in value.items()} if isinstance(value, Mapping) else value
            for key, value in arguments.items()
        }
    )


def _plain(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Those that JSON can keep; others, such as process groups, belong to one run."""
    found = {key: os.fspath(value) if isinstance(value, os.PathLike) else value for key, value in arguments.items()}
    plain = (str, bool, int, float, list, tuple, dict, type(None))
    return {key: value for key, value in found.items() if isinstance(value, plain)}


def _encoded(value: Any) -> Any:
    """Tensors and plain types as JSON takes them, to the bit."""
    if isinstance(value, Tensor):
        host = value.detach().cpu().contiguous()
        data = base64.b64encode(host.numpy().tobytes()).decode()
        return {"dtype": str(host.dtype).removeprefix("torch."), "shape": list(host.shape), "data": data}
    if isinstance(value, Mapping):
        return {key: _encoded(one) for key, one in value.items()}
    return [_encoded(one) for one in value] if isinstance(value, (list, tuple)) else value


def _decoded(value: Any) -> Any:
    if isinstance(value, Mapping):
        if set(value) == {"dtype", "shape", "data"}:
            entries = np.frombuffer(base64.b64decode(value["data"]), dtype=value["dtype"])
            return torch.from_numpy(entries.reshape(value["shape"]).copy())
        return {key: _decoded(one) for key, one in value.items()}
    return [_decoded(one) for one in value] if isinstance(value, list) else value
