"""Text generation of a client, steered or not.

The module is also the default client's door: ``mechanex.generation.generate(...)`` calls it there.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast, overload

from . import _default
from .base import _BaseModule
from .engine.chat import continued
from .engine.pairing import are_prompts
from .engine.seeds import checked_seed, row_seed
from .engine.strengths import UNSAID, chosen_strength
from .errors import NotFoundError, ValidationError
from .remote.answers import check_understood, field
from .remote.bodies import list_of, rules_of

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .engine.answering import RuleOptions
    from .engine.hooks import SteeringPlan
    from .engine.models.resolve import LoadedModel
    from .engine.text import Prompt
    from .engine.vectors import SteeringVector

    OneSource: TypeAlias = str | os.PathLike[str] | Mapping[int, Any] | SteeringVector | SteeringPlan
    VectorSource: TypeAlias = OneSource | Sequence[OneSource]

__all__ = ["GenerationModule"]

_logger = logging.getLogger(__name__)

_CALL = "generation.generate"
_MIN_P, _TYPICAL_P, _TEMPERATURE = 0.05, 0.95, 1.0
_VECTOR_SUFFIXES = (".safetensors", ".json", ".gguf")


class GenerationModule(_BaseModule):
    """Module for text generation."""

    @overload
    def generate(  # type: ignore[overload-overlap]  # a text is a sequence of texts
        self,
        prompt: Prompt,
        max_tokens: int = 128,
        sampling_method: str = "top-k",
        top_k: int = 50,
        top_p: float = 0.9,
        steering_strength: float | Sequence[float] = UNSAID,
        steering_vector: VectorSource | None = None,
        *,
        min_p: float = _MIN_P,
        typical_p: float = _TYPICAL_P,
        temperature: float = _TEMPERATURE,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        stream: Literal[False] = False,
        continue_final_message: bool = False,
        guard: float | None = None,
        strength: float | Sequence[float] | None = None,
        **rules: Unpack[RuleOptions],
    ) -> str: ...

    @overload
    def generate(
        self,
        prompt: Sequence[Prompt],
        max_tokens: int = 128,
        sampling_method: str = "top-k",
        top_k: int = 50,
        top_p: float = 0.9,
        steering_strength: float | Sequence[float] = UNSAID,
        steering_vector: VectorSource | None = None,
        *,
        min_p: float = _MIN_P,
        typical_p: float = _TYPICAL_P,
        temperature: float = _TEMPERATURE,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        stream: Literal[False] = False,
        continue_final_message: bool = False,
        guard: float | None = None,
        strength: float | Sequence[float] | None = None,
        **rules: Unpack[RuleOptions],
    ) -> list[str]: ...

    @overload
    def generate(
        self,
        prompt: Prompt,
        max_tokens: int = 128,
        sampling_method: str = "top-k",
        top_k: int = 50,
        top_p: float = 0.9,
        steering_strength: float | Sequence[float] = UNSAID,
        steering_vector: VectorSource | None = None,
        *,
        min_p: float = _MIN_P,
        typical_p: float = _TYPICAL_P,
        temperature: float = _TEMPERATURE,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        stream: Literal[True],
        continue_final_message: bool = False,
        guard: float | None = None,
        strength: float | Sequence[float] | None = None,
        **rules: Unpack[RuleOptions],
    ) -> Iterator[str]: ...

    def generate(
        self,
        prompt: Prompt | Sequence[Prompt],
        max_tokens: int = 128,
        sampling_method: str = "top-k",
        top_k: int = 50,
        top_p: float = 0.9,
        steering_strength: float | Sequence[float] = UNSAID,
        steering_vector: VectorSource | None = None,
        *,
        min_p: float = _MIN_P,
        typical_p: float = _TYPICAL_P,
        temperature: float = _TEMPERATURE,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        stream: bool = False,
        continue_final_message: bool = False,
        guard: float | None = None,
        strength: float | Sequence[float] | None = None,
        **rules: Unpack[RuleOptions],
    ) -> str | list[str] | Iterator[str]:
        """Runs a standard generation, on the server or on the local model as the execution mode says.

        Args:
            prompt: text, token ids or chat messages (rendered by the tokenizer's template), or a list of such
                prompts, which are continued together; prompt i draws as it would alone with ``seed + i``.
            max_tokens: most tokens to add; fewer, with a logged line, where the model's context ends before.
            sampling_method: ``greedy``, ``top-k``, ``top-p``, ``min-p``, ``typical``, or ``combined``: min-p, then
                top-k, then top-p of what is left.
            top_k: for ``top-k`` and ``combined``: how many of the likeliest tokens stay; 0 for all with ``combined``.
            top_p: for ``top-p`` and ``combined``: total probability of the tokens that stay, in (0, 1].
            steering_strength: multiplies the vector; of several vectors each, or with a list its own. Left out, it is
                1. With a vector a 0 steers nothing and logs a warning; without one, anything but 0 is an error.
            steering_vector: the id of stored vectors, ``{layer: tensor [d]}``, a ``SteeringVector``, the
                path of a vector file, or a ``SteeringPlan``; or a list of these, which act in order.
            min_p: for ``min-p`` and ``combined``: least probability as a share of the likeliest token's, in (0, 1]; 0
                for none with ``combined``.
            typical_p: for ``typical``: total probability of the tokens that stay, in (0, 1].
            temperature: divides the logits before drawing, above 0.
            seed: makes the draws repeatable; torch's global random state is left alone.
            stop: a text or texts that end the continuation and are cut off; special tokens, such as
                ``<|im_end|>``, too.
            stream: give an iterator of text; its first piece is the prompt, and joined they are the whole
                result. A server's text comes in one piece.
            continue_final_message: go on with a chat's last message instead of answering it.
            guard: most nats by which steering may move a token's distribution, KL(steered‖plain) before temperature,
                against a plain row with the same tokens beside it. A token beyond is chosen at the strongest of ⅔, ⅓
                and 0 of the strength that is within, else by the plain row. Runs locally.
            strength: another name of ``steering_strength``.
            rules: what answers are held to: ``min_tokens``, ``ignore_eos``, ``stop_token_ids``,
                ``include_stop_str_in_output``, ``skip_special_tokens``, ``repetition_penalty``, ``frequency_penalty``,
                ``presence_penalty``, ``logit_bias``, and one of ``response_format``, ``guided_json``,
                ``guided_regex``, ``guided_choice`` and ``guided_grammar``; see
                :class:`mechanex.engine.answering.AnswerRules`.

        Returns:
            The prompt followed by its continuation; for a list of prompts, a list.

        A server takes text prompts and vectors by id; other prompts and vectors, and a guard, run on the local model
        only.

        Raises:
            MechanexError: neither a model nor a server, and whatever ``transport.call`` raises.
            NotFoundError: the vector is neither a stored id nor a file.
            ValidationError: an argument out of its range, a vector of another width or with layers that the
                model doesn't have, or, in remote mode, what can't be sent.
        """
        steering_strength = chosen_strength(steering_strength, strength, steered=steering_vector is not None)
        if isinstance(steering_vector, (list, tuple)) and not steering_vector:
            raise ValidationError(
                "steering_vector is an empty list: give vectors or plans, or None for none."
            )
        several = are_prompts(prompt)
        if several and stream:
            raise ValidationError(
                "stream=True gives the text of one prompt; got a list of prompts: stream each."
            )
        prompts: list[Any] = [*cast("Sequence[Prompt]", prompt)] if several else [prompt]
        if continue_final_message:
            prompts = [continued(one) for one in prompts]
        if stop is not None and not isinstance(stop, str):
            stop = list_of("stop", stop, "texts")
        first_seed = checked_seed(seed)
        held = rules_of(_CALL, rules)

        def remote() -> str | list[str] | Iterator[str]:
            texts = [remote_text(one, i) for i, one in enumerate(prompts)]
            if several:
                return texts
            return _pieces(str(prompts[0]), texts[0]) if stream else texts[0]

        def remote_text(prompt: Prompt, i: int) -> str:
            body: dict[str, Any] = {
                "prompt": prompt,
                "sampling_method": sampling_method,
                "max_tokens": max_tokens,
                "top_k": top_k,
                "top_p": top_p,
                "steering_vector_id": steering_vector,
                "steering_strength": steering_strength,
            }
            optional = {
                "seed": None if first_seed is None else row_seed(first_seed, i),
                "temperature": None if temperature == _TEMPERATURE else temperature,
                "min_p": None if min_p == _MIN_P else min_p,
                "stop": stop,
            }
            beyond = held.told | ({} if typical_p == _TYPICAL_P else {"typical_p": typical_p})
            body.update({name: value for name, value in optional.items() if value is not None})
            return self._remote_text(body | beyond, sorted(beyond))

        def local(loaded: LoadedModel) -> str | list[str] | Iterator[str]:
            from .engine import generate as engine

            vector: Any = None
            if isinstance(steering_vector, (list, tuple)):
                vector = [self._steering(one, loaded) for one in steering_vector]
            elif steering_vector is not None:
                vector = self._steering(steering_vector, loaded)
            run: Any = engine.generate_batch if several else engine.stream if stream else engine.generate
            return cast(
                "str | list[str] | Iterator[str]",
                run(
                    loaded.model,
                    loaded.tokenizer,
                    prompts if several else prompts[0],
                    max_tokens=max_tokens,
                    sampling_method=sampling_method,
                    top_k=top_k,
                    top_p=top_p,
                    min_p=min_p,
                    typical_p=typical_p,
                    temperature=temperature,
                    seed=first_seed,
                    stop=stop,
                    vector=vector,
                    strength=steering_strength,
                    guard=guard,
                    **rules,
                ),
            )

        only_local = None
        if not all(isinstance(one, str) for one in prompts):
            only_local = "a prompt of token ids or chat messages needs the model's tokenizer"
        elif guard is not None:
            only_local = "a guard can't be sent"
        elif steering_vector is not None:
            only_local = self._only_local(steering_vector)
        # What isn't stored here, a server's id, means nothing here: the server's own error says more.
        falls_back = steering_vector is None
        return self._run(_CALL, remote, local, only_local=only_local, falls_back=falls_back)

    def _steering(self, source: Any, loaded: LoadedModel) -> SteeringVector | SteeringPlan:
        from .engine.hooks import SteeringPlan

        if isinstance(source, SteeringPlan):
            return source
        return self._client.vectors.resolve(source, loaded.model)

    def _only_local(self, vector: VectorSource) -> str | None:
        """Why this vector can't be sent, if it can't: a server knows vectors by their ids."""
        if not isinstance(vector, str):
            return "steering_vector is not the id of a vector that the server stores"
        if os.sep in vector or os.path.splitext(vector)[1].lower() in _VECTOR_SUFFIXES:
            return "steering_vector is a file on this machine"
        client = self._client
        if client.execution_mode != "remote" and client.local_model is not None and client.has_vector(vector):
            return "the vector is stored on this machine"
        return None

    def _remote_text(self, body: dict[str, Any], beyond: Sequence[str]) -> str:
        """The answer to a body; of a server that knows what these fields, beyond the contract's, ask of it."""
        vector_id = body["steering_vector_id"]
        if vector_id is not None and body["steering_strength"] == 0:
            _logger.warning("steering_strength is 0: the vector %s steers nothing", vector_id)
        try:
            answer = self._client.transport.post("/generate", body)
            check_understood(answer, _CALL, beyond)
            return field(answer, _CALL, str, "output")
        except NotFoundError:
            if vector_id is None or not self._client.has_vector(vector_id):
                raise
        raise ValidationError(
            f"the steering vector {vector_id!r} is stored on this machine only, and the server has none with this "
            "id: load a model here and call set_execution_mode('auto') or ('local')."
        )


def _pieces(prompt: str, text: str) -> Iterator[str]:
    if text.startswith(prompt):
        yield prompt
        text = text[len(prompt) :]
    if text:
        yield text


if TYPE_CHECKING:
    _door: GenerationModule = _default.client().generation
    generate = _door.generate
else:

    def __getattr__(name: str) -> Any:
        return _default.attribute("generation", name)

    def __dir__() -> list[str]:
        return _default.names("generation")
