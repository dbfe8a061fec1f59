"""Where in a model an autoencoder reads, from the names that libraries have for it; and how that is seen."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import Tensor, nn

from ...errors import ValidationError
from ..attaching import after, before
from ..models.adapter import ModelAdapter
from ..sharded import check_whole

__all__ = ["HookPoint", "check_point", "hook_point", "on_point"]

Kind = Literal["resid", "resid_mid", "mlp_in", "mlp_out", "attn_out", "attn_z"]

_OURS = re.compile(r"([a-z_]+)\.(\d+)")
_LENS = re.compile(r"blocks\.(\d+)\.([\w.]+)")
_LENS_KINDS: dict[str, tuple[Kind, int]] = {
    "hook_resid_pre": ("resid", 0),
    "hook_resid_post": ("resid", 1),
    "hook_resid_mid": ("resid_mid", 0),
    "hook_mlp_in": ("mlp_in", 0),
    "mlp.hook_in": ("mlp_in", 0),
    "ln2.hook_normalized": ("mlp_in", 0),
    "hook_mlp_out": ("mlp_out", 0),
    "mlp.hook_out": ("mlp_out", 0),
    "hook_attn_out": ("attn_out", 0),
    "attn.hook_out": ("attn_out", 0),
    "attn.hook_z": ("attn_z", 0),
    "hook_z": ("attn_z", 0),
}
_LENS_NAMES: dict[Kind, str] = {
    "resid": "hook_resid_pre",
    "resid_mid": "hook_resid_mid",
    "mlp_in": "hook_mlp_in",
    "mlp_out": "hook_mlp_out",
    "attn_out": "hook_attn_out",
    "attn_z": "attn.hook_z",
}
_EMBEDDINGS = ("hook_embed", "embed_tokens", "wte", "embed_in")
_MODULE = re.compile(r"(?:[a-z_]+\.)*(?:layers|h|blocks)[._](\d+)((?:\.\w+)*)")
_MLP = ("mlp", "feed_forward", "ffn", "block_sparse_moe")
_ATTENTION = ("self_attn", "attn", "attention", "self_attention")
_PROJECTIONS = ("o_proj", "c_proj", "out_proj", "dense", "wo")
# Where a norm stands between a part's output and the stream, what is added is that norm's output.
_NORM_OF_MLP, _NORM_OF_ATTENTION = "post_feedforward_layernorm", "post_attention_layernorm"


@dataclass(frozen=True)
class HookPoint:
    """A place in a model whose activations an autoencoder reads.

    Args:
        kind: ``"resid"``: the residual stream entering block ``layer``, as everywhere in this library (layer n of n
            blocks: leaving the last); ``"resid_mid"``: between attention and MLP; ``"mlp_in"``: what the MLP reads;
            ``"mlp_out"``, ``"attn_out"``: what it or attention adds to the stream; ``"attn_z"``: the heads' results,
            side by side, before the output projection.
        layer: 0 … n_layers for ``"resid"``, else 0 … n_layers - 1.
    """

    kind: Kind
    layer: int

    def __str__(self) -> str:
        return f"{self.kind}.{self.layer}"

    @property
    def lens_name(self) -> str:
        """TransformerLens' name, as SAELens writes it."""
        return f"blocks.{self.layer}.{_LENS_NAMES[self.kind]}"


def hook_point(name: str) -> HookPoint:
    """The place that a name means.

    Args:
        name: ``resid.4`` (this library's), ``blocks.4.hook_resid_pre`` (TransformerLens), ``model.layers.4``,
            ``model.layers.4.mlp.output``, ``layers.4`` (Hugging Face modules: their output, unless ``.input`` is said).

    Raises:
        ValidationError: a name that isn't known.
    """
    found = _parsed(name) if isinstance(name, str) else None
    if found is None:
        raise ValidationError(
            f"the hook point {name!r} is not known: name it as this library does ('resid.4', 'mlp_out.4', …), as "
            "TransformerLens does ('blocks.4.hook_resid_pre') or as a Hugging Face module ('model.layers.4')."
        )
    return found


