"""Which parameters a clipper serves, and what they are called."""

import difflib
import operator
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_gradclip.select import kinds, layout
from lightning_gradclip.select.groups import Groups
from lightning_gradclip.select.layout import Layout
from lightning_gradclip.select.names import Holder, Named
from lightning_gradclip.select.scopes import Scopes, Units


@dataclass(frozen=True)
class Selection:
    """The parameters of one optimizer that match the patterns, each once, in the optimizer's order."""

    params: tuple[Tensor, ...]
    names: tuple[str, ...]  # wrapper prefixes stripped; "group0.3" for parameters outside the module
    layers: tuple[str, ...]  # for each parameter the name of its layer
    groups: tuple[str, ...]  # for each parameter the label of its group
    owned: tuple[Tensor, ...]  # all parameters of the optimizer, selected or not
    layouts: tuple[Layout, ...]  # how each is laid out over the ranks
    by_group: tuple[tuple[Tensor, ...], ...]  # what the optimizer's groups held when it was asked
    strangers: tuple[Named, ...] = ()  # those of them that nobody has named
    nameless: tuple[str, ...] = ()  # which of several groups nothing but its place tells from others

    def is_same(self, other: "Selection") -> bool:
        """Whether nothing has changed: the same tensors in the same groups, called and laid out alike."""
        about = operator.attrgetter("names", "layers", "groups", "layouts", "nameless")
        groups = zip(self.by_group, other.by_group, strict=False)
        return (
            _are(self.params, other.params)
            and len(self.by_group) == len(other.by_group)
            and all(_are(now, then) for now, then in groups)
            and about(self) == about(other)
        )

    def is_outdated(self, optimizer: Optimizer | None) -> bool:
        """Whether the optimizer has other parameters by now."""
        if optimizer is None:
            return False
        groups = optimizer.param_groups
        if len(groups) != len(self.by_group):
            return True
        return not all(_are(group["params"], then) for group, then in zip(groups, self.by_group, strict=True))

    @cached_property
    def is_distributed(self) -> bool:
        """Whether some parameter is a DTensor, whose gradient may be still to be added up."""
        return any(one.distributed for one in self.layouts)

    def scopes(self, per: str) -> Scopes:
        """The scopes of one kind, whichever gradients are present.

        Raises:
            ValueError: If parameters, or groups, have no names of their own to tell the scopes by, or FSDP has joined
                what they are to part.
        """
        if per in ("model", "element"):
            return Scopes(("model",), (0,) * len(self.params))
        if per == "group":
            self._require_groups()
            return Scopes.of(self.groups)
        self._require_names(per)
        joined = next((name for name, one in zip(self.names, self.layouts, strict=True) if one.joined), None)
        if joined is not None:
            raise ValueError(
                f"FSDP has joined several parameters into {joined!r}, so that there is nothing to tell each {per} by; "
                "wrap with use_orig_params=True, or use per='model' or 'group'"
            )
        return Scopes.of(self.layers if per == "layer" else self.names)

    def units(self) -> Units:
        """The output units of all parameters; refused as `scopes`, or if FSDP has cut through them."""
        self._require_names("unit")
        self.require_rows("measure its output units", "use per='parameter'")
        return Units(self.names, self.params)

    def require_rows(self, purpose: str, remedy: str) -> None:
        """Refuse parameters that FSDP has cut through their rows, for which no rank could do this."""
        cut = next((name for name, one in zip(self.names, self.layouts, strict=True) if one.flattened), None)
        if cut is not None:
            raise ValueError(
                f"FSDP has cut parameter {cut!r} without regard to its rows, so that no rank can {purpose}; shard with "
                f"FSDP2 (torch.distributed.fsdp.fully_shard, in Lightning ModelParallelStrategy), or {remedy}"
            )

    def without_gradients(self) -> str:
        """What is to be said where none of the parameters has one."""
        return (
            f"none of the {len(self.params)} parameters has a gradient, so that nothing was clipped; call step() after "
            "backward(), and where the model has replaced its parameters since it named them, as "
            "load_state_dict(assign=True) and fully_shard do, give it the model: Clipper(model, ...)"
        )

    def _require_names(self, per: str) -> None:
        if self.strangers:
            raise ValueError(_unnamed(self.strangers, f"per={per!r} needs", "per='model'"))
        if twice := next((name for name, often in Counter(self.names).items() if often > 1), None):
            raise ValueError(
                f"two parameters are both called {twice!r}, so that there is no telling one {per} from another; give "
                "each a name of its own, such as the module's that holds both models"
            )

    def _require_groups(self) -> None:
        if self.nameless:
            raise ValueError(
                f"parameter group {self.nameless[0]!r} has no name, and neither have its parameters, so that "
                "per='group' would know it by its place only; give it one: {'params': ..., 'name': 'extra'}"
            )


