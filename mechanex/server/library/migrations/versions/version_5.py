"""Keys that end and may do some things only, refresh tokens by their descent, and the bytes that files take."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "5"
down_revision = "4"


def upgrade() -> None:
    """Adds the columns."""
    op.add_column("mechanex_api_keys", sa.Column("expires_at", sa.Double))
    op.add_column("mechanex_api_keys", sa.Column("scopes", sa.String(64)))
    op.add_column("mechanex_refresh_tokens", sa.Column("parent_hash", sa.String(64)))
    op.add_column("mechanex_vectors", sa.Column("n_bytes", sa.BigInteger))
    op.add_column("mechanex_behaviors", sa.Column("n_bytes", sa.BigInteger))
