"""What the user of a Hydra application sees, with the Hydra that is installed beside the tests."""

import pytest

from kit.application import Application
from kit.command_lines import REFUSED, SEARCHES, WORKING, Line


@pytest.fixture(scope="module")
def application(tmp_path_factory: pytest.TempPathFactory) -> Application:
    return Application.copied(tmp_path_factory.mktemp("elsewhere"))


@pytest.mark.parametrize("line", [*WORKING, *REFUSED], ids=lambda line: line.__name__)
def test_a_line(line: Line, application: Application) -> None:
    line(application)


@pytest.mark.parametrize("line", SEARCHES, ids=lambda line: line.__name__)
def test_a_search(line: Line, application: Application) -> None:
    pytest.importorskip("optuna", reason="the sweep extra is not installed")
    line(application)


def test_an_application_that_does_not_use_the_pack_imports_next_to_nothing(application: Application) -> None:
    started = application.shown()
    assert started.printed == [{"seed": 1}]
    ours = {name for name in started.modules if name.startswith("lightning_gradclip")}
    assert "lightning_gradclip.hydra.search_path" in ours
    assert {name.split(".")[1] for name in ours - {"lightning_gradclip"}} <= {"hydra", "conf"}
