"""How Alembic runs the migrations: on the connection that it is handed, in that one's transaction."""

from __future__ import annotations

from alembic import context

from mechanex.server.library.schema import VERSION_TABLE

context.configure(connection=context.config.attributes["connection"], version_table=VERSION_TABLE)
context.run_migrations()
