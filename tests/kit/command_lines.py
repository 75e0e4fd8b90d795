"""Command lines of an application that knows nothing of this package: what works, and what is refused how.

`test_command_line.py` tries them where the tests run, `test_packaging.py` in every kind of installation.
"""

import re
from collections.abc import Callable

import pytest

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


def a_schedule_over_a_schedule(application: Application) -> None:
    option, name = "+callbacks/gradclip=scheduled", "callbacks.gradclip.method.max_norm"
    config = application.composed(option, f"{name}=null", f"{name}={{0:5,500:1}}")
    assert config["callbacks"]["gradclip"]["method"]["max_norm"] == {"0": 5, "500": 1}
    # Hydra merges the points of the two otherwise, and refuses new ones.
    assert "Key '500' is not in struct" in application.refused(option, f"{name}={{0:5,500:1}}")


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
    lines = ["callbacks/gradclip=none", "+callbacks.gradclip.method.max_norm=2", "--config-name=clipped"]
    node = application.composed(*lines)["callbacks"]["gradclip"]
    assert node["_target_"] == "lightning_gradclip.hydra.none.no_clipping"
    assert application.composed("~callbacks/gradclip", "--config-name=clipped") == {"seed": 1}


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
    assert {"agc", "mine", "monitor", "none", "norm", "zclip"} <= set(listed[1].split(", "))


def info_shows_where_the_pack_comes_from(application: Application) -> None:
    shown = application.shown("--info").stdout
    assert re.search(r"\| lightning_gradclip +\| pkg://lightning_gradclip\.conf +\|", shown)
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
    sweep = ["+callbacks/gradclip=norm,zclip", "callbacks.gradclip.method.max_norm=0.5,2", "--multirun"]
    methods = [config["callbacks"]["gradclip"]["method"] for config in application.shown(*sweep).printed]
    assert [(method["_target_"].split(".")[1], method["max_norm"]) for method in methods] == [
        *(("NormClip", 0.5), ("NormClip", 2)),
        *(("ZClip", 0.5), ("ZClip", 2)),
    ]


WORKING: list[Line] = [
    a_method_and_its_setting,
    a_schedule,
    a_schedule_over_a_schedule,
    three_callbacks,
    another_place,
    the_applications_own_option,
    another_packages_option,
    the_pack_on_the_search_path,
    beside_the_applications_callbacks,
    off,
    an_experiment_chooses,
    an_experiment_adds_two,
    every_key_of_an_option,
    help_lists_the_options,
    info_shows_where_the_pack_comes_from,
    the_shell_completes,
    a_sweep_over_methods_and_settings,
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
        ["+callbacks/gradclip=zclip", "-cn=clipped"],
    ):
        said = application.refused(*lines)
        assert "Multiple values for callbacks/gradclip. To override a value use" in said


def an_experiment_that_overrides_what_is_not_there(application: Application) -> None:
    said = application.refused("experiment=override")
    assert "In 'experiment/override': " in said
    assert "callbacks/gradclip" in said


def an_option_taken_for_the_whole_group(application: Application) -> None:
    # In brackets, callbacks=[gradclip/norm], it works.
    said = application.refused("callbacks=gradclip/norm", "--config-name=template")
    assert "In 'callbacks/gradclip/norm': Could not load 'callbacks/_callback'" in said


def callbacks_that_are_a_list(application: Application) -> None:
    said = application.refused("+callbacks/gradclip=norm", "--config-name=listed")
    assert "In 'callbacks/gradclip/_callback': ConfigTypeError" in said
    assert "Cannot merge" in said


REFUSED: list[Line] = [
    an_unknown_option_shows_the_known_ones,
    a_missing_plus,
    a_misspelled_argument_of_the_method,
    a_misspelled_argument_of_the_callback,
    a_setting_without_an_option,
    two_methods_in_one_place,
    an_experiment_that_overrides_what_is_not_there,
    an_option_taken_for_the_whole_group,
    callbacks_that_are_a_list,
]


def one_step_is_clipped(application: Application) -> None:
    (metrics,) = application.trained("+callbacks/gradclip=norm", "callbacks.gradclip.method.max_norm=0.01")
    assert metrics["gradclip/norm"] > 0.01
    assert metrics["gradclip/norm_clipped"] == pytest.approx(0.01, rel=1e-3)


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
    a_wrong_type,
    the_trainer_clips_too,
]
