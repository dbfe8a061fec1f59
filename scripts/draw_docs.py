"""Draws the pictures of docs/attribution.md and docs/raag.md with the bundled model.

python scripts/draw_docs.py
"""

from __future__ import annotations

from pathlib import Path

import mechanex
from mechanex.engine.attribution.edge_scores import attribution_edges
from mechanex.engine.attribution.plots import plot_circuit, plot_scores
from mechanex.engine.models.resolve import load

DOCS = Path(__file__).parents[1] / "docs"
PROMPTS = "The gym was full of calm. She", "The gym was full of anger. She"
FACTS = [
    {"id": "notes", "text": "Mia has a green bag. Lucy has a black hat."},
    {"text": "Tom has a red lamp."},
]


def main() -> None:
    client = mechanex.Mechanex().load("mx-tiny", backend="transformers")
    plot_scores(client.attribution.compute_scores(*PROMPTS), DOCS / "attribution.png")
    loaded = load("mx-tiny", backend="transformers")
    edges = attribution_edges(loaded.model, *PROMPTS, tokenizer=loaded.tokenizer, steps=5)
    plot_circuit(edges.to_dict(edges.circuit(12)), DOCS / "circuit.png")
    found = client.raag.generate([{"question": "Who has the bag?"}], docs=FACTS)
    mechanex.raag.draw_edges(found, candidates=True).savefig(DOCS / "raag.png", dpi=110, bbox_inches="tight")


if __name__ == "__main__":
    main()
