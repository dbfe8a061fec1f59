"""Alembic's folder: ``versions`` has one step for each version of the schema, from the first on."""
