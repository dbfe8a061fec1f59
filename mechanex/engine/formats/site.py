"""Which stream a file's numbers mean: the one that enters block N, or the one that block N gives on.

A number alone doesn't say it: Hugging Face modules and GGUF control vectors count outputs, this library inputs, so that
their N is our N + 1.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Literal, get_args

from ...errors import ValidationError

__all__ = ["Site", "check_site", "declared", "layer_in", "shift"]

Site = Literal["input", "output"]

_PLAIN = re.compile(r"(?:layer\.)?(0|[1-9][0-9]{0,5})")
_HOOK_POINT = re.compile(r"blocks\.(0|[1-9][0-9]{0,5})\.hook_resid_(pre|post)")
_NUMBERED = re.compile(r"[A-Za-z_][\w.]*[._](0|[1-9][0-9]{0,5})")
_MEANINGS: dict[str, Site] = {
    "resid_pre": "input",
    "input": "input",
    "resid_post": "output",
    "output": "output",
}


def check_site(site: str | None) -> None:
    """Raises a ValidationError unless it is ``"input"``, ``"output"`` or None."""
    if site is not None and site not in get_args(Site):
        raise ValidationError(
            f"site is 'input' (numbers name the block that the stream enters) or 'output' (the block that it "
            f"leaves); got {site!r}."
        )


def declared(field: str | None) -> Site | None:
    """What a file's ``site`` field means; None where there is none.

    Raises:
        ValueError: another place than the residual stream.
    """
    if field is None:
        return None
    if field not in _MEANINGS:
        raise ValueError(f"its site is {field[:40]!r}, and {', '.join(map(repr, _MEANINGS))} are known")
    return _MEANINGS[field]


def layer_in(name: str) -> tuple[int, Site | Literal["plain"] | None]:
    """The number in a tensor's name, and what it means: "plain" for this library's own kind of name, None if unsaid.

    Raises:
        ValueError: there is no number that could be a layer.
    """
    if found := _PLAIN.fullmatch(name):
        return int(found[1]), "plain"
    if found := _HOOK_POINT.fullmatch(name):
        return int(found[1]), "input" if found[2] == "pre" else "output"
    if found := _NUMBERED.fullmatch(name):
        return int(found[1]), None
    raise ValueError(
        f"tensor {name[:40]!r} is named after no layer (such as 3, 'layer.3', 'layer_3' or 'model.layers.3')"
    )


def shift(file: str, said: Site | None, asked: Site | None, unsaid: Iterable[str] = ()) -> int:
    """What is added to the file's numbers to make them this library's layers: 0, or 1 for outputs.

    Args:
        file: the file's name, for messages.
        said: what the file says, or None.
        asked: what the caller says, or None.
        unsaid: names whose numbers may be either.

    Raises:
        ValidationError: the two contradict each other, or neither says it where names need it.
    """
    if said is not None and asked is not None and said != asked:
        raise ValidationError(f"{file} says itself that its layers are {said}s: leave out site={asked!r}.")
    site = said or asked
    names = list(unsaid)
    if site is None and names:
        number = layer_in(names[0])[0]
        raise ValidationError(
            f"{file} names its tensors {names[0][:60]!r} and the like, which doesn't say which stream they are of: "
            f"pass site='input' if {number} is the block that the stream enters (layer {number} here), or "
            f"site='output' if it is the block that gives it, as with outputs of Hugging Face modules (layer "
            f"{number + 1} here). In the shell: mechanex vectors import FILE --site output."
        )
    return int(site == "output")
