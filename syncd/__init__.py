"""syncd distributes directories from one publisher host to a fleet over NATS JetStream Object Store."""

from __future__ import annotations

__version__ = "0.1.0.dev0"
