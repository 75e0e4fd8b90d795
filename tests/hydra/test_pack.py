"""The Hydra pack, composed by an application that knows nothing about it.

The package must be installed (`pip install -e .` will do): Hydra finds the pack by its metadata.
"""

import dataclasses
import inspect
import json
import math
import re
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize, initialize_config_dir
from hydra.errors import InstantiationException
from hydra.utils import get_class, get_object, instantiate
from lightning.pytorch.callbacks import Callback
from omegaconf import DictConfig, MissingMandatoryValue, OmegaConf

from kit.application import Application
from kit.boring import Prescribed, fit, gradients, weights
from lightning_gradclip import AGC, ClipMethod, GradientClipping, NormClip

PACK = files("lightning_gradclip.conf") / "callbacks" / "gradclip"
METHODS = files("lightning_gradclip.methods")

OPTIONS = sorted(
    file.name.removesuffix(".yaml")
    for file in PACK.iterdir()
    if file.name.endswith(".yaml") and not file.name.startswith("_")
)
# A method's YAML is named like its module; the other options are presets.
METHOD_OPTIONS = [name for name in OPTIONS if (METHODS / f"{name}.py").is_file()]
PRESETS = [name for name in OPTIONS if name not in (*METHOD_OPTIONS, "none")]


def method_of(option: str) -> type[ClipMethod]:
    with (PACK / f"{option}.yaml").open() as file:
        return get_class(OmegaConf.load(file).method._target_)


# Options and the names of their limits that may change with the step.
SCHEDULED = [
    (option, field.name)
    for option in METHOD_OPTIONS
    for field in dataclasses.fields(method_of(option))
    if "dict[int" in str(field.type)
]

# Hydra 1.3 wraps what a constructor raises, Hydra 1.4 adds the key to it.
REFUSED = (InstantiationException, TypeError)
REFUSED_VALUE = (*REFUSED, ValueError)

# Every option of the callback at a value that is not its default.
OPTIONS_OF_THE_CALLBACK = {
    "action": "observe",
    "nonfinite": "raise",
    "max_consecutive_skips": 3,
    "include": ["encoder.*"],
    "exclude": "*.bias",
    "optimizer": 1,
    "name": "other",
    "log": False,
    "log_every_n_steps": 2,
    "measure_per": "layer",
    "process_group": "pp",
    "prog_bar": True,
    "history": "elsewhere",
    "histograms": False,
    "old_names": True,
    "scale_free": "exclude",
    "summary": False,
    "relearn": True,
}
# For methods with a single coefficient, where gradients are written, and where Triton is installed.
NOT_BESIDE_EVERY_METHOD = {"fold", "centralize", "triton"}


