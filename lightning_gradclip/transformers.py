"""Clipping in the Trainer of Hugging Face Transformers, under the path that users know."""

from lightning_gradclip.loops.transformers import GradientClippingCallback

__all__ = ["GradientClippingCallback"]
