"""Choosing a backend: in code, by environment, by argument; what is missing is named."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from optable import SteerCase

from mechanex import backends
from mechanex.backends import native
from mechanex.backends.native import modules
from mechanex.errors import MechanexError, ValidationError
from mechanex.ops.steer import steer

ARGS = SteerCase(4, 16, n_edits=2, rank=1, rows="mixed").make(torch.float32)


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run ``code`` in a new interpreter with these variables set."""
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_process_that_a_test_starts_runs_the_same_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = python("import mechanex; print(mechanex.__file__)")
    assert Path(done.stdout.strip()).samefile(backends.__path__[0] + "/../__init__.py"), done.stderr


@pytest.fixture
def without_native(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library as a pure-Python install has it."""
    monkeypatch.setitem(sys.modules, "mechanex._native", None)
    monkeypatch.delattr("mechanex._native", raising=False)
    caches = (modules.load, modules.cpu, modules.direct, modules.replays, backends._candidates)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the backends that compute, in order."""
    seen: list[str] = []
    monkeypatch.setattr(native, "direct", lambda device: None)  # computes past the registry
    for backend in backends.backends():
        for op, kernel in backend.ops.items():

            def run(*args: object, _run=kernel.run, _name=backend.name) -> torch.Tensor:  # type: ignore[no-untyped-def]
                seen.append(_name)
                return _run(*args)

            monkeypatch.setitem(backend.ops, op, backends.Kernel(run, kernel.refuses, kernel.declines))
    backends._candidates.cache_clear()
    yield seen
    backends._candidates.cache_clear()


def test_use_sets_and_as_a_context_restores(recorded: list[str]) -> None:
    assert backends.active() == "auto"
    with backends.use("reference"):
        steer(*ARGS)
        with backends.use("eager"):
            assert backends.active() == "eager"
            steer(*ARGS)
        assert backends.active() == "reference"
    assert backends.active() == "auto"
    assert recorded == ["reference", "eager"]
    former = backends.use("eager")
    try:
        assert backends.active() == "eager"
    finally:
        former.__exit__(None, None, None)
    assert backends.active() == "auto"


def test_the_former_choice_comes_back_after_an_exception() -> None:
    with pytest.raises(RuntimeError), backends.use("eager"):
        raise RuntimeError
    assert backends.active() == "auto"


def test_the_argument_of_a_call_wins(recorded: list[str]) -> None:
    with backends.use("eager"):
        steer(*ARGS, backend="reference")
        steer(*ARGS, backend="auto")
    assert recorded[0] == "reference"
    assert recorded[1] != "reference"


@pytest.mark.parametrize("name", ["numpy", "", "Eager", None, 3])
def test_an_unknown_backend_lists_the_known_ones(name: object) -> None:
    with pytest.raises(ValidationError, match=r"choose auto or one of reference .*eager .*native .*triton"):
        backends.use(name)  # type: ignore[arg-type]
    if name:
        with pytest.raises(ValidationError, match="unknown backend"):
            steer(*ARGS, backend=name)  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "status"), [(" Eager ", "eager"), ("", "auto")])
def test_the_environment_chooses(name: str, status: str) -> None:
    done = python("from mechanex import backends; print(backends.active())", MECHANEX_BACKEND=name)
    assert done.stdout.strip() == status, done.stderr


def test_an_unknown_backend_in_the_environment_is_an_error() -> None:
    code = "import torch; from mechanex.ops.steer import steer; steer(torch.zeros(1, 2), None, torch.zeros(1, 2))"
    done = python(code, MECHANEX_BACKEND="fast")
    assert done.returncode != 0
    assert "ValidationError: unknown backend 'fast'" in done.stderr


def test_a_choice_that_cannot_run_is_an_error_that_names_the_way_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(MechanexError, match=r"'triton' can't run here: triton is not installed; .*eager"):
        backends.use("triton")
    with pytest.raises(MechanexError, match="'triton' can't run here"):
        steer(*ARGS, backend="triton")
    assert backends.active() == "auto"


@pytest.mark.skipif(native.missing() is not None, reason="no native module")
def test_native_refuses_what_it_cannot_serve() -> None:
    with pytest.raises(ValidationError, match="serves tensors on cpu, cuda, got one on meta"):
        steer(*(None if t is None else t.to("meta") for t in ARGS), backend="native")
    high = SteerCase(2, 80, rank=65).make(torch.float32)
    with pytest.raises(ValidationError, match=r"rank is 65, .* at most 64; choose auto or eager"):
        steer(*high, backend="native")
    assert steer(*high).shape == (2, 80)


