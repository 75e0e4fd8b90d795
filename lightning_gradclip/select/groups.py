"""What parameter groups and optimizers are recognised by: the parameters that they hold, wherever they stand."""

from collections import Counter
from collections.abc import Collection, Hashable, Mapping, Sequence
from itertools import chain, count
from typing import TypeVar

_Key = TypeVar("_Key", bound=Hashable)


def recognised(known: Mapping[_Key, Collection[str]], now: Sequence[Collection[str]]) -> list[_Key | None]:
    """For each of some sets of names the key of the known one that it shares most with, each used once; None: none."""
    owners = {name: key for key, names in known.items() for name in names}
    shared = [Counter(owners[name] for name in names if name in owners) for names in now]
    pairs = sorted(
        ((many, place, key) for place, counts in enumerate(shared) for key, many in counts.items()),
        key=lambda pair: -pair[0],
    )
    found: dict[int, _Key] = {}
    used: set[_Key] = set()
    for _, place, key in pairs:
        if place not in found and key not in used:
            found[place] = key
            used.add(key)
    return [found.get(place) for place in range(len(now))]


class Groups:
    """The labels of an optimizer's parameter groups, which stay theirs when the groups come in another order.

    Attributes:
        members: What the groups of each label held when it was last seen, by the names of the parameters.
    """

    def __init__(self) -> None:
        self.members: dict[str, tuple[str, ...]] = {}

    def labels(self, names: Sequence[object], members: Sequence[Sequence[str]]) -> list[str]:
        """A label for each group: its own name, if the names tell the groups apart, or "group0" and so on.

        Args:
            names: The names that the groups have been given; None: none.
            members: The names of the parameters in each group.
        """
        own = [None if name is None else str(name) for name in names]
        if len({f"group{i}" if name is None else name for i, name in enumerate(own)}) < len(own):
            own = [None] * len(own)
        unnamed = [held if name is None else () for name, held in zip(own, members, strict=True)]
        known = {label: held for label, held in self.members.items() if label not in own}
        labels: list[str] = []
        for place, (name, label) in enumerate(zip(own, recognised(known, unnamed), strict=True)):
            labels.append(name or label or self._free(place, (*labels, *own)))
        self.members |= {label: (*held,) for label, held in zip(labels, members, strict=True) if held}
        return labels

    def _free(self, place: int, taken: Sequence[str | None]) -> str:
        """The label of the place, or else the first, that no other group has or had."""
        labels = (f"group{i}" for i in chain((place,), count()))
        return next(label for label in labels if label not in self.members and label not in taken)
