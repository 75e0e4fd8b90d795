"""Gradient clipping for Lightning and plain PyTorch.

Importing this package imports neither torch, Lightning nor Hydra: every Hydra application in the environment imports it
at startup to find the configuration pack. A public name is imported when it is first used.
"""

from dis import get_instructions
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    # The only list of public names: type checkers read it as imports, the rest of this file as text.
    from lightning_gradclip.callback import GradientClipping as GradientClipping
    from lightning_gradclip.clipper import Clipper as Clipper
    from lightning_gradclip.loops.attach import Attached as Attached
    from lightning_gradclip.loops.attach import attach as attach
    from lightning_gradclip.methods.agc import AGC as AGC
    from lightning_gradclip.methods.ema import EmaClip as EmaClip
    from lightning_gradclip.methods.method import ClipMethod as ClipMethod
    from lightning_gradclip.methods.norm import NormClip as NormClip
    from lightning_gradclip.methods.normalize import Normalize as Normalize
    from lightning_gradclip.methods.quantile import QuantileClip as QuantileClip
    from lightning_gradclip.methods.sigma import SigmaClip as SigmaClip
    from lightning_gradclip.methods.spike import SpikeClip as SpikeClip
    from lightning_gradclip.methods.surprise import SurpriseClip as SurpriseClip
    from lightning_gradclip.methods.value import ValueClip as ValueClip
    from lightning_gradclip.methods.zclip import ZClip as ZClip
    from lightning_gradclip.record.history import History as History
    from lightning_gradclip.record.history_writer import HistoryWriter as HistoryWriter
    from lightning_gradclip.record.step import Row as Row
    from lightning_gradclip.record.step import StepStats as StepStats
    from lightning_gradclip.report.compare import Compared as Compared
    from lightning_gradclip.report.compare import compare as compare
    from lightning_gradclip.report.spikes import Spike as Spike
    from lightning_gradclip.report.spikes import spikes as spikes
    from lightning_gradclip.trainer.doctor import Doctor as Doctor
else:
    # Hidden from type checkers, to which a module with `__getattr__` has every attribute.
    def _imports():
        """The names above, as the compiled module has them: a frozen application holds no source."""
        for step in get_instructions(__spec__.loader.get_code(__name__)):
            if step.opname == "IMPORT_NAME":
                module = step.argval
            elif step.opname == "IMPORT_FROM" and module.startswith(f"{__name__}."):
                yield step.argval, module

    _MODULE_OF = dict(_imports())
    __all__ = sorted(_MODULE_OF)

    def __getattr__(name):
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return globals().setdefault(name, getattr(import_module(_MODULE_OF[name]), name))

    def __dir__():
        return __all__


# An installation has `conf` inside the package, a checkout beside it.
if find_spec(f"{__name__}.conf") is None:
    import_module(f"{__name__}.hydra.finder").serve_checkout_conf()
