"""Generation of whole texts and streams: prompts encoded, continued by the decoder, and given back as text."""

from __future__ import annotations

import contextvars
import logging
import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import ValidationError
from .chat import continued
from .decode.request import Request, Steer, Step
from .decode.row import Row
from .decode.run import decode
from .models import adapter_for
from .models.adapter import ModelAdapter
from .sampling import Sampling
from .text import Prompt, encode_prompt, prompt_text
from .whole import as_whole

if TYPE_CHECKING:
    from .vectors import SteeringVector

__all__ = ["Generating", "Options", "end_tokens", "generate", "generate_batch", "stream"]

_logger = logging.getLogger(__name__)


def generate(model: nn.Module | ModelAdapter, tokenizer: Any, prompt: Prompt, **options: Any) -> str:
    """Continues one prompt.

    Args:
        model: a Hugging Face or TransformerLens model; its mode, flags and generation_config are kept.
        tokenizer: its tokenizer; None where the model carries it.
        prompt: text, token ids or chat messages.
        options: keyword arguments of ``Options``.

    Returns:
        The prompt followed by its continuation.

    Raises:
        ValidationError: an argument out of its range, an empty prompt, or one that fills the model's context.
    """
    return Generating(model, tokenizer, [prompt], Options(**options)).texts()[0]


def generate_batch(
    model: nn.Module | ModelAdapter, tokenizer: Any, prompts: Sequence[Prompt], **options: Any
) -> list[str]:
    """Continues several prompts together; row i draws as ``generate`` with ``seed + i`` does.

    Arguments, results and errors as in ``generate``, for every prompt.
    """
    if isinstance(prompts, str) or not prompts:
        raise ValidationError(f"generate_batch takes a list with at least one prompt; got {prompts!r}.")
    return Generating(model, tokenizer, prompts, Options(**options)).texts()


def stream(model: nn.Module | ModelAdapter, tokenizer: Any, prompt: Prompt, **options: Any) -> Iterator[str]:
    """Continues one prompt and gives the text as it comes; the first piece is the prompt.

    The pieces joined are what ``generate`` returns for the same arguments, which are checked at once. The
    model runs in a thread of its own and stops early when the iterator is closed.
    """
    return Generating(model, tokenizer, [prompt], Options(**options)).stream()


@dataclass(frozen=True)
class Options(Sampling):
    """How to continue a prompt: the sampling settings, and what follows.

    Args:
        max_tokens: most tokens to add; fewer, with a logged line, where the model's context ends before.
        seed: of the draws; None takes one from torch's global generator, which ``torch.manual_seed`` sets.
        stop: a text or texts that end the continuation; the first that comes is cut off.
        vector: steers the model during this call.
        strength: multiplies the vector; 0 steers nothing and logs a warning.
        continue_final_message: go on with a chat's last message instead of answering it.

    Raises:
        ValidationError: an argument out of its range.
    """

    max_tokens: int = 128
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    vector: SteeringVector | None = None
    strength: float = 1.0
    continue_final_message: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        most = as_whole(self.max_tokens)
        if most is None or most < 1:
            raise ValidationError(f"max_tokens is a number of tokens, at least 1; got {self.max_tokens!r}.")
        object.__setattr__(self, "max_tokens", most)
        if self.seed is not None:
            seed = as_whole(self.seed)
            if seed is None or not 0 <= seed < 2**63:
                raise ValidationError(f"seed is a whole number from 0 to 2**63 - 1; got {self.seed!r}.")
            object.__setattr__(self, "seed", seed)
        if not all(isinstance(text, str) and text for text in self.stops):
            raise ValidationError(
                f"stop is a text or a list of texts, none of them empty; got {self.stop!r}."
            )

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop texts as a tuple."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    def seeds(self, n_rows: int) -> list[int]:
        """One seed per row: ``seed + i``."""
        seed = self.seed
        if seed is None:
            seed = int(torch.randint(2**62, ()))
            _logger.info("seed %d", seed)
        return [(seed + i) % 2**63 for i in range(n_rows)]


