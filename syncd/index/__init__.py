"""The durable note of what was last agreed: SQLite, confined to one thread."""

from __future__ import annotations

from syncd.index.database import KEPT_BROKEN, SCHEMA_VERSION, Database
from syncd.index.index import Index, LocalRow, RemoteRow

__all__ = ["KEPT_BROKEN", "SCHEMA_VERSION", "Database", "Index", "LocalRow", "RemoteRow"]
