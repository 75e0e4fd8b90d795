"""Which parameters a clipper serves, and what they are called."""

import difflib
import operator
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any, cast

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_gradclip.select import kinds, layout
from lightning_gradclip.select.layout import Layout
from lightning_gradclip.select.scopes import Scopes, Units

# Names that torch.compile, FSDP, activation checkpointing and Fabric insert into a module's parameter names.
_WRAPPERS = re.compile(r"\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\.")


@dataclass(frozen=True)
class Selection:
    """The parameters of one optimizer that match the patterns, each once, in the optimizer's order."""

    params: tuple[Tensor, ...]
    names: tuple[str, ...]  # wrapper prefixes stripped; "group0.3" for parameters outside the module
    groups: tuple[str, ...]  # for each parameter the name of its group
    owned: tuple[Tensor, ...]  # all parameters of the optimizer, selected or not
    layouts: tuple[Layout, ...]  # how each is laid out over the ranks
    by_group: tuple[tuple[Tensor, ...], ...]  # what the optimizer's groups held when it was asked

    def is_outdated(self, optimizer: Optimizer | None) -> bool:
        """Whether the optimizer has other parameters by now."""
        if optimizer is None:
            return False
        groups = optimizer.param_groups
        if len(groups) != len(self.by_group):
            return True
        for group, then in zip(groups, self.by_group, strict=True):
            now = group["params"]
            if len(now) != len(then) or not all(map(operator.is_, now, then)):
                return True
        return False

    @cached_property
    def is_distributed(self) -> bool:
        """Whether some parameter is a DTensor, whose gradient may be still to be added up."""
        return any(one.distributed for one in self.layouts)

    def scopes(self, per: str) -> Scopes:
        """The scopes of one kind, whichever gradients are present; refused if FSDP has joined what they are to part."""
        if per in ("model", "element"):
            return Scopes(("model",), (0,) * len(self.params))
        if per == "group":
            return Scopes.of(self.groups)
        joined = next((name for name, one in zip(self.names, self.layouts, strict=True) if one.joined), None)
        if joined is not None:
            raise ValueError(
                f"FSDP has joined several parameters into {joined!r}, so that there is nothing to tell each {per} by; "
                "wrap with use_orig_params=True, or use per='model' or 'group'"
            )
        return Scopes.of([name.rpartition(".")[0] or "root" if per == "layer" else name for name in self.names])

    def units(self) -> Units:
        """The output units of all parameters; refused if FSDP has cut through them."""
        cut = next((name for name, one in zip(self.names, self.layouts, strict=True) if one.flattened), None)
        if cut is not None:
            raise ValueError(
                f"FSDP has cut parameter {cut!r} without regard to its rows, so that no rank can measure its output "
                "units; shard with FSDP2 (torch.distributed.fsdp.fully_shard, in Lightning "
                "ModelParallelStrategy), or use per='parameter'"
            )
        return Units(self.names, self.params)


