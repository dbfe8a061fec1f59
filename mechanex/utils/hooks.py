"""Steering hooks: the residual stream edited or recorded by functions attached to a model's layers.

Layer L is the residual stream that enters block L, everywhere; layer n of n the stream that leaves the last block.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from ..backends import prefers_torch
from ..engine.given import as_vector
from ..engine.hooks import Handle
from ..engine.intervention import Edit, EditTable, compute_dtype
from ..engine.models import adapter_for
from ..engine.models.huggingface import is_traced
from ..engine.positions import check_tokens, current_positions, selected, token_mask, whole_pass
from ..engine.stream import Stream, residual, with_residual
from ..errors import ValidationError

__all__ = [
    "hf_hooks_contextmanager",
    "make_abl_mat",
    "make_activs_hook_hf",
    "make_steering_hook_hf",
    "make_steering_hook_tflens",
]


@contextmanager
def hf_hooks_contextmanager(
    model: nn.Module, hook_infos: Sequence[tuple[int, Callable[..., Any]]], *, layers: str | None = None
) -> Iterator[None]:
    """Runs a block with hooks on the residual stream of a Hugging Face model.

    Several hooks on one layer run in the order given. All are removed when the block ends, also by an
    error, and none stays when registering one of them fails.

    Args:
        model: a causal model of any architecture with decoder layers.
        hook_infos: pairs (layer, hook). Negative layers count from the end; layer n of n is the stream that leaves
            the last block, before the final norm. A hook is one that the functions of this module make, or any
            forward pre-hook ``(module, args)`` or ``(module, args, kwargs)``.
        layers: dotted path of the list of decoder layers, where it isn't found by itself.

    Raises:
        ValidationError: no such layer, or the model's decoder layers aren't found.

    Example::

        hook = make_steering_hook_hf(vector)
        with hf_hooks_contextmanager(model, [(10, hook)]):
            tokens = model.generate(**tokenizer("Hello, world.", return_tensors="pt"), max_new_tokens=10)
    """
    adapter = adapter_for(model, layers=layers)
    hook_infos = list(hook_infos)
    handles = Handle()
    try:
        if any(getattr(hook, "token", None) is not None for _, hook in hook_infos):
            handles.add(adapter.track_positions())
        for layer, hook in hook_infos:
            handles.add(adapter.on_block(layer, _one_stream(adapter.stream), with_kwargs=True, traced=True))
            handles.add(
                adapter.on_block(layer, hook, with_kwargs=_takes_kwargs(hook), traced=is_traced(hook))
            )
        yield
    finally:
        handles.remove()


def _one_stream(stream: Stream) -> Callable[..., None]:
    """A pre-hook that refuses a block's call that holds more than one residual stream."""

    def check(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        stream.check(residual(args, kwargs))

    return check


def _takes_kwargs(hook: Callable[..., Any]) -> bool:
    """Whether a pre-hook is ``(module, args, kwargs)``; a third parameter with a default of its own is not that."""
    parameters = list(inspect.signature(hook).parameters.values())
    if any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in parameters):
        return True
    third = parameters[2] if len(parameters) > 2 else None
    if third is None or third.kind in (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD):
        return False
    return third.name == "kwargs" or third.default is inspect.Parameter.empty


def make_abl_mat(v: Tensor) -> Tensor:
    """The matrix M = −v vᵀ/‖v‖², so that x + Mx is x without its component along v.

    For ablation and clamp steering (arXiv:2411.09003, section 2). The hook
    ``make_steering_hook_hf(5 * v, make_abl_mat(v))`` sets the component along v to 5‖v‖;
    :meth:`mechanex.engine.intervention.Edit.clamp` does the same in rank one.

    Args:
        v: [d_model]; may require gradients, which also flow through its norm.

    Returns:
        [d_model, d_model], in v's dtype.

    Raises:
        ValueError: v is zero, not finite, or not one vector.
    """
    v = as_vector("v", v)
    wide = v.to(compute_dtype(v.dtype))
    square = wide @ wide
    if not bool(torch.isfinite(square)) or bool(square == 0):
        raise ValidationError(
            f"A direction can't be ablated along a vector whose squared norm is {float(square)}; "
            "pass a finite vector that isn't zero."
        )
    matrix: Tensor = -torch.outer(wide, wide) / square
    return matrix.to(v.dtype)


