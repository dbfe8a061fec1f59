"""Open questions, for measuring what steering does to texts that it isn't about."""

from __future__ import annotations

from typing import Any

from ..chat import has_chat_template
from ..text import Prompt

__all__ = ["OPEN_QUESTIONS", "as_chats", "open_prompts"]

OPEN_QUESTIONS = (
    "How do I make a good cup of tea?",
    "What should I see on a first visit to London?",
    "Why do leaves change colour in autumn?",
    "Tell me a short story about a lighthouse.",
    "How does a bicycle stay upright?",
    "What is the difference between a novel and a short story?",
    "Describe a busy railway station.",
    "How can I sleep better?",
    "What does a librarian do all day?",
    "Explain how bread rises.",
    "Which books would you give to a ten-year-old?",
    "How did people send messages before telephones?",
    "What makes a garden good for bees?",
    "Describe the view from a high mountain.",
    "How do I plan a birthday party on a small budget?",
    "Why is the sea salty?",
    "Give me three ideas for a rainy Sunday.",
    "What is a good way to learn a new language?",
    "How do ships float?",
    "Tell me about the life of a beekeeper.",
    "What should I cook tonight?",
    "How do I write a letter to a landlord?",
    "Describe your perfect morning.",
    "What is inflation?",
)


def open_prompts(tokenizer: Any) -> list[Prompt]:
    """The questions, as chats where the tokenizer has a template for them."""
    return as_chats(OPEN_QUESTIONS, tokenizer)


def as_chats(questions: Any, tokenizer: Any) -> list[Prompt]:
    """Texts as what a user says in a chat, where the tokenizer has a template; else as they are."""
    if not has_chat_template(tokenizer):
        return list(questions)
    return [[{"role": "user", "content": question}] for question in questions]
