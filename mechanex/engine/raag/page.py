"""One question's answer as a page of HTML: pointing at a token marks its chunks, and the other way round."""

from __future__ import annotations

import html
from typing import Any

__all__ = ["edges_of", "html_page"]

_STYLE = """
body { font: 16px/1.6 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
.token { white-space: pre-wrap; border-radius: 3px; padding: 1px 0; }
.token.rests { border-bottom: 3px solid #0072b2; cursor: pointer; }
.chunk { border-left: 4px solid #bbb; padding: .2rem .8rem; margin: .5rem 0; }
.on { background: #ffe08a; color: #1b1b1b; outline: 2px solid #0072b2; }
@media (prefers-color-scheme: dark) { body { color: #eee; background: #151515; } }
"""
_SCRIPT = """
const mark = (one, on) => {
  one.classList.toggle('on', on);
  for (const id of one.dataset.with.split(' ').filter(Boolean))
    document.getElementById(id).classList.toggle('on', on);
};
const events = [['mouseenter', true], ['mouseleave', false], ['focus', true], ['blur', false]];
for (const one of document.querySelectorAll('[data-with]'))
  for (const [name, on] of events) one.addEventListener(name, () => mark(one, on));
"""


def html_page(data: dict[str, Any], *, candidates: bool = False) -> str:
    """A page that needs nothing else, for pointer and keyboard.

    Args:
        data: ``data_by_question[…]`` of an answer.
        candidates: show candidate edges too, not the validated ones alone.
    """
    edges = edges_of(data, candidates=candidates)
    bundle = data["bundle"]
    first = len(bundle["prompt_tokens"][0])
    by_token: dict[int, list[dict[str, Any]]] = {}
    by_chunk: dict[Any, list[int]] = {}
    for token, edge in edges:
        by_token.setdefault(token - first, []).append(edge)
        by_chunk.setdefault(edge["chunk_global_id"], []).append(token - first)
    tokens = [_token(i, text, by_token.get(i, [])) for i, text in enumerate(bundle["answer_tokens"][0])]
    chunks = [_chunk(span, by_chunk.get(span["chunk_global_id"], [])) for span in bundle["chunk_spans"]]
    question = html.escape(data["question"])
    return (
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{question}</title><style>{_STYLE}</style>\n'
        f"<h1>{question}</h1>\n<p>{''.join(tokens)}</p>\n<h2>Documents</h2>\n{''.join(chunks)}"
        f"<script>{_SCRIPT}</script></html>\n"
    )


def edges_of(data: dict[str, Any], *, candidates: bool) -> list[tuple[int, dict[str, Any]]]:
    """(absolute token, edge) of an answer, by token; candidates hold the validated ones' layers where there are any."""
    validated = data["validated"]["validated_edges"]
    if not candidates:
        return [(int(token), edge) for token, edges in validated.items() for edge in edges]
    layers = {
        (token, edge["chunk_global_id"]): edge["best_layer"]
        for token, edges in validated.items()
        for edge in edges
    }
    return [
        (int(token), {**edge, "best_layer": layers.get((token, edge["chunk_global_id"]))})
        for token, edges in data["candidate"]["candidate_edges"].items()
        for edge in edges
    ]


def _token(i: int, text: str, edges: list[dict[str, Any]]) -> str:
    shown = html.escape(text)
    if not edges:
        return f'<span class="token" id="token-{i}">{shown}</span>'
    told = "; ".join(
        f"chunk {edge['chunk_global_id']}: {edge['weight']:.2f} nats"
        + (f", layer {edge['best_layer']}" if edge["best_layer"] is not None else "")
        for edge in edges
    )
    names = " ".join(f"chunk-{edge['chunk_global_id']}" for edge in edges)
    return (
        f'<span class="token rests" tabindex="0" id="token-{i}" data-with="{names}" title="{html.escape(told)}">'
        f"{shown}</span>"
    )


def _chunk(span: dict[str, Any], tokens: list[int]) -> str:
    names = " ".join(f"token-{i}" for i in tokens)
    return (
        f'<div class="chunk" tabindex="0" id="chunk-{span["chunk_global_id"]}" data-with="{names}">'
        f"<small>{html.escape(str(span['doc_id']))} · {span['chunk_global_id']}</small><br>"
        f"{html.escape(span['text'])}</div>\n"
    )
