"""The tables of schema version 2."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "2"
down_revision = None

_ID = sa.String(32)
_HASH = sa.String(64)


def upgrade() -> None:
    """Makes the tables, and the account that requests without one act as."""
    op.create_table(
        "mechanex_schema",
        sa.Column("version", sa.Integer, primary_key=True, autoincrement=False),
    )
    op.execute("INSERT INTO mechanex_schema (version) VALUES (2)")
    op.create_table(
        "mechanex_users",
        sa.Column("id", _ID, primary_key=True),
        sa.Column("email", sa.String(320), unique=True),
        sa.Column("password_hash", sa.Text),
        sa.Column("model_name", sa.Text),
        sa.Column("created_at", sa.Double, nullable=False),
    )
    op.execute("INSERT INTO mechanex_users (id, created_at) VALUES ('local', 0.0)")
    op.create_table(
        "mechanex_sessions",
        sa.Column("id", _ID, primary_key=True),
        _of_account(index=True),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.Column("expires_at", sa.Double, nullable=False, index=True),
        sa.Column("revoked_at", sa.Double),
    )
    op.create_table(
        "mechanex_refresh_tokens",
        sa.Column("token_hash", _HASH, primary_key=True),
        sa.Column(
            "session_id",
            _ID,
            sa.ForeignKey("mechanex_sessions.id", ondelete="CASCADE"),
            nullable=False,
            index=True,
        ),
        sa.Column("used_at", sa.Double),
    )
    op.create_table(
        "mechanex_api_keys",
        sa.Column("id", _ID, primary_key=True),
        _of_account(index=True),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("key_hash", _HASH, nullable=False, unique=True),
        sa.Column("shown", sa.String(16), nullable=False),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.Column("last_used", sa.Double),
    )
    op.create_table(
        "mechanex_vectors",
        sa.Column("id", _ID, primary_key=True),
        _of_account(index=True),
        sa.Column("created_at", sa.Double, nullable=False),
    )
    op.create_table(
        "mechanex_behaviors",
        sa.Column("id", _ID, primary_key=True),
        _of_account(index=False),
        sa.Column("behavior_name", sa.String(200), nullable=False),
        sa.Column("description", sa.Text, nullable=False),
        sa.Column("vector_id", _ID, sa.ForeignKey("mechanex_vectors.id"), nullable=False),
        sa.Column("examples", sa.Text, nullable=False),
        sa.Column("n_examples", sa.Integer, nullable=False),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.UniqueConstraint("user_id", "behavior_name", name="mechanex_behaviors_one_name"),
    )
    op.create_index("mechanex_behaviors_vector", "mechanex_behaviors", ["vector_id"])


def _of_account(*, index: bool) -> sa.Column[str]:
    owner = sa.ForeignKey("mechanex_users.id", ondelete="CASCADE")
    return sa.Column("user_id", _ID, owner, nullable=False, index=index)
