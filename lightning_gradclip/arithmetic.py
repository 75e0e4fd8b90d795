"""The path by which rules of users import arithmetic on tensors and floats alike: see `methods.numbers`."""

from lightning_gradclip.methods.numbers import *  # noqa: F403
