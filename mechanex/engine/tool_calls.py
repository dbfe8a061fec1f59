"""Calls of functions in a model's answers, in the forms in which chat templates teach models to write them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from .chat import template_texts, writes_chats_itself

__all__ = ["CallFormat", "ToolCall", "call_format", "calls_in", "knows_tools", "schema_of"]

CallFormat = Literal["hermes", "llama", "mistral"]

_HERMES = re.compile(r"<tool_call>\s*(.*?)\s*(?:</tool_call>|\Z)", re.DOTALL)
_MISTRAL = re.compile(r"\[TOOL_CALLS\]\s*([\w.-]+)\s*(?:\[CALL_ID\][\w-]*)?\[ARGS\]\s*")
_MISTRAL_MARK = "[TOOL_CALLS]"
_LLAMA_MARK = "<|python_tag|>"


@dataclass(frozen=True)
class ToolCall:
    """A call that a model has written.

    Args:
        name: of the function.
        arguments: as JSON.
    """

    name: str
    arguments: str


def knows_tools(tokenizer: Any) -> bool:
    """Whether the tokenizer's chat template tells a model of tools."""
    templates = template_texts(tokenizer)
    return any("tools" in one for one in templates) if templates else call_format(tokenizer) is not None


def call_format(tokenizer: Any) -> CallFormat | None:
    """How the model writes calls, by its chat templates; None where that can't be told."""
    template = "\n".join(template_texts(tokenizer))
    if (
        not template
    ):  # mistral-common's tokenizers have a method in its place, and the mark where models write calls
        marked = writes_chats_itself(tokenizer) and _MISTRAL_MARK in tokenizer.get_vocab()
        return "mistral" if marked else None
    if "<tool_call>" in template:
        return "hermes"
    if _MISTRAL_MARK in template:
        return "mistral"
    if "python_tag" in template or ('"parameters"' in template and "ipython" in template):
        return "llama"
    return None


def calls_in(text: str, form: CallFormat, names: Sequence[str]) -> tuple[str, list[ToolCall]]:
    """The answer without its calls, and the calls.

    An answer with a call that isn't whole, or of a function that nobody offered, has none: it is text.

    Args:
        text: the answer with special tokens written out.
        form: how calls are written.
        names: of the functions that were offered.
    """
    content, found = {"hermes": _hermes, "mistral": _mistral, "llama": _llama}[form](text)
    calls = [call for one in found if (call := _call(one)) is not None and call.name in names]
    return (content.strip(), calls) if calls and len(calls) == len(found) else (text, [])


def schema_of(functions: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The JSON schema of a call of one of these functions, ``{"name", "arguments"}``.

    Args:
        functions: each with ``name`` and, perhaps, ``parameters``, a JSON schema.
    """
    alone = len(functions) == 1
    each = [
        {
            "type": "object",
            "properties": {
                "name": {"const": one["name"]},
                "arguments": _at(
                    f"#{'' if alone else f'/anyOf/{i}'}/properties/arguments",
                    one.get("parameters") or {"type": "object"},
                ),
            },
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for i, one in enumerate(functions)
    ]
    return each[0] if alone else {"anyOf": each}


def _at(place: str, schema: Any) -> Any:
    """A schema that stands at ``place`` of a larger one: what it refers to stands there too."""
    if isinstance(schema, list):
        return [_at(place, one) for one in schema]
    if not isinstance(schema, Mapping):
        return schema
    return {
        key: place + one[1:]
        if key == "$ref" and isinstance(one, str) and one.startswith("#")
        else _at(place, one)
        for key, one in schema.items()
    }


def _call(one: Any) -> ToolCall | None:
    if not isinstance(one, dict) or not isinstance(one.get("name"), str):
        return None
    arguments = one.get("arguments", one.get("parameters", {}))
    if isinstance(arguments, str):
        return ToolCall(one["name"], arguments) if _json(arguments) is not None else None
    if not isinstance(arguments, dict):
        return None
    return ToolCall(one["name"], json.dumps(arguments, ensure_ascii=False))


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _hermes(text: str) -> tuple[str, list[Any]]:
    return _HERMES.sub("", text), [_json(one) for one in _HERMES.findall(text)]


def _mistral(text: str) -> tuple[str, list[Any]]:
    content, mark, rest = text.partition(_MISTRAL_MARK)
    if not mark:
        return text, []
    named = list(_MISTRAL.finditer(text))
    if named:  # [TOOL_CALLS]name[ARGS]{…}, once for each
        ends = [*(one.start() for one in named[1:]), len(text)]
        return content, [
            {"name": one[1], "arguments": _json(text[one.end() : end])}
            for one, end in zip(named, ends, strict=True)
        ]
    found = _json(rest)
    return content, found if isinstance(found, list) else [found]


def _llama(text: str) -> tuple[str, list[Any]]:
    written = text.strip().removeprefix(_LLAMA_MARK)
    if not written.startswith("{"):
        return text, []
    return "", [_json(one) for one in re.split(r"(?<=\})\s*;\s*(?=\{)", written)]
