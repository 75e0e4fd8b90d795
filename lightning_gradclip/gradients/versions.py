"""Whether gradients were written since, which torch counts for each tensor: no memory is read, and nobody waits.

What is written by way of `.data` or NumPy torch does not count. For views of one memory it counts together: FSDP and
DDP's buckets keep many gradients in one.
"""

import operator
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_gradclip.select import layout


class Marks(NamedTuple):
    """The gradients of some parameters, held so that no other takes the place of one, and how often they were written.

    An absent one is None, and was written 0 times.
    """

    gradients: list[Tensor | None]
    counts: list[int]


def marks(params: Sequence[Tensor], *, others: bool) -> Marks:
    """How the gradients of these parameters are now.

    Where there are `others` of the same optimizer, whose gradients may be written, one that may share its memory with
    theirs counts nothing: it is found where it is replaced or removed.
    """
    gradients = [parameter.grad for parameter in params]
    return Marks(gradients, [_count_apart(one) for one in gradients] if others else _counts(gradients))


def written_since(params: Sequence[Tensor], then: Marks, *, others: bool) -> list[int]:
    """The places of the parameters whose gradient was replaced, removed or written in place, with the same `others`."""
    now = marks(params, others=others)
    if now.counts == then.counts and all(map(operator.is_, now.gradients, then.gradients)):
        return []
    pairs = zip(now.gradients, then.gradients, now.counts, then.counts, strict=True)
    return [place for place, (one, other, count, before) in enumerate(pairs) if one is not other or count != before]


def _counts(gradients: Sequence[Tensor | None]) -> list[int]:
    present = [gradient for gradient in gradients if gradient is not None]
    plain = len(present) == len(gradients) and set(map(type, present)) == {Tensor}
    if plain and not any(map(torch.is_inference, present)):
        return [gradient._version for gradient in present]
    return list(map(_count, gradients))


def _count(gradient: Tensor | None) -> int:
    # Those of inference mode count nothing.
    if gradient is None or gradient.is_inference():
        return 0
    # What a rank holds of it is a tensor of its own.
    return gradient._version if type(gradient) is Tensor else gradient._version + layout.local(gradient)._version


def _count_apart(gradient: Tensor | None) -> int:
    if gradient is None or gradient.layout is not torch.strided:
        return _count(gradient)
    piece = layout.local(gradient)
    fills = piece.untyped_storage().nbytes() == piece.numel() * piece.element_size()
    return _count(gradient) if fills else 0
