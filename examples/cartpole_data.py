"""CartPole as a data set: its batches are games that the model plays itself."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import gymnasium
import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import DataLoader

ENVIRONMENT = "CartPole-v1"


class Episodes(NamedTuple):
    """What happened in N episodes of up to T steps; an episode that ended early is padded up to T."""

    observations: Tensor  # (T, N, 4)
    actions: Tensor  # (T, N)
    rewards: Tensor  # (T, N), zero after the end
    alive: Tensor  # (T, N), False after the end


def mean_return(episodes: Episodes) -> Tensor:
    """Of an episode, not discounted."""
    return episodes.rewards.sum(0).mean()


class Game:
    """Episodes that wait for a player; where they begin and what is drawn in them follows from the seed."""

    def __init__(self, episodes: int, seed: Sequence[int]):
        self.episodes, self.seed = episodes, seed

    @torch.no_grad()
    def play(self, policy: Callable[[Tensor], Tensor], device: torch.device | str = "cpu") -> Episodes:
        """Play all episodes to their ends, side by side; the policy gives each action a score, its logit."""
        random = np.random.default_rng(self.seed)
        environments = gymnasium.make_vec(ENVIRONMENT, self.episodes)
        observations, _ = environments.reset(seed=int(random.integers(2**31)))
        alive = np.full(self.episodes, True)
        steps = []
        while alive.any():
            scores = policy(torch.from_numpy(observations).to(device)).float().cpu().numpy()
            # The largest score plus Gumbel noise is a draw from the softmax of the scores.
            actions = (scores + random.gumbel(size=scores.shape)).argmax(-1)
            following, rewards, terminated, truncated, _ = environments.step(actions)
            steps.append((observations, actions, (rewards * alive).astype(np.float32), alive))
            # The environments begin anew by themselves; only their first episodes count.
            alive = alive & ~(terminated | truncated)
            observations = following
        environments.close()
        return Episodes(*(torch.from_numpy(np.stack(values)).to(device) for values in zip(*steps, strict=True)))


class CartPole(LightningDataModule):
    """Games of CartPole-v1: one point for every step that the pole on the cart stays up, 500 at most."""

    def __init__(self, episodes: int, val_episodes: int, seed: int):
        super().__init__()
        self.episodes, self.val_episodes, self.seed = episodes, val_episodes, seed

    def facts(self) -> dict[str, int]:
        """What the model has to know."""
        environment = gymnasium.make(ENVIRONMENT)
        return {"observations": environment.observation_space.shape[0], "actions": int(environment.action_space.n)}

    def describe(self) -> str:
        return f"{ENVIRONMENT}, {self.episodes} episodes in a step"

    def guessing(self) -> dict[str, float]:
        """What pushing the cart at random achieves."""
        actions = self.facts()["actions"]
        episodes = self.game(0, self.val_episodes).play(lambda observations: torch.zeros(len(observations), actions))
        return {"val/return": mean_return(episodes).item()}

    def game(self, number: int, episodes: int) -> Game:
        """Game 0 is the one for validation; every rank has games of its own."""
        rank = self.trainer.global_rank if self.trainer else 0
        return Game(episodes, [self.seed, rank, number])

    def train_dataloader(self) -> "Games":
        return Games(self)

    def val_dataloader(self) -> DataLoader:
        # Lightning would take a bare list for a list of loaders.
        return DataLoader([self.game(0, self.val_episodes)], batch_size=None)


class Games:
    """The training games of one rank, from the trainer's step on: a resumed run goes on where the first one stopped."""

    def __init__(self, data: CartPole):
        if data.trainer.max_steps < 1:
            raise MisconfigurationException("games never run out; say with trainer.max_steps how many to train on")
        self.data, self.trainer = data, data.trainer

    def __len__(self) -> int:
        return self.trainer.max_steps

    def __iter__(self) -> Iterator[Game]:
        first = self.trainer.global_step + 1
        for number in range(first, first + len(self)):
            yield self.data.game(number, self.data.episodes)
