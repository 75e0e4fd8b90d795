"""The rules: how large each scope may be, one rule a file, and what rules remember and count with.

Doors: `method.ClipMethod` and its subclasses, and `numbers`, by which rules count. A method answers sizes with limits.
"""
