"""Methods pass through configurations as they are.

OmegaConf takes every instance of a dataclass for a structured config, whose fields Hydra's `instantiate` would merge
into the node of another method. It asks two functions of its own, which are told here that methods are values.
"""

import warnings
from typing import Any

import omegaconf
from omegaconf import _utils


class PassedWhole:
    """Base of dataclasses whose instances OmegaConf keeps: as an argument of `instantiate`, they replace a node."""


def tell(asked: dict[str, Any]) -> None:
    """Let the two private functions in the names of OmegaConf's module know this base."""
    try:
        is_dataclass, is_value = asked["is_dataclass"], asked["is_primitive_type_annotation"]
    except KeyError as missing:
        message = (
            f"OmegaConf {omegaconf.__version__} takes the fields of clipping methods for those of a configuration, "
            f"since it has no {missing}; give instantiate() a _target_ in place of an object, or install omegaconf<2.5"
        )
        warnings.warn(message, stacklevel=2)
        return

    def is_structured(obj: Any) -> bool:
        return not isinstance(obj, PassedWhole) and is_dataclass(obj)

    def is_primitive(type_: Any) -> bool:
        return isinstance(type_, PassedWhole) or is_value(type_)

    asked["is_dataclass"], asked["is_primitive_type_annotation"] = is_structured, is_primitive


tell(_utils.__dict__)
