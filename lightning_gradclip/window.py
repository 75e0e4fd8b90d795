"""The steps between two log events: buffered rows, aggregated by torchmetrics when somebody looks."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import MaxMetric, MeanMetric, Metric, MinMetric, SumMetric

from lightning_gradclip.stats import Row

_CAPACITY = 1024
_SCOPE_ENTRIES = 2**18


class Window:
    """Every step since the last `clear`, in bounded memory, and counts since the start.

    A step costs one append. A full buffer is folded into the running aggregates; so is an open one when the
    aggregates are asked for.
    """

    def __init__(self) -> None:
        self._rows: list[Row | Tensor] = []
        self._scope_norms: list[Tensor] = []
        self._scopes: tuple[str, ...] = ()
        self._metrics: dict[str, Metric] = {
            "norm": _float64(MeanMetric),
            "norm_clipped": _float64(MeanMetric),
            "norm_max": _float64(MaxMetric),
            "limit": _float64(MeanMetric),
            "coef_min": _float64(MinMetric),
            "clip_rate": _float64(MeanMetric),
            "clipped": _float64(MeanMetric),
        }
        # Sum and count by scope: one torchmetrics object for each would take a quarter of a millisecond a scope.
        self._by_scope: dict[str, tuple[float, int]] = {}
        self._counts: dict[str, Metric] = {name: _float64(SumMetric) for name in ("skipped", "nonfinite", "overflows")}

    def add(self, row: Row | Tensor) -> None:
        """Record one step; the tensor must not be written again."""
        self._rows.append(row)
        if len(self._rows) >= _CAPACITY:
            self._fold()

    def add_scopes(self, names: tuple[str, ...], norms: Tensor) -> None:
        """Record the norms of the measured scopes of the same step, `(len(names),)`; NaN for absent ones."""
        if names != self._scopes:
            self._fold_scopes()
            self._scopes = names
        self._scope_norms.append(norms)
        if len(self._scope_norms) >= min(_CAPACITY, _SCOPE_ENTRIES / max(1, len(names))):
            self._fold_scopes()

    def compute(self) -> dict[str, float]:
        """Means, maximum, minimum and rate over the steps since the last `clear`; counts since the start.

        Without a finite step in the window its norms are left out.
        """
        self._fold()
        self._fold_scopes()
        result = {name: _value(metric) for name, metric in self._metrics.items() if _seen(metric)}
        for name in ("skipped", "nonfinite"):
            result[name] = _value(self._counts[name]) if _seen(self._counts[name]) else 0.0
        if _seen(self._counts["overflows"]) and (overflows := _value(self._counts["overflows"])):
            result["overflows"] = overflows
        result.update((f"norm/{name}", total / count) for name, (total, count) in self._by_scope.items() if count)
        return result

    def clear(self) -> None:
        """Begin a new window; the counts go on."""
        self._fold()
        self._fold_scopes()
        for metric in self._metrics.values():
            metric.reset()
        self._by_scope = {}

    @property
    def is_empty(self) -> bool:
        """Whether no step was recorded since the last `clear`."""
        return not self._rows and not _seen(self._metrics["clip_rate"])

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain types only."""
        return {
            "rows": self._matrix(),
            "scopes": list(self._scopes),
            "scope_norms": _stacked(self._scope_norms, len(self._scopes)),
            "metrics": _states(self._metrics),
            "by_scope": {name: list(pair) for name, pair in self._by_scope.items()},
            "counts": _states(self._counts),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` left off, to the bit."""
        self._rows = [Row(*values) for values in state["rows"].tolist()]
        self._scopes = tuple(state["scopes"])
        self._scope_norms = list(state["scope_norms"].clone().unbind())
        self._by_scope = {name: (total, count) for name, (total, count) in state["by_scope"].items()}
        for metrics, saved in (
            (self._metrics, state["metrics"]),
            (self._counts, state["counts"]),
        ):
            for name, metric in metrics.items():
                metric.reset()
                if name in saved:
                    _restore(metric, saved[name])

    def _matrix(self) -> Tensor:
        """The buffered rows on the host: one packed copy."""
        on_host = [row for row in self._rows if not isinstance(row, Tensor)]
        on_device = [row for row in self._rows if isinstance(row, Tensor)]
        matrix = torch.tensor(on_host, dtype=torch.float64, device="cpu").view(-1, len(Row._fields))
        # Rows on the host come from a checkpoint where the others are on a device: they are older.
        return torch.cat((matrix, torch.stack(on_device).cpu().double())) if on_device else matrix

    def _fold(self) -> None:
        if not self._rows:
            return
        columns = dict(zip(Row._fields, self._matrix().unbind(1), strict=True))
        self._rows = []
        finite, overflow = columns["finite"] != 0, columns["overflow"] != 0
        looked = ~torch.isnan(columns["norm_clipped"])
        for name, column, counted in (
            ("norm", "norm", finite),
            # NaN where nobody has looked.
            ("norm_clipped", "norm_clipped", finite & looked),
            ("norm_max", "norm", finite),
            ("limit", "limit", finite & torch.isfinite(columns["limit"])),
            # NaN where no factor is applied.
            ("coef_min", "coef", finite & torch.isfinite(columns["coef"])),
        ):
            _update(self._metrics[name], columns[column][counted])
        _update(self._metrics["clip_rate"], columns["changed"])
        # With one scope it would say the same as the rate.
        several = torch.isnan(columns["limit"]) | torch.isnan(columns["coef"])
        _update(self._metrics["clipped"], columns["clipped"][finite & several & looked])
        _update(self._counts["skipped"], columns["skipped"][~overflow])
        _update(self._counts["nonfinite"], (~finite & ~overflow).to(torch.float64))
        _update(self._counts["overflows"], columns["overflow"])

    def _fold_scopes(self) -> None:
        if not self._scope_norms:
            return
        matrix = _stacked(self._scope_norms, len(self._scopes))
        self._scope_norms = []
        finite = torch.isfinite(matrix)
        sums, counts = torch.where(finite, matrix, 0.0).sum(0), finite.sum(0)
        for name, total, count in zip(self._scopes, sums.tolist(), counts.tolist(), strict=True):
            before = self._by_scope.get(name, (0.0, 0))
            self._by_scope[name] = (before[0] + total, before[1] + count)


def _float64(kind: type[MeanMetric | MaxMetric | MinMetric | SumMetric]) -> Metric:
    # Every rank has seen the same global values, so there is nothing to synchronise.
    return kind(sync_on_compute=False).set_dtype(torch.float64)


def _update(metric: Metric, values: Tensor) -> None:
    if values.numel():
        metric.update(values)


def _seen(metric: Metric) -> bool:
    return metric.update_called


def _value(metric: Metric) -> float:
    return float(metric.compute())


def _stacked(rows: Sequence[Tensor], width: int) -> Tensor:
    return torch.stack(list(rows)).cpu() if rows else torch.zeros(0, width, dtype=torch.float64, device="cpu")


def _states(metrics: Mapping[str, Metric]) -> dict[str, dict[str, Tensor]]:
    return {
        name: {key: torch.as_tensor(value).detach().clone() for key, value in metric.metric_state.items()}
        for name, metric in metrics.items()
        if _seen(metric)
    }


def _restore(metric: Metric, state: Mapping[str, Tensor]) -> None:
    metric.persistent(True)
    metric.load_state_dict({name: value.clone() for name, value in state.items()})
    # An empty update marks the metric as seen without changing its value.
    metric.update(torch.empty(0, dtype=torch.float64))
