"""What an installation offers: the public names, the files, and the pack by every way to install.

The quick tests run always. Those that build and install run by `pytest -m packaging`: they need a
package index and the `dev` extra.
"""

import json
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import lightning_gradclip

ROOT = Path(__file__).parents[1]

# Hydra is all that composing needs: an environment without torch proves it.
COMPOSE = """
import json, sys
import hydra, lightning_gradclip
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

with initialize_config_module("hydra.conf", version_base="1.3"):
    cfg = compose(overrides=["+callbacks/gradclip=norm", "callbacks.gradclip.method.max_norm=0.5"])
print(json.dumps({
    "cfg": OmegaConf.to_container(cfg),
    "hydra": hydra.__version__,
    "package": lightning_gradclip.__file__,
    "torch": "torch" in sys.modules,
    "version": lightning_gradclip.__version__,
}))
"""


def execute(*command: object, cwd: Path) -> str:
    process = subprocess.run([str(word) for word in command], cwd=cwd, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


def test_importing_the_package_imports_nothing_heavy(tmp_path: Path) -> None:
    code = "import sys, lightning_gradclip; print(*sorted(sys.modules))"
    roots = {name.split(".")[0] for name in execute(sys.executable, "-c", code, cwd=tmp_path).split()}
    assert "lightning_gradclip" in roots
    assert not {"torch", "lightning", "torchmetrics", "hydra", "omegaconf"} & roots


def test_every_public_name_resolves_to_itself() -> None:
    assert "NormClip" in lightning_gradclip.__all__
    for name in lightning_gradclip.__all__:
        assert getattr(lightning_gradclip, name).__name__ == name


def test_a_star_import_brings_exactly_the_public_names() -> None:
    names: dict[str, object] = {}
    exec("from lightning_gradclip import *", names)
    assert names.keys() - {"__builtins__"} == set(lightning_gradclip.__all__)
    assert dir(lightning_gradclip) == sorted(lightning_gradclip.__all__)


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
    execute(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ROOT, cwd=out)
    (wheel,) = out.glob("*.whl")
    (sdist,) = out.glob("*.tar.gz")
    return {"wheel": wheel, "sdist": sdist}


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment that holds Hydra and the build backend."""
    root = tmp_path_factory.mktemp("environment")
    venv.create(root, with_pip=True)
    python = root / "bin" / "python"
    execute(python, "-m", "pip", "install", "-q", "hydra-core>=1.3.2,<1.4", "hatchling", cwd=root)
    return python


@pytest.fixture
def install(python: Path, tmp_path: Path) -> Iterator[list[object]]:
    """The start of an install command; what it installs is removed afterwards."""
    yield [python, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation"]
    execute(python, "-m", "pip", "uninstall", "-q", "-y", "lightning-gradclip", cwd=tmp_path)


def assert_composes(python: Path, elsewhere: Path) -> Path:
    """Compose the pack away from the checkout and return the folder of the package."""
    printed = json.loads(execute(python, "-W", "error", "-c", COMPOSE, cwd=elsewhere))
    assert printed["hydra"].startswith("1.3.")
    assert printed["version"] == lightning_gradclip.__version__
    assert printed["cfg"]["callbacks"]["gradclip"]["method"]["max_norm"] == 0.5
    assert not printed["torch"]
    return Path(printed["package"]).parent


@pytest.mark.packaging
def test_the_wheel_holds_the_package_the_pack_and_the_plugin(distributions: dict) -> None:
    names = set(zipfile.ZipFile(distributions["wheel"]).namelist())
    tops = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert tops == {"lightning_gradclip", "hydra_plugins"}
    # A namespace of many distributions: an `__init__.py` of ours would hide the others.
    assert {n for n in names if n.startswith("hydra_plugins/")} == {"hydra_plugins/lightning_gradclip.py"}
    assert {"lightning_gradclip/py.typed", "lightning_gradclip/conf/__init__.py"} <= names
    written = {f"lightning_gradclip/{p.relative_to(ROOT)}" for p in ROOT.glob("conf/**/*.yaml")}
    assert written == {n for n in names if n.endswith(".yaml")}


@pytest.mark.packaging
def test_the_sdist_holds_what_building_and_testing_need(distributions: dict) -> None:
    with tarfile.open(distributions["sdist"]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "conf/__init__.py"} <= names
    for folder in ("lightning_gradclip", "conf", "tests"):
        written = {
            str(path.relative_to(ROOT)) for path in (ROOT / folder).rglob("*") if path.suffix in {".py", ".yaml"}
        }
        assert written <= names


@pytest.mark.packaging
@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_a_distribution_composes(kind: str, distributions: dict, install: list, python: Path, tmp_path: Path) -> None:
    execute(*install, distributions[kind], cwd=tmp_path)
    package = assert_composes(python, tmp_path)
    assert package.is_relative_to(python.parents[1])


@pytest.mark.packaging
def test_an_editable_install_composes(install: list, python: Path, tmp_path: Path) -> None:
    execute(*install, "-e", ROOT, cwd=tmp_path)
    assert assert_composes(python, tmp_path) == ROOT / "lightning_gradclip"
