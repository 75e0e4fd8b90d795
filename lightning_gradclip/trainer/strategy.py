"""What a strategy of Lightning is, and which scopes it leaves, as far as that is known before training begins."""

from collections.abc import Collection
from typing import Any

from lightning_gradclip.trainer.lightning import LightningModule

_JOINED = ("layer", "parameter", "unit")
_APART = "shard with FSDP2, in Lightning ModelParallelStrategy"


def is_any(strategy: object, *names: str) -> bool:
    """Whether the strategy is of one of these classes; by name, so that those of pytorch_lightning are known too."""
    return not {base.__name__ for base in type(strategy).__mro__}.isdisjoint(names)


def is_fsdp1(strategy: object) -> bool:
    """Whether the strategy wraps the module in FullyShardedDataParallel."""
    return is_any(strategy, "FSDPStrategy")


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
        reason = f"{name}(use_orig_params=False) joins parameters, so that there is nothing to tell each {joined} by"
        return f"{reason}; {remedy}"
    if "unit" in scopes and strategy.sharding_strategy.name != "NO_SHARD":
        return (
            f"{name}(sharding_strategy={strategy.sharding_strategy.name!r}) cuts parameters without regard to their "
            f"rows, so that no rank can measure an output unit; {_APART}, or use per='parameter'"
        )
    return None
