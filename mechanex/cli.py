"""The ``mechanex`` command: the documented account commands here, the others in ``commands`` and ``demo``.

What a command needs is imported when it runs, so that ``--help`` is quick.
"""

from __future__ import annotations

import sys
from typing import Any

import click

from ._version import __version__
from .commands import doses, inside, research, sae_group, tools, with_model
from .commands.group import Group
from .commands.options import email_option, json_option, new_password_option, password_option
from .demo.command import demo

__all__ = [
    "change_password",
    "create_api_key",
    "delete_account",
    "delete_api_key",
    "end_session",
    "list_api_keys",
    "list_sessions",
    "login",
    "logout",
    "main",
    "signup",
    "whoami",
]


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="mechanex")
@click.pass_context
def main(ctx: click.Context) -> None:
    """Mechanex: change what a language model does by editing its residual stream."""


@main.command(short_help="Make an Axionic account, log in, get an API key.")
@email_option
@password_option
@click.pass_obj
def signup(obj: Any, email: str, password: str) -> None:
    """Sign up for a new Axionic account, log in, and generate an API key."""
    from .commands.account import run_signup

    run_signup(obj, email, password)


@main.command()
@email_option
@password_option
@click.pass_obj
def login(obj: Any, email: str, password: str) -> None:
    """Log in to your Axionic account."""
    from .commands.account import run_login

    run_login(obj, email, password)


@main.command()
@json_option
def list_api_keys(*, as_json: bool = False) -> None:
    """List your Axionic API keys."""
    from .commands.account import run_list_api_keys

    run_list_api_keys(click.get_current_context().obj, as_json)


@main.command()
@click.option("--name", default="Default Key", show_default=True, help="Name for the new API key.")
@click.option("--save", is_flag=True, help="Use the key from now on: store it with the credentials.")
@click.option(
    "--scope",
    "scopes",
    multiple=True,
    type=click.Choice(["generate", "vectors", "admin"]),
    help="What the key may do (several times for several); all of it without this. For a server of your own.",
)
@click.option(
    "--expires-days",
    type=click.FloatRange(0, min_open=True),
    help="Days until it ends; without this it doesn't. For a server of your own.",
)
@json_option
def create_api_key(
    name: str,
    *,
    scopes: tuple[str, ...] = (),
    expires_days: float | None = None,
    save: bool = False,
    as_json: bool = False,
) -> None:
    """Create a new Axionic API key, and print it this once."""
    from .commands.account import run_create_api_key

    run_create_api_key(click.get_current_context().obj, name, save, as_json, scopes, expires_days)


@main.command()
@click.argument("key_id")
def delete_api_key(key_id: str) -> None:
    """End an API key at once. KEY_ID is the id that list-api-keys shows."""
    from .commands.account import run_delete_api_key

    run_delete_api_key(click.get_current_context().obj, key_id)


@main.command()
@json_option
def whoami(*, as_json: bool = False) -> None:
    """Show the current logged-in user and profile info."""
    from .commands.account import run_whoami

    run_whoami(click.get_current_context().obj, as_json)


@main.command()
def logout() -> None:
    """Log out: end the session on the server, and remove stored credentials."""
    from .commands.account import run_logout

    run_logout(click.get_current_context().obj)


@main.command()
@json_option
def list_sessions(*, as_json: bool = False) -> None:
    """List the sessions of your Axionic account, one for each log-in."""
    from .commands.account import run_list_sessions

    run_list_sessions(click.get_current_context().obj, as_json)


@main.command()
@click.argument("session_id")
def end_session(session_id: str) -> None:
    """End a session at once. SESSION_ID is the id that list-sessions shows."""
    from .commands.account import run_end_session

    run_end_session(click.get_current_context().obj, session_id)


@main.command()
@password_option
@new_password_option
def change_password(password: str, new_password: str) -> None:
    """Change your password; all sessions end, and this one goes on."""
    from .commands.account import run_change_password

    run_change_password(click.get_current_context().obj, password, new_password)


@main.command()
@password_option
@click.confirmation_option(prompt="Delete the account with its vectors, behaviors and keys?")
def delete_account(password: str) -> None:
    """Delete your Axionic account with everything that it has made."""
    from .commands.account import run_delete_account

    run_delete_account(click.get_current_context().obj, password)


for _command in (
    *(research.activations, research.orthogonalize),
    *(
        with_model.chat,
        with_model.steer,
        with_model.score,
        with_model.cite,
        with_model.optimize,
        with_model.serve,
        demo,
    ),
    *(doses.measure, doses.sweep),
    *(tools.models, tools.vectors, tools.doctor, sae_group.sae, inside.model, inside.attribute),
):
    main.add_command(_command)


if __name__ == "__main__":
    sys.exit(main())
