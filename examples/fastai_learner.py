"""Clipping in a Learner of fastai.

python examples/fastai_learner.py
"""

from functools import partial

import torch
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.optimizer import OptimWrapper
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_gradclip import NormClip, attach


class Clipping(Callback):
    def before_fit(self):
        self.clipper = attach(self.learn.opt, self.learn.model, NormClip(max_norm=10.0))

    def after_fit(self):
        self.clipper.detach()  # the next fit attaches another


torch.manual_seed(1)
inputs = torch.randn(2048, 8)
targets = inputs.sum(1, keepdim=True) + torch.distributions.StudentT(1.5).sample((2048, 1))
batches = DataLoader(TensorDataset(inputs, targets), batch_size=32)
network = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1))
clipping = Clipping()
# Optimizers of fastai's own call no hooks; OptimWrapper holds one of torch's.
optimizer = partial(OptimWrapper, opt=torch.optim.SGD)
learner = Learner(DataLoaders(batches, batches), network, nn.MSELoss(), opt_func=optimizer, cbs=[clipping])
with learner.no_logging():
    learner.fit(3, 0.05)
print({name: round(float(value), 3) for name, value in clipping.clipper.metrics().items()})
