"""What a Hydra application pays for the pack when it composes: beside the package, and without it.

    python benchmarks/cost/composing.py WITHOUT/bin/python WITH/bin/python

Two environments with Hydra, one of which has this package. An application of two files starts in both in turn, with no
option and with `norm`, from the pack or from files of its own; the least processor time of all rounds counts.
"""

import argparse
import os
import resource
import shutil
import subprocess
import tempfile
from pathlib import Path

CONF = Path(__file__).parents[2] / "conf" / "callbacks" / "gradclip"
MAIN = """
import hydra

@hydra.main(version_base="1.3", config_path="configs", config_name="main")
def main(cfg):
    pass

main()
"""
QUIET = ["hydra.output_subdir=null", "hydra.run.dir=.", "hydra/job_logging=disabled"]
OF_OPTIONS = {"no option": ("", ""), "norm": ("+own/gradclip=norm", "+callbacks/gradclip=norm")}


def started(python: str, folder: Path, *arguments: str) -> float:
    """Milliseconds of processor time that Python takes to start, compose and end."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    subprocess.run([python, "main.py", *QUIET, *filter(None, arguments)], cwd=folder, check=True, env=environment)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return 1000 * (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "pythons", nargs=2, metavar="PYTHON", help="of the environment without the package, and with it"
    )
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "main.py").write_text(MAIN)
        own = folder / "configs" / "own" / "gradclip"
        own.mkdir(parents=True)
        (folder / "configs" / "main.yaml").write_text("seed: 1\n")
        for option in ("norm", "_callback"):
            shutil.copy(CONF / f"{option}.yaml", own)
        times: dict[tuple[str, int], list[float]] = {}
        for _ in range(options.rounds):
            for option, lines in OF_OPTIONS.items():
                for place, (python, line) in enumerate(zip(options.pythons, lines, strict=True)):
                    times.setdefault((option, place), []).append(started(python, folder, line))
    print("| composing | without, ms | with, ms | more, ms |\n| --- | --- | --- | --- |")
    for option in OF_OPTIONS:
        without, beside = (min(times[option, place]) for place in (0, 1))
        print(f"| {option} | {without:.0f} | {beside:.0f} | {beside - without:.1f} |")


if __name__ == "__main__":
    main()
