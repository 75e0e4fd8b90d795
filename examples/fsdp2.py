"""A Transformer sharded by FSDP2 and clipped layer by layer: two processes on a CPU, every GPU where there are some.

python examples/fsdp2.py
"""

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.strategies import ModelParallelStrategy
from sklearn.datasets import load_digits
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

from lightning_gradclip import EmaClip, GradientClipping


class Rows(LightningModule):
    """Reads an image row by row, as a sentence of eight words."""

    def __init__(self, width=64):
        super().__init__()
        self.embed = nn.Linear(8, width)
        self.place = nn.Parameter(torch.zeros(8, width))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, nhead=4, dim_feedforward=4 * width, dropout=0.0, batch_first=True)
            for _ in range(2)
        )
        self.head = nn.Linear(width, 10)

    def configure_model(self):
        mesh = self.device_mesh["data_parallel"]
        for block in self.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(self, mesh=mesh)

    def forward(self, images):
        x = self.embed(images) + self.place
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(dim=1))

    def training_step(self, batch, batch_idx):
        images, labels = batch
        logits = self(images)
        correct = (logits.argmax(1) == labels).float().mean()
        self.log("accuracy", correct, prog_bar=True, on_step=False, on_epoch=True, sync_dist=True)
        return nn.functional.cross_entropy(logits, labels)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=2e-3)


if __name__ == "__main__":
    seed_everything(1)
    digits = load_digits()
    images, labels = torch.tensor(digits.images / 16, dtype=torch.float32), torch.tensor(digits.target)
    batches = DataLoader(TensorDataset(images, labels), batch_size=32, shuffle=True, drop_last=True)

    devices = torch.cuda.device_count() or 2  # without a GPU two processes
    trainer = Trainer(
        max_epochs=8,
        accelerator="cuda" if torch.cuda.is_available() else "cpu",
        devices=devices,
        strategy=ModelParallelStrategy(data_parallel_size=devices, tensor_parallel_size=1),
        callbacks=[GradientClipping(EmaClip(per="layer", warmup=20), measure_per="layer")],
        logger=False,
        enable_checkpointing=False,
    )
    trainer.fit(Rows(), batches)
    if trainer.is_global_zero:
        for name, value in trainer.callback_metrics.items():
            print(f"{name:40} {float(value):.4g}")
