"""A plugin of pytest for other people's tests: each Trainer that they make gets our callback.

`pytest -p kit.in_every_trainer`, with tests/ and the package on PYTHONPATH. The callback clips at a limit that nothing
reaches, so that what is trained stays as it is. Beside a limit of the Trainer's own ours would be refused: left out.
"""

import functools
from typing import Any

from lightning.pytorch import Trainer

from lightning_gradclip import GradientClipping, NormClip

_init = Trainer.__init__


@functools.wraps(_init)
def _with_ours(self: Trainer, *arguments: Any, **options: Any) -> None:
    _init(self, *arguments, **options)
    if not self.gradient_clip_val:
        self.callbacks.append(GradientClipping(NormClip(max_norm=1e30), nonfinite="ignore"))
        # Those that save checkpoints come last, as Lightning has it.
        self.callbacks = self._callback_connector._reorder_callbacks(self.callbacks)


Trainer.__init__ = _with_ours
