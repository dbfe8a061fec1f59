"""Behaviors of a client: named directions that a sparse autoencoder watches and steering corrects.

The module is also the default client's door: ``mechanex.sae.generate(...)`` calls it there.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .base import _BaseModule, default_attribute
from .engine.datasets import read_pairs
from .errors import ValidationError
from .remote.answers import field, listed, object_of
from .remote.bodies import examples, list_of, texts

__all__ = ["SAEModule"]


class SAEModule(_BaseModule):
    """Module for SAE-based steering and behavior management, on a server: its local engine is not there yet."""

    def create_behavior(
        self,
        behavior_name: str,
        prompts: Sequence[str],
        positive_answers: Sequence[str],
        negative_answers: Sequence[str],
        description: str = "",
        steering_vector_id: str | None = None,
    ) -> dict[str, Any]:
        """Define a new behavior from contrastive answers.

        Args:
            behavior_name: what ``generate`` calls it by.
            prompts: one per example.
            positive_answers: for each prompt, an answer that shows the behavior.
            negative_answers: for each prompt, an answer that shows its opposite.
            description: for people.
            steering_vector_id: vectors that correct the behavior; None lets the server compute them.

        Returns:
            The behavior, as the server describes it.

        Raises:
            ValidationError: no name, empty lists or lists of unequal length, or what the server finds wrong.
            MechanexError: there is no server to ask, and whatever ``transport.call`` raises.
        """
        if not isinstance(behavior_name, str) or not behavior_name.strip():
            raise ValidationError(f"behavior_name is a text that isn't empty; got {behavior_name!r}.")
        body: dict[str, Any] = {
            "behavior_name": behavior_name,
            **examples(prompts, positive_answers, negative_answers),
            "description": description,
        }
        if steering_vector_id is not None:
            body["steering_vector_id"] = steering_vector_id
        call, transport = "sae.create_behavior", self._client.transport
        return self._run(call, lambda: object_of(transport.post("/behaviors/create", body), call), None)

    def create_behavior_from_jsonl(
        self,
        behavior_name: str,
        dataset_path: str | os.PathLike[str],
        description: str = "",
        steering_vector_id: str | None = None,
    ) -> dict[str, Any]:
        """Helper to create a behavior from a .jsonl file, in the format of ``steering.generate_from_jsonl``.

        Raises:
            NotFoundError: there is no such file.
            ValidationError: a bad line, with its number, and all that ``create_behavior`` raises.
        """
        pairs = read_pairs(dataset_path)
        return self.create_behavior(
            behavior_name,
            texts(pairs.prompts),
            pairs.positive_answers,
            pairs.negative_answers,
            description,
            steering_vector_id,
        )

    def list_behaviors(self) -> list[dict[str, Any]]:
        """Returns the behaviors of this account.

        Raises:
            MechanexError: there is no server to ask, and whatever ``transport.call`` raises.
        """
        call, transport = "sae.list_behaviors", self._client.transport
        return self._run(call, lambda: listed(transport.get("/behaviors"), call, "behaviors"), None)

    def delete_behavior(self, behavior_name: str) -> None:
        """Deletes a behavior of this account on a server of one's own; its vectors stay.

        Raises:
            NotFoundError: the account has no behavior of this name.
            MechanexError: there is no server to ask, and whatever ``transport.call`` raises.
        """
        transport = self._client.transport
        self._run("sae.delete_behavior", lambda: transport.delete("/behaviors/", behavior_name), None)

    def generate(
        self,
        prompt: str,
        max_new_tokens: int = 50,
        behavior_names: Sequence[str] | None = None,
        force_steering: Sequence[str] | None = None,
    ) -> str:
        """Generation with SAE monitoring: behaviors that show up are corrected.

        Args:
            prompt: the text to continue.
            max_new_tokens: most tokens to add.
            behavior_names: behaviors to watch; None for the server's choice.
            force_steering: behaviors to correct from the start, seen or not.

        Returns:
            The text.

        Raises:
            NotFoundError: no such behavior.
            MechanexError: there is no server to ask, and whatever ``transport.call`` raises.
        """
        if not isinstance(prompt, str):
            raise ValidationError(f"prompt is a text; got {type(prompt).__name__}.")
        body: dict[str, Any] = {"prompt": prompt, "max_new_tokens": max_new_tokens}
        for name, given in (("behavior_names", behavior_names), ("force_steering", force_steering)):
            body[name] = None if given is None else list_of(name, given, "names")
        call, transport = "sae.generate", self._client.transport
        return self._run(call, lambda: field(transport.post("/sae/generate", body), call, str, "text"), None)


if TYPE_CHECKING:
    from .client import default_client

    _default = default_client().sae
    create_behavior = _default.create_behavior
    create_behavior_from_jsonl = _default.create_behavior_from_jsonl
    delete_behavior = _default.delete_behavior
    generate = _default.generate
    list_behaviors = _default.list_behaviors
else:

    def __getattr__(name: str) -> Any:
        return default_attribute("sae", name)
