"""The path by which users know what reads a history: see `record.history`."""

from lightning_gradclip.record.history import *  # noqa: F403
