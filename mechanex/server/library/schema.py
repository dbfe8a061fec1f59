"""The tables of the server's database, as the newest version has them.

``VERSION`` counts up with every change of them, and each has its step in ``migrations``.
"""

from __future__ import annotations

import re
import uuid

from sqlalchemy import (
    BigInteger,
    Column,
    Double,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
)

__all__ = [
    "OLDEST_VERSION",
    "SHARED_ACCOUNT",
    "VERSION",
    "VERSION_TABLE",
    "api_keys",
    "behaviors",
    "is_id",
    "metadata",
    "new_id",
    "revisions",
    "schema_info",
    "session_tokens",
    "sessions",
    "users",
    "vectors",
]

VERSION = 5
OLDEST_VERSION = 2
"""From which the migrations lead on."""

VERSION_TABLE = "mechanex_alembic"

SHARED_ACCOUNT = "local"
"""Id of the account that requests without one act as; nobody can log in to it."""

metadata = MetaData()

# Times are seconds since 1970, UTC. Ids are random and say nothing of how many there are.
_ID = String(32)
_HASH = String(64)

# Where Alembic notes the version.
revisions = Table(VERSION_TABLE, MetaData(), Column("version_num", String(32), primary_key=True))

# Versions before 5 look here, and find that the tables are too new for them.
schema_info = Table(
    "mechanex_schema",
    metadata,
    Column("version", Integer, primary_key=True, autoincrement=False),
)

users = Table(
    "mechanex_users",
    metadata,
    Column("id", _ID, primary_key=True),
    Column("email", String(320), unique=True),
    Column("password_hash", Text),
    Column("model_name", Text),
    Column("created_at", Double, nullable=False),
)

sessions = Table(
    "mechanex_sessions",
    metadata,
    Column("id", _ID, primary_key=True),
    Column("user_id", _ID, ForeignKey(users.c.id, ondelete="CASCADE"), nullable=False, index=True),
    Column("created_at", Double, nullable=False),
    Column("expires_at", Double, nullable=False, index=True),
    Column("revoked_at", Double),
)

# All pairs that a session ever had, a refresh token and the access token that came with it, as hashes: a refresh
# token that comes back after its use was copied by somebody.
session_tokens = Table(
    "mechanex_refresh_tokens",
    metadata,
    Column("token_hash", _HASH, primary_key=True),
    Column("session_id", _ID, ForeignKey(sessions.c.id, ondelete="CASCADE"), nullable=False, index=True),
    Column("used_at", Double),
    Column("access_hash", _HASH),
    Column("access_expires_at", Double),
    # The refresh token that this pair was given for; null for a log-in's.
    Column("parent_hash", _HASH),
)
Index("mechanex_refresh_tokens_access", session_tokens.c.access_hash, unique=True)

api_keys = Table(
    "mechanex_api_keys",
    metadata,
    Column("id", _ID, primary_key=True),
    Column("user_id", _ID, ForeignKey(users.c.id, ondelete="CASCADE"), nullable=False, index=True),
    Column("name", Text, nullable=False),
    Column("key_hash", _HASH, nullable=False, unique=True),
    Column("shown", String(16), nullable=False),
    Column("created_at", Double, nullable=False),
    Column("last_used", Double),
    Column("expires_at", Double),
    # Words with spaces between; null for a key that may do all that a key may.
    Column("scopes", String(64)),
)

vectors = Table(
    "mechanex_vectors",
    metadata,
    Column("id", _ID, primary_key=True),
    Column("user_id", _ID, ForeignKey(users.c.id, ondelete="CASCADE"), nullable=False, index=True),
    Column("created_at", Double, nullable=False),
    # What the file takes; null for a row of a version before 5.
    Column("n_bytes", BigInteger),
)

behaviors = Table(
    "mechanex_behaviors",
    metadata,
    Column("id", _ID, primary_key=True),
    Column("user_id", _ID, ForeignKey(users.c.id, ondelete="CASCADE"), nullable=False),
    Column("behavior_name", String(200), nullable=False),
    Column("description", Text, nullable=False),
    Column("vector_id", _ID, ForeignKey(vectors.c.id), nullable=False),
    Column("examples", Text, nullable=False),
    Column("n_examples", Integer, nullable=False),
    Column("created_at", Double, nullable=False),
    # What there is to say of the detector and the correction, as JSON; null for a behavior that is a vector alone.
    Column("watched", Text),
    # Of the examples and the detector's file; null for a row of a version before 5.
    Column("n_bytes", BigInteger),
    UniqueConstraint("user_id", "behavior_name", name="mechanex_behaviors_one_name"),
)
Index("mechanex_behaviors_vector", behaviors.c.vector_id)

_IS_ID = re.compile(r"[0-9a-f]{32}")


def new_id() -> str:
    """An id for a row: 122 random bits in hexadecimal."""
    return uuid.uuid4().hex


def is_id(text: str) -> bool:
    """Whether a text has an id's form; nothing else needs to reach the database."""
    return _IS_ID.fullmatch(text) is not None
