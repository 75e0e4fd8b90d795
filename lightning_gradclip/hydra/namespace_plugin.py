"""Installed as `hydra_plugins/lightning_gradclip.py`, the only place where Hydra 1.3 looks.

While it loads this file, in any application of the environment, Hydra survives only an ImportError: keep it an import.
"""

from lightning_gradclip.hydra.search_path import GradclipSearchPath as GradclipSearchPath
