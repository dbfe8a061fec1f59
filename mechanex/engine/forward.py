"""Running a pack through a model: read the residual stream, get the scored hidden states, or resume from a layer."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ValidationError
from ..ops.logprob import completion_logprob
from . import selfcheck
from .attaching import before
from .hooks import attach
from .intervention import compute_dtype
from .models.adapter import Handles, ModelAdapter
from .pack import BATCH_TOKENS, BATCH_TOKENS_GPU, ROW_TOKENS, Pack, Pair, build_packs
from .regimes import regimes_of
from .stream import others, residual

__all__ = [
    "Resumed",
    "check_length",
    "final_hidden",
    "packs_for",
    "scored_hidden",
    "scored_logits",
    "scored_logprobs",
    "visit_residuals",
]

_log = logging.getLogger(__name__)

# How long a tree may become, in prompts, before the prompt is run once more in another: a fifth more work at most. On a
# CPU 3 to 10 are equally fast.
TREE_PROMPTS = 6
# Most memory that a pack's tree masks take together: a mask grows with the square of the row.
MASK_BYTES = 1 << 29


class _Enough(Exception):
    """Ends a pass once everything asked for has been seen; an Exception, so that torch runs ``always_call`` hooks."""


def packs_for(
    adapter: ModelAdapter,
    pairs: Sequence[Pair],
    *,
    groups: Sequence[Any] | None = None,
    row_tokens: int = ROW_TOKENS,
    batch_tokens: int | None = None,
    scoring: bool = False,
) -> list[Pack]:
    """Packs for this model: trees where it can take them, padded rows where not; on the model's device.

    The first call for a model checks that packed results equal one-by-one results (see :mod:`.selfcheck`).

    Args:
        adapter: the model.
        pairs, groups, row_tokens: as in :func:`.pack.build_packs`.
        batch_tokens: most tokens of a pack, trees included, unless a pair alone is longer; None for what suits the
            device.
        scoring: lay out only what completions are scored from, and let the completions of a long prompt stay together.

    Raises:
        ValidationError: no pairs, or an empty prompt or completion.
    """
    if not pairs:
        raise ValidationError("There is nothing to run: no (prompt, completion) pairs were given.")
    most_tree = sys.maxsize if batch_tokens is None else batch_tokens
    if batch_tokens is None:
        batch_tokens = BATCH_TOKENS if adapter.device.type == "cpu" else BATCH_TOKENS_GPU
    longest = max(len(p) + len(c) for p, c in pairs) - int(scoring)
    check_length(adapter, longest)
    adapter.check_token_ids(token for pair in pairs for ids in pair for token in ids)
    # A pair that is alone needs no tree mask, and may leave out its last token where others don't matter either.
    alone = len(pairs) == 1
    form = "padded" if alone and not scoring else selfcheck.packing_form(adapter, 1 if alone else longest)
    if form == "apart":
        batch_tokens = 1
    elif alone:
        form = "padded"
    window = selfcheck.window_of(adapter)
    widest = min(window if window is not None and longest <= window else sys.maxsize, most_tree)
    row_tokens = min(row_tokens, widest)
    mask_bytes = adapter.dtype.itemsize * (2 if form == "dict" else 1)

    def tree_tokens(prompt_tokens: int) -> int:
        return min(max(row_tokens, TREE_PROMPTS * prompt_tokens), widest) if scoring else row_tokens

    return [
        pack.to(adapter.device)
        for pack in build_packs(
            pairs,
            layout="padded" if form in ("padded", "apart") else "tree",
            groups=groups,
            row_tokens=row_tokens,
            batch_tokens=batch_tokens,
            tree_tokens=tree_tokens,
            last_tokens=not scoring or form == "apart",
            apart=regimes_of(adapter, [len(p) + len(c) for p, c in pairs]),
            mask_entries=MASK_BYTES // mask_bytes,
        )
    ]


def check_length(adapter: ModelAdapter, longest: int) -> None:
    """Refuses text past the end of a table of positions; rotary models can go on, with quality as their makers say."""
    config = adapter.config
    limit = getattr(config, "max_position_embeddings", None)
    rotary = any(
        getattr(config, name, None) for name in ("rope_parameters", "rope_theta", "rope_scaling", "alibi")
    )
    if isinstance(limit, int) and 0 < limit < longest and not rotary:
        raise ValidationError(
            f"The longest prompt and completion have {longest} tokens, but {adapter.model_id} has {limit} positions; "
            "shorten them."
        )


def _call(adapter: ModelAdapter, pack: Pack, **extra: Any) -> Any:
    with pack.running(adapter.hf_model):
        return adapter.call(**selfcheck.model_inputs(adapter, pack), **extra)


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
        visitors: layer (0 to n_layers) to function; what it returns is ignored.
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

    handle = before(head, capture)
    try:
        run()
    except _Enough:
        return seen[0]
    finally:
        handle.remove()
    raise ValidationError(f"The pass through {adapter.model_id} never reached its language head.")


def scored_hidden(adapter: ModelAdapter, pack: Pack, **extra: Any) -> Tensor:
    """[N, d_model] normed hidden states that predict the pack's completion tokens, in the pack's order.

    Args:
        adapter: the model.
        pack: what to run.
        extra: further keyword arguments of the model's call.
    """
    hidden = final_hidden(adapter, lambda: _call(adapter, pack, **extra))
    return pack.predictors_of(hidden)


def scored_logits(adapter: ModelAdapter, pack: Pack, hidden: Tensor | None = None, **extra: Any) -> Tensor:
    """[N, n_vocab] logits that predict the pack's completion tokens, in the pack's order.

    Args:
        adapter: the model.
        pack: what to run.
        hidden: [N, d_model] from :class:`Resumed`, to unembed instead of running the pack.
        extra: further keyword arguments of the model's call.
    """
    if hidden is None:
        if not selfcheck.unembedding_agrees(adapter):
            logits: Tensor = _call(adapter, pack, **extra).logits
            return pack.predictors_of(logits)
        hidden = scored_hidden(adapter, pack, **extra)
    return adapter.unembedding.logits(hidden)


def scored_logprobs(
    adapter: ModelAdapter, pack: Pack, hidden: Tensor | None = None, *, coldness: float = 1.0, **extra: Any
) -> Tensor:
    """[N] natural log-probabilities of the pack's completion tokens, in the pack's order, float32 or float64.

    No logits are stored where the adapter's unembedding is the model's own and needs no gradient.

    Args:
        adapter: the model.
        pack: what to run.
        hidden: [N, d_model] from :class:`Resumed`, to score instead of running the pack.
        coldness: multiplies the logits.
        extra: further keyword arguments of the model's call.
    """
    if hidden is None:
        if adapter.findings.get("unembedding") is None and pack.input_ids.shape[0] == 1:
            logits = selfcheck.watch_unembedding(adapter, pack, lambda: _call(adapter, pack, **extra))
            return chosen_logprobs(logits, pack.target, coldness)
        if not selfcheck.unembedding_agrees(adapter):
            return chosen_logprobs(scored_logits(adapter, pack, **extra), pack.target, coldness)
        hidden = scored_hidden(adapter, pack, **extra)
    head = adapter.unembedding
    hidden, target = hidden.to(head.weight.device), pack.target.to(head.weight.device)
    learns = head.weight.requires_grad or (head.bias is not None and head.bias.requires_grad)
    if (learns and torch.is_grad_enabled()) or head.weight.dtype != hidden.dtype:
        return chosen_logprobs(head.logits(hidden), target, coldness)
    return completion_logprob(
        hidden, head.weight, target, head.bias, head.scale, head.softcap, coldness=coldness
    )


def chosen_logprobs(logits: Tensor, target: Tensor, coldness: float = 1.0) -> Tensor:
    """[N] log-probabilities of ``target`` under ``logits`` [N, n_vocab], float32 or float64."""
    wide = logits.to(compute_dtype(logits.dtype)) * coldness
    return wide.log_softmax(-1).gather(1, target.to(wide.device)[:, None])[:, 0]


class Resumed:
    """A pack whose layers below ``layer`` have run once; :meth:`scored` runs the rest as often as wanted.

    Edits at ``layer`` and above are made by whatever is attached to the model at the time (a plan with masks over the
    pack, say), and gradients flow through them. A model that can't be replayed is run whole each time.

    Args:
        adapter: the model.
        pack: what to run.
        layer: lowest layer that will be edited, 0 to n_layers; n_layers is edited where the last block, which is run
            again, gives its output.
        also: higher layers up to n_layers - 1 whose residual is kept too.

    Attributes:
        residual: [B, T, d_model] entering ``layer`` or the last block, without gradient; None when the model is run
            whole.
        residuals: the same by layer, for that one and ``also``.
        arguments: what each layer from there up was called with, beside the residual.
    """

    def __init__(self, adapter: ModelAdapter, pack: Pack, layer: int, also: Sequence[int] = ()) -> None:
        self._adapter, self._pack, self._layer = adapter, pack, min(layer, adapter.n_layers - 1)
        self._keep = {self._layer, *also}
        self.residuals: dict[int, Tensor] = {}
        self.arguments: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        if selfcheck.replay_agrees(adapter):
            self._record()

    @property
    def residual(self) -> Tensor | None:
        """[B, T, d_model] that :meth:`scored` begins with, without gradient; None when the model is run whole."""
        return self.residuals.get(self._layer)

    def _record(self) -> None:
        """One whole pass that notes what every layer from here up is called with."""
        handles = Handles()

        def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            layer, hidden = self._layer + len(self.arguments), residual(args, kwargs)
            if layer in self._keep:
                self.residuals[layer] = hidden.detach()
            self.arguments.append(others(args, kwargs))
            if layer == self._adapter.n_layers - 1:
                raise _Enough

        try:
            for block in self._adapter.layers[self._layer :]:
                # First among the layer's hooks, so that the residual is noted before any edit of it.
                handles.add(before(block, note, first=True))
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
            return pack.predictors_of(final_hidden(adapter, lambda: _call(adapter, pack)))
        hidden = self.residual
        with pack.running(adapter.hf_model):
            for block, (args, kwargs) in zip(adapter.layers[self._layer :], self.arguments, strict=True):
                out = block(hidden, *args, **kwargs)
                hidden = out[0] if isinstance(out, tuple) else out
        return adapter.finish(pack.predictors_of(hidden))
