"""The policy-gradient example: its episodes and returns, its repeatability, its clipping under manual optimization."""

import math
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from kit.boring import csv_rows, equal, make_trainer, weights
from kit.root import ROOT
from lightning_gradclip import GradientClipping, NormClip

pytest.importorskip("gymnasium", reason="the example plays CartPole with gymnasium")
sys.path.append(str(ROOT / "examples"))

import gymnasium
from cartpole_data import CartPole, Game, mean_return
from cartpole_model import Policy, discounted

LR, LIMIT = 0.1, 0.5
CLIP = NormClip(max_norm=LIMIT)


def make_policy() -> Policy:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return Policy(4, 2, hidden_size=8, discount=0.99, optimizer=partial(torch.optim.SGD, lr=LR))


def train(
    folder: Path, steps: int, method: NormClip | None = CLIP, seed: int = 1, ckpt_path: Path | None = None
) -> tuple[Policy, list[dict[str, float]], Trainer]:
    """The trained policy, what was logged at every step, and the trainer."""
    logger = CSVLogger(folder)
    options = {"max_epochs": -1, "max_steps": steps, "log_every_n_steps": 1, "logger": logger}
    trainer = make_trainer(GradientClipping(method), **options)
    policy = make_policy()
    trainer.fit(policy, CartPole(episodes=4, val_episodes=4, seed=seed), ckpt_path=ckpt_path)
    return policy, [values for _, values in csv_rows(logger)], trainer


def moved(policy: Policy) -> float:
    """How far training has taken the weights from where they began."""
    begin, end = weights(make_policy()), weights(policy)
    return math.sqrt(sum((end[name] - begin[name]).double().square().sum().item() for name in begin))


def test_returns_are_discounted() -> None:
    rewards = torch.tensor([[1.0, 1.0], [1.0, 0.0], [4.0, 0.0]])
    assert torch.equal(discounted(rewards, 0.5), torch.tensor([[2.5, 1.0], [3.0, 0.0], [4.0, 0.0]]))
    assert torch.equal(discounted(rewards, 0.0), rewards)


def test_loss_is_the_policy_gradient() -> None:
    policy = make_policy()
    episodes = Game(3, [5]).play(policy)
    scores = policy(episodes.observations).double()
    lengths = episodes.alive.sum(0).tolist()
    assert len(set(lengths)) > 1
    # The rewards are all 1, so that their discounted sum is that of a geometric series.
    returns = [(1 - 0.99 ** (length - step)) / 0.01 for length in lengths for step in range(length)]
    mean = sum(returns) / len(returns)
    std = math.sqrt(sum((value - mean) ** 2 for value in returns) / (len(returns) - 1))
    expected = 0.0
    for i, length in enumerate(lengths):
        for step in range(length):
            log_prob = scores[step, i, episodes.actions[step, i]] - scores[step, i].logsumexp(0)
            expected -= (returns.pop(0) - mean) / std * log_prob.item() / 3
    assert policy.loss(episodes).item() == pytest.approx(expected, rel=1e-4)


def test_a_nan_shows_in_the_loss() -> None:
    policy = make_policy()
    torch.nn.init.constant_(policy.layers[0].bias, math.nan)
    assert policy.loss(Game(3, [5]).play(policy)).isnan()


def test_episodes_are_those_of_the_environment() -> None:
    """Each, played again alone, passes through the same states and ends at the same step."""
    episodes = Game(6, [2]).play(make_policy())
    for i, length in enumerate(episodes.alive.sum(0).tolist()):
        assert episodes.rewards[:, i].tolist() == [1.0] * length + [0.0] * (len(episodes.rewards) - length)
        environment = gymnasium.make("CartPole-v1")
        environment.reset()
        environment.unwrapped.state = episodes.observations[0, i].double().numpy()
        for step in range(length):
            observation, _, terminated, _, _ = environment.step(episodes.actions[step, i].item())
            assert terminated == (step + 1 == length)
            if not terminated:
                assert torch.allclose(torch.from_numpy(observation), episodes.observations[step + 1, i], atol=1e-5)
    assert mean_return(episodes).item() == pytest.approx(episodes.alive.sum().item() / 6)


