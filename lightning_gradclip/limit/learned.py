"""What a method has learned, kept in order: values for each scope by its name, across runs, with what it means.

What is learned, and the limit that follows from it, is up to the method.
"""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_gradclip.methods.method import ClipMethod
from lightning_gradclip.select.names import as_called_now
from lightning_gradclip.select.scopes import Scopes, Units

_MEANING = ("per", "norm_type", "statistic", "window")


class Learned:
    """The learned values of one method: in the order of this run's scopes, on their device, or in plain floats.

    `rule` is the method, of which a single scope on CPU takes floats where tensors stand in its annotations.
    """

    def __init__(self, method: ClipMethod) -> None:
        self.method = method
        self.rule: Any = method
        self.adaptive = method.adaptive
        self._scopes: tuple[str, ...] = ()
        self._strict = self._in_floats = False
        self._arranged: Scopes | Units | None = None

    def arrange(self, scopes: Scopes | Units, sizes: Tensor) -> None:
        """Have values for each of these scopes, on the device of `sizes`, `(S,)`, before the method is asked."""
        if self.adaptive and (self._arranged is not scopes or self._in_floats):
            arrange(self.method, self._scopes, scopes.names, sizes, strict=self._strict)
            self._scopes, self._strict = scopes.names, False
            self._arranged, self._in_floats = scopes, False

    def arrange_floats(self, scopes: Scopes) -> None:
        """The same for a single scope, in floats."""
        if self._arranged is not scopes or not self._in_floats:
            self._arranged = None
            self.arrange(scopes, torch.zeros(1, dtype=torch.float64, device="cpu"))
            self.method.to_floats()
            self._in_floats = True

    def learn(self, sizes: Any, limits: Any, whole: bool | Tensor) -> None:
        """Let the method learn from sizes and limits, `(S,)` or floats, of a step in which `whole` is true."""
        if isinstance(sizes, float):
            if sizes > 0:
                self.rule.update(sizes, limits, True)
            return
        active = torch.isfinite(sizes) & (sizes > 0)
        self.method.update(sizes, limits, active if whole is True else active & whole)

    def state_dict(self) -> dict[str, Any]:
        """Values by scope name, with their fingerprint."""
        return save(self.method, self._scopes)

    def require_same_norm(self, method: ClipMethod | None) -> None:
        """Refuse a method, None for one that measures only, whose norms are none of those recorded so far."""
        before, after = self.method.norm_type, 2.0 if method is None else method.norm_type
        if after != before:
            raise ValueError(
                f"norm_type={after:g} in place of {before:g} would give the norms of this run two meanings; "
                f"keep norm_type={before:g}, or begin a new run"
            )

    def inherit(self, other: "Learned") -> None:
        """Go on from what another method has learned, if that means the same to this one."""
        if fingerprint(self.method) == fingerprint(other.method):
            self.load_state_dict(other.state_dict(), strict=False)

    def load_state_dict(self, state: Mapping[str, Any], *, strict: bool) -> None:
        """Take over values, to be arranged at the next step; with `strict` some of their scopes must be in this run."""
        require_same_meaning(self.method, state)
        self._scopes = tuple(state["scopes"])
        self.method.load_state_dict(state["values"])
        self._arranged, self._strict, self._in_floats = None, strict, False


def fingerprint(method: ClipMethod) -> dict[str, Any]:
    """What the learned values of a method depend on; compared on resume, never applied."""
    meaning = {name: getattr(method, name) for name in _MEANING if hasattr(method, name)}
    return {"class": type(method).__name__, **meaning}


def save(method: ClipMethod, scopes: Sequence[str]) -> dict[str, Any]:
    """The learned values with their scope names and fingerprint: tensors on the CPU and plain types only."""
    return {
        "fingerprint": fingerprint(method),
        "scopes": list(scopes),
        "values": {name: value.detach().cpu().clone() for name, value in method.state_dict().items()},
    }


def require_same_meaning(method: ClipMethod, saved: Mapping[str, Any]) -> None:
    """Refuse learned values that another configuration wrote; where nothing was learned, nothing is refused."""
    ours, theirs = fingerprint(method), saved["fingerprint"]
    if saved["values"] and ours != theirs:
        raise ValueError(
            f"the checkpoint's clipping state was learned by {_described(theirs)}, but this run clips by "
            f"{_described(ours)}; use the same settings, or relearn=True, which learns afresh and goes on with all else"
        )


def arrange(method: ClipMethod, old: Sequence[str], new: Sequence[str], size: Tensor, *, strict: bool = True) -> None:
    """Give the method values for the scopes of this run: known ones keep theirs, new ones start fresh.

    Args:
        method: The method whose `state` has values for each name in `old`.
        old: Scope names of the values so far; empty at the start.
        new: Scope names of this run.
        size: A tensor `(len(new),)` on the device where the state shall live.
        strict: Whether the values come from a checkpoint, which must have some scope in common with this run.

    Raises:
        ValueError: If `strict`, values were learned and no scope is common to both.
    """
    # Copies, since they are written below and a method may return one tensor under two names.
    fresh = {name: value.clone() for name, value in method.fresh_state(size).items()}
    known = dict(method.state_dict())
    old = as_called_now(old, set(new)) if strict and tuple(old) != tuple(new) else old
    if old and known and tuple(old) != tuple(new):
        places = {name: place for place, name in enumerate(old)}
        common = [(place, places[name]) for place, name in enumerate(new) if name in places]
        lost = [name for name in old if name not in set(new)]
        if not common and strict:
            raise ValueError(
                f"the learned clipping state is about {_first(old)}, none of which is in this run ({_first(new)}); "
                "resume with the same model, or use relearn=True, which learns afresh and goes on with all else"
            )
        if lost:
            warnings.warn(
                f"dropped the learned clipping state of {_first(lost)}: not in this run",
                RuntimeWarning,
                stacklevel=2,
            )
        targets = torch.tensor([target for target, _ in common], dtype=torch.long, device=size.device)
        sources = torch.tensor([source for _, source in common], dtype=torch.long, device=size.device)
        for name, value in fresh.items():
            value[targets] = known[name].to(size.device)[sources]
        known = fresh
    elif not old or not known:
        known = fresh
    method.load_state_dict({name: _owned(value, size) for name, value in known.items()})


def _owned(value: Tensor, size: Tensor) -> Tensor:
    """A copy on the device of `size`, which may know no float64."""
    return value.to(size.device, size.dtype if value.is_floating_point() else value.dtype, copy=True)


def _described(meaning: Mapping[str, Any]) -> str:
    arguments = ", ".join(f"{name}={value!r}" for name, value in meaning.items() if name != "class")
    return f"{meaning['class']}({arguments})"


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
