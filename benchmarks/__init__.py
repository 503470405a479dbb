"""Figures: what syncd needs in time, bytes and memory, beside other tools in one run (docs/performance.md)."""

from __future__ import annotations
