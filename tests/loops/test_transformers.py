"""Clipping in the Trainer of Transformers."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule
from torch.utils.data import DataLoader, Sampler, SequentialSampler

from kit.boring import make_trainer
from kit.extras import require_loops
from kit.language import Sequences, tiny_gpt2
from lightning_gradclip import GradientClipping, History, NormClip, QuantileClip, ZClip

pytest.importorskip("transformers", reason="transformers not installed: make test-loops")

from transformers import Trainer, TrainerCallback, TrainingArguments

from lightning_gradclip.transformers import GradientClippingCallback

pytestmark = pytest.mark.filterwarnings("default")


def trained(
    folder: Path, *callbacks: Any, resume: Path | None = None, kind: type[Trainer] = Trainer, **options: Any
) -> Trainer:
    """A training of 50 steps that logs after every ten and saves after 25."""
    settings: dict[str, Any] = {
        "max_steps": 50,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.5,
        "optim": "sgd",
        "logging_steps": 10,
        "save_steps": 25,
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 1,
    }
    args = TrainingArguments(output_dir=str(folder), use_cpu=True, **settings | options)
    trainer = kind(model=tiny_gpt2(), args=args, train_dataset=Sequences(), callbacks=list(callbacks))
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer


def weights(trainer: Trainer) -> list[torch.Tensor]:
    return [one.detach() for one in trainer.model.parameters()]


def logged(trainer: Trainer) -> list[dict[str, float]]:
    return [one for one in trainer.state.log_history if "loss" in one]


class TestClipping:
    @pytest.mark.parametrize("accumulate", [1, 4])
    def test_weights_are_those_of_max_grad_norm(self, tmp_path: Path, accumulate: int) -> None:
        options = {"gradient_accumulation_steps": accumulate, "save_strategy": "no"}
        theirs = trained(tmp_path / "theirs", max_grad_norm=0.1, **options)
        ours = trained(tmp_path / "ours", GradientClippingCallback(NormClip(max_norm=0.1)), **options)
        # Which sums squares in float32: the coefficients differ in the seventh digit.
        for one, other in zip(weights(ours), weights(theirs), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
        assert all(one["gradclip/clip_rate"] == 1 for one in logged(ours))
        assert all(one["gradclip/norm"] > 0.1 for one in logged(ours))

    def test_within_the_limit_weights_are_equal_to_the_bit(self, tmp_path: Path) -> None:
        theirs = trained(tmp_path / "theirs", max_grad_norm=0, save_strategy="no")
        ours = trained(tmp_path / "ours", GradientClippingCallback(NormClip(max_norm=1e9)), save_strategy="no")
        assert all(map(torch.equal, weights(ours), weights(theirs)))

    def test_max_grad_norm_gives_way_and_is_given_back(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        ours = trained(tmp_path, GradientClippingCallback(NormClip(max_norm=1e9)), save_strategy="no")
        assert "max_grad_norm=1 gives way to NormClip(max_norm=1000000000.0" in caplog.text
        assert "write max_grad_norm=0 to say so yourself" in caplog.text
        assert ours.args.max_grad_norm == 1.0
        # At most 1 if the Trainer had clipped before.
        assert max(one["gradclip/norm_max"] for one in logged(ours)) > 1

    def test_a_scaler_unscales_and_overflows_are_counted(self, tmp_path: Path) -> None:
        class Scaled(Trainer):
            """Accelerate makes a scaler for devices only, and then does with it what it does there."""

            def create_accelerator_and_postprocess(self) -> None:
                super().create_accelerator_and_postprocess()
                self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=1000)
                self.accelerator.native_amp, self.accelerator.state._mixed_precision = True, "fp16"

        options = {"save_strategy": "no", "max_grad_norm": 0}
        ours = trained(tmp_path / "a", GradientClippingCallback(NormClip(max_norm=0.1)), kind=Scaled, **options)
        plain = trained(tmp_path / "b", GradientClippingCallback(NormClip(max_norm=0.1)), **options)
        overflows = logged(ours)[-1]["gradclip/overflows"]
        assert overflows >= 1
        assert "gradclip/overflows" not in logged(plain)[-1]
        assert logged(ours)[-1]["gradclip/norm_max"] < 100


def test_the_weights_are_those_of_lightning(tmp_path: Path) -> None:
    """On the same batches, 50 steps of each."""

    class InOrder(Trainer):
        def _get_train_sampler(self, *_: Any) -> Sampler[int]:
            return SequentialSampler(Sequences())

    class Language(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = tiny_gpt2()

        def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
            # The Trainer divides by all tokens, the first of each sequence included, which nothing foretells.
            return self.net(**batch, num_items_in_batch=batch["labels"].numel()).loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.5)

    method = ZClip(warmup=10, z_threshold=0.5)
    theirs = trained(
        tmp_path, GradientClippingCallback(method), kind=InOrder, lr_scheduler_type="constant", save_strategy="no"
    )
    ours, clipping = Language(), GradientClipping(method)
    make_trainer(clipping, max_steps=50).fit(ours, DataLoader(Sequences(), batch_size=4))
    for one, other in zip(weights(theirs), ours.net.parameters(), strict=True):
        torch.testing.assert_close(one, other.detach(), rtol=1e-6, atol=1e-6)
    assert sum(one["gradclip/clip_rate"] for one in logged(theirs)) > 0


class TestLogs:
    def test_reporters_write_the_metrics(self, tmp_path: Path) -> None:
        accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
        trainer = trained(
            tmp_path,
            GradientClippingCallback(NormClip(max_norm=0.1)),
            report_to="tensorboard",
            save_strategy="no",
        )
        (events,) = tmp_path.rglob("events.out.tfevents.*")
        reader = accumulators.EventAccumulator(str(events.parent))
        reader.Reload()
        written = [event.value for event in reader.Scalars("train/gradclip/norm")]
        assert written == pytest.approx([one["gradclip/norm"] for one in logged(trainer)])
        assert [event.step for event in reader.Scalars("train/gradclip/clip_rate")] == [10, 20, 30, 40, 50]

    def test_evaluations_are_left_alone(self, tmp_path: Path) -> None:
        class Evaluated(Trainer):
            def __init__(self, **options: Any) -> None:
                super().__init__(eval_dataset=Sequences(8), **options)

        callback = GradientClippingCallback(NormClip(max_norm=0.1))
        trainer = trained(tmp_path, callback, kind=Evaluated, eval_strategy="steps", eval_steps=5, save_strategy="no")
        evaluations = [one for one in trainer.state.log_history if "eval_loss" in one]
        assert len(evaluations) == 10
        assert not any(key.startswith("gradclip") for one in evaluations for key in one)

    def test_a_history_knows_loss_epoch_and_batch(self, tmp_path: Path) -> None:
        callback = GradientClippingCallback(NormClip(max_norm=0.1), history=tmp_path / "clipping")
        options = {"logging_steps": 1, "gradient_accumulation_steps": 4, "save_strategy": "no", "max_steps": 40}
        trainer = trained(tmp_path, callback, **options)
        history = History(tmp_path / "clipping")
        # Transformers 4 logs four digits.
        assert history.steps["loss"].tolist() == pytest.approx([one["loss"] for one in logged(trainer)], abs=1e-4)
        # An epoch has 128 batches, of which a step takes four.
        assert history.steps["epoch"].tolist() == [0.0] * 32 + [1.0] * 8
        assert history.steps["batch"].tolist() == [*range(0, 128, 4), *range(0, 32, 4)]
        assert "training_step" not in vars(trainer)

    def test_a_name_of_ones_own(self, tmp_path: Path) -> None:
        callback = GradientClippingCallback(NormClip(max_norm=0.1), name="clip", measure_per="layer")
        trainer = trained(tmp_path, callback, save_strategy="no")
        assert "clip/norm_clipped" in logged(trainer)[0]
        assert any(key.startswith("clip_norm/") for key in logged(trainer)[0])
        assert any("transformer.h.0.attn" in key for key in logged(trainer)[0])


class TestCheckpoints:
    @pytest.mark.parametrize("restored", [False, True])
    @pytest.mark.parametrize("method", [ZClip(warmup=10, z_threshold=0.5), QuantileClip(q=0.5, window=None)])
    def test_resuming_is_exact_to_the_bit(self, tmp_path: Path, method: Any, restored: bool) -> None:
        whole = trained(tmp_path / "whole", GradientClippingCallback(method, measure_per="layer"))
        shutil.copytree(tmp_path / "whole" / "checkpoint-25", tmp_path / "part" / "checkpoint-25")
        resumed = trained(
            tmp_path / "part",
            GradientClippingCallback(method, measure_per="layer"),
            resume=tmp_path / "part" / "checkpoint-25",
            restore_callback_states_from_checkpoint=restored,
        )
        assert all(map(torch.equal, weights(resumed), weights(whole)))
        ours, expected = ([one for one in logged(each) if one["step"] > 25] for each in (resumed, whole))
        # The loss of the window in which the checkpoint lies is the Trainer's own affair.
        for one, other in zip(ours, expected, strict=True):
            assert {k: v for k, v in one.items() if "gradclip" in k} == {
                k: v for k, v in other.items() if "gradclip" in k
            }

    def test_a_checkpoint_of_a_training_without_it_is_taken(self, tmp_path: Path) -> None:
        trained(tmp_path, max_steps=25)
        resumed = trained(tmp_path, GradientClippingCallback(ZClip()), resume=tmp_path / "checkpoint-25")
        assert logged(resumed)[-1]["gradclip/norm"] > 0

    def test_it_is_json(self, tmp_path: Path) -> None:
        schedule = NormClip(max_norm={0: 10.0, 20: math.inf})
        trained(tmp_path, GradientClippingCallback(schedule, exclude=["*.wpe.*"]), max_steps=25)
        saved = json.loads((tmp_path / "checkpoint-25" / "trainer_state.json").read_text())
        arguments = saved["stateful_callbacks"]["GradientClippingCallback"]["args"]
        again = GradientClippingCallback(**arguments)
        assert again.state()["args"]["exclude"] == ["*.wpe.*"]
        assert again._method == schedule


class TestRefusals:
    def test_an_unknown_option(self) -> None:
        with pytest.raises(
            TypeError, match=r"has no argument 'norm'; its arguments are method, name, summary, action, "
        ):
            GradientClippingCallback(NormClip(), norm=1.0)

    def test_a_wrong_option_is_refused_before_the_data_is_loaded(self) -> None:
        with pytest.raises(ValueError, match="action must be one of"):
            GradientClippingCallback(NormClip(), action="monitor")

    def test_no_method(self) -> None:
        with pytest.raises(TypeError, match="needs a method"):
            GradientClippingCallback()

    def test_a_class_that_is_no_method(self) -> None:
        with pytest.raises(TypeError, match=r"names no clipping method; write method=NormClip"):
            GradientClippingCallback({"_target_": "os.path.join"})


class TestOthers:
    def test_adapters_of_peft(self, tmp_path: Path) -> None:
        require_loops("peft")
        import peft

        model = peft.get_peft_model(tiny_gpt2(), peft.LoraConfig(target_modules=["c_attn"], r=2, fan_in_fan_out=True))
        args = TrainingArguments(str(tmp_path), max_steps=10, logging_steps=5, use_cpu=True, report_to="none", seed=1)
        trainer = Trainer(
            model=model,
            args=args,
            train_dataset=Sequences(64),
            callbacks=[GradientClippingCallback(NormClip(max_norm=1e-3), measure_per="parameter")],
        )
        trainer.train()
        first = logged(trainer)[0]
        assert first["gradclip/norm_clipped"] == pytest.approx(1e-3, rel=1e-3)
        scopes = [key for key in first if "lora" in key]
        assert len(scopes) == 4

    def test_trl_takes_it(self, tmp_path: Path) -> None:
        require_loops("trl", "datasets")
        import datasets
        import trl

        rows = datasets.Dataset.from_list([{"input_ids": one["input_ids"].tolist()} for one in Sequences(64)])
        args = trl.SFTConfig(
            str(tmp_path),
            max_steps=10,
            logging_steps=5,
            use_cpu=True,
            report_to="none",
            max_length=32,
            seed=1,
            bf16=False,
        )
        trainer = trl.SFTTrainer(
            model=tiny_gpt2(),
            args=args,
            train_dataset=rows,
            processing_class=_tokenizer(),
            callbacks=[GradientClippingCallback(NormClip(max_norm=1e-2))],
        )
        trainer.train()
        assert logged(trainer)[0]["gradclip/norm_clipped"] == pytest.approx(1e-2, rel=1e-3)
        assert "mean_token_accuracy" in logged(trainer)[0]

    def test_preferences_of_trl(self, tmp_path: Path) -> None:
        require_loops("trl", "datasets")
        import datasets
        import trl

        rows = [{"prompt": "Say it", "chosen": f" well {i}", "rejected": f" ill {i}"} for i in range(64)]
        args = trl.DPOConfig(
            str(tmp_path), max_steps=10, logging_steps=5, use_cpu=True, report_to="none", seed=1, bf16=False
        )
        trainer = trl.DPOTrainer(
            ref_model=tiny_gpt2(),
            model=tiny_gpt2(),
            args=args,
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=_tokenizer(),
            callbacks=[GradientClippingCallback(NormClip(max_norm=1e-2))],
        )
        trainer.train()
        assert logged(trainer)[0]["gradclip/norm_clipped"] == pytest.approx(1e-2, rel=1e-3)
        assert "rewards/margins" in logged(trainer)[0]

    def test_callbacks_that_come_with_it_go_on(self, tmp_path: Path) -> None:
        class Other(TrainerCallback):
            seen = 0

            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                self.seen += 1

        before, after = Other(), Other()
        trained(tmp_path, before, GradientClippingCallback(NormClip()), after, save_strategy="no")
        assert (before.seen, after.seen) == (50, 50)


def _tokenizer() -> Any:
    """Of bytes: nothing is downloaded."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {chr(i): i for i in range(256)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="\x00"))
    words.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="\x00", pad_token="\x00")


def test_a_training_ends_with_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    history = tmp_path / "history"
    callback = GradientClippingCallback(NormClip(0.5), history=history)
    trained(tmp_path, callback, max_steps=4)
    norms = History(history).steps["norm"]
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("gradclip: ")]
    assert lines[0].startswith(f"gradclip: 4 steps, 100 % clipped; norm: median {np.median(norms):.3g}, largest ")
    assert lines[1] == f"gradclip: history in {history}; to see it: lightning-gradclip report {history}"
    trained(tmp_path, GradientClippingCallback(NormClip(0.5), summary=False), max_steps=1)
    assert "gradclip: " not in capsys.readouterr().out
