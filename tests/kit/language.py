"""Real English text as tokens, and a tiny language model of Hugging Face, made from a config."""

import pydoc_data.topics
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

LENGTH = 32


def tokens(count: int) -> Tensor:
    """The first sequences of the text, `(count, LENGTH)`, a token a byte."""
    text = "".join(pydoc_data.topics.topics.values()).encode("latin1", "replace")
    return torch.tensor(list(text[: count * LENGTH])).view(count, LENGTH)


class Sequences(Dataset[dict[str, Tensor]]):
    """Sequences as a Trainer of Transformers takes them."""

    def __init__(self, count: int = 512) -> None:
        self._tokens = tokens(count)

    def __len__(self) -> int:
        return len(self._tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self._tokens[index], "labels": self._tokens[index]}


def tiny_gpt2(dtype: torch.dtype = torch.float32) -> Any:
    """A GPT-2 of 30,000 weights without dropout, the same each time."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"vocab_size": 256, "n_positions": LENGTH, "n_embd": 24, "n_layer": 2, "n_head": 2}
    silent = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    tokens = dict.fromkeys(("bos_token_id", "eos_token_id"), 0)
    return GPT2LMHeadModel(GPT2Config(**sizes, **silent, **tokens, loss_type="ForCausalLM")).to(dtype)
