"""``mechanex doctor``: the report of ``python -m mechanex``, the credentials, and whether the server answers."""

from __future__ import annotations

import os
from dataclasses import asdict

import click

from ..client import Mechanex
from ..doctor import examine
from ..errors import MechanexError
from ..remote.identity import NAMES
from .console import echo_json, model_text

__all__ = ["run_doctor"]

_PATIENCE = 5.0


def run_doctor(client: Mechanex | None, offline: bool, as_json: bool) -> None:
    """Prints the report; what doesn't work is part of it, and no failure of the command."""
    client = client or Mechanex()
    report = examine()
    account = _account(client, offline)
    if as_json:
        echo_json({**asdict(report), "account": account})
        return
    click.echo(str(report))
    click.echo("")
    for name, value in account.items():
        click.echo(f"{name}: {model_text(value).plain}")


def _account(client: Mechanex, offline: bool) -> dict[str, str]:
    """What there is to reach a server with, in words; secrets are told by their names only."""
    credentials = client.transport.credentials
    found = {}
    try:
        path = credentials.file.path
        found["credentials file"] = f"{path} ({'there' if path.exists() else 'not there'})"
    except MechanexError as error:
        found["credentials file"] = f"none: {error}"
    try:
        server = client.transport.address
        known = credentials.current(server.origin)
    except MechanexError as error:
        return {**found, "server": f"unusable: {error}"}
    held = ", ".join(name for name in NAMES if getattr(known, name))
    origin = " (from MECHANEX_API_KEY)" if os.environ.get("MECHANEX_API_KEY") else ""
    found |= {"credentials": f"{held}{origin}" if held else "none", "server": server.url}
    if offline:
        found["server answers"] = "not asked: --offline"
    elif not known and not server.chosen:
        found["server answers"] = "not asked: there are no credentials for it"
    else:
        try:
            client.transport.call("GET", "/models", timeout=_PATIENCE)
            found["server answers"] = "yes"
        except MechanexError as error:
            found["server answers"] = f"no: {error}"
        if credentials.has_ended(server.origin):
            found["credentials"] += ": the session has ended, run mechanex login"
    return found
