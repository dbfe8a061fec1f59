"""Generation: transformers' ``generate`` with our sampling, steering while it runs, stop texts, streaming."""

from __future__ import annotations

import contextlib
import contextvars
import logging
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import ValidationError
from .chat import continued
from .detokenize import Continuation
from .given import as_whole
from .models import adapter_for
from .models.adapter import ModelAdapter, exclusive, undisturbed
from .sampling import Draw, Sampling
from .text import Prompt, encode_prompt, prompt_text

if TYPE_CHECKING:
    from .vectors import SteeringVector

__all__ = ["Options", "end_tokens", "generate", "generate_batch", "stream"]

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
    return _Run(model, tokenizer, [prompt], Options(**options)).texts()[0]


def generate_batch(
    model: nn.Module | ModelAdapter, tokenizer: Any, prompts: Sequence[Prompt], **options: Any
) -> list[str]:
    """Continues several prompts in one left-padded batch; row i draws as ``generate`` with ``seed + i`` does.

    Arguments, results and errors as in ``generate``, for every prompt.
    """
    if isinstance(prompts, str) or not prompts:
        raise ValidationError(f"generate_batch takes a list with at least one prompt; got {prompts!r}.")
    return _Run(model, tokenizer, prompts, Options(**options)).texts()


def stream(model: nn.Module | ModelAdapter, tokenizer: Any, prompt: Prompt, **options: Any) -> Iterator[str]:
    """Continues one prompt and gives the text as it comes; the first piece is the prompt.

    The pieces joined are what ``generate`` returns for the same arguments, which are checked at once. The
    model runs in a thread of its own and stops early when the iterator is closed.
    """
    return _Run(model, tokenizer, [prompt], Options(**options)).stream()


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
        if isinstance(self.max_tokens, bool) or not isinstance(self.max_tokens, int) or self.max_tokens < 1:
            raise ValidationError(f"max_tokens is a number of tokens, at least 1; got {self.max_tokens!r}.")
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


class _Run:
    """One checked call of ``generate``; nothing runs before ``texts`` or the first piece of ``stream``."""

    def __init__(
        self, model: nn.Module | ModelAdapter, tokenizer: Any, prompts: Sequence[Prompt], options: Options
    ) -> None:
        self.adapter = adapter_for(model)
        self.tokenizer = tokenizer if tokenizer is not None else self.adapter.tokenizer
        if self.tokenizer is None:
            raise ValidationError("generation needs the model's tokenizer: pass tokenizer=….")
        if not hasattr(self.adapter.hf_model, "generate"):
            raise ValidationError(
                f"{self.adapter.model_id} can't generate: load it with AutoModelForCausalLM, or by name."
            )
        self.options = options
        if options.continue_final_message:
            prompts = [continued(prompt) for prompt in prompts]
        self.ids = [self._encode(prompt) for prompt in prompts]
        self.prompts = [prompt_text(self.tokenizer, prompt) for prompt in prompts]
        self.max_tokens = self._room(options.max_tokens)
        self.rows = [Continuation(self.tokenizer, ids, options.stops) for ids in self.ids]
        plan = None if options.vector is None else options.vector.plan(self.adapter, options.strength)
        self.plan = plan if options.strength != 0 else None
        self.seeds = options.seeds(len(prompts))

    def texts(self) -> list[str]:
        """The prompts with their continuations."""
        self._generate(lambda: False)
        return [prompt + row.text for prompt, row in zip(self.prompts, self.rows, strict=True)]

    def stream(self) -> Iterator[str]:
        """The only row's text in pieces, from a thread that ends early when the iterator is closed."""
        yield self.prompts[0]
        pieces: queue.SimpleQueue[str | BaseException | None] = queue.SimpleQueue()
        closed = threading.Event()

        def watch() -> bool:
            pieces.put(self.rows[0].piece())
            return closed.is_set()

        def work() -> None:
            try:
                self._generate(watch)
                pieces.put(self.rows[0].piece())
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

    @torch.no_grad()
    def _generate(self, watch: Callable[[], bool]) -> None:
        from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

        hf: Any = self.adapter.hf_model
        ends = end_tokens(hf, self.tokenizer)
        padding = next((i for i in (self.tokenizer.pad_token_id, *ends) if i is not None), 0)
        ids, mask = _left_padded(self.ids, padding, self.adapter.device)
        config = GenerationConfig(  # type: ignore[no-untyped-call]
            max_new_tokens=self.max_tokens,
            do_sample=False,
            num_beams=1,
            use_cache=True,
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
            eos_token_id=ends or None,
            pad_token_id=padding,
        )
        with exclusive(self.adapter), undisturbed(hf), _caller_decides(hf), self._steering():
            hf.generate(
                input_ids=ids,
                attention_mask=mask,
                generation_config=config,
                logits_processor=LogitsProcessorList([Draw(self.options, self.seeds)]),
                stopping_criteria=StoppingCriteriaList([_Reader(self.rows, ends, watch)]),
            )
        for row in self.rows:
            row.finish()

    def _steering(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if self.plan is None else self.plan.apply(self.adapter)

    def _encode(self, prompt: Prompt) -> list[int]:
        ids = encode_prompt(self.tokenizer, prompt)
        if not ids:
            raise ValidationError(
                "the prompt is empty and the tokenizer adds no BOS: give at least one token."
            )
        self.adapter.check_token_ids(ids)
        return ids

    def _room(self, max_tokens: int) -> int:
        context = getattr(self.adapter.config, "max_position_embeddings", None)
        if not isinstance(context, int) or context < 1:
            return max_tokens
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
        return min(max_tokens, context - longest)


class _Reader:
    """A stopping criterion that turns each step's tokens into text and ends rows whose stop text has come."""

    def __init__(self, rows: Sequence[Continuation], ends: Sequence[int], watch: Callable[[], bool]) -> None:
        self._rows, self._ends, self._watch = rows, ends, watch
        self._done = [False] * len(rows)

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        for i, token in enumerate(input_ids[:, -1].tolist()):
            if not self._done[i]:
                if token not in self._ends:
                    self._rows[i].feed(token)
                self._done[i] = token in self._ends or self._rows[i].stopped
        closed = self._watch()
        return torch.tensor([closed or done for done in self._done], device=input_ids.device)


@contextlib.contextmanager
def _caller_decides(hf: Any) -> Iterator[None]:
    """Hides a model's own generation_config, whose settings would add to the documented arguments."""
    from transformers import GenerationConfig

    own = hf.generation_config
    hf.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        hf.generation_config = own


def _left_padded(
    prompts: Sequence[Sequence[int]], padding: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), padding, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, prompt in enumerate(prompts):
        ids[i, longest - len(prompt) :] = torch.tensor(prompt)
        mask[i, longest - len(prompt) :] = 1
    return ids.to(device), mask.to(device)


def end_tokens(hf: Any, tokenizer: Any) -> list[int]:
    """Ids of the tokens that end an answer: the model's own, else the tokenizer's."""
    own = getattr(getattr(hf, "generation_config", None), "eos_token_id", None)
    found = own if own is not None else tokenizer.eos_token_id
    if found is None:
        return []
    return [int(end) for end in (found if isinstance(found, (list, tuple)) else [found])]
