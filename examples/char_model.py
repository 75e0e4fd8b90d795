"""Character-level language models."""

from collections.abc import Callable, Iterable

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer
from torchmetrics import MeanMetric

CELLS = {"rnn": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}


class NextCharacter(LightningModule):
    """Predicts each character from those before it; how, says the subclass.

    Its `forward` takes codes, (N, T), and returns scores, (N, T, characters), and a state or None.
    """

    def __init__(self, optimizer: Callable[[Iterable[nn.Parameter]], Optimizer]):
        super().__init__()
        self.val_loss = MeanMetric(nan_strategy="disable")  # a NaN must show
        self.optimizer = optimizer

    def losses(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """One loss for each character of the batch."""
        codes, following = batch
        scores, _ = self(codes)
        return cross_entropy(scores.flatten(0, 1), following.flatten(), reduction="none")

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = self.losses(batch).mean()
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.val_loss.update(self.losses(batch))

    def on_validation_epoch_end(self) -> None:
        loss = self.val_loss.compute()  # over all ranks
        self.val_loss.reset()
        self.log_dict({"val/loss": loss, "val/perplexity": loss.exp()}, sync_dist=True)

    def configure_optimizers(self) -> Optimizer:
        return self.optimizer(self.parameters())


class CharModel(NextCharacter):
    """A recurrent network."""

    def __init__(
        self,
        characters: int,
        cell: str,
        hidden_size: int,
        layers: int,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
    ):
        super().__init__(optimizer)
        if cell not in CELLS:
            raise ValueError(f"model.cell={cell} is unknown; use one of {', '.join(CELLS)}")
        self.embedding = nn.Embedding(characters, hidden_size)
        self.recurrent = CELLS[cell](hidden_size, hidden_size, layers, batch_first=True)
        self.head = nn.Linear(hidden_size, characters)

    def forward(self, codes: Tensor, state=None):
        hidden, state = self.recurrent(self.embedding(codes), state)
        return self.head(hidden), state

    @torch.no_grad()
    def generate(self, codes: Tensor, length: int, temperature: float) -> Tensor:
        """Continue the codes by `length` characters, drawn one after the other."""
        state, given = None, codes
        for _ in range(length):
            scores, state = self(given[None], state)
            given = torch.multinomial((scores[0, -1] / temperature).softmax(-1), 1)
            codes = torch.cat([codes, given])
        return codes
