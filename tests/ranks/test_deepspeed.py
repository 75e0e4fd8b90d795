"""DeepSpeed's real engine, which clips for us; skipped where DeepSpeed is not installed."""

import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DeepSpeedStrategy, Strategy
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from kit import workers
from kit.boring import csv_rows
from lightning_gradclip import AGC, GradientClipping, NormClip, ValueClip, ZClip

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: pip install deepspeed")

LIMIT = 1.0


class Linear(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(4, 3)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return 100 * (self.layer(batch[0]) - batch[1]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class OnCpu(DeepSpeedStrategy):
    """Lightning asks for a GPU, the engine does not need one."""

    def __init__(self, **options: Any) -> None:
        super().__init__(stage=1, process_group_backend="gloo", logging_level=logging.ERROR, **options)

    @property
    def root_device(self) -> torch.device:
        return torch.device("cpu", 0)

    def setup_environment(self) -> None:
        Strategy.setup_environment(self)
        self._init_deepspeed_distributed()


def data() -> DataLoader:
    numbers = torch.Generator().manual_seed(1)
    rows = TensorDataset(torch.randn(16, 4, generator=numbers), torch.randn(16, 3, generator=numbers))
    return DataLoader(rows, batch_size=2)


def logger(folder: Path) -> CSVLogger:
    return CSVLogger(folder, name="", version="")


def train(folder: Path, *callbacks: Any, strategy: Any = None, fits: int = 1, **options: Any) -> Any:
    """Train as one of two ranks; weights, trainer."""
    os.environ.update(DS_ACCELERATOR="cpu", DS_BUILD_OPS="0")
    logging.disable(logging.WARNING)
    module = Linear()
    for _ in range(fits):
        trainer = Trainer(
            accelerator="cpu",
            devices=2,
            strategy=OnCpu() if strategy is None else strategy,
            callbacks=list(callbacks),
            **{
                "max_steps": 3,
                "logger": logger(folder),
                "enable_checkpointing": False,
                "enable_progress_bar": False,
                "enable_model_summary": False,
                "log_every_n_steps": 1,
                **options,
            },
        )
        trainer.fit(module, data())
    return {name: value.detach().clone() for name, value in module.state_dict().items()}, trainer


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_engine_clips_as_lightnings_own_setting_does_and_logs_its_norm(tmp_path: Path, accumulate: int) -> None:
    def work(rank: int) -> Any:
        options: dict[str, Any] = {"accumulate_grad_batches": accumulate}
        theirs, _ = train(tmp_path / "theirs", gradient_clip_val=LIMIT, **options)
        callback = GradientClipping(NormClip(max_norm=LIMIT), history=str(tmp_path / "history"))
        ours, trainer = train(tmp_path / "ours", callback, **options)
        again, _ = train(tmp_path / "again", callback, fits=1, **options)
        without, _ = train(tmp_path / "without", GradientClipping(None, name="look"), **options)
        bare, _ = train(tmp_path / "bare", **options)
        return theirs, ours, again, without, bare, trainer.gradient_clip_val

    for theirs, ours, again, without, bare, setting in workers.run_fresh(work, timeout=300):
        assert all(torch.equal(theirs[name], ours[name]) for name in theirs)
        assert all(torch.equal(ours[name], again[name]) for name in ours)
        assert all(torch.equal(without[name], bare[name]) for name in bare)
        assert not torch.equal(ours["layer.weight"], bare["layer.weight"])
        # Left as it was, so that another fit is not refused for it.
        assert setting is None
    logged = [row for _, row in csv_rows(logger(tmp_path / "ours"))]
    looked = [row for _, row in csv_rows(logger(tmp_path / "without"), key="look/")]
    assert len(logged) == len(looked) == 3
    for row in logged:
        assert row["gradclip/norm"] > LIMIT
        assert row["gradclip/norm_clipped"] == pytest.approx(LIMIT, rel=1e-6)
        assert row["gradclip/clip_rate"] == 1
    # The first step is the same; what follows was not clipped.
    assert looked[0]["look/norm"] == pytest.approx(logged[0]["gradclip/norm"], rel=1e-6)
    assert [row["look/clip_rate"] for row in looked] == [0, 0, 0]


@pytest.mark.filterwarnings("ignore")
def test_what_the_engine_cannot_do_is_refused_by_name(tmp_path: Path) -> None:
    cases = {
        "AGC": GradientClipping(AGC()),
        "ValueClip": GradientClipping(ValueClip()),
        "ZClip": GradientClipping(ZClip()),
        "per='layer'": GradientClipping(NormClip(per="layer")),
        "norm_type=1.0": GradientClipping(NormClip(norm_type=1.0)),
        "max_norm={0": GradientClipping(NormClip(max_norm={0: 1.0, 10: 2.0})),
        "min_norm=0.5": GradientClipping(NormClip(min_norm=0.5)),
        "action='skip'": GradientClipping(NormClip(), action="skip"),
        "nonfinite='raise'": GradientClipping(NormClip(), nonfinite="raise"),
        "exclude=('layer.bias',)": GradientClipping(NormClip(), exclude="layer.bias"),
        "measure_per='layer'": GradientClipping(None, measure_per="layer"),
    }

    def work(rank: int) -> dict[str, str]:
        messages = {}
        for name, callback in cases.items():
            with pytest.raises(MisconfigurationException) as error:
                train(tmp_path, callback)
            messages[name] = str(error.value)
        config = {"zero_optimization": {"stage": 1}, "gradient_clipping": 0.3}
        with pytest.raises(MisconfigurationException) as error:
            train(tmp_path, GradientClipping(NormClip()), strategy=OnConfigured(config))
        messages["gradient_clipping=0.3"] = str(error.value)
        return messages

    for messages in workers.run_fresh(work, timeout=300):
        for name, message in messages.items():
            assert name in message
            assert "DeepSpeed" in message


class OnConfigured(OnCpu):
    def __init__(self, config: dict[str, Any]) -> None:
        DeepSpeedStrategy.__init__(self, config=config, process_group_backend="gloo", logging_level=logging.ERROR)
