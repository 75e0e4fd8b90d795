"""What every clipping method is: a scope to measure and a limit to keep."""

import math
from collections.abc import Mapping
from dataclasses import FrozenInstanceError, fields, is_dataclass
from types import MappingProxyType
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor

from lightning_gradclip.checks import KnownArguments
from lightning_gradclip.methods.memory import Memory
from lightning_gradclip.methods.numbers import Number, Truth, divide, full, largest, minimum, where
from lightning_gradclip.methods.objects import PassedWhole


def _row(value: float) -> Tensor:
    """A learned number as a tensor `(1,)`: counts stay whole."""
    return torch.tensor([value], dtype=torch.long if isinstance(value, int) else torch.float64, device="cpu")


class MisplacedError(TypeError, AttributeError):
    """A method stands where a callback belongs; for whoever asks whether it has what a callback has, it has not."""


class _OfCallbacks:
    """What a trainer asks its callbacks for, and of a method among them, or of the class of one, in vain."""

    def __get__(self, method: "ClipMethod | None", kind: "type[ClipMethod]") -> NoReturn:
        given = f"{kind.__name__}()" if method is None else repr(method)
        what = f"the class {kind.__name__}" if method is None else given
        raise MisplacedError(
            f"callbacks=[...] holds {what}, which says how to clip and is no callback; write "
            f"callbacks=[GradientClipping({given})]"
        )


