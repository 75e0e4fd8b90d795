"""A small convolutional network without normalization, after the NFNets of Brock et al. 2021, arxiv.org/abs/2102.06171.

What batch normalization did for the signal is built in: standardized weights and scaled activations keep its variance,
and scalars on the residual branches say how it grows from block to block. What it did for training at large batches
and learning rates is left to adaptive gradient clipping.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn.functional import conv2d, cross_entropy, relu
from torch.optim import Optimizer


class StandardizedConv(nn.Conv2d):
    """A convolution whose weights have mean 0 and variance 1 / fan-in for each output, times a learned gain."""

    def __init__(self, inputs: int, outputs: int, size: int, stride: int = 1):
        super().__init__(inputs, outputs, size, stride, padding=size // 2)
        self.gain = nn.Parameter(torch.ones(outputs, 1, 1, 1))
        # What is standardized has no scale of its own, but adaptive clipping and the learning rate depend on it.
        nn.init.kaiming_normal_(self.weight, nonlinearity="linear")
        nn.init.zeros_(self.bias)

    def standardized_weight(self) -> Tensor:
        variance, mean = torch.var_mean(self.weight, (1, 2, 3), correction=0, keepdim=True)
        fan_in = self.weight[0].numel()
        return self.gain * (self.weight - mean) * (variance * fan_in).clamp_min(1e-4).rsqrt()

    def forward(self, x: Tensor) -> Tensor:
        return conv2d(x, self.standardized_weight(), self.bias, self.stride, self.padding)


class Block(nn.Module):
    """x + alpha * f(x / sqrt(variance)), with two convolutions in f; a block that changes the width halves the size."""

    def __init__(self, inputs: int, outputs: int, alpha: float, variance: float):
        super().__init__()
        shrinks = inputs != outputs
        self.alpha, self.beta = alpha, variance**0.5
        self.conv1 = StandardizedConv(inputs, outputs, 3, stride=2 if shrinks else 1)
        self.conv2 = StandardizedConv(outputs, outputs, 3)
        self.shortcut = StandardizedConv(inputs, outputs, 1, stride=2) if shrinks else None

    def forward(self, x: Tensor) -> Tensor:
        out = scaled_relu(x) / self.beta
        shortcut = x if self.shortcut is None else self.shortcut(out)
        return shortcut + self.alpha * self.conv2(scaled_relu(self.conv1(out)))


class NFNet(LightningModule):
    """Classifies images."""

    def __init__(
        self,
        classes: int,
        widths: Sequence[int],
        depth: int,
        alpha: float,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
    ):
        super().__init__()
        inputs, variance = widths[0], 1.0
        self.stem = StandardizedConv(1, inputs, 3)
        self.blocks = nn.Sequential()
        for outputs in widths:
            for _ in range(depth):
                self.blocks.append(Block(inputs, outputs, alpha, variance))
                # A shortcut with a convolution starts again from variance 1.
                variance = (variance if inputs == outputs else 1.0) + alpha**2
                inputs = outputs
        self.beta = variance**0.5
        self.head = nn.Linear(inputs, classes)
        self.optimizer = optimizer

    def forward(self, images: Tensor) -> Tensor:
        features = scaled_relu(self.blocks(self.stem(images))) / self.beta
        return self.head(features.mean((2, 3)))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = cross_entropy(self(images), labels)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        scores = self(images)
        loss = cross_entropy(scores, labels)
        accuracy = (scores.argmax(1) == labels).float().mean()
        self.log_dict({"val/loss": loss, "val/accuracy": accuracy}, batch_size=len(labels), sync_dist=True)

    def configure_optimizers(self) -> Optimizer:
        return self.optimizer(self.parameters())


def scaled_relu(x: Tensor) -> Tensor:
    """Keeps the variance of standard normal values, which relu alone shrinks to (1 - 1 / pi) / 2."""
    return relu(x) * (2 / (1 - 1 / torch.pi)) ** 0.5
