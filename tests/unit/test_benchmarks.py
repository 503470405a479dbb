"""The benchmarks' own arithmetic: a figure that nobody can trust is worse than none."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest

from benchmarks import aims, report, trees
from benchmarks.cases import FULL
from benchmarks.figures import Figures, percentile
from benchmarks.processes import Leg, Use, run

if TYPE_CHECKING:
    from pathlib import Path

MACHINE = dict.fromkeys(
    ("date", "cpu", "cores", "memory_gib", "kernel", "filesystem", "python", "nats_server", "nats_py", "load"), "-"
)


def figures(**seconds: float) -> Figures:
    """One workload, "large", in which each peer needed so long and moved so many megabytes."""
    found = Figures()
    for peer, value in seconds.items():
        legs = {"pull": Leg(value, int(value * 1e6), {"command": Use(value, 10_000_000)})}
        found.add_legs(f"large.{peer.replace('_', '-')}", legs)
    return found


def verdicts(found: Figures) -> dict[str, bool]:
    return {one.aim: one.met for one in aims.judge(found, vars(FULL))}


@pytest.mark.parametrize(("ours", "met"), [(2.9, True), (3.1, False)])
def test_a_ratio_is_met_or_missed(ours: float, met: bool) -> None:
    found = verdicts(figures(syncd=ours, rsync=1.0))
    assert found["First sync of the large file, time beside rsync: at most 3x"] == met


def test_ahead_of_all_others_means_of_the_fastest() -> None:
    found = verdicts(figures(syncd=5.0, rclone=6.0, unison=4.0))
    assert not found["First sync of the large file: ahead of unison, rclone"]


def test_what_was_not_measured_is_not_judged() -> None:
    assert verdicts(Figures()) == {}


def test_memory_is_the_largest_process_of_syncd_in_any_case() -> None:
    found = Figures()
    found.add("latency.publisher.peak", 80e6)
    found.add("small.syncd.pull.command.peak", 120e6, 160e6)
    found.add("small.syncd.pull.server.peak", 900e6)
    (one,) = aims.judge(found, vars(FULL))
    assert (one.measured, one.met) == ("160 MB (small.syncd.pull.command)", False)


def test_the_report_has_a_row_per_peer_and_the_fastest_first() -> None:
    found = figures(syncd=2.0, rsync=1.0)
    text = report.render(
        {
            "machine": MACHINE,
            "quick": False,
            "layout": "generations",
            "scale": vars(FULL),
            "notes": ["Left out: rclone."],
            "values": found.values,
        }
    )
    rows = [line for line in text.splitlines() if line.startswith(("| rsync", "| **syncd"))]
    assert [row.split(" | ")[0].strip("| *") for row in rows] == ["rsync daemon, -a", "syncd push, pull"]
    assert "2.00x" in rows[1]
    assert "Left out: rclone." in text


def test_changed_runs_are_as_many_and_as_long_as_they_say(tmp_path: Path) -> None:
    root = trees.make_large(tmp_path / "tree", trees.MIB)
    before = (root / trees.LARGE_NAME).read_bytes()
    trees.change_runs(root, 4, 1000, random.Random(1))
    after = (root / trees.LARGE_NAME).read_bytes()
    changed = [number for number in range(len(before)) if before[number] != after[number]]
    assert len(before) == len(after)
    assert 3900 < len(changed) <= 4000
    assert len({number * 4 // len(before) for number in changed}) == 4


def test_insertion_moves_all_that_was_there(tmp_path: Path) -> None:
    root = trees.make_large(tmp_path / "tree", trees.MIB)
    before = (root / trees.LARGE_NAME).read_bytes()
    trees.insert_front(root, 1000, random.Random(1))
    assert (root / trees.LARGE_NAME).read_bytes()[1000:] == before


def test_a_destination_that_differs_ends_the_run(tmp_path: Path) -> None:
    source = trees.make_small(tmp_path / "source", 3)
    target = trees.make_small(tmp_path / "target", 3)
    want = trees.digests(source)
    trees.must_hold(want, target)
    (target / "more").touch()
    with pytest.raises(SystemExit, match="1 files"):
        trees.must_hold(want, target)


def test_a_command_that_fails_ends_the_run_with_its_words(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no such thing"):
        run([["sh", "-c", "echo no such thing; exit 3"]], tmp_path / "log")


def test_commands_side_by_side_are_one_step(tmp_path: Path) -> None:
    leg = run([["sh", "-c", "exit 0"], ["sh", "-c", "exit 0"]], tmp_path / "log")
    assert leg.seconds > 0
    assert set(leg.uses) == {"command"}


def test_percentiles_are_measured_values() -> None:
    values = [float(number) for number in range(1, 201)]
    assert (percentile(values, 50), percentile(values, 99), percentile([7.0], 99)) == (100.0, 198.0, 7.0)
