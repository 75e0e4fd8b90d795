"""The callback under LightningCLI: flags or a YAML file choose it, its method and their settings.

Try:
    python examples/cli.py fit --trainer.callbacks+=lightning_gradclip.GradientClipping \
        --trainer.callbacks.method=lightning_gradclip.ZClip --trainer.callbacks.method.z_threshold=3
"""

from digits_data import Digits
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from nfnet_model import NFNet


class DigitsCLI(LightningCLI):
    """Knows how to train the digits, and nothing about clipping."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        optimizer = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1, "momentum": 0.9, "nesterov": True}}
        parser.set_defaults(
            {
                "model.classes": 10,
                "model.widths": [16, 32],
                "model.depth": 2,
                "model.alpha": 0.2,
                "model.optimizer": optimizer,
                "data.batch_size": 512,
                "data.val_fraction": 0.2,
                "data.seed": 1,
                "trainer.accelerator": "cpu",
                "trainer.max_steps": 100,
                "trainer.log_every_n_steps": 10,
            }
        )


def main() -> None:
    DigitsCLI(NFNet, Digits, seed_everything_default=1, auto_configure_optimizers=False)


if __name__ == "__main__":
    main()
