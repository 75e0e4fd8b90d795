"""The parts of examples/train.py: the network without normalization, the digits, the sample of text, the verdict."""

import math
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from kit import scripts
from kit.boring import equal, make_trainer, weights
from kit.histories import record
from kit.root import ROOT
from lightning_gradclip import AGC, Clipper, GradientClipping
from lightning_gradclip.record.history import History

pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
sys.path.append(str(ROOT / "examples"))

from char_data import CharData
from char_model import CharModel
from char_sample import Sample
from digits_data import Digits
from nfnet_model import NFNet, StandardizedConv, scaled_relu
from report import report
from summary import diverged

# As in examples/train.py.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*your dataloader is not resumable"),
    pytest.mark.filterwarnings("ignore:Your `IterableDataset` has `__len__` defined"),
]
SGD = partial(torch.optim.SGD, lr=1.0, momentum=0.9, nesterov=True)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """As the examples run: several threads wait for each other on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def network() -> NFNet:
    """A smaller one than the example trains."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return NFNet(10, (8, 16), 1, alpha=0.2, optimizer=SGD)


def digits(batch_size: int = 128, seed: int = 1) -> Digits:
    return Digits(batch_size, val_fraction=0.2, seed=seed)


def text(folder: Path) -> CharData:
    path = folder / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog\n" * 20)
    return CharData(str(path), length=8, batch_size=4, val_fraction=0.1, seed=1)


def test_weights_are_standardized() -> None:
    """Whatever was learned: mean 0 and variance 1 / fan-in for each output, times the gain."""
    torch.manual_seed(1)
    conv = StandardizedConv(4, 6, 3)
    with torch.no_grad():
        conv.weight.mul_(7).add_(torch.randn(6, 1, 1, 1))
        conv.gain.copy_(torch.arange(1.0, 7.0).view(6, 1, 1, 1))
    weight = conv.standardized_weight().detach().double().flatten(1) / conv.gain.detach().double().flatten(1)
    assert weight.mean(1).abs().max() < 1e-7
    assert weight.var(1, correction=0).tolist() == pytest.approx([1 / 36] * 6, rel=1e-5)


def test_activations_keep_the_variance() -> None:
    torch.manual_seed(1)
    assert scaled_relu(torch.randn(1_000_000)).var().item() == pytest.approx(1, rel=0.01)


def test_variance_grows_as_the_blocks_assume() -> None:
    torch.manual_seed(1)
    net = NFNet(10, (64, 128), 3, alpha=0.5, optimizer=SGD)
    x = torch.randn(16, 64, 16, 16)
    with torch.no_grad():
        for block, assumed in zip(net.blocks, (1.0, 1.25, 1.5, 1.75, 1.25, 1.5), strict=True):
            assert block.beta**2 == pytest.approx(assumed)
            # At the padded border a convolution sums over fewer pixels, hence the tolerance.
            assert x.var().item() == pytest.approx(assumed, rel=0.15)
            x = block(x)
    assert net.beta**2 == pytest.approx(1.75)


def test_digits_are_split_and_drawn_repeatably() -> None:
    data = digits()
    assert equal(data.images, digits(seed=2).images)
    train = data.images[: data.train_size]
    assert (data.train_size, len(data.images)) == (1438, 1797)
    assert train.mean().item() == pytest.approx(0, abs=1e-5)
    assert train.std().item() == pytest.approx(1, rel=1e-5)
    chosen = data.draw(np.random.default_rng([1, 0]))
    assert len(set(chosen.tolist())) == 128
    assert chosen.max() < data.train_size
    images, labels = data.examples(torch.from_numpy(chosen))
    assert images.shape == (128, 1, 8, 8)
    assert labels.bincount().shape == (10,)


def test_batches_go_on_where_a_run_stopped(tmp_path: Path) -> None:
    """Six steps at once equal three, a checkpoint, and three more."""
    clipping = partial(GradientClipping, AGC(), exclude="head.*")

    def train(steps: int, ckpt_path: Path | None = None) -> NFNet:
        net = network()
        trainer = make_trainer(clipping(), max_epochs=-1, max_steps=steps)
        trainer.fit(net, digits(), ckpt_path=ckpt_path)
        trainer.save_checkpoint(tmp_path / f"{steps}.ckpt")
        return net

    straight = train(6)
    train(3)
    assert equal(weights(straight), weights(train(6, tmp_path / "3.ckpt")))


