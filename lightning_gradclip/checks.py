"""Argument checks: one sentence of fact with the value, one of remedy.

The door of everything that users configure: nothing here imports torch, so that whoever reads a record may use it.
"""

import difflib
import math
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from inspect import Parameter, Signature, signature
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, TypeVar, cast

if TYPE_CHECKING:
    Unbounded = float
else:
    # A number that may be infinite: to LightningCLI `inf` is text.
    Unbounded = float | str


def number(
    name: str,
    value: object,
    *,
    above: float = -math.inf,
    at_least: float = -math.inf,
    below: float = math.inf,
    at_most: float = math.inf,
    finite: bool = False,
    remedy: str = "",
) -> float:
    """Return `value` as a plain float, or say which number was expected."""
    remedy = remedy and f"; {remedy}"
    if isinstance(value, str):
        value = from_text(name, value)
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r} ({type(value).__name__}){remedy}")
    try:
        result = float(value)
    except OverflowError:
        result = math.nan
    kept = (result > above, result >= at_least, result < below, result <= at_most)
    sides = zip((">", ">=", "<", "<="), (above, at_least, below, at_most), kept, strict=True)
    bounds = [f"{sign} {bound:g}" for sign, bound, holds in sides if math.isfinite(bound) and not holds]
    if finite and math.isinf(result):
        bounds.append("finite")
    if math.isnan(result) or bounds:
        raise ValueError(f"{name} must be {' and '.join(bounds) or 'a number'}, got {value!r}{remedy}")
    return result


def integer(name: str, value: object, *, at_least: int, remedy: str = "") -> int:
    """Return `value` as a plain int, or say which whole number was expected."""
    remedy = remedy and f"; {remedy}"
    if isinstance(value, str):
        value = from_text(name, value)
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be a whole number, got {value!r} ({type(value).__name__}){remedy}")
    if value < at_least:
        raise ValueError(f"{name} must be >= {at_least}, got {value!r}{remedy}")
    return int(value)


def from_text(name: str, text: str, *, quiet: bool = False) -> float | str:
    """The number that a text stands for, and a warning, since text is what a resolver gives by mistake; or the text.

    Infinity has no spelling that all command lines take for a number: both, `inf` and `.inf`, are read in silence.
    """
    try:
        value = float(text.replace(".inf", "inf"))
    except ValueError:
        return text
    if math.isfinite(value) and not quiet:
        message = (
            f"{name} is text, {text!r}, and read as a number; give a number, such as float({text!r}) in Python or "
            "'${oc.decode:${oc.env:NAME}}', with these quotes, in a configuration"
        )
        warnings.warn(message, stacklevel=2)
    return int(value) if text.strip().lstrip("+-").isdecimal() else value


# Two minor releases after the one that has the new ones.
_OLD_NAMES_GO = "0.4.0"

# What other libraries, and other options of ours, call it.
_SYNONYMS = {
    "monitor": "observe",
    "watch": "observe",
    "measure": "observe",
    "drop": "skip",
    "error": "raise",
    "global": "model",
    "module": "layer",
    "tensor": "parameter",
    "row": "unit",
    "channel": "unit",
    "value": "element",
}


def choice(name: str, value: object, allowed: tuple[str, ...], *, remedy: str = "") -> str:
    """Return `value` if it is one of `allowed`, or list what is allowed, and say what may have been meant."""
    if value not in allowed:
        remedy = (remedy and f"; {remedy}") + meant(value, allowed)
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}{remedy}")
    return str(value)


