"""The examples of loops that others wrote."""

import subprocess
import sys
from pathlib import Path

import pytest

from kit.extras import require_loops
from kit.guides import page
from kit.root import ROOT

pytestmark = pytest.mark.processes

EXAMPLES = {
    "hf_trainer.py --steps 20": ("transformers", "gradclip/clip_rate"),
    "hf_accelerate.py": ("accelerate", "'clip_rate': 0.1"),
    "hf_trl.py": ("trl", "'gradclip/clip_rate': 0."),
    "sb3_ppo.py --steps 256": ("stable_baselines3", "'clip_rate': 0."),
    "skorch_fit.py": ("skorch", "'norm_clipped': "),
    "fastai_learner.py": ("fastai", "'norm_clipped': "),
    "litgpt_pretrain.py": ("litgpt", "'norm_clipped': "),
    "darts_forecast.py": ("darts", "gradclip/norm 0."),
    "forecasting_tft.py": ("pytorch_forecasting", "gradclip/norm "),
}


def run(folder: Path, *command: str) -> str:
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("command", EXAMPLES)
def test_the_example_runs(command: str, tmp_path: Path) -> None:
    library, shown = EXAMPLES[command]
    require_loops(library)
    script, *arguments = command.split()
    assert f"`examples/{script}`" in page("examples")
    assert shown in run(tmp_path, str(ROOT / "examples" / script), *arguments)


def test_torchrun_trains_in_two_processes(tmp_path: Path) -> None:
    require_loops("transformers")
    launch = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0", "--rdzv_backend=c10d"]
    endpoint = ["--rdzv_endpoint=localhost:0"]
    told = run(tmp_path, *launch, *endpoint, str(ROOT / "examples" / "hf_trainer.py"), "--steps", "20")
    assert told.count("step 20: gradclip/norm ") == 1
