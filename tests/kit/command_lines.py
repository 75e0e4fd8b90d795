"""Command lines of an application that knows nothing of this package: what works, and what is refused how.

`test_command_line.py` tries them where the tests run, `test_packaging.py` in every kind of installation.
"""

import re
import subprocess
from collections.abc import Callable

import pytest
from omegaconf import OmegaConf

from kit.application import Application

Line = Callable[[Application], None]


def a_method_and_its_setting(application: Application) -> None:
    config = application.composed("+callbacks/gradclip=zclip", "callbacks.gradclip.method.z_threshold=3")
    assert config["seed"] == 1
    node = config["callbacks"]["gradclip"]
    assert (node["_target_"], node["action"]) == ("lightning_gradclip.GradientClipping", "clip")
    assert (node["method"]["_target_"], node["method"]["z_threshold"]) == ("lightning_gradclip.ZClip", 3)


def a_schedule(application: Application) -> None:
    line = "callbacks.gradclip.method.max_norm={0:10,1000:1}"
    config = application.composed("+callbacks/gradclip=norm", line)
    # As JSON has it: keys are strings.
    assert config["callbacks"]["gradclip"]["method"]["max_norm"] == {"0": 10, "1000": 1}


def schedules_by_their_points(application: Application) -> None:
    option, name = "+callbacks/gradclip=scheduled", "callbacks.gradclip.method.max_norm"
    for line, points in (
        ([f"{name}={{0: 5, 500: 1}}"], {"0": 5, "500": 1}),
        ([f"{name}.1000=2"], {"0": 10, "1000": 2}),
        ([f"+{name}.2000=2"], {"0": 10, "1000": 1, "2000": 2}),
        ([f"{name}={{0: 5}}", f"{name}.0=6"], {"0": 6}),
        ([f"~{name}.1000", f"{name}.0=6"], {"0": 6}),
    ):
        assert application.composed(option, *line)["callbacks"]["gradclip"]["method"]["max_norm"] == points
    swept = application.shown(option, f"{name}.1000=2,3", "-m").printed
    assert [one["callbacks"]["gradclip"]["method"]["max_norm"]["1000"] for one in swept] == [2, 3]


def three_callbacks(application: Application) -> None:
    lines = [
        *("+callbacks/gradclip@callbacks.body=agc", "callbacks.body.name=body", "callbacks.body.exclude=['head.*']"),
        *("+callbacks/gradclip@callbacks.head=norm", "callbacks.head.name=head", "callbacks.head.include='head.*'"),
        *("+callbacks/gradclip@callbacks.watch=monitor", "callbacks.watch.name=watch", "callbacks.watch.optimizer=1"),
    ]
    callbacks = application.composed(*lines)["callbacks"]
    assert {key: node["name"] for key, node in callbacks.items()} == {key: key for key in ("body", "head", "watch")}
    assert (callbacks["body"]["exclude"], callbacks["head"]["include"]) == (["head.*"], "head.*")
    assert (callbacks["watch"]["method"], callbacks["watch"]["optimizer"]) == (None, 1)


def another_place(application: Application) -> None:
    config = application.composed("+callbacks/gradclip@trainer_callbacks=norm", "trainer_callbacks.method.max_norm=2")
    assert config["trainer_callbacks"]["method"]["max_norm"] == 2
    assert "callbacks" not in config


def the_applications_own_option(application: Application) -> None:
    node = application.composed("+callbacks/gradclip=mine")["callbacks"]["gradclip"]
    assert (node["name"], node["method"]["max_norm"], node["method"]["per"]) == ("mine", 0.1, "model")


def another_packages_option(application: Application) -> None:
    config = application.composed("hydra.searchpath=[pkg://team]", "+callbacks/gradclip=ours")
    node = config["callbacks"]["gradclip"]
    assert (node["exclude"], node["method"]["_target_"]) == ("head.*", "lightning_gradclip.AGC")


def the_pack_on_the_search_path(application: Application) -> None:
    config = application.composed("hydra.searchpath=[pkg://lightning_gradclip.conf]", "+callbacks/gradclip=norm")
    assert config["callbacks"]["gradclip"]["method"]["max_norm"] == 1.0