def meant(value: object, known: Iterable[str]) -> str:
    """The end of a sentence that asks for the known word that is closest to this one, if one is close."""
    words = list(known)
    if not isinstance(value, str):
        return ""
    synonyms = [word for word in (_SYNONYMS.get(value.lower()),) if word in words]
    close = synonyms or difflib.get_close_matches(value, words, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def flag(name: str, value: object) -> bool:
    """Return `value` if it is True or False; strings such as "false" are refused."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r} ({type(value).__name__})")
    return value


def switch(name: str) -> bool:
    """Whether an environment variable is 1; it is off where it is 0, empty or missing, and anything else is refused."""
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        raise ValueError(f"the environment variable {name} must be 0 or 1, got {value!r}")
    return value == "1"


def section(name: str, value: object) -> str:
    """Return the name of a section of a logger, which is one of a folder too."""
    if not isinstance(value, str) or not value:
        raise TypeError(f"{name} must be a non-empty string, got {value!r}; the default is 'gradclip'")
    if value != os.path.basename(value) or value in (os.curdir, os.pardir):
        raise ValueError(
            f"{name}={value!r} is a path, and must be one word, since metrics are {name}/norm and a history lies in a "
            f"folder of this name; write {name}={value.strip('./').replace('/', '_') or 'gradclip'!r}"
        )
    return value


def folder(name: str, value: object) -> bool | str:
    """Return True, False, or the name of a folder as a string."""
    if isinstance(value, bool):
        return value
    if not isinstance(value, (str, os.PathLike)):
        raise TypeError(f"{name} must be True, False or a folder, got {value!r} ({type(value).__name__})")
    path = os.fspath(cast("str | os.PathLike[str]", value))
    if not path or "://" in path:
        raise ValueError(f"{name} must name a folder on a file system of this machine, got {path!r}")
    return path


def patterns(name: str, value: object) -> tuple[str, ...]:
    """Return one shell pattern or a list of them as a plain tuple."""
    items = (value,) if isinstance(value, str) else value
    if isinstance(items, Mapping) or not isinstance(items, Iterable):
        raise TypeError(f"{name} must be a pattern or a list of patterns, got {value!r}; write {name}=['encoder.*']")
    result = tuple(cast("Iterable[object]", items))
    for item in result:
        if not isinstance(item, str) or not item:
            raise TypeError(f"{name} holds {item!r}, which is no pattern; write {name}=['encoder.*']")
    return cast("tuple[str, ...]", result)


_Value = TypeVar("_Value")


def renamed(old: str, new: str, value: _Value) -> _Value:
    """Return the value of what has another name now, with a warning that says until when the old one works."""
    warnings.warn(f"{old} is now {new}; the old name goes in {_OLD_NAMES_GO}", FutureWarning, stacklevel=3)
    return value


class _Called(type):
    """Looks at the arguments of a call before the class does, and gives what was made the last touch."""

    def __call__(cls, *given: Any, **arguments: Any) -> Any:
        parameters = [*signature(cls.__init__).parameters.values()][1:]
        _require_known(cls, parameters, arguments)
        _require_by_name(cls, parameters, given)
        made = super().__call__(*given, **arguments)
        made.finish()
        return made

    @property
    def __signature__(cls) -> Signature:
        """That of the constructor, which `inspect` would overlook for the call above."""
        shown = signature(cls.__init__)
        return shown.replace(parameters=[*shown.parameters.values()][1:])


class KnownArguments(metaclass=_Called):
    """A base class that refuses unknown arguments with the list of the known ones, and says which have to be named.

    Configurations are merged from files and command lines. Python names one key that does not belong, and none that
    does. `inspect.signature` goes on showing the arguments of the constructor.
    """

    def finish(self) -> None:
        """Called once when everything has been constructed."""


def _require_known(cls: type, parameters: Sequence[Parameter], arguments: Mapping[str, object]) -> None:
    known = [parameter.name for parameter in parameters]
    unknown = [name for name in arguments if name not in known]
    if unknown and not any(parameter.kind is Parameter.VAR_KEYWORD for parameter in parameters):
        names, listed = ", ".join(map(repr, unknown)), ", ".join(known)
        perhaps = meant(unknown[0], [name for name in known if name not in arguments])
        raise TypeError(f"{cls.__name__} has no argument {names}; its arguments are {listed}{perhaps}")


def _require_by_name(cls: type, parameters: Sequence[Parameter], given: Sequence[object]) -> None:
    by_place = [one.name for one in parameters if one.kind is Parameter.POSITIONAL_OR_KEYWORD]
    if len(given) <= len(by_place) or any(one.kind is Parameter.VAR_POSITIONAL for one in parameters):
        return
    named = [one.name for one in parameters if one.kind is Parameter.KEYWORD_ONLY]
    if not named:
        return
    first, second = given[len(by_place) - 1] if by_place else "", given[len(by_place)]
    start = f"{first!r}, " if by_place else ""
    raise TypeError(
        f"{cls.__name__} takes {'only ' + ' and '.join(by_place) if by_place else 'nothing'} without a name, and got "
        f"{second!r} as well; name it, such as {cls.__name__}({start}{named[0]}={second!r})"
    )
