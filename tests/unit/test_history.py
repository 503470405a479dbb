"""log, diff, ls, cat, verify and gc, from the command line down to a bucket in memory."""

from __future__ import annotations

import asyncio
import json
import os
import unicodedata
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest

from syncd import cli as command_line
from syncd import oneshot
from syncd.audit import Takes, TreeDigester, Verdict, audit
from syncd.channels import Channels
from syncd.checkout import APPLIED
from syncd.errors import EXIT_FAILED, EXIT_OK, EXIT_UNAVAILABLE, EXIT_USAGE, UsageError
from syncd.history import History
from syncd.index import Index
from syncd.model import Entry, Kind
from syncd.modes import ModePolicy
from syncd.nodes import NOTE_MAX, digest_of
from syncd.outlet import PushResult
from syncd.publisher import Publisher
from syncd.retention import Collected
from syncd.rules import Rules
from syncd.settings import load
from syncd.signatures import Signer, generate
from syncd.statedir import StateDir
from syncd.status import FolderStatus
from syncd.store.base import BucketSpec, Link
from syncd.store.memory import MemoryStore
from syncd.trees import TreeReader, generation_name
from syncd.trust import MOVE
from tests.support.signing import sign_generation
from tests.support.specs import Spec, commit, write_spec

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from syncd.settings import Settings, SubscribeSettings

HOSTILE = "bad\x1b[31m\nname"
FIRST: Spec = {"dir": {"one": b"1", "two": b"22"}, "link": "dir/one", "same": {"deep": b"x" * 100}}
SECOND: Spec = {"dir": {"one": b"changed", "three": b""}, "link": "dir/three", "same": {"deep": b"x" * 100}}


class Shell:
    """Commands against a store in memory."""

    def __init__(self, store: MemoryStore, capfdbinary: Any) -> None:
        self.store = store
        self._capture = capfdbinary

    def run(self, *arguments: str) -> tuple[int, str, str]:
        code = command_line.run(list(arguments))
        out, err = self._capture.readouterr()
        return code, out.decode(), err.decode()

    def forget(self) -> None:
        """What was logged so far is not of the next command."""
        self._capture.readouterr()

    def fine(self, *arguments: str) -> str:
        code, out, err = self.run(*arguments)
        assert (code, err) == (EXIT_OK, "")
        return out


def bucket_with(store: MemoryStore, *specs: Spec, **records: Any) -> None:
    async def make() -> None:
        await store.create_bucket("app", BucketSpec(layout="generations"))
        for number, spec in enumerate(specs, 1):
            await commit(store.bucket("app"), number, spec, **records)

    asyncio.run(make())


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch, capfdbinary: Any, tmp_path: Path) -> Shell:
    store = MemoryStore()

    @asynccontextmanager
    async def open_store(_: Settings) -> AsyncIterator[tuple[MemoryStore, None]]:
        yield store, None

    monkeypatch.setattr(oneshot, "open_store", open_store)
    monkeypatch.setenv("SYNCD_DAEMON__STATE_DIR", str(tmp_path / "state"))
    return Shell(store, capfdbinary)


# --- log ---


def test_log_lists_the_newest_first_with_its_channels(shell: Shell) -> None:
    bucket_with(shell.store, FIRST, SECOND, note="a note", created="2026-05-04T12:30:05.123Z")
    asyncio.run(shell.store.bucket("app").put_link("channels/stable", Link("app", "generations/0000000001")))
    lines = shell.fine("log", "app").splitlines()
    assert lines[0].split() == ["generation", "time", "files", "size", "changes", "channels", "publisher", "note"]
    assert [line.split()[0] for line in lines[1:]] == ["2", "1"]
    assert "2026-05-04T12:30:05Z" in lines[1]
    assert "head" in lines[1]
    assert "stable" in lines[2]
    assert "a note" in lines[1]
    assert len(shell.fine("log", "app", "--limit", "1").splitlines()) == 2


def test_log_in_json_has_every_field(shell: Shell) -> None:
    bucket_with(shell.store, FIRST, SECOND, note="a note", publisher="build:/srv/app")
    newest, oldest = json.loads(shell.fine("log", "app", "--json"))
    tree = newest.pop("tree")
    assert len(tree) == 64
    assert newest.pop("created").endswith("Z")
    assert newest == {
        "number": 2,
        "files": 4,
        "bytes": 107,
        "added": 0,
        "changed": 0,
        "removed": 0,
        "note": "a note",
        "publisher": "build:/srv/app",
        "channels": ["head"],
    }
    assert oldest["number"] == 1
    assert oldest["tree"] != tree