def beside_the_applications_callbacks(application: Application) -> None:
    for line in ("+callbacks/gradclip=norm", "callbacks=[default,gradclip/norm]"):
        callbacks = application.composed(line, "--config-name=template")["callbacks"]
        assert list(callbacks) == ["checkpoint", "gradclip"]
        assert callbacks["gradclip"]["method"]["_target_"] == "lightning_gradclip.NormClip"


def off(application: Application) -> None:
    for line in ("callbacks.gradclip.exclude='head.*'", "callbacks.gradclip.history=true"):
        node = application.composed("callbacks/gradclip=none", line, "--config-name=clipped")["callbacks"]["gradclip"]
        assert node["_target_"] == "lightning_gradclip.hydra.none.no_clipping"
    assert application.composed("~callbacks/gradclip", "--config-name=clipped") == {"seed": 1}


def another_choice_than_the_experiments(application: Application) -> None:
    for name, target in (("agc", "lightning_gradclip.AGC"), ("monitor", None), ("none", None)):
        started = application.shown("experiment=override", f"callbacks/gradclip={name}", "--config-name=clipped")
        method = started.printed[0]["callbacks"]["gradclip"]["method"]
        assert method == (method and {"_target_": target, "clip_factor": 0.01, "eps": 0.001, "per": "unit"})
        line = "callbacks.gradclip.method.z_threshold=4 in 'experiment/override' is meant for callbacks/gradclip=zclip"
        assert f"{line} and left out, since {name} is chosen" in started.stderr


