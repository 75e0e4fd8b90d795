"""Choose every option of the pack after every other one, for which something was set, and print what went wrong.

Needs nothing but Hydra and the pack. The doors by which the first option's setting comes: the primary file, an
experiment, the command line, a sweep. Twelve places in one composition are as many pairs.
"""

import sys
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import ConfigCompositionException
from hydra.types import RunMode
from omegaconf import OmegaConf

GROUP = "callbacks/gradclip"


class Pairs:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.wrong: list[str] = []
        self.seen = 0
        self.write("plain", {})
        options = GlobalHydra.instance().config_loader().get_group_options(GROUP)
        line = [f"+{GROUP}@{name}={name}" for name in options]
        composed = OmegaConf.to_container(compose("plain", line))
        self.methods = {name: composed[name]["method"] for name in options}

    def write(self, name: str, content: dict, header: str = "") -> None:
        file = self.folder / f"{name}.yaml"
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"{header}\n{OmegaConf.to_yaml(OmegaConf.create(content))}")

    def setting(self, first: str) -> tuple[str, object]:
        """An argument of the first option's method, and a value that no option has; none where there is no method."""
        for key, value in (self.methods[first] or {}).items():
            if isinstance(value, float):
                return key, value / 2 + 0.015625
        return "", None

    def others(self, first: str) -> list[str]:
        return [name for name in self.methods if name != first]

    def check(self, door: str, first: str, second: str, got: object, expected: object) -> None:
        self.seen += 1
        if got != expected:
            self.wrong.append(f"{door}: {first}, then {second}: {got}")

    def from_files(self, door: str, first: str) -> None:
        """The first option is chosen and set in a file, the others on the command line."""
        key, value = self.setting(first)
        settings = {name: {"method": {key: value} if key else None} for name in self.others(first)}
        word = "override " if door == "experiment" else ""
        choices = [{f"{word}/{GROUP}@{name}": first} for name in settings]
        if door == "experiment":
            base = [{f"{GROUP}@{name}": "ema" if first != "ema" else "agc"} for name in settings]
            self.write("main", {"defaults": ["_self_", *base, {"experiment": "tuned"}]})
            self.write("experiment/tuned", {"defaults": choices, **settings}, "# @package _global_")
        else:
            self.write("main", {"defaults": [*choices, "_self_"], **settings})
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            composed = OmegaConf.to_container(compose("main", [f"{GROUP}@{name}={name}" for name in settings]))
        said = [str(warning.message) for warning in caught]
        for name in settings:
            line = f"{name}.method.{key}={value} in " if key else f"{name}.method=null in "
            told = any(one.startswith(line) and f"meant for {GROUP}={first} " in one for one in said)
            self.check(door, first, name, (composed[name]["method"], told), (self.methods[name], True))

    def from_the_command_line(self, first: str) -> None:
        """What is set beside a choice is set for that option: it has the argument, or this is an error."""
        key, value = self.setting(first)
        self.write("main", {"defaults": [{f"{GROUP}@place": first}, "_self_"]})
        for name in self.others(first) if key else ():
            try:
                line = [f"{GROUP}@place={name}", f"place.method.{key}={value}"]
                got = OmegaConf.to_container(compose("main", line))["place"]["method"]
            except ConfigCompositionException:
                got = None
            method = self.methods[name] or {}
            self.check("command line", first, name, got, {**method, key: value} if key in method else None)

    def from_a_sweep(self, first: str) -> None:
        key, value = self.setting(first)
        self.write("main", {"defaults": [{f"{GROUP}@place": first}, "_self_"]})
        line = [f"{GROUP}@place={','.join(self.methods)}", f"place.method.{key}={value}"]
        try:
            if key:
                GlobalHydra.instance().config_loader().load_configuration("main", line, RunMode.MULTIRUN)
                self.wrong.append(f"sweep: {first}")
        except ConfigCompositionException as error:
            self.check(
                "sweep", first, "all", f"{line[1]} would be set for each option of {line[0]}" in str(error), True
            )


def main() -> None:
    with TemporaryDirectory() as folder, initialize_config_dir(folder, version_base="1.3"):
        pairs = Pairs(Path(folder))
        for first in pairs.methods:
            pairs.from_files("file", first)
            pairs.from_files("experiment", first)
            pairs.from_the_command_line(first)
            pairs.from_a_sweep(first)
    print(*pairs.wrong, f"{len(pairs.methods)} options, {pairs.seen} checks", sep="\n")
    sys.exit(bool(pairs.wrong))


if __name__ == "__main__":
    main()
