"""A Wasserstein GAN, Arjovsky et al. 2017, arxiv.org/abs/1701.07875, and the digits as samples of a distribution."""

from collections.abc import Callable, Iterable

import torch
from digits_data import Digits
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

DIRECTIONS = 128


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


class DigitSamples(Digits):
    """Images without labels, as vectors of pixels; how close generated ones come is measured on the held out ones."""

    def facts(self) -> dict[str, int]:
        """What the model has to know."""
        return {"pixels": self.images[0].numel()}

    def guessing(self) -> dict[str, float]:
        """What the mean image alone achieves."""
        mean = self.images[: self.train_size].flatten(1).mean(0)
        held_out = self.held_out()
        return {"val/distance": sliced_distance(mean.expand_as(held_out), held_out).item()}

    def held_out(self) -> Tensor:
        return self.images[self.train_size :].flatten(1)

    def examples(self, chosen: Tensor) -> Tensor:
        return self.images[chosen].flatten(1)

    def val_dataloader(self) -> DataLoader:
        # All at once: a distance between distributions is no mean over batches.
        return DataLoader([self.held_out()], batch_size=None)


def sliced_distance(some: Tensor, others: Tensor) -> Tensor:
    """The 1-Wasserstein distance along random directions, on average; exact in each, since there sorting is enough.

    Bonneel et al. 2015, doi.org/10.1007/s10851-014-0506-3; (N, D) and (N, D), the same directions at every call.
    """
    random = torch.Generator().manual_seed(0)
    directions = torch.randn(some.shape[1], DIRECTIONS, generator=random)
    directions /= directions.norm(dim=0)
    return ((some @ directions).sort(0).values - (others @ directions).sort(0).values).abs().mean()
