"""Everything that a server can be told, checked once when it starts."""

from __future__ import annotations

import ipaddress
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from ..errors import ValidationError

__all__ = ["ServerSettings"]

KEY_VARIABLE = "MECHANEX_SERVER_KEY"
_LEAST_KEY = 16


@dataclass(frozen=True)
class ServerSettings:
    """How a server listens, whom it lets in, and how much it takes on.

    Args:
        host: address to bind. Anything but a loopback address needs a key from every client.
        port: TCP port; 0 lets the system choose a free one.
        key: the key that opens the whole server; None for ``MECHANEX_SERVER_KEY``. Where that is missing too and
            one is needed, ``serve_loaded`` makes one and prints it. A key that was given is asked for on a loopback
            address too.
        database: SQLAlchemy URL of the accounts; None for ``server.sqlite`` under ``MECHANEX_HOME``.
        vectors: folder of vector files that every client may use; a file's name without suffix is its id.
        behaviors: what every client may use: files of contrastive examples, of which vectors are made, and
            ``.safetensors`` files of behaviors, which are watched.
        corrected_behaviors: names of behaviors that are watched and corrected in every answer (one that is a vector
            alone steers every answer), but those to requests that name behaviors themselves.
        pinecone_indexes: those that any account may have documents read from, with this process's ``PINECONE_API_KEY``.
        model_name: the name that clients see; None for the loaded model's.
        max_batch: most requests that are decoded together.
        max_waiting: most requests that wait for a place; a later one gets 429, but for a sender who has less than an
            equal share of them.
        account_running: most requests of one account that are decoded together; the others wait. None for any number.
        account_tokens_per_minute: tokens of prompts and answers that one account, or one address without an account,
            has in a minute; 429 where they are used up. None for any number.
        max_cache_tokens: most positions that the rows of the batch may come to hold together, padding included; a
            request that needs more by itself runs alone. None: as many as fit into half of the memory that is free
            when the server starts.
        prefix_bytes: most memory of keys and values that are kept of answered requests, for those of the same sender
            that begin alike; 0 keeps none. None: a sixteenth of the free memory, 1 GiB at most.
        prefill_tokens: most prompt tokens (padding included) that are read between two decoding steps.
        max_body_bytes: largest request body.
        max_choices: most answers that one request may ask for (prompts times ``n``).
        max_logprobs: most log-probabilities that one answer may hold: answers times tokens times (top + 1).
        max_examples: most contrastive examples that one vector is computed from at a client's wish.
        max_example_layers: most layers that it may have.
        max_vectors: most steering vectors, and most behaviors, that one account may keep.
        max_account_bytes: most bytes that the vectors and behaviors of one account may take together.
        request_timeout: seconds from a request's arrival to its last token.
        shutdown_grace: seconds that running answers get to finish after SIGTERM.
        trusted_proxies: addresses and networks of proxies whose ``X-Forwarded-For`` and ``X-Forwarded-Proto`` are
            believed; of anybody else they aren't.
        cors_origins: origins that browsers may call from; empty for none.
        rate_limit: requests per minute of one client to the account endpoints; none where only this machine connects.
        api_rate_limit: requests per minute of one account (or the server's key) to the Axionic API, likewise.
        open_signup: whether anyone may make an account on a server that other machines reach; else it takes the
            server's key.
        access_token_minutes: lifetime of an access token.
        refresh_token_days: lifetime of a refresh token.
        log_prompts: whether the log has the prompts of the OpenAI API.

    Raises:
        ValidationError: a value out of its range.
    """

    host: str = "0.0.0.0"
    port: int = 8000
    key: str | None = field(default=None, repr=False)
    database: str | None = field(default=None, repr=False)
    vectors: Path | None = None
    behaviors: tuple[Path, ...] = ()
    corrected_behaviors: tuple[str, ...] = ()
    pinecone_indexes: tuple[str, ...] = ()
    model_name: str | None = None
    max_batch: int = 64
    max_waiting: int = 512
    account_running: int | None = None
    account_tokens_per_minute: int | None = None
    max_cache_tokens: int | None = None
    prefix_bytes: int | None = None
    prefill_tokens: int = 4096
    max_body_bytes: int = 4 * 2**20
    max_choices: int = 128
    max_logprobs: int = 200_000
    max_examples: int = 256
    max_example_layers: int = 16
    max_vectors: int = 1000
    max_account_bytes: int = 2**30
    request_timeout: float = 600.0
    shutdown_grace: float = 4.0
    trusted_proxies: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    rate_limit: int = 60
    api_rate_limit: int = 1200
    open_signup: bool = False
    access_token_minutes: float = 15.0
    refresh_token_days: float = 30.0
    log_prompts: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.host, str) or not self.host:
            raise ValidationError(f"host is an address such as 127.0.0.1 or 0.0.0.0; got {self.host!r}.")
        if not _is_whole(self.port, 0, 65535):
            raise ValidationError(f"port is a number from 0 to 65535; got {self.port!r}.")
        if self.key is not None:
            _checked_key(self.key)
        counts = (
            "max_batch",
            "max_waiting",
            "prefill_tokens",
            "max_body_bytes",
            "max_choices",
            "max_logprobs",
            "max_examples",
            "max_example_layers",
            "max_vectors",
            "max_account_bytes",
            "rate_limit",
            "api_rate_limit",
        )
        for name in counts:
            _check_whole(name, getattr(self, name), 1)
        for name in ("max_cache_tokens", "account_running", "account_tokens_per_minute"):
            if getattr(self, name) is not None:
                _check_whole(name, getattr(self, name), 1)
        if self.prefix_bytes is not None:
            _check_whole("prefix_bytes", self.prefix_bytes, 0)
        for name in ("pinecone_indexes", "trusted_proxies", "cors_origins"):
            if isinstance(getattr(self, name), str):
                raise ValidationError(f"{name} is a list of names; got the text {getattr(self, name)!r}.")
        for proxy in self.trusted_proxies:
            _check_network(proxy)
        for name in ("request_timeout", "shutdown_grace", "access_token_minutes", "refresh_token_days"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
                raise ValidationError(f"{name} is a finite number above 0; got {value!r}.")

    @cached_property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the bound address; the peer's address never decides."""
        if self.host.lower() == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host.strip("[]")).is_loopback
        except ValueError:
            return False

    def server_key(self, environ: Mapping[str, str] | None = None) -> str | None:
        """The key that opens the whole server: ``key``, or ``MECHANEX_SERVER_KEY``, or None; spaces around it go.

        Raises:
            ValidationError: the variable holds what is no key, or one that could be guessed from other machines.
        """
        key = self.key
        if key is None:
            key = (os.environ if environ is None else environ).get(KEY_VARIABLE) or None
        if key is None:
            return None
        key = _checked_key(key)
        if len(key) < _LEAST_KEY and not self.is_loopback:
            raise ValidationError(
                f"the server's key has {len(key)} characters, and on an address that others reach it needs "
                f"{_LEAST_KEY}: python -c 'import secrets; print(secrets.token_urlsafe(32))' makes one."
            )
        return key


def _checked_key(key: object) -> str:
    stripped = key.strip() if isinstance(key, str) else ""
    if not stripped or not stripped.isascii() or not stripped.isprintable():
        raise ValidationError(
            f"the server's key (key=… or {KEY_VARIABLE}) is a text of printable ASCII characters, not empty."
        )
    return stripped


def _check_network(text: object) -> None:
    try:
        ipaddress.ip_network(text if isinstance(text, str) else "")
    except ValueError as error:
        raise ValidationError(
            f"a trusted proxy is an address such as 10.0.0.7 or a network such as 10.0.0.0/8; got {text!r}."
        ) from error


def _check_whole(name: str, value: object, least: int) -> None:
    if not _is_whole(value, least):
        raise ValidationError(f"{name} is a whole number of {least} or more; got {value!r}.")


def _is_whole(value: object, least: int, most: float = math.inf) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most
