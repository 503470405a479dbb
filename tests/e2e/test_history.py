"""History as its user meets it: commands against a server, with and without a daemon beside them."""

from __future__ import annotations

import json
import os
import shutil
from typing import TYPE_CHECKING, Any

import pytest

from syncd.errors import EXIT_FAILED, EXIT_OK, EXIT_TEMPFAIL, EXIT_USAGE
from tests.e2e.conftest import EAGER, EAGER_PUBLISH, Daemons, publish, subscribe
from tests.support.trees import difference, equal_trees, eventually

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.daemon import Daemon


def fine(host: Daemon, *arguments: str) -> str:
    done = host.run(*arguments)
    assert (done.returncode, done.stderr) == (EXIT_OK, ""), done.stderr
    return done.stdout


def log(host: Daemon) -> list[dict[str, Any]]:
    generations: list[dict[str, Any]] = json.loads(fine(host, "log", "app", "--json"))
    return generations


@pytest.mark.layout("generations")
def test_every_state_that_was_pushed_can_be_had_again(tmp_path: Path, daemons: Daemons) -> None:
    """log, diff, ls, cat, pull and verify of three generations with files of every way to be stored."""
    source, mirror = tmp_path / "source", tmp_path / "mirror"
    host = daemons.make("host", publish(source))
    source.mkdir()
    for number in range(300):
        (source / f"d{number % 7}").mkdir(exist_ok=True)
        (source / f"d{number % 7}/small-{number}").write_bytes(b"%d" % number)
    (source / "large").write_bytes(os.urandom(3_000_000))
    (source / "empty").touch()
    (source / "link").symlink_to("d1/small-1")
    copies = {}

    def push(number: int, note: str) -> None:
        assert fine(host, "push", "app", "--note", note).startswith(f"app: generation {number}: ")
        copies[number] = shutil.copytree(source, tmp_path / f"copy-{number}", symlinks=True)

    push(1, "first")
    assert fine(host, "push", "app", "--note", "nobody reads this") == "app: nothing changed: generation 1\n"
    with (source / "large").open("r+b") as large:
        large.seek(1_000_000)
        large.write(b"changed")
    (source / "d3/small-3").unlink()
    (source / "added").write_text("added")
    push(2, "second")
    (source / "link").unlink()
    (source / "link").mkdir()
    (source / "link/inside").write_text("x")
    (source / "empty").chmod(0o600)
    push(3, "third")

    generations = log(host)
    assert [(one["number"], one["note"], one["channels"]) for one in generations] == [
        (3, "third", ["head"]),
        (2, "second", []),
        (1, "first", []),
    ]
    assert [(one["added"], one["changed"], one["removed"]) for one in generations] == [
        (1, 1, 1),
        (1, 1, 1),
        (303, 0, 0),
    ]
    assert [one["files"] for one in generations] == [303, 303, 303]
    assert fine(host, "diff", "app", "1", "2").splitlines()[2:] == ["A added", "D d3/small-3", "M large"]
    assert fine(host, "diff", "app", "2", "head").splitlines()[2:] == ["m empty", "T link", "A link/inside"]
    for number in (1, 3, 2):
        listed = fine(host, "ls", "app", "--generation", str(number)).splitlines()
        copy = copies[number]
        assert sorted(listed) == sorted(str(path.relative_to(copy)) for path in copy.rglob("*"))
        pulled = host.run("pull", "app", str(mirror), "--generation", str(number))
        assert pulled.stdout.startswith(f"app: generation {number}: ")
        assert pulled.stderr == "syncd: signatures are not checked: no trusted_keys are configured for app\n"
        assert difference(copy, mirror) == {}
        verdict = json.loads(fine(host, "verify", str(mirror), "--folder", "app", "--json"))
        assert (verdict["generation"], verdict["checked"]) == (number, len(listed))
        assert verdict["found"] == verdict["tree"] == generations[3 - number]["tree"]
    old = host.run("cat", "app", "added", "--generation", "1")
    assert (old.returncode, old.stdout) == (EXIT_USAGE, "")
    assert fine(host, "cat", "app", "added") == "added"
    assert "no generation 4: the oldest is 1, the newest 3" in host.run("diff", "app", "3", "4").stderr


