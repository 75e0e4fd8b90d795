"""What an application gets for what it has chosen: the rules and tables of docs/hydra.md, composed in this process.

`kit/command_lines.py` tries them as command lines, in every kind of installation.
"""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import ConfigCompositionException
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from kit.root import ROOT
from lightning_gradclip.hydra.structured import GradclipConf

AGC = "{_target_: lightning_gradclip.AGC, clip_factor: 0.02}"


def write(folder: Path, texts: dict[str, str]) -> None:
    for name, text in texts.items():
        file = folder / f"{name}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


def composed(folder: Path, *overrides: str) -> DictConfig:
    with initialize_config_dir(str(folder), version_base="1.3"):
        return compose("train", list(overrides))


# The table in docs/hydra.md, for an application whose default is a skipping callback, beside another callback.
OFF = [
    (
        "callbacks/gradclip=monitor",
        {"_target_": "lightning_gradclip.GradientClipping", "method": None, "action": "clip"},
    ),
    ("callbacks/gradclip=none", {"_target_": "lightning_gradclip.hydra.none.no_clipping", "method": None}),
    ("callbacks.gradclip.method=null", {"_target_": "lightning_gradclip.GradientClipping", "method": None}),
    ("~callbacks/gradclip", None),
    ("~callbacks.gradclip", None),
    ("callbacks=null", None),
]


@pytest.mark.parametrize(("line", "left"), OFF)
def test_every_way_to_switch_off(tmp_path: Path, line: str, left: dict[str, object] | None) -> None:
    write(tmp_path, {"train": "defaults: [callbacks/gradclip: norm, _self_]\nseed: 1\n"})
    node = (composed(tmp_path, line).get("callbacks") or {}).get("gradclip")
    assert node == left if left is None else {key: node[key] for key in left} == left
    assert f"| `{line}`" in (ROOT / "docs" / "hydra.md").read_text()


def test_the_applications_own_option_none_leaves_clipping_on(tmp_path: Path) -> None:
    defaults = "defaults: [callbacks: default, callbacks/gradclip: norm, _self_]\n"
    write(tmp_path, {"train": defaults, "callbacks/default": "checkpoint: {a: 1}\n", "callbacks/none": "{}\n"})
    callbacks = composed(tmp_path, "callbacks=none").callbacks
    assert list(callbacks) == ["gradclip"]
    assert callbacks.gradclip.method._target_ == "lightning_gradclip.NormClip"


@dataclasses.dataclass
class AnyCallbacks:
    callbacks: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Checkpoint:
    checkpoint: Any = None


@dataclasses.dataclass
class Fields:
    checkpoint: Any = None
    gradclip: Any = None


@dataclasses.dataclass
class WithField:
    callbacks: Fields = dataclasses.field(default_factory=Fields)


@dataclasses.dataclass
class Exported:
    gradclip: GradclipConf | None = None  # type: ignore[valid-type]


@dataclasses.dataclass
class WithType:
    callbacks: Exported = dataclasses.field(default_factory=Exported)


@dataclasses.dataclass
class NoField:
    callbacks: Checkpoint = dataclasses.field(default_factory=Checkpoint)


@dataclasses.dataclass
class Listed:
    callbacks: list[Any] = dataclasses.field(default_factory=list)


@pytest.mark.parametrize("schema", [AnyCallbacks, WithField, WithType])
def test_a_configuration_with_types_has_room_for_an_option(tmp_path: Path, schema: type) -> None:
    ConfigStore.instance().store(schema.__name__, schema)
    write(tmp_path, {"train": f"defaults: [{schema.__name__}, callbacks/gradclip: norm, _self_]\n"})
    cfg = composed(tmp_path, "callbacks/gradclip=value", "callbacks.gradclip.method.max_value={0: 1, 5: 2}")
    assert instantiate(cfg.callbacks.gradclip).method.max_value == {0: 1.0, 5: 2.0}
    with pytest.raises(ConfigCompositionException, match=r"To append to your config use \+callbacks.gradclip.actoin=1"):
        composed(tmp_path, "callbacks.gradclip.actoin=1")


