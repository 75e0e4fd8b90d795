"""The only room that reads, exchanges or writes the memory of gradients.

Doors, in the order of a step: `read.Meter`, `units.UnitMeter` and `entries` measure what this rank holds, by the
arithmetic of `norms`; `ranks` makes of it what all ranks know; `write` changes it. `rows` is how memory is read,
`foreach` and `cuda` hold what torch has no public name for.
"""
