"""Rotary factors that depend on the length of the whole call: every row gets those that it would have alone.

Some models turn positions into angles by factors that change with the longest position of the call ("longrope"
switches tables, "dynamic" stretches them with every token), and some keep the factors of the calls before. Such
modules are found by asking them; while a pass runs, each token gets the factors of its own text's length, as from a
module that saw no other text.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import threading
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..errors import ValidationError
from .attaching import after

__all__ = [
    "each_alone",
    "first_change",
    "length_dependent",
    "regime",
    "regimes_of",
    "text_lengths",
]

# Beyond a million tokens nothing is asked.
LARGEST_LENGTH = 1 << 20

_lengths: ContextVar[Tensor | None] = ContextVar("mechanex_text_lengths", default=None)
_kept: ContextVar[tuple[nn.Module, list[nn.Module]] | None] = ContextVar("mechanex_each_alone", default=None)
"""The model of the block of :func:`each_alone` that runs, and which of its modules depend on a call's length."""


@contextmanager
def text_lengths(lengths: Tensor | None) -> Iterator[None]:
    """Runs a block in which rows count as parts of texts of these lengths, whatever positions the calls name.

    Args:
        lengths: [B, T] or [B, 1] int64, tokens of the whole text that a token belongs to; 0 for padding. None: a
            row's text ends with its largest position, as when it is alone.
    """
    token = _lengths.set(lengths)
    try:
        yield
    finally:
        _lengths.reset(token)


def regime(model: nn.Module, length: int) -> Hashable:
    """What a text's rotary factors are as far as they depend on its length; equal keys mean equal factors.

    Args:
        model: the model.
        length: tokens of the whole text in its pass, 1 or more.

    Returns:
        The same for every length where the model's factors don't depend on it.
    """
    return regimes_of(model, [length])[0]


def regimes_of(model: nn.Module, lengths: Sequence[int]) -> list[Hashable]:
    """:func:`regime` of each of many lengths."""
    modules = length_dependent(model)
    known = {n: tuple(_key(module, n) for module in modules) for n in set(lengths)}
    return [known[n] for n in lengths]


def first_change(model: nn.Module) -> int | None:
    """The longest text with the factors of short ones, in tokens; None where factors don't depend on the length."""
    modules = length_dependent(model)
    return min((_first_change(module) for module in modules), default=None)


def _first_change(module: nn.Module) -> int:
    short, low, high = _key(module, 2), 2, 4
    while _key(module, high) == short:
        low, high = high, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _key(module, middle) == short else (low, middle)
    return low


def length_dependent(model: nn.Module) -> list[nn.Module]:
    """The modules of a model that turn positions into factors which depend on the call's largest position."""
    kept = _kept.get()
    if kept is not None and kept[0] is model:
        return kept[1]
    return [m for m in model.modules() if _makes_factors(m) and _record(m).depends]


def _makes_factors(module: nn.Module) -> bool:
    # A model without numbers is refused elsewhere, and nothing is noted of it that would be wrong once it has some.
    return any(
        name.endswith("inv_freq") and not (b is not None and b.is_meta) for name, b in module._buffers.items()
    )


@contextmanager
def each_alone(model: nn.Module) -> Iterator[None]:
    """Runs a block in which every row of the model's calls gets the factors that it would have alone."""
    modules = length_dependent(model)
    # A walk through all modules takes as long as a layer of a pass: inside, nobody walks again.
    token = _kept.set((model, modules))
    try:
        with ExitStack() as stack:
            for module in modules:
                stack.enter_context(_record(module).hooked(module))
            yield
    finally:
        _kept.reset(token)


class _Record:
    """What is known of a module that makes rotary factors.

    Attributes:
        depends: whether its factors depend on the largest position of the call.
        keys: by length, the factors in short.
    """

    def __init__(self, settings: Hashable) -> None:
        self.settings = settings
        self.depends = False
        self.keys: dict[int, Hashable] = {}
        self._users = 0
        self._handle: Any = None

    @contextmanager
    def hooked(self, module: nn.Module) -> Iterator[None]:
        """Blocks that overlap share one hook."""
        with _guard:
            self._users += 1
            if self._users == 1:
                self._handle = after(module, _factors_of_each, kwargs=True)
        try:
            yield
        finally:
            with _guard:
                self._users -= 1
                if not self._users:
                    self._handle.remove()


_records: WeakKeyDictionary[nn.Module, _Record] = WeakKeyDictionary()
_guard = threading.RLock()


def _record(module: nn.Module) -> _Record:
    """The module's record, made anew when its settings change."""
    config: Any = getattr(module, "config", None)
    names = ("rope_parameters", "rope_scaling", "max_position_embeddings", "original_max_position_embeddings")
    settings = repr([getattr(config, name, None) for name in names])
    with _guard:
        known = _records.get(module)
        if known is None or (known.settings != settings and not known._users):
            known = _records[module] = _Record(settings)
            known.depends = _depends(module)
        return known


