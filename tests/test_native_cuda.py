"""The Python side of the CUDA kernels: what it says where they can't run."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mechanex import backends
from mechanex._version import __version__
from mechanex.backends import native
from mechanex.backends.native import modules
from mechanex.errors import MechanexError


@pytest.fixture
def fresh() -> None:
    """Look for the module and the device anew, in the test and after it."""
    caches = (modules.load, modules.cuda, modules.missing_cuda, backends._candidates)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.fixture
def without_module(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library as it is where no nvcc was found."""
    monkeypatch.setitem(sys.modules, "mechanex._native_cuda", None)
    monkeypatch.delattr("mechanex._native_cuda", raising=False)


@pytest.mark.usefixtures("without_module")
def test_a_missing_module_is_named_with_the_way_to_get_it() -> None:
    reason = modules.missing_cuda()
    assert reason is not None
    assert "mechanex._native_cuda is not installed" in reason and "MECHANEX_CUDA=ON pip install" in reason
    assert backends.get("native").lacks("cuda") in (native.missing(), reason)


@pytest.mark.usefixtures("without_module")
def test_the_cpu_kernels_do_not_need_it() -> None:
    if native.missing() is not None:
        pytest.skip("no native module")
    assert backends.get("native").lacks("cpu") is None
    assert "not on GPUs: the compiled module mechanex._native_cuda is not installed" in native.describe()


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize(
    ("numbers", "said"),
    [({}, "interface 1, the rest needs 2"), ({"interface": 3}, "interface 3"), ({"interface": 2}, None)],
)
def test_a_module_of_other_sources_is_to_be_built_anew(
    numbers: dict[str, int], said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = SimpleNamespace(__version__=__version__, **numbers)
    monkeypatch.setattr(modules.importlib, "import_module", lambda path: module)
    found, reason = modules.load("_native_cuda", "build it")
    assert (found is None) == (said is not None)
    assert said is None or (said in str(reason) and str(reason).endswith("; build it"))


def test_the_sources_have_the_interface_that_is_asked_for() -> None:
    sources = Path(__file__).resolve().parent.parent / "csrc" / "cuda" / "bindings.cpp"
    if not sources.exists():
        pytest.skip("needs the source tree")
    assert f'm.attr("interface") = {modules._INTERFACES["_native_cuda"]};' in sources.read_text()


def test_a_device_that_a_backend_never_serves_is_named() -> None:
    assert backends.get("native").lacks("mps") == "it serves tensors on cpu, cuda"
    assert backends.get("eager").lacks("mps") is None


@pytest.mark.usefixtures("without_module")
def test_an_explicit_choice_raises_for_a_gpu_tensor() -> None:
    if native.missing() is not None:
        pytest.skip("no native module")
    # Only the device type of a tensor counts here, and no GPU is needed for one.
    tensor = SimpleNamespace(device=torch.device("cuda"), dtype=torch.float32)
    with pytest.raises(
        MechanexError, match=r"'native' can't run on cuda here: .*_native_cuda is not installed"
    ):
        backends.kernel("steer", "native", tensor)  # type: ignore[arg-type]


@pytest.mark.usefixtures("without_module")
@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton runs here")
def test_auto_says_once_why_it_falls_back(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="mechanex.backends"):
        first, second = backends._candidates("steer", "cuda"), backends._candidates("steer", "cuda")
    assert first is second
    (record,) = [r.message for r in caplog.records if "falls back" in r.message]
    assert record.startswith("steer on cuda falls back to plain torch: ")
    assert "_native_cuda is not installed" in record


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
@pytest.mark.usefixtures("fresh")
def test_without_a_device_the_module_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modules, "load", lambda *_: (SimpleNamespace(), None))
    assert "torch sees no CUDA device" in str(modules.missing_cuda())


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (RuntimeError("cudaGetDeviceCount: CUDA driver version is insufficient"), "update the driver"),
        (RuntimeError("cudaFuncGetAttributes: no kernel image"), "MECHANEX_CUDA_ARCHITECTURES=native"),
    ],
    ids=["driver", "architecture"],
)
def test_a_device_that_cannot_serve_is_explained(
    broken: Exception, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check_device(device: int) -> None:
        raise broken

    module = SimpleNamespace(
        check_device=check_device,
        architectures="sm_80",
        runtime_version=lambda: 13000,
        driver_version=lambda: 12040,
    )
    monkeypatch.setattr(modules, "load", lambda *_: (module, None))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    reason = modules.missing_cuda()
    assert reason is not None
    assert str(broken) in reason and message in reason
    assert "built with CUDA 13.0 for sm_80, the driver serves 12.4" in reason