def test_the_exported_type_knows_the_keys_in_files(tmp_path: Path) -> None:
    ConfigStore.instance().store("with_type", WithType)
    settings = "callbacks: {gradclip: {actoin: skip}}\n"
    write(tmp_path, {"train": f"defaults: [with_type, callbacks/gradclip: norm, _self_]\n{settings}"})
    with pytest.raises(ConfigCompositionException, match="Key 'actoin' not in 'GradclipConf'"):
        composed(tmp_path)
    write(tmp_path, {"train": "defaults: [with_type, callbacks/gradclip: norm, _self_]\n"})
    for option in ("monitor", "none", "adagc"):
        typed = OmegaConf.to_container(composed(tmp_path, f"callbacks/gradclip={option}").callbacks.gradclip)
        write(tmp_path, {"plain": yaml.safe_dump({"defaults": [{"callbacks/gradclip": option}, "_self_"]})})
        with initialize_config_dir(str(tmp_path), version_base="1.3"):
            assert typed == OmegaConf.to_container(compose("plain").callbacks.gradclip)
    assert composed(tmp_path, "~callbacks/gradclip").callbacks.gradclip is None


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        (NoField, "callbacks in 'NoField' is a Checkpoint without 'gradclip'; write gradclip: Any = None in it"),
        (
            Listed,
            "callbacks in 'Listed' is a list without 'gradclip'; choose another place, +callbacks/gradclip@gradclip=",
        ),
    ],
)
def test_a_configuration_with_types_without_room_is_told_how_to_make_some(schema: type, said: str) -> None:
    ConfigStore.instance().store(schema.__name__, schema)
    with initialize(config_path=None, version_base="1.3"), pytest.raises(ConfigCompositionException) as failure:
        compose(schema.__name__, ["+callbacks/gradclip=norm"])
    assert said in str(failure.value)


def test_a_method_with_a_target_of_its_own_replaces_the_options(tmp_path: Path) -> None:
    write(tmp_path, {"train": "seed: 1\n", "callbacks/gradclip/own": f"defaults: [norm, _self_]\nmethod: {AGC}\n"})
    method = {"_target_": "lightning_gradclip.AGC", "clip_factor": 0.02}
    assert composed(tmp_path, "+callbacks/gradclip=own").callbacks.gradclip.method == method
    line = f"callbacks.gradclip.method={AGC}"
    assert composed(tmp_path, "+callbacks/gradclip=norm", line).callbacks.gradclip.method == method


def test_a_target_on_the_command_line_takes_the_place_of_the_method_with_its_settings(tmp_path: Path) -> None:
    write(tmp_path, {"train": "defaults: [callbacks/gradclip: norm, _self_]\n"})
    target, key = (
        "callbacks.gradclip.method._target_=lightning_gradclip.ZClip",
        "callbacks.gradclip.method.z_threshold=3",
    )
    for line in ([target, key], [key, target], [target, f"+{key}"]):
        method = composed(tmp_path, "callbacks.gradclip.action=skip", *line).callbacks.gradclip.method
        assert method == {"_target_": "lightning_gradclip.ZClip", "z_threshold": 3}


@pytest.mark.parametrize("inside", ["", ".method", ".method.max_norm"])
def test_a_file_of_another_group_sets_for_the_option_that_it_is_written_for(tmp_path: Path, inside: str) -> None:
    """Wherever its package lies."""
    held: Any = {"method": {"max_norm": {0: 2.0, 10: 1.0}}}
    for key in inside.split(".")[1:]:
        held = held[key]
    text = f"# @package callbacks.gradclip{inside}\n{yaml.safe_dump(held)}"
    defaults = "defaults: [callbacks/gradclip: norm, tuned: a, _self_]\n"
    write(tmp_path, {"train": defaults, "tuned/a": text})
    assert composed(tmp_path).callbacks.gradclip.method.max_norm == {0: 2.0, 10: 1.0}
    with pytest.warns(
        UserWarning, match=r"max_norm=\{0:2.0,10:1.0\} in 'tuned/a' is meant for callbacks/gradclip=norm"
    ):
        assert composed(tmp_path, "callbacks/gradclip=zclip").callbacks.gradclip.method.max_norm is None


def test_a_file_at_two_places_belongs_to_each(tmp_path: Path) -> None:
    own = "defaults: [norm, _self_]\nmethod: {_target_: lightning_gradclip.AGC}\n"
    both = "defaults: [callbacks/gradclip@a: norm, callbacks/gradclip@b: norm, tuned@a: s, tuned@b: s, _self_]\n"
    write(tmp_path, {"train": both, "tuned/s": "method: {max_norm: 0.25}\n", "callbacks/gradclip/own": own})
    with pytest.warns(UserWarning, match=r"^a.method.max_norm=0.25 in 'tuned/s' is meant for callbacks/gradclip=norm"):
        cfg = composed(tmp_path, "callbacks/gradclip@a=zclip")
    assert (cfg.a.method.max_norm, cfg.b.method.max_norm) == (None, 0.25)
    write(tmp_path, {"train": "{}\n"})
    cfg = composed(tmp_path, "+callbacks/gradclip@a=own", "+callbacks/gradclip@b=norm")
    assert cfg.a.method == {"_target_": "lightning_gradclip.AGC"}
    assert cfg.b.method.max_norm == 1.0


