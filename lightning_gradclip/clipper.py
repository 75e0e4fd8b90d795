"""The pipeline without a framework: select, measure, reduce, guard, limit, act, record."""

import copy
import os
import warnings
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from lightning_gradclip import checks
from lightning_gradclip.act import policy
from lightning_gradclip.act import scaler as scaling
from lightning_gradclip.act.decide import Actor, Verdict
from lightning_gradclip.act.fold import Fold
from lightning_gradclip.act.losses import Losses
from lightning_gradclip.act.policy import Options
from lightning_gradclip.act.skips import Skips
from lightning_gradclip.act.stalls import Stalls
from lightning_gradclip.gradients import ranks, read, reduce, write
from lightning_gradclip.gradients.watch import Watch
from lightning_gradclip.limit.kinds import limiter_for
from lightning_gradclip.limit.noted import Observer
from lightning_gradclip.methods.method import ClipMethod, Unlimited
from lightning_gradclip.methods.sigma import SigmaClip
from lightning_gradclip.record.context import NOTHING, Context
from lightning_gradclip.record.kept import Kept, finish
from lightning_gradclip.record.step import StepStats
from lightning_gradclip.record.window import Reader, Recorded, Window, WindowNumbers
from lightning_gradclip.select.parameters import Names, Selection

# How often what an optimizer feels is looked at where nobody says when he logs, as often as Lightning logs.
_LOOKS_EVERY = 50


