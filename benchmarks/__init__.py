"""Figures: what syncd needs in time and memory, beside the plain nats-py loop (docs/performance.md)."""

from __future__ import annotations
