"""An option as a type, for applications whose configurations are dataclasses: `gradclip: GradclipConf | None = None`.

Names of keys are known when Hydra composes, also those in files; the constructors check the values.
"""

from copy import deepcopy
from dataclasses import field, make_dataclass
from functools import partial
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf

from lightning_gradclip.hydra.places import GROUP, SCHEME
from lightning_gradclip.hydra.search_path import GradclipSource


def _shared() -> dict[str, Any]:
    """What all options have, at its defaults; the method is missing."""
    source = GradclipSource("lightning_gradclip", f"{SCHEME}://lightning_gradclip.conf")
    config = source.load_config(f"{GROUP}/_callback").config
    return cast("dict[str, Any]", OmegaConf.to_container(cast("DictConfig", config)))


GradclipConf = make_dataclass(
    "GradclipConf", [(key, Any, field(default_factory=partial(deepcopy, value))) for key, value in _shared().items()]
)
