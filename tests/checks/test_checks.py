"""Argument checks: what they return, and what they say."""

import math
import re
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch
from omegaconf import ListConfig

from lightning_gradclip import checks


@pytest.mark.parametrize("value", [2, 2.0, np.float32(2.0), np.int64(2), Fraction(2)])
def test_a_number_becomes_a_plain_float(value: object) -> None:
    result = checks.number("x", value, above=0.0, at_least=2.0, at_most=2.0)
    assert type(result) is float
    assert result == 2.0


@pytest.mark.parametrize("value", [math.inf, -math.inf])
def test_infinity_is_a_number_where_no_bound_excludes_it(value: float) -> None:
    assert checks.number("x", value) == value


@pytest.mark.parametrize(
    ("value", "kind"),
    [("one", "str"), (True, "bool"), (None, "NoneType"), ([1.0], "list"), (1j, "complex"), (torch.ones(()), "Tensor")],
)
def test_what_is_no_number_is_named_with_its_kind(value: object, kind: str) -> None:
    with pytest.raises(TypeError) as failure:
        checks.number("x", value, remedy="write 1.0")
    assert str(failure.value) == f"x must be a number, got {value!r} ({kind}); write 1.0"


@pytest.mark.parametrize(
    ("value", "bounds", "said"),
    [
        (0.0, {"above": 0.0}, "> 0, got 0.0"),
        (-1, {"above": 0.0}, "> 0, got -1"),
        (-0.5, {"at_least": 0.0}, ">= 0, got -0.5"),
        (1.5, {"above": 0.0, "at_most": 1.0}, "<= 1, got 1.5"),
        (math.inf, {"at_most": 1.0}, "<= 1, got inf"),
        (math.nan, {"above": 0.0, "at_most": 1.0}, "> 0 and <= 1, got nan"),
        (math.nan, {}, "a number, got nan"),
    ],
)
def test_a_number_out_of_range_is_named_with_the_range(value: float, bounds: dict[str, float], said: str) -> None:
    with pytest.raises(ValueError, match=r"^x must be") as failure:
        checks.number("x", value, **bounds)
    assert str(failure.value) == f"x must be {said}"


@pytest.mark.parametrize(
    ("value", "bounds"),
    [(5e-324, {"above": 0.0}), (0.0, {"at_least": 0.0}), (1.0, {"at_most": 1.0})],
)
def test_the_edge_of_a_range_is_inside(value: float, bounds: dict[str, float]) -> None:
    assert checks.number("x", value, **bounds) == value


def test_an_integer_is_returned() -> None:
    assert checks.integer("x", 3, at_least=3) == 3


@pytest.mark.parametrize(("value", "kind"), [(3.0, "float"), ("three", "str"), (True, "bool"), (None, "NoneType")])
def test_what_is_no_whole_number_is_named_with_its_kind(value: object, kind: str) -> None:
    with pytest.raises(TypeError) as failure:
        checks.integer("x", value, at_least=0, remedy="write 3")
    assert str(failure.value) == f"x must be a whole number, got {value!r} ({kind}); write 3"


def test_a_small_integer_is_named_with_the_smallest() -> None:
    with pytest.raises(ValueError, match=r"^x must be >= 0, got -1; write 3$"):
        checks.integer("x", -1, at_least=0, remedy="write 3")


def test_a_choice_is_returned() -> None:
    assert checks.choice("x", "b", ("a", "b")) == "b"


@pytest.mark.parametrize("value", ["c", "", "A", None, 1, ["a"]])
def test_an_unknown_word_is_answered_with_the_known_ones(value: object) -> None:
    with pytest.raises(ValueError, match=r"^x must be one of") as failure:
        checks.choice("x", value, ("a", "b"), remedy="a is usual")
    assert str(failure.value) == f"x must be one of 'a', 'b', got {value!r}; a is usual"


