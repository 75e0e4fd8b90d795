"""Where to measure: scopes of whole parameters, or the output units inside them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor


@dataclass(frozen=True)
class Scopes:
    """Where to measure: the names of `S` scopes, and for each parameter the index of its scope."""

    names: tuple[str, ...]
    index: tuple[int, ...]
    _indices: dict[torch.device, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    @staticmethod
    def of(labels: Sequence[str]) -> "Scopes":
        """Scopes from one label for each parameter, in order of first appearance."""
        order = {label: i for i, label in enumerate(dict.fromkeys(labels))}
        return Scopes(tuple(order), tuple(order[label] for label in labels))

    @property
    def count(self) -> int:
        return len(self.names)

    def index_on(self, device: torch.device) -> Tensor:
        """`index` as a tensor `(P,)`, moved to each device once."""
        if device not in self._indices:
            self._indices[device] = torch.tensor(self.index, device="cpu").to(device)
        return self._indices[device]


def units_in(tensor: Tensor) -> int:
    """The number of slices along dim 0; 1 of a bias or scalar."""
    return tensor.shape[0] if tensor.ndim > 1 else 1


@dataclass(frozen=True, eq=False)
class Units:
    """The `S` output units of some parameters, in order, each a scope.

    A unit is a slice of a weight along dim 0, one for each output of its layer; a bias or scalar is one unit.
    Parameters of lazy modules take their shape when the model first runs.
    """

    parameters: tuple[str, ...]
    params: tuple[Tensor, ...]
    _indices: dict[torch.device, Tensor] = field(default_factory=dict, init=False, repr=False)

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """The number of units of each parameter."""
        return tuple(map(units_in, self.params))

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """The index of the first unit of each parameter, and at the end the number of units."""
        return (0, *accumulate(self.counts))

    @property
    def count(self) -> int:
        return self.starts[-1]

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Such as "conv.weight[3]" and "conv.bias"; made when asked for, since a large model has a million."""
        units = zip(self.parameters, self.params, self.counts, strict=True)
        return tuple(f"{name}[{i}]" if one.ndim > 1 else name for name, one, count in units for i in range(count))

    def index_on(self, device: torch.device) -> Tensor:
        """For each unit the index of its parameter, `(S,)`, moved to each device once."""
        if device not in self._indices:
            counts = torch.tensor(self.counts, dtype=torch.long, device="cpu")
            self._indices[device] = torch.arange(len(counts), device="cpu").repeat_interleave(counts).to(device)
        return self._indices[device]
