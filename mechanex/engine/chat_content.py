"""Chats of strangers: what messages say is text, whatever control tokens it spells, and roles are the template's."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from ..errors import ValidationError
from .chat import Chat, chat_ids, chat_text, template_texts, writes_chats_itself
from .detokenize import special_tokens
from .encode import check_characters, encode_bare

__all__ = ["chat_as_text", "check_roles", "known_roles"]

_USUAL_ROLES = ("system", "user", "assistant")
_PRIVATE = range(0xE000, 0xF900)
# transformers' own tags, which plain Jinja doesn't know.
_GENERATION = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")


def chat_as_text(tokenizer: Any, chat: Chat) -> list[int]:
    """Token ids of a chat whose control tokens are the template's own alone: one that a message spells is text.

    Where no message spells one, these are the ids that the tokenizer's own method gives.

    Args:
        tokenizer: a transformers tokenizer with a chat template.
        chat: its roles are known, see ``check_roles``.

    Raises:
        ValidationError: as :func:`~mechanex.engine.chat.chat_ids`, or a message that spells a control token where the
            template or the tokenizer can't have it as text.
    """
    for text in _texts([chat.messages, chat.tools, chat.template_kwargs]):
        check_characters(text)
    control = _control_tokens(tokenizer)
    pattern = re.compile("|".join(map(re.escape, sorted(control, key=len, reverse=True))) or r"(?!)")
    spelled = _Placeholders(pattern, chat)
    if not spelled.texts:
        return chat_ids(tokenizer, chat)
    if writes_chats_itself(tokenizer):
        return _checked(tokenizer, chat, spelled, control)
    rendered = chat_text(tokenizer, spelled.chat)
    if spelled.restored(rendered) != chat_text(tokenizer, chat):
        raise _refused(spelled, "the model's chat template changes it")
    harmless = spelled.removed(rendered)
    if _in_pieces(tokenizer, harmless, pattern, control, spelled) != encode_bare(tokenizer, harmless):
        raise _refused(spelled, "the model's tokenizer can't take a text in pieces")
    return _in_pieces(tokenizer, rendered, pattern, control, spelled)


def known_roles(tokenizer: Any) -> tuple[str, ...] | None:
    """The roles that a tokenizer's templates know: the usual three, and those that they compare a role with.

    Returns:
        The roles; None where a tokenizer writes chats by a method of its own, which says itself what it takes, or has
        no template.
    """
    templates = template_texts(tokenizer)
    if not templates or writes_chats_itself(tokenizer):
        return None
    return tuple(dict.fromkeys([*_USUAL_ROLES, *(role for one in templates for role in _roles_in(one))]))


def _roles_in(template: str) -> list[str]:
    """What a template compares a role with."""
    from jinja2 import Environment, TemplateSyntaxError, nodes

    try:
        tree = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(_GENERATION.sub("", template))
    except TemplateSyntaxError:
        return []
    names = {"role"}

    def is_role(node: Any) -> bool:
        while isinstance(node, nodes.Filter):
            node = node.node
        if isinstance(node, nodes.Getitem):
            return isinstance(node.arg, nodes.Const) and node.arg.value == "role"
        return getattr(node, "attr", None) == "role" or getattr(node, "name", None) in names

    for set_to in tree.find_all(nodes.Assign):
        if isinstance(set_to.target, nodes.Name) and is_role(set_to.node):
            names.add(set_to.target.name)
    found: list[str] = []
    for compared in tree.find_all(nodes.Compare):
        sides = [compared.expr, *(operand.expr for operand in compared.ops)]
        if any(map(is_role, sides)):
            constants = [one for side in sides for one in (side, *side.find_all(nodes.Const))]
            values = [one.value for one in constants if isinstance(one, nodes.Const)]
            found += [one for one in values if isinstance(one, str) and one != "role"]
    return found


def check_roles(chat: Chat, known: tuple[str, ...] | None) -> None:
    """Refuses a role that the template doesn't know, which it might write down as it is: a ValidationError."""
    for message in chat.messages:
        role = message.get("role")
        if known is not None and role not in known:
            raise ValidationError(
                f"the model's chat template knows no role {str(role)[:100]!r}: it knows {', '.join(known)}."
            )


