"""Retrieval-augmented answers of a client, and helpers for drawing them.

The module is also the default client's door: ``mechanex.raag.generate(...)`` calls it there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from . import _default
from .base import _BaseModule
from .errors import ValidationError
from .remote.answers import object_of
from .remote.bodies import list_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.font_manager import FontProperties
    from matplotlib.patches import Patch

    from .engine.models.resolve import LoadedModel

__all__ = ["RAAGModule", "add_glow_effect", "truncate_text"]


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


if TYPE_CHECKING:
    _door: RAAGModule = _default.client().raag
    cite = _door.cite
    generate = _door.generate
else:

    def __getattr__(name: str) -> Any:
        return _default.attribute("raag", name)