def every_option_after_every_other(application: Application) -> None:
    pairs = [application.python, "-W", "ignore", "pairs.py"]
    done = subprocess.run(pairs, cwd=application.folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


def an_option_built_on_the_packs_of_its_name(application: Application) -> None:
    line = ["+callbacks/gradclip@own=norm", "+callbacks/gradclip@preset=adagc", "--config-path=shadows"]
    config = application.composed(*line)
    assert (config["own"]["name"], config["own"]["method"]["max_norm"]) == ("ours", 0.125)
    # The shadows hold an `ema` of their own, on which the pack's preset is not built.
    assert (config["preset"]["method"]["ratio"], config["preset"]["method"]["per"]) == (1.04, "parameter")


def an_experiment_chooses(application: Application) -> None:
    node = application.composed("experiment=override", "--config-name=clipped")["callbacks"]["gradclip"]
    assert (node["method"]["_target_"], node["method"]["z_threshold"]) == ("lightning_gradclip.ZClip", 4)
    # Nothing is left of the option that was overridden.
    assert not {"norm_type", "statistic"} & node["method"].keys()


def an_experiment_adds_two(application: Application) -> None:
    callbacks = application.composed("experiment=add")["callbacks"]
    assert {key: node["name"] for key, node in callbacks.items()} == {"gradclip": "gradclip", "head": "head"}
    assert callbacks["gradclip"]["exclude"] == callbacks["head"]["include"] == "head.*"


def every_key_of_an_option(application: Application) -> None:
    shown = application.shown("+callbacks/gradclip=agc", "--cfg=job", "--package=callbacks.gradclip").stdout
    keys = re.findall(r"^ *(\w+):", shown, re.MULTILINE)
    assert {"_target_", "method", "clip_factor", "eps", "per", "action", "nonfinite", "name", "fold"} <= set(keys)


def help_lists_the_options(application: Application) -> None:
    shown = application.shown("--help").stdout
    listed = re.search(r"^callbacks/gradclip: (.*)$", shown, re.MULTILINE)
    assert listed
    listed = set(listed[1].split(", "))
    assert {"agc", "mine", "monitor", "none", "norm", "zclip"} <= listed
    assert not [name for name in listed if name.startswith("_")]


def info_shows_where_the_pack_comes_from(application: Application) -> None:
    shown = application.shown("--info").stdout
    assert re.search(r"\| lightning_gradclip +\| gradclip://lightning_gradclip\.conf +\|", shown)
    assert "GradclipSearchPath" in shown


def the_shell_completes(application: Application) -> None:
    assert "hydra_bash_completion" in application.shown("-sc", "install=bash", quiet=False).stdout
    for typed, offered in (
        ("+callbacks/gradclip=z", {"+callbacks/gradclip=zclip"}),
        ("+callbacks/gradclip=norm callbacks.gradclip.method.ma", {"callbacks.gradclip.method.max_norm="}),
    ):
        # Hydra's completion script passes the line on like this.
        line = {"COMP_LINE": f"python train.py {typed}", "COMP_POINT": "99"}
        shown = application.shown("-sc", "query=bash", quiet=False, **line).stdout
        assert set(shown.split()) == offered


def a_sweep_over_methods_and_settings(application: Application) -> None:
    sweep = [
        "+callbacks/gradclip=norm,zclip",
        "callbacks.gradclip.history=true",
        "++callbacks.gradclip.method.per=layer",
    ]
    nodes = [config["callbacks"]["gradclip"] for config in application.shown(*sweep, "-m").printed]
    assert [(node["method"]["_target_"].split(".")[1], node["method"]["per"], node["history"]) for node in nodes] == [
        ("NormClip", "layer", True),
        ("ZClip", "layer", True),
    ]


def a_sweep_over_every_option(application: Application) -> None:
    started = application.shown("+callbacks/gradclip=glob(*)", "-m")
    targets = [config["callbacks"]["gradclip"]["_target_"] for config in started.printed]
    assert len(targets) > 10
    callback = "lightning_gradclip.GradientClipping"
    assert set(targets) == {callback, f"{callback}.from_trainer", "lightning_gradclip.hydra.none.no_clipping"}


# Of a run that sets all of them the usual name of its folder is longer than a file system takes.
EIGHT = {
    "method.max_norm": "0.5",
    "method.norm_type": "1.0",
    "method.per": "layer",
    "action": "skip",
    "nonfinite": "zero",
    "exclude": "head.*",
    "history": "true",
    "log_every_n_steps": "5",
}


def a_folder_for_each_setting(application: Application) -> None:
    line = [f"callbacks.gradclip.{key}={value}" for key, value in EIGHT.items()]
    sweep = ["+callbacks/gradclip=norm", "seed=1,2", *line, "hydra.sweep.subdir=${hydra.job.override_dirname}"]
    where = "hydra.sweep.dir={}", "hydra/job_logging=disabled"
    assert (
        "File name too long" in application.start(*sweep, where[0].format("long"), where[1], "-m", quiet=False).stderr
    )
    for way in ("item_sep=/", "exclude_keys=[" + ",".join(one.partition("=")[0] for one in line) + "]"):
        swept = [*sweep, f"hydra.job.config.override_dirname.{way}", where[0].format(way[:4]), where[1], "-m"]
        ended = application.start(*swept, quiet=False)
        assert (ended.code, len(ended.printed)) == (0, 2), ended.stderr
        written = list((application.folder / way[:4]).rglob("overrides.yaml"))
        assert len(written) == 2
        assert all("callbacks.gradclip.method.max_norm=0.5" in one.read_text() for one in written)


WORKING: list[Line] = [
    a_method_and_its_setting,
    a_schedule,
    schedules_by_their_points,
    three_callbacks,
    another_place,
    the_applications_own_option,
    another_packages_option,
    the_pack_on_the_search_path,
    beside_the_applications_callbacks,
    off,
    another_choice_than_the_experiments,
    every_option_after_every_other,
    an_option_built_on_the_packs_of_its_name,
    an_experiment_chooses,
    an_experiment_adds_two,
    every_key_of_an_option,
    help_lists_the_options,
    info_shows_where_the_pack_comes_from,
    the_shell_completes,
    a_sweep_over_methods_and_settings,
    a_sweep_over_every_option,
    a_folder_for_each_setting,
]


def an_unknown_option_shows_the_known_ones(application: Application) -> None:
    said = application.refused("+callbacks/gradclip=nrom")
    assert "Could not find 'callbacks/gradclip/nrom'" in said
    assert {"norm", "normalize", "zclip", "mine"} <= set(re.findall(r"^\t(\w+)$", said, re.MULTILINE))


def a_missing_plus(application: Application) -> None:
    said = application.refused("callbacks/gradclip=norm")
    assert "Could not override 'callbacks/gradclip'" in said
    assert "use +callbacks/gradclip=norm" in said


def a_misspelled_argument_of_the_method(application: Application) -> None:
    said = application.refused("+callbacks/gradclip=norm", "callbacks.gradclip.method.max_nrm=0.5")
    assert "Could not override 'callbacks.gradclip.method.max_nrm'" in said
    assert "Key 'max_nrm' is not in struct" in said


def a_misspelled_argument_of_the_callback(application: Application) -> None:
    said = application.refused("+callbacks/gradclip=norm", "callbacks.gradclip.actoin=skip")
    assert "Could not override 'callbacks.gradclip.actoin'" in said
    assert "Key 'actoin' is not in struct" in said


def a_setting_without_an_option(application: Application) -> None:
    said = application.refused("callbacks.gradclip.method.max_norm=0.5")
    assert "Could not override 'callbacks.gradclip.method.max_norm'" in said


def two_methods_in_one_place(application: Application) -> None:
    for lines in (
        ["+callbacks/gradclip=norm", "+callbacks/gradclip=zclip"],
        ["callbacks/gradclip=norm", "callbacks/gradclip=zclip", "-cn=clipped"],
    ):
        assert f"{lines[0]} and {lines[1]} choose two options for one place" in application.refused(*lines)
    said = application.refused("+callbacks/gradclip=zclip", "-cn=clipped")
    assert "Multiple values for callbacks/gradclip. To override a value use" in said


def two_ways_at_once(application: Application) -> None:
    for listed in ("none", "monitor", "zclip"):
        line = ["+callbacks/gradclip=norm", f"callbacks=[default,gradclip/{listed}]", "-cn=template"]
        said = application.refused(*line)
        assert "callbacks.gradclip is chosen twice, " in said
        assert f"norm by {line[0]}" in said
        assert f"{listed} by {line[1]}" in said
    said = application.refused("+callbacks/gradclip=[norm,zclip]")
    assert "callbacks.gradclip is chosen twice, norm by +callbacks/gradclip=[norm,zclip] and zclip by " in said


def a_setting_without_a_method(application: Application) -> None:
    for name in ("monitor", "none"):
        said = application.refused(f"+callbacks/gradclip={name}", "+callbacks.gradclip.method.max_norm=2")
        assert f"method.max_norm=2 has nothing to set, since callbacks/gradclip={name} has no method; choose" in said


def a_point_without_a_schedule(application: Application) -> None:
    said = application.refused("+callbacks/gradclip=norm", "callbacks.gradclip.method.max_norm.1000=2")
    assert (
        "sets a point of a schedule, and callbacks.gradclip.method.max_norm is 1.0; write the whole schedule, " in said
    )
    assert "'callbacks.gradclip.method.max_norm={0: 1.0, 1000: 2}'" in said
    said = application.refused("+callbacks/gradclip=scheduled", "callbacks.gradclip.method.max_norm.7=2")
    assert "To append to your config use +callbacks.gradclip.method.max_norm.7=2" in said


def a_setting_for_each_option_of_a_sweep(application: Application) -> None:
    line = ["+callbacks/gradclip=norm,zclip", "callbacks.gradclip.method.max_norm=0.5,2"]
    said = application.refused(*line, "-m")
    assert f"{line[1]} would be set for each option of {line[0]}; sweep over options of your own" in said
    assert "or write ++callbacks.gradclip.method.max_norm if all are meant" in said
    said = application.refused("experiment=search", "-m", "-cn=clipped")
    assert (
        "callbacks.gradclip.method.max_norm=1,2 would be set for each option of callbacks/gradclip=norm,zclip" in said
    )


def an_option_built_on_itself(application: Application) -> None:
    said = application.refused("+callbacks/gradclip=agc", "--config-path=shadows")
    assert "'callbacks/gradclip/agc' is built on itself, since it has the name of an option" in said
    assert "write defaults: [_agc, _self_] in it" in said


def an_experiment_that_overrides_what_is_not_there(application: Application) -> None:
    said = application.refused("experiment=override")
    assert "In 'experiment/override': " in said
    assert "callbacks/gradclip" in said


def an_option_taken_for_the_whole_group(application: Application) -> None:
    said = application.refused("callbacks=gradclip/norm", "--config-name=template")
    assert "in the place of all callbacks; write callbacks=[gradclip/norm], in brackets" in said


def callbacks_that_are_a_list(application: Application) -> None:
    said = application.refused("+callbacks/gradclip=norm", "--config-name=listed")
    assert "callbacks.gradclip has no place, since callbacks in 'listed' is a list without 'gradclip'; " in said
    assert "choose another place, +callbacks/gradclip@gradclip=norm, and add ${gradclip} to the list" in said


REFUSED: list[Line] = [
    an_unknown_option_shows_the_known_ones,
    a_missing_plus,
    a_misspelled_argument_of_the_method,
    a_misspelled_argument_of_the_callback,
    a_setting_without_an_option,
    two_methods_in_one_place,
    two_ways_at_once,
    a_setting_without_a_method,
    a_point_without_a_schedule,
    a_setting_for_each_option_of_a_sweep,
    an_option_built_on_itself,
    an_experiment_that_overrides_what_is_not_there,
    an_option_taken_for_the_whole_group,
    callbacks_that_are_a_list,
]


def one_step_is_clipped(application: Application) -> None:
    (metrics,) = application.trained("+callbacks/gradclip=norm", "callbacks.gradclip.method.max_norm=0.01")
    assert metrics["gradclip/norm"] > 0.01
    assert metrics["gradclip/norm_clipped"] == pytest.approx(0.01, rel=1e-3)


def a_limit_from_the_environment(application: Application) -> None:
    """Which is text, also where it is a point of a schedule."""
    for value in ("${oc.env:LIM}", "{0: '${oc.env:LIM}', 1000: 1}", "'${oc.decode:${oc.env:LIM}}'"):
        line = ["+callbacks/gradclip=norm", f"callbacks.gradclip.method.max_norm={value}"]
        started = application.start("trainer=once", *line, LIM="0.015")
        assert started.code == 0, started.stderr
        assert started.printed[0]["gradclip/norm_clipped"] == pytest.approx(0.015, rel=1e-3)
        assert (" is text, '0.015', and read as a number" in started.stderr) == ("decode" not in value)
    failed = application.failed("+callbacks/gradclip=norm", "callbacks.gradclip.method.max_norm='${oc.env:HOME}'")
    assert "max_norm must be a number or a schedule such as {0: 10.0, 1000: 1.0}, got '/" in failed


def a_wrong_type(application: Application) -> None:
    said = application.failed("+callbacks/gradclip=norm", "callbacks.gradclip.method.max_norm=maybe")
    assert "max_norm must be a number or a schedule such as {0: 10.0, 1000: 1.0}, got 'maybe' (str)" in said
    assert "full_key: callbacks.gradclip.method" in said


def the_trainer_clips_too(application: Application) -> None:
    said = application.failed("+callbacks/gradclip=norm", "trainer.gradient_clip_val=0.5")
    assert "both Trainer(gradient_clip_val=0.5) and GradientClipping(NormClip(" in said
    assert "remove gradient_clip_val" in said


# These import torch.
TRAINING: list[Line] = [
    one_step_is_clipped,
    a_limit_from_the_environment,
    a_wrong_type,
    the_trainer_clips_too,
]


def a_search_over_methods_and_their_parameters(application: Application) -> None:
    """Every trial has what was drawn for its method, and nothing of the other's."""
    started = application.start("trainer=once", "experiment=searched", "-m", quiet=False)
    assert started.code == 0, started.stdout + started.stderr
    saved = (application.folder / "found" / str(job) / ".hydra" / "config.yaml" for job in range(6))
    methods = [OmegaConf.load(file).callbacks.gradclip.method for file in saved]
    clipped = [metrics["gradclip/norm_clipped"] for metrics in started.printed]
    assert {method._target_ for method in methods} == {"lightning_gradclip.NormClip", "lightning_gradclip.ZClip"}
    for method, norm in zip(methods, clipped, strict=True):
        if "z_threshold" in method:
            assert 3 < method.z_threshold < 4
            assert method.max_norm is None
        else:
            assert 0.01 < method.max_norm < 0.1
            assert norm == pytest.approx(method.max_norm, rel=1e-3)
    (best,) = application.folder.glob("found/optimization_results.yaml")
    assert f"best_value: {min(clipped)}" in best.read_text()


# These want Optuna and Hydra's sweeper for it.
SEARCHES: list[Line] = [
    a_search_over_methods_and_their_parameters,
]
