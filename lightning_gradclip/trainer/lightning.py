"""Lightning under the name that the application imports it by, and what it has no public name for.

The packages `lightning` and `pytorch_lightning` hold the same code twice, and know nothing of each other's classes. An
application that has imported only the second is given that one, and spared the time and memory for the first.
"""

import sys
from typing import TYPE_CHECKING, Any

from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_gradclip.select import layout

if TYPE_CHECKING or "pytorch_lightning" not in sys.modules or "lightning.pytorch" in sys.modules:
    from lightning.fabric.utilities.exceptions import MisconfigurationException
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
else:
    from lightning_fabric.utilities.exceptions import MisconfigurationException
    from pytorch_lightning import Callback, LightningModule, Trainer
    from pytorch_lightning.loggers import Logger, TensorBoardLogger, WandbLogger

__all__ = ["Callback", "LightningModule", "Logger", "MisconfigurationException", "TensorBoardLogger", "Trainer"]
__all__ += ["WandbLogger", "batches", "is_any", "looks_now", "overrides", "part_of_mesh", "position", "rank_zero_info"]
__all__ += ["replace_callback_metrics", "whole_model"]


def position(trainer: Trainer, optimizer: Optimizer) -> int | None:
    """Index of the optimizer among the trainer's; None if it is none of them."""
    return next((index for index, one in enumerate(trainer.optimizers) if one is optimizer), None)


def batches(trainer: Trainer) -> int:
    """Batches that stepped so far: the step axis on which Lightning logs."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped  # pyright: ignore[reportPrivateUsage]


def replace_callback_metrics(trainer: Trainer, metrics: dict[str, Tensor]) -> None:
    """Have `trainer.callback_metrics` be this dictionary."""
    trainer._logger_connector._callback_metrics = metrics  # pyright: ignore[reportPrivateUsage]


def looks_now(trainer: Trainer, every: int | None, *, with_next_step: bool = False) -> bool:
    """Whether a window ends after this batch, since Lightning logs or training ends; asked at every batch and step.

    With `every` one's own turn counts instead of Lightning's; `with_next_step` a step that is still to come.
    """
    return _logs_now(trainer, every) or _ends_now(trainer, with_next_step=with_next_step)


def _logs_now(trainer: Trainer, every: int | None) -> bool:
    turn = trainer.log_every_n_steps if every is None else every  # type: ignore[attr-defined]
    due = turn and ((batches(trainer) + 1) % turn == 0 or trainer.should_stop)
    if not due and not (every is None and trainer.fast_dev_run):  # type: ignore[attr-defined]
        return False
    only_accumulates = trainer.fit_loop._should_accumulate  # pyright: ignore[reportPrivateUsage]
    return not (trainer.lightning_module.automatic_optimization and only_accumulates())


def _ends_now(trainer: Trainer, *, with_next_step: bool) -> bool:
    """Whether training ends with this batch, unless something stops it earlier."""
    steps, epochs = trainer.max_steps, trainer.max_epochs
    if steps != -1 and trainer.global_step + with_next_step >= steps:
        return True
    return trainer.is_last_batch and epochs is not None and epochs != -1 and trainer.current_epoch + 1 >= epochs


def is_any(thing: object, *names: str) -> bool:
    """Whether it is of one of these classes; by name, so that those of pytorch_lightning are known too."""
    return not {base.__name__ for base in type(thing).__mro__}.isdisjoint(names)


def overrides(owner: LightningModule | Callback, hook: str) -> bool:
    """Whether a module or a callback of either package has a hook of its own."""
    found: Any = getattr(owner, hook)
    package, _, _ = getattr(found, "__module__", "").partition(".")
    inherited = (f"LightningModule.{hook}", f"Callback.{hook}", f"ModelHooks.{hook}")
    return package not in ("lightning", "pytorch_lightning") or found.__qualname__ not in inherited


def whole_model(trainer: Trainer, module: LightningModule) -> nn.Module:
    """What holds all parameters under their names: the root of FSDP is a wrapper around the module."""
    return (trainer.strategy.model if is_any(trainer.strategy, "FSDPStrategy") else None) or module


def part_of_mesh(name: str, module: LightningModule, optimizer: Optimizer) -> Any:
    """The dimension of this name of a mesh that the module has, or that parameters of the optimizer lie on."""
    params = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    meshes = layout.meshes([module.device_mesh, *vars(module).values()], params)
    for mesh in meshes:
        if name in (mesh.mesh_dim_names or ()):
            return mesh[name]
    known = dict.fromkeys(one for mesh in meshes for one in mesh.mesh_dim_names or ())
    listed = f"the dimensions are {', '.join(map(repr, known))}" if known else "there is no mesh with named dimensions"
    raise MisconfigurationException(
        f"process_group={name!r} is no dimension of a mesh that the module or its parameters lie on: {listed}; keep "
        f"the mesh as an attribute of the module, self.mesh = init_device_mesh(..., mesh_dim_names=({name!r}, ...)), "
        "or give the callback a ProcessGroup"
    )
