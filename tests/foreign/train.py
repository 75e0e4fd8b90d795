"""An application that knows nothing of gradient clipping, in the usual layout.

It prints its configuration as JSON; with a trainer it trains. As it ends it writes which modules it has imported to
the file that MODULES names, whatever Hydra was asked to do.
"""

import atexit
import json
import os
import sys
from pathlib import Path

import hydra
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

if "MODULES" in os.environ:
    atexit.register(lambda: Path(os.environ["MODULES"]).write_text("\n".join(sys.modules)))


@hydra.main(version_base="1.3", config_path="configs", config_name="train")
def main(config: DictConfig) -> float | None:
    if config.get("trainer"):
        return train(config)
    print(json.dumps(OmegaConf.to_container(config)))
    return None


def train(config: DictConfig) -> float | None:
    callbacks = [instantiate(node) for node in config.callbacks.values() if "_target_" in node]
    from lightning.pytorch.demos.boring_classes import BoringModel

    trainer = instantiate(config.trainer, callbacks=callbacks)
    trainer.fit(BoringModel())
    metrics = {key: float(value) for key, value in trainer.callback_metrics.items()}
    print(json.dumps(metrics))
    return metrics.get("gradclip/norm_clipped")


if __name__ == "__main__":
    main()
