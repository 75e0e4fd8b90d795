"""A Trainer with gradient clipping: one callback, no other change.

python examples/minimal.py
tensorboard --logdir lightning_logs
lightning-gradclip report lightning_logs/version_0
"""

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_gradclip import GradientClipping, NormClip


class Regression(LightningModule):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1))

    def training_step(self, batch, batch_idx):
        inputs, targets = batch
        return nn.functional.mse_loss(self.layers(inputs), targets)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


seed_everything(1)
inputs = torch.randn(2048, 8)
# Noise with heavy tails: now and then one example is so far off that its gradient dwarfs the rest.
noise = torch.distributions.StudentT(1.5).sample((2048, 1))
batches = DataLoader(TensorDataset(inputs, inputs.sum(1, keepdim=True) + noise), batch_size=32)

clipping = GradientClipping(NormClip(max_norm=10.0), history=True)
trainer = Trainer(
    max_epochs=2,
    callbacks=[clipping],
    log_every_n_steps=10,
    enable_checkpointing=False,
    enable_model_summary=False,
)
trainer.fit(Regression(), batches)

for name, value in trainer.callback_metrics.items():
    print(name, round(float(value), 3))
print(f"every step: lightning-gradclip report {trainer.log_dir}")