def test_actions_are_drawn_from_the_policy() -> None:
    probabilities = torch.tensor([0.3, 0.7])
    episodes = Game(400, [1]).play(lambda observations: probabilities.log().expand(len(observations), 2))
    actions = episodes.actions[episodes.alive].double()
    assert len(actions) > 4000
    assert actions.mean().item() == pytest.approx(0.7, abs=4 * math.sqrt(0.21 / len(actions)))


def test_games_follow_from_their_seeds() -> None:
    policy = make_policy()
    assert equal(Game(4, [1, 0, 1]).play(policy), Game(4, [1, 0, 1]).play(policy))
    assert not equal(Game(4, [1, 0, 1]).play(policy), Game(4, [1, 0, 2]).play(policy))
    assert not equal(Game(4, [1, 0, 1]).play(policy), Game(4, [2, 0, 1]).play(policy))


def test_training_is_repeatable(tmp_path: Path) -> None:
    first, second, other = (train(tmp_path / str(i), 3, seed=seed)[0] for i, seed in enumerate((1, 1, 2)))
    assert equal(weights(first), weights(second))
    assert not equal(weights(first), weights(other))


# They start at the trainer's step.
@pytest.mark.filterwarnings("ignore:.*your dataloader is not resumable")
def test_training_resumes_to_the_bit(tmp_path: Path) -> None:
    straight, values, _ = train(tmp_path / "straight", 5)
    _, before, trainer = train(tmp_path / "begun", 2)
    trainer.save_checkpoint(tmp_path / "begun.ckpt")
    resumed, after, _ = train(tmp_path / "resumed", 5, ckpt_path=tmp_path / "begun.ckpt")
    assert equal(weights(straight), weights(resumed))
    assert before + after == values


def test_manual_steps_are_clipped(tmp_path: Path) -> None:
    policy, values, _ = train(tmp_path, 3)
    assert len(values) == 3
    for step in values:
        assert step["gradclip/norm"] > LIMIT
        assert step["gradclip/norm_clipped"] == pytest.approx(LIMIT, rel=1e-5)
        assert step["gradclip/clip_rate"] == 1
    assert LR * LIMIT < moved(policy) < 3 * LR * LIMIT


@pytest.mark.parametrize("method", [CLIP, None], ids=["clipped", "monitored"])
def test_a_manual_step_is_as_long_as_logged(method: NormClip | None, tmp_path: Path) -> None:
    policy, [step], _ = train(tmp_path, 1, method)
    assert moved(policy) == pytest.approx(LR * step["gradclip/norm_clipped"], rel=1e-4)
    assert (step["gradclip/norm_clipped"] < step["gradclip/norm"]) == (method is not None)


def test_lightning_does_not_clip_here() -> None:
    """What the example is for; when Lightning learns it, the texts of the example have to change."""
    trainer = make_trainer(max_steps=1, gradient_clip_val=LIMIT)
    with pytest.raises(MisconfigurationException, match="manual optimization"):
        trainer.fit(make_policy(), CartPole(episodes=4, val_episodes=4, seed=1))


def test_endless_training_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match=r"trainer\.max_steps"):
        make_trainer(max_epochs=1).fit(make_policy(), CartPole(episodes=4, val_episodes=4, seed=1))


def test_experiment_composes() -> None:
    with initialize_config_dir(str(ROOT / "examples" / "conf"), version_base="1.3"):
        config = compose("train", ["experiment=policy_gradient", "data.val_episodes=100"])
    data = instantiate(config.data)
    policy = instantiate(config.model, optimizer=instantiate(config.optimizer), **data.facts())
    assert not policy.automatic_optimization
    assert policy(torch.zeros(3, 4)).shape == (3, 2)
    assert list(data.guessing()) == [config.optimized_metric]
    assert 18 < data.guessing()[config.optimized_metric] < 27
