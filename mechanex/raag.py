"""Retrieval-augmented answers of a client, and helpers for drawing them.

The module is also the default client's door: ``mechanex.raag.generate(...)`` calls it there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from . import _default
from .base import _BaseModule
from .errors import ValidationError
from .remote.answers import object_of
from .remote.bodies import list_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.font_manager import FontProperties
    from matplotlib.patches import Patch

    from .engine.models.resolve import LoadedModel

__all__ = ["RAAGModule", "add_glow_effect", "draw_edges", "html_page", "truncate_text"]


class RAAGModule(_BaseModule):
    """Module for Retrieval-Augmented Answer Generation APIs."""

    def generate(
        self,
        qa_entries: Sequence[dict[str, Any]],
        docs: Sequence[dict[str, Any]] | None = None,
        pinecone_index_name: str | None = None,
    ) -> dict[str, Any]:
        """Performs Retrieval-Augmented Answer Generation. Corresponds to the /raag/generate endpoint.

        Each question is answered from the documents (greedily, or with the answer that it gives), and every token of
        the answer is traced to the chunks that it rests on: what it loses when question and answer can't attend to a
        chunk, and when the chunk was never there.

        Args:
            qa_entries: the questions, at least one: ``{"question": …}``, with ``"answer"`` to trace one that is given.
            docs: the documents to answer from, ``{"text": …}``, perhaps with an ``"id"``; or
            pinecone_index_name: the Pinecone index that holds them; here it takes Pinecone's client and
                ``PINECONE_API_KEY``.

        Returns:
            The answers and, in ``data_by_question``, which chunk of which document each token goes back to.

        Raises:
            ValidationError: no questions, not exactly one of ``docs`` and ``pinecone_index_name``, a question or a
                document without text, or documents that don't fit into the model's context where bm25s is missing.
            NotFoundError: there is no such index.
            MechanexError: neither a model nor a server, and whatever ``transport.call`` raises.
        """
        asked = [] if isinstance(qa_entries, (str, dict)) else list_of("qa_entries", qa_entries, "questions")
        if not asked:
            raise ValidationError("qa_entries is a list of questions, at least one.")
        if (docs is None) == (pinecone_index_name is None):
            got = "neither" if docs is None else "both"
            raise ValidationError(f"the documents come from docs or from pinecone_index_name; got {got}.")
        body: dict[str, Any] = {"qa_entries": asked}
        if docs is not None:
            body["docs"] = list_of("docs", docs, "documents")
        else:
            body["pinecone_index_name"] = pinecone_index_name
        call, transport = "raag.generate", self._client.transport

        def local(loaded: LoadedModel) -> dict[str, Any]:
            from .engine.raag.answer import answer_questions

            return answer_questions(
                loaded.model, loaded.tokenizer, asked, body.get("docs"), pinecone_index_name
            )

        return self._run(call, lambda: object_of(transport.post("/raag/generate", body), call), local)

    def cite(
        self,
        prompt: str,
        answer: str | None,
        sources: Sequence[Any],
        *,
        max_tokens: int = 64,
        seed: int = 0,
    ) -> dict[str, Any]:
        """Says which sentences of the sources each sentence of an answer rests on, best first; on the loaded model.

        Args:
            prompt: what stands between the sources and the answer, as the model reads it.
            answer: the answer; None to have it written.
            sources: texts, or ``{"text": …, "id": …}``.
            max_tokens: most tokens of an answer that is written.
            seed: of the shuffled sources that scores are held against.

        Returns:
            ``{"answer": …, "sentences": [{"text", "start", "end", "citations": [{"source", "text", "score", "removed",
            "validated"}]}], "retrieval": …}``. Scores are nats that the sentence loses without the source's.

        Raises:
            ValidationError: a prompt, an answer or a source without text, or sources that don't fit.
            MechanexError: there is no model.
        """
        only_local = "a server has no such call"

        def local(loaded: LoadedModel) -> dict[str, Any]:
            from .engine.raag.cite import cite

            return cite(
                loaded.model, loaded.tokenizer, prompt, answer, sources, max_tokens=max_tokens, seed=seed
            )

        return self._run("raag.cite", lambda: {}, local, only_local=only_local)


def truncate_text(text: str, max_width: float, font_properties: FontProperties) -> str:
    """Truncates text with '...' if it exceeds the max_width.

    Args:
        text: one line; ``$`` has no meaning in it.
        max_width: in points, of 1/72 inch.
        font_properties: a matplotlib font, with its size.

    Returns:
        The text, or its longest beginning that fits with '...' after it ('...' alone where nothing does).
    """
    from matplotlib.textpath import text_to_path

    def fits(shown: str) -> bool:
        return bool(text_to_path.get_text_width_height_descent(shown, font_properties, False)[0] <= max_width)

    if fits(text):
        return text
    shortest, longest = 0, len(text)
    while longest - shortest > 1:
        middle = (shortest + longest) // 2
        if fits(text[:middle].rstrip() + "..."):
            shortest = middle
        else:
            longest = middle
    return text[:shortest].rstrip() + "..."


def add_glow_effect(
    patch: Patch,
    ax: Axes,
    glow_color: Any,
    n_layers: int = 10,
    max_alpha: float = 0.3,
    diff_linewidth: float = 1.5,
) -> list[Patch]:
    """Adds a glow effect to a matplotlib patch: outlines behind it, each wider and fainter than the last.

    Args:
        patch: what glows, in ``ax`` or about to be added to it; it isn't changed.
        ax: where the outlines are added.
        glow_color: any matplotlib colour.
        n_layers: how many outlines.
        max_alpha: opacity of the innermost, in [0, 1]; the others fall evenly towards 0.
        diff_linewidth: points by which each is wider than the one inside it.

    Returns:
        The outlines, innermost first; ``remove()`` takes one away.

    Raises:
        ValidationError: fewer than one layer, or an opacity outside [0, 1].
    """
    from matplotlib.patches import PathPatch

    if n_layers < 1 or not 0 <= max_alpha <= 1:
        raise ValidationError(
            f"a glow has at least one layer and an opacity from 0 to 1; got {n_layers} and {max_alpha}."
        )
    transform = (
        patch.get_transform() if patch.is_transform_set() else patch.get_patch_transform() + ax.transData
    )
    glow: list[Patch] = []
    for layer in range(1, n_layers + 1):
        outline = PathPatch(
            patch.get_path(),
            transform=transform,
            facecolor="none",
            edgecolor=glow_color,
            alpha=max_alpha * (1 - (layer - 1) / n_layers),
            linewidth=patch.get_linewidth() + layer * diff_linewidth,
            joinstyle="round",
            zorder=patch.get_zorder() - layer * 1e-3,
        )
        ax.add_artist(outline)
        glow.append(outline)
    return glow


def html_page(result: Mapping[str, Any], question: int = 0, *, candidates: bool = False) -> str:
    """Writes an answer as a page of HTML on which pointing at a token marks the chunks that it rests on.

    Args:
        result: what ``generate`` returned.
        question: which of its questions.
        candidates: show candidate edges too, not the validated ones alone.

    Raises:
        ValidationError: there is no such question.
    """
    from .engine.raag.page import html_page as write

    return write(_asked(result, question), candidates=candidates)


def draw_edges(result: Mapping[str, Any], question: int = 0, *, candidates: bool = False) -> Figure:
    """Draws an answer's tokens on the left, the chunks on the right, and the edges between them coloured by layer.

    Needs no display; the colours can be told apart with any colour vision and in grey.

    Args:
        result: what ``generate`` returned.
        question: which of its questions.
        candidates: draw candidate edges too (grey where they weren't validated), not the validated ones alone.

    Returns:
        A figure; ``figure.savefig("edges.png")`` writes it.

    Raises:
        ValidationError: there is no such question, or matplotlib isn't installed.
    """
    from .engine.figures import new_figure
    from .engine.raag.page import edges_of

    data = _asked(result, question)
    edges = edges_of(data, candidates=candidates)
    tokens, spans = data["bundle"]["answer_tokens"][0], data["bundle"]["chunk_spans"]
    first = len(data["bundle"]["prompt_tokens"][0])
    rows = max(len(tokens), len(spans))
    figure: Figure = new_figure(9, 1 + 0.34 * rows)
    from matplotlib import colormaps
    from matplotlib.font_manager import FontProperties

    axes = figure.add_subplot()
    axes.set(xlim=(0, 10), ylim=(rows, -1), title=data["question"].replace("$", r"\$"))
    axes.axis("off")
    font = FontProperties(size=10)
    left = [(i + 0.5) * rows / len(tokens) - 0.5 for i in range(len(tokens))]
    right = {span["chunk_global_id"]: (i + 0.5) * rows / len(spans) - 0.5 for i, span in enumerate(spans)}
    for place, text in zip(left, tokens, strict=True):
        axes.text(
            1.9, place, text.strip() or repr(text), ha="right", va="center", font=font, parse_math=False
        )
    for place, span in zip(right.values(), spans, strict=True):
        shown = truncate_text(" ".join(span["text"].split()), 250, font)
        axes.text(5.1, place, shown, va="center", font=font, parse_math=False)
    layers = sorted({edge["best_layer"] for _, edge in edges if edge["best_layer"] is not None})
    color_of = {
        layer: colormaps["viridis"](0.9 * i / max(1, len(layers) - 1)) for i, layer in enumerate(layers)
    }
    heaviest = max((edge["weight"] for _, edge in edges), default=1.0)
    for token, edge in edges:
        axes.plot(
            [2, 5],
            [left[token - first], right[edge["chunk_global_id"]]],
            color=color_of.get(edge["best_layer"], "#999999"),
            linewidth=1 + 4 * edge["weight"] / heaviest,
            solid_capstyle="round",
        )
    for layer, color in color_of.items():
        axes.plot([], [], color=color, linewidth=3, label=f"layer {layer}")
    if layers:
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, 0), ncols=min(6, len(layers)), frameon=False)
    return figure


def _asked(result: Mapping[str, Any], question: int) -> dict[str, Any]:
    asked = result.get("data_by_question") or {}
    if str(question) not in asked:
        raise ValidationError(
            f"there is no question {question}: the answers are of {', '.join(asked) or 'none'}."
        )
    found: dict[str, Any] = asked[str(question)]
    return found


if TYPE_CHECKING:
    _door: RAAGModule = _default.client().raag
    cite = _door.cite
    generate = _door.generate
else:

    def __getattr__(name: str) -> Any:
        return _default.attribute("raag", name)

    def __dir__() -> list[str]:
        return _default.names("raag")
