"""What handlers ask of the model: text for a request, or any other work, without ever touching it themselves."""

from __future__ import annotations

import asyncio
import copy
import logging
import threading
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from anyio.to_thread import run_sync
from fastapi import Depends, Request

from ...engine.decode.grammar import Grammars, grammars_for
from ...engine.models import adapter_for
from ...engine.models.adapter import ModelAdapter
from ...engine.sae.autoencoder import SparseAutoencoder
from ...engine.sae.registry import for_model
from ...engine.sampling import end_tokens
from ...engine.text import Prompt
from ...engine.token_texts import TokenTexts
from ...engine.vector_store import VectorStore
from ...errors import MechanexError, ValidationError
from ..library.shared import make_behaviors
from ..library.steerings import Steerings
from ..metrics import Metrics
from ..settings import ServerSettings
from .scheduler import Scheduler
from .texts import PromptEncoder

if TYPE_CHECKING:
    from ...engine.models.resolve import LoadedModel
    from ..library.records import Library
    from .wire import Lead

__all__ = ["Engine", "ServingEngine"]

_logger = logging.getLogger(__name__)


class ServingEngine:
    """The loaded model, the vectors, and the scheduler. Everything below is for the event loop's thread.

    Attributes:
        adapter: the model's adapter. Only functions that ``scheduler.run`` was given may call the model.
        tokenizer: the model's tokenizer, for such functions; ``encode`` is the way to token ids elsewhere.
        settings: the limits.
        model_name: the name that clients see.
        steerings: whose vectors and behaviors there are, as edits for ``TextRequest.steering``.
        scheduler: takes requests for text and other work on the model.
        encoder: between texts and tokens; its methods block.
        token_texts: single tokens as text, for log-probabilities.
        metrics: what is counted.
        is_split: whether the model lies in several processes, all of which do what ``scheduler.run`` is given.
        ends: ids of the tokens that end an answer.

    Args:
        settings: the limits, the folder of vectors, the behaviors.
        loaded: the model, with a tokenizer.
        library: accounts' vectors and behaviors, or None.
        vectors: the operator's vectors; by default those under ``MECHANEX_HOME``.
        lead: where other processes hear what is done, where the model is split over several; else None.

    Raises:
        ValidationError: no tokenizer, a vector of another model, or a corrected behavior that nobody made.
        NotFoundError: a folder or file that isn't there.
    """

    adapter: ModelAdapter
    model_name: str

    def __init__(
        self,
        settings: ServerSettings,
        loaded: LoadedModel,
        library: Library | None = None,
        vectors: VectorStore | None = None,
        lead: Lead | None = None,
    ) -> None:
        self.settings, self.is_split = settings, lead is not None
        self.adapter = adapter_for(loaded.model)
        self.tokenizer: Any = loaded.tokenizer if loaded.tokenizer is not None else self.adapter.tokenizer
        if self.tokenizer is None:
            raise ValidationError(
                "a server needs the model's tokenizer: set_local_model(model, tokenizer), or load by name."
            )
        if self.adapter.head is None:
            raise ValidationError(f"{self.adapter.model_id} can't generate: load it by name.")
        self.model_name = settings.model_name or _shown(loaded.name)
        self._loaded_name = loaded.name
        names = {str(loaded.name), self.adapter.model_id}
        # A name without a folder around it is no secret, and may be a part of any text ("." of all).
        self._folders = [one for one in names if Path(one).is_dir() and len(Path(one).parts) > 1]
        self._autoencoder: list[tuple[str, SparseAutoencoder] | None] = []
        self._autoencoder_lock = asyncio.Lock()
        self.metrics = Metrics()
        make = partial(make_behaviors, sources=settings.behaviors)
        self.steerings = Steerings(
            self.adapter,
            settings,
            library,
            vectors or VectorStore(),
            partial(make if lead is None else partial(lead.work, make), self.adapter),
        )
        self.token_texts = TokenTexts(copy.deepcopy(self.tokenizer))
        self.ends = ends = end_tokens(self.adapter.hf_model, self.tokenizer)
        self._grammars: Grammars | None = None
        self._grammars_lock = threading.Lock()
        self.scheduler = Scheduler(
            self.adapter, copy.deepcopy(self.tokenizer), ends, settings, self.metrics, lead
        )
        self.encoder = PromptEncoder(self.tokenizer, self.scheduler.context, self.model_name)
        self.metrics.watch(
            "waiting_requests", "Requests that wait for a place.", lambda: self.scheduler.n_waiting
        )
        self.metrics.watch("running_requests", "Requests in the model.", lambda: self.scheduler.n_running)
        self.metrics.watch(
            "prefix_bytes",
            "Memory of keys and values that are kept of answered requests.",
            lambda: self.scheduler.prefix_bytes,
        )

    def grammars(self) -> Grammars:
        """What compiles grammars for this model; blocks, and may be called from any thread.

        Raises:
            ValidationError: answers can't be held to grammars here.
        """
        with self._grammars_lock:
            if self._grammars is None:
                self._grammars = grammars_for(self.adapter, copy.deepcopy(self.tokenizer), self.ends)
            return self._grammars

    def public(self, text: str) -> str:
        """A text for clients, to whom the server's folders are nothing: the model by the name that they see."""
        for folder in self._folders:
            text = text.replace(folder, self.model_name)
        return text

    @property
    def context(self) -> int | None:
        """Tokens that a prompt and its answer may have together; None where the model names no limit."""
        return self.scheduler.context

    async def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt (text, ids, chat messages), of all but short ones in a thread.

        Raises:
            ValidationError: as ``encode_prompt``, and ids that the model doesn't have.
        """
        ids = self.encoder.encode_soon(prompt)
        if ids is None:
            ids = await run_sync(self.encoder.encode, prompt)
        self.adapter.check_token_ids(ids)
        return ids

    async def text(self, prompt: Prompt) -> str:
        """A prompt that ``encode`` took, as text."""
        return await run_sync(self.encoder.text, prompt)

    async def autoencoder(self) -> tuple[str, SparseAutoencoder] | None:
        """The model's default autoencoder and its name, read once; None where there is none.

        Raises:
            MechanexError: it can't be read.
        """
        async with self._autoencoder_lock:
            if not self._autoencoder:
                try:
                    found = await run_sync(for_model, self._loaded_name)
                except MechanexError as error:
                    _logger.error("the autoencoder of %s can't be read: %s", self._loaded_name, error)
                    raise MechanexError("The server can't read its model's autoencoder.", 500) from error
                self._autoencoder.append(found)
            return self._autoencoder[0]

    async def check_examples(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> int:
        """Refuses examples that ``encode`` and the model would, before the model's thread has to do with them.

        Args:
            prompts: those of the examples.
            answers: all first ones, then all second ones, of the prompts in order.

        Returns:
            How many tokens prompts and answers have.

        Raises:
            ValidationError: an example that the context can't hold, unknown token ids, a chat that can't be rendered.
        """

        def check() -> int:
            lengths: list[int] = []
            for prompt in prompts:
                ids = self.encoder.encode(prompt)
                self.adapter.check_token_ids(ids)
                lengths.append(len(ids))
            n_tokens = sum(lengths)
            for i, answer in enumerate(answers if lengths else ()):
                n_answer = len(self.encoder.encode(answer))
                self.encoder.check_fits(lengths[i % len(lengths)] + n_answer)
                n_tokens += n_answer
            return n_tokens

        return await run_sync(check)


async def _engine(request: Request) -> ServingEngine:
    engine: ServingEngine = request.app.state.engine
    return engine


Engine = Annotated[ServingEngine, Depends(_engine)]
"""The engine of the application that a request came to."""


def _shown(name: str) -> str:
    """A model's name for clients, to whom the server's folders are nothing."""
    path = Path(name)
    return path.resolve().name if path.is_dir() else name
