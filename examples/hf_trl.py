"""Clipping in TRL: preferences over words that nobody downloads, for adapters of a tiny GPT-2.

python examples/hf_trl.py
"""

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

from lightning_gradclip import NormClip
from lightning_gradclip.transformers import GradientClippingCallback

# A token a character.
words = Tokenizer(models.WordLevel({chr(i): i for i in range(256)}, unk_token="\x00"))
words.pre_tokenizer = pre_tokenizers.Split("", "isolated")
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="\x00", pad_token="\x00")
torch.manual_seed(1)
sizes = {"vocab_size": 256, "n_positions": 64, "n_embd": 24, "n_layer": 2, "n_head": 2}
model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
pairs = [{"prompt": f"{i} and {i} is", "chosen": f" {2 * i}", "rejected": f" {2 * i + 1}"} for i in range(64)]

args = DPOConfig(
    "outputs/hf_trl",
    max_steps=20,
    learning_rate=1e-2,
    logging_steps=10,
    report_to="none",
    max_grad_norm=0,  # the callback clips
    use_cpu=not torch.cuda.is_available(),
    bf16=False,
)
trainer = DPOTrainer(
    model=model,
    args=args,
    train_dataset=Dataset.from_list(pairs),
    processing_class=tokenizer,
    peft_config=LoraConfig(target_modules=["c_attn"], r=4, fan_in_fan_out=True),
    callbacks=[GradientClippingCallback(NormClip(max_norm=0.01))],
)
trainer.train()
logged = [one for one in trainer.state.log_history if "gradclip/norm" in one][-1]
print({name: logged[name] for name in ("loss", "gradclip/norm", "gradclip/clip_rate")})
