"""The Lightning callback: hooks, conflict checks and checkpoint state around one clipper per optimizer."""

import os
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_gradclip import checks
from lightning_gradclip.act import scaler as scaling
from lightning_gradclip.act.policy import REQUIRED, Options
from lightning_gradclip.checks import KnownArguments
from lightning_gradclip.clipper import Clipper
from lightning_gradclip.gradients import ranks
from lightning_gradclip.methods.method import ClipMethod
from lightning_gradclip.select.parameters import Names, Selection
from lightning_gradclip.trainer import conflicts, lightning
from lightning_gradclip.trainer.clippers import Clippers
from lightning_gradclip.trainer.closing import Closing
from lightning_gradclip.trainer.deepspeed import Delegated, Handover
from lightning_gradclip.trainer.lightning import Callback, LightningModule, Trainer
from lightning_gradclip.trainer.log import Publisher
from lightning_gradclip.trainer.progress import Progress
from lightning_gradclip.trainer.reach import InReach
from lightning_gradclip.trainer.record import Recorder, histories
from lightning_gradclip.trainer.takeover import NO_LIMIT, Takeover
from lightning_gradclip.trainer.watch import Watch


class GradientClipping(KnownArguments, InReach, Callback):
    """Clips gradients before every optimizer step and logs what that did.

    Every optimizer of the module gets a clipper of its own, with its own copy of the method. Works under automatic
    and manual optimization, gradient accumulation and AMP. The metrics are those of `Clipper.metrics`, prefixed with
    `name/`, norms of scopes with `name_norm/`; with several optimizers the optimizer's index follows. Loggers get them
    at log events, `trainer.callback_metrics` has those of the steps since the last one for whoever asks.

    Args:
        method: How to clip, such as `NormClip(max_norm=1.0)`; None, written out, measures and logs only.
        action: "clip"; "skip" drops the step when any scope is over its limit; "observe" reports what would happen
            and writes nothing.
        nonfinite: On NaN or infinite gradients "skip" drops the step, "zero" replaces the entries, "raise" raises
            and "ignore" goes on. None: "skip" where the callback writes, "ignore" where it only observes. A dropped
            step still counts for `global_step` and schedulers.
        max_consecutive_skips: How many steps in a row may be dropped; None sets no bound.
        include: Shell pattern or patterns over parameter names, admitting parameters.
        exclude: Pattern or patterns taken out of what `include` admits.
        optimizer: Index of the optimizer it serves; None: every optimizer.
        name: Prefix of the metrics and part of the checkpoint key; two callbacks need two names.
        log: Whether to log to the trainer's loggers and `trainer.callback_metrics`.
        log_every_n_steps: Steps between two log events; None: the trainer's setting.
        measure_per: "group", "layer" or "parameter": also log and record the norms of these scopes.
        prog_bar: Whether to show norm and clip rate in the progress bar.
        history: True records every step in a folder `name` in the logger's directory, or in `default_root_dir` without
            a logger; a path names the folder; several optimizers have a folder each in it. Written at log events, at
            checkpoints and at the end: in between at most 1,024 steps, or 2**18 norms of scopes, wait in memory.
            `lightning-gradclip report` and `advise` read it.
        histograms: Whether to log a histogram of the norms since the last log event too, as `name/norms`; for
            TensorBoard and Weights & Biases.
        fold: Hand the coefficient to a fused optimizer (Adam, AdamW, SGD or Adagrad with fused=True) instead of writing
            the gradients, which then stay unclipped for hooks that come later; for methods with per="model".
        process_group: The ranks over which different parameters are held, such as the stages of a pipeline or local
            experts, whose norms are to be one: the name of a dimension of the mesh that the module or its parameters
            lie on, or a ProcessGroup or DeviceMesh. None: ranks hold the same parameters, or pieces of them.
        old_names: Whether norms of scopes are logged as `name/norm/<scope>`, as in 0.1.0, which MLflow's file store
            cannot keep beside `name/norm`. For this release only.
        scale_free: What to do about parameters that an optimizer steps by the direction of their gradient alone, as
            Muon, Lion or SignSGD does, so that a limit does next to nothing to them: "warn" clips them and says
            so once where the limit is a fixed one, "clip" says nothing, "exclude" leaves them out.
        centralize: Take from each gradient of two dims or more, first of all, its mean over all dims but the first.
        triton: Multiply large CUDA gradients by a kernel that touches none where nothing is clipped; not yet measured.
        summary: Whether rank zero says at the end of a fit what its steps were, a limit, and where the history is.
        relearn: Whether to leave out what a checkpoint knows of a learned limit, as a method that was changed has to;
            steps, counters, metrics and histories go on all the same.

    A fit begins afresh, with step 0 of every schedule, unless it resumes from a checkpoint or `load_state_dict` was
    called before it. Copies, by pickle or `copy`, hold settings and state and nothing of the run.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If an argument is out of range or contradicts another; at the first step, if a pattern matches no
            parameter; before it, if a checkpoint holds what another method has learned.
        MisconfigurationException: In `setup`, if the trainer clips too or its strategy is not supported.
    """

    def __init__(
        self,
        method: ClipMethod | None = REQUIRED,
        *,
        action: str = "clip",
        nonfinite: str | None = None,
        max_consecutive_skips: int | None = 20,
        include: str | Sequence[str] = "*",
        exclude: str | Sequence[str] = (),
        optimizer: int | None = None,
        name: str = "gradclip",
        log: bool = True,
        log_every_n_steps: int | None = None,
        measure_per: str | None = None,
        prog_bar: bool = False,
        history: bool | str | os.PathLike[str] = False,
        histograms: bool = False,
        fold: bool = False,
        process_group: Any = None,
        old_names: bool = False,
        scale_free: str = "warn",
        centralize: bool = False,
        triton: bool = False,
        summary: bool = True,
        relearn: bool = False,
    ) -> None:
        more: Any = {"measure_per": measure_per, "fold": fold, "process_group": process_group}
        more |= {"scale_free": scale_free, "centralize": centralize, "triton": triton}
        self._options = Options(method, action, nonfinite, max_consecutive_skips, include, exclude, **more)
        if not isinstance(process_group, str):
            ranks.members(process_group)
        if optimizer is not None:
            optimizer = checks.integer("optimizer", optimizer, at_least=0, remedy="None serves every optimizer")
        if log_every_n_steps is not None:
            log_every_n_steps = checks.integer(
                "log_every_n_steps", log_every_n_steps, at_least=1, remedy="None takes the trainer's"
            )
        self.name = checks.section("name", name)
        self.optimizer = optimizer
        # Lightning puts the module's `log` on every callback, so that name is taken.
        self._logs = checks.flag("log", log)
        self.log_every_n_steps = log_every_n_steps
        self.prog_bar = checks.flag("prog_bar", prog_bar)
        self.history = checks.folder("history", history)
        self.histograms = checks.flag("histograms", histograms)
        if histograms and not log:
            raise ValueError("histograms=True with log=False logs nothing; use log=True, or histograms=False")
        self.old_names = checks.flag("old_names", old_names)
        self.summary = checks.flag("summary", summary)
        self.relearn = checks.flag("relearn", relearn)
        self._takeover = Takeover()
        self._last_batch = 0
        self._had_backward = False
        # What was loaded before a fit, which takes it up.
        self._handed_on: dict[str, Any] | None = None
        self._in_trainer = False
        settings = set(vars(self))
        self._begin()
        self._of_a_fit = vars(self).keys() - settings

    @classmethod
    def from_trainer(cls, method: None = None, **options: Any) -> "GradientClipping":
        """Clip as the trainer is told by `gradient_clip_val` and `gradient_clip_algorithm`, in its place.

        They are read when a fit begins, and are as they were when it ends. Takes the other arguments of the class.
        """
        if method is not None:
            raise TypeError(f"from_trainer takes the limit of the trainer; write GradientClipping({method!r})")
        callback = cls(NO_LIMIT, **options)
        callback._takeover.on = True
        return callback

    def __getstate__(self) -> dict[str, Any]:
        """Settings and state: what belongs to a fit stays behind, such as the `log` of the module, Lightning's gift."""
        modules = {
            name for name, one in vars(self).items() if isinstance(getattr(one, "__self__", None), torch.nn.Module)
        }
        kept = {name: one for name, one in vars(self).items() if name not in self._of_a_fit | modules}
        return {"settings": {**kept, "_in_trainer": False}, "state": self.state_dict()}

    def __setstate__(self, copied: dict[str, Any]) -> None:
        vars(self).update(copied["settings"])
        self._begin()
        self._take_over(copied["state"])

    # Lightning asks for it at every hook of every batch.
    @cached_property
    def state_key(self) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self._generate_state_key(name=self.name)

    @conflicts.of_instances
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._in_trainer = True
        if stage != "fit":
            return
        self.method = self._takeover.take(trainer, self.method)
        conflicts.refuse(trainer, pl_module, self, self._options)
        # A new fit has new optimizers; a checkpoint is loaded after this hook.
        self._begin()
        self._refuse = partial(conflicts.refuse, trainer, pl_module, self)
        handed_on, self._handed_on = self._handed_on, None
        if handed_on is not None:
            self._take_over(handed_on)
        if lightning.is_any(trainer.strategy, "DeepSpeedStrategy"):
            self._handover = Handover(trainer, self._options)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._watch is not None:
            self._watch.close()
        if self._handover is not None:
            self._handover.take_back()
            self._handover = None
        self._takeover.give_back(trainer)
        self._in_trainer = False
        if stage == "fit":
            # State outlives the fit; optimizers, parameters and open files do not.
            state = self.state_dict()
            self._begin()
            self._take_over(state)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        conflicts.refuse_unknown(self.optimizer, len(trainer.optimizers))
        if self._handover is not None:
            return
        mine = self._served(trainer, pl_module)
        callbacks = cast("list[Any]", trainer.callbacks)  # type: ignore[attr-defined]
        for one in callbacks[: callbacks.index(self)] if self._options.policy.writes else ():
            if isinstance(one, GradientClipping) and one._options.policy.writes:
                theirs = one._served(trainer, pl_module)
                one._disclaimed |= conflicts.warn_of_overlap(one.name, self.name, theirs, mine)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        count = len(trainer.optimizers)
        several = count > 1 and self.optimizer is None
        if self._handover is None:
            conflicts.refuse_second_clipping(trainer, pl_module, self, self._options)
            served = self._served(trainer, pl_module)
            self._watch = Watch(trainer, pl_module, self, served, self._disclaimed, self._options)
        self._clippers.refuse_others(self._options.method)
        moved = self._recognise(trainer, pl_module)
        self._publisher = self._publishing(several=several)
        self._publisher.attend(trainer, self._clippers)
        keeping = histories(trainer, self.history, self.name, self._options, several=several, only=self.optimizer)
        self._keeps = keeping is not None or (self.method is not None and self.method.needs_loss)
        norms = self._recorder.state_dict()
        self._recorder = Recorder(self._clippers, keeping, histograms=self.histograms and trainer.is_global_zero)
        known = {now: norms.get(moved.get(now, now)) for now in range(count)}
        self._recorder.load_state_dict({now: one for now, one in known.items() if one is not None})
        if self._handover is not None:
            self._delegated = Delegated(trainer, self._handover.limit, self._recorder.readers(0))
            self._clippers.take_up(self._delegated, 0)
            self._closing.attend(self._delegated, 0)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._had_backward = False
        self._batches += 1
        self._recorder.begin(lightning.batches(trainer))
        if self._keeps:
            self._progress.begin(trainer.current_epoch, batch_idx)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        if self._keeps:
            self._progress.differentiated(loss, getattr(trainer.precision_plugin, "scaler", None))

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._had_backward = True

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if torch.compiler.is_compiling():
            # An optimizer whose step is compiled: its closure calls this, and none of it belongs into a graph.
            _outside(self, trainer, pl_module, optimizer)
            return
        if self._delegated is not None:
            return
        index = lightning.position(trainer, optimizer)
        if index is None:
            conflicts.refuse_stranger(optimizer, writes=self._options.policy.writes)
            return
        if self.optimizer is not None and index != self.optimizer:
            return
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaling.is_enabled(scaler) and pl_module.automatic_optimization and not self._had_backward:
            # training_step returned None: under a scaler Lightning neither unscales nor steps.
            return
        clipper = self._clippers.get(index)
        if not isinstance(clipper, Clipper) or clipper.optimizer is not optimizer:
            clipper = self._clipper(trainer, pl_module, optimizer, index)
        self._last_batch = lightning.batches(trainer)
        detailed = lightning.looks_now(trainer, self.log_every_n_steps, with_next_step=True)
        last = clipper.stats
        clipper.step(scaler, at=self._recorder.step, detailed=detailed, **self._told(trainer, index))
        if clipper.has_news:
            self._recorder.open(index)
        if self._watch is not None and self._watch.on:
            self._watch.saw(index, clipper, acted=clipper.stats is not last)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._delegated is not None:
            self._delegated.record(lightning.batches(trainer), partial(self._told, trainer, 0))
        if lightning.looks_now(trainer, self.log_every_n_steps):
            # At the last batch too, before its checkpoint, so that a resumed run does not log these steps again.
            norms = self._recorder.take_norms()
            self._publisher.publish(trainer, self._clippers, lightning.batches(trainer), norms)
            if self._watch is not None:
                self._watch.look_again(lightning.batches(trainer))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._watch is not None:
            self._watch.conclude(self._batches)
            self._watch.close()
        self._finish(trainer)

    @conflicts.of_instances
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self._watch is not None:
            self._watch.close()
        self._in_trainer = False
        self._takeover.give_back(trainer)
        # The steps that led here; after other errors the device may not answer any more.
        if isinstance(exception, (KeyboardInterrupt, FloatingPointError)):
            self._finish(trainer)
        else:
            lost = isinstance(exception, RuntimeError) and not isinstance(exception, torch.OutOfMemoryError)
            self._recorder.close(device_answers=not lost)
            self._publisher.leave(trainer, device_answers=not lost)
            self._closing.say(self.name, self._recorder.folders, self._options)

    @conflicts.refused_with_name
    def state_dict(self) -> dict[str, Any]:
        norms = self._recorder.state_dict()
        return {"clippers": self._clippers.state_dict(), **({"norms": norms} if norms else {})}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._take_over(state_dict)
        # What a trainer loads is of its own run.
        if not self._in_trainer:
            self._handed_on = state_dict

    def _take_over(self, state_dict: dict[str, Any]) -> None:
        self._clippers.load_state_dict(state_dict["clippers"])
        self._recorder.load_state_dict(state_dict.get("norms", {}))

    def _begin(self) -> None:
        """Forget the fit before."""
        self._clippers = Clippers(relearn=self.relearn)
        self._refuse, self._handover = None, None
        self._delegated: Delegated | None = None
        self._publisher = self._publishing(several=False)
        # Keeps the norms of a checkpoint until that of the fit takes over.
        self._recorder = Recorder(self._clippers, None, histograms=True)
        self._progress, self._keeps = Progress(), False
        self._closing = Closing(speaks=self.summary)
        self._watch: Watch | None = None
        # Of which optimizers others write the gradients after this callback.
        self._disclaimed: set[int] = set()
        self._batches = 0

    def _served(self, trainer: Trainer, pl_module: LightningModule) -> dict[int, Selection]:
        return conflicts.served(trainer, pl_module, self._options, self.optimizer)

    def _told(self, trainer: Trainer, index: int) -> dict[str, Any]:
        """What the history is told of the step of this optimizer."""
        if not self._keeps:
            return {}
        accumulated = trainer.accumulate_grad_batches if trainer.lightning_module.automatic_optimization else 1
        return self._progress.of_step(index, accumulated)

    def _publishing(self, *, several: bool) -> Publisher:
        where: dict[str, bool] = {"logs": self._logs, "prog_bar": self.prog_bar, "old_names": self.old_names}
        return Publisher(self.name, every=self.log_every_n_steps, several=several, **where)

    def _clipper(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer, index: int) -> Clipper:
        if index in self._clippers:
            # The module replaced its optimizers in mid-training: what was learned and counted goes on.
            self._clippers.put_back()
            self._recognise(trainer, pl_module)
        model = lightning.whole_model(trainer, pl_module)
        options, group = self._options, self._options.process_group
        if isinstance(group, str):
            options = replace(options, process_group=lightning.part_of_mesh(group, pl_module, optimizer))
        clipper = Clipper.with_options(model, optimizer, options, self._recorder.readers(index))
        if index in self._disclaimed:
            clipper.disclaim()
        self._clippers.take_up(clipper, index)
        self._closing.attend(clipper, index)
        return clipper

    def _recognise(self, trainer: Trainer, pl_module: LightningModule) -> dict[int, int]:
        """Find the optimizer of each state; see `Clippers.recognise`."""
        if not self._clippers.is_waiting:
            return {}
        names = Names(lightning.whole_model(trainer, pl_module))
        return self._clippers.recognise([names.of(optimizer) for optimizer in trainer.optimizers])

    def _finish(self, trainer: Trainer) -> None:
        """Record and log what is left, which is done only once; without a step what a checkpoint held is kept."""
        if self._clippers:
            norms = self._recorder.take_norms()
            self._recorder.close()
            self._publisher.publish_rest(trainer, self._clippers, self._last_batch, norms)
        self._publisher.leave(trainer)
        self._closing.say(self.name, self._recorder.folders, self._options)


# Lightning imports torch's compiler in any case.
_outside: Any = torch.compiler.disable(GradientClipping.on_before_optimizer_step)
