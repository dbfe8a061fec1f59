"""``mechanex models``: names that ``load`` and the server know."""

from __future__ import annotations

from rich.table import Table

from ..bundled import model_names
from ..client import Mechanex
from ..remote.answers import names
from .console import console, echo_json, model_text

__all__ = ["run_models"]


def run_models(client: Mechanex | None, local: bool, as_json: bool) -> None:
    """Prints the bundled models and, unless ``local``, those of the server where one is known.

    Raises:
        MechanexError: the server doesn't answer with its models.
    """
    client = client or Mechanex()
    found = [{"name": name, "where": "bundled"} for name in model_names()]
    server = client.transport.address
    if not local and (client.is_remote or server.chosen):
        there = names(client.transport.get("/models"), "models")
        found += [{"name": name, "where": server.url} for name in there]
    if as_json:
        echo_json(found)
        return
    table = Table()
    for column in ("name", "where"):
        table.add_column(column, overflow="fold")
    for one in found:
        table.add_row(model_text(one["name"]), model_text(one["where"]))
    console().print(table)
