"""The parameters of `hparams_search=any_method`, for each method its own."""

from omegaconf import DictConfig
from optuna import Trial


def suggest(config: DictConfig, trial: Trial) -> None:
    """Draw the parameters of the method that the trial has drawn."""
    method = "callbacks.gradclip.method"
    chosen = trial.params["callbacks/gradclip"]
    if chosen == "norm":
        trial.suggest_float(f"{method}.max_norm", 0.05, 20, log=True)
    elif chosen == "quantile":
        trial.suggest_float(f"{method}.q", 0.1, 0.99)
        trial.suggest_categorical(f"{method}.window", [20, 100, 1000])
    elif chosen == "ema":
        trial.suggest_float(f"{method}.ratio", 1.0, 2.0)
        trial.suggest_float(f"{method}.warmup_max_norm", 0.2, 20, log=True)
    elif chosen == "zclip":
        trial.suggest_float(f"{method}.z_threshold", 1, 5)
        trial.suggest_int(f"{method}.warmup", 2, 50)
    else:
        raise ValueError(f"search_space.py knows no parameters of callbacks/gradclip={chosen}; add them there")