def test_log_reads_no_record_and_no_tree(shell: Shell) -> None:
    """A thousand generations cost the listing of their metadata."""
    bucket_with(shell.store, FIRST, SECOND)
    shell.store.faults.calls.clear()
    shell.fine("log", "app")
    assert set(shell.store.faults.calls) <= {"state", "get_info", "changes"}


def test_log_shows_what_others_wrote_without_harm(shell: Shell) -> None:
    """Control characters are escaped, markup is text, numbers that are none are not shown, others' objects left out."""
    bucket_with(shell.store, FIRST, note="[red]x[/red]", publisher="host:/\x1b[2J")

    async def forge() -> None:
        bucket = shell.store.bucket("app")
        from syncd.store.base import EMPTY, ObjectMeta  # noqa: PLC0415

        await bucket.put_meta(
            ObjectMeta("generations/0000000002", metadata={"syncd-files": "-1", "syncd-bytes": "9" * 40}),
            EMPTY,
            expected_seq=None,
        )
        await bucket.put_meta(ObjectMeta("generations/readme"), EMPTY, expected_seq=None)
        await bucket.put_link("channels/else", Link("other", "generations/0000000001"))

    asyncio.run(forge())
    out = shell.fine("log", "app")
    assert "[red]x[/red]" in out
    assert "\x1b" not in out
    forged, real = json.loads(shell.fine("log", "app", "--json"))
    assert (forged["files"], forged["bytes"], forged["created"]) == (None, None, "")
    assert real["channels"] == ["head"]
    assert out.splitlines()[1].split()[:4] == ["2", "-", "-", "+-"]


# --- diff ---


def test_diff_prints_a_line_per_path_in_path_order(shell: Shell) -> None:
    bucket_with(shell.store, FIRST, SECOND)
    assert shell.fine("diff", "app", "1", "2").splitlines()[2:] == ["M dir/one", "A dir/three", "D dir/two", "M link"]
    back = shell.fine("diff", "app", "head", "1").splitlines()
    assert back[2:] == ["M dir/one", "D dir/three", "A dir/two", "M link"]
    assert len(shell.fine("diff", "app", "2", "head").splitlines()) == 2


@pytest.mark.fault("K1")
def test_diff_names_the_digests_of_what_it_shows(shell: Shell) -> None:
    """Channels are forged: one with `{` as its move, one with another channel's move to another generation.

    `syncd diff` names records, their signers, and a move's digest only where that move leads there.
    """
    bucket_with(shell.store, FIRST, SECOND)
    bucket = shell.store.bucket("app")
    signer = Signer(generate()[0])
    by = signer.public

    async def look() -> tuple[str, str, str]:
        commits = [await TreeReader(bucket).generation(number) for number in (1, 2)]
        await Channels(bucket, lambda: 1.8e9).promote(2, "stable", who="ann")
        await bucket.put_link("channels/forged", Link("app", generation_name(1)), metadata={MOVE: "{"})
        info = await bucket.get_info("channels/stable")
        assert info is not None
        assert commits[0] is not None
        assert commits[1] is not None
        other = Link("app", generation_name(1))
        await bucket.put_link("channels/moved", other, metadata=info.metadata)
        await sign_generation(bucket, 1, signer)
        return commits[0].digest, commits[1].digest, digest_of(info.metadata[MOVE].encode())

    one, two, move = asyncio.run(look())
    shell.forget()
    assert shell.fine("diff", "app", "1", "stable").splitlines()[:2] == [
        f"--- generation 1, record {one}, signed by {by}",
        f"+++ generation 2, record {two}; channel stable: move 1, digest {move}",
    ]
    sides = {
        "from": {"generation": 1, "record": one, "signers": [by], "channel": "forged", "count": 0, "move": ""},
        "to": {"generation": 2, "record": two, "signers": [], "channel": "stable", "count": 1, "move": move},
    }
    assert json.loads(shell.fine("diff", "app", "forged", "stable", "--json").splitlines()[0]) == sides
    told = json.loads(shell.fine("diff", "app", "forged", "stable", "--stat", "--json"))
    assert {name: told[name] for name in sides} == sides
    for channel in ("forged", "moved"):
        said = shell.fine("diff", "app", channel, "2").splitlines()[0]
        assert said == f"--- generation 1, record {one}, signed by {by}; channel {channel}: no move that leads here"


