"""The same questions asked otherwise: what a dose does where a prompt isn't as those that it was chosen on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..chat import Chat
from ..text import Prompt, as_chat

__all__ = ["VARIANTS", "varied"]

VARIANTS: dict[str, tuple[str, str, str | None]] = {
    "paraphrased": ("I have been wondering about something, and perhaps you can help: ", "", None),
    "longer": (
        "Yesterday we sat together for a long while, had soup and bread, and talked about this and that: the weather, "
        "the trains, a film that nobody liked. Then somebody asked what I would like to ask you now. ",
        " Answer as you see fit.",
        None,
    ),
    "other role": ("", "", "You are a clerk at the counter of a post office."),
}
"""By name what comes before a question, what comes after it, and who is asked."""


def varied(prompts: Sequence[Prompt], name: str) -> list[Prompt]:
    """The prompts in one of the ``VARIANTS``; a prompt of token ids, which can't be varied, is left out."""
    before, after, role = VARIANTS[name]
    found: list[Prompt] = []
    for prompt in prompts:
        chat = as_chat(prompt)
        if chat is not None:
            found.append(_chat(chat, before, after, role))
        elif isinstance(prompt, str):
            beginning = f"{role} " if role else before
            found.append(f"{beginning}{prompt}{after}")
    return found


def _chat(chat: Chat, before: str, after: str, role: str | None) -> Prompt:
    messages: list[dict[str, Any]] = [dict(one) for one in chat.messages]
    asked = [i for i, one in enumerate(messages) if one.get("role") == "user"]
    if asked and isinstance(text := messages[asked[-1]].get("content"), str):
        messages[asked[-1]]["content"] = f"{before}{text}{after}"
    if role is not None:
        if messages and messages[0].get("role") == "system":
            messages[0] = {**messages[0], "content": role}
        else:
            messages.insert(0, {"role": "system", "content": role})
    return messages