def _parsed(name: str) -> HookPoint | None:
    ours = _OURS.fullmatch(name)
    if ours is not None and ours[1] in get_args(Kind):
        return HookPoint(ours[1], int(ours[2]))  # type: ignore[arg-type]
    if name.rpartition(".")[2] in _EMBEDDINGS:
        return HookPoint("resid", 0)
    lens = _LENS.fullmatch(name)
    if lens is not None and lens[2] in _LENS_KINDS:
        kind, shift = _LENS_KINDS[lens[2]]
        return HookPoint(kind, int(lens[1]) + shift)
    module = _MODULE.fullmatch(name)
    return None if module is None else _of_module(int(module[1]), module[2].split(".")[1:])


def _of_module(layer: int, parts: list[str]) -> HookPoint | None:
    """The place at the end of a path inside a block, ``input`` or ``output`` last."""
    end = parts.pop() if parts and parts[-1] in ("input", "output") else "output"
    leaves = end == "output"
    if not parts:
        return HookPoint("resid", layer + leaves)
    first, last = parts[0], parts[-1]
    if first in _MLP and len(parts) == 1:
        return HookPoint("mlp_out" if leaves else "mlp_in", layer)
    if first in _ATTENTION and len(parts) == 1 and leaves:
        return HookPoint("attn_out", layer)
    if first in _ATTENTION and last in _PROJECTIONS:
        return HookPoint("attn_out" if leaves else "attn_z", layer)
    if parts == ["pre_feedforward_layernorm"] and leaves:
        return HookPoint("mlp_in", layer)
    if parts == [_NORM_OF_MLP] and leaves:
        return HookPoint("mlp_out", layer)
    return None


def on_point(adapter: ModelAdapter, point: HookPoint, fn: Callable[[Tensor], Tensor | None]) -> Any:
    """Calls ``fn`` with the activations [B, T, width] of a place on every pass; a tensor that it returns takes their
    place.

    Args:
        adapter: the model.
        point: the place.
        fn: sees the activations.

    Returns:
        A handle with ``remove()``.

    Raises:
        ValidationError: the model has no such layer, or its block no such part.
    """
    check_point(adapter, point)
    if point.kind == "resid":
        return adapter.on_residual(point.layer, fn)
    module, entering = _part(adapter, point)
    if entering:

        def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            new = fn(args[0] if args else next(iter(kwargs.values())))
            if new is None:
                return None
            return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, next(iter(kwargs)): new})

        return before(module, enter)

    def leave(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        several = isinstance(output, tuple)
        new = fn(output[0] if several else output)
        return None if new is None else ((new, *output[1:]) if several else new)

    return after(module, leave)


def check_point(adapter: ModelAdapter, point: HookPoint) -> None:
    """Raises a ValidationError where the model has no such layer, or its block no such part."""
    if point.kind == "resid":
        return
    if not 0 <= point.layer < adapter.n_layers:
        raise ValidationError(
            f"{point} is not there: {adapter.model_id} has {adapter.n_layers} blocks, 0 to {adapter.n_layers - 1}."
        )
    _part(adapter, point)


def _part(adapter: ModelAdapter, point: HookPoint) -> tuple[nn.Module, bool]:
    """The module of a block whose input (True) or output is meant."""
    block = adapter.layers[point.layer]
    sandwiched = _child(block, ("pre_feedforward_layernorm",)) is not None
    names: tuple[str, ...] = _ATTENTION if point.kind in ("attn_out", "attn_z") else _MLP
    found = _child(block, names)
    if found is not None and point.kind == "mlp_out" and sandwiched:
        found = _child(block, (_NORM_OF_MLP,)) or found
    if found is not None and point.kind == "attn_out" and sandwiched:
        found = _child(block, (_NORM_OF_ATTENTION,)) or found
    if found is not None and point.kind == "attn_z":
        check_whole(adapter.hf_model, f"{point} can't be read")
        found = _child(found, _PROJECTIONS)
    if found is None or point.kind == "resid_mid":
        raise ValidationError(
            f"{point} was not found in {adapter.model_id}: the parts of its block are "
            f"{', '.join(n for n, _ in block.named_children()) or 'not named'}. The residual stream (resid.0 to "
            f"resid.{adapter.n_layers}) is there in every model."
        )
    return found, point.kind in ("mlp_in", "attn_z")


def _child(module: nn.Module, names: tuple[str, ...]) -> nn.Module | None:
    return next((child for name, child in module.named_children() if name in names), None)
