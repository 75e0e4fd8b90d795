"""The only room that reads, exchanges or writes the memory of gradients.

Doors, in the order of a step: `read.Meter`, `units.UnitMeter` and `entries` measure what this rank holds; `ranks`
makes of it what all ranks know; `write` changes it. `norms` is the arithmetic that they share, `foreach` and `cuda`
hold what torch has no public name for.
"""
