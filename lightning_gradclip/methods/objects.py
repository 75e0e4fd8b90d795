"""Methods pass through configurations as they are.

OmegaConf takes every instance of a dataclass for a structured config, whose fields Hydra's `instantiate` would merge
into the node of another method. It asks one function of its own, which is told here that methods are objects.
"""

from typing import Any

from omegaconf import _utils


class PassedWhole:
    """Base of dataclasses whose instances OmegaConf keeps: as an argument of `instantiate`, they replace a node."""


_is_dataclass = _utils.is_dataclass


def _is_structured(obj: Any) -> bool:
    return not isinstance(obj, PassedWhole) and _is_dataclass(obj)


# A private name; an OmegaConf without it goes on merging.
if "is_dataclass" in _utils.__dict__:
    _utils.__dict__["is_dataclass"] = _is_structured
