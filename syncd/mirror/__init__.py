"""The only writers of mirrors: staging, journal, apply, drift, releases; everything through held descriptors."""

from __future__ import annotations

from syncd.mirror.apply import Outcome, Placed
from syncd.mirror.assembly import Assembly
from syncd.mirror.build import BuildItem, Built, ContentChanged
from syncd.mirror.mirror import Mirror, Mode
from syncd.mirror.release import RELEASE_NAME, release_name, release_number
from syncd.mirror.root import Disk, View, is_unreadable
from syncd.mirror.share import SHARES, Share
from syncd.mirror.staging import PART_NAME, Staged

__all__ = [
    "PART_NAME",
    "RELEASE_NAME",
    "SHARES",
    "Assembly",
    "BuildItem",
    "Built",
    "ContentChanged",
    "Disk",
    "Mirror",
    "Mode",
    "Outcome",
    "Placed",
    "Share",
    "Staged",
    "View",
    "is_unreadable",
    "release_name",
    "release_number",
]
