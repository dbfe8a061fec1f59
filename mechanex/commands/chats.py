"""Chats of the command line: JSON files of messages."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from ..engine.chat import Chat
from ..engine.text import Prompt
from .text_files import text_in

__all__ = ["given_prompts"]


def given_prompts(texts: Sequence[str], chats: Sequence[Path], continue_final_message: bool) -> list[Prompt]:
    """The prompts of ``--prompt`` and ``--chat``, texts first.

    Raises:
        UsageError: neither is given, or ``--continue-final-message`` without a chat.
        BadParameter: a file that holds no messages.
    """
    if not texts and not chats:
        raise click.UsageError("Give a --prompt or a --chat.")
    if continue_final_message and not chats:
        raise click.UsageError("--continue-final-message goes with --chat; a text is continued anyway.")
    return [*texts, *(Chat(_messages(path), continue_final_message) for path in chats)]


def _messages(path: Path) -> list[dict[str, Any]]:
    try:
        messages = json.loads(text_in(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise click.BadParameter(f"{path} is not JSON: {error}", param_hint="--chat") from error
    if not (isinstance(messages, list) and messages and all(map(_is_message, messages))):
        raise click.BadParameter(
            f'{path} is no list of messages such as [{{"role": "user", "content": "Hello"}}].',
            param_hint="--chat",
        )
    return messages


def _is_message(message: object) -> bool:
    return isinstance(message, dict) and isinstance(message.get("role"), str) and "content" in message
