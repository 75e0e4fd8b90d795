"""The recipes of docs/loops.md, each against what the library does by itself."""

import math
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from kit import peers
from kit.extras import require_loops
from lightning_gradclip import GradientClipping, NormClip, attach

pytestmark = pytest.mark.filterwarnings("default")

METHOD = NormClip(max_norm=0.5)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))


def examples(count: int = 160) -> tuple[Tensor, Tensor]:
    inputs = torch.randn(count, 4, generator=torch.Generator().manual_seed(1))
    return inputs, 10 * inputs.sum(1, keepdim=True)


def weights(params: Iterable[Tensor]) -> list[Tensor]:
    return [one.detach().clone() for one in params]


def assert_same(ours: list[Tensor], theirs: list[Tensor], tolerance: float = 1e-6) -> None:
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


class TestStableBaselines:
    @pytest.mark.parametrize(("kind", "options"), [("PPO", {"batch_size": 32}), ("A2C", {})])
    def test_a_policy_is_trained_as_by_its_own_clipping(self, kind: str, options: dict[str, int]) -> None:
        require_loops("stable_baselines3")
        algorithms = __import__("stable_baselines3")

        def trained(max_grad_norm: float) -> tuple[list[Tensor], Any]:
            made = getattr(algorithms, kind)(
                "MlpPolicy", "CartPole-v1", n_steps=64, seed=1, device="cpu", max_grad_norm=max_grad_norm, **options
            )
            ours = math.isinf(max_grad_norm)
            attached = attach(made.policy.optimizer, made.policy, METHOD) if ours else None
            made.learn(256)
            return weights(made.policy.parameters()), attached

        (ours, attached), (theirs, _) = trained(math.inf), trained(0.5)
        assert_same(ours, theirs)
        assert attached.metrics()["clip_rate"] > 0.5


def test_a_fit_of_skorch() -> None:
    require_loops("skorch", "tabulate")
    from skorch import NeuralNetRegressor
    from skorch.callbacks import Callback, GradientNormClipping

    class Clipping(Callback):
        def on_train_begin(self, net: Any, **_: Any) -> None:
            self.attached = attach(net.optimizer_, net.module_, METHOD)

    def trained(callback: Callback) -> list[Tensor]:
        options = {"max_epochs": 2, "lr": 0.01, "batch_size": 16, "train_split": None, "verbose": 0}
        net = NeuralNetRegressor(network(), callbacks=[callback], **options)
        net.fit(*(one.numpy() for one in examples()))
        return weights(net.module_.parameters())

    clipping = Clipping()
    assert_same(trained(clipping), trained(GradientNormClipping(0.5)))
    assert clipping.attached.steps == 20


def test_a_learner_of_fastai() -> None:
    require_loops("fastai")
    from fastai.callback.core import Callback
    from fastai.callback.training import GradientClip
    from fastai.data.core import DataLoaders
    from fastai.learner import Learner
    from fastai.optimizer import OptimWrapper

    class Clipping(Callback):
        def before_fit(self) -> None:
            self.attached = attach(self.learn.opt, self.learn.model, METHOD)

    def trained(callback: Callback) -> list[Tensor]:
        loaders = DataLoaders(*(DataLoader(TensorDataset(*examples()), batch_size=16) for _ in range(2)))
        optimizer = partial(OptimWrapper, opt=torch.optim.SGD)
        learner = Learner(loaders, network(), loss_func=nn.MSELoss(), opt_func=optimizer, cbs=[callback])
        with learner.no_bar(), learner.no_logging():
            learner.fit(2, 0.01)
        return weights(learner.model.parameters())

    clipping = Clipping()
    assert_same(trained(clipping), trained(GradientClip(0.5)))
    assert clipping.attached.steps == 20


def test_an_optimizer_of_timm_in_the_steps_of_its_scaler() -> None:
    kind = peers.inside("timm", "timm/optim", "lamb").Lamb

    def trained(*, ours: bool) -> list[Tensor]:
        net, scaler = network(), torch.amp.GradScaler("cpu")
        # Lamb clips by itself unless it is told not to.
        optimizer = kind(net.parameters(), lr=0.01, max_grad_norm=None)
        if ours:
            attach(optimizer, net, METHOD)
        for inputs, targets in DataLoader(TensorDataset(*examples()), batch_size=16):
            optimizer.zero_grad()
            # What timm.utils.NativeScaler does, whose import wants torchvision.
            scaler.scale(nn.functional.mse_loss(net(inputs), targets)).backward()
            if not ours:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(net.parameters(), 0.5)
            scaler.step(optimizer)
            scaler.update()
        return weights(net.parameters())

    assert_same(trained(ours=True), trained(ours=False), 1e-5)


