"""Parameters that hold given gradients, and whether somebody wrote to them."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

# A model in small: two layers, a parameter of the model itself that is 0-d.
SHAPES = {"encoder.weight": (5, 3), "encoder.bias": (5,), "head.weight": (2, 5), "head.bias": (2,), "scale": ()}

# To which scope each of them belongs, the encoder being the first parameter group and the rest the second.
SCOPES = {
    "model": dict.fromkeys(SHAPES, "model"),
    "group": {name: "group0" if name.startswith("encoder") else "group1" for name in SHAPES},
    "layer": {name: name.split(".")[0] if "." in name else "root" for name in SHAPES},
    "parameter": {name: name for name in SHAPES},
}


def named(gradients: Mapping[str, Tensor | None]) -> list[tuple[str, Parameter]]:
    """Parameters of these names that hold exactly these tensors as gradients."""
    pairs = []
    for name, gradient in gradients.items():
        shape, dtype = ((2,), torch.float32) if gradient is None else (gradient.shape, gradient.dtype)
        parameter = Parameter(torch.full(shape, 0.5, dtype=dtype))
        parameter.grad = gradient
        pairs.append((name, parameter))
    return pairs


def two_groups(pairs: Sequence[tuple[str, Parameter]]) -> torch.optim.SGD:
    """An optimizer with the encoder's parameters in its first group and the others in its second."""
    first = [parameter for name, parameter in pairs if name.startswith("encoder")]
    second = [parameter for name, parameter in pairs if not name.startswith("encoder")]
    return torch.optim.SGD([{"params": first}, {"params": second}], lr=0.1)


# The root of the mean square that `remembering` has of every entry.
REMEMBERED = 2.0**-7


def remembering(pairs: Sequence[tuple[str, Parameter]]) -> torch.optim.Adam:
    """The same for rules about what an optimizer remembers: one of Adam's kind, as after a hundred steps."""
    groups = [{"params": group["params"]} for group in two_groups(pairs).param_groups]
    optimizer = torch.optim.Adam([group for group in groups if group["params"]], lr=0.1)
    for _, one in pairs:
        mean, square = torch.zeros_like(one), torch.full_like(one, REMEMBERED**2)
        optimizer.state[one] = {"step": torch.tensor(100.0), "exp_avg": mean, "exp_avg_sq": square}
    return optimizer


def normal(seed: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Normally distributed gradients for the model in small."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)
        for name, shape in SHAPES.items()
    }


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two dense tensors are equal to the bit, NaN and the sign of zero included."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    flat = [tensor.detach().resolve_conj().contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other)]
    return torch.equal(*flat)


class _Before(NamedTuple):
    gradient: Tensor
    copy: Tensor
    version: int


class Witness:
    """Remembers dense gradients, to say later which were written."""

    def __init__(self, pairs: Sequence[tuple[str, Parameter]]) -> None:
        self._parameters = dict(pairs)
        self._before = {
            name: _Before(gradient, gradient.clone(), gradient._version)
            for name, parameter in pairs
            if (gradient := parameter.grad) is not None
        }

    def written(self) -> set[str]:
        """Names of the parameters whose gradient was replaced, removed, added, changed, or written with itself."""
        result = set()
        for name, parameter in self._parameters.items():
            before, now = self._before.get(name), parameter.grad
            if before is None or now is None:
                if (before is None) != (now is None):
                    result.add(name)
            elif now is not before.gradient or now._version != before.version or not same_bits(now, before.copy):
                result.add(name)
        return result

    def copies(self) -> dict[str, Tensor]:
        """The gradients as they were."""
        return {name: before.copy for name, before in self._before.items()}
