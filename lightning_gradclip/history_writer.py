"""The path by which users know what writes a history: see `record.history_writer`."""

from lightning_gradclip.record.history_writer import *  # noqa: F403