def test_pretraining_by_litgpt(tmp_path: Path) -> None:
    require_loops("litgpt")
    from lightning.fabric import Fabric
    from litgpt.args import EvalArgs, TrainArgs
    from litgpt.config import Config
    from litgpt.model import GPT
    from litgpt.pretrain import fit

    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 16, "padded_vocab_size": 64, "block_size": 16}

    def trained(max_norm: float) -> tuple[list[Tensor], dict[str, Any]]:
        fabric = Fabric(accelerator="cpu", devices=1)
        torch.manual_seed(0)
        model = fabric.setup(GPT(Config(**sizes, intermediate_size=32)))
        optimizer = fabric.setup_optimizers(torch.optim.SGD(model.parameters(), lr=0.1))
        state = {"model": model, "optimizer": optimizer, "iter_num": 0, "step_count": 0}
        if math.isinf(max_norm):
            state["clipper"] = attach(optimizer, model, NormClip(max_norm=0.1))
        rows = torch.randint(0, 64, (64, 17), generator=torch.Generator().manual_seed(1))
        loader = fabric.setup_dataloaders(DataLoader(rows, batch_size=4))
        batches = {"global_batch_size": 8, "micro_batch_size": 4, "max_tokens": 16 * 64, "save_interval": None}
        train = TrainArgs(max_norm=max_norm, **batches, log_interval=100, lr_warmup_steps=2, min_lr=0.01)
        check = EvalArgs(interval=1000, max_iters=1, initial_validation=False, final_validation=False)
        fit(fabric, 1, state, loader, loader, tmp_path, None, train, check)
        fabric.save(tmp_path / "saved.pth", state)
        return weights(model.parameters()), state

    theirs, _ = trained(0.1)
    ours, state = trained(math.inf)
    assert_same(ours, theirs)
    assert torch.load(tmp_path / "saved.pth", weights_only=True)["clipper"]["step"] == state["clipper"].steps == 8


def test_the_optimizers_of_torchtitan() -> None:
    require_loops("torchtitan", "spmd_types", "tyro")
    from torchtitan.components.optimizer import OptimizersContainer, ParamGroupConfig

    def trained(before_step: Callable[[nn.Module], object] | None) -> list[Tensor]:
        parts = [network(), nn.Linear(1, 1)]
        model = nn.Sequential(*parts)
        kind = ParamGroupConfig(pattern=".*", optimizer_name="AdamW", optimizer_kwargs={"lr": 0.01})
        config = OptimizersContainer.Config(implementation="for-loop", param_groups=[kind])
        optimizers = OptimizersContainer(config, model_parts=parts)
        attached = attach(optimizers, model, METHOD) if before_step is None else None
        for inputs, targets in DataLoader(TensorDataset(*examples()), batch_size=16):
            optimizers.zero_grad()
            nn.functional.mse_loss(model(inputs), targets).backward()
            if before_step is not None:
                before_step(model)
            optimizers.step()
        assert attached is None or attached.steps == 10
        return weights(model.parameters())

    assert_same(trained(None), trained(lambda model: nn.utils.clip_grad_norm_(model.parameters(), 0.5)), 1e-5)


class TestForecasts:
    """Both train by a Trainer of Lightning, which takes the callback."""

    def test_a_model_of_darts_is_trained_saved_and_loaded(self, tmp_path: Path) -> None:
        require_loops("darts", "holidays", "xarray", "statsmodels")
        from darts import TimeSeries
        from darts.models import RNNModel

        series = TimeSeries.from_values(np.sin(np.arange(120) / 5).astype(np.float32))

        def trained(**trainer: Any) -> Any:
            silent = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
            model = RNNModel(
                12,
                model="LSTM",
                hidden_dim=4,
                training_length=24,
                n_epochs=2,
                random_state=1,
                optimizer_cls=torch.optim.SGD,
                optimizer_kwargs={"lr": 0.1},
                pl_trainer_kwargs={**silent, **trainer},
                work_dir=str(tmp_path),
            )
            return model.fit(series)

        ours = trained(callbacks=[GradientClipping(NormClip(max_norm=0.05))])
        theirs = trained(gradient_clip_val=0.05)
        assert_same(weights(ours.model.parameters()), weights(theirs.model.parameters()))
        ours.save(str(tmp_path / "model.pt"))
        again = RNNModel.load(str(tmp_path / "model.pt"), trusted=True)
        assert again.predict(3) == ours.predict(3)

    def test_a_transformer_of_pytorch_forecasting(self) -> None:
        require_loops("pytorch_forecasting", "skbase")
        pandas = pytest.importorskip("pandas")
        from lightning.pytorch import Trainer, seed_everything
        from pytorch_forecasting import TemporalFusionTransformer, TimeSeriesDataSet

        steps = np.arange(60)
        table = pandas.DataFrame({"step": steps, "series": "a", "value": np.sin(steps / 5).astype("float32")})
        lengths = {"max_encoder_length": 12, "max_prediction_length": 4}
        known = {"target": "value", "group_ids": ["series"], "time_varying_unknown_reals": ["value"]}
        data = TimeSeriesDataSet(table, time_idx="step", **known, **lengths)

        def trained(**options: Any) -> list[Tensor]:
            seed_everything(1, verbose=False)
            sizes = {"hidden_size": 4, "attention_head_size": 1, "dropout": 0.0}
            model = TemporalFusionTransformer.from_dataset(data, learning_rate=0.1, optimizer="sgd", **sizes)
            silent = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"))
            trainer = Trainer(max_steps=5, accelerator="cpu", **dict.fromkeys(silent, False), **options)
            trainer.fit(model, data.to_dataloader(train=True, batch_size=8, num_workers=0))
            return weights(model.parameters())

        ours = trained(callbacks=[GradientClipping(NormClip(max_norm=0.05))])
        assert_same(ours, trained(gradient_clip_val=0.05))
