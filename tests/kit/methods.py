"""Every clipping method, found by walking the package, with each of its scopes; one is made by its class alone."""

import dataclasses
import importlib
import inspect
import pkgutil
from collections.abc import Sequence
from itertools import product

import pytest
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from kit.gradients import SCOPES, normal, remembering, two_groups
from kit.running_max import RunningMax
from lightning_gradclip import ClipMethod, methods
from lightning_gradclip.act.policy import ACTIONS, NONFINITE

EVERY_MODULE = [name for _, name, _ in pkgutil.iter_modules(methods.__path__) if name != "method"]


def public_methods(module: str) -> list[type[ClipMethod]]:
    members = vars(importlib.import_module(f"{methods.__name__}.{module}")).values()
    classes = [one for one in members if inspect.isclass(one) and issubclass(one, ClipMethod)]
    return [one for one in classes if one.__module__.endswith(f".{module}") and not one.__name__.startswith("_")]


MODULES = [module for module in EVERY_MODULE if public_methods(module)]
FOUND = [cls for module in MODULES for cls in public_methods(module)]
# And one that learns, which third parties may write.
CLASSES = [*FOUND, RunningMax]
SUBJECTS = [(cls, per) for cls in CLASSES for per in cls.scopes]
LEARNERS = [(cls, per) for cls, per in SUBJECTS if cls.update is not ClipMethod.update]
# What these have clipped is within their limits.
LIMITERS = [(cls, per) for cls, per in SUBJECTS if (cls, per) not in LEARNERS and not cls().may_grow]
# Steps after which every method has learned a limit.
WARM_UP = 100
# To which scope each gradient belongs, where its rows are no scopes of their own.
SCOPE_OF = {**SCOPES, "unit": SCOPES["parameter"], "element": SCOPES["model"]}


def policies(cls: type[ClipMethod]) -> list[tuple[str, str]]:
    """Combinations of action and nonfinite that this method allows."""
    return [
        (action, nonfinite)
        for action, nonfinite in product(ACTIONS, NONFINITE)
        if not (action == "observe" and nonfinite in ("skip", "zero"))
        if not (action == "skip" and cls().may_grow)
    ]


every_method = pytest.mark.parametrize(("cls", "per"), SUBJECTS)
every_learner = pytest.mark.parametrize(("cls", "per"), LEARNERS)
every_case = pytest.mark.parametrize(
    ("cls", "per", "action", "nonfinite"), [(*one, *policy) for one in SUBJECTS for policy in policies(one[0])]
)
# For finite gradients, which `nonfinite` does not concern.
WITH_ACTIONS = [(*one, action) for one in SUBJECTS for action in dict(policies(one[0]))]
every_action = pytest.mark.parametrize(("cls", "per", "action"), WITH_ACTIONS)


def chooses_its_scope(cls: type[ClipMethod]) -> bool:
    return "per" in {field.name for field in dataclasses.fields(cls)}


def subject(cls: type[ClipMethod], per: str) -> ClipMethod:
    return cls(per=per) if chooses_its_scope(cls) else cls()


def optimizer_of(method: ClipMethod | None, pairs: Sequence[tuple[str, Parameter]]) -> Optimizer:
    """Two groups, under an optimizer that the method can do with."""
    return remembering(pairs) if method is not None and method.needs_moments else two_groups(pairs)


def mixed(seed: int) -> dict[str, Tensor]:
    """Gradients far over, near and far below any default limit."""
    gradients = normal(seed)
    for (name, gradient), exponent in zip(gradients.items(), (4, -9, 1, -4, 0), strict=True):
        gradients[name] = gradient * 10.0**exponent
    return gradients
