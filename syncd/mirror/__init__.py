"""The only writers of mirrors: staging, journal, apply, drift; everything through held descriptors."""

from __future__ import annotations

from syncd.mirror.apply import Outcome, Placed
from syncd.mirror.mirror import Mirror
from syncd.mirror.root import Disk, View
from syncd.mirror.staging import Staged

__all__ = ["Disk", "Mirror", "Outcome", "Placed", "Staged", "View"]
