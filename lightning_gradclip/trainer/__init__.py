"""Everything that knows Lightning: conflicts, DeepSpeed, logging and recording for the callback.

Doors, through which the callback alone comes: `conflicts` and `takeover` before a fit, `clippers`, `deepspeed`,
`progress` and `watch` at its steps, `reach` for others meanwhile, `log` and `record` after them, `closing` at the end,
and `lightning` where Lightning itself is asked. `doctor` is a callback of its own.
"""
