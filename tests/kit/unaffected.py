"""Command lines of applications that do not use the pack, and what comes out of them, installed or not."""

import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from kit.application import Application

PLAIN = [
    "",
    "seed=2",
    "model=large",
    "callbacks=null",
    "callbacks=[]",
    "callbacks=none",
    "callbacks=default",
    "callbacks=[a,b]",
    "callbacks={a:1}",
    "callbacks=1",
    "callbacks=${model}",
    "callbacks.checkpoint.every=2",
    "callbacks.checkpoint=null",
    "callbacks.other=1",
    "+callbacks.other=1",
    "+callbacks=[]",
    "+callbacks={other:1}",
    "++callbacks=[]",
    "++callbacks=null",
    "++callbacks.other=1",
    "~callbacks",
    "~callbacks.checkpoint",
    "callbacks=null,[] -m",
    "callbacks.checkpoint.every=1,2 -m",
    "model=glob(*) -m",
    "--cfg=job",
    "--cfg=job --package=callbacks",
    "--help",
    "--info=defaults",
    "--info=searchpath",
]
GROUPED = ["", "callbacks=none", "callbacks=[default,none]", "callbacks=null", "callbacks=nope", "~callbacks", "--help"]
TYPED = ["callbacks", "callbacks.", "callbacks=", "~callbacks", "model=", "+model/", "see"]


def outcomes(application: Application) -> dict[str, tuple[int, str, str]]:
    """What each command line ends with: code, output and errors, without the lines that tell of the pack."""
    lines = [*(("plain", line) for line in PLAIN), *(("grouped", line) for line in GROUPED)]
    with ThreadPoolExecutor(2) as pool:
        ran = pool.map(lambda one: application.start(*one[1].split(), f"--config-path={one[0]}"), lines)
        typed = pool.map(lambda word: _completed(application, word), TYPED)
        results = {
            f"{folder} {line}": (one.code, _told(one.stdout), _said(one.stderr))
            for (folder, line), one in zip(lines, ran, strict=True)
        }
        return results | {f"typed {word}": (0, one, "") for word, one in zip(TYPED, typed, strict=True)}


def _completed(application: Application, word: str) -> str:
    line = {"COMP_LINE": f"python train.py --config-path=plain {word}", "COMP_POINT": "99"}
    shown = application.start("--config-path=plain", "-sc", "query=bash", quiet=False, **line).stdout
    return " ".join(one for one in shown.split() if "callbacks/" not in one)


def _told(text: str) -> str:
    lines: Iterable[str] = (line for line in text.splitlines() if "gradclip" not in line)
    # Columns are as wide as what is in them; times are what they are.
    return "\n".join(re.sub(r"[-\s|]+", " ", re.sub(r"\[20\d\d-.*?\]", "", line)).strip() for line in lines)


def _said(text: str) -> str:
    """Of a traceback the last line: on the way lies a frame of ours."""
    return _told(text.splitlines()[-1] if "Traceback (most recent" in text else text)
