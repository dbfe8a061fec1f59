"""Text generation of a client, steered or not.

The module is also the default client's door: ``mechanex.generation.generate(...)`` calls it there.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

from .base import _BaseModule, default_attribute
from .errors import ValidationError

if TYPE_CHECKING:
    from torch import Tensor

    from .engine.text import Prompt
    from .engine.vectors import SteeringVector

    VectorSource = str | os.PathLike[str] | Mapping[int, Tensor] | SteeringVector

__all__ = ["GenerationModule"]


class GenerationModule(_BaseModule):
    """Module for text generation."""

    @overload
    def generate(
        self,
        prompt: Prompt,
        max_tokens: int = 128,
        sampling_method: str = "top-k",
        top_k: int = 50,
        top_p: float = 0.9,
        steering_strength: float = 0,
        steering_vector: VectorSource | None = None,
        *,
        min_p: float = 0.05,
        typical_p: float = 0.95,
        temperature: float = 1.0,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        stream: Literal[False] = False,
    ) -> str: ...

    @overload
    def generate(
        self,
        prompt: Prompt,
        max_tokens: int = 128,
        sampling_method: str = "top-k",
        top_k: int = 50,
        top_p: float = 0.9,
        steering_strength: float = 0,
        steering_vector: VectorSource | None = None,
        *,
        min_p: float = 0.05,
        typical_p: float = 0.95,
        temperature: float = 1.0,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        stream: Literal[True],
    ) -> Iterator[str]: ...

    def generate(
        self,
        prompt: Prompt,
        max_tokens: int = 128,
        sampling_method: str = "top-k",
        top_k: int = 50,
        top_p: float = 0.9,
        steering_strength: float = 0,
        steering_vector: VectorSource | None = None,
        *,
        min_p: float = 0.05,
        typical_p: float = 0.95,
        temperature: float = 1.0,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        stream: bool = False,
    ) -> str | Iterator[str]:
        """Runs a standard generation on the local model.

        Args:
            prompt: text, token ids or chat messages (rendered by the tokenizer's template).
            max_tokens: most tokens to add; fewer, with a logged line, where the model's context ends before.
            sampling_method: ``greedy``, ``top-k``, ``top-p``, ``min-p`` or ``typical``.
            top_k: for ``top-k``: how many of the likeliest tokens stay.
            top_p: for ``top-p``: total probability of the tokens that stay, in (0, 1].
            steering_strength: multiplies the vector. With a vector, 0 (the default) steers nothing and logs a
                warning; without one, anything but 0 is an error.
            steering_vector: the id of stored vectors, ``{layer: tensor [d]}``, a ``SteeringVector``, or the
                path of a vector file.
            min_p: for ``min-p``: least probability as a share of the likeliest token's, in (0, 1].
            typical_p: for ``typical``: total probability of the tokens that stay, in (0, 1].
            temperature: divides the logits before drawing, above 0.
            seed: makes the draws repeatable; torch's global random state is left alone.
            stop: a text or texts that end the continuation and are cut off.
            stream: give an iterator of text; its first piece is the prompt, and joined they are the whole
                result.

        Returns:
            The prompt followed by its continuation.

        Raises:
            MechanexError: no model is loaded.
            NotFoundError: the vector is neither a stored id nor a file.
            ValidationError: an argument out of its range, or a vector of another width or with layers that
                the model doesn't have.
        """
        local = self._client.require_local("generation.generate")
        from .engine import generate as engine

        vector = None
        if steering_vector is not None:
            vector = self._client.vectors.resolve(steering_vector, local.model)
        elif steering_strength != 0:
            raise ValidationError(
                f"steering_strength is {steering_strength} and there is no steering_vector: give one (an id, "
                "{layer: tensor}, a SteeringVector or a path), or leave the strength at 0."
            )
        run = engine.stream if stream else engine.generate
        return run(
            local.model,
            local.tokenizer,
            prompt,
            max_tokens=max_tokens,
            sampling_method=sampling_method,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            typical_p=typical_p,
            temperature=temperature,
            seed=seed,
            stop=stop,
            vector=vector,
            strength=steering_strength,
        )


if TYPE_CHECKING:
    from .client import default_client

    generate = default_client().generation.generate
else:

    def __getattr__(name: str) -> Any:
        return default_attribute("generation", name)
