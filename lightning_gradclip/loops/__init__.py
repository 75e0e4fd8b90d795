"""Loops that people do not write themselves: a clipper brought into each by the way that it leaves open.

Doors: `attach.attach` for any loop with a torch optimizer, `accelerate.accelerated`, `fabric.clip_gradients` with
`fabric.clipper_for`, and `transformers.GradientClippingCallback`. Each imports its library and no other; none imports
Lightning.
"""
