"""Generation of whole texts and streams: prompts encoded, continued by the decoder, and given back as text."""

from __future__ import annotations

import contextvars
import queue
import threading
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from torch import nn

from ..errors import ValidationError
from .chat import continued
from .decode.grammar import Grammar, grammars_for
from .decode.request import Steer, Step, TextRequest
from .decode.row import Row
from .decode.run import decode
from .hooks import SteeringPlan
from .limits import check_context
from .models import adapter_for
from .models.adapter import ModelAdapter
from .ranks import current_ranks
from .sampling import Options, end_tokens, padding_token
from .strengths import check_plan_strength, strength_of_each
from .text import Prompt, encode_prompt, prompt_text

__all__ = ["Generating", "generate", "generate_batch", "stream"]


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


class Generating:
    """One checked call of ``generate``; nothing runs before ``texts`` or the first piece of ``stream``."""

    def __init__(
        self, model: nn.Module | ModelAdapter, tokenizer: Any, prompts: Sequence[Prompt], options: Options
    ) -> None:
        self.adapter = adapter_for(model)
        self.tokenizer = tokenizer if tokenizer is not None else self.adapter.tokenizer
        if self.tokenizer is None:
            raise ValidationError(
                "generation needs the model's tokenizer: pass tokenizer=… (a client gets one by "
                "set_local_model(model, tokenizer))."
            )
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
        check_context(self.adapter, max(map(len, self.ids)), options.max_tokens)
        options.check_ids(self.adapter)
        self.grammar: Grammar | None = None
        if options.form is not None:
            self.grammar = grammars_for(self.adapter, self.tokenizer, self.ends).of_form(options.form)
        self.steering = self._steering(len(prompts))
        self._ranks = current_ranks(self.adapter)
        seeds = partial(options.seeds, len(prompts))
        # A split model's processes write the same text together; others draw for themselves.
        self.seeds = self._ranks.from_first(seeds) if self._ranks.split else seeds()

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
            return any(self._ranks.told(closed.is_set())) if self._ranks.split else closed.is_set()

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
            TextRequest(
                ids,
                options.max_tokens,
                options,
                seed,
                options.stops,
                steering,
                stream=stream,
                guard=options.guard if steering else None,
                grammar=self.grammar,
            )
            for ids, seed, steering in zip(self.ids, self.seeds, self.steering, strict=True)
        ]
        requests = [self.request(i, options.asked(one)) for i, one in enumerate(requests)]
        n, room = len(requests), self.adapter.context
        return [Row(one, self.tokenizer, self.ends, room, prompt=(i, n)) for i, one in enumerate(requests)]

    @property
    def padding(self) -> int:
        return padding_token(self.tokenizer, self.ends)

    def request(self, i: int, request: TextRequest) -> TextRequest:
        """What is asked of the decoder for prompt ``i``; for subclasses to add to."""
        return request

    def _steering(self, n: int) -> list[tuple[Steer, ...]]:
        """The edits of each of n prompts."""
        placed = [one for plan in self._plans() for one in plan.placed(self.adapter)]
        for one in placed:
            if one.mask is not None:
                raise ValidationError(
                    "a plan with a mask fits one shape of call, and texts are written token by token: give tokens and "
                    "rows in its place."
                )
            if one.rows and max(one.rows) >= n:
                raise ValidationError(f"the plan edits row {max(one.rows)}, and there are {n} prompts.")
        return [
            tuple(
                Steer(one.layer, one.edit, one.tokens, one.varying, one.condition)
                for one in placed
                if one.rows is None or i in one.rows
            )
            for i in range(n)
        ]

    def _plans(self) -> list[SteeringPlan]:
        options = self.options
        if options.vector is None:
            return []
        several = options.vector if isinstance(options.vector, (list, tuple)) else [options.vector]
        plans = []
        for one, strength in zip(several, strength_of_each(options.strength, len(several)), strict=True):
            if isinstance(one, SteeringPlan):
                check_plan_strength(strength)
                plan = one
            else:
                plan = one.plan(self.adapter, strength)
            if strength != 0:
                plans.append(plan)
        return plans

    def _encode(self, prompt: Prompt) -> list[int]:
        ids = encode_prompt(self.tokenizer, prompt)
        if not ids:
            raise ValidationError(
                "the prompt is empty and the tokenizer adds no BOS: give at least one token."
            )
        self.adapter.check_token_ids(ids)
        return ids
