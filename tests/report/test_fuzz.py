"""Damaged folders and files through every verb: an exit status and lines, never a traceback, never a wait.

    python tests/report/test_fuzz.py 500

runs as many cases as it is told; the test runs a few.
"""

import contextlib
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kit.extras import needs_report
from kit.histories import record
from lightning_gradclip import NormClip
from lightning_gradclip.report.cli import main

CASES = 24
SECONDS = 30
ODD = ["null", "[]", "{}", "1e400", "-1", "NaN", '"x"', "9" * 23, "[" * 100_000, '{"a":' * 5_000, "true", "\0", ""]
WORDS = ["1e400", "-1", "nan", "", "9" * 23, "x", "1e308", '"', "\0", "1" * 5000]


def whole(folder: Path) -> Path:
    """A folder with one of each kind of record."""
    norms = np.exp(np.random.default_rng(0).normal(0, 1, 150))
    norms[[40, 60]] = 900.0, np.nan
    scopes = {"body": norms / 2, "head": norms / 3}
    record(folder / "0" / "gradclip", norms, 1.0, scopes=scopes, method=NormClip())
    (folder / "0" / ".hydra").mkdir()
    (folder / "0" / ".hydra" / "overrides.yaml").write_text("- lr=1\n- a.b=[1,2]\n")
    (folder / "1").mkdir()
    names = ("norm", "norm_max", "norm_clipped", "clip_rate", "coef_min", "skipped", "nonfinite", "limit")
    header = ",".join(["step", "val/loss", *(f"gradclip/{name}" for name in names)])
    lines = [f"{step},1,{norm},{norm},1,0.5,1,0,0,1" for step, norm in enumerate(norms.tolist())]
    (folder / "1" / "metrics.csv").write_text("\n".join([header, *lines]) + "\n")
    (folder / "1" / "hparams.yaml").write_text("lr: 2\nnested: {a: 1}\n")
    store = folder / "2" / "1" / ("a" * 32)
    (store / "metrics" / "gradclip").mkdir(parents=True)
    (store / "meta.yaml").write_text("run_id: a\n")
    for name in names:
        values = "".join(f"1700000000000 {norm} {step}\n" for step, norm in enumerate(norms.tolist()))
        (store / "metrics" / "gradclip" / name).write_text(values)
    log = [{"step": step, "grad_norm": norm, "loss": 1.0} for step, norm in enumerate(norms.tolist())]
    (folder / "3").mkdir()
    (folder / "3" / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    return folder


def damage(folder: Path, rng: random.Random) -> str:
    """Spoil one file in one way, and say which."""
    path = rng.choice(sorted(path for path in folder.rglob("*") if path.is_file() and path.name[:6] != ".owner"))
    content, how = path.read_bytes(), rng.randrange(10)
    middle = rng.randrange(len(content) + 1)
    if how == 0:
        path.write_bytes(content[:middle])
    elif how == 1:
        path.unlink()
    elif how == 2:
        spoilt = bytearray(content)
        for _ in range(rng.choice([1, 8, 200])):
            spoilt[rng.randrange(len(spoilt))] = rng.randrange(256)
        path.write_bytes(spoilt)
    elif how == 3:
        path.write_bytes(rng.randbytes(rng.choice([0, 1, 511, 4096])))
    elif how == 4:
        path.write_text(rng.choice(ODD))
    elif how == 5:
        path.unlink()
        os.mkfifo(path)
    elif how == 6:
        path.unlink()
        path.mkdir()
    elif how == 7:
        path.write_bytes(content[:middle] + rng.choice(WORDS).encode() + content[middle:])
    elif how == 8:
        other = rng.choice(sorted(path for path in folder.rglob("*") if path.is_file()))
        path.write_bytes(other.read_bytes())
    else:
        words = content.split(b",")
        words[rng.randrange(len(words))] = rng.choice(WORDS).encode()
        path.write_bytes(b",".join(words))
    return f"{how} {path.relative_to(folder)}"


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """What takes longer fails."""

    def late(*_: Any) -> None:
        raise TimeoutError(f"took longer than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def strict() -> Iterator[None]:
    """A warning, which a user would see beside the lines, fails."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def attempt(seed: int, base: Path) -> None:
    """One damaged folder through every verb."""
    rng = random.Random(seed)
    folder = whole(base / "runs")
    said = [damage(folder, rng) for _ in range(rng.choice([1, 1, 3]))]
    places = [folder, folder / rng.choice(["0", "1", "2", "3"])]
    verbs = [["report", "--out", str(base / "page.html"), "--force"], ["advise"], ["spikes"], ["spikes", "--json"]]
    verbs += [["compare"], ["compare", "--csv"], ["compare", "--metric", "val/loss"]]
    for verb, *options in verbs:
        words = [verb, str(rng.choice(places)), *options]
        out, errors = io.StringIO(), io.StringIO()
        try:
            with limited(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors), strict():
                status = main(words)
        except BaseException as error:
            raise AssertionError(f"seed {seed}: {said}: {words}") from error
        lines = errors.getvalue().splitlines()
        assert status in (0, 2), f"seed {seed}"
        assert status == 0 or lines[-1].startswith("lightning-gradclip: error: "), f"seed {seed}: {lines}"
        if status == 2 and verb == "report":
            assert not out.getvalue(), f"seed {seed}"


# 216: a norm near the largest number.
@needs_report
@pytest.mark.parametrize("seed", [*range(CASES), 216])
def test_no_damage_ends_in_a_traceback(seed: int, tmp_path: Path) -> None:
    attempt(seed, tmp_path)


if __name__ == "__main__":
    for number in range(int(sys.argv[1])):
        made = Path(tempfile.mkdtemp())
        try:
            attempt(number, made)
        except AssertionError as error:
            print(error, "<-", repr(error.__cause__), flush=True)
        shutil.rmtree(made)
