"""The decisions of syncd/plan.py, a sentence per row."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from syncd.model import Entry, Kind, Stat
from syncd.paths import ancestors, sort_key
from syncd.plan import (
    Difference,
    DirMeta,
    MakeDir,
    MirrorPlan,
    Place,
    PublishAction,
    Remove,
    SetMeta,
    implied_dir,
    mirror_halt,
    parents_of,
    plan_mirror,
    publish_action,
    publish_halt,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

STAT = Stat(1, 2, 3, 4)
DIR = Entry(Kind.DIR, 0o755, 5)
FILE = Entry(Kind.FILE, 0o644, 5, 3, "aa")
FILE2 = Entry(Kind.FILE, 0o644, 6, 3, "bb")
TOUCHED = Entry(Kind.FILE, 0o600, 7, 3, "aa")
LINK = Entry(Kind.SYMLINK, 0o777, 5, target="x")
LINK2 = Entry(Kind.SYMLINK, 0o777, 5, target="y")

PUBLISH = [
    ("nothing here, nothing there", None, None, False, PublishAction.NOTHING),
    ("a new file is sent", FILE, None, False, PublishAction.PUT_CONTENT),
    ("a new directory is metadata", DIR, None, False, PublishAction.PUT_META),
    ("a new symlink is metadata", LINK, None, False, PublishAction.PUT_META),
    ("an equal file is left", FILE, FILE, True, PublishAction.NOTHING),
    ("a touched file is metadata", TOUCHED, FILE, True, PublishAction.PUT_META),
    ("a changed file is sent", FILE2, FILE, True, PublishAction.PUT_CONTENT),
    ("a file that became a directory is metadata", DIR, FILE, True, PublishAction.PUT_META),
    ("a directory that became a file is sent", FILE, DIR, True, PublishAction.PUT_CONTENT),
    ("a retargeted symlink is metadata", LINK2, LINK, True, PublishAction.PUT_META),
    ("our object whose file is gone is deleted", None, FILE, True, PublishAction.DELETE),
    ("another client's object is never deleted", None, FILE, False, PublishAction.NOTHING),
    ("another client's object is replaced by our file", FILE, FILE, False, PublishAction.PUT_CONTENT),
]


@pytest.mark.parametrize(
    ("local", "remote", "ours", "action"), [row[1:] for row in PUBLISH], ids=[r[0] for r in PUBLISH]
)
def test_what_a_publisher_does_about_one_path(
    local: Entry | None, remote: Entry | None, ours: bool, action: PublishAction
) -> None:
    """Decided by what both sides have and by who wrote the object."""
    assert publish_action(local, remote, remote_is_ours=ours) is action


@pytest.mark.fault("D1")
@pytest.mark.parametrize(
    ("deletes", "published", "limit", "held"),
    [
        (0, 10, 50, False),
        (5, 10, 50, False),
        (6, 10, 50, True),
        (10, 10, 100, True),  # all of them, whatever the limit
        (1, 1, 100, True),
        (0, 0, 0, False),
    ],
)
def test_a_publisher_is_held_above_its_limit_and_always_at_everything(
    deletes: int, published: int, limit: float, held: bool
) -> None:
    """Publish plans would delete nothing, half, more than half or all of what is published (numbers alone).

    They are held above the limit, and at everything whatever the limit.
    """
    assert bool(publish_halt(deletes, published, limit)) is held


@pytest.mark.fault("D1")
@pytest.mark.parametrize(
    ("removes", "mirrored", "adds", "allowed", "unexplained", "held"),
    [
        (0, 0, 0, 0, 0, False),
        (1, 10, 0, 0, 0, False),
        (10, 10, 0, 0, 0, True),
        (10, 10, 1, 0, 0, False),  # what replaces them is in the same plan
        (10, 10, 0, 9, 0, True),
        (10, 10, 0, 10, 0, False),
        (5, 10, 0, 0, 5, False),
        (6, 10, 9, 0, 6, True),  # vanished without a trace, although others came
    ],
)
def test_a_mirror_is_not_emptied_unless_a_person_allowed_every_removal(
    removes: int, mirrored: int, adds: int, allowed: int, unexplained: int, held: bool
) -> None:
    """Mirror plans would remove some or all paths, allowed or not, explained or not (numbers alone).

    Held is what removes all, adds nothing and is not allowed in full, and what lost over half without a trace.
    """
    assert bool(mirror_halt(removes, mirrored, adds, allowed=allowed, unexplained=unexplained)) is held


def diff(path: str, have: Entry | None, want: Entry | None, staged: str = "") -> Difference:
    return Difference(path, have, STAT if have is not None else None, want, staged)


PLANS: list[tuple[str, Sequence[Difference], Sequence[DirMeta], MirrorPlan]] = [
    ("nothing to do", [], [], MirrorPlan()),
    (
        "a new file below new directories: parents first, times last and deepest first",
        [diff("a/b/f", None, FILE, "s"), diff("a", None, DIR), diff("a/b", None, DIR)],
        [],
        MirrorPlan(
            make_dirs=(MakeDir("a"), MakeDir("a/b")),
            place=(Place("a/b/f", FILE, "s", None),),
            dir_meta=(DirMeta("a/b", 0o755, 5), DirMeta("a", 0o755, 5)),
        ),
    ),
    (
        "a file below directories that no object describes: they are made all the same",
        [diff("a/b/f", None, FILE, "s")],
        [],
        MirrorPlan(make_dirs=(MakeDir("a"), MakeDir("a/b")), place=(Place("a/b/f", FILE, "s", None),)),
    ),
    (
        "new content: what the index says is there is what the step expects",
        [diff("f", FILE, FILE2, "s")],
        [],
        MirrorPlan(place=(Place("f", FILE2, "s", STAT),)),
    ),
    (
        "other mode and time only: in place",
        [diff("f", FILE, TOUCHED)],
        [],
        MirrorPlan(set_meta=(SetMeta("f", TOUCHED, STAT),)),
    ),
    (
        "a directory's mode only",
        [diff("d", DIR, Entry(Kind.DIR, 0o700, 9))],
        [],
        MirrorPlan(make_dirs=(MakeDir("d"),), dir_meta=(DirMeta("d", 0o700, 9),)),
    ),
    (
        "removed: children before parents, and the time of the parent that stays",
        [diff("d", DIR, None), diff("d/a", FILE, None), diff("d/e", DIR, None), diff("d/e/b", FILE, None)],
        [DirMeta("d", 0o755, 5), DirMeta("d/e", 0o755, 5)],
        MirrorPlan(
            remove=(
                Remove("d/e/b", Kind.FILE, STAT),
                Remove("d/e", Kind.DIR, STAT),
                Remove("d/a", Kind.FILE, STAT),
                Remove("d", Kind.DIR, STAT),
            )
        ),
    ),
    (
        "a file that became a symlink is replaced by one rename, never cleared away",
        [diff("x", FILE, LINK, "s")],
        [],
        MirrorPlan(place=(Place("x", LINK, "s", STAT),)),
    ),
    (
        "a symlink that became a file likewise",
        [diff("x", LINK, FILE, "s")],
        [],
        MirrorPlan(place=(Place("x", FILE, "s", STAT),)),
    ),
    (
        "a file that became a directory is cleared away before anything is made below it",
        [diff("x", FILE, DIR), diff("x/f", None, FILE, "s")],
        [],
        MirrorPlan(
            clear=(Remove("x", Kind.FILE, STAT),),
            make_dirs=(MakeDir("x"),),
            place=(Place("x/f", FILE, "s", None),),
            dir_meta=(DirMeta("x", 0o755, 5),),
        ),
    ),
    (
        "a directory that became a file: what was below it goes first, with it, and nothing else goes early",
        [diff("x", DIR, FILE, "s"), diff("x/d", DIR, None), diff("x/d/f", FILE, None), diff("y", FILE, None)],
        [],
        MirrorPlan(
            clear=(
                Remove("x/d/f", Kind.FILE, STAT),
                Remove("x/d", Kind.DIR, STAT),
                Remove("x", Kind.DIR, STAT),
            ),
            place=(Place("x", FILE, "s", None),),
            remove=(Remove("y", Kind.FILE, STAT),),
        ),
    ),
    (
        "a file that is gone makes room for a directory that no object describes, whose time is kept",
        [diff("x", FILE, None), diff("x/f", None, FILE, "s")],
        [DirMeta("x", 0o755, 5)],
        MirrorPlan(
            clear=(Remove("x", Kind.FILE, STAT),),
            make_dirs=(MakeDir("x"),),
            place=(Place("x/f", FILE, "s", None),),
            dir_meta=(DirMeta("x", 0o755, 5),),
        ),
    ),
    (
        "a directory whose object is gone stays while something is wanted below it",
        [diff("x", DIR, None), diff("x/f", FILE, FILE2, "s")],
        [],
        MirrorPlan(make_dirs=(MakeDir("x"),), place=(Place("x/f", FILE2, "s", STAT),)),
    ),
    (
        "a file wanted together with a path below it: no directory is made in its place (P7)",
        [diff("a/b", None, FILE, "t"), diff("a", None, FILE2, "s")],
        [],
        MirrorPlan(place=(Place("a", FILE2, "s", None), Place("a/b", FILE, "t", None))),
    ),
    (
        "names that sort between a directory and its children do not come between them",
        [diff("a-b", None, FILE, "t"), diff("a/c", None, FILE, "s"), diff("a", None, DIR)],
        [],
        MirrorPlan(
            make_dirs=(MakeDir("a"),),
            place=(Place("a/c", FILE, "s", None), Place("a-b", FILE, "t", None)),
            dir_meta=(DirMeta("a", 0o755, 5),),
        ),
    ),
    ("neither had nor wanted", [diff("x", None, None)], [], MirrorPlan()),
]


@pytest.mark.fault("D4 P7")
@pytest.mark.parametrize(("rows", "dirs", "plan"), [row[1:] for row in PLANS], ids=[row[0] for row in PLANS])
def test_a_batch_is_planned_in_an_order_that_works(
    rows: Sequence[Difference], dirs: Sequence[DirMeta], plan: MirrorPlan
) -> None:
    """Batches replace files, directories and symlinks by one another, or want a file above another path.

    The plan is that of the table, forward and with the differences reversed.
    """
    assert plan_mirror(rows, dirs) == plan
    assert plan_mirror(list(reversed(rows)), dirs) == plan


def test_a_plan_without_steps_is_false() -> None:
    """Callers skip it."""
    assert not MirrorPlan()
    assert MirrorPlan(remove=(Remove("x", Kind.FILE, None),))


def test_parents_leave_the_root_out() -> None:
    """The root's own mode and time are the host's business."""
    assert parents_of(["a", "b/c", "b/d/e"]) == {"b", "b/d"}
    assert implied_dir().kind is Kind.DIR


ENTRIES = st.sampled_from([None, DIR, FILE, FILE2, LINK])
PATHS = st.lists(st.sampled_from("ab"), min_size=1, max_size=4).map("/".join)


@given(st.dictionaries(PATHS, st.tuples(ENTRIES, ENTRIES), max_size=12))
def test_every_plan_of_any_differences_is_ordered(rows: dict[str, tuple[Entry | None, Entry | None]]) -> None:
    """Parents are made before children, children removed before parents, directory times set deepest first."""
    differences = [
        diff(path, have, want, "s" if want and want.kind is not Kind.DIR else "") for path, (have, want) in rows.items()
    ]
    plan = plan_mirror(differences, [])
    for steps, parents_first in (
        (plan.make_dirs, True),
        (plan.clear, False),
        (plan.remove, False),
        (plan.dir_meta, False),
    ):
        keys = [sort_key(step.path) for step in steps]
        assert keys == sorted(keys, reverse=not parents_first)
        assert len(set(keys)) == len(keys)
    made = {step.path for step in plan.make_dirs}
    placed = {step.path for step in plan.place}
    assert not made & placed
    for step in plan.place:
        assert all(above in made or above in placed for above in ancestors(step.path))
    assert not made & {step.path for step in plan.remove}