def test_diff_leaves_out_directories_that_were_only_touched(shell: Shell) -> None:
    bucket_with(shell.store, {"d": {}, "e": {}}, {"d": ({}, None, 9), "e": ({}, 0o700, 9)})
    assert shell.fine("diff", "app", "1", "2").splitlines()[2:] == ["m e"]
    assert json.loads(shell.fine("diff", "app", "1", "2", "--stat", "--json"))["meta"]["paths"] == 1


def test_diff_reads_only_what_differs(shell: Shell) -> None:
    """An identical subtree costs nothing: two roots and two nodes are fetched."""
    bucket_with(shell.store, FIRST, SECOND)
    asked: list[str] = []

    async def read() -> list[str]:
        history = await History.open(shell.store.bucket("app"))
        get = history.reader.blobs

        async def blobs(digests: Any, **options: Any) -> dict[str, bytes]:
            asked.extend(digests)
            return await get(digests, **options)

        history.reader.blobs = blobs  # type: ignore[method-assign]
        return [change.path async for change in history.differences(1, 2)]

    assert len(asyncio.run(read())) == 4
    assert len(set(asked)) == 4


def test_diff_stat_counts_paths_and_bytes(shell: Shell) -> None:
    bucket_with(shell.store, FIRST, SECOND)
    lines = [line.split(maxsplit=4) for line in shell.fine("diff", "app", "1", "2", "--stat").splitlines()]
    assert [line[0] for line in lines[:2]] == ["---", "+++"]
    assert lines[2:] == [
        ["A", "1", "0", "B", "added"],
        ["M", "2", "7", "B", "content changed"],
        ["m", "0", "0", "B", "only mode or time changed"],
        ["D", "1", "2", "B", "removed"],
        ["T", "0", "0", "B", "another kind of entry"],
    ]
    assert json.loads(shell.fine("diff", "app", "1", "2", "--stat", "--json"))["content"] == {"paths": 2, "bytes": 7}


def test_diff_in_json_tells_both_sides(shell: Shell) -> None:
    bucket_with(shell.store, {"f": b"x"}, {"f": (b"x", 0o600, 5), "g": "to"})
    lines = [json.loads(line) for line in shell.fine("diff", "app", "1", "2", "--json").splitlines()[1:]]
    assert [(line["path"], line["mark"]) for line in lines] == [("f", "m"), ("g", "A")]
    assert (lines[0]["before"]["mode"], lines[0]["after"]["mode"]) == ("0644", "0600")
    assert lines[1]["before"] is None
    assert lines[1]["after"]["target"] == "to"


# --- what is not there ---


