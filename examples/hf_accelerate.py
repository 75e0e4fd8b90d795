"""Clipping in a loop of Accelerate, with accumulation and checkpoints.

python examples/hf_accelerate.py
accelerate launch examples/hf_accelerate.py
"""

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_gradclip import NormClip
from lightning_gradclip.accelerate import accelerated

accelerator = Accelerator(gradient_accumulation_steps=2)
torch.manual_seed(1)
model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1))
inputs = torch.randn(3200, 8)
# Noise with heavy tails: now and then one example is so far off that its gradient dwarfs the rest.
noise = torch.distributions.StudentT(1.5).sample((3200, 1))
examples = TensorDataset(inputs, inputs.sum(1, keepdim=True) + noise)
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
model, optimizer, batches = accelerator.prepare(model, optimizer, DataLoader(examples, batch_size=16))
clipper = accelerated(accelerator, model, NormClip(max_norm=10.0), optimizer=optimizer)

for inputs, targets in batches:
    with accelerator.accumulate(model):
        loss = nn.functional.mse_loss(model(inputs), targets)
        accelerator.backward(loss)
        clipper.step()  # in place of accelerator.clip_grad_norm_; does nothing while gradients accumulate
        optimizer.step()
        optimizer.zero_grad()
accelerator.save_state("outputs/hf_accelerate")  # the clipper included
accelerator.print({name: round(float(value), 3) for name, value in clipper.metrics().items()})
