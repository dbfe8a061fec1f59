"""Access tokens are kept as hashes; they were signed, and nothing was kept of them."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "3"
down_revision = "2"


def upgrade() -> None:
    """Adds the access token of each pair, and when it ends."""
    op.add_column("mechanex_refresh_tokens", sa.Column("access_hash", sa.String(64)))
    op.add_column("mechanex_refresh_tokens", sa.Column("access_expires_at", sa.Double))
    op.create_index("mechanex_refresh_tokens_access", "mechanex_refresh_tokens", ["access_hash"], unique=True)
