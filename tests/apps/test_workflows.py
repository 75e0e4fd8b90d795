"""The workflows run what the Makefile offers, and only a checked build is published."""

import re

import pytest
import yaml

from kit.root import ROOT

TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
WORKFLOWS = {path.stem: yaml.safe_load(path.read_text(encoding="utf-8")) for path in ROOT.glob(".github/workflows/*")}


def commands(job: dict) -> list[str]:
    return [step["run"] for step in job["steps"] if "run" in step]


@pytest.mark.parametrize("name", WORKFLOWS)
def test_the_targets_exist(name: str) -> None:
    lines = [line for job in WORKFLOWS[name]["jobs"].values() for line in commands(job) if line.startswith("make ")]
    assert lines
    for line in lines:
        assert {word for word in line.split()[1:] if "=" not in word} <= TARGETS


def test_only_what_was_checked_is_published() -> None:
    jobs = WORKFLOWS["release"]["jobs"]
    assert "make check dist" in commands(jobs["build"])
    assert jobs["publish"]["needs"] == "build"
    # The right to publish is the job's that runs none of the project's code.
    assert commands(jobs["publish"]) == []
    assert [name for name, job in jobs.items() if "id-token" in job.get("permissions", {})] == ["publish"]
