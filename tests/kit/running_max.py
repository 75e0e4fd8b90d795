"""A method with memory, as small as one can be: it stands for every method that learns."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_gradclip import ClipMethod


@dataclass(kw_only=True)
class RunningMax(ClipMethod):
    """Limits each scope to `ratio` times the largest size seen before."""

    ratio: float = 1.0
    per: str = "model"
    norm_type: float = 2.0

    def fresh_state(self, size: Tensor) -> dict[str, Tensor]:
        zeros = torch.zeros_like(size)
        return {"largest": zeros, "recent": torch.stack((zeros, zeros), dim=1)}

    def limit(self, size: Tensor, weight: Tensor | None, step: int) -> Tensor:
        return self.ratio * self.state["largest"]

    def update(self, size: Tensor, limit: Tensor, active: Tensor) -> None:
        largest, recent = self.state["largest"], self.state["recent"]
        shifted = torch.stack((recent[:, 1], size), dim=1)
        self.state = {
            "largest": torch.where(active, torch.maximum(largest, size), largest),
            "recent": torch.where(active[:, None], shifted, recent),
        }
