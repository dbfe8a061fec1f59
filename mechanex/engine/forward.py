"""Running a pack through a model: read the residual stream, get the scored hidden states, or resume from a layer."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ValidationError
from . import selfcheck
from .hooks import attach
from .models.adapter import Handles, ModelAdapter
from .pack import BATCH_TOKENS, BATCH_TOKENS_GPU, ROW_TOKENS, Pack, Pair, build_packs
from .positions import pack_positions

__all__ = ["Resumed", "final_hidden", "packs_for", "scored_logits", "visit_residuals"]

_log = logging.getLogger(__name__)


class _Enough(Exception):
    """Ends a pass once everything asked for has been seen; an Exception, so that torch runs ``always_call`` hooks."""


def packs_for(
    adapter: ModelAdapter,
    pairs: Sequence[Pair],
    *,
    groups: Sequence[Any] | None = None,
    row_tokens: int = ROW_TOKENS,
    batch_tokens: int | None = None,
) -> list[Pack]:
    """Packs for this model: trees where it can take them, padded rows where not; on the model's device.

    The first call for a model checks that packed results equal one-by-one results (see :mod:`.selfcheck`).

    Raises:
        ValidationError: no pairs, or an empty prompt or completion.
    """
    if not pairs:
        raise ValidationError("There is nothing to run: no (prompt, completion) pairs were given.")
    if batch_tokens is None:
        batch_tokens = BATCH_TOKENS if adapter.device.type == "cpu" else BATCH_TOKENS_GPU
    longest = max(len(p) + len(c) for p, c in pairs)
    _check_length(adapter, longest)
    adapter.check_token_ids(token for pair in pairs for ids in pair for token in ids)
    form = selfcheck.packing_form(adapter, longest)
    window = selfcheck.window_of(adapter)
    if window is not None and longest <= window:
        row_tokens = min(row_tokens, window)
    return [
        pack.to(adapter.device)
        for pack in build_packs(
            pairs,
            layout="padded" if form == "padded" else "tree",
            groups=groups,
            row_tokens=row_tokens,
            batch_tokens=batch_tokens,
        )
    ]


def _check_length(adapter: ModelAdapter, longest: int) -> None:
    """Refuses text past the end of a table of positions; rotary models can go on, with quality as their makers say."""
    config = adapter.config
    limit = getattr(config, "max_position_embeddings", None)
    rotary = any(
        getattr(config, name, None) for name in ("rope_parameters", "rope_theta", "rope_scaling", "alibi")
    )
    if isinstance(limit, int) and longest > limit and not rotary:
        raise ValidationError(
            f"The longest prompt and completion have {longest} tokens, but {adapter.model_id} has {limit} positions; "
            "shorten them."
        )


def _call(adapter: ModelAdapter, pack: Pack) -> Any:
    with pack_positions(pack.positions):
        return adapter.call(**selfcheck.model_inputs(adapter, pack))


def _until(
    adapter: ModelAdapter, hooks: Mapping[int, Callable[[Tensor], None]], run: Callable[[], Any]
) -> None:
    """Runs a pass that shows the residual stream to ``hooks`` and stops at the highest of their layers."""
    last = max(hooks)

    def watcher(layer: int, fn: Callable[[Tensor], None]) -> Callable[[Tensor], None]:
        def watch(hidden: Tensor) -> None:
            fn(hidden)
            if layer == last:
                raise _Enough

        return watch

    with attach(adapter, [(layer, watcher(layer, fn)) for layer, fn in hooks.items()]):
        try:
            run()
        except _Enough:
            return
    raise ValidationError(
        f"{adapter.model_id} did not pass through layer {last}; "
        "name its decoder layers with adapter_for(model, layers=…)."
    )


def visit_residuals(
    adapter: ModelAdapter, pack: Pack, visitors: Mapping[int, Callable[[Tensor], None]]
) -> None:
    """Shows the residual stream [B, T, d_model] entering each layer to its visitor, and stops after the highest one.

    Args:
        adapter: the model; steering that is applied to it is seen.
        pack: what to run.
        visitors: layer (0 to n_layers - 1) to function; what it returns is ignored.
    """
    _until(adapter, visitors, lambda: _call(adapter, pack))


def final_hidden(adapter: ModelAdapter, run: Callable[[], Any]) -> Tensor:
    """[B, T, d_model] normed hidden states that would enter the unembedding; the unembedding itself is not run.

    Args:
        adapter: the model.
        run: calls the model.

    Raises:
        ValidationError: the model has no language head, or the pass does not reach it.
    """
    head = adapter.head
    if head is None:
        raise ValidationError(f"{adapter.model_id} has no language head; load it with AutoModelForCausalLM.")
    seen: list[Tensor] = []

    def capture(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(args[0] if args else next(iter(kwargs.values())))
        raise _Enough

    handle = head.register_forward_pre_hook(capture, with_kwargs=True)
    try:
        run()
    except _Enough:
        return seen[0]
    finally:
        handle.remove()
    raise ValidationError(f"The pass through {adapter.model_id} never reached its language head.")


def scored_logits(adapter: ModelAdapter, pack: Pack, hidden: Tensor | None = None) -> Tensor:
    """[N, n_vocab] logits that predict the pack's completion tokens, in the pack's order.

    Args:
        adapter: the model.
        pack: what to run.
        hidden: [N, d_model] from :class:`Resumed`, to unembed instead of running the pack.
    """
    if hidden is None:
        if not selfcheck.unembedding_agrees(adapter):
            logits: Tensor = _call(adapter, pack).logits
            return logits[pack.row, pack.predictor]
        hidden = final_hidden(adapter, lambda: _call(adapter, pack))[pack.row, pack.predictor]
    return adapter.unembedding.logits(hidden)


class Resumed:
    """A pack whose layers below ``layer`` have run once; :meth:`scored` runs the rest as often as wanted.

    Edits at ``layer`` and above are made by whatever is attached to the model at the time (a plan with masks over the
    pack, say), and gradients flow through them. A model that can't be replayed is run whole each time.

    Args:
        adapter: the model.
        pack: what to run.
        layer: lowest layer that will be edited, 0 to n_layers - 1.

    Attributes:
        residual: [B, T, d_model] entering ``layer``, without gradient; None when the model is run whole.
    """

    def __init__(self, adapter: ModelAdapter, pack: Pack, layer: int) -> None:
        self._adapter, self._pack, self._layer = adapter, pack, layer
        self.residual: Tensor | None = None
        self._arguments: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        if selfcheck.replay_agrees(adapter):
            self._record()

    def _record(self) -> None:
        """One whole pass that notes what every layer from here up is called with."""
        handles = Handles()

        def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            if self.residual is None:
                self.residual = hidden.detach()
            self._arguments.append((args[1:], {k: v for k, v in kwargs.items() if k != "hidden_states"}))
            if len(self._arguments) == self._adapter.n_layers - self._layer:
                raise _Enough

        try:
            for block in self._adapter.layers[self._layer :]:
                # First among the layer's hooks, so that the residual is noted before any edit of it.
                handles.add(block.register_forward_pre_hook(note, with_kwargs=True, prepend=True))
            with torch.no_grad():
                _call(self._adapter, self._pack)
        except _Enough:
            pass
        finally:
            handles.remove()

    def scored(self) -> Tensor:
        """[N, d_model] normed hidden states that predict the completion tokens, in the pack's order."""
        pack, adapter = self._pack, self._adapter
        if self.residual is None:
            return final_hidden(adapter, lambda: _call(adapter, pack))[pack.row, pack.predictor]
        hidden = self.residual
        with pack_positions(pack.positions):
            for block, (args, kwargs) in zip(adapter.layers[self._layer :], self._arguments, strict=True):
                out = block(hidden, *args, **kwargs)
                hidden = out[0] if isinstance(out, tuple) else out
        return adapter.finish(hidden[pack.row, pack.predictor])
