"""``vllm serve MODEL $(python -m mechanex.vllm.options)``: the options with which vLLM's own command steers."""

from __future__ import annotations

import json
import sys

import click

from ..errors import MechanexError
from .capacity import Capacity
from .supported import SCHEDULER, WORKER

__all__ = ["command", "main", "steering_options"]

_MIDDLEWARE = "mechanex.vllm.middleware.SteeringMiddleware"


def steering_options(capacity: Capacity) -> list[str]:
    """The options of ``vllm serve`` with which it steers, none with a space in it."""
    return [
        f"--worker-cls={WORKER}",
        f"--scheduler-cls={SCHEDULER}",
        f"--middleware={_MIDDLEWARE}",
        f"--additional-config={json.dumps(capacity.config(), separators=(',', ':'))}",
    ]


@click.command()
@click.option("--slots", default=Capacity.slots, show_default=True, help="Different vectors at a time.")
@click.option("--per-token", default=Capacity.per_token, show_default=True, help="Most vectors of a request.")
@click.option("--rank", default=Capacity.rank, show_default=True, help="Largest rank of an edit.")
@click.option("--gates", is_flag=True, help="Edits may have gates.")
@click.option("--behaviors", is_flag=True, help="Compiled models may be watched.")
def command(slots: int, per_token: int, rank: int, gates: bool, behaviors: bool) -> None:
    """Prints the options of vllm serve with which it steers."""
    click.echo(" ".join(steering_options(Capacity(slots, per_token, rank, gates, behaviors))))


def main() -> None:
    """Runs the command. A shell starts vLLM whatever becomes of it, so an error prints what vLLM refuses."""
    try:
        command(standalone_mode=False)
    except (click.ClickException, MechanexError) as error:
        click.echo("--mechanex-options-are-wrong")
        sys.exit(f"Error: {error.format_message() if isinstance(error, click.ClickException) else error}")


if __name__ == "__main__":
    main()
