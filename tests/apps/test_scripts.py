"""Programs that tests start in a fork end as they would in a process of their own."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kit import scripts

PROGRAMS = {
    "it ends": "print('ü')",
    "it is told": "import sys; print(sys.argv[1:], __name__); sys.exit()",
    "its code": "import sys; sys.exit(3)",
    "its last words": "import sys; sys.exit('so it ends')",
    "it raises": "print('first'); 1 / 0",
    "it warns": "import warnings; warnings.warn('look'); print('on')",
    "a child writes": "import subprocess, sys; subprocess.run([sys.executable, '-c', 'print(1)'])",
}


@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)
def test_it_says_and_leaves_what_it_would_alone(program: str, tmp_path: Path) -> None:
    path = tmp_path / "program.py"
    path.write_text(program)
    alone = subprocess.run([sys.executable, path, "a"], cwd=tmp_path, capture_output=True, text=True)
    found = scripts.run([str(path), "a"], tmp_path)
    assert (found.returncode, found.stdout) == (alone.returncode, alone.stdout)
    assert alone.stderr.splitlines()[-1:] == found.stderr.splitlines()[-1:]
    assert scripts.run(["-c", program, "a"], tmp_path).stdout == alone.stdout


def test_it_runs_where_it_is_told_beside_its_own_modules(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "beside.py").write_text("NAME = 'beside'")
    (tmp_path / "program.py").write_text("import os, beside; print(beside.NAME, os.getcwd())")
    found = scripts.run([str(tmp_path / "program.py")], tmp_path / "elsewhere")
    assert found.stdout.split() == ["beside", str(tmp_path / "elsewhere")]
    assert "beside" not in sys.modules


def test_a_program_that_hangs_ends_with_what_it_has_started(tmp_path: Path) -> None:
    program = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(60)"
    )
    with pytest.raises(TimeoutError, match=r"took more than 1.5 s: \d+") as error:
        scripts.run(["-c", program], tmp_path, timeout=1.5)
    child = Path("/proc", str(error.value).split()[-1])
    for _ in range(100):
        if not child.exists() or child.joinpath("stat").read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.05)
    os.kill(int(child.name), signal.SIGKILL)
    pytest.fail("what the program has started lives")
