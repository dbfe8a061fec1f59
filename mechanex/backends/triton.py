"""The Triton kernels (`kernels/`): the usual way on a GPU; under ``TRITON_INTERPRET=1`` also on the CPU.

Triton is imported when a tensor needs it, not before. The kernels lie beside the package in a source tree and
inside it in an installed one; either way they become the modules ``mechanex.kernels.*``.

Log-probabilities without a gradient are one kernel that multiplies and reduces, and no logit reaches memory: half types
on tensor cores, and float32 where the rows are so few that reading the weights is what takes the time. With one, the
walk of :mod:`mechanex.backends.chunked` needs two vendor products in all, where a kernel that computes the logits again
would need three: an accumulator of whole rows (128 of 8,192 float32 numbers: 4 MiB) fits no multiprocessor, so that the
logits' gradients pass through memory either way.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from mechanex.errors import MechanexError
from mechanex.ops.edits import StackedEdits
from mechanex.ops.encoder import FeatureEncoder
from mechanex.ops.head import Head

from .arithmetic import check_rows
from .backend import NEGATED, Backend, Kernel, is_negated
from .chunked import Chunked, Found, check_target
from .native.modules import replays

__all__ = [
    "BACKEND",
    "LOGPROB",
    "TORCH_ROWS",
    "completion_logprob",
    "direct",
    "fuses",
    "interpreted",
    "missing",
    "sae_features",
    "sae_top_features",
    "steer",
    "steer_gradients",
    "steer_many",
]

_HALF = (torch.bfloat16, torch.float16)
# Rows of float32, which has no tensor cores, up to which reading the weights takes longer than multiplying them.
_FLOAT_ROWS = 16
# From this many rows on, a matrix product with a widened encoder of a sparse autoencoder uses a GPU better than tiles
# that are read for a few.
TORCH_ROWS = 128
# The number of CUDA among DLPack's devices.
_DLPACK_CUDA = 2
# Compute capability that Triton supports.
_CAPABILITY = (8, 0)
# Each may import those before it.
_FILES = (
    "convert",
    "launch",
    "steer",
    "steer_many",
    "steer_gradients",
    "logprob",
    "logprob_reduce",
    "logprob_finish",
    "sae",
)
_PACKAGE = Path(__file__).resolve().parent.parent


@functools.cache
def interpreted() -> bool:
    """Whether ``TRITON_INTERPRET`` asks for the interpreter, which runs kernels on the CPU, slowly.

    Asked once: Triton itself looks when it is imported.
    """
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


def devices() -> tuple[str, ...]:
    """Device types that the kernels serve."""
    return ("cuda", "cpu") if interpreted() else ("cuda",)


def missing() -> str | None:
    """Why the backend can't run here and what to do about it, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; `pip install triton` (Linux), or choose auto or eager"
    if interpreted():
        return _trial("cpu")
    if not torch.cuda.is_available():
        return (
            "torch sees no CUDA device; choose auto, eager or native, or set TRITON_INTERPRET=1 to run the "
            "kernels slowly on the CPU"
        )
    return _trial("cuda")


def describe() -> str:
    """Triton's version and how the kernels run."""
    import triton

    return f"triton {triton.__version__}, {'interpreted on the CPU' if interpreted() else 'compiled'}"


@functools.cache
def direct() -> Callable[..., Tensor | None] | None:
    """The steer op on torch's tensors themselves, by launches that are made again; as ``native.direct`` gives it.

    None where the kernels don't run, torch (before 2.10) doesn't show its tensors to compiled code, or there is none.
    """
    if interpreted() or torch.version.hip is not None or missing() is not None:
        return None
    replay = replays()
    if replay is None:
        return None
    found: Callable[..., Tensor | None] = _kernel("steer").direct(replay, refuses_steer, _DLPACK_CUDA)
    return found


@functools.cache
def _trial(device: str) -> str | None:
    """What goes wrong when the smallest steer runs: no compiler for the launcher, an old GPU, a broken install."""
    if device == "cuda" and torch.version.hip is None:
        oldest = min(torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count()))
        if oldest < _CAPABILITY:
            return (
                f"Triton needs compute capability {'.'.join(map(str, _CAPABILITY))}, this machine has "
                f"{'.'.join(map(str, oldest))}; choose auto or eager"
            )
    try:
        ones = torch.ones(1, 1, device=device)
        _kernel("steer").steer(ones, None, ones, None, None)
    except Exception as error:  # whatever a compiler may raise is a reason to fall back
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        return f"a trial kernel did not run ({type(error).__name__}: {first}); choose auto or eager"
    return None


