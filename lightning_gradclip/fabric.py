"""Clipping in a loop of Lightning's Fabric, under the path that users know."""

from lightning_gradclip.loops.fabric import FabricClipper, clip_gradients, clipper_for

__all__ = ["FabricClipper", "clip_gradients", "clipper_for"]
