"""Learned values across runs: rows named by their scope, and a fingerprint of what they mean."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_gradclip.methods.method import ClipMethod

_MEANING = ("per", "norm_type", "statistic", "window")


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
    """Refuse learned values that another configuration wrote; nothing was learned, nothing to refuse.

    Raises:
        ValueError: If the fingerprints differ.
    """
    ours, theirs = fingerprint(method), saved["fingerprint"]
    if saved["values"] and ours != theirs:
        raise ValueError(
            f"the checkpoint's clipping state was learned by {_described(theirs)}, but this run clips by "
            f"{_described(ours)}; use the same settings, or another name= to start afresh"
        )


def arrange(method: ClipMethod, old: Sequence[str], new: Sequence[str], size: Tensor, *, strict: bool = True) -> None:
    """Give the method rows for the scopes of this run: known ones keep theirs, new ones start fresh.

    Args:
        method: The method whose `state` has one row for each name in `old`.
        old: Scope names of the rows so far; empty at the start.
        new: Scope names of this run.
        size: A tensor `(len(new),)` on the device where the state shall live.
        strict: Whether the rows come from a checkpoint, which must have some scope in common with this run.

    Raises:
        ValueError: If `strict`, rows were learned and no scope is common to both.
    """
    # Copies, since rows are written below and a method may return one tensor under two names.
    fresh = {name: value.clone() for name, value in method.fresh_state(size).items()}
    known = dict(method.state_dict())
    if old and known and tuple(old) != tuple(new):
        places = {name: row for row, name in enumerate(old)}
        common = [(row, places[name]) for row, name in enumerate(new) if name in places]
        lost = [name for name in old if name not in set(new)]
        if not common and strict:
            raise ValueError(
                f"the learned clipping state is about {_first(old)}, none of which is in this run ({_first(new)}); "
                "resume with the same model, or use another name= to start afresh"
            )
        if lost:
            warnings.warn(
                f"dropped the learned clipping state of {_first(lost)}: not in this run",
                RuntimeWarning,
                stacklevel=2,
            )
        targets = torch.tensor([row for row, _ in common], dtype=torch.long, device=size.device)
        sources = torch.tensor([row for _, row in common], dtype=torch.long, device=size.device)
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