class Names:
    """The parameters of a module by identity: what they are called, and which patterns admit them.

    A module is asked again when it holds other tensors by now. Patterns that match nothing are refused if these
    parameters are `complete`, else kept as `unmatched`.
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
        self._holder = Holder(named_parameters)
        self._known = self._holder.named()
        # What the optimizer holds and the module has replaced.
        self._replaced: dict[int, Named] = {}
        self.groups = Groups()
        self._include, self._exclude = tuple(include), tuple(exclude)
        self._complete = complete
        # Where other ranks hold other parameters, what is wrong here may be right by those.
        self.unmatched: dict[str, str] = {}
        self._admits_all = "*" in self._include and not self._exclude
        for option, patterns in (("include", self._include), ("exclude", self._exclude)):
            for pattern in patterns:
                self._require_match(option, pattern)

    @property
    def has_changed(self) -> bool:
        """Whether the module holds other tensors than when it was asked."""
        return self._holder.has_changed

    @property
    def follows(self) -> bool:
        """Whether there is a module to be asked, whose tensors may be replaced."""
        return self._holder.module is not None

    def of(self, optimizer: Optimizer | None) -> list[str]:
        """The names of the parameters of an optimizer, without one of all, whether the patterns admit them or not."""
        return [name for members in self._members(self._groups_of(optimizer)) for name in members]

    def require_any(self, optimizer: Optimizer | None) -> None:
        """Refuse names that are none, or none of the optimizer's."""
        if not self._known:
            module = self._holder.module
            raise ValueError(
                f"{'no parameters were given' if module is None else f'{type(module).__name__} has no parameters'}, so "
                "that there is nothing to clip (an iterator that was used before is empty); write Clipper(model, ...)"
            )
        if (
            optimizer is not None
            and any(group["params"] for group in optimizer.param_groups)
            and not self.of(optimizer)
        ):
            raise ValueError(
                f"none of the parameters of {type(optimizer).__name__} is among those that were named, of which the "
                f"first is {next(iter(self._known.values())).name!r}; give the model that this optimizer trains"
            )

    def select(self, optimizer: Optimizer | None) -> Selection:
        """The parameters of the optimizer, or without one of the module, that the patterns admit.

        Raises:
            RuntimeError: If the module has replaced all that the optimizer holds.
            ValueError: If no parameter is admitted, or one has no name for the patterns to match.
        """
        if self._holder.has_changed:
            self._read(optimizer)
        groups = self._groups_of(optimizer)
        members = self._members(groups)
        labels = self.groups.labels([group.get("name") for group in groups], members)
        found = self._found(groups, labels)
        free = {} if optimizer is None or self._scale_free else kinds.scale_free(optimizer)
        served = [one for key, one in found.items() if key not in free]
        chosen = [(named, label) for named, label in served if self._admits(named)]
        self.unmatched.pop("all", None)
        if not chosen and found and not any(map(self._admits, self._known.values())):
            said = f"include={list(self._include)!r} and exclude={list(self._exclude)!r} leave no parameter to clip; "
            self._refuse("all", f"{said}include='*' and exclude=[] admit all")
        params, names = (tuple(getattr(named, of) for named, _ in chosen) for of in ("parameter", "name"))
        of_groups = zip(labels, groups, members, strict=True)
        nameless = [label for label, group, held in of_groups if not held and label != str(group.get("name"))]
        owned = {id(parameter): parameter for group in groups for parameter in group["params"]}
        return Selection(
            params=params,
            names=names,
            layers=tuple(named.layer for named, _ in chosen),
            groups=tuple(label for _, label in chosen),
            owned=tuple(owned.values()),
            layouts=layout.layouts(names, params, self._holder.module),
            by_group=tuple(tuple(group["params"]) for group in groups),
            strangers=tuple(named for named, _ in chosen if not named.known_as),
            nameless=tuple(nameless) if len(groups) > 1 else (),
        )

    def _groups_of(self, optimizer: Optimizer | None) -> Sequence[Mapping[str, Any]]:
        everything = [{"params": [named.parameter for named in self._known.values()]}]
        return everything if optimizer is None else optimizer.param_groups

    def _members(self, groups: Sequence[Mapping[str, Any]]) -> list[list[str]]:
        """The names of the parameters in each group, of those that have one."""
        known = self._known
        return [[known[id(one)].name for one in group["params"] if id(one) in known] for group in groups]

    def _found(self, groups: Sequence[Mapping[str, Any]], labels: Sequence[str]) -> dict[int, tuple[Named, str]]:
        """By id the parameters that the groups hold, each once, with the label of the group."""
        found: dict[int, tuple[Named, str]] = {}
        for place, (group, label) in enumerate(zip(groups, labels, strict=True)):
            for i, parameter in enumerate(group["params"]):
                if id(parameter) not in self._replaced:
                    named = self._known.get(id(parameter)) or Named(parameter, f"group{place}.{i}", "", ())
                    found.setdefault(id(parameter), (named, label))
        if self._replaced and not found:
            raise RuntimeError(
                f"the model has replaced {_listed(self._replaced.values())}, all that the optimizer holds, as "
                "load_state_dict(assign=True) and fully_shard do, so that no step changes it any more; make the "
                "optimizer, and its clipper, after that"
            )
        strangers = [named for named, _ in found.values() if not named.known_as]
        if strangers and not self._admits_all:
            raise ValueError(_unnamed(strangers, "include and exclude need", "include='*' and exclude=[]"))
        return found

    def _read(self, optimizer: Optimizer | None) -> None:
        """Ask the module again, and note what it has replaced of what the optimizer still holds."""
        before, self._known = self._known, self._holder.named()
        gone, seen = {**self._replaced, **before}, self._replaced
        held = [] if optimizer is None else [id(one) for group in optimizer.param_groups for one in group["params"]]
        self._replaced = {key: gone[key] for key in held if key in gone and key not in self._known}
        if self._replaced.keys() - seen.keys() and any(key in self._known for key in held):
            warnings.warn(
                f"{type(optimizer).__name__} still holds {_listed(self._replaced.values())}, which the model has "
                "replaced: they are not clipped any more; give the optimizer what took their place",
                RuntimeWarning,
                stacklevel=2,
            )

    def _admits(self, named: Named) -> bool:
        if self._admits_all:
            return True
        return _matches(named.known_as, self._include) and not _matches(named.known_as, self._exclude)

    def _require_match(self, option: str, pattern: str) -> None:
        every = (name for named in self._known.values() for name in named.known_as)
        if pattern == "*" or _matches(every, (pattern,)):
            return
        known = list(dict.fromkeys(named.name for named in self._known.values()))
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


def _are(now: Sequence[Tensor], then: Sequence[Tensor]) -> bool:
    """Whether these are the same tensors."""
    return len(now) == len(then) and all(map(operator.is_, now, then))


def _matches(names: Iterable[str], patterns: Sequence[str]) -> bool:
    return any(name == pattern or fnmatchcase(name, pattern) for name in names for pattern in patterns)


def _listed(some: Iterable[Named]) -> str:
    """Some parameters in words."""
    described = [f"{named.name} of shape {tuple(named.parameter.shape)}" for named in some]
    return ", ".join(described[:3]) + (f" and {len(described) - 3} more" if len(described) > 3 else "")


def _unnamed(strangers: Sequence[Named], need: str, instead: str) -> str:
    """Why parameters of the optimizer that were not named will not do."""
    return (
        f"{need} the names of all parameters, but the optimizer holds some that were not named: {_listed(strangers)}; "
        "name them too, as in Clipper([*model.named_parameters(), ('extra', parameter)], ...) or by making them "
        f"parameters of the module, or use {instead}"
    )
