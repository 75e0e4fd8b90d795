"""Modules whose gradients are known beforehand, batches that can be resumed, and readers of what loggers wrote.

The loss is the sum of parameter * batch over all parameters. The gradient of a parameter is therefore exactly what
the batch says, whatever the weights are, and every norm can be computed without torch.
"""

import csv
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from kit.extras import require

Gradient = dict[str, Tensor]

SHAPES = {"encoder.weight": (4, 3), "encoder.bias": (4,), "head.weight": (2, 4), "head.bias": (2,)}
ENCODER = ("encoder.weight", "encoder.bias")
HEAD = ("head.weight", "head.bias")


class Batches:
    """A loader that goes on in the middle of an epoch after a checkpoint was loaded."""

    def __init__(self, items: Sequence[Any]) -> None:
        self.items = items
        self.position = 0

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[Any]:
        # Whoever knows the length stops asking after the last item: a full position is a new start.
        for i in range(self.position % len(self.items), len(self.items)):
            self.position = i + 1
            yield self.items[i]

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.position = state["position"]


class Prescribed(LightningModule):
    """Gradients as its batches say; one optimizer, automatic optimization."""

    def __init__(self, optimizer: Callable[[Iterable[Tensor]], Optimizer] = lambda params: SGD(params, lr=0.1)) -> None:
        super().__init__()
        self.make_optimizer = optimizer
        with torch.random.fork_rng():
            torch.manual_seed(5)
            self.encoder, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

    def loss(self, gradient: Gradient) -> Tensor:
        parameters = dict(self.named_parameters())
        return torch.stack([(parameters[name] * value).sum() for name, value in gradient.items()]).sum()

    def training_step(self, batch: Gradient, batch_idx: int) -> Tensor | None:
        # Lies on Lightning's own step axis, for comparison.
        self.log("x", float(batch_idx), on_step=True, on_epoch=False, batch_size=1)
        return self.loss(batch)

    def configure_optimizers(self) -> Any:
        return self.make_optimizer(self.parameters())


class Validated(Prescribed):
    """Validates, and measures nothing there."""

    def validation_step(self, batch: Gradient, batch_idx: int) -> None: ...


class Manual(Prescribed):
    """One optimizer step for every gradient in the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Sequence[Gradient], batch_idx: int) -> None:
        self.log("x", float(batch_idx), on_step=True, on_epoch=False, batch_size=1)
        optimizer = self.optimizers()
        for gradient in batch:
            optimizer.zero_grad()
            self.manual_backward(self.loss(gradient))
            optimizer.step()


class Adversaries(Prescribed):
    """Two optimizers, stepped in turns; gradients are cleared only before their own optimizer's turn.

    A batch is a pair of gradients of all parameters: both backward passes reach the other's parameters too.
    """

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: tuple[Gradient, Gradient], batch_idx: int) -> None:
        self.log("x", float(batch_idx), on_step=True, on_epoch=False, batch_size=1)
        for optimizer, gradient in zip(self.optimizers(), batch, strict=True):
            optimizer.zero_grad()
            self.manual_backward(self.loss(gradient))
            optimizer.step()

    def configure_optimizers(self) -> list[Optimizer]:
        return [self.make_optimizer(self.encoder.parameters()), self.make_optimizer(self.head.parameters())]


class Regression(LightningModule):
    """A small network whose gradients depend on its weights, so that one wrong step changes all later ones."""

    def __init__(self, optimizer: Callable[[Iterable[Tensor]], Optimizer] = lambda params: SGD(params, lr=0.1)) -> None:
        super().__init__()
        self.make_optimizer = optimizer
        with torch.random.fork_rng():
            torch.manual_seed(7)
            self.layers = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        inputs, targets = batch
        return nn.functional.mse_loss(self.layers(inputs), targets)

    def configure_optimizers(self) -> Optimizer:
        return self.make_optimizer(self.parameters())


class CountingLogger(Logger):
    """Keeps what it is given, call by call."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[int | None, dict[str, Any]]] = []

    @property
    def name(self) -> str:
        return "counting"

    @property
    def version(self) -> int:
        return 0

    def log_hyperparams(self, *_: Any, **__: Any) -> None: ...

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        self.calls.append((step, dict(metrics)))


def gradients(count: int, *, seed: int = 0, names: Iterable[str] = SHAPES, scale: float = 1.0) -> list[Gradient]:
    """Random gradients whose sizes differ from step to step by an order of magnitude."""
    generator = np.random.default_rng(seed)
    return [
        {name: torch.from_numpy((generator.normal(size=SHAPES[name]) * size).astype("f4")) for name in names}
        for size in scale * np.exp(generator.normal(size=count))
    ]


def regression_data(count: int, *, seed: int = 0, size: int = 4) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    inputs = [torch.randn(size, 3, generator=generator) for _ in range(count)]
    return [(x, 3.0 * x.sum(1, keepdim=True) + i) for i, x in enumerate(inputs)]


