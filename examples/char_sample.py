"""A text that the trained model writes."""

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.panel import Panel
from rich.text import Text
from summary import say


class Sample(Callback):
    """Prints how the model continues the prompt."""

    def __init__(self, prompt: str, length: int, temperature: float, seed: int):
        if not temperature > 0:
            raise ValueError(f"callbacks.sample.temperature={temperature} must be positive")
        self.prompt, self.length, self.temperature, self.seed = prompt, length, temperature, seed

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not len(trainer.datamodule.encode(self.prompt)):
            raise ValueError(f"callbacks.sample.prompt={self.prompt!r} has no character of the text; give another one")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Weights that are not finite give no probabilities to draw from.
        if trainer.is_global_zero and all(weight.isfinite().all() for weight in pl_module.parameters()):
            data = trainer.datamodule
            torch.manual_seed(self.seed)
            prompt = data.encode(self.prompt).to(pl_module.device)
            codes = pl_module.generate(prompt, self.length, self.temperature)
            say(Panel(Text(data.decode(codes)), title="A sample", title_align="left"))
