"""Clipping in a loop of Hugging Face Accelerate, under the path that users know."""

from lightning_gradclip.loops.accelerate import AcceleratedClipper, accelerated

__all__ = ["AcceleratedClipper", "accelerated"]
