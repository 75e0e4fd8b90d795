"""Which scopes are left under a strategy of Lightning, as far as that is known before it lays out the parameters."""

from collections.abc import Collection
from typing import Any

from lightning_gradclip.framework import LightningModule

_JOINED = ("layer", "parameter", "unit")
_APART = "shard with FSDP2, in Lightning ModelParallelStrategy"


def is_fsdp1(strategy: object) -> bool:
    """Whether the strategy wraps the module in FullyShardedDataParallel.

    By name, as for all strategies, so that those of the package pytorch_lightning are known too.
    """
    return any(base.__name__ == "FSDPStrategy" for base in type(strategy).__mro__)


def lost_scopes(strategy: Any, module: LightningModule, scopes: Collection[str | None]) -> str | None:
    """Why one of these scopes cannot be measured under this strategy, and what can; None: nothing is known against it.

    Where the module wraps parts of itself, or has FSDP ignore some, only the laid out parameters can tell: the clipper
    looks at them before its first step.
    """
    wraps_itself = type(module).configure_model is not LightningModule.configure_model
    if not is_fsdp1(strategy) or wraps_itself or {"ignored_modules", "ignored_states"} & set(strategy.kwargs):
        return None
    name = type(strategy).__name__
    joined = next((scope for scope in _JOINED if scope in scopes), None)
    if not strategy.kwargs.get("use_orig_params") and joined is not None:
        remedy = _APART if joined == "unit" else "set use_orig_params=True, or use per='model' or 'group'"
        return (
            f"{name}(use_orig_params=False) joins parameters, so that there is nothing to tell each {joined} by; {remedy}"
        )
    if "unit" in scopes and strategy.sharding_strategy.name != "NO_SHARD":
        return (
            f"{name}(sharding_strategy={strategy.sharding_strategy.name!r}) cuts parameters without regard to their "
            f"rows, so that no rank can measure an output unit; {_APART}, or use per='parameter'"
        )
    return None
