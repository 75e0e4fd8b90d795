"""Checkpoints and histories of earlier releases: they load, go on, and limit as they would have then."""

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kit.root import ROOT

DATA = ROOT / "tests" / "data"
sys.path.insert(0, str(DATA))
from make import CASES, SAVED_AT, recorded, shape, trained  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:You.re resuming from a checkpoint that ended before the epoch ended"),
    pytest.mark.filterwarnings("ignore:dropped optimizer step"),
]
RELEASES = sorted(path.name for path in DATA.iterdir() if (path / "norm").is_dir())


def resumed(release: str, name: str, tmp_path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What that release expects of a run that resumes, and what this one makes of it."""
    source = DATA / release / name
    expected = json.loads((source / "expected.json").read_text(encoding="utf-8"))
    shutil.copytree(source / "history", tmp_path / "history")
    callback = trained(name, tmp_path, tmp_path / "history", ckpt_path=source / "checkpoint.ckpt")
    metrics = np.genfromtxt(tmp_path / "logs/metrics.csv", delimiter=",", names=True, deletechars="", replace_space=" ")
    logged = {key: np.atleast_1d(metrics[key]).tolist() for key in metrics.dtype.names or ()}
    return expected, {
        "recorded": recorded(tmp_path / "history"),
        "logged": logged,
        "state": shape(callback.state_dict()),
    }


def has_all(found: Any, expected: Any) -> bool:
    """Whether a nest of dictionaries has what another has; more does no harm to who looks for that."""
    if isinstance(expected, dict):
        return expected.keys() <= found.keys() and all(has_all(found[key], one) for key, one in expected.items())
    return found == expected


def test_there_is_a_release_to_load() -> None:
    assert "0.1.0" in RELEASES


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("release", RELEASES)
def test_a_checkpoint_resumes(release: str, name: str, tmp_path: Path) -> None:
    expected, found = resumed(release, name, tmp_path)
    assert found["recorded"].keys() == expected["recorded"].keys()
    for key, before in expected["recorded"].items():
        now = found["recorded"][key]
        assert now["scopes"] == before["scopes"]
        np.testing.assert_allclose(now["norms"], before["norms"], rtol=1e-6, equal_nan=True)
        for column, values in before["rows"].items():
            got, wanted = np.array(now["rows"][column]), np.array(values)
            if column == "limit":
                # Of a norm that is no spike ZClip had none.
                got = np.where(np.isposinf(wanted), wanted, got)
            np.testing.assert_allclose(got, wanted, rtol=1e-6, equal_nan=True, err_msg=column)
    # The state has what it had, so that an older release can go on from it.
    assert has_all(found["state"], expected["state"])


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("release", RELEASES)
def test_a_resumed_run_logs_the_same(release: str, name: str, tmp_path: Path) -> None:
    expected, found = resumed(release, name, tmp_path)
    before = [row for row, step in enumerate(expected["logged"]["step"]) if step >= SAVED_AT]
    # Norms of scopes have a section of their own; what is not known of every step is not logged any more.
    partial = {"norm_clipped", "clipped"} if name == "value" else {"limit"}
    wanted = {
        re.sub(r"^gradclip/(\d/)?norm/", r"gradclip_norm/\1", key): values
        for key, values in expected["logged"].items()
        if key.rpartition("/")[2] not in partial
    }
    assert wanted.keys() == {key for key in found["logged"] if key.rpartition("/")[2] not in partial}
    for key, values in wanted.items():
        np.testing.assert_allclose(
            found["logged"][key], [values[row] for row in before], rtol=1e-6, equal_nan=True, err_msg=key
        )


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("release", RELEASES)
def test_a_history_reads(release: str, name: str) -> None:
    expected = json.loads((DATA / release / name / "expected.json").read_text(encoding="utf-8"))["recorded"]
    for key, found in recorded(DATA / release / name / "history").items():
        for column, values in expected[key]["rows"].items():
            assert len(found["rows"][column]) == SAVED_AT
            np.testing.assert_array_equal(found["rows"][column], values[:SAVED_AT], err_msg=column)
        np.testing.assert_array_equal(found["norms"], expected[key]["norms"][:SAVED_AT])
