"""Gradient clipping in a Fabric loop: under DDP on all devices, or with --strategy fsdp2 sharded over them.

python examples/fabric.py
python examples/fabric.py --strategy fsdp2
"""

import argparse

import torch
from lightning.fabric import Fabric, seed_everything
from lightning.fabric.strategies import ModelParallelStrategy
from sklearn.datasets import load_digits
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

from lightning_gradclip import Clipper, ZClip


def shard(model, mesh):
    """Every layer by itself, then what is left."""
    for layer in model:
        fully_shard(layer, mesh=mesh["data_parallel"])
    return fully_shard(model, mesh=mesh["data_parallel"])


parser = argparse.ArgumentParser()
parser.add_argument("--strategy", choices=["ddp", "fsdp2"], default="ddp")
parser.add_argument("--steps", type=int, default=200)
args = parser.parse_args()

devices = torch.cuda.device_count() or 2  # without a GPU two processes
accelerator = "cuda" if torch.cuda.is_available() else "cpu"
sharded = ModelParallelStrategy(shard, data_parallel_size=devices, tensor_parallel_size=1)
strategy = sharded if args.strategy == "fsdp2" else "ddp"
fabric = Fabric(accelerator=accelerator, devices=devices, strategy=strategy)
fabric.launch()
seed_everything(1, verbose=False)

layers = nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 10)
model = fabric.setup_module(nn.Sequential(*layers))
optimizer = fabric.setup_optimizers(torch.optim.SGD(model.parameters(), lr=0.5))
clipper = Clipper(model, ZClip(warmup=10), optimizer=optimizer)

digits = load_digits()
examples = TensorDataset(torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target))
batches = fabric.setup_dataloaders(DataLoader(examples, batch_size=32, shuffle=True, drop_last=True))

step = 0
while step < args.steps:
    for inputs, targets in batches:
        loss = nn.functional.cross_entropy(model(inputs), targets)
        optimizer.zero_grad()
        fabric.backward(loss)
        clipper.step()  # between backward() and optimizer.step(), on every rank
        optimizer.step()
        step += 1
        if step % 50 == 0:
            values = (f"{name} {value:.3g}" for name, value in clipper.metrics().items())
            fabric.print(f"step {step}: loss {loss:.3f}", *values, sep=", ")
