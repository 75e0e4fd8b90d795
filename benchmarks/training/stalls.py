"""What clipping leaves of the movement of a small layer beside a large one, and whether a warning says so.

python benchmarks/training/stalls.py

Two layers, whose gradients are as far apart as `SCALES` says, are moved for 60 steps by optimizers of Adam's kind. A
row gives what is left of the movement of the layer that loses most, of what it is without clipping, in the last third
of the steps, and where there was a warning what is left when each piece of its advice is taken.
"""

import csv
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn import Parameter
from torch.optim import Adagrad, Adam, AdamW, NAdam, Optimizer, RAdam, RMSprop

from lightning_gradclip import (
    AGC,
    ClipMethod,
    Clipper,
    EmaClip,
    Normalize,
    NormClip,
    QuantileClip,
    SigmaClip,
    ValueClip,
    ZClip,
)

Scales = tuple[float, float]

STEPS = 60
SIZE = 64
# Norms of the gradients of both layers.
SCALES: list[Scales] = [(1e6, 1e-2), (1e4, 1e-3), (1e3, 1.0), (1e2, 1e-4), (1.0, 1e-1), (1e-2, 1e-4)]
METHODS: dict[str, ClipMethod] = {
    "NormClip(max_norm=1.0)": NormClip(max_norm=1.0),
    "NormClip(max_norm=1e-3)": NormClip(max_norm=1e-3),
    "NormClip(max_norm=1.0, per='layer')": NormClip(max_norm=1.0, per="layer"),
    "Normalize(target=1.0)": Normalize(target=1.0),
    "ValueClip(max_value=1e-6)": ValueClip(max_value=1e-6),
    "AGC()": AGC(),
    "EmaClip()": EmaClip(),
    "EmaClip(warmup_max_norm=1.0)": EmaClip(warmup_max_norm=1.0),
    "EmaClip(per='parameter', warmup_max_norm=1.0)": EmaClip(per="parameter", warmup_max_norm=1.0),
    "QuantileClip()": QuantileClip(),
    "SigmaClip()": SigmaClip(),
    "ZClip()": ZClip(),
    "ZClip(max_norm=1.0)": ZClip(max_norm=1.0),
}
OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "AdamW": AdamW,
    "AdamW(amsgrad=True)": lambda params, **options: AdamW(params, amsgrad=True, **options),
    "Adam(eps=1e-5)": lambda params, **options: Adam(params, **{"eps": 1e-5, **options}),
    "NAdam": NAdam,
    "RAdam": RAdam,
    "RMSprop": RMSprop,
    "Adagrad": Adagrad,
}


class Moved(NamedTuple):
    """How far both layers went, the metric, and what was said."""

    distances: torch.Tensor
    stalled: float
    said: list[str]


def moved(make: Callable[..., Optimizer], method: ClipMethod | None, scales: Scales, **options: Any) -> Moved:
    """Some steps of gradients that have a direction, and noise."""
    generator = torch.Generator().manual_seed(0)
    params = [Parameter(torch.zeros(SIZE, SIZE)) for _ in scales]
    with torch.no_grad():
        for parameter in params:
            parameter.copy_(torch.randn(SIZE, SIZE, generator=generator))
    ways = [torch.randn(SIZE, SIZE, generator=generator) for _ in scales]
    optimizer = make(params, lr=1e-3, **options)
    clipper = Clipper([("large.weight", params[0]), ("small.weight", params[1])], method, optimizer=optimizer)
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        for step in range(STEPS):
            if step == STEPS * 2 // 3:
                begin = [parameter.detach().clone() for parameter in params]
            for parameter, way, scale in zip(params, ways, scales, strict=True):
                gradient = way + 0.3 * torch.randn(SIZE, SIZE, generator=generator)
                parameter.grad = gradient * (scale / gradient.norm())
            clipper.step()
            optimizer.step()
        stalled = clipper.metrics().get("stalled", 0.0)
    distances = [(parameter.detach() - start).norm() for parameter, start in zip(params, begin, strict=True)]
    return Moved(torch.stack(distances), stalled, [str(one.message) for one in record])


def advised(method: ClipMethod, said: str, scales: Scales) -> Iterator[tuple[str, ClipMethod, dict[str, float]]]:
    """The ways out that the warning names: another method, or other options of the optimizer."""
    if "per='layer'," in said:
        yield "per layer", replace(method, per="layer"), {}
    usual = torch.tensor(scales).norm().item()
    [limit] = [name for name in ("max_norm", "warmup_max_norm", "max_value", "target") if getattr(method, name, None)]
    yield "usual size", replace(method, **{limit: usual}), {}
    if "lower the eps" in said:
        yield "eps", method, {"eps": 1e-30}


def rows() -> Iterator[dict[str, object]]:
    for (name, method), (kind, make), scales in product(METHODS.items(), OPTIMIZERS.items(), SCALES):
        free = moved(make, None, scales).distances
        found = moved(make, method, scales)
        said = "".join(one for one in found.said if "cannot feel" in one)
        taken = {
            way: (moved(make, other, scales, **options).distances / moved(make, None, scales, **options).distances)
            for way, other, options in (advised(method, said, scales) if said else ())
        }
        yield {
            "method": name,
            "optimizer": kind,
            "large": scales[0],
            "small": scales[1],
            "kept": f"{(found.distances / free).min().item():.4f}",
            "stalled": found.stalled,
            "warned": int(bool(said)),
            **{way: f"{kept.min().item():.4f}" for way, kept in taken.items()},
        }


def main() -> None:
    torch.set_num_threads(1)
    columns = ["method", "optimizer", "large", "small", "kept", "stalled", "warned", "per layer", "usual size", "eps"]
    with (Path(__file__).parent / "stalls.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows())


if __name__ == "__main__":
    main()
