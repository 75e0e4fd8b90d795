"""What may be done to the gradients, and what happens when some are not finite: closed lists of words."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from lightning_gradclip import checks
from lightning_gradclip.methods.method import ClipMethod

ACTIONS = ("clip", "skip", "observe")
MEASURES = ("group", "layer", "parameter")
NONFINITE = ("skip", "zero", "raise", "ignore")


@dataclass(repr=False)
class _Required(ClipMethod):
    """The default of an argument that has none, so that its absence is refused with the way to write one.

    An instance of the annotated type, which LightningCLI wants of a default, and a dataclass, as hydra-zen wants it.
    """

    def __repr__(self) -> str:
        return "required"


REQUIRED = _Required()


@dataclass(frozen=True)
class Policy:
    """The checked combination of `action`, `nonfinite` and `max_consecutive_skips`."""

    action: str
    nonfinite: str
    max_consecutive_skips: int | None

    @staticmethod
    def of(
        method: ClipMethod | None,
        action: str,
        nonfinite: str | None,
        max_consecutive_skips: int | None,
    ) -> "Policy":
        """Check the words together and fill in the default of `nonfinite`.

        Raises:
            TypeError: If `method` is no clipping method.
            ValueError: If a word is unknown or two of them contradict each other.
        """
        require_method(method)
        checks.choice("action", action, ACTIONS)
        observes = method is None or action == "observe"
        if nonfinite is None:
            nonfinite = "ignore" if observes else "skip"
        checks.choice("nonfinite", nonfinite, NONFINITE)
        if max_consecutive_skips is not None:
            checks.integer(
                "max_consecutive_skips",
                max_consecutive_skips,
                at_least=0,
                remedy="None sets no bound",
            )
        if observes and nonfinite in ("skip", "zero"):
            watched = "method=None" if method is None else "action='observe'"
            raise ValueError(
                f"{watched} writes nothing, so nonfinite={nonfinite!r} cannot be kept; "
                "use nonfinite='ignore' or 'raise', or action='clip'"
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

        Args:
            folds: Whether a fused optimizer can leave out the step by itself.
            scaled: Whether a GradScaler steps the optimizer, which drops what is not finite, and that only.
        """
        if not folds:
            return self.nonfinite != "ignore" or self.action == "skip"
        if scaled:
            return self.action == "skip"
        return self.nonfinite in ("raise", "zero")


def require_method(method: object) -> None:
    """Refuse what is no clipping method, with the way to write one."""
    remedy = "write method=NormClip(max_norm=1.0), or method=None to measure without clipping"
    if isinstance(method, _Required):
        raise TypeError(f"GradientClipping needs a method; {remedy}")
    if method is None or isinstance(method, ClipMethod):
        return
    if isinstance(method, type) and issubclass(method, ClipMethod):
        raise TypeError(f"method must be an instance, got the class {method.__name__}; write {method.__name__}()")
    raise TypeError(f"method must be a clipping method, got {method!r} ({type(method).__name__}); {remedy}")


@dataclass(frozen=True)
class Options:
    """What a clipper is told to do, checked once: the words of users, whoever they say them to.

    Attributes:
        method: How to clip; None measures only.
        action: As given; so are `nonfinite` and `max_consecutive_skips`.
        include: Patterns over parameter names, admitting parameters; `exclude` takes some out.
        measure_per: Kind of the scopes whose norms are recorded as well, if any.
        fold: Whether a fused optimizer is handed the coefficient.
        policy: What the first four come to.

    Raises:
        TypeError: If one is of the wrong kind.
        ValueError: If one is out of range or contradicts another.
    """

    method: ClipMethod | None
    action: str = "clip"
    nonfinite: str | None = None
    max_consecutive_skips: int | None = 20
    include: str | Sequence[str] = "*"
    exclude: str | Sequence[str] = ()
    measure_per: str | None = None
    fold: bool = False
    policy: Policy = field(init=False)

    def __post_init__(self) -> None:
        policy = Policy.of(self.method, self.action, self.nonfinite, self.max_consecutive_skips)
        remedy = "None measures the method's own scope only"
        if self.measure_per is not None:
            checks.choice("measure_per", self.measure_per, MEASURES, remedy=remedy)
        if checks.flag("fold", self.fold):
            _require_one_coefficient(self.method, policy)
        checked = {
            "policy": policy,
            "include": checks.patterns("include", self.include),
            "exclude": checks.patterns("exclude", self.exclude),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)


def _require_one_coefficient(method: ClipMethod | None, policy: Policy) -> None:
    remedy = "use fold=False"
    if method is None or not policy.writes:
        raise ValueError(f"fold=True hands over a coefficient, but nothing is to be clipped; {remedy}")
    if method.per != "model":
        raise ValueError(
            f"fold=True hands the optimizer one coefficient, but {method!r} has one for each {method.per}; "
            f"{remedy}, or a method with per='model'"
        )
