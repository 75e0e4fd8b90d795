"""A Wasserstein GAN: Arjovsky et al. 2017, arxiv.org/abs/1701.07875."""

from collections.abc import Callable, Iterable

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer
from wgan_data import sliced_distance


class WGAN(LightningModule):
    """A generator and a critic, each with its optimizer; as in the paper the critic's weights are clamped.

    The critic takes `critic_steps` steps for each of the generator. Under such manual optimization Lightning forbids
    the Trainer's `gradient_clip_val`.
    """

    def __init__(
        self,
        pixels: int,
        noise_size: int,
        hidden_size: int,
        weight_bound: float,
        critic_steps: int,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
    ):
        super().__init__()
        self.automatic_optimization = False
        self.generator = network(noise_size, hidden_size, pixels)
        self.critic = network(pixels, hidden_size, 1)
        self.noise_size, self.weight_bound, self.critic_steps = noise_size, weight_bound, critic_steps
        self.optimizer = optimizer

    def forward(self, noise: Tensor) -> Tensor:
        return self.generator(noise)

    def training_step(self, images: Tensor, batch_idx: int) -> None:
        for_critic, for_generator = self.optimizers()
        noise = torch.randn(len(images), self.noise_size, device=self.device)
        with torch.no_grad():
            generated = self(noise)
        loss = self.critic(generated).mean() - self.critic(images).mean()
        self.step(for_critic, loss)
        with torch.no_grad():
            for weight in self.critic.parameters():
                weight.clamp_(-self.weight_bound, self.weight_bound)
        self.log("train/loss", loss)
        if (batch_idx + 1) % self.critic_steps == 0:
            self.step(for_generator, -self.critic(self(noise)).mean())

    def step(self, optimizer: Optimizer, loss: Tensor) -> None:
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()

    def validation_step(self, images: Tensor, batch_idx: int) -> None:
        noise = torch.randn(len(images), self.noise_size, generator=torch.Generator().manual_seed(0))
        distance = sliced_distance(self(noise.to(self.device)).cpu(), images.cpu())
        self.log("val/distance", distance, batch_size=len(images))

    def configure_optimizers(self) -> list[Optimizer]:
        return [self.optimizer(self.critic.parameters()), self.optimizer(self.generator.parameters())]


def network(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, outputs)
    )
