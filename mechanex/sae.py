"""Behaviors of a client: named directions that a sparse autoencoder watches and steering corrects.

The module is also the default client's door: ``mechanex.sae.generate(...)`` calls it there.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

from . import _default
from .base import Client, _BaseModule
from .engine.datasets import read_pairs
from .engine.sae.traces import TracedToken, WatchedText
from .engine.seeds import checked_seed
from .errors import APIError, AuthenticationError, ValidationError
from .home import behaviors_folder
from .remote.answers import check_understood, field, listed, object_of
from .remote.bodies import examples, list_of, plain_whole, rules_of, texts

if TYPE_CHECKING:
    from .engine.models.resolve import LoadedModel
    from .engine.sae.autoencoder import SparseAutoencoder
    from .engine.sae.behavior import Behavior
    from .engine.sae.dashboard import Dashboard
    from .engine.sae.explain import Explained
    from .engine.sae.store import BehaviorStore

__all__ = ["SAEModule"]

_logger = logging.getLogger(__name__)

_SAMPLING = {
    "sampling_method",
    "top_k",
    "top_p",
    "min_p",
    "typical_p",
    "temperature",
    "seed",
    "stop",
}


class SAEModule(_BaseModule):
    """Module for SAE-based steering and behavior management."""

    def __init__(self, client: Client) -> None:
        super().__init__(client)
        self._kept: BehaviorStore | None = None

    def create_behavior(
        self,
        behavior_name: str,
        prompts: Sequence[str],
        positive_answers: Sequence[str],
        negative_answers: Sequence[str],
        description: str = "",
        steering_vector_id: str | None = None,
        *,
        sae: str | os.PathLike[str] | None = None,
        detector: Literal["auto", "features", "probe"] = "auto",
        correction: Literal["auto", "cap", "subtract", "clamp", "features"] = "auto",
        false_alarms: float = 0.01,
        progress: bool = False,
    ) -> dict[str, Any]:
        """Define a new behavior from contrastive answers, on the server or on the local model.

        Here, features of the model's autoencoder and the plain difference of means are compared on examples held out, a
        threshold is calibrated, and the correction is chosen that works best; what is kept survives the process, in
        place of a behavior of this name.

        Args:
            behavior_name: what ``generate`` calls it by.
            prompts: one per example.
            positive_answers: for each prompt, an answer that shows the behavior.
            negative_answers: for each prompt, an answer that shows its opposite.
            description: for people.
            steering_vector_id: vectors that correct the behavior; None for the examples' own direction.
            sae: the autoencoder: a name of ``mechanex sae list``, a folder or a Hub name; None for the model's default,
                and where it has none, or it can't be had, for the difference of means alone. This and what follows run
                locally only.
            detector: ``"features"``, ``"probe"`` (the difference of means), or ``"auto"``, the better one.
            correction: ``"cap"``, ``"subtract"``, ``"clamp"``, ``"features"``, or ``"auto"``.
            false_alarms: wanted rate per answer of 64 tokens.
            progress: show a progress bar.

        Returns:
            The behavior, as the server describes it; here, with the figures that were measured.

        Raises:
            ValidationError: no name, empty lists or lists of unequal length, examples that don't separate, or what the
                server finds wrong. Nothing is kept then.
            NotFoundError: no such autoencoder or vector.
            MechanexError: there is neither a server nor a model, and whatever ``transport.call`` raises.
        """
        if not isinstance(behavior_name, str) or not behavior_name.strip():
            raise ValidationError(f"behavior_name is a text that isn't empty; got {behavior_name!r}.")
        given = examples(prompts, positive_answers, negative_answers)
        body: dict[str, Any] = {"behavior_name": behavior_name, **given, "description": description}
        if steering_vector_id is not None:
            body["steering_vector_id"] = steering_vector_id
        call, transport = "sae.create_behavior", self._client.transport

        def local(loaded: LoadedModel) -> dict[str, Any]:
            from .engine.sae.create import create
            from .engine.sae.store import check_name

            check_name(behavior_name)
            source, autoencoder = self._autoencoder(loaded, sae, detector == "probe")
            vector = None if steering_vector_id is None else self._client.vectors.get(steering_vector_id)
            made = create(
                loaded.model,
                behavior_name,
                given["prompts"],
                given["positive_answers"],
                given["negative_answers"],
                sae=autoencoder,
                source=source,
                description=description,
                vector=vector,
                steering_vector_id=steering_vector_id,
                detector=detector,
                correction=correction,
                false_alarms=false_alarms,
                tokenizer=loaded.tokenizer,
                progress=progress,
            )
            self._store.put(made)
            return made.as_dict()

        only_local = None
        if (sae, detector, correction, false_alarms) != (None, "auto", "auto", 0.01):
            only_local = (
                "an autoencoder, a detector, a correction and a rate of false alarms are chosen locally"
            )
        elif steering_vector_id is not None and self._is_here(steering_vector_id):
            only_local = "the vector is stored on this machine"
        return self._run(
            call,
            lambda: object_of(transport.post("/behaviors/create", body), call),
            local,
            only_local=only_local,
        )

    def create_behavior_from_jsonl(
        self,
        behavior_name: str,
        dataset_path: str | os.PathLike[str],
        description: str = "",
        steering_vector_id: str | None = None,
        *,
        split: str | None = None,
        **options: Any,
    ) -> dict[str, Any]:
        """Helper to create a behavior from a .jsonl file, in the format of ``steering.generate_from_jsonl``.

        Args:
            behavior_name, description, steering_vector_id: as in ``create_behavior``.
            dataset_path: the file.
            split: use only the lines whose ``"split"`` is this.
            options: further keyword arguments of ``create_behavior``.

        Raises:
            NotFoundError: there is no such file.
            ValidationError: a bad line, with its number, and all that ``create_behavior`` raises.
        """
        pairs = read_pairs(dataset_path, split=split)
        return self.create_behavior(
            behavior_name,
            texts(pairs.prompts),
            pairs.positive_answers,
            pairs.negative_answers,
            description,
            steering_vector_id,
            **options,
        )

    def list_behaviors(self) -> list[dict[str, Any]]:
        """Returns behaviors: those of this account on the server, where there is one, and those kept on this machine.

        Raises:
            MechanexError: the mode is ``remote`` and there is no server to ask, and whatever ``transport.call`` raises
                where nothing is kept here.
        """
        call, client = "sae.list_behaviors", self._client
        here = (
            [] if client.execution_mode == "remote" else [self._store.get(n).as_dict() for n in self._names()]
        )
        if client.execution_mode == "local" or (client.execution_mode == "auto" and not client.is_remote):
            return here
        try:
            theirs = self._run(
                call, lambda: listed(client.transport.get("/behaviors"), call, "behaviors"), lambda _: []
            )
        except (AuthenticationError, APIError) as error:
            if not here:
                raise
            _logger.warning(
                "%s lists those of this machine alone: the server did not answer (%s)", call, error
            )
            return here
        return [*theirs, *here]

    def delete_behavior(self, behavior_name: str) -> None:
        """Deletes a behavior: the one that is kept on this machine, else that of this account on a server of one's own.

        Its vectors stay.

        Raises:
            NotFoundError: there is no behavior of this name.
            MechanexError: there is no server to ask, and whatever ``transport.call`` raises.
        """
        client = self._client
        mode, remote = client.execution_mode, client.is_remote
        if mode != "remote" and (behavior_name in self._names() or mode == "local" or not remote):
            self._store.delete(behavior_name)
            return
        self._run(
            "sae.delete_behavior",
            lambda: client.transport.delete("/behaviors/", behavior_name),
            lambda _: self._store.delete(behavior_name),
        )

    def explain(
        self, behavior_name: str, texts: Sequence[str], *, features: int = 5, contexts: int = 5
    ) -> list[Explained]:
        """The features that count most in a behavior kept here, with the contexts in which each says most.

        Args:
            behavior_name: the behavior.
            texts: where to look for contexts.
            features: how many features.
            contexts: how many contexts of each.

        Raises:
            NotFoundError: there is no behavior of this name on this machine.
            MechanexError: no model is loaded.
        """
        from .engine.sae.explain import explain

        behavior = self._store.get(behavior_name)
        loaded = self._client.require_local("sae.explain", "behaviors are explained locally")
        return explain(
            loaded.model,
            behavior,
            list_of("texts", texts, "texts"),
            tokenizer=loaded.tokenizer,
            features=features,
            contexts=contexts,
        )

    def dashboard(
        self,
        feature: int,
        texts: Sequence[str],
        *,
        sae: str | os.PathLike[str] | None = None,
        contexts: int = 10,
    ) -> Dashboard:
        """A feature of an autoencoder at a glance: where it says most, how often, and which tokens it makes likelier.

        Args:
            feature: its number.
            texts: where to look.
            sae: the autoencoder, as for ``create_behavior``; None for the model's default.
            contexts: how many passages.

        Returns:
            What a notebook shows as a picture, and ``save`` writes as one (``.html`` or ``.png``).

        Raises:
            NotFoundError: no such autoencoder.
            ValidationError: no such feature, or an autoencoder of another width or without a place.
            MechanexError: no model is loaded.
        """
        from .engine.sae import registry
        from .engine.sae.feature_stats import dashboard

        loaded = self._client.require_local("sae.dashboard", "features are looked at locally")
        source = registry.find(loaded.name).name if sae is None else os.fspath(sae)
        return dashboard(
            loaded.model,
            registry.load(source),
            feature,
            list_of("texts", texts, "texts"),
            tokenizer=loaded.tokenizer,
            contexts=contexts,
        )

    @overload
    def generate(
        self,
        prompt: str,
        max_new_tokens: int = 50,
        behavior_names: Sequence[str] | None = None,
        force_steering: Sequence[str] | None = None,
        *,
        action: Literal["correct", "abort", "report"] = "correct",
        return_trace: Literal[False] = False,
        **sampling: Any,
    ) -> str: ...

    @overload
    def generate(
        self,
        prompt: str,
        max_new_tokens: int = 50,
        behavior_names: Sequence[str] | None = None,
        force_steering: Sequence[str] | None = None,
        *,
        action: Literal["correct", "abort", "report"] = "correct",
        return_trace: Literal[True],
        **sampling: Any,
    ) -> WatchedText: ...

    def generate(
        self,
        prompt: str,
        max_new_tokens: int = 50,
        behavior_names: Sequence[str] | None = None,
        force_steering: Sequence[str] | None = None,
        *,
        action: Literal["correct", "abort", "report"] = "correct",
        return_trace: bool = False,
        **sampling: Any,
    ) -> str | WatchedText:
        """Generation with SAE monitoring: every token is scored, and behaviors that show up are corrected.

        Args:
            prompt: the text to continue.
            max_new_tokens: most tokens to add.
            behavior_names: behaviors to watch; None for all that are kept for this model, on the server those of the
                account.
            force_steering: behaviors to correct from the start, seen or not.
            action: what is done where a behavior is detected: ``"correct"`` it from that token on, ``"abort"`` the
                answer, or only ``"report"`` it.
            return_trace: give the text with the scores, detections and corrections of every token.
            sampling: as in ``generation.generate``: ``sampling_method``, ``top_k``, ``top_p``, ``min_p``,
                ``typical_p``, ``temperature``, ``seed``, ``stop``, and what answers are held to.

        Returns:
            The text: the prompt and its continuation. With ``return_trace``, a ``WatchedText``.

        Raises:
            NotFoundError: no such behavior.
            ValidationError: a behavior of another model, or an argument out of its range.
            MechanexError: there is neither a server nor a model, and whatever ``transport.call`` raises.
        """
        if not isinstance(prompt, str):
            raise ValidationError(f"prompt is a text; got {type(prompt).__name__}.")
        body: dict[str, Any] = {"prompt": prompt, "max_new_tokens": max_new_tokens}
        for name, given in (("behavior_names", behavior_names), ("force_steering", force_steering)):
            body[name] = None if given is None else list_of(name, given, "names")
        from .engine.answering import RULES

        known = _SAMPLING | set(RULES)
        unknown = sorted(set(sampling) - known)
        if unknown:
            raise ValidationError(f"sampling settings are {', '.join(sorted(known))}; got {unknown}.")
        held = rules_of("sae.generate", {name: sampling[name] for name in RULES if name in sampling})
        call, transport = "sae.generate", self._client.transport

        def local(loaded: LoadedModel) -> str | WatchedText:
            from .engine.sae.generate import generate_watched

            (found,) = generate_watched(
                loaded.model,
                loaded.tokenizer,
                [prompt],
                self._chosen(loaded, body["behavior_names"]),
                action=action,
                forced=[self._store.get(name) for name in body["force_steering"] or ()],
                max_tokens=max_new_tokens,
                **sampling,
            )
            return found if return_trace else found.text

        # Sent only when they say something, so that servers which know the contract alone understand the rest.
        told = {"action": action if action != "correct" else None, "return_trace": return_trace or None}
        if "seed" in sampling:
            sampling["seed"] = checked_seed(sampling["seed"])
        told |= {name: plain_whole(value) for name, value in sampling.items() if name not in RULES}
        sent = body | {name: value for name, value in told.items() if value is not None} | held.told

        def remote() -> str | WatchedText:
            answer = transport.post("/sae/generate", sent)
            check_understood(answer, call, sorted(held.told))
            if return_trace:
                return _watched(answer, call, prompt)
            if action != "correct":  # a server that doesn't know of actions has not done this one
                field(answer, call, str, "finish_reason")
            return field(answer, call, str, "text")

        only_local = None
        named = [*(body["behavior_names"] or ()), *(body["force_steering"] or ())]
        if self._client.local_model is not None and any(name in self._names() for name in named):
            only_local = "the behavior is kept on this machine"
        return self._run(call, remote, local, only_local=only_local)

    @property
    def _store(self) -> BehaviorStore:
        if self._kept is None:
            from .engine.sae.store import BehaviorStore

            self._kept = BehaviorStore()
        return self._kept

    def _names(self) -> list[str]:
        """Names of the behaviors kept here, found without importing torch."""
        return sorted(path.stem for path in behaviors_folder().glob("*.safetensors"))

    def _is_here(self, vector_id: str) -> bool:
        client = self._client
        return (
            client.execution_mode != "remote"
            and client.local_model is not None
            and client.has_vector(vector_id)
        )

    def _chosen(self, loaded: LoadedModel, names: Sequence[str] | None) -> list[Behavior]:
        if names is not None:
            return [self._store.get(name) for name in dict.fromkeys(names)]
        kept = [self._store.get(name) for name in self._names()]
        return [behavior for behavior in kept if behavior.model == loaded.name]

    def _autoencoder(
        self, loaded: LoadedModel, asked: str | os.PathLike[str] | None, unwanted: bool
    ) -> tuple[str | None, SparseAutoencoder | None]:
        """The autoencoder that was asked for, or the model's default where it can be had, and where it comes from."""
        from .engine.sae import registry

        if asked is not None:
            return os.fspath(asked), registry.load(os.fspath(asked))
        if unwanted:
            return None, None
        return registry.for_model(loaded.name) or (None, None)


def _watched(answer: Any, call: str, prompt: str) -> WatchedText:
    """A server's answer with its trace."""
    tokens = []
    for one in field(answer, call, list, "trace"):
        scores = field(one, call, dict, "scores")
        detected, corrected = (tuple(field(one, call, list, name)) for name in ("detected", "corrected"))
        tokens.append(
            TracedToken(
                field(one, call, int, "token"), field(one, call, str, "text"), scores, detected, corrected
            )
        )
    return WatchedText(
        field(answer, call, str, "text"),
        field(answer, call, str, "finish_reason"),
        tuple(field(answer, call, list, "detected")),
        tuple(tokens),
        prompt,
    )


if TYPE_CHECKING:
    _door: SAEModule = _default.client().sae
    create_behavior = _door.create_behavior
    create_behavior_from_jsonl = _door.create_behavior_from_jsonl
    dashboard = _door.dashboard
    delete_behavior = _door.delete_behavior
    explain = _door.explain
    generate = _door.generate
    list_behaviors = _door.list_behaviors
else:

    def __getattr__(name: str) -> Any:
        return _default.attribute("sae", name)

    def __dir__() -> list[str]:
        return _default.names("sae")
