"""What parameters are called: under every name that a module has for them, without what wrappers insert.

A module is asked again whenever it holds other tensors; pairs of names and parameters stay what they were when given.
"""

import inspect
import operator
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

# Names that torch.compile, FSDP, activation checkpointing and Fabric insert into a module's parameter names.
_WRAPPERS = re.compile(r"\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\.")
# What torch.nn.utils.parametrize makes of a parameter: the tensors that it is computed from, and those of the rule.
_PARAMETRIZED = re.compile(r"^(?:(?P<layer>.*?)\.)?parametrizations\.(?P<of>[^.]+)\.(?P<part>original\d*|\d+\..+)$")
# Its scopes in 0.1.0.
_PARAMETRIZED_BEFORE = re.compile(r"^(?:(?P<layer>.*?)\.)?parametrizations\.[^.]+(?P<part>\.original\d*|\.\d+\..+)?$")


@dataclass(frozen=True, slots=True, eq=False)
class Named:
    """A parameter and what it is called.

    Attributes:
        parameter: The parameter.
        name: Its own name.
        layer: That of the layer it belongs to.
        known_as: Every name that patterns may know it by.
    """

    parameter: Tensor
    name: str
    layer: str
    known_as: tuple[str, ...]


class Holder:
    """Whoever holds the parameters of a model: the module itself, or a list of pairs."""

    def __init__(self, given: Iterable[tuple[str, Tensor]] | nn.Module) -> None:
        self.module = given if isinstance(given, nn.Module) else _module_of(given)
        self._pairs = [*_pairs(given)] if self.module is None else []

    def named(self) -> dict[int, Named]:
        """Its parameters by their ids, each once, in order."""
        names: dict[int, list[str]] = {}
        tensors: dict[int, Tensor] = {}
        pairs = self._pairs if self.module is None else [*_pairs(self.module.named_parameters())]
        for name, parameter in pairs:
            names.setdefault(id(parameter), []).append(name)
            tensors[id(parameter)] = parameter
        clean = _cleaner([of_one[0] for of_one in names.values()])
        if self.module is not None:
            self._look(self.module)
            # Modules may override the method, which is about the first names; the base class tells the others too.
            for name, parameter in nn.Module.named_parameters(self.module, remove_duplicate=False):
                if id(parameter) in names:
                    names[id(parameter)].append(name)
        return {key: _named(tensors[key], of_one, clean) for key, of_one in names.items()}

    @property
    def has_changed(self) -> bool:
        """Whether the module holds other tensors, or has other parts, than when it was asked for their names."""
        if self.module is None:
            return False
        return not (
            all(map(operator.is_, map(dict[str, Any].get, self._owners, self._keys), self._tensors))
            and [*map(len, self._parameters)] == self._lengths
            and all(map(operator.eq, self._children, self._children_then))
        )

    def _look(self, module: nn.Module) -> None:
        # The public ways to these are generators, at microseconds for each module. Scripted modules keep no such
        # dictionaries, and have nothing that could be replaced.
        parts: list[Any] = [part for part in module.modules() if not isinstance(part, torch.jit.ScriptModule)]
        self._parameters: list[dict[str, Any]] = [part._parameters for part in parts]
        self._children: list[dict[str, Any]] = [part._modules for part in parts]
        places = [(held, key, value) for held in self._parameters for key, value in held.items()]
        self._owners, self._keys, self._tensors = zip(*places, strict=True) if places else ((), (), ())
        self._lengths, self._children_then = [*map(len, self._parameters)], [*map(dict[str, Any], self._children)]


def clean_names(names: Sequence[str]) -> list[str]:
    """Names without the prefixes that wrappers insert; names that would collide keep theirs."""
    return [*map(_cleaner(names), names)]


def _cleaner(names: Sequence[str]) -> Callable[[str], str]:
    """What makes clean names of these, and of others of the same module."""
    cleaned, wrapped = [_WRAPPERS.sub("", name) for name in names], 0
    # DataParallel wrappers put "module." before every name; a submodule called "module" does not.
    while cleaned and all(name.startswith("module.") for name in cleaned):
        cleaned, wrapped = [name.removeprefix("module.") for name in cleaned], wrapped + 1
    if len(set(cleaned)) < len(set(names)):
        return str

    def clean(name: str) -> str:
        name = _WRAPPERS.sub("", name)
        for _ in range(wrapped):
            name = name.removeprefix("module.")
        return name

    return clean


def _named(parameter: Tensor, names: Sequence[str], clean: Callable[[str], str]) -> Named:
    """The parameter with its first name as its own."""
    found = [_placed(clean(name)) for name in names]
    known_as = (*names, *map(clean, names), *(one for _, *both in found for one in both))
    layer, own, _ = found[0]
    return Named(parameter, own, layer, (*dict.fromkeys(known_as),))


def _placed(name: str) -> tuple[str, str, str]:
    """Layer and name of a parameter, and the name of the parameter that it is a part of, which is itself elsewhere.

    What stands for a parametrized weight is a part of that weight, and belongs to its layer.
    """
    parts = _PARAMETRIZED.match(name)
    if parts is None:
        return name.rpartition(".")[0] or "root", name, name
    whole = ".".join(filter(None, (parts["layer"], parts["of"])))
    own = whole if parts["part"] == "original" else f"{whole}.{parts['part']}"
    return parts["layer"] or "root", own, whole


def as_called_now(scopes: Sequence[str], now: Collection[str]) -> list[str]:
    """Names of scopes that 0.1.0 has saved, to which a parametrized weight was a layer of its own.

    What is one scope now and was several has nothing to go on with: its names are made such as no scope has.
    """
    parts = [None if name in now else _PARAMETRIZED_BEFORE.match(name) for name in scopes]
    found = [
        name if of is None else _placed(name)[1] if of["part"] else of["layer"] or "root"
        for name, of in zip(scopes, parts, strict=True)
    ]
    often = Counter(found)
    pairs = zip(scopes, found, strict=True)
    return [called if often[called] == 1 else f"{name} of an earlier release" for name, called in pairs]


def _module_of(given: object) -> nn.Module | None:
    """The module whose `named_parameters()` this is, where the generator says so; refused if it was begun before."""
    if not inspect.isgenerator(given):
        return None
    if inspect.getgeneratorstate(given) != inspect.GEN_CREATED:
        raise ValueError(
            "named_parameters is an iterator that was used before, so that its parameters are not there any more; "
            "write Clipper(model, ...) or Clipper(model.named_parameters(), ...)"
        )
    asked = inspect.getgeneratorlocals(given)
    if given.gi_code is not nn.Module.named_parameters.__code__ or asked["prefix"] or not asked["recurse"]:
        return None
    return asked["self"]


def _pairs(given: object) -> Iterable[tuple[str, Tensor]]:
    expected = "named_parameters must be pairs of name and parameter"
    remedy = "write Clipper(model.named_parameters(), ...)"
    if not isinstance(given, Iterable):
        raise TypeError(f"{expected}, got {given!r}; {remedy}")
    for pair in cast("Iterable[Any]", given):
        if isinstance(pair, Tensor) or not isinstance(pair[0], str):
            raise TypeError(f"{expected}, got a {type(pair).__name__}; {remedy}")
        yield pair
