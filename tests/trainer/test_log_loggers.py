"""What MLflow, Weights & Biases and Comet keep of a run: read back from their files, compared with given gradients.

CSVLogger, TensorBoard and loggers of a user's own are in test_log.py.
"""

import importlib.util
import json
import os
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kit.boring import ENCODER, HEAD, aggregate, gradients, mean_gradient, norm, windows
from kit.logger_runs import BATCHES, EVERY, LIMIT, SAVED, SCENARIOS, data
from kit.root import ROOT

pytestmark = pytest.mark.processes

Found = dict[str, list[list[Any]]]

# They tell their makers nothing, and write nothing beside their runs.
QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "WANDB_SILENT": "true",
    "WANDB_ERROR_REPORTING": "false",
    "COMET_LOGGING_CONSOLE": "ERROR",
    "COMET_DISABLE_AUTO_LOGGING": "1",
}


@pytest.fixture(scope="module", params=["mlflow", "wandb", "comet_ml"])
def kind(request: pytest.FixtureRequest) -> str:
    if importlib.util.find_spec(request.param) is None:
        pytest.skip(f"{request.param} is not installed: pip install '.[loggers]'")
    return request.param


@pytest.fixture(scope="module")
def found(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What is read back from each run, by scenario and interval."""
    folder = tmp_path_factory.mktemp(kind)
    homes = {name: str(folder / "home") for name in ("HOME", "WANDB_DIR", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR")}
    done = subprocess.run(
        [sys.executable, "-m", "kit.logger_runs", kind, folder],
        cwd=ROOT / "tests",
        env={**os.environ, **QUIET, **homes},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "found.json").read_text())


def expected(scenario: str, every: int) -> dict[str, dict[int, dict[str, float]]]:
    """By optimizer and step what has to be there."""
    given = data(scenario)
    if scenario == "two optimizers":
        return {
            f"/{index}": logged([pair[index] for pair in given], every, {layer: names})
            for index, (layer, names) in enumerate({"encoder": ENCODER, "head": HEAD}.items())
        }
    if scenario == "accumulated":
        given = [mean_gradient(given[i : i + 3], 3) for i in range(0, BATCHES, 3)]
    return {"": logged(given, every, {"encoder": ENCODER, "head": HEAD})}


def logged(given: list[Any], every: int, layers: dict[str, Any]) -> dict[int, dict[str, float]]:
    names = [name for of in layers.values() for name in of]
    found = {}
    for step, places in windows([[i] for i in range(len(given))], every).items():
        metrics = aggregate([norm(given[i], names) for i in places], LIMIT)
        found[step] = {key.removeprefix("gradclip"): value for key, value in metrics.items()}
        found[step] |= {
            f"_norm/{one}": float(np.mean([norm(given[i], of) for i in places])) for one, of in layers.items()
        }
    return found


@pytest.mark.parametrize("every", EVERY)
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_every_window_is_written_once_at_its_step(found: Found, scenario: str, every: int) -> None:
    points = [(key, step, value) for key, step, value in found[f"{scenario} {every}"] if not isinstance(value, dict)]
    ours = [(key, step) for key, step, _ in points if key.startswith("gradclip")]
    assert set(Counter(ours).values()) == {1}
    read: dict[int, dict[str, float]] = defaultdict(dict)
    for key, step, value in points:
        if key.startswith("gradclip"):
            read[step][key] = value
    wanted: dict[int, dict[str, float]] = defaultdict(dict)
    for index, steps in expected(scenario, every).items():
        for step, metrics in steps.items():
            for key, value in metrics.items():
                section, name = key.split("/")
                wanted[step][f"gradclip{section}{index}/{name}"] = value
    assert list(read) == sorted(wanted)
    for step, metrics in wanted.items():
        assert read[step] == pytest.approx(metrics, rel=1e-6)


@pytest.mark.parametrize("every", EVERY)
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_lightnings_own_metric_lies_at_the_same_steps(found: Found, scenario: str, every: int) -> None:
    points = found[f"{scenario} {every}"]
    own = [step for key, step, _ in points if key == "x"]
    count = -(-BATCHES // 3) if scenario == "accumulated" else BATCHES
    assert own == [*range(every - 1, count, every)]
    name = "gradclip/0/norm" if scenario == "two optimizers" else "gradclip/norm"
    # What is left at the end has no step of its own there.
    assert [step for key, step, _ in points if key == name] == sorted({*own, count - 1})


@pytest.mark.parametrize("every", EVERY)
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_histograms_are_those_of_numpy(found: Found, kind: str, scenario: str, every: int) -> None:
    histograms = {(key, step): value for key, step, value in found[f"{scenario} {every}"] if key.endswith("/norms")}
    if kind != "wandb":
        assert histograms == {}
        return
    given = data(scenario)
    if scenario == "accumulated":
        given = [mean_gradient(given[i : i + 3], 3) for i in range(0, BATCHES, 3)]
    two = scenario == "two optimizers"
    wanted = {}
    for index, names in enumerate((ENCODER, HEAD)) if two else [(None, (*ENCODER, *HEAD))]:
        sizes = [norm(one if index is None else one[index], names) for one in given]
        key = "gradclip/norms" if index is None else f"gradclip/{index}/norms"
        wanted |= {(key, step): norms for step, norms in windows([[size] for size in sizes], every).items()}
    assert histograms.keys() == wanted.keys()
    for place, norms in wanted.items():
        counts, edges = histograms[place]["values"], np.array(histograms[place]["bins"])
        # Around a single norm NumPy puts half a unit on each side.
        aside = 0.5 if len(norms) == 1 else 0.0
        assert edges[[0, -1]] == pytest.approx([min(norms) - aside, max(norms) + aside], rel=1e-6)
        # An edge and the smallest or the largest norm differ by the rounding of float32.
        edges[[0, -1]] *= 1 - 1e-5, 1 + 1e-5
        assert sum(counts) == len(norms)
        if aside:
            # Right between the two buckets in the middle.
            assert counts.index(1) in (len(counts) // 2 - 1, len(counts) // 2)
        else:
            assert counts == np.histogram(norms, edges)[0].tolist()


def test_a_resumed_run_was_interrupted(found: Found) -> None:
    """Otherwise the tests above say nothing: the window of the checkpoint goes on in the second part."""
    assert SAVED % 7
    assert 6 < SAVED < 13
    steps = [step for key, step, _ in found["resumed 7"] if key == "gradclip/norm"]
    assert steps == [6, 13, 19]


IN_FILES = """
import sys
from lightning.pytorch.loggers import MLFlowLogger
from kit.boring import Adversaries, Prescribed, fit, gradients
from lightning_gradclip import GradientClipping, NormClip

given = gradients(3)
for module, batches in ((Prescribed, given), (Adversaries, list(zip(given, given)))):
    clipping = GradientClipping(NormClip(max_norm=4.0), measure_per="layer")
    fit(module(), batches, clipping, logger=MLFlowLogger(save_dir=sys.argv[1]), log_every_n_steps=1)
"""


def test_mlflows_file_store_keeps_norms_and_norms_of_scopes(tmp_path: Path) -> None:
    pytest.importorskip("mlflow")
    done = subprocess.run(
        [sys.executable, "-c", IN_FILES, tmp_path / "runs"],
        env={**os.environ, **QUIET, "MLFLOW_ALLOW_FILE_STORE": "true", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    files = [path for path in (tmp_path / "runs").rglob("*") if path.is_file() and "metrics" in path.parts]
    found = {str(path).rpartition("/metrics/")[2]: path.read_text().splitlines() for path in files}
    keys = {"gradclip/norm", "gradclip_norm/head", "gradclip/1/norm", "gradclip_norm/0/encoder"}
    assert keys <= found.keys()
    # Time, value and step of each.
    values = [float(line.split()[1]) for line in found["gradclip_norm/head"]]
    assert values == pytest.approx([norm(one, HEAD) for one in gradients(3)], rel=1e-6)
