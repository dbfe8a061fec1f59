"""What an installation consists of: with a compiler, without one, and pure on purpose."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

import mechanex
from mechanex.backends import native

ROOT = Path(__file__).resolve().parent.parent
BUILD = "import sys; from scikit_build_core.build import build_wheel; print(build_wheel(sys.argv[1]))"

pytestmark = [
    pytest.mark.ci,
    pytest.mark.skipif(not (ROOT / "pyproject.toml").exists(), reason="not in a source tree"),
]

Builder = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def build(tmp_path: Path) -> Builder:
    """Build a wheel of the source tree into ``tmp_path`` with these environment variables."""
    pytest.importorskip("scikit_build_core")

    def run(**environment: str) -> subprocess.CompletedProcess[str]:
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("MECHANEX_", "SKBUILD_"))}
        return subprocess.run(
            [sys.executable, "-c", BUILD, str(tmp_path)],
            cwd=ROOT,
            env={**clean, **environment},
            capture_output=True,
            text=True,
            check=False,
        )

    return run


def wheel_of(done: subprocess.CompletedProcess[str], folder: Path) -> Path:
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / done.stdout.strip().splitlines()[-1]


def run_from(folder: Path, code: str) -> subprocess.CompletedProcess[str]:
    """Run ``code`` with the package in ``folder``, whatever this environment has installed under its name."""
    site = [p for p in sys.path if p.endswith(("site-packages", "dist-packages"))]
    # Without -S, an editable install's hook would answer first.
    code = f"import sys; sys.path[:0] = {[str(folder), *site]!r}\n{code}"
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "MECHANEX_BACKEND")}
    return subprocess.run(
        [sys.executable, "-S", "-c", code], cwd=folder, env=clean, capture_output=True, text=True, check=False
    )


def test_the_version_is_written_once() -> None:
    assert importlib.metadata.version("mechanex") == mechanex.__version__
    found = [
        path
        for pattern in ("pyproject.toml", "CMakeLists.txt", "mechanex/**/*.py", "csrc/**/*")
        for path in ROOT.glob(pattern)
        if path.is_file() and f'"{mechanex.__version__}"' in path.read_text(errors="ignore")
    ]
    assert found == [ROOT / "mechanex" / "_version.py"]


def test_a_pure_wheel_is_for_any_platform_and_says_what_it_lacks(build: Builder, tmp_path: Path) -> None:
    wheel = wheel_of(build(MECHANEX_PURE="1"), tmp_path)
    assert wheel.name == f"mechanex-{mechanex.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "site")
    assert {name.split("/")[0] for name in names} == {
        "mechanex",
        f"mechanex-{mechanex.__version__}.dist-info",
    }
    assert {"mechanex/__init__.py", "mechanex/py.typed", "mechanex/ops/steer.py"} <= set(names)
    page = ROOT / "mechanex" / "server" / "page" / "static"
    assert {f"mechanex/server/page/static/{path.name}" for path in page.iterdir()} <= set(names)
    assert not [n for n in names if n.endswith((".so", ".pyd", ".pyc", ".cpp"))]
    assert any(n.endswith("licenses/LICENSE") for n in names)

    done = run_from(tmp_path / "site", "from mechanex.__main__ import main; main()")
    assert done.returncode == 0, done.stderr
    assert re.search(
        r"native +does not run: .*mechanex\._native is not installed.*C\+\+17 compiler", done.stdout
    )

    code = """
import torch
from mechanex.ops.steer import steer
print(steer(torch.zeros(2, 3), torch.tensor([0, -1], dtype=torch.int32), torch.ones(1, 3)).tolist())
steer(torch.zeros(2, 3), None, torch.ones(1, 3), backend="native")
"""
    done = run_from(tmp_path / "site", code)
    assert done.stdout.strip() == "[[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]]", done.stderr
    assert "falls back to plain torch" in done.stderr
    assert "MechanexError: backend 'native' can't run here" in done.stderr


def test_a_wheel_says_where_the_repository_is_if_the_build_was_told(build: Builder, tmp_path: Path) -> None:
    repository = "https://git.example/owner/mechanex"
    wheel = wheel_of(build(MECHANEX_PURE="1"), tmp_path)
    with zipfile.ZipFile(wheel) as archive:
        metadata = archive.read(f"mechanex-{mechanex.__version__}.dist-info/METADATA").decode()
    assert "Description-Content-Type: text/markdown" in metadata and "# mechanex" in metadata
    assert "Project-URL" not in metadata
    wheel = wheel_of(build(MECHANEX_PURE="1", MECHANEX_REPOSITORY=f"{repository}/"), tmp_path)
    with zipfile.ZipFile(wheel) as archive:
        metadata = archive.read(f"mechanex-{mechanex.__version__}.dist-info/METADATA").decode()
    assert f"Project-URL: Source, {repository}\n" in metadata
    assert f"]({repository}/raw/v{mechanex.__version__}/docs/demo.png)" in metadata


@pytest.mark.skipif(shutil.which("cmake") is None, reason="no cmake on this machine")
def test_without_a_compiler_the_install_goes_on_unless_told_otherwise(build: Builder, tmp_path: Path) -> None:
    broken = {"CC": "/nonexistent/cc", "CXX": "/nonexistent/c++"}
    assert wheel_of(build(**broken), tmp_path).name.endswith("-py3-none-any.whl")
    done = build(**broken, MECHANEX_REQUIRE_NATIVE="1")
    assert done.returncode != 0
    assert "CMAKE_CXX_COMPILER" in done.stdout + done.stderr


@pytest.mark.skipif(native.missing() is not None, reason="no native module")
def test_the_compiled_module_needs_neither_torch_nor_openmp() -> None:
    import mechanex._native

    binary = Path(mechanex._native.__file__).read_bytes()
    for library in (b"libtorch", b"libc10", b"libgomp", b"libomp", b"libiomp"):
        assert library not in binary


def test_kernels_are_no_package_of_their_own() -> None:
    assert (ROOT / "kernels").is_dir()
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_ci_pins_exact_versions() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(
        re.match(r"[A-Za-z0-9._-]+==[0-9][^ ;]*(; python_version >= \"3\.11\")?$", line) for line in lines
    )
    (torch_pin,) = [line for line in lines if line.startswith("torch==")]
    assert f"TORCH ?= {torch_pin}\n" in (ROOT / "Makefile").read_text()
