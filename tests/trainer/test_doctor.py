"""What is said of the clipping of real fits, each with one thing wrong."""

import pytest
import torch
from lightning.pytorch import Trainer
from torch.optim import SGD, Adam

from kit.boring import Batches, Prescribed, gradients
from lightning_gradclip import Doctor, GradientClipping, NormClip


class ByHand(Prescribed):
    """Clips by itself, under manual optimization."""

    def __init__(self, limit: float, make=lambda params: SGD(params, lr=0.01)) -> None:
        super().__init__(make)
        self.automatic_optimization, self.limit = False, limit

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        torch.nn.utils.clip_grad_norm_(self.parameters(), self.limit)
        optimizer.step()


def findings(module: Prescribed, *callbacks, batches=None, **told) -> list[str]:
    doctor = Doctor()
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[doctor, *callbacks],
        **told,
    )
    trainer.fit(module, Batches(gradients(30) if batches is None else batches))
    return doctor.findings


def module(make=lambda params: SGD(params, lr=0.01)) -> Prescribed:
    return Prescribed(make)


def test_nothing_is_said_of_clipping_that_cuts_some_steps() -> None:
    usual = gradients(30)
    usual[7] = {name: 100 * value for name, value in usual[7].items()}
    limit = GradientClipping(NormClip(max_norm=20.0))
    assert findings(module(), limit, batches=usual) == []
    assert findings(module(), gradient_clip_val=20.0, batches=usual) == []
    assert findings(ByHand(20.0), batches=usual) == []


@pytest.mark.parametrize("limit", [GradientClipping(NormClip(max_norm=0.1)), None])
def test_a_limit_that_always_acts(limit) -> None:
    told = {} if limit else {"gradient_clip_val": 0.1}
    [said] = findings(module(), *([limit] if limit else []), **told)
    assert said.startswith("Every one of 30 steps is clipped, to 0.0")
    assert "smaller learning rate" in said


def test_a_limit_that_never_acts_and_none_at_all() -> None:
    for told in ({"gradient_clip_val": 1e6}, {}):
        [said] = findings(module(), **told)
        assert said.startswith("Nothing is clipped in 30 steps. The norms are ")
        assert "write NormClip(" in said
        assert "the norm that one step in ten is over" in said


def test_two_that_clip() -> None:
    said = findings(ByHand(0.2), GradientClipping(NormClip(max_norm=0.1)))
    assert said[0].startswith("Two clip the gradients: the module's own code in 30 steps")


def test_layers_that_stall() -> None:
    batches = gradients(60)
    for one in batches:
        one.update({name: value * (1e6 if name.startswith("head") else 1e-3) for name, value in one.items()})
    [_, said] = findings(module(lambda params: Adam(params, lr=1e-3)), batches=batches, gradient_clip_val=1.0)
    assert said.startswith("Clipping leaves 2 of 4 parameters, such as 'encoder.")
    assert "NormClip(per='layer')" in said


@pytest.mark.filterwarnings("ignore")
def test_gradients_that_are_clipped_while_they_are_scaled() -> None:
    from lightning.pytorch.plugins.precision import MixedPrecision

    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=10_000))
    said = findings(ByHand(1.0), plugins=[plugin])
    assert said[0].startswith("The module clips gradients that the GradScaler still scales, in 30 steps")