@pytest.fixture(scope="module")
def application(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Somebody's application, in a directory of its own."""
    return Application.copied(tmp_path_factory.mktemp("elsewhere")).folder


def composed(application: Path, *overrides: str, config_name: str = "train") -> DictConfig:
    with initialize_config_dir(str(application / "configs"), version_base="1.3"):
        return compose(config_name, list(overrides))


def composed_from_file(application: Path, folder: Path, text: str) -> DictConfig:
    """With an option of the user's own that is written in this folder."""
    file = folder / "callbacks" / "gradclip" / "written.yaml"
    file.parent.mkdir(parents=True)
    file.write_text(text)
    return composed(application, f"hydra.searchpath=[file://{folder}]", "+callbacks/gradclip=written")


def test_two_callbacks_at_once(application: Path) -> None:
    cfg = composed(
        application,
        "+callbacks/gradclip@callbacks.watch=monitor",
        "+callbacks/gradclip@callbacks.clip=norm",
        "callbacks.watch.name=before",
    )
    assert list(cfg.callbacks) == ["watch", "clip"]
    watch, clip = instantiate(cfg.callbacks).values()
    assert isinstance(watch, GradientClipping)
    assert isinstance(clip, GradientClipping)


BODY_AND_HEAD = [
    "+callbacks/gradclip@callbacks.body=agc",
    "callbacks.body.name=body",
    "callbacks.body.exclude=['head.*']",
    "+callbacks/gradclip@callbacks.head=norm",
    "callbacks.head.name=head",
    "callbacks.head.include=['head.*']",
    "callbacks.head.method.max_norm=0.25",
]
AND_BIAS = [
    "callbacks.body.exclude=['head.*',encoder.bias]",
    "+callbacks/gradclip@callbacks.bias=value",
    "callbacks.bias.name=bias",
    "callbacks.bias.include=encoder.bias",
    "callbacks.bias.method.max_value=0.125",
]


@pytest.mark.parametrize(("overrides", "count"), [(BODY_AND_HEAD, 2), (BODY_AND_HEAD + AND_BIAS, 3)])
def test_several_callbacks_each_clip_their_own_part(application: Path, overrides: list[str], count: int) -> None:
    callbacks = instantiate(composed(application, *overrides).callbacks)
    assert len(callbacks) == count
    module = Prescribed()
    before = weights(module)
    # Steps of SGD that are what is left of the gradients.
    module.make_optimizer = lambda params: torch.optim.SGD(params, lr=1.0)
    trainer = fit(module, gradients(1, scale=100.0), *callbacks.values())
    moved = {name: before[name] - after for name, after in weights(module).items()}
    head = torch.cat([moved["head.weight"].flatten(), moved["head.bias"]])
    assert head.norm().item() == pytest.approx(0.25, rel=1e-5)
    rows = 0.01 * before["encoder.weight"].norm(dim=1)
    torch.testing.assert_close(moved["encoder.weight"].norm(dim=1), rows, rtol=1e-4, atol=0)
    if count == 2:
        limit = 0.01 * before["encoder.bias"].norm().item()
        assert moved["encoder.bias"].norm().item() == pytest.approx(limit, rel=1e-4)
    else:
        assert moved["encoder.bias"].abs().tolist() == pytest.approx([0.125] * 4, rel=1e-5)
    assert {key.partition("/")[0] for key in trainer.callback_metrics if "/" in key} == set(callbacks)


def test_none_replaces_an_applications_default(application: Path) -> None:
    for settings in ([], ["callbacks.gradclip.exclude='head.*'"]):
        cfg = composed(application, "callbacks/gradclip=none", *settings, config_name="clipped")
        assert type(instantiate(cfg.callbacks).gradclip) is Callback


def test_a_schedule_is_one_override(application: Path) -> None:
    cfg = composed(
        application,
        "+callbacks/gradclip=norm",
        "callbacks.gradclip.method.max_norm={0:10,1000:1}",
    )
    assert cfg.callbacks.gradclip.method.max_norm == {0: 10, 1000: 1}
    # The constructor copies it: a checkpoint must not hold a configuration object.
    assert type(instantiate(cfg.callbacks.gradclip.method).max_norm) is dict


@pytest.mark.parametrize(("option", "name"), SCHEDULED)
def test_every_limit_takes_a_schedule_from_python_a_file_and_the_command_line(
    application: Path, tmp_path: Path, option: str, name: str
) -> None:
    sign = -1 if name == "min_value" else 1
    first, last = sign * 0.5, sign * 0.125
    from_python = method_of(option)(**{name: {0: first, 1000: last}})
    line = f"callbacks.gradclip.method.{name}={{0:{first},1000:{last}}}"
    from_line = composed(application, f"+callbacks/gradclip={option}", line)
    text = f"defaults: [{option}, _self_]\nmethod:\n  {name}:\n    0: {first}\n    1000: {last}\n"
    from_file = composed_from_file(application, tmp_path, text)
    for cfg in (from_line, from_file):
        method = instantiate(cfg.callbacks.gradclip).method
        assert method == from_python
        schedule = getattr(method, name)
        assert type(schedule) is dict
        assert [(type(step), step, value) for step, value in schedule.items()] == [(int, 0, first), (int, 1000, last)]


def test_the_limits_that_take_a_schedule_are_found() -> None:
    known = {"max_norm", "min_norm", "max_value", "min_value", "target", "clip_factor"}
    assert known <= {name for _, name in SCHEDULED}


@pytest.mark.processes
def test_a_schedule_is_quoted_in_a_shell(application: Path) -> None:
    process = subprocess.run(
        f"'{sys.executable}' train.py +callbacks/gradclip=value 'callbacks.gradclip.method.max_value={{0:10,1000:1}}' "
        "'callbacks.gradclip.method.min_value={0:-2.5,10:-inf}' hydra.output_subdir=null hydra.run.dir=.",
        cwd=application,
        shell=True,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert process.returncode == 0, process.stderr
    method = json.loads(process.stdout)["callbacks"]["gradclip"]["method"]
    # As JSON has it: keys are strings.
    assert method["max_value"] == {"0": 10, "1000": 1}
    assert method["min_value"] == {"0": -2.5, "10": -math.inf}


def test_infinity_is_written_in_two_ways(application: Path, tmp_path: Path) -> None:
    line = ["callbacks.gradclip.method.norm_type=inf", "callbacks.gradclip.method.max_norm={0:inf,10:1}"]
    from_line = composed(application, "+callbacks/gradclip=norm", *line)
    text = "defaults: [norm, _self_]\nmethod: {norm_type: .inf, max_norm: {0: .inf, 10: 1}}\n"
    from_file = composed_from_file(application, tmp_path, text)
    for cfg in (from_line, from_file):
        method = instantiate(cfg.callbacks.gradclip).method
        assert method == NormClip(norm_type=math.inf, max_norm={0: math.inf, 10: 1.0})


def test_an_applications_file_wins_over_the_packs(application: Path, tmp_path: Path) -> None:
    own = tmp_path / "configs" / "callbacks" / "gradclip" / "norm.yaml"
    own.parent.mkdir(parents=True)
    own.write_text("own: true\n")
    (tmp_path / "configs" / "train.yaml").write_text("seed: 1\n")
    cfg = composed(tmp_path, "+callbacks/gradclip=norm")
    assert cfg.callbacks.gradclip == {"own": True}


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_instantiates(application: Path, name: str) -> None:
    cfg = composed(application, f"+callbacks/gradclip={name}")
    assert isinstance(instantiate(cfg.callbacks).gradclip, Callback)


@pytest.mark.parametrize("name", [name for name in OPTIONS if name != "none"])
def test_every_option_of_the_callback_is_set_beside_every_method(application: Path, name: str) -> None:
    values = OPTIONS_OF_THE_CALLBACK
    assert values.keys() | NOT_BESIDE_EVERY_METHOD | {"method"} == defaults_of(GradientClipping).keys()
    lines = [f"callbacks.gradclip.{key}={json.dumps(value)}" for key, value in values.items()]
    node = composed(application, f"+callbacks/gradclip={name}", *lines).callbacks.gradclip
    assert {key: plain(node[key]) for key in values} == values
    assert isinstance(instantiate(node), GradientClipping)


def test_folding_is_one_override(application: Path) -> None:
    cfg = composed(application, "+callbacks/gradclip=norm", "callbacks.gradclip.fold=true")
    module = Prescribed(lambda params: torch.optim.AdamW(params, lr=0.1, fused=True))
    trainer = fit(module, gradients(1, scale=100.0), instantiate(cfg.callbacks.gradclip))
    assert trainer.callback_metrics["gradclip/norm_clipped"] == pytest.approx(1.0, rel=1e-4)


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_explains_itself(name: str) -> None:
    for file in (f"{name}.yaml", "_callback.yaml"):
        first, *lines = (PACK / file).read_text(encoding="utf-8").splitlines()
        assert first.startswith("# ")
        settings = [line for line in lines if re.match(r"\s*[a-z]\w*: *\S", line) and not line.startswith("defaults")]
        assert [line for line in settings if "  # " not in line] == []


@pytest.mark.parametrize("name", OPTIONS)
def test_a_written_configuration_is_read_back_the_same(application: Path, tmp_path: Path, name: str) -> None:
    cfg = composed(application, f"+callbacks/gradclip={name}")
    OmegaConf.save(cfg, tmp_path / "config.yaml")
    read = OmegaConf.load(tmp_path / "config.yaml")
    assert read == cfg
    OmegaConf.set_readonly(read, True)
    (made,) = instantiate(read.callbacks, _convert_="all").values()
    assert type(made) is type(instantiate(cfg.callbacks.gradclip))
    assert getattr(made, "method", None) == getattr(instantiate(cfg.callbacks.gradclip), "method", None)


@pytest.mark.processes
def test_what_a_run_has_saved_makes_the_same_callback(tmp_path: Path) -> None:
    application = Application.copied(tmp_path)
    line = ["+callbacks/gradclip=norm", "callbacks.gradclip.method.max_norm={0:inf,1000:1}"]
    (first,) = application.start(*line, "hydra.run.dir=out", quiet=False).printed
    read = OmegaConf.load(application.folder / "out" / ".hydra" / "config.yaml")
    assert instantiate(read.callbacks.gradclip).method == NormClip(max_norm={0: math.inf, 1000: 1.0})
    assert application.shown("--config-path=out/.hydra", "--config-name=config").printed == [first]


def test_a_notebook_composes() -> None:
    with initialize(config_path="../foreign/configs", version_base="1.3"):
        cfg = compose("clipped", ["callbacks/gradclip=agc", "callbacks.gradclip.method.clip_factor=0.1"])
    assert instantiate(cfg.callbacks.gradclip).method == AGC(clip_factor=0.1)


def test_a_trainer_takes_the_callback_by_itself(application: Path) -> None:
    """For an application that makes nothing but `trainer`."""
    cfg = composed(application, "trainer=once", "+callbacks/gradclip@trainer.callbacks=norm")
    trainer = instantiate(cfg.trainer)
    assert any(isinstance(callback, GradientClipping) for callback in trainer.callbacks)


def plain(value: object) -> object:
    """The value as YAML has it: tuples are lists."""
    if OmegaConf.is_config(value):
        return OmegaConf.to_container(value)
    return list(value) if isinstance(value, tuple) else value


def defaults_of(cls: type) -> dict[str, object]:
    parameters = inspect.signature(cls).parameters.values()
    return {p.name: plain(p.default) for p in parameters if p.default is not p.empty}


def options_of(node: DictConfig) -> dict[str, object]:
    return {str(key): plain(value) for key, value in node.items() if key != "_target_"}


@pytest.mark.parametrize("name", METHOD_OPTIONS)
def test_a_methods_file_holds_every_argument_at_its_default(application: Path, name: str) -> None:
    node = composed(application, f"+callbacks/gradclip={name}").callbacks.gradclip.method
    # Compared as text: 1 and 1.0 are equal, and not the same default.
    assert repr(options_of(node)) == repr(defaults_of(get_class(node._target_)))


@pytest.mark.parametrize("name", PRESETS)
def test_a_presets_keys_are_arguments(application: Path, name: str) -> None:
    node = composed(application, f"+callbacks/gradclip={name}").callbacks.gradclip
    for part in (node, node.get("method")):
        if part is not None:
            accepted = inspect.signature(made := get_object(part._target_)).parameters
            if inspect.ismethod(made):
                # A way to make one of the class, which hands on all else.
                accepted = {**accepted, **inspect.signature(made.__self__).parameters}
            assert options_of(part).keys() <= accepted.keys()


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_lists_its_deviations_and_nothing_else(application: Path, name: str) -> None:
    with (PACK / f"{name}.yaml").open() as file:
        written = OmegaConf.to_container(OmegaConf.load(file))
    (base,) = [default for default in written.pop("defaults") if default != "_self_"]
    # The shared file leaves the method open.
    base = {"_callback": "monitor"}.get(base, base)
    node = composed(application, f"+callbacks/gradclip={base}").callbacks.gradclip
    for key, value in written.items():
        if key != "method":
            assert value != node[key]
    for key, value in (written["method"] or {}).items():
        assert value != node.method[key]


def test_the_shared_file_holds_every_option_at_its_default() -> None:
    with (PACK / "_callback.yaml").open() as file:
        node = OmegaConf.load(file)
    assert OmegaConf.is_missing(node, "method")
    del node["method"]
    defaults = defaults_of(GradientClipping)
    # Python's default stands for "required" and is refused like a missing value.
    del defaults["method"]
    assert repr(options_of(node)) == repr(defaults)


@pytest.mark.parametrize(
    ("key", "said"),
    [
        (
            "method.max_nrm",
            "NormClip has no argument 'max_nrm'; its arguments are max_norm, norm_type, min_norm, per, stat",
        ),
        ("actoin", "GradientClipping has no argument 'actoin'; its arguments are method, action, nonfinite, "),
    ],
)
def test_an_unknown_argument_is_answered_with_the_known_ones(application: Path, key: str, said: str) -> None:
    """Where a user follows Hydra's advice to add a + to a misspelled key."""
    node = composed(application, "+callbacks/gradclip=norm", f"+callbacks.gradclip.{key}=1")
    with pytest.raises(REFUSED, match=said):
        instantiate(node.callbacks)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("method.max_norm=-1", "max_norm must be > 0, got -1; to measure without clipping use method=None"),
        ("method.per=modl", "per must be one of 'model', 'group', 'layer', 'parameter', got 'modl'"),
        ("action=clamp", "action must be one of 'clip', 'skip', 'observe', got 'clamp'"),
        # An option's name where a method belongs.
        ("method=norm", "method must be a clipping method, got 'norm' (str); write method=NormClip(max_norm=1.0)"),
    ],
)
def test_a_value_out_of_range_is_named_with_its_key(application: Path, override: str, said: str) -> None:
    node = composed(application, "+callbacks/gradclip=norm", f"callbacks.gradclip.{override}").callbacks
    with pytest.raises(REFUSED_VALUE) as failure:
        instantiate(node)
    assert said in str(failure.value)
    key = "callbacks.gradclip.method" if override.startswith("method.") else "callbacks.gradclip"
    assert f"full_key: {key}" in f"{failure.value}\n{getattr(failure.value, '__notes__', '')}"


def test_the_shared_file_is_no_option(application: Path) -> None:
    node = composed(application, "+callbacks/gradclip=_callback").callbacks
    with pytest.raises(MissingMandatoryValue, match=r"callbacks\.gradclip\.method"):
        instantiate(node)


@pytest.mark.parametrize("value", ["maybe", "true", "[1,2]", "null"])
def test_a_value_of_the_wrong_type_is_named_with_its_key(application: Path, value: str) -> None:
    override = f"callbacks.gradclip.method.max_norm={value}"
    node = composed(application, "+callbacks/gradclip=norm", override).callbacks.gradclip
    shown = repr(OmegaConf.to_container(node)["method"]["max_norm"])
    with pytest.raises(REFUSED) as failure:
        instantiate(node)
    assert "max_norm must be a number" in str(failure.value)
    assert shown in str(failure.value)
