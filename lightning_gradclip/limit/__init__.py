"""From sizes and a rule to limits and coefficients: all that is known of a step before anything is done about it.

Doors: `kinds` chooses a `limiter.Limiter`, whose `judge` gives an `Outcome` and whose `learn` lets the method remember
a step; `units`, `entries` and `spikes` are for scopes smaller than a parameter; `expected` is what optimizers know of
gradients; `learned` says whether a checkpoint fits the method; `noted.Observer` for what a history is told of it.
"""