class Names:
    """The parameters of a module by identity: what they are called, and which patterns admit them.

    Patterns that match nothing are refused if these parameters are `complete`, else kept as `unmatched`.
    Without `scale_free` those are left out that an optimizer steps by the direction of their gradient alone.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, Tensor]] | nn.Module,
        include: Sequence[str] = ("*",),
        exclude: Sequence[str] = (),
        *,
        complete: bool = True,
        scale_free: bool = True,
    ) -> None:
        self._scale_free = scale_free
        self._module = named_parameters if isinstance(named_parameters, nn.Module) else None
        given = named_parameters if self._module is None else self._module.named_parameters()
        # The tensors are kept so that their identities stay theirs.
        self._tensors: dict[int, Tensor] = {}
        self._raw: dict[int, str] = {}
        for name, parameter in _pairs(given):
            self._tensors[id(parameter)] = parameter
            self._raw.setdefault(id(parameter), name)
        self._clean = dict(zip(self._raw, clean_names(list(self._raw.values())), strict=True))
        self._include, self._exclude = tuple(include), tuple(exclude)
        self._complete = complete
        # Where other ranks hold other parameters, what is wrong here may be right by those.
        self.unmatched: dict[str, str] = {}
        for option, patterns in (("include", self._include), ("exclude", self._exclude)):
            for pattern in patterns:
                self._require_match(option, pattern)

    def select(self, optimizer: Optimizer | None) -> Selection:
        """The parameters of the optimizer, or without one of the module, that the patterns admit."""
        groups = [{"params": self._tensors.values()}] if optimizer is None else optimizer.param_groups
        labels = _group_names(groups)
        free = {} if optimizer is None or self._scale_free else kinds.scale_free(optimizer)
        chosen: dict[int, tuple[Tensor, str, str]] = {}
        owned: dict[int, Tensor] = {}
        for position, (group, label) in enumerate(zip(groups, labels, strict=True)):
            for i, parameter in enumerate(group["params"]):
                owned[id(parameter)] = parameter
                name = self._clean.get(id(parameter), f"group{position}.{i}")
                if id(parameter) in free or id(parameter) in chosen:
                    continue
                if self._admits(name, self._raw.get(id(parameter), name)):
                    chosen[id(parameter)] = (parameter, name, label)
        self.unmatched.pop("all", None)
        if not chosen and owned and not any(self._admits(self._clean[key], name) for key, name in self._raw.items()):
            said = f"include={list(self._include)!r} and exclude={list(self._exclude)!r} leave no parameter to clip; "
            self._refuse("all", f"{said}include='*' and exclude=[] admit all")
        params, names, of_group = zip(*chosen.values(), strict=True) if chosen else ((), (), ())
        by_group = tuple(tuple(group["params"]) for group in groups)
        layouts = layout.layouts(names, params, self._module)
        return Selection(params, names, of_group, tuple(owned.values()), layouts, by_group)

    def _admits(self, *names: str) -> bool:
        return _matches(names, self._include) and not _matches(names, self._exclude)

    def _require_match(self, option: str, pattern: str) -> None:
        every = [*self._clean.values(), *self._raw.values()]
        if pattern == "*" or _matches(every, (pattern,)):
            return
        known = list(dict.fromkeys(self._clean.values()))
        closest = difflib.get_close_matches(pattern, known, n=3, cutoff=0.3) or known[:3]
        listed = ", ".join(closest) or "there are no named parameters"
        begun = f"{pattern.rstrip('.')}.*"
        perhaps = f"; did you mean {begun!r}?" if _matches(known, (begun,)) else ""
        example = f"{closest[0].partition('.')[0]}.*" if closest and "." in closest[0] else "*weight"
        said = f"{option}={pattern!r}"
        self._refuse(
            said,
            f"{said} matches no parameter; the closest names are: {listed}. "
            f"Patterns are shell patterns over whole names, such as {example!r}{perhaps}",
        )

    def _refuse(self, what: str, said: str) -> None:
        if self._complete:
            raise ValueError(said)
        self.unmatched[what] = said


def _pairs(given: object) -> Iterable[tuple[str, Tensor]]:
    expected = "named_parameters must be pairs of name and parameter"
    remedy = "write Clipper(model.named_parameters(), ...)"
    if not isinstance(given, Iterable):
        raise TypeError(f"{expected}, got {given!r}; {remedy}")
    for pair in cast("Iterable[Any]", given):
        if isinstance(pair, Tensor) or not isinstance(pair[0], str):
            raise TypeError(f"{expected}, got a {type(pair).__name__}; {remedy}")
        yield pair


def clean_names(names: Sequence[str]) -> list[str]:
    """Names without the prefixes that wrappers insert; names that would collide keep theirs."""
    cleaned = [_WRAPPERS.sub("", name) for name in names]
    # DataParallel wrappers put "module." before every name; a submodule called "module" does not.
    while cleaned and all(name.startswith("module.") for name in cleaned):
        cleaned = [name.removeprefix("module.") for name in cleaned]
    return cleaned if len(set(cleaned)) == len(set(names)) else list(names)


def _matches(names: Iterable[str], patterns: Sequence[str]) -> bool:
    return any(name == pattern or fnmatchcase(name, pattern) for name in names for pattern in patterns)


def _group_names(groups: Sequence[Mapping[str, Any]]) -> list[str]:
    names = [str(group.get("name", f"group{i}")) for i, group in enumerate(groups)]
    return names if len(set(names)) == len(names) else [f"group{i}" for i in range(len(groups))]
