"""Which cases of a test run when: a sum in place of a product, and in the fast tier each method once."""

import inspect
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

Case = Mapping[str, Any]


def summed(cases: Sequence[Case]) -> set[int]:
    """The places of the cases that stand for their product: each subject once, with the next of what it is tried with.

    A subject is a method and its scope where the test is given one, else the argument with the most values. Whatever
    that leaves out of the values of single arguments comes with the first case that has it.
    """
    names = _subject_of(cases)
    groups: dict[Any, list[int]] = defaultdict(list)
    for place, case in enumerate(cases):
        groups[tuple(_word(case[name]) for name in names)].append(place)
    kept = {group[number % len(group)] for number, group in enumerate(groups.values())}
    shown = {fact for place in kept for fact in _facts(cases[place])}
    for place, case in enumerate(cases):
        if not shown.issuperset(_facts(case)):
            kept.add(place)
            shown |= _facts(case)
    return kept


def first_of_each_kind(cases: Sequence[Case]) -> set[int]:
    """The places of the cases that show a value of some argument for the first time, of methods a class."""
    shown: set[Any] = set()
    kept = set()
    for place, case in enumerate(cases):
        facts = {(name, _kind(value)) for name, value in case.items()} or {"a test without arguments"}
        if not shown.issuperset(facts):
            kept.add(place)
            shown |= facts
    return kept


def _subject_of(cases: Sequence[Case]) -> tuple[str, ...]:
    names = cases[0].keys()
    if {"cls", "per"} <= names:
        return ("cls", "per")
    values = Counter({name: len({_word(case[name]) for case in cases}) for name in names})
    return tuple(name for name, _ in values.most_common(1))


def _facts(case: Case) -> set[Any]:
    return {(name, _word(value)) for name, value in case.items()}


def _word(value: Any) -> Any:
    return (type(value), value) if isinstance(value, (str, int, float)) else id(value)


def _kind(value: Any) -> Any:
    """What makes a value of an argument another one; of a method one configuration is enough."""
    from lightning_gradclip import ClipMethod

    cls = value if inspect.isclass(value) else type(value)
    return cls if issubclass(cls, ClipMethod) else _word(value)
