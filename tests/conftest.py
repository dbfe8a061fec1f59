"""What every test runs under: its own user folder, no network, two threads, a fixed seed."""

from __future__ import annotations

import os
import signal

# Before torch or a tokenizer library is imported: both read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Workers of pytest-xdist, and the processes that their tests start, share what one process would use; threads that
# spin while they wait for work would take it from the others.
_THREADS = max(1, 2 // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))
os.environ.setdefault("OMP_NUM_THREADS", str(_THREADS))
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
for _name in (
    "MECHANEX_ALLOW_HTTP",
    "MECHANEX_API_KEY",
    "MECHANEX_BACKEND",
    "MECHANEX_BASE_URL",
    "MECHANEX_CPU_ISA",
    "MECHANEX_EMAIL",
    "MECHANEX_PASSWORD",
    "MECHANEX_SERVER_KEY",
    "MECHANEX_TRACEBACK",
):
    os.environ.pop(_name, None)

import importlib.util  # noqa: E402
import itertools  # noqa: E402
import random  # noqa: E402
import site  # noqa: E402
import sys  # noqa: E402
from collections.abc import Iterator  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import TYPE_CHECKING  # noqa: E402

import pytest  # noqa: E402

if TYPE_CHECKING:
    from postgres_server import Postgres


def _let_children_find_the_package() -> None:
    """Python processes that tests start import the package that this one does, wherever it was found."""
    spec = importlib.util.find_spec("mechanex")
    assert spec is not None and spec.origin is not None
    folder = str(Path(spec.origin).resolve().parents[1])
    if folder not in site.getsitepackages():  # there they look anyway
        others = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = folder if not others else os.pathsep.join([folder, others])


_let_children_find_the_package()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests marked ``gpu`` run only where CUDA does, those marked ``real`` only by ``make test-real``."""
    if "MECHANEX_REAL_HOME" not in os.environ:
        real = [item for item in items if item.get_closest_marker("real")]
        config.hook.pytest_deselected(items=real)
        items[:] = [item for item in items if not item.get_closest_marker("real")]
    # Files with slow tests come first: a worker that runs out takes from the others' ends, and they end together.
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
    if not any(item.get_closest_marker("gpu") for item in items):
        return
    import torch

    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session", autouse=True)
def _interrupts() -> None:
    """A shell's background job is told to ignore Ctrl-C, and would hand that on to every process that a test starts."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _threads() -> None:
    import torch

    torch.set_num_threads(_THREADS)


@pytest.fixture(scope="session", autouse=True)
def _session_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user folder, and a place for credentials, for fixtures that live longer than a test; where each test's lie."""
    os.environ["MECHANEX_HOME"] = str(tmp_path_factory.mktemp("mechanex-home"))
    os.environ["MECHANEX_CONFIG"] = str(tmp_path_factory.mktemp("mechanex-config") / "config.json")
    return tmp_path_factory.mktemp("homes")


_homes = itertools.count()


@pytest.fixture(autouse=True)
def mechanex_home(_session_home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The test's own user folder, empty, and no credentials."""
    folder = _session_home / str(next(_homes))
    folder.mkdir()
    monkeypatch.setenv("MECHANEX_HOME", str(folder / "home"))
    monkeypatch.setenv("MECHANEX_CONFIG", str(folder / "credentials" / "config.json"))
    return folder / "home"


@pytest.fixture(scope="session")
def postgresql() -> Iterator[Postgres]:
    """A PostgreSQL server; the test is skipped where there is no program for it."""
    import postgres_server

    if postgres_server.find_programs() is None:
        pytest.skip("PostgreSQL is not installed")
    with postgres_server.postgres() as running:
        yield running


@pytest.fixture(params=["generic", "avx2", "avx512"])
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    """The native kernels run with one instruction set after the other; skipped where there is none or not this one."""
    from mechanex.backends import native
    from mechanex.backends.native import modules

    if native.missing() is not None or request.param not in native.levels():
        pytest.skip(f"this processor or build lacks {request.param}")
    modules.cpu().select_level(request.param)
    assert native.describe().startswith(f"{request.param} ")
    yield request.param
    modules.cpu().select_level("")


@pytest.fixture
def fitting_bridges() -> None:
    """Skips a test of TransformerLens' bridges where those that are installed don't fit transformers."""
    from bridges import bridges_fit

    if not bridges_fit():
        pytest.skip("no TransformerLens here that fits this transformers")


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest) -> str | None:
    """The URL of an empty database for accounts; None for SQLite in its usual place."""
    if request.param == "sqlite":
        return None
    server: Postgres = request.getfixturevalue("postgresql")
    return server.new_database()


@pytest.fixture(autouse=True)
def _seed() -> None:
    import numpy
    import torch

    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _shared_models_stay_as_they_are() -> Iterator[None]:
    """A test that changes a model which others share would decide what those find."""
    yield
    if "families" in sys.modules:
        changed = sys.modules["families"].changed_models()
        assert not changed, (
            f"this test changed the shared model of {', '.join(changed)}; FAMILIES[name]() is its own"
        )
