"""REINFORCE: the policy gradient of Williams 1992, doi.org/10.1007/BF00992696."""

from collections.abc import Callable, Iterable

import torch
from cartpole_data import Episodes, Game, mean_return
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.distributions import Categorical
from torch.optim import Optimizer


class Policy(LightningModule):
    """A network with one hidden layer that scores the actions, trained on the episodes that it plays.

    It takes its optimizer steps itself. Under such manual optimization Lightning forbids the Trainer's
    `gradient_clip_val`; the callback clips at every `optimizer.step()`.
    """

    def __init__(
        self,
        observations: int,
        actions: int,
        hidden_size: int,
        discount: float,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
    ):
        super().__init__()
        self.automatic_optimization = False
        self.layers = nn.Sequential(nn.Linear(observations, hidden_size), nn.Tanh(), nn.Linear(hidden_size, actions))
        self.discount = discount
        self.optimizer = optimizer

    def forward(self, observations: Tensor) -> Tensor:
        return self.layers(observations)

    def loss(self, episodes: Episodes) -> Tensor:
        """Its gradient is the policy gradient: a sum over the steps of an episode, a mean over the episodes."""
        alive = episodes.alive
        scores = self(episodes.observations[alive])
        # Not validated: a NaN shows in the loss and stops the run.
        log_probs = Categorical(logits=scores, validate_args=False).log_prob(episodes.actions[alive])
        returns = discounted(episodes.rewards, self.discount)[alive]
        # Normalised, so that the actions with less than the mean return become less likely.
        advantages = (returns - returns.mean()) / (returns.std() + 1e-8)
        return -(advantages * log_probs).sum() / alive.shape[1]

    def training_step(self, game: Game, batch_idx: int) -> None:
        episodes = game.play(self, self.device)
        loss = self.loss(episodes)
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        self.log_dict({"train/loss": loss, "train/return": mean_return(episodes)})

    def validation_step(self, game: Game, batch_idx: int) -> None:
        episodes = game.play(self, self.device)
        self.log("val/return", mean_return(episodes), batch_size=game.episodes, sync_dist=True)

    def configure_optimizers(self) -> Optimizer:
        return self.optimizer(self.parameters())


def discounted(rewards: Tensor, discount: float) -> Tensor:
    """The return to go of every step: its reward and the discounted ones after it, (T, N) like the rewards."""
    returns = torch.empty_like(rewards)
    following = torch.zeros_like(rewards[0])
    for step in reversed(range(len(rewards))):
        following = returns[step] = rewards[step] + discount * following
    return returns
