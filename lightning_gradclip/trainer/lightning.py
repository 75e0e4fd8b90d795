"""Lightning under the name that the application imports it by.

The packages `lightning` and `pytorch_lightning` hold the same code twice, and know nothing of each other's classes. An
application that has imported only the second is given that one, and spared the time and memory for the first.
"""

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING or "pytorch_lightning" not in sys.modules or "lightning.pytorch" in sys.modules:
    from lightning.fabric.utilities.exceptions import MisconfigurationException
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
else:
    from lightning_fabric.utilities.exceptions import MisconfigurationException
    from pytorch_lightning import Callback, LightningModule, Trainer
    from pytorch_lightning.loggers import Logger, TensorBoardLogger, WandbLogger

__all__ = [
    "Callback",
    "LightningModule",
    "Logger",
    "MisconfigurationException",
    "TensorBoardLogger",
    "Trainer",
    "WandbLogger",
]