class _Steer:
    """x ← x + v + Mx, where v and M may be numbers, tensors, or tensors that require gradients."""

    def __init__(self, vector: Any, matrix: Any, token: int | slice | None) -> None:
        check_tokens(token)
        for name, value in (("vector", vector), ("matrix", matrix)):
            if name == "matrix" and value is None:
                continue
            try:
                finite = bool(torch.isfinite(torch.as_tensor(value)).all())
            except (TypeError, ValueError, RuntimeError):
                raise ValidationError(f"The {name} must be a number or a tensor; got {value!r}.") from None
            if not finite:
                raise ValidationError(f"The {name} holds NaN or infinite numbers; check how it was made.")
        self.vector = vector
        self.matrix = matrix
        self.token = token
        self.traced = token is None

    def edit(self, hidden: Tensor) -> Edit:
        """The edit for a residual stream of ``hidden``'s width, device and dtype."""
        width, device, dtype = hidden.shape[-1], hidden.device, compute_dtype(hidden.dtype)
        vector = torch.as_tensor(self.vector).to(device, dtype)
        if vector.numel() != 1 and (vector.numel() != width or vector.shape[-1] != width):
            raise ValidationError(
                f"The steering vector has shape {list(vector.shape)}, but the residual stream is {width} wide; "
                "it was made for another model."
            )
        vector = vector.reshape(-1).expand(width)
        if self.matrix is None:
            return Edit(vector)
        matrix = torch.as_tensor(self.matrix).to(device, dtype)
        if matrix.numel() == 1:
            matrix = matrix.reshape(()) * torch.eye(width, device=device, dtype=dtype)
        return Edit(vector, matrix=matrix)

    def steer(self, hidden: Tensor) -> Tensor:
        """The steered copy of ``hidden`` [B, T, d_model]."""
        table = EditTable([self.edit(hidden)])
        if self.token is None:
            return table.apply(hidden)
        return table.apply(hidden, self.chosen(hidden, self.token).to(hidden.device, torch.int32) - 1)

    def chosen(self, hidden: Tensor, token: int | slice) -> Tensor:
        """[B, T] bool: the tokens of the running call that are steered."""
        return selected(token, hidden.shape[0], hidden.shape[1])


class _SteeringHookHF(_Steer):
    def __init__(self, vector: Any, matrix: Any, token: int | slice | None) -> None:
        super().__init__(vector, matrix, token)
        plain = matrix is None and token is None and isinstance(vector, Tensor) and vector.ndim == 1
        self._plain: Tensor | None = vector if plain and vector.numel() > 1 else None

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Any:
        hidden = residual(args, kwargs or {})
        steered = None
        # Decoding makes this call once a layer and token: a vector of the stream's own dtype goes straight to torch, as
        # the op would send it. What doesn't fit is told, or moved, below.
        if self._plain is not None and self._plain.dtype is hidden.dtype and prefers_torch():
            with suppress(RuntimeError):
                steered = hidden + self._plain
        if steered is None:
            steered = self.steer(hidden)
        if kwargs is None:
            return (steered, *args[1:])
        return with_residual(steered, args, kwargs)


class _SteeringHookTL(_Steer):
    def __call__(self, tensor: Tensor, hook: Any = None) -> Tensor:
        return self.steer(tensor)

    def chosen(self, hidden: Tensor, token: int | slice) -> Tensor:
        if current_positions() is not None:
            return super().chosen(hidden, token)
        if hidden.shape[1] == 1:
            raise ValidationError(
                "A single token reached a hook with token=…, and a hook point can't tell a prompt of one token from a "
                "step with a KV cache. Run the model inside `with mechanex.engine.hooks.positions(model):`."
            )
        return token_mask(token, whole_pass(hidden))


def make_steering_hook_hf(
    vector_: Any, matrix: Any = None, token: int | slice | None = None
) -> Callable[..., Any]:
    """A hook that steers a Hugging Face model: x ← x + v + Mx, both from the original x.

    Out of place, differentiable in x, v and M, computed in float32 at least, and returned in x's dtype on
    x's device.

    Args:
        vector_: v, [d_model] or a number that is added everywhere.
        matrix: M, [d_model, d_model] or a number that multiplies x, or None.
        token: the positions that are steered, an int or a slice, None for all. Absolute positions in the
            sequence,
            prompt and generated text alike, counted from the first real token of a left-padded row; an open
            stop has no end, negatives count from the end of the prompt, as ``generate`` or the first call has it
            (see :class:`mechanex.engine.hooks.Intervention`). Holds under a KV cache too.

    Returns:
        A forward pre-hook for :func:`hf_hooks_contextmanager`.

    Raises:
        ValidationError: token is neither int nor slice; when called, a vector or matrix of another width.
    """
    return _SteeringHookHF(vector_, matrix, token)


def make_steering_hook_tflens(
    vector: Any, matrix: Any = None, token: int | slice | None = None
) -> Callable[..., Any]:
    """A hook that steers a TransformerLens model: the same function of x as :func:`make_steering_hook_hf`.

    Args:
        vector: v, [d_model] or a number.
        matrix: M, [d_model, d_model] or a number, or None.
        token: the positions that are steered, as in :func:`make_steering_hook_hf`. Under a cache it needs
            ``mechanex.engine.hooks.positions(model)`` around the calls, and raises without it.

    Returns:
        A hook ``(tensor, hook)`` for ``blocks.{layer}.hook_resid_pre``.

    Raises:
        ValidationError: as :func:`make_steering_hook_hf`.
    """
    return _SteeringHookTL(vector, matrix, token)


def make_activs_hook_hf(outlist: list[Tensor]) -> Callable[..., None]:
    """A hook that appends the residual stream [B, T, d_model] to ``outlist``, as it passes and unchanged."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
        outlist.append(residual(args, kwargs or {}))

    return hook
