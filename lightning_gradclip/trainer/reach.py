"""What others have of a callback while a fit goes on: its method, its clippers and what their last steps did."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace

from lightning_gradclip.act.policy import Options
from lightning_gradclip.clipper import Clipper
from lightning_gradclip.gradients import ranks
from lightning_gradclip.methods.method import ClipMethod
from lightning_gradclip.record.step import StepStats
from lightning_gradclip.trainer.clippers import Clippers
from lightning_gradclip.trainer.deepspeed import Handover
from lightning_gradclip.trainer.record import Recorder

_log = logging.getLogger("lightning_gradclip")


class InReach:
    """The public attributes of the callback that change during a fit."""

    name: str
    _options: Options
    _clippers: Clippers
    _recorder: Recorder
    _handover: Handover | None
    # Says what speaks against options in this fit.
    _refuse: Callable[[Options], None] | None

    def __repr__(self) -> str:
        options = self._options
        scopes = "" if options.include == ("*",) and not options.exclude else f", include={list(options.include)!r}, "
        scopes += f"exclude={list(options.exclude)!r}" if scopes else ""
        return f"GradientClipping({self.method!r}, action={options.policy.action!r}, name={self.name!r}{scopes})"

    @property
    def method(self) -> ClipMethod | None:
        """How to clip, checked and fixed; None measures only.

        Another one may be assigned at any time, on every rank between the same two steps: see `Clipper.method`.
        """
        return self._options.method

    @method.setter
    def method(self, method: ClipMethod | None) -> None:
        options = replace(self._options, method=method)
        if self._handover is not None:
            raise ValueError(
                "DeepSpeed clips by itself, by what it was told at the start; change the method between fits"
            )
        if self._refuse is not None:
            self._refuse(options)
        self._options = options
        for index, clipper in self.clippers.items():
            clipper.method = method
            self._recorder.change(index, method=method, action=options.policy.action)
            if ranks.is_first_rank():
                _log.info("%s clips by %r from step %d on", self.name, method, clipper.steps)

    @property
    def clippers(self) -> Mapping[int, Clipper]:
        """The clippers of a fit by the index of their optimizer, each from its first step on; to be read only."""
        return {index: one for index, one in self._clippers.items() if isinstance(one, Clipper)}

    @property
    def stats(self) -> Mapping[int, StepStats]:
        """What the last step of each optimizer did, by its index."""
        return {index: one.stats for index, one in self.clippers.items() if one.stats is not None}
