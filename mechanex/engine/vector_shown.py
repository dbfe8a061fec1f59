"""How a steering vector is shown: norms in a line, and as bars for notebooks."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

__all__ = ["shown_norms", "vector_html"]

_MOST = 4
_BAR, _HEIGHT = 14, 48  # pixels


def shown_norms(norms: Mapping[int, float]) -> str:
    """``{3: 1.2, 4: 0.9}``; of many layers the first, the last and how many there are."""
    parts = [f"{layer}: {norm:.4g}" for layer, norm in norms.items()]
    if len(parts) > _MOST:
        parts = [*parts[:2], "…", parts[-1]]
        return f"{{{', '.join(parts)}}} of {len(norms)} layers"
    return f"{{{', '.join(parts)}}}"


def vector_html(text: str, norms: Mapping[int, float]) -> str:
    """The text, and below it a bar for each layer whose height is the norm there."""
    most = max(norms.values(), default=0.0) or 1.0
    bars = []
    for i, (layer, norm) in enumerate(norms.items()):
        height = norm / most * _HEIGHT
        bars.append(
            f'<g><title>layer {layer}: {norm:.4g}</title><rect x="{i * _BAR}" y="{_HEIGHT - height:.1f}" '
            f'width="{_BAR - 3}" height="{height:.1f}" fill="#4c78a8"/><text x="{i * _BAR + (_BAR - 3) / 2}" '
            f'y="{_HEIGHT + 10}" font-size="8" text-anchor="middle" fill="currentColor">{layer}</text></g>'
        )
    width, height = len(norms) * _BAR, _HEIGHT + 12
    return (
        f"<div><code>{escape(text)}</code><br>"
        f'<svg width="{width}" height="{height}" role="img" aria-label="norm of each layer">{"".join(bars)}</svg></div>'
    )
