"""Clipping in LitGPT's pretraining, by two lines before its `fit`.

python examples/litgpt_pretrain.py
"""

import math
import pydoc_data.topics
from pathlib import Path

import torch
from lightning.fabric import Fabric
from litgpt.args import EvalArgs, TrainArgs
from litgpt.config import Config
from litgpt.model import GPT
from litgpt.pretrain import fit
from torch.utils.data import DataLoader

from lightning_gradclip import ZClip, attach

fabric = Fabric(accelerator="cpu", devices=1)
torch.manual_seed(1)
sizes = {"n_layer": 2, "n_head": 2, "n_embd": 32, "padded_vocab_size": 256, "block_size": 64}
model = fabric.setup(GPT(Config(**sizes, intermediate_size=64)))
optimizer = fabric.setup_optimizers(torch.optim.AdamW(model.parameters(), lr=3e-3))
text = "".join(pydoc_data.topics.topics.values()).encode("latin1", "replace")[: 512 * 65]
batches = fabric.setup_dataloaders(DataLoader(torch.tensor(list(text)).view(-1, 65), batch_size=8))

state = {"model": model, "optimizer": optimizer, "iter_num": 0, "step_count": 0}
# In this dictionary LitGPT saves the clipper with the rest.
state["clipper"] = attach(optimizer, model, ZClip(warmup=10))
batch = {"global_batch_size": 8, "micro_batch_size": 8, "max_tokens": 512 * 64, "save_interval": None}
train = TrainArgs(max_norm=math.inf, **batch, log_interval=20, lr_warmup_steps=10, min_lr=3e-4)
check = EvalArgs(interval=1000, max_iters=1, final_validation=False)
fit(fabric, 1, state, batches, batches, Path("outputs"), None, train, check)
print({name: round(float(value), 3) for name, value in state["clipper"].metrics().items()})