def _depends(module: nn.Module) -> bool:
    short, length = _asked(module, 2), 4
    while short is not None and length <= LARGEST_LENGTH:
        if _asked(module, length) != short:
            return True
        length *= 2
    return False


def _key(module: nn.Module, length: int) -> Hashable:
    keys = _record(module).keys
    if length not in keys:
        keys[length] = _asked(module, max(2, length))
    return keys[length]


def _asked(module: nn.Module, length: int) -> Hashable:
    """The factors of position 1 in a call as long as ``length``, in short; None where it takes no ids."""
    buffer = next(b for name, b in module._buffers.items() if name.endswith("inv_freq") and b is not None)
    # Factors come in this tensor's dtype: wide, so that those which differ look different.
    like = torch.zeros(1, 2, 1, device=buffer.device)
    ids = torch.tensor([[1, length - 1]], device=buffer.device)
    kinds = getattr(module, "rope_type", None)
    found = []
    try:
        for kind in kinds if isinstance(kinds, Mapping) else [None]:
            options = {} if kind is None else {"layer_type": kind}
            factors = _fresh(module).forward(like, position_ids=ids, **options)
            found += [f[..., :1, :] for f in (factors if isinstance(factors, tuple) else (factors,))]
    except Exception:  # a module of another kind, which may raise anything
        return None
    raw = [torch.view_as_real(f) if f.is_complex() else f for f in found]
    numbers = torch.cat([f.cpu().double().flatten() for f in raw])
    return hashlib.blake2b(numbers.numpy().tobytes(), digest_size=16).digest()


def _fresh(module: nn.Module) -> Any:
    """A copy of the module as it is before its first call; what it learns from calls stays in the copy."""
    made = copy.copy(module)
    made.__dict__.pop("forward", None)  # wrapped around the module itself, not around its copy
    made._buffers = {name: None if b is None else b.clone() for name, b in module._buffers.items()}
    first = getattr(made, "original_max_seq_len", None)
    for name in [n for n in vars(made) if n.endswith("max_seq_len_cached")]:
        prefix = name.removesuffix("max_seq_len_cached")
        original = getattr(made, f"{prefix}original_inv_freq", None)
        if first is not None and isinstance(original, Tensor):
            setattr(made, name, first)
            made._buffers[f"{prefix}inv_freq"] = original.clone()
    return made


def _factors_of_each(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _output: Any
) -> tuple[Tensor, ...] | Tensor:
    """The factors of a call, computed apart for the texts of each regime."""
    call = inspect.signature(module.forward).bind(*args, **kwargs)
    ids: Tensor = call.arguments["position_ids"]
    n_tokens, lengths = ids.shape[-1], _lengths_of(ids)
    ids = ids.expand(*ids.shape[:-2], lengths.shape[0], n_tokens)
    chosen: dict[Hashable, tuple[int, list[int]]] = {}
    for length in sorted(torch.unique(lengths).tolist(), reverse=True):
        if length > 0:
            chosen.setdefault(_key(module, length), (length, []))[1].append(length)
    found: tuple[Tensor, ...] | None = None
    alone = True
    for longest, members in chosen.values() or [(1, [1])]:
        # One more token at the end of the text, whose factors are dropped, makes the call as long as it.
        end = torch.full_like(ids[..., :1], longest - 1)
        call.arguments["position_ids"] = torch.cat([ids.clamp(max=longest - 1), end], -1)
        made = _fresh(module).forward(*call.args, **call.kwargs)
        alone = not isinstance(made, tuple)
        parts = tuple(_without_end(module, f, n_tokens) for f in ((made,) if alone else made))
        if found is None:
            found = parts
        else:
            mine = torch.isin(lengths, torch.tensor(members, device=lengths.device))[..., None]
            found = tuple(torch.where(mine, new, old) for new, old in zip(parts, found, strict=True))
    assert found is not None
    return found[0] if alone else found


def _lengths_of(ids: Tensor) -> Tensor:
    """[B, T] or [B, 1] tokens of the text that each token belongs to."""
    declared = _lengths.get()
    if declared is not None:
        batch, width = ids.shape[-2:]
        if declared.shape[-1] in (1, width) and batch in (1, declared.shape[0]):
            return declared.to(ids.device)
    own = ids.amax(-1, keepdim=True) + 1
    return own if own.ndim == 2 else own.flatten(0, -3).amax(0)


def _without_end(module: nn.Module, factors: Tensor, n_tokens: int) -> Tensor:
    if factors.ndim < 3 or factors.shape[-2] != n_tokens + 1:
        raise ValidationError(
            f"{type(module).__name__} gives factors of shape {tuple(factors.shape)} for {n_tokens + 1} positions, and "
            "they depend on the length of the whole call: rows of unequal length can't be run together. Run one text "
            "at a time."
        )
    return factors[..., :n_tokens, :]