def test_a_schedule_in_a_later_file_replaces_the_one_before(tmp_path: Path) -> None:
    first = "defaults: [norm, _self_]\nmethod: {max_norm: {0: 10, 1000: 1}}\n"
    second = "defaults: [first, _self_]\nmethod: {max_norm: {'0': 5, '500': 1}}\n"
    write(tmp_path, {"train": "seed: 1\n", "callbacks/gradclip/first": first, "callbacks/gradclip/second": second})
    assert composed(tmp_path, "+callbacks/gradclip=second").callbacks.gradclip.method.max_norm == {0: 5, 500: 1}


def test_a_file_without_a_choice_is_written_for_the_applications_default(tmp_path: Path) -> None:
    """And one that is built on a file with a choice, or a part of one, for that."""
    settings = "callbacks: {gradclip: {method: {per: layer}}}\n"
    choice = "override /callbacks/gradclip: zclip"
    files = {
        "train": "defaults: [callbacks/gradclip: norm, optional experiment: null, _self_]\n",
        "experiment/plain": f"# @package _global_\n{settings}",
        "experiment/base": f"# @package _global_\ndefaults: [{choice}]\n",
        "experiment/built": f"# @package _global_\ndefaults: [base, _self_]\n{settings}",
        "experiment/parted": f"# @package _global_\ndefaults: [plain, {choice}]\n",
    }
    write(tmp_path, files)
    for experiment, option in (("plain", "norm"), ("built", "zclip"), ("parted", "zclip")):
        assert composed(tmp_path, f"experiment={experiment}").callbacks.gradclip.method.per == "layer"
        said = (
            f"in 'experiment/(plain|built)' is meant for callbacks/gradclip={option} and left out, since ema is chosen"
        )
        with pytest.warns(UserWarning, match=said):
            cfg = composed(tmp_path, f"experiment={experiment}", "callbacks/gradclip=ema")
        assert cfg.callbacks.gradclip.method.per == "model"


def test_settings_for_no_option_are_for_the_one_that_is_chosen(tmp_path: Path) -> None:
    write(tmp_path, {"train": "defaults: [_self_]\ncallbacks: {gradclip: {method: {own: 1}}}\n"})
    assert composed(tmp_path, "+callbacks/gradclip=norm").callbacks.gradclip.method.own == 1


def test_a_setting_that_the_option_overwrites_is_named(tmp_path: Path) -> None:
    """`_self_` stands first in many applications; the option's defaults are merged after it."""
    setting = "callbacks: {gradclip: {method: {max_norm: 0.25, per: model}}}\n"
    write(tmp_path, {"train": f"defaults: [_self_, callbacks/gradclip: norm]\n{setting}"})
    said = (
        r"^callbacks.gradclip.method.max_norm=0.25 comes before callbacks/gradclip: norm in a defaults list, and the "
    )
    with pytest.warns(UserWarning, match=said):
        assert composed(tmp_path).callbacks.gradclip.method.max_norm == 1.0


METHODS = {"callbacks/gradclip": ["norm", "zclip"]}
LIMITS = {"callbacks.gradclip.method.max_norm": {"lower": 0.1, "upper": 1.0}}


@pytest.mark.parametrize(
    "search",
    [
        {"params": {"callbacks/gradclip": "choice(norm,zclip)", "callbacks.gradclip.method.max_norm": "interval(0,1)"}},
        {"parametrization": {**METHODS, **LIMITS}},
        {"ax_config": {"params": {"callbacks/gradclip": {"type": "choice", "values": ["norm", "zclip"]}, **LIMITS}}},
        {"search_space": {"callbacks/gradclip": {"type": "categorical", "choices": ["norm", "zclip"]}, **LIMITS}},
    ],
    ids=["optuna", "nevergrad", "ax", "optuna before 1.2"],
)
def test_no_search_tunes_one_setting_for_several_options(tmp_path: Path, search: dict[str, Any]) -> None:
    text = yaml.safe_dump({"defaults": [{"callbacks/gradclip": "norm"}, "_self_"], "hydra": {"sweeper": search}})
    write(tmp_path, {"train": text})
    with initialize_config_dir(str(tmp_path), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        said = (
            r"^callbacks.gradclip.method.max_norm=\S+ would be set for each option of callbacks/gradclip=choice\(norm,z"
        )
        with pytest.raises(ConfigCompositionException, match=said):
            loader.load_configuration("train", [], RunMode.MULTIRUN)
