"""What an installation offers: the public names, the files, and the pack by every way to install.

The quick tests run always. Those that build and install run by `pytest -m packaging`: they need a
package index and the `dev` extra.
"""

import compileall
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from email import message_from_bytes
from pathlib import Path

import pytest

import lightning_gradclip
from kit.application import Application
from kit.command_lines import (
    REFUSED,
    SEARCHES,
    TRAINING,
    WORKING,
    a_method_and_its_setting,
    info_shows_where_the_pack_comes_from,
    the_pack_on_the_search_path,
)
from kit.root import ROOT
from kit.unaffected import outcomes


def execute(*command: object, cwd: Path) -> str:
    process = subprocess.run([str(word) for word in command], cwd=cwd, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


def test_importing_the_package_imports_nothing_heavy(tmp_path: Path) -> None:
    code = "import sys, lightning_gradclip; print(*sorted(sys.modules))"
    roots = {name.split(".")[0] for name in execute(sys.executable, "-c", code, cwd=tmp_path).split()}
    assert "lightning_gradclip" in roots
    assert not {"torch", "lightning", "torchmetrics", "hydra", "omegaconf"} & roots


def test_finding_the_pack_imports_six_small_modules(tmp_path: Path) -> None:
    code = (
        "import sys, hydra.main, hydra._internal.core_plugins.importlib_resources_config_source; "
        "before = set(sys.modules); import lightning_gradclip.hydra.search_path; print(*set(sys.modules) - before)"
    )
    added = execute(sys.executable, "-c", code, cwd=tmp_path).split()
    package = "lightning_gradclip"
    room = {f"{package}.hydra.{name}" for name in ("search_path", "composition", "places", "settings")}
    assert set(added) - {f"{package}.hydra.finder"} == {package, f"{package}.hydra", *room}


def test_every_public_name_resolves_to_itself() -> None:
    assert "NormClip" in lightning_gradclip.__all__
    for name in lightning_gradclip.__all__:
        assert getattr(lightning_gradclip, name).__name__ == name


def test_a_star_import_brings_exactly_the_public_names() -> None:
    names: dict[str, object] = {}
    exec("from lightning_gradclip import *", names)
    assert names.keys() - {"__builtins__"} == set(lightning_gradclip.__all__)
    assert dir(lightning_gradclip) == sorted(lightning_gradclip.__all__)


def test_names_are_found_without_source_text(tmp_path: Path) -> None:
    """As in a frozen application, which holds compiled files only."""
    copy = shutil.copytree(ROOT / "lightning_gradclip", tmp_path / "lightning_gradclip")
    (tmp_path / "conf").symlink_to(ROOT / "conf")
    compileall.compile_dir(copy, quiet=1, legacy=True)
    for file in copy.rglob("*.py"):
        file.unlink()
    code = "import lightning_gradclip as us; print(us.__file__, us.History.__name__, *us.__all__)"
    file, name, *names = execute(sys.executable, "-c", code, cwd=tmp_path).split()
    assert (Path(file), name) == (copy / "__init__.pyc", "History")
    assert names == lightning_gradclip.__all__


def test_an_unknown_name_is_an_attribute_error() -> None:
    expected = "^module 'lightning_gradclip' has no attribute 'NormClp'$"
    with pytest.raises(AttributeError, match=expected) as failure:
        _ = lightning_gradclip.NormClp
    # Python suggests similar names from these.
    assert (failure.value.name, failure.value.obj) == ("NormClp", lightning_gradclip)


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The sdist, and the wheel built from it: `build` unpacks the one to make the other."""
    out = tmp_path_factory.mktemp("dist")
    execute(sys.executable, "-m", "build", "--outdir", out, ROOT, cwd=out)
    (wheel,) = out.glob("*.whl")
    (sdist,) = out.glob("*.tar.gz")
    return {"wheel": wheel, "sdist": sdist}


@pytest.mark.packaging
def test_the_wheel_holds_the_package_the_pack_and_the_plugin(distributions: dict) -> None:
    names = set(zipfile.ZipFile(distributions["wheel"]).namelist())
    tops = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert tops == {"lightning_gradclip", "hydra_plugins"}
    # A namespace of many distributions: an `__init__.py` of ours would hide the others.
    assert {n for n in names if n.startswith("hydra_plugins/")} == {"hydra_plugins/lightning_gradclip.py"}
    assert {"lightning_gradclip/py.typed", "lightning_gradclip/conf/__init__.py"} <= names
    page = ("page.html.j2", "page.css", "base.js", "norms.js", "page.js")
    assert {f"lightning_gradclip/report/{name}" for name in page} <= names
    written = {f"lightning_gradclip/{p.relative_to(ROOT).as_posix()}" for p in ROOT.glob("conf/**/*.yaml")}
    assert written == {n for n in names if n.endswith(".yaml")}
    code = {p.relative_to(ROOT).as_posix() for p in ROOT.glob("lightning_gradclip/**/*.py")}
    # The re-export lies where Hydra 1.3 looks, and only there.
    assert code - names == {"lightning_gradclip/hydra/namespace_plugin.py"}


@pytest.mark.packaging
def test_the_sdist_holds_the_checkout_and_nothing_else(distributions: dict) -> None:
    with tarfile.open(distributions["sdist"]) as archive:
        names = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    if not (ROOT / ".git").exists():
        pytest.skip("only a git checkout knows its files")
    listed = execute("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT)
    assert names - {"PKG-INFO"} == {name for name in listed.split("\0") if (ROOT / name).is_file()}


@pytest.mark.packaging
def test_the_metadata_is_what_an_index_takes(distributions: dict, tmp_path: Path) -> None:
    execute(sys.executable, "-m", "twine", "check", "--strict", *distributions.values(), cwd=tmp_path)
    with zipfile.ZipFile(distributions["wheel"]) as archive:
        (file,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = message_from_bytes(archive.read(file))
    assert metadata["Version"] == lightning_gradclip.__version__
    # Hatchling has refused classifiers that do not exist.
    listed = [name.rpartition(" :: 3.") for name in metadata.get_all("Classifier", ())]
    minors = [int(minor) for _, found, minor in listed if found]
    assert metadata["Requires-Python"] == f">=3.{min(minors)}"


@dataclass
class Environment:
    """A fresh virtual environment that holds Hydra, all that composing needs."""

    python: Path
    application: Application

    def install(self, *what: object, by: str) -> None:
        self._run(by, "install", "-q", "--no-deps", *what)

    def uninstall(self, *, by: str) -> None:
        self._run(by, "uninstall", "-q", *(["-y"] if by == "pip" else []), "lightning-gradclip")

    def _run(self, by: str, verb: str, *arguments: object) -> None:
        start = {"pip": ["pip", "--python", self.python, verb], "uv": ["uv", "pip", verb, "--python", self.python]}
        execute(sys.executable, "-m", *start[by], *arguments, cwd=self.application.folder)

    def ask(self, code: str) -> str:
        return execute(self.python, "-W", "error", "-c", code, cwd=self.application.folder).strip()

    @property
    def library(self) -> Path:
        return Path(self.ask("import sysconfig; print(sysconfig.get_path('purelib'))"))

    @property
    def files(self) -> set[str]:
        """All that lies in it, but for uv's lock and what Python has compiled of other packages."""
        root = self.python.parents[1]
        paths = {path.relative_to(root).as_posix() for path in root.rglob("*")}
        return {path for path in paths - {".lock"} if "__pycache__" not in path or "gradclip" in path}


# A pre-release has to be asked for.
HYDRA = {"1.3": "hydra-core>=1.3.2,<1.4", "1.4": "hydra-core>=1.4.0rc3,<1.5"}


@pytest.fixture(scope="module", params=list(HYDRA))
def environment(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    root = tmp_path_factory.mktemp("environment")
    venv.create(root / "venv", with_pip=False)
    python = root / "venv" / ("Scripts" if os.name == "nt" else "bin") / "python"
    execute(sys.executable, "-m", "pip", "--python", python, "install", "-q", HYDRA[request.param], cwd=root)
    environment = Environment(python, Application.copied(root, python))
    assert environment.ask("import hydra; print(hydra.__version__)").startswith(request.param)
    return environment


@pytest.fixture
def installed(environment: Environment, request: pytest.FixtureRequest, distributions: dict) -> Iterator[Environment]:
    """The environment with the package in it, which goes again and leaves nothing behind."""
    by, kind = request.param.split()
    before = environment.files
    environment.install(*(["-e", ROOT] if kind == "editable" else [distributions[kind]]), by=by)
    yield environment
    environment.uninstall(by=by)
    assert environment.files == before
    # To Hydra it is an unknown group again.
    said = environment.application.refused("callbacks/gradclip=norm", "--config-name=clipped")
    assert "lightning_gradclip" not in said


@pytest.mark.packaging
@pytest.mark.parametrize(
    ("installed", "kind"), [("pip wheel", "wheel"), ("pip sdist", "sdist")], indirect=["installed"]
)
def test_a_distribution_serves_a_foreign_application(installed: Environment, kind: str) -> None:
    package = Path(installed.ask("import lightning_gradclip; print(lightning_gradclip.__file__)"))
    assert package.is_relative_to(installed.library)
    # The sdist becomes a wheel as it is installed: it is enough that nothing got lost on the way.
    installed.application.tries(WORKING if kind == "wheel" else WORKING[:10])


@pytest.mark.packaging
@pytest.mark.parametrize("installed", ["pip editable", "uv editable", "uv wheel"], indirect=True)
def test_every_other_way_to_install_is_found(installed: Environment) -> None:
    installed.application.tries(
        [a_method_and_its_setting, the_pack_on_the_search_path, info_shows_where_the_pack_comes_from]
    )


@contextmanager
def whole(installed: Environment) -> Iterator[None]:
    """With what torch needs, which lies beside the tests and comes last on the path."""
    beside = installed.library / "beside.pth"
    beside.write_text(sysconfig.get_path("purelib"))
    try:
        where = installed.ask("import hydra, lightning_gradclip as us; print(hydra.__file__, us.__file__, sep='\\n')")
        assert all(Path(file).is_relative_to(installed.library) for file in where.splitlines())
        yield
    finally:
        beside.unlink()


@pytest.mark.packaging
@pytest.mark.parametrize("installed", ["uv wheel"], indirect=True)
def test_a_foreign_application_trains_and_is_told_its_mistakes(installed: Environment) -> None:
    with whole(installed):
        installed.application.tries([*TRAINING, *REFUSED])
        # The environment beside is not ours to check as a whole.
        command = [sys.executable, "-m", "pip", "--python", installed.python, "check"]
        said = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout.splitlines()
        assert said
        assert [line for line in said if line.startswith("lightning-gradclip ")] == []


# What asks for objects, and for more compositions than there are command lines.
IN_ONE_PROCESS = ["hydra/test_chosen.py", "hydra/test_objects.py", "hydra/test_pack.py", "apps/test_template.py"]


@pytest.mark.packaging
@pytest.mark.parametrize("installed", ["uv wheel"], indirect=True)
def test_the_tests_of_the_pack_pass_beside_the_wheel(installed: Environment) -> None:
    with whole(installed):
        files = [ROOT / "tests" / name for name in IN_ONE_PROCESS]
        options = ["-q", "-p", "no:cacheprovider", "-c", ROOT / "pyproject.toml", "--rootdir", ROOT]
        said = execute(installed.python, "-m", "pytest", *options, *files, cwd=installed.application.folder)
    assert " passed in " in said


# Hydra 1.3 has Optuna beside the tests.
OPTUNA = {"1.3": [], "1.4": ["hydra-optuna-sweeper>=1.4.0rc3", "optuna>=4"]}


@pytest.mark.packaging
@pytest.mark.parametrize("installed", ["uv wheel"], indirect=True)
def test_optuna_searches_methods_and_their_parameters(installed: Environment) -> None:
    pytest.importorskip("optuna", reason="the sweep extra is not installed")
    version = installed.ask("import hydra; print(hydra.__version__)")[:3]
    with whole(installed):
        command = ["pip", "--python", installed.python]
        if OPTUNA[version]:
            execute(
                sys.executable, "-m", *command, "install", "-q", "--no-deps", *OPTUNA[version], cwd=installed.library
            )
        try:
            installed.application.tries(SEARCHES)
        finally:
            if OPTUNA[version]:
                names = ["hydra-optuna-sweeper", "optuna"]
                execute(sys.executable, "-m", *command, "uninstall", "-q", "-y", *names, cwd=installed.library)


@pytest.mark.packaging
def test_composing_imports_little_more_than_without_the_package(
    environment: Environment, distributions: dict[str, Path]
) -> None:
    """An application that does not use the pack, and one that has the option as files of its own."""
    application = environment.application
    own = application.folder / "configs" / "own" / "gradclip"
    own.mkdir(parents=True, exist_ok=True)
    for name in ("norm", "_callback"):
        shutil.copy(ROOT / "conf" / "callbacks" / "gradclip" / f"{name}.yaml", own)
    without = application.shown().modules, application.shown("+own/gradclip=norm").modules
    environment.install(distributions["wheel"], by="uv")
    try:
        beside = application.shown().modules, application.shown("+callbacks/gradclip=norm").modules
    finally:
        environment.uninstall(by="uv")
    for before, after in zip(without, beside, strict=True):
        more = {name for name in after - before if "lightning_gradclip" not in name}
        # A few of the standard library; benchmarks/cost/composing.py measures what it comes to.
        assert len(more) <= 8, more
        assert not any(name.partition(".")[0] in ("torch", "lightning", "numpy") for name in after)


@pytest.mark.packaging
def test_applications_that_do_not_use_the_pack_see_no_difference(
    environment: Environment, distributions: dict[str, Path]
) -> None:
    without = outcomes(environment.application)
    environment.install(distributions["wheel"], by="uv")
    try:
        assert outcomes(environment.application) == without
    finally:
        environment.uninstall(by="uv")


@pytest.mark.packaging
@pytest.mark.parametrize("installed", ["uv wheel"], indirect=True)
def test_hydra_1_4_asks_the_metadata(installed: Environment) -> None:
    """Without the namespace that 1.4 deprecates, and that 1.3 cannot do without."""
    scanned = installed.library / "hydra_plugins" / "lightning_gradclip.py"
    aside = scanned.rename(installed.library.parents[1] / "aside.py")
    line = ["+callbacks/gradclip=norm", "callbacks.gradclip.method.max_norm=1"]
    if "1.3." in installed.ask("import hydra; print(hydra.__version__)"):
        assert "Could not find 'callbacks/gradclip/norm'" in installed.application.refused(*line)
    else:
        assert installed.application.composed(*line)["callbacks"]["gradclip"]["method"]["max_norm"] == 1
    aside.rename(scanned)


@pytest.mark.packaging
def test_the_recipe_for_ray_beside_ray(tmp_path: Path) -> None:
    """Which is large, so that it is installed for this test alone, beside what the others use."""
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    command = [sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps"]
    execute(*command, "ray>=2.60", "msgpack", "pyarrow", cwd=tmp_path)
    where = execute(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip()
    (Path(where) / "beside.pth").write_text(f"{ROOT}\n{sysconfig.get_path('purelib')}\n")
    options = ["-q", "-p", "no:cacheprovider", "-c", ROOT / "pyproject.toml", "--rootdir", ROOT]
    assert "2 passed" in execute(
        python, "-m", "pytest", *options, ROOT / "tests" / "ranks" / "test_ray.py", cwd=tmp_path
    )
