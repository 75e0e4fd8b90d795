"""Clipping in a `fit` as of Keras or scikit-learn, here skorch's.

python examples/skorch_fit.py
"""

import torch
from skorch import NeuralNetRegressor
from skorch.callbacks import Callback
from torch import nn

from lightning_gradclip import NormClip, attach


class Clipping(Callback):
    def on_train_begin(self, net, **kwargs):
        self.clipper = attach(net.optimizer_, net.module_, NormClip(max_norm=10.0))


torch.manual_seed(1)
inputs = torch.randn(2048, 8)
targets = inputs.sum(1, keepdim=True) + torch.distributions.StudentT(1.5).sample((2048, 1))
network = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1))
clipping = Clipping()
net = NeuralNetRegressor(network, max_epochs=3, lr=0.05, batch_size=32, train_split=None, callbacks=[clipping])
net.fit(inputs.numpy(), targets.numpy())
print({name: round(float(value), 3) for name, value in clipping.clipper.metrics().items()})
