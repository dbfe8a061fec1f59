"""Chat messages as prompts: how a tokenizer's template writes them, as token ids and as text."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..errors import MechanexError, ValidationError

__all__ = [
    "Chat",
    "chat_ids",
    "chat_text",
    "continued",
    "has_chat_template",
    "template_texts",
    "writes_chats_itself",
]


@dataclass(frozen=True)
class Chat:
    """Messages to be answered, or with an answer that goes on; a prompt wherever a list of messages is one.

    Args:
        messages: dicts with ``role`` and ``content``, at least one.
        continue_final_message: leave the last message open, so that what follows continues it; without it, what
            follows is a new answer.
        add_generation_prompt: write the begin of an answer after the messages; None writes it unless the last
            message goes on.
        template_kwargs: further variables of the template, such as ``{"enable_thinking": False}``.
        tools: functions that the model is told of, as the template takes them.

    Raises:
        ValidationError: no messages, or ``continue_final_message`` together with ``add_generation_prompt``.
    """

    messages: Sequence[Mapping[str, Any]]
    continue_final_message: bool = False
    add_generation_prompt: bool | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    tools: Sequence[Mapping[str, Any]] = ()

    def __post_init__(self) -> None:
        given: Any = self.messages
        if not isinstance(given, Sequence) or not all(isinstance(message, Mapping) for message in given):
            raise ValidationError(
                f"A chat's messages are a list of dicts with role and content; got {given!r}."
            )
        if not self.messages:
            raise ValidationError("A chat has no messages; give at least one.")
        if self.continue_final_message and self.add_generation_prompt:
            raise ValidationError(
                "continue_final_message goes on with the last message and add_generation_prompt begins another; "
                "ask for one of them."
            )

    @property
    def begins_answer(self) -> bool:
        """Whether the begin of an answer is written after the messages."""
        if self.add_generation_prompt is None:
            return not self.continue_final_message
        return self.add_generation_prompt


def continued(prompt: object) -> Chat:
    """The chat whose last message goes on.

    Raises:
        ValidationError: the prompt is no chat, or one that asks for another answer to begin.
    """
    if isinstance(prompt, Chat):
        return replace(prompt, continue_final_message=True)
    if (
        isinstance(prompt, str)
        or not isinstance(prompt, Sequence)
        or not all(isinstance(message, Mapping) for message in prompt)
    ):
        raise ValidationError(
            "continue_final_message goes with a chat, and the prompt is none: text and token ids are continued anyway."
        )
    return Chat(prompt, continue_final_message=True)


def has_chat_template(tokenizer: Any) -> bool:
    """Whether a tokenizer can write chats: by a template, or by a method of its own as mistral-common's."""
    return bool(template_texts(tokenizer)) or writes_chats_itself(tokenizer)


def template_texts(tokenizer: Any) -> list[str]:
    """A tokenizer's chat templates, of which some have one for chats with tools beside the usual one."""
    found = getattr(tokenizer, "chat_template", None)
    if found is None:
        return []
    return [str(one) for one in found.values()] if isinstance(found, Mapping) else [str(found)]


def writes_chats_itself(tokenizer: Any) -> bool:
    """Whether a tokenizer writes chats by a method of its own, as mistral-common's, not by transformers' template."""
    from transformers import PreTrainedTokenizerBase

    own = getattr(tokenizer, "apply_chat_template", None)
    return (
        own is not None and getattr(own, "__func__", own) is not PreTrainedTokenizerBase.apply_chat_template
    )


def chat_ids(tokenizer: Any, chat: Chat) -> list[int]:
    """Token ids of a chat, which only the tokenizer's own method knows: some encode no special token from text.

    Raises:
        ValidationError: no template, one that refuses these messages, or ``template_kwargs`` that it doesn't take.
    """
    return list(_applied(tokenizer, chat, tokenize=True))


def chat_text(tokenizer: Any, chat: Chat) -> str:
    """A chat as text; errors as :func:`chat_ids`."""
    return str(_applied(tokenizer, chat, tokenize=False))


def _applied(tokenizer: Any, chat: Chat, *, tokenize: bool) -> Any:
    if not has_chat_template(tokenizer):
        raise ValidationError(
            "The prompt is chat messages, but the tokenizer has no chat template; pass text."
        )
    _check_names(chat.template_kwargs)
    try:
        return tokenizer.apply_chat_template(
            [dict(message) for message in chat.messages],
            tokenize=tokenize,
            return_dict=False,
            add_generation_prompt=chat.begins_answer,
            continue_final_message=chat.continue_final_message,
            **({"tools": [dict(tool) for tool in chat.tools]} if chat.tools else {}),
            **chat.template_kwargs,
        )
    except (MechanexError, ImportError):
        raise
    except Exception as error:  # a template may raise anything, for roles in an order it doesn't know
        raise ValidationError(f"The model's chat template refuses these messages: {error}") from error


def _check_names(kwargs: Mapping[str, Any]) -> None:
    """Refuses what would change the method rather than the template's variables, such as another template."""
    from transformers import PreTrainedTokenizerBase

    taken = {"messages", *inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters}
    if refused := sorted(taken.intersection(kwargs)):
        raise ValidationError(
            f"Variables of a chat template can't be called {', '.join(refused)}.",
            details={"param": "chat_template_kwargs"},
        )