@pytest.mark.parametrize(
    ("value", "allowed", "close"),
    [
        ("monitor", ("clip", "skip", "observe"), "observe"),
        ("Watch", ("clip", "skip", "observe"), "observe"),
        ("skp", ("clip", "skip", "observe"), "skip"),
        ("tensor", ("model", "layer", "parameter"), "parameter"),
        ("layers", ("model", "layer", "parameter"), "layer"),
        # What is close elsewhere only, or nowhere.
        ("monitor", ("zero", "raise"), None),
        ("zzz", ("zero", "raise"), None),
        (None, ("zero", "raise"), None),
        (["zero"], ("zero", "raise"), None),
    ],
)
def test_a_word_that_is_close_is_asked_for(value: object, allowed: tuple[str, ...], close: str | None) -> None:
    with pytest.raises(ValueError, match=r"^x must be one of") as failure:
        checks.choice("x", value, allowed)
    assert str(failure.value).partition("got ")[2] == (f"{value!r}; did you mean {close!r}?" if close else repr(value))


def test_an_argument_that_is_close_is_asked_for() -> None:
    class Known(checks.KnownArguments):
        def __init__(self, max_norm: float = 1.0, per: str = "model") -> None: ...

    with pytest.raises(
        TypeError, match=r"no argument 'max_nrm'; its arguments are max_norm, per; did you mean 'max_norm'"
    ):
        Known(max_nrm=1.0)
    with pytest.raises(TypeError, match=r"no argument 'max_nrm'; its arguments are max_norm, per$"):
        Known(max_norm=2.0, max_nrm=1.0)


@pytest.mark.parametrize("value", [True, False])
def test_a_flag_is_returned(value: bool) -> None:
    assert checks.flag("x", value) is value


@pytest.mark.parametrize("value", ["false", 0, 1.0, None])
def test_what_is_no_flag_is_refused(value: object) -> None:
    with pytest.raises(TypeError, match=r"^x must be True or False, got "):
        checks.flag("x", value)


@pytest.mark.parametrize(
    ("value", "result"),
    [
        ("encoder.*", ("encoder.*",)),
        (["a", "b"], ("a", "b")),
        (("a",), ("a",)),
        ([], ()),
        (ListConfig(["a", "b"]), ("a", "b")),
    ],
)
def test_patterns_become_a_tuple_of_strings(value: object, result: tuple[str, ...]) -> None:
    assert checks.patterns("include", value) == result
    assert {type(one) for one in checks.patterns("include", value)} <= {str}


@pytest.mark.parametrize("value", [3, None, {"a": 1}])
def test_what_holds_no_patterns_is_refused(value: object) -> None:
    with pytest.raises(TypeError) as failure:
        checks.patterns("include", value)
    expected = f"include must be a pattern or a list of patterns, got {value!r}; write include=['encoder.*']"
    assert str(failure.value) == expected


@pytest.mark.parametrize(("value", "item"), [(["a", 3], "3"), ("", "''"), (["a", ""], "''"), ([["a"]], "['a']")])
def test_what_is_no_pattern_is_refused(value: object, item: str) -> None:
    with pytest.raises(TypeError) as failure:
        checks.patterns("exclude", value)
    assert str(failure.value) == f"exclude holds {item}, which is no pattern; write exclude=['encoder.*']"


@pytest.mark.parametrize(
    "refused",
    [
        lambda: checks.number("x", "one"),
        lambda: checks.integer("x", 1.5, at_least=0),
        lambda: checks.choice("x", "c", ("a", "b")),
    ],
)
def test_without_a_remedy_nothing_dangles(refused: Callable[[], object]) -> None:
    with pytest.raises((TypeError, ValueError)) as failure:
        refused()
    assert ";" not in str(failure.value)


@pytest.mark.parametrize(("text", "number"), [("0.5", 0.5), ("-3", -3.0), ("1e-3", 0.001)])
def test_a_number_in_a_text_is_read_and_said(text: str, number: float) -> None:
    said = f"x is text, {text!r}, and read as a number; give a number, such as float({text!r}) in Python or "
    expected = re.escape(said + "'${oc.decode:${oc.env:NAME}}', with these quotes, in a configuration")
    with pytest.warns(UserWarning, match=f"^{expected}$"):
        assert checks.number("x", text) == number


def test_a_whole_number_in_a_text_is_one() -> None:
    with pytest.warns(UserWarning, match="x is text, '25', and read as a number"):
        assert checks.integer("x", "25", at_least=1) == 25


@pytest.mark.parametrize(("text", "number"), [("inf", math.inf), (".inf", math.inf), ("-.inf", -math.inf)])
def test_infinity_has_two_spellings(text: str, number: float) -> None:
    assert checks.number("x", text) == number
