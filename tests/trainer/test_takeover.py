"""The trainer's own clipping, done by the callback: the same weights, with statistics."""

import pickle

import pytest
import torch
from hydra import compose, initialize
from hydra.utils import instantiate
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback

from kit.boring import Batches, Prescribed, gradients, weights
from lightning_gradclip import GradientClipping, NormClip, ValueClip


def fitted(callback: Callback | None, module: Prescribed | None = None, **told) -> tuple[Trainer, dict]:
    module = Prescribed() if module is None else module
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[] if callback is None else [callback],
        **told,
    )
    trainer.fit(module, Batches(gradients(4, scale=2.0)))
    return trainer, weights(module)


@pytest.mark.parametrize("algorithm", [None, "norm", "value"])
def test_weights_are_those_of_the_trainers_own_clipping(algorithm: str | None) -> None:
    told = {"gradient_clip_val": 0.7, "gradient_clip_algorithm": algorithm}
    _, expected = fitted(None, **told)
    _, unclipped = fitted(None)
    callback = pickle.loads(pickle.dumps(GradientClipping.from_trainer()))
    trainer, found = fitted(callback, **told)
    for name, weight in expected.items():
        torch.testing.assert_close(torch.as_tensor(found[name]), torch.as_tensor(weight), rtol=1e-6, atol=1e-7)
        assert not torch.equal(torch.as_tensor(weight), torch.as_tensor(unclipped[name]))
    assert trainer.callback_metrics["gradclip/clip_rate"] == 1
    assert trainer.gradient_clip_val == 0.7
    assert isinstance(callback.method, ValueClip if algorithm == "value" else NormClip)


def test_a_trainer_that_is_told_nothing_is_said_to_be() -> None:
    with pytest.warns(UserWarning, match=r"gradient_clip_val=None\) is told nothing.*set gradient_clip_val, or give"):
        trainer, _ = fitted(GradientClipping.from_trainer())
    assert trainer.callback_metrics["gradclip/clip_rate"] == 0


def test_the_trainer_has_its_own_back_after_an_error() -> None:
    class Breaks(Prescribed):
        def training_step(self, batch, batch_idx):
            seen.append(self.trainer.gradient_clip_val)
            raise RuntimeError("broken")

    seen: list = []
    trainers: list[Trainer] = []

    class Keeps(Callback):
        def setup(self, trainer, pl_module, stage) -> None:
            trainers.append(trainer)

    module = Breaks()
    module.configure_callbacks = lambda: [Keeps()]
    with pytest.raises(RuntimeError, match="broken"):
        fitted(GradientClipping.from_trainer(), module, gradient_clip_val=0.3)
    assert seen == [None]
    assert trainers[0].gradient_clip_val == 0.3


def test_the_option_takes_over_with_the_options_of_all_others() -> None:
    with initialize(config_path=None, version_base="1.3"):
        config = compose(overrides=["+callbacks/gradclip=takeover", "callbacks.gradclip.measure_per=layer"])
    trainer, _ = fitted(instantiate(config.callbacks.gradclip), gradient_clip_val=0.7)
    assert {"gradclip/clip_rate", "gradclip_norm/encoder"} <= set(trainer.callback_metrics)
    with pytest.raises(TypeError, match=r"write GradientClipping\(NormClip"):
        GradientClipping.from_trainer(NormClip())
