"""Spikes: every planted one is named with its layer and batch, and nothing else is one."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule

from kit.boring import fit
from kit.histories import record
from lightning_gradclip import GradientClipping, NormClip, spikes
from lightning_gradclip.report import RunError
from lightning_gradclip.report.cli import main
from lightning_gradclip.report.spikes import spike_places

# By step the layer whose gradient is made larger, and how much.
PLANTED = {60: ("embed", 500), 130: ("lstm", 30), 131: ("head", 30), 260: ("head", 100), 299: ("lstm", 50)}


class Reader(LightningModule):
    """Reads a sentence, letter by letter, and guesses the next one."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = torch.nn.Embedding(30, 8), torch.nn.Linear(12, 30)
        self.lstm = torch.nn.LSTM(8, 12, batch_first=True)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        guesses = self.head(self.lstm(self.embed(batch[:, :-1]))[0])
        return torch.nn.functional.cross_entropy(guesses.flatten(0, 1), batch[:, 1:].flatten())

    def on_after_backward(self) -> None:
        layer, factor = PLANTED.get(self.global_step, ("head", 1))
        for parameter in getattr(self, layer).parameters():
            parameter.grad *= factor

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.2)


def sentences(count: int) -> list[torch.Tensor]:
    letters = torch.tensor([ord(one) % 30 for one in "the quick brown fox jumps over the lazy dog " * 20])
    starts = torch.randint(0, 700, (count, 4), generator=torch.Generator().manual_seed(0)).tolist()
    return [torch.stack([letters[start : start + 12] for start in batch]) for batch in starts]


def test_planted_spikes_are_named_with_layer_and_batch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    fit(Reader(), sentences(300), GradientClipping(NormClip(max_norm=1.0), history=tmp_path / "run"))
    found = spikes(tmp_path / "run")
    assert [(one.step, one.batch, one.layers[0][0]) for one in found] == [
        (step, step, layer) for step, (layer, _) in PLANTED.items()
    ]
    for one in found:
        assert one.layers[0][1] > 0.5
        assert (one.done, one.threshold, one.epoch, one.lr) == ("clipped", 1.0, 0, 0.2)
        assert one.times == pytest.approx(one.norm / one.usual)
        assert one.loss > 0
    assert found[0].back_after is not None
    capsys.readouterr()
    assert main(["spikes", str(tmp_path / "run"), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["step"] for row in rows] == [*PLANTED]
    assert rows[0]["layers"][0]["layer"] == "embed"
    assert main(["spikes", str(tmp_path / "run"), "--csv"]) == 0
    table = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [int(row["batch"]) for row in table] == [*PLANTED]
    assert main(["spikes", str(tmp_path / "run")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "5 spikes in 300 steps" in lines[0]
    assert lines[1].startswith("  step 60 (epoch 0, batch 60): norm ")
    assert main(["report", str(tmp_path / "run"), "--out", str(tmp_path / "page.html")]) == 0
    assert '<h2 id="spikes">' in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize(
    "norms",
    [
        np.geomspace(1e3, 1e-3, 500),
        1 / np.arange(1, 5000),
        np.exp(-np.arange(300) / 5),
        np.geomspace(1e-3, 1e3, 500),
        np.repeat([1.0, 20.0, 1.0], 300),
        np.exp(0.5 * np.random.default_rng(0).normal(size=10_000)),
        np.ones(3),
        np.zeros(100),
        np.full(100, np.nan),
    ],
)
def test_decay_growth_steps_and_noise_have_no_spike(norms: Any) -> None:
    assert len(spike_places(norms)[0]) == 0


@pytest.mark.parametrize("place", [5, 50, 493, 499])
def test_a_spike_is_found_wherever_it_is(place: int) -> None:
    norms = np.exp(0.2 * np.random.default_rng(0).normal(size=500))
    norms[place] = 20.0
    norms[200] = np.nan
    places, usual = spike_places(norms)
    assert places.tolist() == [place]
    assert 0.5 < usual[0] < 2


def test_what_a_record_does_not_say_is_left_open(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    norms = np.ones(100)
    norms[[40, 60]] = 50.0, np.nan
    run = record(tmp_path / "run", norms, scopes={"a": norms, "b": 2 * norms})
    (one,) = spikes(run)
    assert (one.epoch, one.batch, one.back_after, one.done) == (None, None, None, "passed")
    assert one.layers == (("b", pytest.approx(0.8)), ("a", pytest.approx(0.2)))
    assert main(["spikes", str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].endswith("step 40: norm 50, 50 times the 1 around it; from b 80 %, a 20 %; passed")
    assert lines[2].endswith("1 step had NaN or infinite gradients, step 60 the first")


def test_means_over_several_steps_and_several_runs_are_refused(tmp_path: Path) -> None:
    for name in ("one", "other"):
        record(tmp_path / name, np.ones(20))
    with pytest.raises(RunError, match=r"holds 2 runs \(one, other\); name one of them"):
        spikes(tmp_path)
    (tmp_path / "logs").mkdir()
    text = "step,gradclip/norm,gradclip/norm_max,gradclip/clip_rate\n9,1.0,2.0,0.5\n"
    (tmp_path / "logs" / "metrics.csv").write_text(text)
    with pytest.raises(RunError, match="means over several steps"):
        spikes(tmp_path / "logs")
