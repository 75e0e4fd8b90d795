"""The rules: how large each scope may be, one rule a file, and what rules remember and count with.

Door: `method.ClipMethod` and its subclasses. A method sees sizes and answers with limits; it knows no gradient.
"""