class Clipper(Recorded):
    """Clips the gradients of one optimizer and keeps statistics, in any training loop.

    Args:
        named_parameters: Names and parameters, as from `model.named_parameters()`, or the model itself, which a model
            wrapped in FSDP has to be; the patterns are checked against these names.
        method: How to clip; None measures only. The clipper works on a copy of its own.
        optimizer: Whose parameters are served, groups added later included; None: every named one, as one group.
        action: "clip"; "skip" drops the step when any scope is over its limit; "observe" reports what would happen
            and writes nothing.
        nonfinite: On NaN or infinite gradients "skip" drops the step, "zero" replaces the entries, "raise" raises
            and "ignore" goes on. None: "skip" where the clipper writes, "ignore" where it observes.
        max_consecutive_skips: How many steps in a row may be dropped; None sets no bound.
        include: Shell pattern or patterns over parameter names, admitting parameters.
        exclude: Pattern or patterns taken out of what `include` admits.
        measure_per: "group", "layer" or "parameter": also record the norms of these scopes.
        fold: Hand the coefficient to the next step of a fused optimizer (Adam, AdamW, SGD or Adagrad with fused=True)
            instead of writing the gradients, which stay unclipped for later hooks; for methods with per="model".
        process_group: The ranks over which different parameters are held, such as stages of a pipeline or local
            experts, which all clip by one factor: a ProcessGroup or DeviceMesh, such as `mesh["pp"]`. None: ranks hold
            the same parameters, or pieces of them.
        scale_free: Parameters that an optimizer steps by direction alone (Muon, Lion, SignSGD), to which a limit does
            next to nothing: "warn" clips them and says so once, "clip" says nothing, "exclude" leaves them out.
        centralize: Take from each gradient of two dims or more, first of all, its mean over all dims but the first.
        triton: Multiply large CUDA gradients by a kernel that touches none where nothing is clipped; not yet measured.
        history: A folder in which the first rank records every step, for `lightning-gradclip report` and `advise`. At
            most 1,024 steps, or 2**18 norms, wait for `metrics()`, `look()`, `close()` or the end of the process.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If an argument is out of range, a pattern matches nothing, or FSDP has cut what is to be told apart.
        RuntimeError: If ranks that share a model serve different parameters, or clip by different settings.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, Tensor]] | nn.Module,
        method: ClipMethod | None,
        *,
        optimizer: Optimizer | None = None,
        action: str = "clip",
        nonfinite: str | None = None,
        max_consecutive_skips: int | None = 20,
        include: str | Sequence[str] = "*",
        exclude: str | Sequence[str] = (),
        measure_per: str | None = None,
        fold: bool = False,
        process_group: Any = None,
        scale_free: str = "warn",
        centralize: bool = False,
        triton: bool = False,
        history: str | os.PathLike[str] | bool = False,
    ) -> None:
        folder = checks.folder("history", history)
        if folder is True:
            raise ValueError("history=True is for a Trainer, whose logger has a folder; write history='logs/gradclip'")
        more: Any = {"measure_per": measure_per, "fold": fold, "process_group": process_group}
        more |= {"scale_free": scale_free, "centralize": centralize, "triton": triton}
        options = Options(method, action, nonfinite, max_consecutive_skips, include, exclude, **more)
        settings: Any = {"method": method, "action": options.policy.action, "measure_per": measure_per}
        self._kept = Kept(Path(folder).expanduser(), **settings) if folder and ranks.is_first_rank() else None
        readers = () if self._kept is None else (self._kept.take,)
        self._serve(named_parameters, optimizer, options, readers)
        if self._kept is not None:
            # They outlive the clipper: what it has recorded is written when nobody has it any more.
            weakref.finalize(self, finish, self._window.look, self._kept, os.getpid())
        if self._apart is None:
            # A rank that others are apart from may hold nothing.
            self._names.require_any(optimizer)

    @classmethod
    def with_options(
        cls,
        named_parameters: Iterable[tuple[str, Tensor]] | nn.Module,
        optimizer: Optimizer | None,
        options: Options,
        readers: Iterable[Reader] = (),
    ) -> "Clipper":
        """A clipper with options that are checked already, whose steps go to some readers too."""
        clipper = cls.__new__(cls)
        clipper._kept = None
        clipper._serve(named_parameters, optimizer, options, readers)
        return clipper

    def _serve(
        self,
        named_parameters: Iterable[tuple[str, Tensor]] | nn.Module,
        optimizer: Optimizer | None,
        options: Options,
        readers: Iterable[Reader],
    ) -> None:
        super().__init__(Window(*readers))
        self._optimizer, self._fold = optimizer, Fold(optimizer) if options.fold else None
        self._apart = ranks.members(options.process_group)
        told = {"complete": self._apart is None, "scale_free": options.scale_free != "exclude"}
        self._names = Names(named_parameters, options.include, options.exclude, **told)
        self._skips = Skips(options.policy.max_consecutive_skips)
        self.detailed = True
        # Whether a step has asked who the parameters are since they might have become others.
        self._is_sure = self._has_warned = False
        self._last: StepStats | None = None
        self._work_by(options)
        self._take_over(self._names.select(optimizer))

    def _work_by(self, options: Options) -> None:
        """Do from here on what these options say."""
        own = Unlimited() if options.method is None else copy.deepcopy(options.method)
        self._options, self._policy = options, options.policy
        self._writes, self._centralizes = self._policy.writes, options.centralize
        self._on_host = self._policy.decides_on_host(folds=options.fold, scaled=False)
        self._window.count_by_entry(own.per == "element")
        self._limiter = limiter_for(own, options.measure_per, self._optimizer)
        self._settings = options.settings() | {"process_group": f"{len(self._apart or ())} ranks"}
        self._watch: Watch | None = Watch(self._settings)
        # Who reads steps wants to know more about them.
        self._observer = Observer(self._limiter, own, self._optimizer) if self._window.has_readers else None
        self._losses = Losses(own) if isinstance(own, SigmaClip) and own.loss else None
        parts = self._policy, self._limiter, self._skips, self._fold, self._optimizer, self._losses
        self._actor = Actor(*parts, triton=options.triton)
        clips = self._policy.action == "clip"
        self._stalls = Stalls(self._optimizer, own) if self._optimizer is not None and clips else None
        fixed = not (self._limiter.adaptive or own.needs_moments)
        self._warns = fixed and clips and options.scale_free == "warn"

    @property
    def method(self) -> ClipMethod | None:
        """How to clip, checked and fixed; None measures only.

        Another one, assigned on every rank between the same two steps, holds from the next step on. What was learned
        goes on where it means the same to it, as to one of the same class and memory; else it learns afresh.

        Raises:
            ValueError: If it contradicts the other options, or takes norms of another `norm_type`.
        """
        return self._options.method

    @method.setter
    def method(self, method: ClipMethod | None) -> None:
        options = replace(self._options, method=method)
        before = self._limiter.learned
        before.require_same_norm(method)
        # What it cannot do is refused before anything has changed.
        judge = limiter_for(Unlimited() if method is None else method, options.measure_per, self._optimizer)
        judge.serve(self._selection, self._reducer)
        self._window.look()
        self._work_by(options)
        self._limiter.learned.inherit(before)
        self._take_over(self._selection)
        if self._kept is not None:
            self._kept.change(method=method, action=options.policy.action)

    @property
    def stats(self) -> StepStats | None:
        """What the last step did; None before the first."""
        return self._last

    def __repr__(self) -> str:
        served = f"{len(self._selection.params)} parameters in {self._limiter.scopes.count} scopes"
        return f"Clipper({self.method!r}, action={self._policy.action!r}; {served}, {self._steps} steps)"

    @property
    def optimizer(self) -> Optimizer | None:
        """The optimizer that is served."""
        return self._optimizer

    def step(
        self,
        scaler: GradScaler | None = None,
        *,
        at: int | None = None,
        detailed: bool | None = None,
        loss: Tensor | float | None = None,
        batch: int | None = None,
        epoch: int | None = None,
    ) -> StepStats:
        """Clip once; call it between `loss.backward()` and `optimizer.step()`.

        Args:
            scaler: The GradScaler that scaled the loss, if any; what it has not unscaled yet is unscaled here.
            at: The number of this step in the record; None: the steps that this clipper took before.
            detailed: In place of the attribute, and whether to look at what the optimizer feels; None: every 50th step.
            loss: The loss that was differentiated, for the history and for a method that waits for it.
            batch: For the history: index of the first batch of this step in its epoch.
            epoch: For the history: the epoch.

        Returns:
            What was done. A step in which no selected parameter has a gradient changes and records nothing.

        Raises:
            ValueError: If a scaler is given and the clipper has no optimizer.
            FloatingPointError: If gradients are not finite under nonfinite="raise", or more steps in a row were dropped
                than `max_consecutive_skips`, overflows of a GradScaler aside.
            RuntimeError: If ranks have different gradients of what they hold under one name.
        """
        looks = (self._steps + 1) % _LOOKS_EVERY == 0 if detailed is None else detailed
        detailed = self.detailed if detailed is None else detailed
        # As `no_grad`, at half its price.
        with torch.set_grad_enabled(False):
            if self._is_outdated():
                self._select()
            scaler = scaler if scaling.is_enabled(scaler) else None
            on_host = self._on_host if self._fold is None else self._decides_on_host(self._fold, scaler)
            scale: float | Tensor = 1.0
            if scaler is not None:
                scale = scaling.unscaled(scaler, self._optimizer, writes=self._unscales, together=bool(self._reducer))
            gradients = self._gradients()
            # Where ranks hold pieces, another rank may have gradients where this one has none.
            if self._reducer is None:
                if read.is_none(gradients):
                    return self._without_any(scaler, at=at, detailed=detailed, loss=loss, batch=batch, epoch=epoch)
            elif self._reducer.in_doubt and self._reducer.prove(gradients):
                self._limiter.serve(self._selection, self._reducer)
            outcome = self._limiter.judge(gradients, self._steps, scale, on_host=on_host, detailed=detailed)
            if outcome.nothing:
                return StepStats.of_nothing(self._limiter.scopes)
            if self._watch is not None:
                joint = None if self._reducer is None else outcome.norm
                self._watch = self._watch.look(self._selection.names, gradients, joint)
            if looks and self._stalls is not None:
                self._stalls.look(gradients, scale, outcome.row)
            if scaler is not None and self._reducer is not None and self._writes and self._optimizer is not None:
                scaling.agree(scaler, self._optimizer, outcome.finite)
            context = NOTHING
            if self._observer is not None:
                context = self._observer.note(outcome, gradients, self._steps, loss, batch, epoch)
            verdict = self._actor.act(outcome, self._steps, scaler, detailed=detailed, loss=loss)
            return self._recorded(verdict, self._steps if at is None else at, context)

    def numbers(self) -> WindowNumbers:
        found = super().numbers()
        share = None if self._stalls is None else self._stalls.share()
        # Of a window without a finite step there is nothing to tell.
        known = share is not None and "norm" in found.metrics
        return found._replace(metrics=found.metrics | {"stalled": share}) if known else found

    def take(self) -> WindowNumbers:
        self._skips.review(self._steps - 1)
        # With an optimizer the module is not asked at every step.
        self._is_sure = self._is_sure and not self._names.has_changed
        return super().take()

    def close(self) -> None:
        """Write what is pending of the history and close its files; a later step opens them again."""
        self.look()
        if self._kept is not None:
            self._kept.close()

    @property
    def selection(self) -> Selection:
        """The parameters that were served last."""
        return self._selection

    @property
    def serves_any(self) -> bool:
        """Whether the patterns admit any parameter of the optimizer."""
        return bool(self._selection.params)

    def state_dict(self) -> dict[str, Any]:
        """Step, counters, window, learned values and the names that they are about; tensors and plain types only."""
        state = {
            **super().state_dict(),
            "skips_in_a_row": self._skips.count(),
            "learned": self._limiter.learned.state_dict(),
        }
        if self._losses is not None:
            state["losses"] = self._losses.state()
        # Where others hold other parameters these are known by place only: what is saved does not depend on the rank.
        if self._apart is None:
            state["parameters"] = self._names.of(self._optimizer)
            if self._limiter.tells_groups:
                state["groups"] = {label: list(names) for label, names in self._names.groups.members.items()}
        return state

    def load_state_dict(self, state: Mapping[str, Any], *, strict: bool = True, relearn: bool = False) -> None:
        """Go on where `state_dict` left off; learned values find their scopes by name at the next step.

        Args:
            state: What `state_dict` gave, in this release or an earlier one.
            strict: Whether some of the learned values must be about scopes of this run; else all may start fresh.
            relearn: Whether to leave out the learned values, as a method that was changed has to; steps, counters and
                the open window go on all the same.

        Raises:
            ValueError: If the learned values belong to a differently configured method.
        """
        if not relearn:
            self._limiter.learned.load_state_dict(state["learned"], strict=strict)
            if self._losses is not None:
                self._losses.resume(state.get("losses", ()))
        super().load_state_dict(state)
        self._skips.resume(state["skips_in_a_row"])
        # Checkpoints of 0.1.0 know groups by their places only.
        self._names.groups.members = {label: tuple(names) for label, names in state.get("groups", {}).items()}
        self._is_sure = False

    def _is_outdated(self) -> bool:
        if self._optimizer is None:
            return self._names.has_changed or not self._is_sure
        return self._selection.is_outdated(self._optimizer) or not self._is_sure

    def _select(self) -> None:
        """Ask who the parameters are by now, and take over those that have become others."""
        found = self._names.select(self._optimizer)
        if not found.is_same(self._selection):
            self._take_over(found)
        self._is_sure = True

    def _take_over(self, selection: Selection) -> None:
        self._selection = selection
        if self._centralizes:
            selection.require_rows("take the mean of one", "leave out centralize=True")
        if self._warns and self._optimizer is not None:
            self._warns = False
            policy.warn_of_scale_free(self._limiter.learned.method, selection, self._optimizer)
        self._actor.serve(selection)
        self._reducer = reduce.reducer_for(selection, self._settings, self._apart, self._names.unmatched)
        # Where ranks hold pieces, a scaler that has yet to look for overflows would find those of its rank only.
        self._unscales = self._writes and (self._fold is None or self._reducer is not None)
        self._limiter.serve(selection, self._reducer)
        if self._apart is not None or (self._reducer is not None and self._reducer.has_met_all):
            self._watch = None
        if self._stalls is not None:
            self._stalls.serve(selection, self._reducer)
        if self._observer is not None:
            self._observer.serve(self._limiter.served, alone=self._reducer is None)

    def _without_any(self, scaler: GradScaler | None, **told: Any) -> StepStats:
        """A step of nothing, unless the model has other parameters by now, which have the gradients."""
        if self._names.has_changed:
            self._is_sure = False
            return self.step(scaler, **told)
        # Pairs cannot be asked who took their place, as optimizers and models can; on other ranks there may be some.
        asks = self._optimizer is not None or self._names.follows or self._selection.is_distributed
        if not (asks or self._steps or self._has_warned):
            self._has_warned = True
            warnings.warn(self._selection.without_gradients(), RuntimeWarning, stacklevel=3)
        return StepStats.of_nothing(self._limiter.scopes)

    def _gradients(self) -> list[Tensor | None]:
        params = self._selection.params
        if self._writes and self._selection.is_distributed:
            write.settle_(params)
        if self._centralizes:
            write.centralize_(params)
        return read.gradients_of(self._selection, settled=self._writes)

    def _decides_on_host(self, fold: Fold, scaler: GradScaler | None) -> bool:
        fold.withdraw()
        folds = scaler is not None or fold.can_leave_out(alike=self._reducer is not None)
        return self._policy.decides_on_host(folds=folds, scaled=scaler is not None)

    def _recorded(self, verdict: Verdict, at: int, context: Context) -> StepStats:
        outcome, row, places = verdict.outcome, verdict.row, self._limiter.measured
        self._steps += not verdict.refused
        self._window.add(at, row, () if places is None else places.names, outcome.measured, context)
        if verdict.then is not None:
            verdict.then()
        self._last = StepStats(row, outcome.sizes, outcome.limits, self._limiter.scopes, outcome.measured, places)
        return self._last
