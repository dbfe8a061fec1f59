"""From any earlier version of the database's tables to the newest, by Alembic."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

from sqlalchemy import Connection, inspect, select, update

from .schema import VERSION, VERSION_TABLE, schema_info

__all__ = ["migrate"]

_FOLDER = Path(__file__).parent / "migrations"

# A migration reaches its connection through Alembic's modules: one at a time in a process.
_one = threading.Lock()


def migrate(connection: Connection) -> None:
    """Makes a database without tables of ours, or of ``OLDEST_VERSION`` or later, one of ``VERSION``.

    Args:
        connection: in a transaction, which takes all of it back where a step fails.
    """
    # Most starts need no step, and so nothing of Alembic.
    from alembic import command
    from alembic.config import Config

    logging.getLogger("alembic").setLevel(logging.WARNING)
    config = Config()
    config.set_main_option("script_location", str(_FOLDER).replace("%", "%%"))
    config.attributes["connection"] = connection
    with _one:
        if inspect(connection).has_table(schema_info.name):
            # Another process may be doing the same: the second waits here, and finds it done.
            found = connection.scalar(select(schema_info.c.version).with_for_update())
            if not inspect(connection).has_table(VERSION_TABLE):
                _note(connection, str(found))
        command.upgrade(config, "head")
        connection.execute(update(schema_info).values(version=VERSION))


def _note(connection: Connection, revision: str) -> None:
    """Says that the steps up to this one, which an earlier version has taken without Alembic, are done."""
    from alembic.runtime.migration import MigrationContext
    from alembic.script import ScriptDirectory

    script = ScriptDirectory(str(_FOLDER))
    context = MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE})
    context.stamp(script, revision)
