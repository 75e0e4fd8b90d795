"""The policy-gradient example: its returns, its repeatability, and its clipping under manual optimization."""

import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from boring import csv_rows, make_trainer, weights
from lightning.pytorch.loggers import CSVLogger

from lightning_gradclip import GradientClipping, NormClip

gymnasium = pytest.importorskip("gymnasium", reason="the example plays CartPole with gymnasium")
sys.path.append(str(Path(__file__).parents[1] / "examples"))

from cartpole_data import CartPole, Episodes, Game  # noqa: E402
from cartpole_model import Policy, discounted  # noqa: E402

SGD = partial(torch.optim.SGD, lr=0.1)


def make_policy(seed: int = 1, optimizer=SGD) -> Policy:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Policy(observations=4, actions=2, hidden_size=8, discount=0.99, optimizer=optimizer)


def train(folder: Path, method: NormClip | None, seed: int = 1, steps: int = 3, ckpt_path: str | None = None):
    """The policy after some optimizer steps, and what was logged at each of them."""
    logger = CSVLogger(folder)
    policy, data = make_policy(), CartPole(episodes=4, val_episodes=4, seed=seed)
    trainer = make_trainer(
        GradientClipping(method), logger=logger, max_steps=steps, max_epochs=-1, log_every_n_steps=1
    )
    trainer.fit(policy, data, ckpt_path=ckpt_path)
    trainer.save_checkpoint(folder / "end.ckpt")
    clipping, training = csv_rows(logger), csv_rows(logger, "train/")
    assert [step for step, _ in clipping] == [step for step, _ in training]
    return policy, [{**one, **other} for (_, one), (_, other) in zip(clipping, training, strict=True)]