@functools.cache
def _kernel(stem: str) -> ModuleType:
    """``kernels/<stem>.py`` as the module ``mechanex.kernels.<stem>``, after those that it may import.

    Not by ``import``, which in an editable install would find the old copy that the installation left behind.
    """
    before = _FILES[: _FILES.index(stem)]
    if before:
        _kernel(before[-1])
    name = f"mechanex.kernels.{stem}"
    spec = importlib.util.spec_from_file_location(name, _source(f"{stem}.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _source(name: str) -> Path:
    """The file ``kernels/<name>``: beside the package in a source tree, in it when installed."""
    installed = _PACKAGE / "kernels" / name
    tree = _PACKAGE.parent / "kernels" / name
    if installed.is_file():
        return installed
    # Beside an installed package, a folder `kernels` is another project's.
    if tree.is_file() and (_PACKAGE.parent / "pyproject.toml").is_file():
        return tree
    raise MechanexError(f"the kernel source {installed} is missing: reinstall mechanex")


def refuses_steer(
    hidden: Tensor, rows: Tensor | None, bias: Tensor | None, left: Tensor | None, right: Tensor | None
) -> str | None:
    """Why the kernels can't take these arguments, or None."""
    if is_negated(hidden, bias, left, right):
        return NEGATED
    if left is None:
        return None
    limits = _kernel("launch")
    if left.shape[1] > limits.MAX_RANK:
        return f"the rank is {left.shape[1]}, the kernels take at most {limits.MAX_RANK}"
    if left.shape[2] > limits.MAX_WIDTH:
        return (
            f"the width is {left.shape[2]}, edits with a rank may be at most {limits.MAX_WIDTH} wide: "
            "a program holds a whole row"
        )
    return None


def declines_steer(
    hidden: Tensor, rows: Tensor | None, bias: Tensor | None, left: Tensor | None, right: Tensor | None
) -> str | None:
    """Why ``auto`` leaves these arguments to plain torch, or None."""
    if rows is None and left is None and bias is not None and bias.dtype is hidden.dtype:
        return "one vector added to every row is a plain addition"
    return None


def steer(
    hidden: Tensor, rows: Tensor | None, bias: Tensor | None, left: Tensor | None, right: Tensor | None
) -> Tensor:
    """``y = x + b + Lᵀ(R x)`` per row; shapes and meaning as in :func:`mechanex.backends.reference.steer`.

    Raises:
        ValidationError: a row index is out of range (interpreter; a GPU gives NaN rows).
    """
    table = bias if bias is not None else left
    if rows is not None and table is not None and rows.device.type == "cpu":
        check_rows(rows, table.shape[0])
    out: Tensor = _kernel("steer").steer(hidden, rows, bias, left, right)
    return out


def steer_gradients(
    grad: Tensor,
    hidden: Tensor | None,
    rows: Tensor | None,
    bias: Tensor | None,
    left: Tensor | None,
    right: Tensor | None,
    needed: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients for ``bias``, ``left`` and ``right``, each where ``needed``; twice the same bits."""
    found: tuple[Tensor | None, Tensor | None, Tensor | None] = _kernel("steer_gradients").gradients(
        grad, hidden, rows, bias, left, right, needed
    )
    return found


def refuses_steer_many(
    hidden: Tensor, rows: Tensor | None, strength: Tensor | None, edits: StackedEdits
) -> str | None:
    """Why the kernel can't take these arguments, or None."""
    bias, left, right, _, weight, offset = edits.tensors
    if is_negated(strength, weight, offset):
        return NEGATED
    reason = refuses_steer(hidden, rows, bias, left, right)
    widest: int = _kernel("launch").MAX_WIDTH
    if reason is None and hidden.shape[1] > widest:
        return f"the width is {hidden.shape[1]}, several edits take at most {widest}: a program holds a whole row"
    return reason


def steer_many(hidden: Tensor, rows: Tensor | None, strength: Tensor | None, edits: StackedEdits) -> Tensor:
    """Several edits of a row in order; see :func:`mechanex.backends.reference.steer_many`.

    Raises:
        ValidationError: a row index is out of range (interpreter; a GPU gives NaN rows).
    """
    if rows is not None and rows.device.type == "cpu":
        check_rows(rows, edits.bias.shape[0])
    out: Tensor = _kernel("steer_many").steer_many(hidden, rows, strength, edits)
    return out


def refuses_negated(hidden: Tensor, head: Head, target: Tensor) -> str | None:
    """Why the kernels of log-probabilities can't take these arguments, or None."""
    return NEGATED if is_negated(hidden, head.weight, head.bias) else None


def fuses(hidden: Tensor) -> bool:
    """Whether one kernel multiplies and reduces."""
    return hidden.dtype in _HALF or (hidden.dtype is torch.float32 and hidden.shape[0] <= _FLOAT_ROWS)


def completion_logprob(hidden: Tensor, head: Head, target: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities and log-sum-exps; as :func:`mechanex.backends.reference.completion_logprob`.

    Raises:
        ValidationError: a target is out of range (interpreter; a GPU gives NaN rows).
    """
    if not fuses(hidden):
        return LOGPROB.run(hidden, head, target)
    if target.device.type == "cpu":
        check_target(target, head.weight.shape[0])
    found: tuple[Tensor, Tensor] = _kernel("logprob").logprob(hidden, head, target)
    return found


def _reduce(
    head: Head,
    products: Tensor,
    first: int,
    target: Tensor,
    maximum: Tensor,
    total: Tensor,
    sums: Tensor | None,
    shares: Tensor | None,
) -> None:
    """See :data:`mechanex.backends.chunked.Reduce`."""
    _kernel("logprob_reduce").reduce(head, products, first, target, maximum, total, sums, shares)


def _finish(
    head: Head,
    hidden: Tensor,
    target: Tensor,
    maximum: Tensor,
    total: Tensor,
    sums: Tensor | None,
    found: Found,
) -> None:
    """See :data:`mechanex.backends.chunked.Finish`."""
    _kernel("logprob_finish").finish(head, hidden, target, maximum, total, sums, found)


# From so many rows on a row of a chunk has a program of its own, which may narrow it where it lies.
LOGPROB = Chunked(_reduce, finish=_finish, in_place_rows=256)


def refuses_encoder(hidden: Tensor, encoder: FeatureEncoder, *_: object) -> str | None:
    """Why the kernel can't take this encoder, or None."""
    if torch.float64 in (hidden.dtype, encoder.weight.dtype):
        return "an argument is float64, whose products of tiles GPUs don't have"
    return NEGATED if any(map(is_negated, (hidden, *encoder))) else None


def declines_many_rows(hidden: Tensor, *_: object) -> str | None:
    """Why ``auto`` leaves these rows to plain torch, or None."""
    return "many rows are a matrix product" if hidden.shape[0] >= TORCH_ROWS else None


def sae_features(hidden: Tensor, encoder: FeatureEncoder) -> Tensor:
    """See :func:`mechanex.backends.reference.sae_features`."""
    found: Tensor = _kernel("sae").features(hidden, encoder)
    return found


def sae_top_features(hidden: Tensor, encoder: FeatureEncoder, k: int, signed: bool) -> tuple[Tensor, Tensor]:
    """See :func:`mechanex.backends.reference.sae_top_features`; of equal ones any."""
    found: tuple[Tensor, Tensor] = _kernel("sae").top_features(hidden, encoder, k, signed)
    return found


BACKEND = Backend(
    "triton",
    "Triton kernels for GPUs",
    devices(),
    {
        "steer": Kernel(steer, refuses_steer, declines_steer, steer_gradients),
        "steer_many": Kernel(steer_many, refuses_steer_many),
        "completion_logprob": Kernel(
            completion_logprob, refuses_negated, gradients=LOGPROB.gradients, with_slope=LOGPROB.with_slope
        ),
        "sae_features": Kernel(sae_features, refuses_encoder, declines_many_rows),
        "sae_top_features": Kernel(sae_top_features, refuses_encoder, declines_many_rows),
    },
    missing,
    describe,
)
