"""What a model can do, found by trying it once: which packed form it takes, whether its layers can be replayed.

Families differ in how they take masks and positions, and lists of names age. So a small probe is run in
each way and compared with the plain way, one sequence at a time; the first way that agrees is kept for that model.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import Any, Literal, cast

import torch
from torch import Tensor

from ..errors import MechanexError
from .attaching import before
from .intervention import widest
from .models.adapter import ModelAdapter, undisturbed
from .pack import Pack, build_packs
from .regimes import first_change, regimes_of

__all__ = [
    "Form",
    "close",
    "model_inputs",
    "outgrown_length",
    "packing_form",
    "replay_agrees",
    "unembedding_agrees",
    "watch_unembedding",
    "window_of",
]

# Tree masks, given as one or by kind of layer; "padded": one text a row; "apart": one text a pass.
Form = Literal["plain", "window", "dict", "padded", "apart"]
TREES: tuple[Form, ...] = ("plain", "window", "dict")
WINDOW_SETTINGS = ("sliding_window", "window_size", "attention_chunk_size", "local_attention_window")
# Lengths at which models were seen to change what they do.
LENGTH_SETTINGS = ("original_max_position_embeddings", "seq_length", "max_position_embeddings")
PROBE_TOKENS = 13  # the longest path of the probe
# Largest relative difference of a hidden state that rounding explains; a wrong mask is off by far more.
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}

_log = logging.getLogger(__name__)


def window_of(adapter: ModelAdapter) -> int | None:
    """The model's smallest attention window in tokens, or None."""
    config = adapter.config
    sizes = [getattr(config, name, None) for name in WINDOW_SETTINGS]
    if getattr(config, "use_sliding_window", True) is False:
        sizes[0] = None
    return min((s for s in sizes if isinstance(s, int) and s > 0), default=None)


def model_inputs(adapter: ModelAdapter, pack: Pack, form: Form | None = None) -> dict[str, Any]:
    """Keyword arguments that run a pack, in the form that the model was found to take."""
    if pack.layout == "padded":
        return {"input_ids": pack.input_ids, "attention_mask": (pack.segment >= 0).long()}
    form = form or packing_form(adapter, pack.longest)
    dtype, window = adapter.dtype, window_of(adapter)
    mask: Tensor | dict[str, Tensor]
    if form == "plain":
        mask = pack.additive_mask(dtype)
    elif form == "window":
        mask = pack.additive_mask(dtype, window)
    else:
        narrow = pack.additive_mask(dtype, window)
        mask = {"full_attention": pack.additive_mask(dtype), "sliding_attention": narrow}
    return {"input_ids": pack.input_ids, "attention_mask": mask, "position_ids": pack.position_ids}


def packing_form(adapter: ModelAdapter, longest: int) -> Form:
    """The form of packed input that this model computes rightly for paths of up to ``longest`` tokens.

    Decided once per model, and once more when a path first outgrows its attention window, or another length at which it
    may change what it does.
    """
    outgrown = outgrown_length(adapter, longest)
    key = f"form beyond {outgrown} tokens" if outgrown else "form"
    if key not in adapter.findings:
        adapter.findings[key] = _probe_forms(adapter, outgrown)
    return cast(Form, adapter.findings[key])


def outgrown_length(adapter: ModelAdapter, longest: int) -> int | None:
    """The largest number of tokens below ``longest`` at which the model may change what it does; None for none.

    That is its attention window, where its rotary factors change, and what its configuration names.
    """
    config = adapter.config
    tables = getattr(config, "rope_parameters", None) or {}
    named = [getattr(config, name, None) for name in LENGTH_SETTINGS]
    for table in [tables, *tables.values()] if isinstance(tables, dict) else []:
        named += [table.get(name) for name in LENGTH_SETTINGS] if isinstance(table, dict) else []
    lengths = [
        n for n in (*named, window_of(adapter)) if isinstance(n, int) and 0 < n < max(longest, PROBE_TOKENS)
    ]
    change = first_change(adapter)
    if change is not None and change < longest:
        lengths.append(change)
    return max(lengths, default=None)


def _probe_forms(adapter: ModelAdapter, outgrown: int | None) -> Form:
    window = window_of(adapter)
    pairs = _probe(adapter, outgrown)
    with torch.no_grad(), undisturbed(adapter.hf_model):
        try:
            alone = [
                _scored(adapter, build_packs([pair], layout="padded")[0].to(adapter.device)) for pair in pairs
            ]
        except MechanexError:
            raise
        except (
            Exception
        ) as error:  # a model's own code may raise anything, here at a probe past its last position
            _log.info("%s could not run the probe (%s); it runs padded rows.", adapter.model_id, error)
            return "padded"
        n_tokens = sum(len(p) + len(c) for p, c in pairs)
        lengths = regimes_of(adapter, [len(p) + len(c) for p, c in pairs])
        (tree,) = build_packs(pairs, row_tokens=n_tokens, batch_tokens=n_tokens, apart=lengths)
        (rows,) = build_packs(pairs, layout="padded", batch_tokens=sys.maxsize)
        for form in (*TREES, "padded"):
            if form == "window" and (window is None or window > (outgrown or 0)):
                continue
            pack = (rows if form == "padded" else tree).to(adapter.device)
            try:
                packed = _scored(adapter, pack, form)
            except MechanexError:
                raise
            except Exception as error:  # as above
                _log.debug("%s does not take the packed form %r: %s", adapter.model_id, form, error)
                continue
            pair = pack.pair.to(packed.device)
            if all(close(packed[pair == i], truth) for i, truth in enumerate(alone)):
                if form == "padded":
                    _log.info(
                        "%s can't take a tree mask; it runs one padded sequence per row.", adapter.model_id
                    )
                return form
    _log.info("%s gives a text other results among others; it runs one text at a time.", adapter.model_id)
    return "apart"


