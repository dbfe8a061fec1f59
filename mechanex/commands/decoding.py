"""The options of commands that write text: how tokens are drawn, and what answers are held to."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from ..engine.answering import RULES
from .text_files import text_in

__all__ = ["decoding_of", "decoding_options"]

Decorated = TypeVar("Decorated", bound=Callable[..., Any])

_file = click.Path(exists=True, dir_okay=False, path_type=Path)


def _json(given: str) -> dict[str, Any]:
    try:
        found = json.loads(given)
    except (ValueError, RecursionError) as error:
        raise click.BadParameter(f"it is no JSON ({error}).") from error
    if not isinstance(found, dict):
        raise click.BadParameter("it is a JSON object, in braces.")
    return found


def _as_json(ctx: click.Context, param: click.Parameter, given: str | None) -> dict[str, Any] | None:
    return None if given is None else _json(given)


def _json_of_file(ctx: click.Context, param: click.Parameter, given: Path | None) -> dict[str, Any] | None:
    return None if given is None else _json(text_in(given))


def _text_of_file(ctx: click.Context, param: click.Parameter, given: Path | None) -> str | None:
    return None if given is None else text_in(given)


def _biases(ctx: click.Context, param: click.Parameter, given: Sequence[str]) -> dict[int, float] | None:
    found = {}
    for one in given:
        token, _, bias = one.partition("=")
        try:
            found[int(token)] = float(bias)
        except ValueError as error:
            raise click.BadParameter(
                f"a token id, '=' and a number, such as 42=-100; got {one!r}."
            ) from error
    return found or None


_OPTIONS = (
    click.option(
        "--sampling-method",
        default="top-k",
        show_default=True,
        help="How tokens are drawn: greedy, top-k, top-p, min-p, typical, or combined: min-p, top-k, then top-p.",
    ),
    click.option("--temperature", type=float, default=1.0, show_default=True, help="Divides the logits."),
    click.option(
        "--top-k", type=int, default=50, show_default=True, help="How many of the likeliest tokens stay."
    ),
    click.option(
        "--top-p", type=float, default=0.9, show_default=True, help="Total probability of those that stay."
    ),
    click.option(
        "--min-p",
        type=float,
        default=0.05,
        show_default=True,
        help="Least share of the likeliest's probability.",
    ),
    click.option(
        "--typical-p",
        type=float,
        default=0.95,
        show_default=True,
        help="Total probability of typical tokens.",
    ),
    click.option("--stop", multiple=True, help="A text that ends an answer and is cut off; may be repeated."),
    click.option(
        "--stop-token-id",
        "stop_token_ids",
        type=int,
        multiple=True,
        help="A token that ends an answer; may be repeated.",
    ),
    click.option(
        "--include-stop-str-in-output", is_flag=True, help="Keep the stop text or token that ended an answer."
    ),
    click.option("--min-tokens", type=int, default=0, show_default=True, help="Tokens before any end."),
    click.option("--ignore-eos", is_flag=True, help="Go on behind the model's own end tokens."),
    click.option(
        "--skip-special-tokens/--keep-special-tokens",
        default=True,
        show_default=True,
        help="Whether special tokens are left out of the text.",
    ),
    click.option(
        "--repetition-penalty",
        type=float,
        default=1.0,
        show_default=True,
        help="Divides logits of tokens that prompt or answer have.",
    ),
    click.option(
        "--frequency-penalty",
        type=float,
        default=0.0,
        show_default=True,
        help="Taken off a logit for each time that the answer has the token.",
    ),
    click.option(
        "--presence-penalty",
        type=float,
        default=0.0,
        show_default=True,
        help="Taken off once for a token that the answer has.",
    ),
    click.option(
        "--logit-bias",
        metavar="ID=BIAS",
        multiple=True,
        callback=_biases,
        help="Added to a token's logit, -100 to 100; may be repeated.",
    ),
    click.option(
        "--response-format",
        metavar="JSON",
        callback=_as_json,
        help='OpenAI\'s form of answers, such as {"type": "json_object"}.',
    ),
    click.option(
        "--guided-json", type=_file, callback=_json_of_file, help="A JSON schema that answers follow."
    ),
    click.option("--guided-regex", help="A regular expression that whole answers match."),
    click.option(
        "--guided-choice", multiple=True, help="A text that the answer may be; repeated, it is one of them."
    ),
    click.option(
        "--guided-grammar",
        type=_file,
        callback=_text_of_file,
        help="A grammar that answers follow, in Lark's form or as GBNF.",
    ),
)
_NAMES = ("sampling_method", "temperature", "top_k", "top_p", "min_p", "typical_p", "stop", *RULES)


def decoding_options(command: Decorated) -> Decorated:
    """The options of a command that writes text, under the names of ``generation.generate``'s arguments."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def decoding_of(options: dict[str, Any]) -> dict[str, Any]:
    """Takes these options out of a command's, as keyword arguments of ``Options``."""
    found = {name: options.pop(name) for name in _NAMES}
    return {name: (list(one) or None) if isinstance(one, tuple) else one for name, one in found.items()}