def norm(gradient: Gradient, names: Iterable[str] | None = None, p: float = 2.0) -> float:
    """The joint p-norm in float64, computed without torch."""
    chosen = gradient if names is None else names
    return float(np.linalg.norm(np.concatenate([gradient[name].double().numpy().ravel() for name in chosen]), p))


def coefficient(size: float, limit: float) -> float:
    return limit / (size + 1e-6) if size > limit else 1.0


def mean_gradient(parts: Sequence[Gradient], divisor: int) -> Gradient:
    """What accumulating `parts` leaves, in float64: Lightning divides every loss by `accumulate_grad_batches`."""
    return {name: torch.stack([part[name].double() for part in parts]).sum(0) / divisor for name in parts[0]}


def windows(batches: Sequence[Sequence[float]], every: int) -> dict[int, list[float]]:
    """The steps behind each log event: a list for every batch that stepped, and one event every so many of them.

    What is left at the end is logged at the last batch.
    """
    result: dict[int, list[float]] = {}
    pending: list[float] = []
    for i, steps in enumerate(batches):
        pending = [*pending, *steps]
        if (i + 1) % every == 0 or i + 1 == len(batches):
            result, pending = ({**result, i: pending} if pending else result), []
    return result


def aggregate(norms: Sequence[float], limit: float) -> dict[str, float]:
    """The metrics of a window of finite steps that clips by one norm."""
    coefs = [coefficient(size, limit) for size in norms]
    return {
        "gradclip/norm": float(np.mean(norms)),
        "gradclip/norm_clipped": float(np.mean(np.multiply(norms, coefs))),
        "gradclip/norm_max": max(norms),
        "gradclip/limit": limit,
        "gradclip/coef_min": min(coefs),
        "gradclip/clip_rate": float(np.mean([coef < 1 for coef in coefs])),
        "gradclip/skipped": 0.0,
        "gradclip/nonfinite": 0.0,
    }


def fit(module: LightningModule, batches: Any, *callbacks: Any, **options: Any) -> Trainer:
    """Train on one CPU process and return the trainer."""
    trainer = make_trainer(*callbacks, **{key: options.pop(key) for key in [*options] if key not in _OF_FIT})
    loader = Batches(batches) if isinstance(batches, Sequence) else batches
    if "weights_only" not in signature(Trainer.fit).parameters:
        options.pop("weights_only", None)  # Lightning before 2.6 leaves it to torch's default
    trainer.fit(module, loader, **options)
    return trainer


def make_trainer(*callbacks: Any, **options: Any) -> Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    defaults = {"accelerator": "cpu", "devices": 1, "max_epochs": 1, "enable_model_summary": False}
    return Trainer(callbacks=list(callbacks), **{**defaults, **quiet, **options})


def csv_rows(logger: CSVLogger, key: str = "gradclip/") -> list[tuple[int, dict[str, float]]]:
    """Step and values of every row of metrics.csv that holds a metric starting with `key`, read back from disk."""
    path = Path(logger.log_dir) / "metrics.csv"
    if not path.exists():
        return []
    with path.open(newline="") as file:
        rows = [
            (int(row["step"]), {name: float(value) for name, value in row.items() if name.startswith(key) and value})
            for row in csv.DictReader(file)
        ]
    return [(step, values) for step, values in rows if values]


def tensorboard(folder: Path, **options: Any) -> TensorBoardLogger:
    require("tensorboard", extra="tensorboard")
    return TensorBoardLogger(folder, **options)


def tensorboard_events(logger: TensorBoardLogger) -> Any:
    """What the event files hold, histograms included."""
    from tensorboard.backend.event_processing.event_accumulator import HISTOGRAMS, EventAccumulator

    events = EventAccumulator(logger.log_dir, size_guidance={HISTOGRAMS: 0})
    events.Reload()
    return events


def tensorboard_rows(logger: TensorBoardLogger, key: str = "gradclip/") -> list[tuple[int, dict[str, float]]]:
    """The same from the event files: values by step, in the order in which they were written."""
    events = tensorboard_events(logger)
    rows: dict[int, dict[str, float]] = {}
    for tag in events.Tags()["scalars"]:
        for event in events.Scalars(tag) if tag.startswith(key) else ():
            assert tag not in rows.setdefault(event.step, {}), f"{tag} was written twice at step {event.step}"
            rows[event.step][tag] = event.value
    return sorted(rows.items())


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def equal(one: Any, other: Any) -> bool:
    """Whether two nests of dictionaries, lists and tensors are the same to the bit, NaN included."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        same = one.dtype == other.dtype and one.shape == other.shape
        return same and torch.equal(*(tensor.reshape(-1).view(torch.uint8) for tensor in (one, other)))
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(equal, one, other))
    return type(one) is type(other) and one == other


_OF_FIT = ("val_dataloaders", "ckpt_path", "weights_only")
