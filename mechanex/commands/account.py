"""The account commands: sign up, log in and out, API keys. No password, token or stored key is ever printed."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import click
from rich.table import Table

from ..client import Mechanex
from ..errors import MechanexError
from .console import console, echo_json, json_text, model_text

__all__ = [
    "run_change_password",
    "run_create_api_key",
    "run_delete_account",
    "run_delete_api_key",
    "run_end_session",
    "run_list_api_keys",
    "run_list_sessions",
    "run_login",
    "run_logout",
    "run_signup",
    "run_whoami",
]

# What servers answer to the log-in of an address that waits to be confirmed.
_NOT_YET_CONFIRMED = (400, 401, 403, 422)


def run_signup(client: Mechanex | None, email: str, password: str) -> None:
    """Signs up, logs in, and makes and stores an API key.

    Raises:
        MechanexError: whatever the server or the file of credentials objects to; says how far it came.
    """
    client = client or Mechanex()
    if not client.signup(email, password).get("session"):
        try:
            client.login(email, password)
        except MechanexError as error:
            if error.status_code not in _NOT_YET_CONFIRMED:
                raise MechanexError(
                    f"{email} is signed up, but not logged in ({error}): run mechanex login, then mechanex "
                    "create-api-key --save."
                ) from error
            click.echo(
                f"Signed up as {email}. Confirm the address as the server's mail says, then run: mechanex login"
            )
            return
    try:
        key = client.create_api_key()["key"]
    except MechanexError as error:
        raise MechanexError(
            f"{email} is signed up and logged in, but has no API key yet ({error}): run mechanex create-api-key "
            "--save."
        ) from error
    try:
        _store(client, key)
    except MechanexError as error:
        click.echo(model_text(key).plain)
        raise MechanexError(
            f"{email} is signed up and logged in, but the new API key, which is on stdout this once, is not "
            f"stored: {error}"
        ) from error
    click.echo(f"Signed up and logged in as {email}. An API key is stored in {_path(client)}.")
    _mind_the_environment()


def run_login(client: Mechanex | None, email: str, password: str) -> None:
    """Logs in and stores the tokens."""
    client = client or Mechanex()
    client.login(email, password)
    click.echo(f"Logged in as {email}. The credentials are stored in {_path(client)}.")
    _mind_the_environment()


def run_list_api_keys(client: Mechanex | None, as_json: bool) -> None:
    """Prints the account's keys, of which the server shows no more than their beginning."""
    keys = (client or Mechanex()).list_api_keys()
    if as_json:
        echo_json(keys)
        return
    if not keys:
        click.echo("There are no API keys. To make one: mechanex create-api-key")
        return
    _print_table(keys, ("name", "key", "scopes", "created_at", "expires_at", "last_used", "id"))


def run_create_api_key(
    client: Mechanex | None,
    name: str,
    save: bool,
    as_json: bool,
    scopes: Sequence[str] = (),
    expires_days: float | None = None,
) -> None:
    """Makes a key and prints it: alone on stdout, so that it can be piped.

    Raises:
        MechanexError: whatever the server objects to; after the key is printed, that it can't be stored.
    """
    client = client or Mechanex()
    made = client.create_api_key(name, scopes=scopes or None, expires_days=expires_days)
    click.echo(f"A new API key, {name!r}, which is shown this once.", err=True)
    if as_json:
        echo_json(made)
    else:
        click.echo(model_text(made["key"]).plain)
    if save:
        try:
            _store(client, made["key"])
        except MechanexError as error:
            raise MechanexError(f"the new key is not stored: {error}") from error
        click.echo(f"It is stored in {_path(client)}.", err=True)


def run_delete_api_key(client: Mechanex | None, key_id: str) -> None:
    """Ends a key, and says so."""
    (client or Mechanex()).delete_api_key(key_id)
    click.echo("The API key is deleted: it opens nothing any more.")


def run_list_sessions(client: Mechanex | None, as_json: bool) -> None:
    """Prints the account's sessions."""
    sessions = (client or Mechanex()).list_sessions()
    if as_json:
        echo_json(sessions)
    elif not sessions:
        click.echo("There are no sessions: nobody is logged in.")
    else:
        _print_table(sessions, ("created_at", "expires_at", "id"))


def run_end_session(client: Mechanex | None, session_id: str) -> None:
    """Ends a session, and says so."""
    (client or Mechanex()).end_session(session_id)
    click.echo("The session is ended: its tokens open nothing any more.")


def run_change_password(client: Mechanex | None, password: str, new_password: str) -> None:
    """Changes the password and stores the new session's tokens."""
    client = client or Mechanex()
    client.change_password(password, new_password)
    click.echo(
        f"The password is changed, and other sessions have ended. This one's tokens are in {_path(client)}."
    )


def run_delete_account(client: Mechanex | None, password: str) -> None:
    """Deletes the account, and says so."""
    (client or Mechanex()).delete_account(password)
    click.echo("The account and everything that it had made are deleted.")


def run_whoami(client: Mechanex | None, as_json: bool) -> None:
    """Prints what the server tells about the account."""
    user = (client or Mechanex()).whoami()
    if as_json:
        echo_json(user)
        return
    table = Table.grid(padding=(0, 2))
    for name, value in user.items():
        table.add_row(model_text(name, "bold"), model_text(_shown(value)))
    console().print(table)


def run_logout(client: Mechanex | None) -> None:
    """Removes the stored credentials of every server."""
    client = client or Mechanex()
    if client.logout():
        click.echo(f"Logged out: the credentials in {_path(client)} are removed.")
    else:
        click.echo("There were no stored credentials.")
    if os.environ.get("MECHANEX_API_KEY"):
        click.echo("MECHANEX_API_KEY is still set, and is used.", err=True)


def _print_table(records: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> None:
    table, records = Table(), list(records)
    # A terminal is 80 characters wide: what no record has takes no room.
    columns = [column for column in columns if any(record.get(column) is not None for record in records)]
    for column in columns:
        table.add_column(column.replace("_", " "), overflow="fold")
    for record in records:
        table.add_row(*(model_text(_shown(record.get(column))) for column in columns))
    console().print(table)


def _store(client: Mechanex, key: str) -> None:
    credentials, origin = client.transport.credentials, client.transport.address.origin
    credentials.set_key(key, origin, same_account=True, persist=True)


def _path(client: Mechanex) -> str:
    return str(client.transport.credentials.file.path)


def _mind_the_environment() -> None:
    if os.environ.get("MECHANEX_API_KEY"):
        click.echo("MECHANEX_API_KEY is set, and goes before the stored credentials.", err=True)


def _shown(value: Any) -> str:
    if isinstance(value, list) and all(isinstance(one, str) for one in value):
        return ", ".join(value)
    return "" if value is None else value if isinstance(value, str) else json_text(value)
