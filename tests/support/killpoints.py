"""Every named crash point of the program, and who passes it when: the kill matrix (tests/e2e/test_kills.py).

A unit test compares this table with the source, so that no point is left out; the matrix fails for a point that it
never gets to. A new ``crash_point("x")`` therefore wants a line here, and a situation in which somebody passes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Layout = Literal["generations", "objects"]
Mode = Literal["mirror", "release"]
Role = Literal["subscriber", "publisher", "collector", "converter", "cleaner", "mover", "returner", "truster"]

BOTH: tuple[Layout, ...] = ("generations", "objects")
GENERATIONS: tuple[Layout, ...] = ("generations",)
OBJECTS: tuple[Layout, ...] = ("objects",)
MODES: tuple[Mode, ...] = ("mirror", "release")
MIRROR: tuple[Mode, ...] = ("mirror",)
RELEASE: tuple[Mode, ...] = ("release",)


@dataclass(frozen=True)
class KillPoint:
    """One crash point.

    :ivar role: whose process passes it; a collector is a publisher that frees what nothing needs, a converter one that
        gives its bucket another layout, a cleaner a subscriber that removes strangers, a mover a person's command, a
        returner a subscriber whose hooks refuse what it applied (tests/unit/test_kills_return.py), a truster one that
        checks signatures (tests/unit/test_kills_trust.py).
    :ivar layouts: of the bucket; of what a converter makes of it.
    :ivar modes: of the mirror, for a subscriber: those in which it is passed.
    :ivar hooked: it is passed with hooks only.
    """

    name: str
    role: Role
    layouts: tuple[Layout, ...] = BOTH
    modes: tuple[Mode, ...] = MODES
    hooked: bool = False


POINTS: tuple[KillPoint, ...] = (
    # staging
    KillPoint("stage_write", "subscriber"),
    KillPoint("stage_finished", "subscriber"),
    KillPoint("walked", "subscriber", GENERATIONS),
    KillPoint("content_staged", "subscriber", GENERATIONS),
    KillPoint("generation_staged", "subscriber", GENERATIONS),
    # a mirror's commit
    KillPoint("before_first_page", "subscriber", GENERATIONS, MIRROR),
    KillPoint("batch_staged", "subscriber", modes=MIRROR),
    KillPoint("before_journal", "subscriber", modes=MIRROR),
    KillPoint("journal_torn", "subscriber", modes=MIRROR),
    KillPoint("journal_durable", "subscriber", modes=MIRROR),
    KillPoint("after_each_step", "subscriber", modes=MIRROR),
    KillPoint("before_dir_meta", "subscriber", modes=MIRROR),
    KillPoint("before_journal_removed", "subscriber", modes=MIRROR),
    KillPoint("done", "subscriber", modes=MIRROR),
    KillPoint("batch_applied", "subscriber", modes=MIRROR),
    KillPoint("between_pages", "subscriber", modes=MIRROR),
    # a release
    KillPoint("release_building", "subscriber", GENERATIONS, RELEASE),
    KillPoint("release_built", "subscriber", GENERATIONS, RELEASE),
    KillPoint("release_published", "subscriber", GENERATIONS, RELEASE),
    KillPoint("before_switch", "subscriber", GENERATIONS, RELEASE),
    KillPoint("after_switch", "subscriber", GENERATIONS, RELEASE),
    KillPoint("release_switched", "subscriber", GENERATIONS, RELEASE),
    KillPoint("release_removing", "subscriber", GENERATIONS, RELEASE),
    KillPoint("release_pruned", "subscriber", GENERATIONS, RELEASE),
    # a generation's end
    KillPoint("generation_applied", "subscriber", GENERATIONS),
    KillPoint("remembered", "subscriber", GENERATIONS),
    # hooks
    KillPoint("check_built", "subscriber", GENERATIONS, MIRROR, hooked=True),
    KillPoint("checked", "subscriber", GENERATIONS, hooked=True),
    KillPoint("check_dropped", "subscriber", GENERATIONS, MIRROR, hooked=True),
    KillPoint("hooks_begun", "subscriber", GENERATIONS, hooked=True),
    KillPoint("hook_ended", "subscriber", GENERATIONS, hooked=True),
    KillPoint("hooks_done", "subscriber", GENERATIONS, hooked=True),
    KillPoint("refused", "returner", GENERATIONS),
    # what is trusted, and was seen
    KillPoint("trust_drafted", "truster", GENERATIONS),
    KillPoint("trust_noted", "truster", GENERATIONS),
    # publishing
    KillPoint("blobs_stored", "publisher", GENERATIONS),
    KillPoint("before_commit", "publisher", GENERATIONS),
    KillPoint("generation_committed", "publisher", GENERATIONS),
    KillPoint("generation_remembered", "publisher", GENERATIONS),
    KillPoint("content_stored", "publisher", OBJECTS),
    KillPoint("metas_stored", "publisher", OBJECTS),
    KillPoint("tombstones_stored", "publisher", OBJECTS),
    # collecting
    KillPoint("generation_removed", "collector", GENERATIONS),
    KillPoint("blobs_forgotten", "collector", GENERATIONS),
    KillPoint("blobs_freed", "collector", GENERATIONS),
    KillPoint("garbage_freed", "collector", OBJECTS),
    # another layout
    KillPoint("layout_meta_dropped", "converter"),
    KillPoint("objects_dropped", "converter", GENERATIONS),
    KillPoint("history_dropped", "converter", OBJECTS),
    KillPoint("layout_marked", "converter", OBJECTS),
    KillPoint("layout_blobs_dropped", "converter", OBJECTS),
    # once in a while
    KillPoint("extraneous_removed", "cleaner"),
    KillPoint("channel_moved", "mover", GENERATIONS),
)


def points(role: Role, layout: Layout, mode: Mode = "mirror") -> list[KillPoint]:
    """The points that a role passes, in this layout and mode."""
    return [point for point in POINTS if point.role == role and layout in point.layouts and mode in point.modes]
