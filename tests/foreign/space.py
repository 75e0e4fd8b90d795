"""The parameters that a trial of `experiment=searched` draws: those of its method."""

from omegaconf import DictConfig
from optuna import Trial


def suggest(config: DictConfig, trial: Trial) -> None:
    method = "callbacks.gradclip.method"
    if trial.params["callbacks/gradclip"] == "norm":
        trial.suggest_float(f"{method}.max_norm", 0.01, 0.1)
    else:
        trial.suggest_float(f"{method}.z_threshold", 3, 4)
