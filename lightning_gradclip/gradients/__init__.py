"""The only room that reads, exchanges or writes the memory of gradients; a GradScaler unscales them in torch's own way.

Doors, in the order of a step: `read.gradients_of`, `read.Meter`, `units.UnitMeter` and `entries` measure what this rank
holds, by the arithmetic of `norms`; `reduce` makes of it what all ranks know, by way of `ranks`, and `watch` looks at
those that exchange nothing; `write` changes it, and `versions` tells whether somebody else did; `moments` reads what
optimizers remember of gradients. `blocks` is how memory is read, `foreach` and `cuda` hold what torch has no public
name for.
"""
