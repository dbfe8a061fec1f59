"""What handlers ask of the model: text for a request, or any other work, without ever touching it themselves."""

from __future__ import annotations

import copy
import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from anyio.to_thread import run_sync

from ..engine.generate import end_tokens
from ..engine.intervention import Edit
from ..engine.models import adapter_for
from ..engine.models.adapter import ModelAdapter
from ..engine.positions import TokenSelector
from ..engine.text import Prompt
from ..engine.vector_store import VectorStore
from ..engine.vectors import SteeringVector
from ..errors import APIError, NotFoundError, ValidationError
from .encoder import Encoder
from .metrics import Metrics
from .request import Generation, Request, Steer
from .scheduler import Scheduler
from .settings import Settings
from .shared import SharedVectors, make_behaviors
from .token_texts import TokenTexts

if TYPE_CHECKING:
    from ..engine.models.resolve import LoadedModel
    from .auth import Accounts, Principal

T = TypeVar("T")

__all__ = ["ServingEngine"]

_KEPT_EDITS = 1024


class ServingEngine:
    """The loaded model, the vectors, and the scheduler. Everything below is for the event loop's thread.

    Attributes:
        adapter: the model's adapter. Only ``run``'s functions may call the model.
        tokenizer: the model's tokenizer, for ``run``'s functions; ``encode`` is the way to token ids elsewhere.
        model_name: the name that clients see.
        vectors: the operator's :class:`~mechanex.engine.vector_store.VectorStore`.
        corrected_behaviors: the vectors, by name, of the behaviors that every answer is steered by.
        scheduler: who runs when.
        token_texts: single tokens as text, for log-probabilities.
        metrics: what is counted.

    Args:
        settings: the limits, the folder of vectors, the behaviors.
        loaded: the model, with a tokenizer.
        store: accounts' vectors and behaviors, or None.
        vectors: the operator's vectors; by default those under ``MECHANEX_HOME``.

    Raises:
        ValidationError: no tokenizer, a vector of another model, or a corrected behavior that nobody made.
        NotFoundError: a folder or file that isn't there.
    """

    adapter: ModelAdapter
    model_name: str

    def __init__(
        self,
        settings: Settings,
        loaded: LoadedModel,
        store: Accounts | None = None,
        vectors: VectorStore | None = None,
    ) -> None:
        self.adapter = adapter_for(loaded.model)
        self.tokenizer: Any = loaded.tokenizer if loaded.tokenizer is not None else self.adapter.tokenizer
        if self.tokenizer is None:
            raise ValidationError(
                "a server needs the model's tokenizer: set_local_model(model, tokenizer), or load by name."
            )
        if not hasattr(self.adapter.hf_model, "generate"):
            raise ValidationError(f"{self.adapter.model_id} can't generate: load it by name.")
        self.model_name = settings.model_name or loaded.name
        self.vectors = vectors if vectors is not None else VectorStore()
        self.metrics = Metrics()
        self._store = store
        self._shared = SharedVectors(settings.vectors)
        for name, vector in self._shared:
            self._check_fits(name, vector)
        self._behaviors = make_behaviors(self.adapter, settings.behaviors)
        self.corrected_behaviors: dict[str, SteeringVector] = {}
        for name in settings.corrected_behaviors:
            # The server's own come first: the shared account is every client's on an open server.
            own = self._behaviors.get(name)
            corrected = self._behavior_vector(None, name) if own is None else own.vector
            if corrected is None:
                raise ValidationError(
                    f"the corrected behavior {name!r} is not known: start the server with --behaviors naming its "
                    "examples, or make it with POST /behaviors/create and the server's key."
                )
            self._check_fits(name, corrected)
            self.corrected_behaviors[name] = corrected
        self.token_texts = TokenTexts(copy.deepcopy(self.tokenizer))
        ends = end_tokens(self.adapter.hf_model, self.tokenizer)
        self.scheduler = Scheduler(self.adapter, copy.deepcopy(self.tokenizer), ends, settings, self.metrics)
        self._encoder = Encoder(self.tokenizer, self.scheduler.context, self.model_name)
        self._digests: OrderedDict[int, tuple[SteeringVector, bytes]] = OrderedDict()
        self._edits: OrderedDict[tuple[bytes, float], tuple[tuple[int, Edit], ...]] = OrderedDict()
        self.metrics.watch(
            "waiting_requests", "Requests that wait for a place.", lambda: self.scheduler.n_waiting
        )
        self.metrics.watch("running_requests", "Requests in the model.", lambda: self.scheduler.n_running)

    @property
    def own_behaviors(self) -> frozenset[str]:
        """Names of the behaviors that the server was started with, which no client may take."""
        return frozenset({*self._behaviors, *self.corrected_behaviors})

    @property
    def context(self) -> int | None:
        """Tokens that a prompt and its answer may have together; None where the model names no limit."""
        return self.scheduler.context

    async def submit(self, request: Request) -> Generation:
        """Queues a request and gives its :class:`Generation`.

        ``text = (await generation.result()).text`` for the whole, ``async for step in generation`` for the pieces;
        ``generation.cancel()`` frees its place at once (harmless after the end).

        Raises:
            RateLimitError: the queue is full (429, with ``retry_after``).
            ValidationError: an empty prompt, or one that fills the model's context (``context_length_exceeded``).
            APIError: the server is shutting down (503).
        """
        if not request.ids:
            raise ValidationError(
                "the prompt is empty and the tokenizer adds no BOS: give at least one token."
            )
        self.adapter.check_token_ids(request.ids)
        return self.scheduler.submit(request)

    async def run(
        self,
        fn: Callable[[ModelAdapter], T],
        *,
        timeout: float | None = None,
        gone: threading.Event | None = None,
    ) -> T:
        """Runs ``fn(adapter)`` in the model's thread, alone on the model, between two decoding steps.

        For CAA, scores and the like. Decoding waits meanwhile. Errors of ``fn`` are raised here.

        Args:
            fn: the work.
            timeout: seconds; None for the server's setting.
            gone: is set when nobody waits for the result any more, for work that can stop halfway.

        Raises:
            RateLimitError: too much waits already.
            APIError: the server is shutting down (503), or no result in time (504).
        """
        return await self.scheduler.run(fn, timeout, gone)

    async def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt (text, ids, chat messages), in a thread; ValidationError as ``encode_prompt``."""
        return await run_sync(self._encoder.encode, prompt)

    async def encode_chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Token ids of chat messages: by the model's template, or as lines of roles where it has none.

        Raises:
            ValidationError: messages that the template refuses.
        """
        return await run_sync(self._encoder.encode_chat, messages)

    async def check_examples(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> None:
        """Refuses what ``encode`` and the model would, before the model's thread has to do with it.

        Raises:
            ValidationError: a prompt or an answer that is too long, unknown token ids, a chat that can't be rendered.
        """

        def check() -> None:
            for prompt in prompts:
                self.adapter.check_token_ids(self._encoder.encode(prompt))
            for answer in answers:
                self._encoder.check_size(answer)

        await run_sync(check)

    async def prompt_text(self, prompt: Prompt) -> str:
        """A prompt that ``encode`` took, as text."""
        return await run_sync(self._encoder.text, prompt)

    async def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens left out."""
        return await run_sync(self._encoder.decode, ids)

    async def steering(
        self,
        who: Principal,
        vector_id: str | None,
        strength: float = 1.0,
        *,
        layers: Sequence[int] | None = None,
        tokens: TokenSelector = None,
    ) -> tuple[Steer, ...]:
        """The edits of a stored vector that this sender may use, for ``Request.steering``; () for None.

        Looks among the server's own (``--vectors``), then the account's (``app.state.store``), then, for the operator,
        those of ``engine.vectors``.

        Args:
            who: the sender.
            vector_id: the vector's id.
            strength: multiplies it; 0 steers nothing.
            layers: only these of its layers.
            tokens: absolute positions to steer; None for all.

        Raises:
            NotFoundError: there is none for this sender.
            ValidationError: a strength that isn't finite, a layer that the vector hasn't, or another model's vector.
        """
        if vector_id is None:
            return ()
        vector = await self.vector(who, vector_id)
        if layers is not None:
            vector = vector.restricted([self.adapter.layer_index(layer) for layer in layers])
        return self.edits(vector, strength, tokens)

    async def behavior_steering(self, who: Principal, name: str, strength: float = 1.0) -> tuple[Steer, ...]:
        """The edits of a behavior's vector; as ``steering``.

        Raises:
            NotFoundError: this sender has no such behavior, and the server neither.
        """
        vector = await run_sync(self._behavior_vector, who.account_id, name)
        if vector is None:
            raise NotFoundError(
                f"no behavior is called {name!r} here: make one with POST /behaviors/create, or use one that the "
                "server was started with."
            )
        return self.edits(vector, strength)

    async def vector(self, who: Principal, vector_id: str) -> SteeringVector:
        """The stored vector that ``steering`` would use; errors as there."""
        found = self._shared.loaded(vector_id)
        if found is None:
            found = await run_sync(self._find, who, vector_id)
        if found is None:
            raise NotFoundError(f"no steering vector has the id {vector_id!r} here.")
        return found

    def edits(
        self, vector: SteeringVector, strength: float, tokens: TokenSelector = None
    ) -> tuple[Steer, ...]:
        """A vector's edits. The same vector at the same strength gives the same edits, so that rows share them."""
        key = (self._digest(vector), float(strength))
        known = self._edits.get(key)
        if known is None:
            plan = vector.plan(self.adapter, strength)
            known = tuple((i.layer, i.edit) for i in plan.interventions)
            self._edits[key] = known
            if len(self._edits) > _KEPT_EDITS:
                self._edits.popitem(last=False)
        self._edits.move_to_end(key)
        if strength == 0:
            return ()
        return tuple(Steer(layer, edit, tokens) for layer, edit in known)

    def _digest(self, vector: SteeringVector) -> bytes:
        """A hash of the vector's content; vectors are immutable, so one seen lately isn't read again."""
        known = self._digests.get(id(vector))
        if known is not None and known[0] is vector:
            return known[1]
        digest = hashlib.blake2b(digest_size=16)
        for layer, direction in vector.items():
            digest.update(f"{layer}:{direction.dtype}:{direction.numel()};".encode())
            digest.update(direction.cpu().numpy().tobytes())
        self._digests[id(vector)] = (vector, digest.digest())
        if len(self._digests) > _KEPT_EDITS:
            self._digests.popitem(last=False)
        return digest.digest()

    def _find(self, who: Principal, vector_id: str) -> SteeringVector | None:
        found = self._store.vector(who.account_id, vector_id) if self._store is not None else None
        if found is None:
            found = self._shared.get(vector_id)
        if found is None and who.account_id is None:
            try:
                found = self.vectors.get(vector_id)
            except NotFoundError:
                return None
            except OSError as error:
                raise APIError(
                    f"The server can't read its vector {vector_id!r}: {error.strerror}", 500
                ) from error
        return found

    def _behavior_vector(self, account_id: str | None, name: str) -> SteeringVector | None:
        if self._store is not None:
            vector_id = self._store.behavior_vector_id(account_id, name)
            if vector_id is not None:
                return self._store.vector(account_id, vector_id)
        shared = self._behaviors.get(name)
        return None if shared is None else shared.vector

    def _check_fits(self, name: str, vector: SteeringVector) -> None:
        try:
            vector.plan(self.adapter)
        except ValidationError as error:
            raise ValidationError(f"the vector {name} doesn't fit {self.model_name}: {error}") from error
