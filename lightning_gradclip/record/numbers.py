"""What the steps of a window come to, and the keys under which it is logged."""

from typing import NamedTuple


class WindowNumbers(NamedTuple):
    """What the steps of a window come to: metrics by name, and norms by measured scope."""

    metrics: dict[str, float]
    scope_norms: dict[str, float]

    def flat(self) -> dict[str, float]:
        """All in one."""
        return self.metrics | {f"norm/{scope}": norm for scope, norm in self.scope_norms.items()}

    def keyed(self, name: str, index: int | None = None) -> dict[str, float]:
        """All in one under the name of who logs them, by the index of an optimizer, if given.

        No key is a path that another goes on from, which to some stores would be a file and a folder: metrics begin
        with `name/`, norms of scopes with `name_norm/`.
        """
        part = "" if index is None else f"{index}/"
        # A layer of a ModuleDict may be called "a/b", beside another called "a".
        scopes = {f"{name}_norm/{part}{scope.replace('/', '-')}": norm for scope, norm in self.scope_norms.items()}
        return {f"{name}/{part}{metric}": value for metric, value in self.metrics.items()} | scopes
