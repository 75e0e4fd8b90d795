"""The sentence at the end of a fit: its numbers are those of NumPy on the norms, and it is said once."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kit.boring import Regression, fit, regression_data
from lightning_gradclip import GradientClipping, NormClip
from lightning_gradclip.record.history import History
from lightning_gradclip.record.rule import limit_for
from lightning_gradclip.record.step import Row
from lightning_gradclip.record.tally import Tally
from lightning_gradclip.record.window import Packed


def packed(norms: np.ndarray, first: int = 0) -> Packed:
    rows = np.zeros((len(norms), len(Row._fields)))
    rows[:, Row._fields.index("norm")] = norms
    rows[:, Row._fields.index("finite")] = np.isfinite(norms)
    return Packed([*range(first, first + len(norms))], rows, (), np.empty((len(norms), 0)), np.empty((len(norms), 5)))


def test_a_tally_counts_and_stays_small() -> None:
    norms = np.exp(np.random.default_rng(0).normal(0, 1, 300_000))
    norms[7], norms[123_456] = np.nan, 1e6
    tally, place = Tally(), 0
    for size in [1, 2, 3, 1024, 777, 300_000 - 1807]:
        tally.take(packed(norms[place : place + size], place))
        place += size
    assert (tally.steps, tally.finite, tally.bad, tally.dropped) == (300_000, 299_999, 1, 0)
    assert (tally.largest, tally.largest_step) == (1e6, 123_456)
    assert len(tally.norms) <= 2 * 65_536
    assert np.median(tally.norms) == pytest.approx(np.nanmedian(norms), rel=0.02)
    # Every fourth step from the first, however they came.
    assert set(norms[8::4][:100]) <= set(tally.norms)


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [one.getMessage() for one in caplog.records if one.getMessage().startswith("gradclip")]


@pytest.mark.parametrize("action", ["clip", "observe"])
def test_a_fit_ends_with_its_numbers_and_its_history(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, action: str, capfd: Any
) -> None:
    caplog.set_level(logging.INFO)
    folder = tmp_path / "a b"
    fit(
        Regression(),
        regression_data(120),
        GradientClipping(NormClip(max_norm=0.5), action=action, history=str(folder)),
        max_steps=12,
    )
    norms = np.array(History(folder).steps["norm"])
    changed, found = History(folder).steps["changed"].mean(), lines(caplog)
    assert len(found) == 2
    verb = "would have been clipped" if action == "observe" else "clipped"
    assert found[0].startswith(
        f"gradclip: 12 steps, {changed * 100:.3g} % {verb}; norm: median {np.median(norms):.3g}, "
    )
    assert f"largest {norms.max():.3g} at step {norms.argmax()}; none dropped. Too few steps for advice" in found[0]
    assert found[1] == f"gradclip: history in {folder}; to see it: lightning-gradclip report '{folder}'"


def test_it_advises_and_can_be_switched_off(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    caplog.set_level(logging.INFO)
    fit(Regression(), regression_data(120), GradientClipping(NormClip(), history=str(tmp_path / "h")), max_steps=100)
    limit = limit_for(np.array(History(tmp_path / "h").steps["norm"]))
    assert f"A fixed limit of {limit:g} on the whole norm would clip 10 % of steps like these." in lines(caplog)[0]
    caplog.clear()
    fit(
        Regression(),
        regression_data(120),
        GradientClipping(NormClip(), history=str(tmp_path / "i"), summary=False),
        max_steps=3,
    )
    assert not lines(caplog)


def test_a_second_fit_tells_of_its_own_steps(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    callback = GradientClipping(NormClip())
    for steps in (3, 4):
        fit(Regression(), regression_data(120), callback, max_steps=steps)
    assert [line.split(",")[0] for line in lines(caplog)] == ["gradclip: 3 steps", "gradclip: 4 steps"]


def test_a_fit_that_fails_says_where_its_history_is(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    class Failing(Regression):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if batch_idx == 3:
                raise RuntimeError("enough")
            return super().training_step(batch, batch_idx)

    caplog.set_level(logging.INFO)
    with pytest.raises(RuntimeError, match="enough"):
        fit(Failing(), regression_data(120), GradientClipping(NormClip(), history=str(tmp_path / "h")), max_steps=9)
    assert "history in" in lines(caplog)[1]
