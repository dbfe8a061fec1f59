"""What handlers ask of the model: text for a request, or any other work, without ever touching it themselves."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from anyio.to_thread import run_sync

from ..engine.chat import Chat
from ..engine.models import adapter_for
from ..engine.models.adapter import ModelAdapter
from ..engine.sampling import end_tokens
from ..engine.text import Prompt
from ..engine.vector_store import VectorStore
from ..errors import ValidationError
from .encoder import Encoder
from .metrics import Metrics
from .request import Generation, Request
from .scheduler import Scheduler
from .settings import Settings
from .steerings import Steerings
from .token_texts import TokenTexts

if TYPE_CHECKING:
    from ..engine.models.resolve import LoadedModel
    from .auth import Accounts

T = TypeVar("T")

__all__ = ["ServingEngine"]


class ServingEngine:
    """The loaded model, the vectors, and the scheduler. Everything below is for the event loop's thread.

    Attributes:
        adapter: the model's adapter. Only ``run``'s functions may call the model.
        tokenizer: the model's tokenizer, for ``run``'s functions; ``encode`` is the way to token ids elsewhere.
        model_name: the name that clients see.
        steerings: whose vectors and behaviors there are, as edits for ``Request.steering``.
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
        if self.adapter.head is None:
            raise ValidationError(f"{self.adapter.model_id} can't generate: load it by name.")
        self.model_name = settings.model_name or _shown(loaded.name)
        self.metrics = Metrics()
        self.steerings = Steerings(self.adapter, settings, store, vectors or VectorStore())
        self.token_texts = TokenTexts(copy.deepcopy(self.tokenizer))
        ends = end_tokens(self.adapter.hf_model, self.tokenizer)
        self.scheduler = Scheduler(self.adapter, copy.deepcopy(self.tokenizer), ends, settings, self.metrics)
        self._encoder = Encoder(self.tokenizer, self.scheduler.context, self.model_name)
        self.metrics.watch(
            "waiting_requests", "Requests that wait for a place.", lambda: self.scheduler.n_waiting
        )
        self.metrics.watch("running_requests", "Requests in the model.", lambda: self.scheduler.n_running)

    @property
    def context(self) -> int | None:
        """Tokens that a prompt and its answer may have together; None where the model names no limit."""
        return self.scheduler.context

    async def submit(self, requests: Sequence[Request]) -> list[Generation]:
        """Queues requests, all or none, and gives the :class:`Generation` of each.

        ``text = (await generation.result()).text`` for the whole, ``async for step in generation`` for the pieces;
        ``generation.cancel()`` frees its place at once (harmless after the end).

        Raises:
            RateLimitError: the queue is full (429, with ``retry_after``).
            ValidationError: an empty prompt, or one that fills the model's context (``context_length_exceeded``).
            APIError: the server is shutting down (503).
        """
        for request in requests:
            if not request.ids:
                raise ValidationError(
                    "the prompt is empty and the tokenizer adds no BOS: give at least one token."
                )
            self.adapter.check_token_ids(request.ids)
        return self.scheduler.submit_all(requests)

    async def run(
        self,
        fn: Callable[[ModelAdapter], T],
        *,
        timeout: float | None = None,
    ) -> T:
        """Runs ``fn(adapter)`` in the model's thread, alone on the model, between two decoding steps.

        For CAA and the like. Decoding waits meanwhile, but for the pauses of ``fn`` (see
        :mod:`mechanex.engine.pauses`), which take turns with it and end ``fn`` where nobody waits for it any more.
        Errors of ``fn`` are raised here.

        Args:
            fn: the work.
            timeout: seconds; None for the server's setting.

        Raises:
            RateLimitError: too much waits already.
            APIError: the server is shutting down (503), or no result in time (504).
        """
        return await self.scheduler.run(fn, timeout)

    async def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt (text, ids, chat messages), of all but short ones in a thread.

        Raises:
            ValidationError: as ``encode_prompt``, and ids that the model doesn't have.
        """
        ids = self._encoder.encode_soon(prompt)
        if ids is None:
            ids = await run_sync(self._encoder.encode, prompt)
        self.adapter.check_token_ids(ids)
        return ids

    async def encode_chat(self, chat: Chat) -> list[int]:
        """Token ids of a chat: by the model's template, or as lines of roles where it has none.

        Raises:
            ValidationError: messages that the template refuses.
        """
        return await run_sync(self._encoder.encode_chat, chat)

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


def _shown(name: str) -> str:
    """A model's name for clients, to whom the server's folders are nothing."""
    path = Path(name)
    return path.resolve().name if path.is_dir() else name
