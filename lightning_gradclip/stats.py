"""The path by which users know what one step did: see `record.step`."""

from lightning_gradclip.record.step import *  # noqa: F403
