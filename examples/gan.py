"""A Wasserstein GAN of handwritten digits: two optimizers under manual optimization, each clipped in its own way.

The critic's gradients are limited by what they were before, and its weights kept small as in the original WGAN; the
generator's gradients, which follow whatever the critic does, by a fixed norm.

    python examples/gan.py
"""

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_gradclip import GradientClipping, NormClip, ZClip


def network(inputs, outputs, width=128):
    return nn.Sequential(
        nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, outputs)
    )


class WGAN(LightningModule):
    def __init__(self, noise=16):
        super().__init__()
        self.automatic_optimization = False
        self.noise = noise
        self.generator, self.critic = network(noise, 64), network(64, 1)

    def generate(self, count):
        return self.generator(torch.randn(count, self.noise, device=self.device)).sigmoid()

    def training_step(self, batch, batch_idx):
        (real,) = batch
        generator, critic = self.optimizers()

        distance = self.critic(real).mean() - self.critic(self.generate(len(real)).detach()).mean()
        self.step(critic, -distance)
        with torch.no_grad():
            for parameter in self.critic.parameters():
                parameter.clamp_(-0.1, 0.1)
        self.log("distance", distance, prog_bar=True)

        if batch_idx % 5 == 4:  # the critic leads
            self.step(generator, -self.critic(self.generate(len(real))).mean())

    def step(self, optimizer, loss):
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()

    def configure_optimizers(self):
        parts = self.generator, self.critic
        return [torch.optim.RMSprop(part.parameters(), lr=1e-3) for part in parts]


seed_everything(1)
images = torch.tensor(load_digits().data / 16, dtype=torch.float32)
clippings = [
    GradientClipping(NormClip(max_norm=4.0), optimizer=0, name="generator"),
    GradientClipping(ZClip(), optimizer=1, name="critic"),
]
trainer = Trainer(
    accelerator="auto", devices=1, max_epochs=40, callbacks=[*clippings], logger=False, enable_checkpointing=False
)
model = WGAN()
trainer.fit(model, DataLoader(TensorDataset(images), batch_size=64, shuffle=True, drop_last=True))

for clipping in clippings:
    metrics = trainer.callback_metrics.items()
    print(*(f"{key} {float(value):.3g}" for key, value in metrics if key.startswith(clipping.name)), sep=", ")
digit = model.generate(1).detach().view(8, 8)
print("\n".join("".join(" .:-=+*#%@"[int(9 * pixel)] for pixel in row) for row in digit))
