"""Clipping in the Trainer of Transformers: a tiny GPT-2 learns the Python manual, byte by byte.

python examples/hf_trainer.py
torchrun --nproc_per_node 2 examples/hf_trainer.py
"""

import argparse
import pydoc_data.topics

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from lightning_gradclip import ZClip
from lightning_gradclip.transformers import GradientClippingCallback

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=200)
options = parser.parse_args()

text = "".join(pydoc_data.topics.topics.values()).encode("latin1", "replace")[: 2048 * 64]
rows = torch.tensor(list(text)).view(-1, 64)
torch.manual_seed(1)
sizes = {"vocab_size": 256, "n_positions": 64, "n_embd": 48, "n_layer": 2, "n_head": 4}
model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))

args = TrainingArguments(
    "outputs/hf_trainer",
    max_steps=options.steps,
    per_device_train_batch_size=16,
    learning_rate=3e-3,
    logging_steps=50,
    report_to="none",
    max_grad_norm=0,  # the callback clips
    use_cpu=not torch.cuda.is_available(),
)
clipping = GradientClippingCallback(ZClip(), history="outputs/hf_trainer/gradclip")
dataset = [{"input_ids": row, "labels": row} for row in rows]
trainer = Trainer(model=model, args=args, train_dataset=dataset, callbacks=[clipping])
trainer.train()
if trainer.is_world_process_zero():
    logged = [one for one in trainer.state.log_history if "gradclip/norm" in one][-1]
    values = (f"{name} {value:.3g}" for name, value in logged.items() if name.startswith("gradclip"))
    print(f"step {logged['step']}:", ", ".join(values))
