"""Optimizers that do not know how large a gradient is: which parameters they step by its direction alone.

Their step has the same size whatever multiplies the gradient: they take its sign, make it orthogonal, or divide by a
norm. A limit changes nothing but the share that a step has in the momentum. Adam does not belong to them: a gradient
above those before it makes a longer step. Nor do LARS and LAMB, which divide by a norm only where their settings say
so. Known by the names of their classes, in torch, timm, pytorch_optimizer, lion-pytorch, bitsandbytes, DeepSpeed and
Keller Jordan's Muon; and where one class steps some groups in another way by what the groups say.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

# Of the update of a matrix; all else such a class steps as Adam does.
_ORTHOGONAL = {
    *("Muon", "AdaMuon", "DistributedMuon", "MuonClip", "MuonWithAuxAdam", "NorMuon", "SingleDeviceMuon"),
    *("SingleDeviceMuonWithAuxAdam", "Dion", "Dion2"),
}
_SIGN = {
    *("Lion", "SignSGD", "Signum", "Tiger", "FusedLion", "DeepSpeedCPULion"),
    *("Lion8bit", "Lion32bit", "PagedLion", "PagedLion8bit", "PagedLion32bit"),
}
_NORMED = {"SCIONLight", "SPlus", "Fromage"}


def scale_free(optimizer: Optimizer) -> dict[int, str]:
    """By the id of each parameter that is stepped by its gradient's direction alone the name of its optimizer."""
    inner = getattr(optimizer, "optimizer", optimizer)
    names = [base.__name__ for base in type(inner).__mro__]
    known = next((name for name in names if name in _ORTHOGONAL | _SIGN | _NORMED), None)
    if known is None:
        return {}
    return {
        id(one): names[0]
        for group in optimizer.param_groups
        for one in group["params"]
        if known not in _ORTHOGONAL or _is_orthogonal(group, one)
    }


def _is_orthogonal(group: Mapping[str, Any], parameter: Tensor) -> bool:
    if "algorithm" in group:
        return group["algorithm"] not in ("adam", "adamw")
    if group.get("use_fallback") or not group.get("use_muon", True):
        return False
    return parameter.ndim > 1