@pytest.mark.layout("generations")
async def test_verify_beside_a_daemon_takes_the_generation_that_it_has_applied(
    tmp_path: Path, daemons: Daemons
) -> None:
    """The daemon holds the index; its status says which generation the mirror has, and the disk agrees."""
    source, mirror = tmp_path / "source", tmp_path / "mirror"
    (source / "d").mkdir(parents=True)
    (source / "d/f").write_text("one")
    publisher = daemons.start("publisher", publish(source))
    subscriber = daemons.start("subscriber", subscribe(mirror, extra='drift = "report"\n' + EAGER))
    await equal_trees(source, mirror)
    (source / "d/g").write_text("two")
    await equal_trees(source, mirror)
    newest = log(publisher)[0]
    await eventually(lambda: subscriber.status()["subscribe-app"].get("generation") == newest["number"])
    verdict = json.loads(fine(subscriber, "verify", str(mirror), "--json"))
    assert (verdict["generation"], verdict["found"]) == (newest["number"], newest["tree"])
    (mirror / "d/f").write_text("not ours")
    done = subscriber.run("verify", str(mirror), "--json")
    verdict = json.loads(done.stdout)
    assert done.returncode == EXIT_FAILED
    assert {"path": "d/f", "what": "content"} in verdict["deviations"]
    assert verdict["found"] != newest["tree"]


@pytest.mark.layout("generations")
async def test_what_a_daemon_holds_a_command_leaves_alone(tmp_path: Path, daemons: Daemons) -> None:
    """gc and push beside the daemon that publishes: exit code 75, and nothing happens."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "f").write_text("one")
    daemon = daemons.start("publisher", publish(source))
    daemon.wait_event("committed")
    for arguments in (("gc", "app"), ("push", "app", "--note", "x")):
        assert daemon.run(*arguments).returncode == EXIT_TEMPFAIL
    assert len(log(daemon)) == 1
    assert daemon.stop() == 0
    assert json.loads(fine(daemon, "gc", "app", "--dry-run", "--json"))["freed_blobs"] == 0


@pytest.mark.layout("generations")
def test_a_collected_generation_is_named_as_such(tmp_path: Path, daemons: Daemons) -> None:
    """What retention took is refused with what there is; what it kept is whole."""
    source = tmp_path / "source"
    source.mkdir()
    host = daemons.make("host", publish(source, extra=EAGER_PUBLISH + "keep_generations = 2\nkeep_days = 0\n"))
    for number in range(1, 6):
        (source / "f").write_text(f"state {number}")
        fine(host, "push", "app")
    host.run("gc", "app")
    kept = [one["number"] for one in log(host)]
    assert kept[0] == 5
    for number in kept:
        assert fine(host, "cat", "app", "f", "--generation", str(number)) == f"state {number}"
    for number in set(range(1, 6)) - set(kept):
        done = host.run("ls", "app", "--generation", str(number))
        assert done.returncode == EXIT_USAGE
        assert f"no generation {number}: the oldest is {min(kept)}, the newest 5" in done.stderr


@pytest.mark.layout("objects")
def test_notes_are_for_generations(tmp_path: Path, daemons: Daemons) -> None:
    """In the objects layout there is nothing to write one on, and a note with a line break is none."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "f").write_text("x")
    host = daemons.make("host", publish(source))
    for note in ("a note", "two\nlines"):
        done = host.run("push", "app", "--note", note)
        assert done.returncode == EXIT_USAGE, done.stderr
    assert "bucket" in host.run("ls", "app").stderr
    fine(host, "push", "app")
    assert fine(host, "ls", "app") == "f\n"
