"""Unknown arguments are refused with the list of the known ones.

Configurations are merged from files and command lines. Python names one key that does not belong, and none that does.
"""

from inspect import Parameter, signature
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing_extensions import Self


class KnownArguments:
    """A base class; where the constructor stands, `inspect.signature` goes on showing its arguments."""

    def __new__(cls, *args: Any, **arguments: Any) -> "Self":
        del args
        parameters = signature(cls.__init__).parameters.values()
        known = [parameter.name for parameter in parameters][1:]
        unknown = [name for name in arguments if name not in known]
        if unknown and not any(parameter.kind is Parameter.VAR_KEYWORD for parameter in parameters):
            raise TypeError(
                f"{cls.__name__} has no argument {', '.join(map(repr, unknown))}; its arguments are {', '.join(known)}"
            )
        return super().__new__(cls)
