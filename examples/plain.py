"""Gradient clipping in a plain PyTorch loop."""

import torch
from torch import nn

from lightning_gradclip import Clipper, NormClip

torch.manual_seed(1)
model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
clipper = Clipper(model.named_parameters(), NormClip(max_norm=10.0), optimizer=optimizer)
# Noise with heavy tails: now and then one example is so far off that its gradient dwarfs the rest.
noise = torch.distributions.StudentT(1.5)

for step in range(1, 201):
    inputs = torch.randn(32, 8)
    targets = inputs.sum(1, keepdim=True) + noise.sample((32, 1))
    loss = nn.functional.mse_loss(model(inputs), targets)
    optimizer.zero_grad()
    loss.backward()
    clipper.step()  # between backward() and optimizer.step()
    optimizer.step()
    if step % 50 == 0:
        values = (f"{name} {float(value):.3g}" for name, value in clipper.metrics().items())
        print(f"step {step}:", ", ".join(values))