@pytest.mark.skipif(native.missing() is not None, reason="no native module")
def test_auto_takes_native_on_the_cpu_but_leaves_additions_to_torch(recorded: list[str]) -> None:
    steer(*ARGS)
    assert recorded == ["native"]
    hidden, _, bias, *_ = ARGS
    steer(hidden, None, bias[:1], backend="auto")
    assert recorded == ["native", "eager"]


@pytest.mark.skipif(native.missing() is not None, reason="no native module")
@pytest.mark.parametrize(
    ("n_rows", "width", "n_edits", "rank", "expected"),
    [
        (8, 16, 1, 48, "native"),
        (8, 16, 1, 49, "eager"),
        (8, 16, 2, 49, "native"),
        (1, 8192, 1, 16, "native"),
        (1, 8192, 1, 17, "eager"),
        (2, 8192, 1, 17, "native"),
    ],
)
def test_auto_leaves_single_edits_of_high_rank_to_torch(
    recorded: list[str], n_rows: int, width: int, n_edits: int, rank: int, expected: str
) -> None:
    case = SteerCase(n_rows, width, n_edits=n_edits, rank=rank, rows="none" if n_edits == 1 else "mixed")
    steer(*case.make(torch.float32))
    assert recorded == [expected]


@pytest.mark.usefixtures("without_native")
def test_without_the_compiled_module_auto_falls_back_and_says_so_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING, logger="mechanex.backends"):
        first, second = steer(*ARGS), steer(*ARGS)
    assert torch.equal(first, steer(*ARGS, backend="eager"))
    assert torch.equal(first, second)
    assert [r.message for r in caplog.records if "falls back" in r.message] == [
        f"steer on cpu falls back to plain torch: {native.missing()}"
    ]


@pytest.mark.usefixtures("without_native")
def test_without_the_compiled_module_native_says_what_is_missing() -> None:
    with pytest.raises(
        MechanexError, match=r"mechanex\._native is not installed; install a C\+\+17 compiler"
    ):
        backends.use("native")
    with pytest.raises(MechanexError, match=r"C\+\+17 compiler"):
        steer(*ARGS, backend="native")


@pytest.mark.skipif(native.missing() is not None, reason="no native module")
def test_the_environment_chooses_the_instruction_set() -> None:
    done = python(
        "from mechanex.backends import native; print(native.describe())", MECHANEX_CPU_ISA=" Generic"
    )
    assert done.stdout.startswith("generic "), done.stderr


@pytest.mark.skipif(native.missing() is not None, reason="no native module")
def test_an_unknown_instruction_set_is_an_error_even_under_auto() -> None:
    code = "import torch; from mechanex.ops.steer import steer; x = torch.zeros(1, 2); "
    code += "steer(x, None, x, x[None], x[None])"
    done = python(code, MECHANEX_CPU_ISA="AVX-512")
    assert done.returncode != 0
    assert "ValidationError: MECHANEX_CPU_ISA=avx-512: unknown instruction set" in done.stderr


@pytest.mark.skipif(native.missing() is not None, reason="no native module")
def test_threads_come_from_torch() -> None:
    assert "torch's threads" in native.describe()
    args = SteerCase(512, 512, rank=2).make(torch.float32)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        shared = steer(*args, backend="native")
        torch.set_num_threads(1)
        assert torch.equal(steer(*args, backend="native"), shared)
    finally:
        torch.set_num_threads(threads)


def test_the_module_prints_what_runs_and_why_the_rest_does_not() -> None:
    done = subprocess.run([sys.executable, "-m", "mechanex"], capture_output=True, text=True, check=True)
    assert f"torch             {torch.__version__}" in done.stdout
    for backend in backends.backends():
        reason = backend.missing()
        state = "runs" if reason is None else f"does not run: {reason}"
        assert any(
            line.split()[0] == backend.name and state in line for line in done.stdout.splitlines() if line
        )


def test_the_report_survives_bad_settings() -> None:
    variables = {"MECHANEX_BACKEND": "fast", "MECHANEX_CPU_ISA": "sse9"}
    done = python("import runpy; runpy.run_module('mechanex', run_name='__main__')", **variables)
    assert done.returncode == 0, done.stderr
    assert "unknown backend 'fast'" in done.stdout
    assert "MECHANEX_CPU_ISA=sse9" in done.stdout