def _probe(adapter: ModelAdapter, outgrown: int | None) -> list[tuple[list[int], list[int]]]:
    """Three prompts with ragged completions, of spread-out token ids; the first is longer than ``outgrown`` tokens."""
    vocab = int(adapter.config.vocab_size)
    generator = torch.Generator().manual_seed(0)

    def draw(n: int) -> list[int]:
        return (torch.randint(vocab - vocab // 4, (n,), generator=generator) + vocab // 8).tolist()

    first, second, third = draw(7 + (outgrown or 0)), draw(4), draw(9)
    return [(first, draw(3)), (first, draw(5)), (second, draw(2)), (third, draw(4)), (third, draw(1))]


def _scored(adapter: ModelAdapter, pack: Pack, form: Form | None = None) -> Tensor:
    """[N, d_model] final hidden states that predict the pack's completion tokens."""
    from .forward import final_hidden

    inputs = model_inputs(adapter, pack, form)
    with pack.running(adapter.hf_model):
        return pack.predictors_of(final_hidden(adapter, lambda: adapter.call(**inputs)))


def close(a: Tensor, b: Tensor) -> bool:
    """Whether every row agrees to rounding of the dtype; never for NaN."""
    wide = widest(b.device)
    difference = (a.to(b.device) - b).to(wide).norm(dim=-1) / b.to(wide).norm(dim=-1).clamp_min(1e-12)
    return bool((difference <= TOLERANCE.get(b.dtype, 1e-4)).all())


def unembedding_agrees(adapter: ModelAdapter) -> bool:
    """Whether the adapter's unembedding of hidden states gives the model's own logits; checked once."""
    if not adapter.unembeds:
        return False
    if "unembedding" not in adapter.findings:
        (pack,) = build_packs(_probe(adapter, None)[:1], layout="padded")
        pack = pack.to(adapter.device)
        try:
            with torch.no_grad(), undisturbed(adapter.hf_model):
                ours = adapter.unembedding.logits(_scored(adapter, pack))
                with pack.running(adapter.hf_model):
                    theirs = adapter.call(**model_inputs(adapter, pack)).logits
                agrees = close(ours, pack.predictors_of(theirs).to(ours))
        except MechanexError:
            raise
        except Exception as error:  # weights that are elsewhere between calls, say
            _log.debug("%s does not unembed by itself: %s", adapter.model_id, error)
            agrees = False
        if not agrees:
            _log.info(
                "%s has an unembedding of its own kind; logits come from whole passes.", adapter.model_id
            )
        adapter.findings["unembedding"] = agrees
    return bool(adapter.findings["unembedding"])


def watch_unembedding(adapter: ModelAdapter, pack: Pack, run: Callable[[], Any]) -> Tensor:
    """[N, n_vocab] logits for the pack's completion tokens from the model's own pass, which serves as the probe too.

    So what is attached to the model sees one pass, the one that was asked for.

    Args:
        adapter: the model.
        pack: what is run.
        run: calls the model.
    """
    seen: list[Tensor] = []
    head = adapter.head
    handle = None if head is None else before(head, lambda _, args: seen.extend(args[:1]), kwargs=False)
    try:
        logits: Tensor = run().logits
    finally:
        if handle is not None:
            handle.remove()
    theirs = pack.predictors_of(logits)
    with torch.no_grad():
        if seen and bool(theirs.isfinite().all()):
            ours = adapter.unembedding.logits(pack.predictors_of(seen[0]))
            adapter.findings["unembedding"] = adapter.unembeds and close(ours, theirs.to(ours))
    return theirs


def replay_agrees(adapter: ModelAdapter) -> bool:
    """Whether replaying the upper layers from a kept, edited residual gives what a whole pass gives; checked once."""
    if "replay" not in adapter.findings:
        adapter.findings["replay"] = True  # lets the probe itself replay
        try:
            agrees = _probe_replay(adapter)
        except MechanexError:
            del adapter.findings["replay"]
            raise
        except Exception as error:  # as above
            _log.debug("%s can't be replayed: %s", adapter.model_id, error)
            agrees = False
        if not agrees:
            _log.info("%s can't be resumed at a layer; every step runs the whole model.", adapter.model_id)
        adapter.findings["replay"] = agrees
    return bool(adapter.findings["replay"])


def _probe_replay(adapter: ModelAdapter) -> bool:
    from .forward import Resumed, packs_for

    pairs = _probe(adapter, None)
    layer = adapter.n_layers // 2
    (pack,) = packs_for(adapter, pairs, batch_tokens=1 << 20)
    with torch.no_grad(), undisturbed(adapter.hf_model):
        resumed = Resumed(adapter, pack, layer)
        if resumed.residual is None:
            return False
        # An edit shows arguments that were computed from the residual itself and would be stale in a replay.
        kept = resumed.residual.float()
        shift = kept.std() * torch.linspace(-1, 1, adapter.d_model, device=kept.device)

        def edit(hidden: Tensor) -> Tensor:
            return hidden + shift.to(hidden)

        handle = adapter.on_residual(layer, edit)
        try:
            replayed, whole = resumed.scored(), _scored(adapter, pack)
        finally:
            handle.remove()
    return close(replayed, whole)
