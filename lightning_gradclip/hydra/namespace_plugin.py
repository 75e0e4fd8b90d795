"""Installed as `hydra_plugins/lightning_gradclip.py`, the only place where Hydra 1.3 looks.

Hydra survives nothing but an ImportError while it loads this file, in any application of the
environment: it must stay an import.
"""

from lightning_gradclip.hydra.search_path import GradclipSearchPath as GradclipSearchPath
