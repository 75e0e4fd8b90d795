"""Which cases `make test` and `make test-fast` take of those that a test has."""

from itertools import product

from kit.tiers import first_of_each_kind, summed
from lightning_gradclip import AGC, NormClip

SUBJECTS = [(NormClip, "model"), (NormClip, "layer"), (NormClip, "unit"), (AGC, "unit")]
CASES = [
    {"cls": cls, "per": per, "action": action, "bad": bad}
    for (cls, per), action, bad in product(SUBJECTS, ["clip", "skip"], [1.0, 2.0])
]


def taken(places: set[int]) -> list[tuple[object, ...]]:
    return [tuple(CASES[place].values()) for place in sorted(places)]


def test_a_sum_tries_each_subject_once_and_turns_through_the_rest() -> None:
    assert taken(summed(CASES)) == [
        (NormClip, "model", "clip", 1.0),
        (NormClip, "layer", "clip", 2.0),
        (NormClip, "unit", "skip", 1.0),
        (AGC, "unit", "skip", 2.0),
    ]


def test_a_sum_leaves_out_no_value_where_subjects_are_few() -> None:
    few = taken(summed(CASES[:4]))
    assert few == [(NormClip, "model", *rest) for rest in (("clip", 1.0), ("clip", 2.0), ("skip", 1.0))]
    numbers = [{"a": a, "b": b} for a, b in product((1, 1.0), (True, 2, 3))]
    assert len(summed(numbers)) == 3
    assert {type(numbers[place]["a"]) for place in summed(numbers)} == {int, float}


def test_the_fast_tier_takes_a_method_once() -> None:
    assert taken(first_of_each_kind(CASES)) == [
        (NormClip, "model", "clip", 1.0),
        (NormClip, "model", "clip", 2.0),
        (NormClip, "model", "skip", 1.0),
        (NormClip, "layer", "clip", 1.0),
        (NormClip, "unit", "clip", 1.0),
        (AGC, "unit", "clip", 1.0),
    ]
    assert first_of_each_kind([{}]) == {0}
