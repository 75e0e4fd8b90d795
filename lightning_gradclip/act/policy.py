"""What may be done to the gradients, and what happens when some are not finite: closed lists of words."""

import importlib.util
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer

from lightning_gradclip import checks
from lightning_gradclip.gradients import ranks
from lightning_gradclip.methods.method import ClipMethod
from lightning_gradclip.select import kinds
from lightning_gradclip.select.parameters import Selection

if TYPE_CHECKING:
    from typing_extensions import Self

ACTIONS = ("clip", "skip", "observe")
MEASURES = ("group", "layer", "parameter")
# Whose representation tells all about them, and the same everywhere.
_PLAIN = (bool, int, float, str, tuple, list, dict, type(None))
NONFINITE = ("skip", "zero", "raise", "ignore")
SCALE_FREE = ("warn", "clip", "exclude")
# The environment variable that is triton=True for all.
_TRITON = "LIGHTNING_GRADCLIP_TRITON"


class _Required(ClipMethod, str):
    """The default of an argument that has none, so that its absence is refused with the way to write one.

    An instance of the annotated type, which LightningCLI wants of a default, and a text, which hydra-zen takes over.
    """

    def __new__(cls, *_: object) -> "Self":
        return str.__new__(cls, "required")

    __repr__ = str.__str__


REQUIRED = _Required()


@dataclass(frozen=True)
class Policy:
    """The checked combination of `action`, `nonfinite` and `max_consecutive_skips`."""

    action: str
    nonfinite: str
    max_consecutive_skips: int | None

    @staticmethod
    def of(
        method: ClipMethod | None, action: str, nonfinite: str | None, max_consecutive_skips: int | None
    ) -> "Policy":
        """Check the words together and fill in the default of `nonfinite`."""
        _require_method(method)
        checks.choice("action", action, ACTIONS)
        observes = method is None or action == "observe"
        if nonfinite is None:
            nonfinite = "ignore" if observes else "skip"
        checks.choice("nonfinite", nonfinite, NONFINITE)
        if max_consecutive_skips is not None:
            max_consecutive_skips = checks.integer(
                "max_consecutive_skips", max_consecutive_skips, at_least=0, remedy="None sets no bound"
            )
        if observes and nonfinite in ("skip", "zero"):
            watched = "method=None" if method is None else "action='observe'"
            raise ValueError(
                f"{watched} writes nothing, so nonfinite={nonfinite!r} cannot be kept; "
                "use nonfinite='ignore' or 'raise', or action='clip'"
            )
        if method is not None and method.needs_loss and action != "skip":
            raise ValueError(
                f"{method!r} drops steps whose loss stands out, which action={action!r} does not; use action='skip', "
                "or loss=False"
            )
        if action == "skip" and method is None:
            raise ValueError("method=None writes nothing, so action='skip' cannot be kept; give a method")
        if action == "skip" and method is not None and method.may_grow:
            raise ValueError(
                f"action='skip' drops steps over a limit, but {method!r} also scales gradients up; "
                "use action='clip', or a method that only limits"
            )
        return Policy("observe" if observes else action, nonfinite, max_consecutive_skips)

    @property
    def writes(self) -> bool:
        """Whether gradients may be changed."""
        return self.action != "observe"

    def decides_on_host(self, *, folds: bool, scaled: bool) -> bool:
        """Whether the next thing to do depends on what was measured, so that the host must look at it.

        It `folds` where a fused optimizer can leave out the step by itself, and is `scaled` where a GradScaler steps
        it, which drops what is not finite, and that only.
        """
        if not folds:
            return self.nonfinite != "ignore" or self.action == "skip"
        if scaled:
            return self.action == "skip"
        return self.nonfinite in ("raise", "zero")


def _require_method(method: object) -> None:
    remedy = "write method=NormClip(max_norm=1.0), or method=None to measure without clipping"
    if isinstance(method, str) and method == REQUIRED:
        raise TypeError(f"GradientClipping needs a method; {remedy}")
    if isinstance(method, type) and issubclass(method, ClipMethod):
        raise TypeError(f"method must be an instance, got the class {method.__name__}; write {method.__name__}()")
    if method is not None and not isinstance(method, ClipMethod):
        raise TypeError(f"method must be a clipping method, got {method!r} ({type(method).__name__}); {remedy}")


