"""Steering vectors of a client: computed, stored, saved and loaded.

The module is also the default client's door: ``mechanex.steering.generate_vectors(...)`` calls it there.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NoReturn, TypeAlias

from . import _default
from .base import _BaseModule
from .engine.methods import check_method, recorded_vectors
from .errors import NotFoundError, ValidationError
from .remote.answers import field
from .remote.bodies import example_lists, examples, layer_list, list_of

if TYPE_CHECKING:
    from torch import Tensor

    from .engine.datasets import ContrastivePairs
    from .engine.formats.site import Site
    from .engine.hooks import Handle
    from .engine.models.resolve import LoadedModel
    from .engine.prompt_conditions import PromptCondition
    from .engine.text import Prompt
    from .engine.vectors import SteeringVector

    VectorSource: TypeAlias = str | os.PathLike[str] | Mapping[int, Any] | SteeringVector
    Examples: TypeAlias = tuple[list[Prompt], list[str], list[str]]

__all__ = ["SteeringModule"]

_logger = logging.getLogger(__name__)

_CALL = "steering.generate_vectors"
_ONLY_LOCAL = ("pca", "probe")
_HERE = "it looks into the model"


def _tell(line: str) -> None:
    """Tells whoever sits at the terminal, and else the log."""
    if sys.stderr.isatty():
        print(line, file=sys.stderr)
    else:
        _logger.info(line)


class SteeringModule(_BaseModule):
    """Module for steering vector APIs."""

    def generate_vectors(
        self,
        prompts: Sequence[Prompt],
        positive_answers: Sequence[str],
        negative_answers: Sequence[str],
        layer_idxs: Sequence[int] | None = None,
        method: str = "few-shot",
        *,
        seed: int | None = None,
        progress: bool | None = None,
    ) -> str:
        """Computes steering vectors from contrastive answers and stores them.

        Args:
            prompts: text, token ids or chat messages, one per example.
            positive_answers: for each prompt, an answer that shows the behaviour.
            negative_answers: for each prompt, an answer that shows its opposite.
            layer_idxs: layers, negatives from the end; None for the one at two thirds of the model.
            method: ``"few-shot"``, the default, optimizes the vectors so that positive answers become likely and
                negative ones unlikely (arXiv:2502.18862), and needs few examples. The others need one pass over the
                examples: ``"caa"``, mean differences of the residual stream (arXiv:2312.06681); ``"pca"``, the
                principal direction of the paired differences (arXiv:2310.01405); ``"probe"``, the direction of a
                logistic regression (arXiv:2306.03341). ``"pca"`` and ``"probe"`` run locally only.
            seed: of the starting vectors of ``"few-shot"``, there alone; None for 0.
            progress: show a progress bar; None does for ``"few-shot"`` in a terminal or notebook.

        Returns:
            The id of the stored vectors, for ``get``, ``get_vectors`` and ``generate``.

        Raises:
            MechanexError: no model is loaded.
            ValidationError: another method, lists of unequal length or empty, a layer that doesn't exist, or
                a vector that comes out zero or not finite. Nothing is stored then.
        """
        return self._stored_from(
            (prompts, positive_answers, negative_answers), layer_idxs, method, seed, progress
        )

    def vector(
        self,
        prompts: Sequence[Prompt],
        positive_answers: Sequence[str],
        negative_answers: Sequence[str],
        layer_idxs: Sequence[int] | None = None,
        method: str = "few-shot",
        *,
        seed: int | None = None,
        progress: bool | None = None,
        tokens: Literal["all", "last"] = "all",
    ) -> SteeringVector:
        """Computes a steering vector on the loaded model, and stores nothing; arguments as in ``generate_vectors``.

        Args:
            prompts, positive_answers, negative_answers, layer_idxs, method, seed, progress: as there.
            tokens: ``"last"`` lets ``method="caa"`` read the last token of each answer in place of all.

        Returns:
            The vector. Its ``metadata`` says where it comes from: ``data_count`` and ``data_sha256``, ``data_name`` and
            ``data_split`` of files, ``model_revision``, ``date``, and ``fit``, the figures of the fit by layer as JSON.

        Raises:
            MechanexError: no model is loaded.
            ValidationError: as in ``generate_vectors``.
        """
        lists = self._checked(prompts, positive_answers, negative_answers, method, seed)
        if tokens not in ("all", "last") or (tokens == "last" and method != "caa"):
            raise ValidationError(
                f"tokens is 'all', or 'last' with method='caa'; got tokens={tokens!r} with method={method!r}."
            )
        loaded = self._client.require_local("steering.vector", _HERE)
        return self._computed(loaded, lists, layer_list(layer_idxs), method, seed, progress, tokens=tokens)

    def difference(
        self,
        positive: Sequence[Prompt],
        negative: Sequence[Prompt],
        layer_idxs: Sequence[int] | None = None,
        *,
        tokens: str | int | slice = "last",
        progress: bool = False,
    ) -> SteeringVector:
        """The difference of the mean activations of two lists of prompts, which need not be pairs; runs locally.

        Args:
            positive: prompts that show the behaviour: text, token ids or chat messages.
            negative: prompts that don't, as many as you like.
            layer_idxs: as in ``generate_vectors``.
            tokens: which tokens of a prompt are averaged: ``"last"``, ``"all"``, or a place or slice.
            progress: show a progress bar.

        Returns:
            The vector, with the same record as of ``vector``.

        Raises:
            MechanexError: no model is loaded.
            ValidationError: an empty list, a layer that doesn't exist, or prompts that don't differ there.
        """
        from .engine.difference import difference_vectors
        from .engine.provenance import data_fields, origin_fields

        loaded = self._client.require_local("steering.difference", _HERE)
        positive, negative = (
            list_of("positive", positive, "prompts"),
            list_of("negative", negative, "prompts"),
        )
        found = difference_vectors(
            loaded.model,
            positive,
            negative,
            layer_list(layer_idxs),
            loaded.tokenizer,
            tokens=tokens,
            progress=progress,
        )
        return found.noted(**data_fields((positive, negative)), **origin_fields(loaded.model))

    def get(self, vector_id: str) -> SteeringVector:
        """The stored vector with this id, with its record and algebra; ``get_vectors`` gives its tensors alone.

        Raises:
            NotFoundError: no vectors that are stored on this machine have this id.
            ValidationError: the text can't be an id.
        """
        return self._stored(vector_id)

    def _checked(
        self, prompts: Any, positive_answers: Any, negative_answers: Any, method: str, seed: int | None
    ) -> Examples:
        check_method(method)
        if seed is not None and method != "few-shot":
            raise ValidationError(
                f"method={method!r} draws no random numbers: seed is for method='few-shot'."
            )
        return example_lists(prompts, positive_answers, negative_answers)

    def _stored_from(
        self,
        given: tuple[Any, Any, Any],
        layer_idxs: Sequence[int] | None,
        method: str,
        seed: int | None,
        progress: bool | None,
        name: str | None = None,
        split: str | None = None,
    ) -> str:
        lists = self._checked(*given, method, seed)
        layers = layer_list(layer_idxs)

        def remote() -> str:
            body = {**examples(*lists), "layer_idxs": layers, "method": method}
            answer = self._client.transport.post("/steering/generate", body)
            return field(answer, _CALL, str, "steering_vector_id")

        def local(loaded: LoadedModel) -> str:
            vector = self._computed(loaded, lists, layers, method, seed, progress, name=name, split=split)
            vector_id = self._client.vectors.put(vector)
            path = self._client.vectors.path(vector_id)
            if path.is_file():
                _tell(f"vector {vector_id} is stored in {path}")
            return vector_id

        only_local = None
        if method in _ONLY_LOCAL or seed is not None:
            only_local = f"method={method!r} runs locally" if seed is None else "a seed is for local vectors"
        if not all(isinstance(prompt, str) for prompt in lists[0]):
            only_local = "prompts of token ids or chat messages need the model's tokenizer"
        return self._run(_CALL, remote, local, only_local=only_local)

    def _computed(
        self,
        loaded: LoadedModel,
        lists: Examples,
        layers: list[int] | None,
        method: str,
        seed: int | None,
        progress: bool | None,
        *,
        tokens: str = "all",
        name: str | None = None,
        split: str | None = None,
    ) -> SteeringVector:
        given: dict[str, Any] = {} if seed is None else {"seed": seed}
        if tokens != "all":
            given["tokens"] = tokens
        if method == "few-shot":
            _tell(
                "few-shot optimizes a vector for each layer by gradient descent; method='caa' takes one pass"
            )
        # A bar where somebody waits and looks.
        shown = method == "few-shot" and sys.stderr.isatty() if progress is None else progress
        return recorded_vectors(
            loaded.model,
            lists,
            layers,
            method,
            loaded.tokenizer,
            name=name,
            split=split,
            progress=shown,
            **given,
        )

    def generate_from_jsonl(
        self,
        dataset_path: str | os.PathLike[str],
        layer_idxs: Sequence[int] | None = None,
        method: str = "few-shot",
        *,
        split: str | None = None,
        seed: int | None = None,
        progress: bool | None = None,
    ) -> str:
        """Computes steering vectors from a JSONL file and stores them; see ``generate_vectors``.

        Args:
            dataset_path: each line an object with ``prompt`` and either ``positive`` and ``negative`` or
                ``positive_answer`` and ``negative_answer``.
            layer_idxs: as in ``generate_vectors``.
            method: as in ``generate_vectors``.
            split: use only the lines whose ``"split"`` is this.
            seed: as in ``generate_vectors``.
            progress: as in ``generate_vectors``.

        Raises:
            NotFoundError: there is no such file.
            ValidationError: a bad line, with its number, and all that ``generate_vectors`` raises.
        """
        check_method(method)
        from .engine.datasets import read_pairs

        pairs = read_pairs(dataset_path, split=split)
        return self._stored_from(
            (pairs.prompts, pairs.positive_answers, pairs.negative_answers),
            layer_idxs,
            method,
            seed,
            progress,
            name=os.path.basename(dataset_path),
            split=split,
        )

    def fit_condition(
        self,
        prompts: Sequence[Prompt],
        others: Sequence[Prompt],
        layer_idxs: Sequence[int] | None = None,
        *,
        false_positives: float = 0.02,
    ) -> PromptCondition:
        """Fits the condition that prompts of one kind meet and others don't, for ``SteeringVector.when``; runs locally.

        Args:
            prompts: of the kind that is to be steered: text, token ids or chat messages, 8 or more.
            others: of every other kind that is to be left alone, as mixed as what will come, 8 or more.
            layer_idxs: candidates for the layer where prompts are looked at, negatives from the end; None for all.
            false_positives: share of other prompts that may meet it, calibrated on held-out ones.

        Returns:
            The condition, with its layer, threshold and held-out rates.

        Raises:
            MechanexError: no model is loaded.
            ValidationError: too few prompts, ones that the model can't tell apart, a rate outside of (0, 1), or a layer
                that doesn't exist.
        """
        from .engine.conditions.fitting import fit_condition

        loaded = self._client.require_local("steering.fit_condition", _HERE)
        return fit_condition(
            loaded.model, prompts, others, layer_idxs, loaded.tokenizer, false_positives=false_positives
        )

    def from_system_prompt(
        self,
        system_prompt: str,
        prompts: Sequence[Prompt] | None = None,
        layer_idxs: Sequence[int] | None = None,
        *,
        steps: int = 40,
        answer_tokens: int = 20,
        seed: int = 0,
        progress: bool = False,
    ) -> SteeringVector:
        """Trains a vector that stands in for a system prompt, whose tokens it saves; runs locally.

        Each token opens it by a gate: x ← x + sigmoid(w·x + c)·v at 6 layers, with w, c and v trained so that the
        model's next tokens are those that it would choose under the system prompt.

        Args:
            system_prompt: the text.
            prompts: questions that are answered under it, to learn from: text or chat messages; None for 40 open ones.
            layer_idxs: where it acts, negatives from the end; None for 6 layers.
            steps: of training, over 8 chats each.
            answer_tokens: tokens of each answer that it is trained on.
            seed: of the answers and of the order.
            progress: show a progress bar.

        Returns:
            The vector, for ``steering_vector`` at strength 1; ``metadata["recovered"]`` is the share of the prompt's
            effect on held-out chats that it brings about (of nats per token, ``metadata["prompt_kl"]``).

        Raises:
            MechanexError: no model is loaded.
            ValidationError: no system prompt, one that changes nothing, fewer than 5 prompts, or a layer that doesn't
                exist.
        """
        from .engine.conditions.system_prompts import from_system_prompt

        loaded = self._client.require_local("steering.from_system_prompt", _HERE)
        return from_system_prompt(
            loaded.model,
            system_prompt,
            prompts,
            loaded.tokenizer,
            layers=layer_idxs,
            steps=steps,
            answer_tokens=answer_tokens,
            seed=seed,
            progress=progress,
        )

    def tune(
        self,
        data: ContrastivePairs | str | os.PathLike[str],
        *,
        split: str | None = None,
        seed: int = 0,
        progress: bool = False,
        **options: Any,
    ) -> SteeringVector:
        """Finds layer, edit, tokens and strength for contrastive examples, and gives the vector with its dose inside.

        Strength 1 of the result is the dose that was chosen: the largest effect on held-back prompts at no more than
        1.5 times the plain model's perplexity (``most_perplexity``). Runs on the loaded model only.

        Args:
            data: contrastive pairs, their JSONL file, or a bundled dataset's name.
            split: use only the lines whose ``"split"`` is this.
            seed: of everything that is drawn.
            progress: show progress bars.
            options: of ``mechanex.utils.doses.sweep``, such as ``scorer``, ``layers`` or ``checkpoint``.

        Raises:
            MechanexError: no model is loaded.
            NotFoundError: there is no such file.
            ValidationError: too few pairs, an unknown edit, a layer that doesn't exist, ….
        """
        from .bundled import dataset_path
        from .engine.datasets import ContrastivePairs, read_pairs

        if isinstance(data, ContrastivePairs):
            if split is not None:
                raise ValidationError("split goes with a file: these pairs have no splits.")
            pairs = data
        else:
            pairs = read_pairs(dataset_path(os.fspath(data)), split=split)

        def local(loaded: LoadedModel) -> SteeringVector:
            from .engine.doses.tune import tune

            return tune(
                loaded.model, pairs, tokenizer=loaded.tokenizer, seed=seed, progress=progress, **options
            )

        return self._run("steering.tune", _not_sent, local, only_local="vectors are tuned on a loaded model")

    def calibrate(
        self,
        vector: str | os.PathLike[str] | Mapping[int, Any] | SteeringVector,
        kl: float = 1.0,
        *,
        prompts: Sequence[Prompt] | None = None,
        answers: Sequence[str] | None = None,
        max_tokens: int = 32,
        seed: int = 0,
    ) -> SteeringVector:
        """Finds the strength of a vector at which 95 % of tokens move by at most ``kl`` nats; gives one that knows it.

        ``.calibration.strength`` of the result is that strength; its numbers are those of the vector. Doses so found
        are alike for vectors, layers and models of any scale. Runs on the loaded model only.

        Args:
            vector: an id, a vector file, ``{layer: [d]}`` or a ``SteeringVector``.
            kl: the 95th percentile over tokens of KL(steered‖plain), nats, from logits before temperature.
            prompts: texts or chats whose answers are looked at; None for open questions.
            answers: one for each prompt; None for what the plain model writes.
            max_tokens: of an answer that is written.
            seed: of the answers that are written.

        Raises:
            MechanexError: no model is loaded.
            NotFoundError: the vector is neither a stored id nor a file.
            ValidationError: a vector that doesn't fit the model or is zero, or a budget that no strength meets.
        """

        def local(loaded: LoadedModel) -> SteeringVector:
            from .engine.doses.calibrate import calibrate

            return calibrate(
                loaded.model,
                self._client.vectors.resolve(vector, loaded.model),
                kl,
                prompts=prompts,
                answers=answers,
                tokenizer=loaded.tokenizer,
                max_tokens=max_tokens,
                seed=seed,
            )

        return self._run(
            "steering.calibrate", _not_sent, local, only_local="vectors are calibrated on a loaded model"
        )

    def ablate_everywhere(self, vector: VectorSource) -> Handle:
        """Takes a direction out of the loaded model's stream wherever it is read, until the handle is removed.

        Args:
            vector: an id, a vector file, ``{layer: [d]}`` or a ``SteeringVector``, of one layer;
                only the direction counts.

        Returns:
            A handle with ``remove()``, and a context manager: every call of the model meanwhile is without the
            direction.

        Raises:
            MechanexError: no model is loaded.
            ValidationError: a vector of several layers, of another width, or zero.
        """
        from .engine.orthogonalize import ablate_everywhere

        loaded = self._client.require_local("steering.ablate_everywhere", _HERE)
        return ablate_everywhere(loaded.model, self._client.vectors.resolve(vector, loaded.model))

    def orthogonalize(self, vector: VectorSource) -> Handle:
        """Takes a direction out of the loaded model's weights, which then do what ``ablate_everywhere`` does.

        Args:
            vector: as there.

        Returns:
            A handle whose ``remove()`` puts the weights back.

        Raises:
            MechanexError: no model is loaded.
            ValidationError: as there, or a model whose weights can't do it, which are then left as they were.
        """
        from .engine.orthogonalize import orthogonalize

        loaded = self._client.require_local("steering.orthogonalize", _HERE)
        return orthogonalize(loaded.model, self._client.vectors.resolve(vector, loaded.model))

    def get_vectors(self, vector_id: str) -> dict[int, Tensor]:
        """Retrieves stored vectors by id, of this session or an earlier one.

        Vectors that a server computed stay there: their ids work in ``generate`` on that server, and not here.
        ``set_execution_mode('local')`` computes vectors whose tensors can be had.

        Returns:
            ``{layer: tensor [d]}``, float32 or float64, on the CPU.

        Raises:
            NotFoundError: no vectors that are stored on this machine have this id.
            ValidationError: the text can't be an id.
        """
        return dict(self._stored(vector_id))

    def delete_vectors(self, vector_id: str) -> None:
        """Deletes stored vectors: those of this machine, or else those of the account on a server of one's own.

        Raises:
            NotFoundError: no stored vectors have this id.
            ValidationError: the text can't be an id, or a behavior of the account uses the vectors.
            MechanexError: the file can't be deleted.
        """
        client = self._client
        here = client.execution_mode != "remote" and client.has_vector(vector_id)
        if (
            here
            or client.execution_mode == "local"
            or not (client.is_remote or client.transport.address.chosen)
        ):
            client.vectors.delete(vector_id)
        else:
            client.transport.delete("/steering/vectors/", vector_id)

    def save_vectors(
        self, vectors_or_id: str | Mapping[int, Any] | SteeringVector, path: str | os.PathLike[str]
    ) -> None:
        """Saves steering vectors to a ``.safetensors``, ``.json`` or ``.gguf`` file.

        Args:
            vectors_or_id: an id, as for ``get_vectors`` of vectors on this machine; ``{layer: [d]}`` of tensors, arrays
                or lists, or a ``SteeringVector``.
            path: the file; its suffix is the format. Written under a temporary name and then renamed.

        Raises:
            NotFoundError: no vectors that are stored on this machine have this id; those of a server stay there.
            ValidationError: an unknown suffix, NaN or infinite numbers, or layer 0 in GGUF.
        """
        from .engine.vectors import SteeringVector

        if isinstance(vectors_or_id, str):
            vector = self._stored(vectors_or_id)
        elif isinstance(vectors_or_id, SteeringVector):
            vector = vectors_or_id
        else:
            vector = SteeringVector(vectors_or_id)
        vector.save(path)

    def load_vectors(self, path: str | os.PathLike[str], *, site: Site | None = None) -> dict[int, Tensor]:
        """Loads steering vectors from a ``.safetensors``, ``.json`` or ``.gguf`` file.

        ``SteeringVector.load`` gives the same with its metadata and algebra.

        Args:
            path: the file.
            site: ``"input"`` or ``"output"``: what the numbers in another tool's file mean, where it doesn't say so
                itself; as in ``SteeringVector.load``.

        Returns:
            ``{layer: tensor [d]}``.

        Raises:
            NotFoundError: there is no such file.
            ValidationError: the file is not a sound vector file, or needs ``site``; names the file and the problem.
        """
        from .engine.vectors import SteeringVector

        return dict(SteeringVector.load(path, site=site))

    def _stored(self, vector_id: str) -> SteeringVector:
        client = self._client
        try:
            return client.vectors.get(vector_id)
        except NotFoundError:
            server = client.is_remote or client.transport.address.chosen
            if client.execution_mode == "local" or not server:
                raise
        raise NotFoundError(
            f"this machine has no vectors with the id {vector_id!r}. Those that a server computed stay there, and "
            "their ids work in generate there; set_execution_mode('local'), with a model loaded, computes vectors "
            "whose tensors can be had."
        )


def _not_sent() -> NoReturn:
    raise AssertionError("runs on a loaded model only")


if TYPE_CHECKING:
    _door: SteeringModule = _default.client().steering
    generate_vectors = _door.generate_vectors
    vector = _door.vector
    difference = _door.difference
    get = _door.get
    ablate_everywhere = _door.ablate_everywhere
    orthogonalize = _door.orthogonalize
    generate_from_jsonl = _door.generate_from_jsonl
    fit_condition = _door.fit_condition
    from_system_prompt = _door.from_system_prompt
    get_vectors = _door.get_vectors
    delete_vectors = _door.delete_vectors
    save_vectors = _door.save_vectors
    load_vectors = _door.load_vectors
    tune = _door.tune
    calibrate = _door.calibrate
else:

    def __getattr__(name: str) -> Any:
        return _default.attribute("steering", name)

    def __dir__() -> list[str]:
        return _default.names("steering")
