"""The rules: how large each scope may be, one rule a file, and what rules remember and count with.

Doors: `method.ClipMethod` and its subclasses, and `numbers`, by which rules count. A method answers sizes with limits.
"""

from importlib import import_module
from pkgutil import iter_modules

# LightningCLI finds a method by its short name among the subclasses that exist.
for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
