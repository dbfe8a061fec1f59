"""Behaviors may have detectors; they were vectors."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "4"
down_revision = "3"


def upgrade() -> None:
    """Adds what there is to say of a behavior's detector."""
    op.add_column("mechanex_behaviors", sa.Column("watched", sa.Text))
