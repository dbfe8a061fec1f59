"""Where a model's files are: in the package, in a local folder, or on the Hub; and errors that help."""

from __future__ import annotations

import os
import re
import socket
from dataclasses import dataclass
from pathlib import Path

from ...errors import AuthenticationError, MechanexError, NotFoundError, ValidationError
from .aliases import hub_name
from .bundled import bundled_names, bundled_path
from .packaged import PACKAGED, packaged_path

__all__ = ["ADAPTER_CONFIG", "Source", "explain", "find_source"]

ADAPTER_CONFIG = "adapter_config.json"

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True)
class Source:
    """A place to load from.

    Args:
        location: what transformers is given: a folder or a Hub name.
        name: how the model is called in messages and metadata.
        kind: "bundled", "folder" (also of a packaged model) or "hub".
        typed: what the user asked for.
    """

    location: str
    name: str
    kind: str
    typed: str


def find_source(name_or_path: str | os.PathLike[str], *, ask_transformer_lens: bool = False) -> Source:
    """Decides what a name or path means: a bundled model, then an existing folder, a packaged model, a Hub name.

    Args:
        name_or_path: a bundled name, a folder, the name of a packaged model, a TransformerLens short name, or a
            Hub name.
        ask_transformer_lens: resolve short names through TransformerLens' table too.

    Raises:
        ValidationError: not a name, or a path to something else than a model's folder.
        NotFoundError: a path where there is nothing, or a packaged model that can't be fetched.
    """
    if not isinstance(name_or_path, str | os.PathLike) or not os.fspath(name_or_path):
        raise ValidationError(
            f"A model is named by a string or a path; got {name_or_path!r}. Bundled: {_bundled_list()}."
        )
    typed = os.fspath(name_or_path)
    if isinstance(name_or_path, str) and (folder := bundled_path(typed)) is not None:
        return Source(str(folder), typed, "bundled", typed)
    path = Path(typed).expanduser()
    if path.exists():
        _check_folder(path)
        return Source(str(path), typed, "folder", typed)
    if isinstance(name_or_path, str) and (folder := packaged_path(typed)) is not None:
        return Source(str(folder), typed, "folder", typed)
    if isinstance(name_or_path, os.PathLike) or not _HUB_NAME.fullmatch(typed):
        raise NotFoundError(
            f"There is no model folder at {path.absolute()}. Give an existing folder that save_pretrained "
            f"wrote, a bundled name ({_bundled_list()}) or a Hub name such as 'gpt2'."
        )
    name = hub_name(typed, ask_transformer_lens=ask_transformer_lens)
    return Source(name, name, "hub", typed)


def _check_folder(path: Path) -> None:
    if path.is_file():
        raise ValidationError(
            f"{path} is a file; a model is loaded from a folder with config.json, weights and tokenizer. "
            f"Give the folder (for a GGUF file: the folder, and gguf_file={path.name!r})."
        )
    known = (path / name for name in ("config.json", ADAPTER_CONFIG))
    if not any(file.exists() for file in known) and not any(path.glob("*.gguf")):
        raise ValidationError(
            f"The folder {path} holds no config.json, so it isn't a saved model. "
            "Write one with model.save_pretrained(folder) and tokenizer.save_pretrained(folder)."
        )


def _bundled_list() -> str:
    return ", ".join([*bundled_names(), *PACKAGED])


def unreachable() -> bool:
    """Whether the Hub can't be reached, or must not be.

    Asking first costs milliseconds; finding out by downloading costs half a minute of retries. Behind a proxy
    names need not resolve here, so then the download itself has to tell.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return True
    if {"HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY"} & {name.upper() for name in os.environ}:
        return False
    host = re.sub(r"^\w+://|[:/].*$", "", constants.ENDPOINT)
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        return True
    return False


def explain(error: Exception, source: Source, part: str) -> MechanexError:
    """The library's own error for what transformers raised while it read a model.

    Args:
        error: what was raised.
        source: what was being read.
        part: "configuration", "weights", "adapter" or "tokenizer".
    """
    text, names = str(error), _chain(error)
    first = text.strip().split("\n")[0]
    if "GatedRepoError" in names or "gated repo" in text:
        return AuthenticationError(
            f"{source.name} is a gated model on the Hub and your account has no access. Ask for it on the "
            "model's page, then run `hf auth login` or pass token=….",
            details=text,
        )
    if "trust_remote_code" in text:
        return ValidationError(
            f"{source.name} runs Python code of its own that comes with the model. If you have read it and "
            "trust it, pass trust_remote_code=True.",
            details=text,
        )
    reached = "RepositoryNotFoundError" in names
    if source.kind == "hub" and (reached or names & {"LocalEntryNotFoundError", "OfflineModeIsEnabled"}):
        return _not_on_hub(source, reached=reached, details=text)
    if part == "configuration" and ("model type" in text or "model_type" in text):
        return ValidationError(
            f"{source.name} is of a kind that the installed transformers doesn't know: {first} "
            "A newer transformers may (pip install --upgrade transformers).",
            details=text,
        )
    reason = f"{type(error).__name__}: {first}"
    return ValidationError(
        f"The {part} of {source.name} could not be read from {source.location}: {reason}", details=text
    )


def _not_on_hub(source: Source, *, reached: bool, details: str) -> NotFoundError:
    from huggingface_hub import constants

    meaning = "" if source.name == source.typed else f" (short for {source.name!r})"
    cache = Path(constants.HF_HUB_CACHE) / f"models--{source.name.replace('/', '--')}"
    hub = (
        "the Hub has no such model, or it is private (then run `hf auth login`)"
        if reached
        else "the Hub could not be reached from here"
    )
    return NotFoundError(
        f"No model {source.typed!r}{meaning}: it is not a bundled model ({_bundled_list()}), there is no "
        f"folder {Path(source.typed).absolute()}, nothing complete in the cache at {cache}, and {hub}. Check "
        "the name, give a folder that save_pretrained wrote, or connect once so that it can be downloaded.",
        details=details,
    )


def _chain(error: BaseException | None) -> set[str]:
    """Class names of an error, of its bases, and of what caused it."""
    names: set[str] = set()
    while error is not None:
        names |= {c.__name__ for c in type(error).__mro__}
        error = error.__cause__ or error.__context__
    return names