def test_two_ranks_share_a_batch() -> None:
    """Rank r of 2 takes every second example of the batch that one process would take."""

    class Rank:
        max_steps, accumulate_grad_batches, global_step = 3, 1, 0

        def __init__(self, rank: int, size: int):
            self.global_rank, self.world_size = rank, size

    def batches(rank: int, size: int) -> list:
        data = digits(batch_size=8)
        data.trainer = Rank(rank, size)
        return [labels for _, labels in data.train_dataloader()]

    for whole, even, odd in zip(batches(0, 1), batches(0, 2), batches(1, 2), strict=True):
        assert torch.equal(whole, torch.stack([even, odd], 1).flatten())


def test_guessing_is_what_the_frequencies_give(tmp_path: Path) -> None:
    data = digits()
    guessing = data.guessing()
    assert guessing["val/loss"] == pytest.approx(math.log(10), rel=0.01)
    assert 0.05 < guessing["val/accuracy"] < 0.15
    assert text(tmp_path).guessing()["val/loss"] < math.log(28)


def test_adaptive_clipping_makes_the_learning_rate_possible() -> None:
    """What experiment=nfnet_digits shows, in its first steps."""
    data = digits()

    def last_losses(method: AGC | None) -> float:
        net = network()
        optimizer = SGD(net.parameters())
        clipper = Clipper(net.named_parameters(), method, optimizer=optimizer, exclude="head.*", nonfinite="ignore")
        values = []
        for number in range(30):
            images, labels = data.examples(torch.from_numpy(data.draw(np.random.default_rng([1, number]))))
            loss = cross_entropy(net(images), labels)
            optimizer.zero_grad()
            loss.backward()
            clipper.step()
            optimizer.step()
            values.append(loss.item())
        return sum(values[-5:]) / 5

    assert last_losses(AGC()) < 1
    assert not last_losses(None) < 2


@pytest.mark.parametrize("broken", [False, True])
def test_sample_is_written_once_training_ends(broken: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def sample(seed: int) -> str:
        data = text(tmp_path)
        torch.manual_seed(1)
        model = CharModel(**data.facts(), cell="rnn", hidden_size=4, layers=1, optimizer=SGD)
        if broken:
            model.head.bias.data.fill_(torch.nan)
        callback = Sample("the quick", length=40, temperature=0.7, seed=seed)
        make_trainer(callback, max_epochs=-1, max_steps=1).fit(model, data)
        return capsys.readouterr().out

    assert sample(1) == sample(1)
    assert ("the quick" in sample(1)) != broken
    assert (sample(1) != sample(2)) != broken


def test_sample_refuses_what_it_cannot_continue(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"callbacks\.sample\.temperature=0 "):
        Sample("the", length=1, temperature=0, seed=1)
    data = text(tmp_path)
    model = CharModel(**data.facts(), cell="rnn", hidden_size=4, layers=1, optimizer=SGD)
    with pytest.raises(ValueError, match=r"callbacks\.sample\.prompt='ÄÖÜ'"):
        make_trainer(Sample("ÄÖÜ", length=1, temperature=1.0, seed=1), max_steps=1).fit(model, data)


@pytest.mark.parametrize(
    ("losses", "loss", "verdict"),
    [
        ([2.3, 1.0], 0.1, False),
        ([2.3, 2.4], 2.4, False),  # learned nothing yet
        ([2.3, 50.0], 0.1, False),  # recovered
        ([2.3, 50.0], 2.4, True),
        ([2.3, math.inf], 2.3, True),
        ([2.3, math.nan], math.nan, True),
        ([], math.nan, True),
        ([], 2.4, False),
    ],
)
def test_verdict(losses: list[float], loss: float, verdict: bool) -> None:
    log = {"train/loss": list(enumerate(losses))} if losses else {}
    assert diverged(log, loss, guessing=2.3) == verdict


def test_experiment_runs(tmp_path: Path) -> None:
    script = str(ROOT / "examples" / "train.py")
    done = scripts.run([script, "experiment=nfnet_digits", "trainer.max_steps=2"], tmp_path)
    assert done.returncode == 0, done.stderr
    for words in ("NFNet(", "AGC(clip_factor=0.01", "1,438 images", "validation accuracy", "validation loss"):
        assert words in done.stdout
    assert "A sample" not in done.stdout
    assert len(list(tmp_path.rglob("best.ckpt"))) == 1
    (page,) = tmp_path.rglob("gradclip.html")
    assert len(History(page.parent / "csv" / "gradclip").steps) == 2
    assert "gradclip.html" in done.stdout


def test_a_run_without_plotly_says_why_there_is_no_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record(tmp_path / "csv" / "gradclip", np.ones(5))
    trainer = make_trainer(default_root_dir=tmp_path)
    assert report(trainer) == str(tmp_path / "gradclip.html")
    (tmp_path / "gradclip.html").unlink()
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    assert report(trainer) == "none: the report needs plotly and jinja2; pip install 'lightning-gradclip[report]'"
    assert not (tmp_path / "gradclip.html").exists()