class _Placeholders:
    """A chat with each control token that it spells outside of roles replaced by a text that nothing else has.

    Attributes:
        chat: with placeholders.
        texts: the control tokens that were spelled, by placeholder.
    """

    def __init__(self, pattern: re.Pattern[str], chat: Chat) -> None:
        written = set("".join(_texts([chat.messages, chat.tools, chat.template_kwargs])))
        begin, end = [one for one in map(chr, _PRIVATE) if one not in written][:2]
        self.texts: dict[str, str] = {}

        def hide(match: re.Match[str]) -> str:
            placeholder = f"{begin}{len(self.texts)}{end}"
            self.texts[placeholder] = match[0]
            return placeholder

        def hidden(found: Any) -> Any:
            if isinstance(found, str):
                return pattern.sub(hide, found)
            if isinstance(found, Mapping):  # what a call was given, or takes, is named by whoever sends it
                return {hidden(name): hidden(value) for name, value in found.items()}
            return [hidden(one) for one in found] if isinstance(found, (list, tuple)) else found

        # A role is one of those that the template knows.
        messages = [
            {name: value if name == "role" else hidden(value) for name, value in message.items()}
            for message in chat.messages
        ]
        self.chat = replace(
            chat, messages=messages, tools=hidden(chat.tools), template_kwargs=hidden(chat.template_kwargs)
        )
        self._each = re.compile(f"{begin}[0-9]+{end}")

    def restored(self, text: str) -> str:
        """The text with the control tokens that were spelled."""
        return self._each.sub(lambda match: self.texts.get(match[0], match[0]), text)

    def removed(self, text: str) -> str:
        """The text without them."""
        return self._each.sub("", text)


def _control_tokens(tokenizer: Any) -> dict[str, int]:
    """The ids of the control tokens by their texts."""
    return {text: token for token, text in special_tokens(tokenizer).items() if text}


def _in_pieces(
    tokenizer: Any,
    rendered: str,
    pattern: re.Pattern[str],
    control: Mapping[str, int],
    spelled: _Placeholders,
) -> list[int]:
    """Token ids of what a template wrote: its control tokens by their ids, and the rest as text."""
    ids: list[int] = []
    end = 0
    for match in [*pattern.finditer(rendered), None]:
        text = spelled.restored(rendered[end : len(rendered) if match is None else match.start()])
        if text:
            encoded = tokenizer(
                text, add_special_tokens=False, split_special_tokens=True, return_attention_mask=False
            )["input_ids"]
            if not set(control.values()).isdisjoint(encoded):
                raise _refused(spelled, "the model's tokenizer makes a control token of it")
            ids += encoded
        if match is not None:
            ids.append(control[match[0]])
            end = match.end()
    return ids


def _checked(tokenizer: Any, chat: Chat, spelled: _Placeholders, control: Mapping[str, int]) -> list[int]:
    """What the tokenizer's own method gives, if that takes what messages spell as text."""
    ids, harmless = chat_ids(tokenizer, chat), chat_ids(tokenizer, spelled.chat)
    kinds = set(control.values())
    if [one for one in ids if one in kinds] != [one for one in harmless if one in kinds]:
        raise _refused(spelled, "the model's tokenizer makes a control token of it")
    return ids


def _refused(spelled: _Placeholders, why: str) -> ValidationError:
    text = next(iter(spelled.texts.values()))
    return ValidationError(
        f"a message has the text {text!r}, which is a control token of this model, and it can't be taken as text: "
        f"{why}. Write it otherwise."
    )


def _texts(found: Any) -> Iterator[str]:
    if isinstance(found, str):
        yield found
    elif isinstance(found, Mapping):
        for name, value in found.items():
            yield from _texts(name)
            yield from _texts(value)
    elif isinstance(found, (list, tuple)):
        for value in found:
            yield from _texts(value)
