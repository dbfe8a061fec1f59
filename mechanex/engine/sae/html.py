"""Pictures as HTML: shaded tokens, bars and tables, with every text escaped; needs no script and no network."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from ...home import atomic_path
from .shading import Shade, color, visible

__all__ = ["bars", "block", "legend", "shaded", "table", "write_page"]

# Colours of its own, so that a dark notebook doesn't show dark text on dark ground.
_STYLE = (
    "<style>.mx{background:#fff;color:#1a1a1a;padding:8px 12px;font:14px/1.9 system-ui,sans-serif}"
    ".mx .t{white-space:pre-wrap;overflow-wrap:anywhere;font-family:ui-monospace,monospace}"
    ".mx .t span,.mx .t strong,.mx .t u{unicode-bidi:isolate;border-radius:2px}"
    ".mx strong{outline:2px solid #1a1a1a}.mx u{text-decoration:underline 3px #0072b2}"
    ".mx .s{color:#555;font-size:12px}.mx table{border-collapse:collapse;display:inline-table;margin:4px 24px 4px 0}"
    ".mx td,.mx th{padding:1px 8px;text-align:left;border-bottom:1px solid #ddd}.mx td.n{text-align:right}</style>"
)


def write_page(path: Path, title: str, body: str) -> None:
    """Writes a whole document, whole or not at all."""
    told = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{_text(title)}</title></head>'
        f"<body>{body}</body></html>\n"
    )
    with atomic_path(path) as temporary:
        temporary.write_text(told, encoding="utf-8", errors="replace")


def block(parts: Iterable[str]) -> str:
    """Parts of a picture in one element, for pages and notebooks."""
    return f'<div class="mx">{_STYLE}{"".join(parts)}</div>'


def shaded(tokens: Iterable[Shade], before: str = "") -> str:
    """A line of text: what comes before, and tokens in their colours; strong ones framed, corrected ones underlined."""
    found = [f'<span class="s">{_text(before)}</span>'] if before else []
    for one in tokens:
        inner = _text(one.text)
        for tag in (*(["u"] if one.under else []), *(["strong"] if one.strong else [])):
            inner = f"<{tag}>{inner}</{tag}>"
        note = f' title="{_text(one.note)}"' if one.note else ""
        found.append(f'<span style="background:{color(one.level)}"{note}>{inner}</span>')
    return f'<div class="t">{"".join(found)}</div>'


def legend(steps: Sequence[tuple[float, str]], notes: str) -> str:
    """Levels with what they stand for, and words beside them."""
    boxes = "".join(
        f'<span style="background:{color(level)};border:1px solid #999;padding:0 8px">{_text(name)}</span> '
        for level, name in steps
    )
    return f'<div class="s">{boxes}{_text(notes)}</div>'


def table(head: Sequence[str], rows: Iterable[Sequence[str | float]]) -> str:
    """A table; numbers stand to the right."""
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    return f"<table><tr>{''.join(f'<th>{_text(one)}</th>' for one in head)}</tr>{body}</table>"


def bars(counts: Sequence[int], edges: Sequence[float], what: str) -> str:
    """A histogram as SVG, heights by the logarithm of the counts, which are in the bars' tooltips."""
    most = max(max(counts, default=0), 1)
    width, high = 320, 90
    each = width / max(len(counts), 1)
    boxes = []
    for i, count in enumerate(counts):
        tall = high * math.log1p(count) / math.log1p(most)
        label = f"{edges[i]:.3g} to {edges[i + 1]:.3g}: {count}"
        boxes.append(
            f'<rect x="{i * each:.1f}" y="{high - tall:.1f}" width="{each - 1:.1f}" height="{tall:.1f}" fill="#0072b2">'
            f"<title>{_text(label)}</title></rect>"
        )
    ends = f"{edges[0]:.3g} … {edges[-1]:.3g}" if edges else ""
    return (
        f'<svg role="img" aria-label="{_text(what)}" width="{width}" height="{high}">{"".join(boxes)}</svg>'
        f'<div class="s">{_text(what)}: {_text(ends)}</div>'
    )


def _cell(value: str | float) -> str:
    return f"<td>{_text(value)}</td>" if isinstance(value, str) else f'<td class="n">{value:+.3f}</td>'


def _text(text: str) -> str:
    return html.escape(visible(text))