class Generating:
    """One checked call of ``generate``; nothing runs before ``texts`` or the first piece of ``stream``."""

    def __init__(
        self, model: nn.Module | ModelAdapter, tokenizer: Any, prompts: Sequence[Prompt], options: Options
    ) -> None:
        self.adapter = adapter_for(model)
        self.tokenizer = tokenizer if tokenizer is not None else self.adapter.tokenizer
        if self.tokenizer is None:
            raise ValidationError("generation needs the model's tokenizer: pass tokenizer=….")
        if self.adapter.head is None:
            raise ValidationError(
                f"{self.adapter.model_id} can't generate: load it with AutoModelForCausalLM, or by name."
            )
        self.options = options
        if options.continue_final_message:
            prompts = [continued(prompt) for prompt in prompts]
        self.ids = [self._encode(prompt) for prompt in prompts]
        self.prompts = [prompt_text(self.tokenizer, prompt) for prompt in prompts]
        self.ends = end_tokens(self.adapter.hf_model, self.tokenizer)
        self._check_room(options.max_tokens)
        self.steering = self._steering()
        self.seeds = options.seeds(len(prompts))

    def texts(self) -> list[str]:
        """The prompts with their continuations."""
        rows = self.rows(stream=False)
        decode(self.adapter, rows, self.padding)
        return [prompt + row.text for prompt, row in zip(self.prompts, rows, strict=True)]

    def stream(self) -> Iterator[str]:
        """The only row's text in pieces, from a thread that ends early when the iterator is closed."""
        yield self.prompts[0]
        pieces: queue.SimpleQueue[str | BaseException | None] = queue.SimpleQueue()
        closed = threading.Event()

        def tell(step: Step | None) -> bool:
            if step is not None:
                pieces.put(step.text)
            return closed.is_set()

        def work() -> None:
            try:
                decode(self.adapter, self.rows(stream=True), self.padding, tell)
                pieces.put(None)
            # Whatever it is, it belongs to the thread that reads the pieces.
            except BaseException as error:
                pieces.put(error)

        thread = threading.Thread(target=contextvars.copy_context().run, args=(work,), daemon=True)
        thread.start()
        try:
            while (piece := pieces.get()) is not None:
                if isinstance(piece, BaseException):
                    raise piece
                if piece:
                    yield piece
        finally:
            closed.set()
            thread.join()

    def rows(self, *, stream: bool) -> list[Row]:
        options = self.options
        requests = [
            Request(ids, options.max_tokens, options, seed, options.stops, self.steering, stream=stream)
            for ids, seed in zip(self.ids, self.seeds, strict=True)
        ]
        requests = [self.request(i, one) for i, one in enumerate(requests)]
        n, room = len(requests), self.adapter.context
        return [Row(one, self.tokenizer, self.ends, room, prompt=(i, n)) for i, one in enumerate(requests)]

    @property
    def padding(self) -> int:
        return next((i for i in (self.tokenizer.pad_token_id, *self.ends) if i is not None), 0)

    def request(self, i: int, request: Request) -> Request:
        """What is asked of the decoder for prompt ``i``; for subclasses to add to."""
        return request

    def _steering(self) -> tuple[Steer, ...]:
        options = self.options
        if options.vector is None:
            return ()
        plan = options.vector.plan(self.adapter, options.strength)
        if options.strength == 0:
            return ()
        return tuple(Steer(self.adapter.layer_index(i.layer), i.edit, i.tokens) for i in plan.interventions)

    def _encode(self, prompt: Prompt) -> list[int]:
        ids = encode_prompt(self.tokenizer, prompt)
        if not ids:
            raise ValidationError(
                "the prompt is empty and the tokenizer adds no BOS: give at least one token."
            )
        self.adapter.check_token_ids(ids)
        return ids

    def _check_room(self, max_tokens: int) -> None:
        """Raises for a prompt that fills the model's context, and says where an answer will end at it."""
        context = self.adapter.context
        if context is None:
            return
        longest = max(map(len, self.ids))
        if longest >= context:
            raise ValidationError(
                f"the prompt has {longest} tokens and {self.adapter.model_id} has a context of {context}: "
                "shorten the prompt."
            )
        if longest + max_tokens > context:
            _logger.warning(
                "stopping after %d tokens, not %d: the context of %s has %d and the prompt %d",
                context - longest,
                max_tokens,
                self.adapter.model_id,
                context,
                longest,
            )


def end_tokens(hf: Any, tokenizer: Any) -> list[int]:
    """Ids of the tokens that end an answer: the model's own, else the tokenizer's."""
    own = getattr(getattr(hf, "generation_config", None), "eos_token_id", None)
    found = own if own is not None else tokenizer.eos_token_id
    if found is None:
        return []
    if isinstance(found, torch.Tensor):
        found = found.tolist()
    return [int(end) for end in (found if isinstance(found, (list, tuple)) else [found])]