class ClipMethod(KnownArguments, PassedWhole):
    """Base class of the clipping methods; a subclass is a rule and nothing else.

    A method answers sizes with limits. It never sees a gradient, a rank, a logger or Lightning: selecting, measuring,
    reducing over ranks, guarding against non-finite values, writing, logging and saving are shared. `S` is the number
    of scopes; sizes are global (reduced over ranks), float64 (float32 on devices without it), where gradients are.

    Attributes:
        per: Where to measure: "model", "group", "layer" or "parameter"; "unit" for each slice of a weight along dim 0
            (a bias is one unit), "element" for methods that give bounds instead of limits.
        norm_type: The p of the p-norm, in (0, inf].
        statistic: "norm", or "rms" for the norm divided by the square root of the number of elements.
        scopes: The values of `per` that the method accepts.
        may_grow: Whether a gradient may be scaled up.
        needs_weight: Whether `limit` wants the sizes of the weights.
        needs_moments: Whether the rule is about gradients in units of sqrt(v), with v the mean square that an optimizer
            of Adam's kind keeps for each entry: sizes are then the root mean square of g / sqrt(v) in a scope, v being
            corrected for its start, and bounds of entries are in units of the sqrt(v) that is kept.
        epsilon: What `coef` adds to the size before dividing by it.
        on_floats: Whether `limit`, `coef` and `update` as this class defines them take plain floats, and True for
            `active`, where one scope is on CPU, to save time: for rules written with `lightning_gradclip.arithmetic`.
        state: Learned values, each of shape `(S, ...)`; see `fresh_state`. Floats and ints for a rule on floats.
    """

    per: str = "model"
    norm_type: float = 2.0
    statistic: str = "norm"
    may_grow: bool = False
    scopes: ClassVar[tuple[str, ...]] = ("model", "group", "layer", "parameter")
    needs_weight: ClassVar[bool] = False
    needs_moments: ClassVar[bool] = False
    on_floats: ClassVar[bool] = False
    # That of torch.nn.utils.clip_grad_norm_. It matters where sizes are as small: rules that follow them have none.
    epsilon: float = 1e-6
    state: Mapping[str, Any] = MappingProxyType({})
    # The arguments, once they have been given.
    _settled: frozenset[str] = frozenset()
    state_key = setup = on_exception = _OfCallbacks()

    def finish(self) -> None:
        if is_dataclass(self):
            vars(self)["_settled"] = frozenset(one.name for one in fields(self) if one.init)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self._settled:
            kind = type(self).__name__
            raise FrozenInstanceError(
                f"{name} of {kind} is fixed, since clippers work on checked copies; another method holds from the next "
                f"step on where it is given: callback.method = {kind}({name}={value!r}), or clipper.method = ..."
            )
        object.__setattr__(self, name, value)

    def limit(self, size: Tensor, weight: Tensor | None, step: int) -> Tensor:
        """How large each scope may be.

        Args:
            size: What was measured, `(S,)`.
            weight: Sizes of the weights of the same scopes, `(S,)`; None unless `needs_weight`.
            step: Steps this clipper took before this one, for schedules.

        Returns:
            Limits, `(S,)`; +inf where there is nothing to do.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define limit(size, weight, step)")

    def threshold(self, size: Tensor, limit: Tensor, step: int) -> Tensor:
        """From which size on a scope is clipped, `(S,)`, for the record: the limit, unless that depends on the size."""
        return limit

    def coef(self, size: Tensor, limit: Tensor) -> Tensor:
        """The factor for each scope, `(S,)`: limit / (size + epsilon) above the limit and exactly 1 within."""
        return where(size > limit, divide(limit, size + self.epsilon), 1.0)

    def floor_at(self, step: int) -> float:
        """The size that smaller ones are scaled up to, for rules that may grow a gradient; 0: none is."""
        return 0.0

    def bounds(self, step: int) -> tuple[float, float]:
        """The smallest and largest entry allowed, for per="element" only, where it takes the place of `coef`."""
        raise NotImplementedError(f"{type(self).__name__} does not define bounds(step)")

    def fresh_state(self, size: Tensor) -> dict[str, Tensor]:
        """Learned values of scopes that were never seen, each of shape `(S, ...)` on the device of `size`.

        Called before the first `limit` and whenever scopes join; the result becomes `state`. Default: nothing.
        """
        return {}

    def update(self, size: Tensor, limit: Tensor, active: Tensor) -> None:
        """Learn from this step, after acting; the only place where `state` changes. Default: nothing.

        Args:
            size: What was measured, `(S,)`, before clipping.
            limit: What was allowed, `(S,)`.
            active: Boolean `(S,)`, true where the size is finite and greater than zero; write
                `torch.where(active, new, old)`. Not called with any true entry when some scope is not finite.
        """

    def state_dict(self) -> dict[str, Tensor]:
        """Learned values by name, each of shape `(S, ...)`."""
        return {name: value if isinstance(value, Tensor) else _row(value) for name, value in self.state.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over learned values that are already in the order of this run's scopes."""
        self.state = dict(state)

    def to_floats(self) -> None:
        """Turn the learned values of a single scope from tensors `(1,)` into plain numbers."""
        self.state = {name: value.item() for name, value in self.state.items()}

    @property
    def least_steps(self) -> int:
        """How many steps of the optimizer v has to be from before it counts, for rules that `needs_moments`."""
        return 1

    @property
    def needs_loss(self) -> bool:
        """Whether the clipper is to drop the steps of batches whose loss stands out too; of `SigmaClip` only."""
        return False

    @property
    def takes_floats(self) -> bool:
        """Whether `on_floats` holds for this rule: a subclass that overrides a part of it must say so again."""
        parts = {"on_floats", "limit", "coef", "floor_at", "update", "fresh_state"}
        nearest = next(kind for kind in type(self).__mro__ if parts & vars(kind).keys())
        return "on_floats" in vars(nearest) and self.on_floats and not self.needs_weight

    @property
    def adaptive(self) -> bool:
        """Whether the limit is learned from the run."""
        return type(self).update is not ClipMethod.update


class Remembering(ClipMethod):
    """A rule about remembered sizes: its state is that of a memory."""

    _memory: type[Memory]

    def update(self, size: Number, limit: Number, active: Truth) -> None:
        self.state = self._memory.pushed(self.state, size, active)

    def state_dict(self) -> dict[str, Tensor]:
        return self._memory.as_tensors(self.state)

    def to_floats(self) -> None:
        self.state = self._memory.in_floats(self.state)


class Unlimited(ClipMethod):
    """Measures and limits nothing: what `method=None` stands for."""

    on_floats = True

    def limit(self, size: Number, weight: Tensor | None, step: int) -> Number:
        return full(size, math.inf)


def coefs_of(method: ClipMethod, size: Number, limit: Number, step: int) -> Number:
    """The factor for each scope, `(S,)`: the method's, and where a size is below the floor what raises it to that."""
    coef = method.coef(size, limit)
    floor = method.floor_at(step) if method.may_grow else 0.0
    if not floor > 0:
        return coef
    # A size near the smallest number has no finite factor.
    return where((size > 0) & (size < floor), minimum(divide(floor, size), largest(size)), coef)
