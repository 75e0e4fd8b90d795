"""Which parameters are served, what they are called, which of them share a limit, and how ranks hold them.

Doors: `parameters.Names` finds a `Selection` for an optimizer; `groups` recognises optimizers by their parameters;
`names` knows what scopes were called before; `scopes` says where to measure; `layout` is asked how a tensor lies over
the ranks, `holders` which ranks hold the same, `kinds` which parameters an optimizer steps without regard to the size
of a gradient. Knows torch and nothing else of this package.
"""
