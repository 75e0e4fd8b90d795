"""`trainer.callback_metrics` with keys that are brought up to date when somebody asks for them, and only then.

Checkpoints, early stopping, schedulers and callbacks read that dictionary whenever they like, most of them never. To
write into it at every step would make the host wait for the device at every step.
"""

from collections.abc import Callable, ItemsView, Iterator, KeysView, Mapping, ValuesView
from typing import Any, TypeAlias

from torch import Tensor

from lightning_gradclip.trainer import lightning
from lightning_gradclip.trainer.lightning import Trainer

# Writes into the dictionary what its keys are now.
Refresh: TypeAlias = Callable[[dict[str, Tensor]], None]


class AskedMetrics(dict[str, Tensor]):
    """Metrics of a trainer, of which those that begin with certain prefixes are refreshed before they are read.

    A copy, also one that is pickled, is a plain dictionary of what the values are then.
    """

    def __init__(self, found: Mapping[str, Tensor]) -> None:
        super().__init__(found)
        self.sources: dict[tuple[str, ...], Refresh] = {}

    def ask(self, key: object = None) -> None:
        """Refresh what this key belongs to; None: all."""
        for prefixes, refresh in self.sources.items():
            if key is None or (isinstance(key, str) and key.startswith(prefixes)):
                refresh(self)

    def __getitem__(self, key: str) -> Tensor:
        self.ask(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.ask(key)
        return super().get(key, default)

    def __contains__(self, key: object) -> bool:
        self.ask(key)
        return super().__contains__(key)

    def __iter__(self) -> Iterator[str]:
        self.ask()
        return super().__iter__()

    def __len__(self) -> int:
        self.ask()
        return super().__len__()

    def keys(self) -> KeysView[str]:  # pyright: ignore[reportIncompatibleMethodOverride]
        self.ask()
        return super().keys()  # pyright: ignore[reportReturnType]

    def values(self) -> ValuesView[Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        self.ask()
        return super().values()  # pyright: ignore[reportReturnType]

    def items(self) -> ItemsView[str, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        self.ask()
        return super().items()  # pyright: ignore[reportReturnType]

    def copy(self) -> dict[str, Tensor]:
        return dict(self)

    def __or__(self, other: Any) -> Any:
        return dict(self) | other

    def __repr__(self) -> str:
        return repr(dict(self))

    def __reduce_ex__(self, protocol: Any) -> Any:
        return dict, (dict(self),)


def attend(trainer: Trainer, prefixes: tuple[str, ...], refresh: Refresh) -> None:
    """Have the keys that begin so refreshed before they are read from `trainer.callback_metrics`, until `leave`."""
    metrics = trainer.callback_metrics
    if not isinstance(metrics, AskedMetrics):
        metrics = AskedMetrics(metrics)
        lightning.replace_callback_metrics(trainer, metrics)
    metrics.sources[prefixes] = refresh


def leave(trainer: Trainer, prefixes: tuple[str, ...], *, refreshing: bool) -> None:
    """Leave these keys as they are, `refreshing` them one last time; where nobody is left, in a plain dictionary."""
    metrics = trainer.callback_metrics
    if not isinstance(metrics, AskedMetrics) or prefixes not in metrics.sources:
        return
    refresh = metrics.sources.pop(prefixes)
    if refreshing:
        refresh(metrics)
    if not metrics.sources:
        lightning.replace_callback_metrics(trainer, dict(metrics))
