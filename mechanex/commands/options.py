"""What the options of several commands have in common: their texts, how they are asked for and completed."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ..bundled import dataset_names, model_names

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    Completer = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]

__all__ = [
    "Asked",
    "chat_option",
    "complete_dataset",
    "complete_model",
    "device_option",
    "dtype_option",
    "email_option",
    "json_option",
    "layer_option",
    "model_argument",
    "new_password_option",
    "password_option",
    "seed_option",
    "split_option",
]

Decorated = TypeVar("Decorated", bound=Callable[..., Any])


class Asked(click.Option):
    """An option that is asked for on stderr; where stdin is no terminal, it is the next line there."""

    def prompt_for_value(self, ctx: click.Context) -> Any:
        if sys.stdin is not None and sys.stdin.isatty():
            try:
                return click.prompt(
                    str(self.prompt),
                    type=self.type,
                    hide_input=self.hide_input,
                    confirmation_prompt=self.confirmation_prompt,
                    err=True,
                )
            except click.Abort:
                if not self.hide_input:
                    click.echo(err=True)  # "Aborted!" gets a line of its own
                raise
        line = sys.stdin.readline().rstrip("\r\n") if sys.stdin is not None else ""
        if not line:
            raise click.UsageError(f"{self.opts[0]} is missing, and there is no terminal to ask for it.", ctx)
        return line


def _completed(names: Callable[[], list[str]]) -> Completer:
    """Has shells complete by these names and by files."""

    def complete(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        from click.shell_completion import CompletionItem

        named = [CompletionItem(name) for name in names() if name.startswith(incomplete)]
        # First, because bash's script forgets what came before it; it then takes files where no name fits.
        return [CompletionItem(incomplete, type="file"), *named]

    return complete


complete_model = _completed(model_names)
complete_dataset = _completed(dataset_names)

model_argument = click.argument("model", shell_complete=complete_model)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
seed_option = click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of every random draw."
)
split_option = click.option(
    "--split", help="Use only the lines of --data whose split is this, such as train."
)
device_option = click.option(
    "--device", show_default="a GPU where there is one", help="Such as cpu or cuda:0."
)
dtype_option = click.option("--dtype", show_default="the checkpoint's", help="Such as bfloat16 or float32.")
email_option = click.option(
    "--email", cls=Asked, prompt="Email", envvar="MECHANEX_EMAIL", help="Your email address."
)
password_option = click.option(
    "--password",
    cls=Asked,
    prompt=True,
    hide_input=True,
    envvar="MECHANEX_PASSWORD",
    help="Your password; better typed, piped or in MECHANEX_PASSWORD than given here.",
)
new_password_option = click.option(
    "--new-password",
    cls=Asked,
    prompt=True,
    hide_input=True,
    confirmation_prompt=True,
    envvar="MECHANEX_NEW_PASSWORD",
    help="The next one; better typed, piped or in MECHANEX_NEW_PASSWORD than given here.",
)


def chat_option(repeated: str) -> Callable[[Decorated], Decorated]:
    """``--chat`` and ``--continue-final-message``."""
    chat = click.option(
        "--chat",
        "chats",
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        multiple=True,
        help=f"JSON file of chat messages, written by the model's chat template; {repeated}.",
    )
    goes_on = click.option(
        "--continue-final-message",
        is_flag=True,
        help="Go on with the last message of --chat instead of answering it.",
    )
    return lambda command: chat(goes_on(command))


def layer_option(repeated: str) -> Callable[[Decorated], Decorated]:
    """``--layer``, which says what it means to repeat it."""
    return click.option(
        "--layer",
        "layers",
        type=int,
        multiple=True,
        show_default="at two thirds",
        help=f"Layer to steer, negatives from the end; {repeated}.",
    )
