"""Attribution patching of a client: which parts of the model an answer hangs on.

The module is also the default client's door: ``mechanex.attribution.compute_scores(...)`` calls it there.
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
    from .engine.attribution.metrics import Answer, Metric
    from .engine.attribution.prompts import Align
    from .engine.attribution.scores import Method
    from .engine.models.resolve import LoadedModel

__all__ = ["AttributionModule"]


class AttributionModule(_BaseModule):
    """Module for attribution patching APIs."""

    def compute_scores(
        self,
        clean_prompt: str,
        corrupted_prompt: str,
        target_module_paths: Sequence[str] | None = None,
        *,
        method: Method = "gradient",
        steps: int = 1,
        metric: Metric | Sequence[Answer] | None = None,
        align: Align = None,
        positions: bool = True,
        edges: bool = False,
        recompute_attention: bool = False,
        drop_layers: bool = False,
    ) -> dict[str, Any]:
        """Computes attribution scores by patching the model.

        Corresponds to the /attribution-patching/scores endpoint. A score says what the metric of the corrupted run
        would gain from the activations that a module has in the clean run.

        Args:
            clean_prompt: the prompt with the answer of interest.
            corrupted_prompt: the same with what matters changed, of as many tokens.
            target_module_paths: names from ``model.get_paths``; None for what writes to the residual stream: the
                embedding, and attention and MLP of each layer.
            method: ``"gradient"``, attribution patching (arXiv:2310.10348), or ``"exact"``, a run for each score.
            steps: gradients that are averaged on the way between both inputs (EAP-IG, arXiv:2403.17806); 5 are much
                nearer to exact patching than 1.
            metric: two answers, the clean prompt's first, such as ``(" Paris", " Rome")``; locally also a function from
                logits [B, n_vocab] at the prompt's end to [B]; None for the two runs' top tokens. Answers count by the
                difference of their log-probability.
            align: ``"tokens"`` for prompts of different lengths.
            positions: score positions too; with ``"exact"`` a run for each.
            edges: score all edges too, from what one component writes to what a later one reads.
            recompute_attention: follow what is patched inside an attention, such as queries and keys, by running that
                attention again up to the outputs of its heads: through a saturated softmax a gradient says nothing
                (AtP*, arXiv:2403.00745). Such modules have ``heads`` too; name them, as the usual targets are none.
            drop_layers: the mean absolute score over gradients that one layer each is left out of, so that effects that
                cancel each other are not overlooked (GradDrop of AtP*); no score is below 0 then, and edges are scored
                as without it.

        Returns:
            ``scores`` by path; ``positions``, by path a number for each token of the corrupted prompt; ``heads`` and
            ``head_positions`` the same for each attention head; ``metric`` with its ``answers`` and its value in the
            ``clean`` and the ``corrupted`` run; ``tokens`` of both prompts; ``roles`` and ``layers`` by path;
            ``method``; ``steps``. With ``edges`` also these: a list of ``source``, ``target`` and ``score``, best
            first.

        Raises:
            ValidationError: a prompt that isn't text, prompts that don't align, an unknown path, or another argument
                out of its range.
            MechanexError: there is neither a model nor a server to ask, and whatever ``transport.call`` raises.
        """
        _check_prompts(clean_prompt, corrupted_prompt)
        paths = target_module_paths
        if paths is not None:
            paths = list_of("target_module_paths", paths, "names")
        body: dict[str, Any] = {
            "clean_prompt": clean_prompt,
            "corrupted_prompt": corrupted_prompt,
            "target_module_paths": paths,
        }
        more = {"method": method, "steps": steps, "metric": metric, "align": align, "positions": positions}
        more |= {"edges": edges, "recompute_attention": recompute_attention, "drop_layers": drop_layers}
        # What the wire contract has no field for is named only where it is asked for.
        body |= {name: given for name, given in more.items() if given != _USUAL[name]}
        call, transport = "attribution.compute_scores", self._client.transport

        def local(loaded: LoadedModel) -> dict[str, Any]:
            from .engine.attribution.edge_scores import scores_answer

            return scores_answer(
                loaded.model,
                clean_prompt,
                corrupted_prompt,
                paths,
                tokenizer=loaded.tokenizer,
                method=method,
                steps=steps,
                metric=metric,
                align=align,
                positions=positions,
                edges=edges,
                recompute_attention=recompute_attention,
                drop_layers=drop_layers,
            )

        return self._run(
            call,
            lambda: object_of(transport.post("/attribution-patching/scores", body), call),
            local,
            only_local="a function as metric runs locally" if callable(metric) else None,
        )


_USUAL = {
    "method": "gradient",
    "steps": 1,
    "metric": None,
    "align": None,
    "positions": True,
    "edges": False,
    "recompute_attention": False,
    "drop_layers": False,
}


def _check_prompts(clean_prompt: object, corrupted_prompt: object) -> None:
    for name, prompt in (("clean_prompt", clean_prompt), ("corrupted_prompt", corrupted_prompt)):
        if not isinstance(prompt, str):
            raise ValidationError(f"{name} is a text; got {type(prompt).__name__}.")


if TYPE_CHECKING:
    _door: AttributionModule = _default.client().attribution
    compute_scores = _door.compute_scores
else:

    def __getattr__(name: str) -> Any:
        return _default.attribute("attribution", name)

    def __dir__() -> list[str]:
        return _default.names("attribution")