@pytest.mark.parametrize(
    "arguments",
    [
        ("diff", "app", "1", "7"),
        ("diff", "app", "0000000007", "head"),
        ("ls", "app", "--generation", "7"),
        ("cat", "app", "f", "--generation", "7"),
        ("pull", "app", "mirror", "--generation", "7"),
    ],
)
def test_a_missing_generation_is_refused_with_those_there_are(
    shell: Shell, arguments: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    bucket_with(shell.store, FIRST, SECOND, FIRST)
    asyncio.run(shell.store.bucket("app").delete("generations/0000000001", expected_seq=None, metadata={}))
    code, out, err = shell.run(*arguments)
    wanted = "1" if arguments[0] == "diff" and arguments[2] == "1" else "7"
    assert (code, out) == (EXIT_USAGE, "")
    assert err == (
        f"syncd: folder 'app' has no generation {wanted}: the oldest is 2, the newest 3 (see: syncd log app)\n"
    )
    assert not (tmp_path / "mirror").exists()


def test_a_missing_channel_is_refused_with_those_there_are(shell: Shell) -> None:
    bucket_with(shell.store, FIRST)
    for name in ("stable", "9" * 50, "x\x1b"):
        code, _, err = shell.run("diff", "app", name, "head")
        assert code == EXIT_USAGE
        assert "has no channel" in err
        assert "channels: head" in err
        assert "\x1b" not in err


@pytest.mark.parametrize("command", ["log", "ls", "diff", "cat"])
def test_a_folder_without_a_generation_says_so(shell: Shell, command: str) -> None:
    bucket_with(shell.store)
    code, _, err = shell.run(command, "app", *{"diff": ["1", "2"], "cat": ["f"]}.get(command, []))
    assert code == EXIT_UNAVAILABLE
    assert err == ("syncd: folder 'app' has no generation yet (its publisher makes the first: syncd push app)\n")


@pytest.mark.parametrize(
    "arguments",
    [
        ("log", "app"),
        ("diff", "app", "1", "head"),
        ("ls", "app", "--generation", "1"),
        ("cat", "app", "f", "--generation", "1"),
        ("pull", "app", "mirror", "--generation", "1"),
    ],
)
def test_the_objects_layout_keeps_no_generations(
    shell: Shell, arguments: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    asyncio.run(shell.store.create_bucket("app", BucketSpec(layout="objects")))
    code, out, err = shell.run(*arguments)
    assert (code, out) == (EXIT_USAGE, "")
    assert "has the objects layout, which keeps no generations" in err


@pytest.mark.parametrize("command", [("log", "app"), ("ls", "app"), ("diff", "app", "1", "2"), ("cat", "app", "f")])
def test_a_missing_bucket_is_named(shell: Shell, command: tuple[str, ...]) -> None:
    code, _, err = shell.run(*command)
    assert code == EXIT_UNAVAILABLE
    assert "bucket 'app' does not exist" in err


# --- ls and cat ---


def test_ls_lists_the_newest_generation_or_another(shell: Shell) -> None:
    bucket_with(shell.store, FIRST, SECOND)
    assert shell.fine("ls", "app").splitlines() == ["dir", "dir/one", "dir/three", "link", "same", "same/deep"]
    listed = shell.fine("ls", "app", "--generation", "1").splitlines()
    assert listed == ["dir", "dir/one", "dir/two", "link", "same", "same/deep"]


def test_ls_long_and_json_show_the_entry(shell: Shell) -> None:
    bucket_with(shell.store, {"d": ({"f": (b"22", 0o4711, 10**9)}, 0o700, 0), "l": ("d/f", None, -(10**9))})
    directory, file, link = shell.fine("ls", "app", "--long").splitlines()
    assert directory.split()[:4] == ["dir", "0700", "0", "1970-01-01T00:00:00Z"]
    assert file.split()[:4] == ["file", "4711", "2", "1970-01-01T00:00:01Z"]
    assert file.endswith("d/f")
    assert link.split()[3:] == ["1969-12-31T23:59:59Z", "l", "->", "d/f"]
    rows = [json.loads(line) for line in shell.fine("ls", "app", "--json").splitlines()]
    assert [row["path"] for row in rows] == ["d", "d/f", "l"]
    assert rows[1] | {"digest": ""} == {
        "path": "d/f",
        "kind": "file",
        "mode": "4711",
        "size": 2,
        "mtime_ns": 10**9,
        "digest": "",
        "target": "",
    }
    assert all(len(row["digest"]) == 64 for row in rows[:2])
    assert rows[2]["target"] == "d/f"


def test_names_are_escaped_before_they_reach_the_terminal(shell: Shell) -> None:
    bucket_with(shell.store, {}, {HOSTILE: HOSTILE})
    for arguments in (("ls", "app"), ("ls", "app", "--long"), ("diff", "app", "1", "2")):
        lines = shell.fine(*arguments).splitlines()[2 if arguments[0] == "diff" else 0 :]
        assert len(lines) == 1
        assert not any(unicodedata.category(char) == "Cc" for char in lines[0])
    code, _, err = shell.run("cat", "app", HOSTILE)
    assert (code, "\x1b" in err) == (EXIT_USAGE, False)


def test_a_time_that_no_calendar_has_is_shown_as_a_number(shell: Shell) -> None:
    bucket_with(shell.store, {"f": (b"", None, (1 << 63) - 1), "g": (b"", None, -(1 << 63))})
    assert len(shell.fine("ls", "app", "--long").splitlines()) == 2


def test_ls_filter_belongs_to_objects(shell: Shell) -> None:
    bucket_with(shell.store, FIRST)
    code, _, err = shell.run("ls", "app", "--filter", "a=b")
    assert code == EXIT_USAGE
    assert "--filter goes with the objects layout" in err


def test_cat_writes_small_and_large_contents_of_any_generation(shell: Shell) -> None:
    large = os.urandom(3_000_000)
    bucket_with(shell.store, {"d": {"f": b"old"}, "large": large}, {"d": {"f": b"new"}, "empty": b""})
    assert shell.fine("cat", "app", "d/f") == "new"
    assert shell.fine("cat", "app", "d/f", "--generation", "1") == "old"
    assert shell.fine("cat", "app", "empty") == ""
    code = command_line.run(["cat", "app", "large", "--generation", "1"])
    assert (code, shell._capture.readouterr()[0] == large) == (EXIT_OK, True)


@pytest.mark.parametrize("path", ["d", "l", "no", "d/f/x", "l/f", "", "/", "d//f", "../d/f"])
def test_cat_refuses_what_is_no_file(shell: Shell, path: str) -> None:
    bucket_with(shell.store, {"d": {"f": b"x"}, "l": "d"})
    code, out, err = shell.run("cat", "app", path)
    assert (code, out) == (EXIT_USAGE, "")
    assert "has no content" in err or "no path" in err


def test_cat_writes_nothing_of_a_content_that_is_not_what_its_digest_says(shell: Shell) -> None:
    """A location is a hint: bytes of another content behind it are found out before any of them is written."""
    bucket_with(shell.store, {"f": b"right", "g": b"wrong"}, swap=("f", "g"))
    code, out, err = shell.run("cat", "app", "f")
    assert (code, out) == (EXIT_FAILED, "")
    assert "does not match its digest" in err


# --- notes ---


def test_a_note_is_one_line_of_text() -> None:
    for note in ("", "x" * NOTE_MAX, "Grüße 👩‍💻 [b]"):
        oneshot.check_note(note)
    for note in ("x" * (NOTE_MAX + 1), "two\nlines", "\x1b[2J", "a\u2028b", "tab\t", "\udc80"):
        with pytest.raises(UsageError):
            oneshot.check_note(note)


# --- verify ---


def verified(shell: Shell, mirror: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    code, out, err = shell.run("verify", str(mirror), "--folder", "app", "--json", *arguments)
    assert err == ""
    return code, json.loads(out)


def test_verify_recomputes_the_tree_digest_from_disk(shell: Shell, tmp_path: Path) -> None:
    bucket_with(shell.store, FIRST)
    mirror = write_spec(tmp_path / "mirror", FIRST)
    (mirror / ".syncd").mkdir()
    code, verdict = verified(shell, mirror)
    (generation,) = json.loads(shell.fine("log", "app", "--json"))
    assert code == EXIT_OK
    assert verdict == {
        "checked": 6,
        "extraneous": 0,
        "deviations": [],
        "generation": 1,
        "tree": generation["tree"],
        "found": generation["tree"],
    }
    line = shell.fine("verify", str(mirror), "--folder", "app")
    assert line == (
        f"generation 1, tree {generation['tree'][:12]}: 6 paths checked, 0 differ, 0 not from this folder\n"
    )


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        pytest.param(lambda m: (m / "dir/one").unlink(), [("dir/one", "missing")], id="missing"),
        pytest.param(lambda m: _write(m / "dir/one", b"2"), [("dir/one", "content")], id="content of the same size"),
        pytest.param(lambda m: (m / "dir/one").chmod(0o600), [("dir/one", "mode")], id="mode"),
        pytest.param(lambda m: os.utime(m / "dir/one", ns=(1, 1)), [("dir/one", "mtime")], id="mtime"),
        pytest.param(lambda m: _relink(m / "link", "dir/two"), [("link", "content")], id="link text"),
        pytest.param(lambda m: _become_dir(m / "dir/one"), [("dir/one", "kind")], id="kind"),
    ],
)
def test_verify_names_what_differs(shell: Shell, tmp_path: Path, change: Any, expected: list[tuple[str, str]]) -> None:
    """The path, what is wrong with it, another tree digest, and exit code 1."""
    bucket_with(shell.store, FIRST)
    mirror = write_spec(tmp_path / "mirror", FIRST)
    change(mirror)
    for directory in (mirror / "dir", mirror):
        os.utime(directory, ns=(5, 5))
    code, verdict = verified(shell, mirror)
    assert code == EXIT_FAILED
    assert [(one["path"], one["what"]) for one in verdict["deviations"]] == expected
    assert verdict["found"] != verdict["tree"]


def test_a_missing_directory_is_missing_with_all_below(shell: Shell, tmp_path: Path) -> None:
    bucket_with(shell.store, FIRST)
    mirror = write_spec(tmp_path / "mirror", {"link": "dir/one", "same": {"deep": b"x" * 100}})
    code, verdict = verified(shell, mirror)
    assert code == EXIT_FAILED
    assert [one["path"] for one in verdict["deviations"]] == ["dir", "dir/one", "dir/two"]


def test_what_is_not_from_this_folder_is_counted_and_no_fault(shell: Shell, tmp_path: Path) -> None:
    bucket_with(shell.store, FIRST)
    extra = {"aaa": b"1", "zzz": {"f": b"2"}}
    mirror = write_spec(tmp_path / "mirror", FIRST | extra | {"dir": FIRST["dir"] | {"one.bak": b""}})
    code, verdict = verified(shell, mirror)
    assert (code, verdict["extraneous"], verdict["deviations"]) == (EXIT_OK, 4, [])
    assert verdict["found"] == verdict["tree"]


def test_verify_compares_with_the_generation_that_was_applied(shell: Shell, tmp_path: Path) -> None:
    """A mirror that has not followed yet is not damaged; whoever wants to know names the generation."""
    bucket_with(shell.store, FIRST, SECOND)
    mirror = write_spec(tmp_path / "mirror", FIRST)

    async def verdicts() -> list[int]:
        bucket = shell.store.bucket("app")
        return [
            len(
                (
                    await audit(bucket, mirror, Takes(Rules(), ModePolicy()), generation=generation, applied=applied)
                ).deviations
            )
            for generation, applied in ((0, 0), (0, 1), (1, 0), (2, 1), (0, 99))
        ]

    assert [bool(count) for count in asyncio.run(verdicts())] == [True, False, False, True, True]
    assert verified(shell, mirror, "--generation", "1")[0] == EXIT_OK


def test_verify_of_a_part_compares_what_takes_part(shell: Shell, tmp_path: Path) -> None:
    """Excluded paths are not missing, and there is no tree digest to compare."""
    bucket_with(shell.store, FIRST)
    mirror = write_spec(tmp_path / "mirror", {"dir": {"one": b"1"}})

    async def verdict(rules: Rules) -> Any:
        return await audit(shell.store.bucket("app"), mirror, Takes(rules, ModePolicy()))

    fine = asyncio.run(verdict(Rules(include=("dir/one",))))
    assert (fine.checked, fine.deviations, fine.found, fine.sound) == (1, [], "", True)
    assert fine.extraneous == 0
    part = asyncio.run(verdict(Rules(exclude=("same/", "link"))))
    assert [(one.path, one.what) for one in part.deviations] == [("dir/two", "missing")]
    assert part.extraneous == 0
    (mirror / "link").symlink_to("dir/one")  # not ours to have put there
    assert asyncio.run(verdict(Rules(exclude=("same/", "link")))).extraneous == 1


def test_what_takes_no_part_is_not_read(shell: Shell, tmp_path: Path) -> None:
    bucket_with(shell.store, {"a": {"f": b"1"}, "b": {"f": b"2"}, "c": {"f": b"3"}})
    mirror = write_spec(tmp_path / "mirror", {"a": {"f": b"1"}, "c": {"f": b"3"}})

    async def verdict() -> Verdict:
        bucket = shell.store.bucket("app")
        history = await History.open(bucket)
        (excluded,) = [child async for path, child in history.entries() if path == "b"]
        await bucket.remove_blobs([excluded.location.blob])
        return await audit(bucket, mirror, Takes(Rules(exclude=("b/",)), ModePolicy()))

    assert asyncio.run(verdict()).sound


def test_a_fifo_is_no_file_and_not_counted(shell: Shell, tmp_path: Path) -> None:
    bucket_with(shell.store, FIRST)
    mirror = write_spec(tmp_path / "mirror", FIRST)
    (mirror / "dir/one").unlink()
    os.mkfifo(mirror / "dir/one")
    os.mkfifo(mirror / "other")
    os.utime(mirror / "dir", ns=(5, 5))
    _, verdict = verified(shell, mirror)
    assert [(one["path"], one["what"]) for one in verdict["deviations"]] == [("dir/one", "missing")]
    assert verdict["extraneous"] == 0


def test_another_tree_digest_is_never_sound() -> None:
    """Whatever the comparison of the paths says: the digest is what counts."""
    assert Verdict(generation=1, tree="a", found="a").sound
    assert not Verdict(generation=1, tree="a", found="b").sound


def test_rules_that_leave_nothing_out_do_not_hide_the_digest(shell: Shell, tmp_path: Path) -> None:
    bucket_with(shell.store, FIRST)
    mirror = write_spec(tmp_path / "mirror", FIRST)
    verdict = asyncio.run(audit(shell.store.bucket("app"), mirror, Takes(Rules(exclude=("*.swp",)), ModePolicy())))
    assert verdict.found == verdict.tree != ""


def test_verify_ends_with_an_error_where_the_tree_cannot_be_read(shell: Shell, tmp_path: Path) -> None:
    """What is not compared is never called sound."""
    bucket_with(shell.store, FIRST)

    async def damage() -> None:
        history = await History.open(shell.store.bucket("app"))
        root = (await history.commit()).generation.root
        await shell.store.bucket("app").remove_blobs([root.location.blob])

    asyncio.run(damage())
    code, _, err = shell.run("verify", str(write_spec(tmp_path / "mirror", FIRST)), "--folder", "app")
    assert code == EXIT_FAILED
    assert "blob" in err


def test_a_digester_ignores_what_is_below_a_directory_it_was_not_told_of() -> None:
    file, directory = Entry(Kind.FILE, 0o644, 5, 0, "af" * 32), Entry(Kind.DIR, 0o755, 5)
    whole, gappy = TreeDigester(), TreeDigester()
    for path, entry in (("a", directory), ("a/f", file), ("z", file)):
        whole.add(path, entry)
    for path, entry in (("a", directory), ("a/b/c/f", file), ("a/f", file), ("b/f", file), ("z", file)):
        gappy.add(path, entry)
    assert whole.finish() == gappy.finish()


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    os.utime(path, ns=(5, 5))


def _relink(path: Path, target: str) -> None:
    path.unlink()
    path.symlink_to(target)
    os.utime(path, ns=(5, 5), follow_symlinks=False)


def _become_dir(path: Path) -> None:
    path.unlink()
    path.mkdir()


# --- push, pull and gc say what they did ---


@pytest.mark.parametrize(
    ("result", "expected"),
    [
        (PushResult(2, 1, 100, 5, generation=3, committed=True), "generation 3: 2 put, 1 deleted, 100 B uploaded"),
        (PushResult(generation=3), "nothing changed: generation 3"),
        (PushResult(2, 1, 100), "2 put, 1 deleted, 100 B uploaded"),
    ],
)
def test_push_names_the_generation(
    shell: Shell, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, result: PushResult, expected: str
) -> None:
    """Made by it, or there already; in the objects layout there is none. All wishes reach the publisher."""
    asked: dict[str, Any] = {}

    async def pushed(_: Publisher, **wishes: Any) -> PushResult:
        asked.update(wishes)
        return result

    monkeypatch.setattr(Publisher, "push", pushed)
    config = configured(tmp_path)
    out = shell.fine("push", "app", "--note", "a note", "--change-layout", "--take-over", "--config", config)
    assert out.startswith(f"app: {expected}")
    assert {key: asked[key] for key in ("allow_delete", "take_over", "change_layout", "note")} == {
        "allow_delete": False,
        "take_over": True,
        "change_layout": True,
        "note": "a note",
    }
    told = json.loads(shell.fine("push", "app", "--json", "--config", config))
    assert (told["generation"], told["committed"]) == (result.generation, result.committed)


def test_gc_says_what_went_and_the_sizes(shell: Shell, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    dry: list[bool] = []

    async def collect(_: Publisher, *, dry_run: bool) -> Collected:
        dry.append(dry_run)
        return Collected(10, 4096, 3, 2048, 5, 2, 1)

    monkeypatch.setattr(Publisher, "collect", collect)
    config = configured(tmp_path)
    assert shell.fine("gc", "app", "--config", config) == (
        "app: 5 generations kept, 2 removed; 3 of 10 blobs freed, 1 packs packed anew\n"
        "app: 4.0 KiB before, 2.0 KiB after\n"
    )
    assert shell.fine("gc", "app", "--dry-run", "--config", config) == (
        "app: 5 generations kept, 2 would be removed; 3 of 10 blobs would be freed, 1 packs would be packed anew\n"
        "app: 4.0 KiB before\n"
    )
    assert json.loads(shell.fine("gc", "app", "--json", "--config", config))["size_after"] == 2048
    assert dry == [False, True, False]
    assert shell.run("gc", "other", "--config", config)[0] == EXIT_USAGE


def configured(directory: Path) -> str:
    file = directory / "syncd.toml"
    file.write_text(f'[[publish]]\nfolder = "app"\npath = "{directory}/source"\n')
    return str(file)


# --- which generation a mirror has ---


def test_the_index_says_which_generation_a_mirror_has(tmp_path: Path) -> None:
    """Else the status of the daemon that holds the index; else nobody knows."""
    settings = load(None, {"SYNCD_DAEMON__STATE_DIR": str(tmp_path / "state")})
    state = StateDir(settings.daemon.state_dir)
    directory = tmp_path / "mirror"

    def applied() -> int:
        return oneshot._applied(settings, "app", directory)

    assert applied() == 0
    assert not state.root.exists()
    state.prepare()
    for folder, generation in (("aaa", 9), ("app", 4)):
        status = FolderStatus("subscribe", folder, str(directory), generation=generation)
        state.write_status(f"{status.key}.json", status.to_json())
    assert applied() == 4
    index = Index(state.index_file("subscribe", "app", directory))
    assert applied() == 4
    index.close()
    assert applied() == 4
    for note, expected in (("{}", 4), ("no JSON", 4), ('{"number": 7}', 7)):
        index = Index(state.index_file("subscribe", "app", directory))
        index.set_note(APPLIED, note)
        index.close()
        assert applied() == expected
    with state.lock():
        assert applied() == 4


# --- what a mirror asks for, and the bucket does not have ---


@pytest.mark.parametrize(
    ("asks", "said"),
    [
        ("", []),
        ('channel = "stable"', []),
        ("pin = 2", []),
        ('channel = "slow"', ["folder 'app' has no channel 'slow'"]),
        ("pin = 9", ["folder 'app' has no generation 9: the oldest is 1, the newest 2"]),
    ],
)
async def test_a_channel_or_pin_that_is_not_there_is_told(tmp_path: Path, asks: str, said: list[str]) -> None:
    """A warning: it may come to be."""
    store = MemoryStore()
    await store.create_bucket("app", BucketSpec(layout="generations"))
    for number, spec in enumerate((FIRST, SECOND), 1):
        await commit(store.bucket("app"), number, spec)
    await Channels(store.bucket("app"), lambda: 1.8e9).promote(2, "stable", who="ann")
    mirror = subscribed(tmp_path, asks)
    found = await oneshot._mirror_findings(store.bucket("app"), mirror)
    assert [item.text for item in found] == said
    assert {item.severity for item in found} <= {"warning"}


@pytest.mark.parametrize(
    ("asks", "said"),
    [
        ("", []),
        ('mode = "release"', ['mode = "release"']),
        ('channel = "x"\npin = 3', ["channel and pin"]),
        ('[subscribe.hooks]\napply = ["true"]', ["hooks"]),
        (f'trusted_keys = ["{generate()[1]}"]', ["trusted_keys"]),
    ],
    ids=["nothing", "release", "channel and pin", "hooks", "keys"],
)
async def test_what_needs_generations_is_told_of_an_objects_bucket(tmp_path: Path, asks: str, said: list[str]) -> None:
    store = MemoryStore()
    await store.create_bucket("app", BucketSpec(layout="objects"))
    found = await oneshot._mirror_findings(store.bucket("app"), subscribed(tmp_path, asks))
    assert [item.text for item in found] == [f"the objects layout has no place for {what}" for what in said]
    assert {item.severity for item in found} <= {"error"}


def subscribed(directory: Path, asks: str) -> SubscribeSettings:
    file = directory / "fleet.toml"
    file.write_text(f'[[subscribe]]\nfolder = "app"\npath = "{directory}/m"\n{asks}\n')
    return load(file, {}).subscribe[0]