@dataclass(frozen=True)
class Options:
    """What a clipper is told to do, checked once: the words of users, whoever they say them to.

    All are as given, but for the patterns; `policy` is what the first four come to.
    """

    method: ClipMethod | None
    action: str = "clip"
    nonfinite: str | None = None
    max_consecutive_skips: int | None = 20
    include: str | Sequence[str] = "*"
    exclude: str | Sequence[str] = ()
    measure_per: str | None = None
    fold: bool = False
    process_group: Any = None
    scale_free: str = "warn"
    centralize: bool = False
    triton: bool = False
    policy: Policy = field(init=False)

    def __post_init__(self) -> None:
        policy = Policy.of(self.method, self.action, self.nonfinite, self.max_consecutive_skips)
        if self.measure_per is not None:
            remedy = "None measures the method's own scope only"
            checks.choice("measure_per", self.measure_per, MEASURES, remedy=remedy)
        checks.choice("scale_free", self.scale_free, SCALE_FREE)
        triton = checks.flag("triton", self.triton) or checks.switch(_TRITON)
        if triton and importlib.util.find_spec("triton") is None:
            asked = "triton=True" if self.triton else f"{_TRITON}=1"
            raise ValueError(f"{asked} asks for a kernel of Triton, which is not installed; write pip install triton")
        if checks.flag("fold", self.fold):
            _require_one_coefficient(self.method, policy)
        if checks.flag("centralize", self.centralize) and not policy.writes:
            watched = "method=None" if self.method is None else "action='observe'"
            raise ValueError(
                f"{watched} writes nothing, so centralize=True cannot be kept; use centralize=False, or "
                "action='clip' with a method, such as NormClip(max_norm=inf), which limits nothing"
            )
        if self.method is not None and self.method.needs_loss and self.process_group is not None:
            raise ValueError("not all ranks of process_group= know a loss; use loss=False, or process_group=None")
        include, exclude = (checks.patterns(name, getattr(self, name)) for name in ("include", "exclude"))
        # Frozen for everybody else.
        vars(self).update(policy=policy, include=include, exclude=exclude, triton=triton)

    def settings(self) -> dict[str, str]:
        """What has to be the same on all ranks, by name, in words that do not depend on the rank."""
        method = self.method
        words = {"method": "None" if method is None else type(method).__name__}
        given = {} if method is None else {name: one for name, one in vars(method).items() if name != "state"}
        names = ("action", "nonfinite", "max_consecutive_skips", "include", "exclude")
        names += ("measure_per", "fold", "scale_free", "centralize")
        given |= {name: getattr(self, name) for name in names} | vars(self.policy)
        return words | {name: repr(one) for name, one in given.items() if isinstance(one, _PLAIN)}


def _require_one_coefficient(method: ClipMethod | None, policy: Policy) -> None:
    remedy = "use fold=False"
    if method is not None and method.needs_loss:
        raise ValueError(f"fold=True decides on the device, and {method!r} looks at a loss on the host; {remedy}")
    if method is None or not policy.writes:
        raise ValueError(f"fold=True hands over a coefficient, but nothing is to be clipped; {remedy}")
    if method.per != "model":
        raise ValueError(
            f"fold=True hands the optimizer one coefficient, but {method!r} has one for each {method.per}; "
            f"{remedy}, or a method with per='model'"
        )


def warn_of_scale_free(method: ClipMethod, selection: Selection, optimizer: Optimizer) -> None:
    """Say what a fixed limit does next to nothing to, if there is any such parameter."""
    said = pointless(method, selection, kinds.scale_free(optimizer))
    if said and ranks.is_first_rank():
        warnings.warn(said, RuntimeWarning, stacklevel=2)


def pointless(method: ClipMethod, selection: Selection, free: Mapping[int, str]) -> str | None:
    """What is to be said of a limit on parameters, by their ids, whose optimizers do not know a gradient's size."""
    pairs = zip(selection.names, map(id, selection.params), strict=True)
    found = [(name, free[key]) for name, key in pairs if key in free]
    if not found:
        return None
    name, optimizer = found[0]
    return (
        f"{method!r} limits {len(found)} of {len(selection.params)} parameters, such as {name!r}, that {optimizer} "
        "steps by the direction of their gradient alone: a fixed limit changes only how steps mix in its momentum, and "
        "a joint one is taken from the others. Leave them out with scale_free='exclude', drop single bad steps with "
        "action='skip', or say scale_free='clip' if that is what you want"
    )
