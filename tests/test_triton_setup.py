"""Where the Triton backend runs: its kernels compile for GPUs, are found however installed, and their lack is named."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import torch
from test_triton import HERE, outside_the_interpreter, python

import mechanex
from mechanex.backends import triton as backend
from mechanex.errors import MechanexError
from mechanex.ops.steer import steer

in_a_source_tree = pytest.mark.skipif(
    not (HERE.parent / "pyproject.toml").exists(), reason="runs from a source tree only"
)

# Stands in for a GPU: every launch is compiled to machine code for it, and not started.
COMPILE = """
import sys, torch
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

class Driver:
    def get_current_target(self):
        return GPUTarget("cuda", int(sys.argv[1]), 32)
    def get_current_device(self):
        return 0
    def get_current_stream(self, device):
        return 0

driver.set_active(Driver())
compiled, run = {}, JITFunction.run

def compile_only(self, *args, grid, warmup, **options):
    kernel = run(self, *args, grid=grid, warmup=True, **options)
    compiled.setdefault(self.__name__, []).append("cubin" in kernel.asm)

JITFunction.run = compile_only
from mechanex.backends import triton
from optable import MANY_CASES, SAE_CASES, SteerCase, with_edits
steer = triton._kernel("steer").steer
many = triton._kernel("steer_many").steer_many
gradients = triton._kernel("steer_gradients").gradients
cases = (
    SteerCase(1024, 1024, 2, 4, "mixed"), SteerCase(1, 1), SteerCase(64, 2048, 16, 1, "mixed"),
    SteerCase(5, 47, 2, 64, "mixed", "offset"), SteerCase(2, 20000, 2, 1, "mixed"),
)
for case in cases[: int(sys.argv[2])]:
    for name in sys.argv[3:]:
        args = case.make(getattr(torch, name))
        steer(*args)
        gradients(torch.zeros_like(args[0]), *args, (True, True, True))
for case in MANY_CASES[2:12:3][-int(sys.argv[2]):]:
    for name in sys.argv[3:]:
        many(*with_edits(case.make(getattr(torch, name))))
sae = triton._kernel("sae")
for case in SAE_CASES[2 : 2 + int(sys.argv[2])]:
    for encoder in (torch.float32, torch.bfloat16, torch.int8):
        sae.features(*case.encoder(torch.bfloat16, encoder))
        sae.top_features(*case.encoder(torch.float32, encoder), case.k, case.signed)
print(sorted(compiled), all(all(found) for found in compiled.values()))
"""


# A GPU's capability, how many cases, and dtypes.
TARGETS = [
    ("90", "1", "bfloat16", "float32"),
    *(
        pytest.param((capability, "5", "bfloat16", "float16", "float32", "float64"), marks=pytest.mark.long)
        for capability in ("80", "90")
    ),
]


@pytest.mark.ci
@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_every_kernel_compiles_for_a_gpu_that_is_not_there(target: tuple[str, ...], tmp_path: Path) -> None:
    done = python("-c", COMPILE, *target, TRITON_CACHE_DIR=str(tmp_path), CUDA_VISIBLE_DEVICES="")
    names = (
        "_add_partial_sums_kernel",
        "_partial_sums_kernel",
        "_project_kernel",
        "_sae_kernel",
        "_steer_kernel",
    )
    names = (*names, "_steer_many_kernel")
    assert done.stdout.strip() == f"{list(names)} True", done.stderr[-3000:]


@outside_the_interpreter
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so() -> None:
    with pytest.raises(MechanexError, match=r"torch sees no CUDA device; .*TRITON_INTERPRET=1"):
        steer(torch.ones(1, 2), None, torch.ones(1, 2), backend="triton")


def test_without_triton_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    assert backend.missing() == (
        "triton is not installed; `pip install triton` (Linux), or choose auto or eager"
    )


def test_a_gpu_that_cannot_compile_falls_back_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(stem: str) -> None:
        raise RuntimeError("Failed to find C compiler.\nPlease specify via CC.")

    monkeypatch.setattr(backend, "_kernel", broken)
    backend._trial.cache_clear()
    try:
        assert backend._trial("cpu") == (
            "a trial kernel did not run (RuntimeError: Failed to find C compiler.); choose auto or eager"
        )
    finally:
        backend._trial.cache_clear()


def test_triton_is_imported_only_when_needed() -> None:
    code = """
import sys, torch
from mechanex import backends
from mechanex.ops.steer import steer
steer(torch.ones(2, 3), None, torch.ones(1, 3), torch.ones(1, 1, 3), torch.ones(1, 1, 3))
print([m for m in sys.modules if m.split(".")[0] == "triton"])
"""
    assert python("-c", code).stdout.strip() == "[]"


RUN = """
import torch
from mechanex.backends import triton
from mechanex.ops.steer import steer
print(steer(torch.zeros(1, 3), None, torch.ones(1, 3), backend="triton").tolist())
print(triton._kernel("steer").__name__, triton._kernel("steer").__file__)
"""


@pytest.mark.ci
@in_a_source_tree
@pytest.mark.skipif(
    Path(mechanex.__file__).resolve().parent.parent != HERE.parent, reason="the package is a staged copy"
)
def test_a_source_tree_runs_the_kernels_that_it_holds(tmp_path: Path) -> None:
    # From another folder, so that an editable install must find them.
    done = python("-c", RUN, cwd=tmp_path, TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")
    source = HERE.parent / "kernels" / "steer.py"
    assert done.stdout.split("\n")[:2] == [
        "[[1.0, 1.0, 1.0]]",
        f"mechanex.kernels.steer {source}",
    ], done.stderr


@pytest.mark.ci
@in_a_source_tree
def test_an_installed_package_runs_its_own_kernels(tmp_path: Path) -> None:
    site, package = tmp_path / "site", tmp_path / "site" / "mechanex"
    shutil.copytree(
        HERE.parent / "mechanex", package, ignore=shutil.ignore_patterns("__pycache__", "bundled", "*.so")
    )
    # As another project's package may lie there.
    (site / "kernels").mkdir()
    for name in ("convert.py", "steer.py"):
        (site / "kernels" / name).write_text("raise SystemExit('not ours')")
    folders = [str(site), *(p for p in sys.path if p.endswith(("site-packages", "dist-packages")))]
    # Without -S, an editable install's hook would answer first.
    code = f"import sys; sys.path[:0] = {folders!r}\n{RUN}"
    done = python("-S", "-c", code, cwd=tmp_path, TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")
    assert f"the kernel source {package / 'kernels' / 'convert.py'} is missing: reinstall" in done.stderr
    shutil.copytree(HERE.parent / "kernels", package / "kernels")
    done = python("-S", "-c", code, cwd=tmp_path, TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")
    assert done.stdout.split("\n")[:2] == [
        "[[1.0, 1.0, 1.0]]",
        f"mechanex.kernels.steer {package / 'kernels' / 'steer.py'}",
    ], done.stderr
