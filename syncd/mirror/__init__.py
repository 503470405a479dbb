"""The only writers of mirrors: staging, journal, apply, drift; everything through held descriptors."""

from __future__ import annotations

from syncd.mirror.apply import Outcome, Placed
from syncd.mirror.assembly import Assembly
from syncd.mirror.mirror import Mirror
from syncd.mirror.root import Disk, View
from syncd.mirror.staging import PART_NAME, Staged

__all__ = ["PART_NAME", "Assembly", "Disk", "Mirror", "Outcome", "Placed", "Staged", "View"]
