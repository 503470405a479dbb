"""Moving channels, replacing keys and adding signatures from the command line, down to a bucket in memory."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import stat
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest

from syncd import cli as command_line
from syncd import cli_channels, oneshot
from syncd.channels import Channels
from syncd.errors import EXIT_CONFIG, EXIT_FAILED, EXIT_NOPERM, EXIT_OK, EXIT_TEMPFAIL, EXIT_USAGE
from syncd.nodes import digest_of
from syncd.records import read_record
from syncd.settings import load
from syncd.store.base import CHANNELS, BucketSpec, Link
from syncd.store.memory import MemoryStore
from syncd.trees import generation_name
from syncd.trust import MOVE, SIGNATURES, Seen, Statement, Trust, check_signed, judge_offer
from syncd.wiring import read_signer
from tests.support.channels import BOB, NOW, fill, meanwhile, move_text, offer_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from syncd.settings import Settings


class Shell:
    """Commands against a store in memory."""

    def __init__(self, store: MemoryStore, capture: Any, directory: Path) -> None:
        self.store = store
        self.directory = directory
        self._capture = capture
        self.shown = ""

    def run(self, *arguments: str) -> tuple[int, str, str]:
        code = command_line.run(list(arguments))
        out, err = (text.decode() for text in self._capture.readouterr())
        self.shown += out + err
        return code, out, err

    def fine(self, *arguments: str) -> str:
        code, out, err = self.run(*arguments)
        assert (code, err) == (EXIT_OK, "")
        return out

    def seed(self, name: str) -> tuple[str, str]:
        """A seed file and its public key."""
        file = str(self.directory / name)
        return file, self.fine("keygen", file).strip()


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch, capfdbinary: Any, tmp_path: Path) -> Shell:
    store = MemoryStore()

    @asynccontextmanager
    async def open_store(_: Settings) -> AsyncIterator[tuple[MemoryStore, None]]:
        yield store, None

    async def prepare() -> None:
        await store.create_bucket("app", BucketSpec(layout="generations"))
        await fill(store.bucket("app"))
        await store.create_bucket("plain", BucketSpec())

    asyncio.run(prepare())
    monkeypatch.setattr(oneshot, "open_store", open_store)
    monkeypatch.setenv("SYNCD_DAEMON__STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("SYNCD_DAEMON__HOST", "desk")
    monkeypatch.setenv("SUDO_USER", "ann")
    for one in cli_channels.COMMANDS:
        assert one.name is not None
        monkeypatch.setitem(command_line.cli.commands, one.name, one)
    return Shell(store, capfdbinary, tmp_path)


def test_promote_rollback_and_channels_say_what_they_did(shell: Shell) -> None:
    """Once in words, once as JSON."""
    assert shell.fine("promote", "app", "1", "--channel", "stable") == "app: channel stable: generation 1 (move 1)\n"
    out = shell.fine("promote", "app", "head", "--channel", "stable", "--why", "tested by hand")
    assert out == "app: channel stable: generation 1 -> generation 3 (move 2)\n"
    assert shell.fine("rollback", "app", "--channel", "stable").endswith("generation 3 -> generation 2 (move 3)\n")
    moved = json.loads(shell.fine("rollback", "app", "--channel", "stable", "--to", "1", "--json"))
    assert (moved["before"], moved["number"], moved["count"], moved["who"]) == (2, 1, 4, "ann@desk")
    assert "generation 3 -> generation 2" in shell.fine("rollback", "app")
    lines = [line.split() for line in shell.fine("channels", "app").splitlines()]
    assert lines[0] == ["channel", "generation", "behind", "moves", "time", "by", "signed", "why"]
    assert [line[:4] for line in lines[1:]] == [["head", "2", "1", "1"], ["stable", "1", "2", "4"]]
    assert json.loads(shell.fine("channels", "app", "--json"))[1]["who"] == "ann@desk"
    assert "stable" not in shell.fine("channels", "app", "--remove", "stable")
    assert "(move 5)" in shell.fine("promote", "app", "2", "--channel", "stable", "--valid-days", "30").replace(
        ", valid until", ") until"
    )


def test_who_moves_is_told_as_far_as_it_is_known(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who called sudo, the user, or the number of one without a name; nothing a terminal acts on."""
    settings = load(None, os.environ)
    assert cli_channels.who_moves(settings) == "ann@desk"
    monkeypatch.setenv("SUDO_USER", "a\x1b[2J")
    assert cli_channels.who_moves(settings) == "a\\x1b[2J@desk"
    monkeypatch.delenv("SUDO_USER")
    monkeypatch.setattr("getpass.getuser", lambda: "bob")
    assert cli_channels.who_moves(settings) == "bob@desk"

    def nobody() -> str:
        raise KeyError("uid not found")

    monkeypatch.setattr("getpass.getuser", nobody)
    assert cli_channels.who_moves(settings) == f"{os.getuid()}@desk"


def test_what_others_wrote_is_shown_without_harm(shell: Shell) -> None:
    """Escape sequences of a channel's name, and of who and why."""

    async def forge() -> None:
        text = move_text(channel="x\x1b[2J", who="\x1b[31m", why="\u202e")
        link = Link("app", generation_name(1))
        await shell.store.bucket("app").put_link(CHANNELS + "x\x1b[2J", link, metadata={MOVE: text})
        await shell.store.bucket("app").put_link(CHANNELS + "\x1b[2Jgone", Link("app", generation_name(9)))

    asyncio.run(forge())
    code, out, err = shell.run("channels", "app")
    assert (code, err) == (EXIT_OK, "  \\x1b[2Jgone: it points at generation 9, which is gone\n")
    assert "\x1b" not in out
    assert "\u202e" not in out
    assert "x\\x1b[2J" in out


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("promote", "app", "9", "--channel", "stable"), EXIT_USAGE, "the oldest is 1, the newest 3"),
        (("promote", "app", "beta", "--channel", "stable"), EXIT_USAGE, "no channel 'beta'"),
        (("promote", "app", "1", "--channel", "head"), EXIT_USAGE, "follows the commits"),
        (("promote", "app", "1", "--channel", "a/b"), EXIT_USAGE, "no name of a channel"),
        (("promote", "app", "1"), EXIT_USAGE, "Missing option '--channel'"),
        (("promote", "app", "1", "--channel", "s", "--why", "a\nb"), EXIT_USAGE, "control characters"),
        (("promote", "app", "1", "--channel", "s", "--valid-days", "-1"), EXIT_USAGE, "valid-days"),
        (("promote", "plain", "1", "--channel", "s"), EXIT_USAGE, "objects layout"),
        (("promote", "none", "1", "--channel", "s"), 69, "does not exist"),
        (("promote", "app", "1", "--channel", "s", "--seed-file", "/nonexistent"), EXIT_CONFIG, "cannot be read"),
        (("rollback", "app", "--channel", "stable"), EXIT_USAGE, "no channel 'stable'"),
        (("rollback", "app", "--to", "8"), EXIT_USAGE, "no generation 8: the oldest is 1"),
        (("rollback", "app", "--to", "3"), EXIT_USAGE, "points at generation 3 already"),
        (("channels", "plain"), EXIT_USAGE, "objects layout"),
        (("channels", "app", "--remove", "head"), EXIT_USAGE, "cannot be removed"),
        (("keys", "app", "--threshold", "1"), EXIT_USAGE, "which keys are trusted now"),
        (("keys", "app", "--trust", "UABC"), EXIT_USAGE, "no public nkey"),
        (("sign", "app", "--seed-file", "x"), EXIT_USAGE, "nothing to sign (name it"),
        (("sign", "app", "--generation", "1"), EXIT_USAGE, "nothing to sign with"),
        (("keys", "app", "--why", "a\nb"), EXIT_USAGE, "control characters"),
    ],
)
def test_what_cannot_be_done_ends_in_one_line(shell: Shell, arguments: tuple[str, ...], code: int, said: str) -> None:
    """And in a documented exit code."""
    found, out, err = shell.run(*arguments)
    assert (found, out, err.count("\n")) == (code, "", 1)
    assert said in err


@pytest.mark.fault("R7 R9")
def test_a_refused_move_ends_in_one_line(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    """Collected blobs, and another operator."""
    meanwhile(monkeypatch, lambda: Channels(shell.store.bucket("app"), lambda: NOW).promote(1, "stable", who=BOB))
    code, out, err = shell.run("promote", "app", "2", "--channel", "stable")
    assert (code, out) == (EXIT_FAILED, "")
    assert err.startswith(f"syncd: {BOB} moved channel 'stable' to generation 1 meanwhile")
    shell.store.set_blob_payload("app", digest_of(b"22"), None)
    code, out, err = shell.run("promote", "app", "2", "--channel", "stable")
    assert (code, out, err.count("\n")) == (EXIT_FAILED, "", 1)
    assert err.startswith("syncd: blobs of generation 2 were collected")


@pytest.mark.fault("K14")
@pytest.mark.parametrize("umask", [0o000, 0o022, 0o777])
def test_keygen_writes_a_seed_that_nobody_else_reads(shell: Shell, monkeypatch: pytest.MonkeyPatch, umask: int) -> None:
    """Mode 0600 whatever the umask; what is printed is the public key alone, and only once the seed is durable."""
    synced: list[int] = []
    fsync = os.fsync

    def sync(fd: int) -> None:
        synced.append(stat.S_IFMT(os.fstat(fd).st_mode))
        fsync(fd)

    monkeypatch.setattr(os, "fsync", sync)
    before = os.umask(umask)
    try:
        file, public = shell.seed("app.seed")
    finally:
        os.umask(before)
    path = shell.directory / "app.seed"
    assert synced == [stat.S_IFREG, stat.S_IFDIR]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.read_text().startswith("SU")
    assert read_signer(path).public == public
    assert path.read_text().strip() not in shell.shown
    assert file == str(path)


@pytest.mark.fault("K14")
def test_keygen_never_writes_over(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file, a dangling symlink, a directory; a disk that fails leaves no half of a seed."""
    shell.seed("app.seed")
    content = (shell.directory / "app.seed").read_text()
    (shell.directory / "dangling").symlink_to(shell.directory / "elsewhere")
    (shell.directory / "directory").mkdir()
    for name in ("app.seed", "dangling"):
        code, out, err = shell.run("keygen", str(shell.directory / name))
        assert (code, out) == (EXIT_USAGE, "")
        assert "is there already" in err
    assert shell.run("keygen", str(shell.directory / "directory"))[0] == EXIT_USAGE
    assert shell.run("keygen", str(shell.directory / "no" / "such"))[0] == EXIT_TEMPFAIL
    assert (shell.directory / "app.seed").read_text() == content
    assert not (shell.directory / "elsewhere").exists()

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    code, out, err = shell.run("keygen", str(shell.directory / "other"))
    assert (code, out) == (EXIT_TEMPFAIL, "")
    assert "No space left on device" in err
    assert not (shell.directory / "other").exists()


@pytest.mark.fault("K14")
def test_a_seed_that_others_can_read_is_told_and_what_is_none_never_shown(shell: Shell) -> None:
    """The message names the file; not what it holds."""
    file, public = shell.seed("app.seed")
    path = shell.directory / "app.seed"
    seed = path.read_text()
    path.chmod(0o640)
    code, out, err = shell.run("sign", "app", "--generation", "1", "--seed-file", file)
    assert (code, out) == (EXIT_OK, f"app: generation 1: signed by {public}\n")
    assert err == f"syncd: {file} can be read by others (chmod 600)\n"
    for text in (seed[:-2], seed[:20] + "A" + seed[21:], public):
        path.write_text(text)
        code, out, err = shell.run("sign", "app", "--generation", "1", "--seed-file", file)
        assert (code, out, err.count("\n")) == (EXIT_CONFIG, "", 1)
        assert "holds no seed" in err
        assert text not in err


def test_the_configuration_says_who_signs_and_whom_hosts_trust(shell: Shell) -> None:
    """Unless options say otherwise; to look, no seed is read."""
    one, first = shell.seed("one.seed")
    two, second = shell.seed("two.seed")
    _, third = shell.seed("three.seed")
    config = shell.directory / "fleet.toml"
    config.write_text(
        f"""
        [[publish]]
        folder = "other"
        path = "/srv/other"
        sign_seed_file = "/nonexistent"
        [[publish]]
        folder = "app"
        path = "/srv/app"
        sign_seed_file = "{one}"
        [[subscribe]]
        folder = "other"
        path = "/srv/others"
        trusted_keys = ["{third}"]
        [[subscribe]]
        folder = "app"
        path = "/srv/mirror"
        [[subscribe]]
        folder = "app"
        path = "/srv/copy"
        trusted_keys = ["{first}", "{second}"]
        trusted_threshold = 2
        """
    )
    common = ("--config", str(config))
    shell.fine("sign", "app", "--generation", "2", *common)
    out = shell.fine("promote", "app", "2", "--channel", "stable", *common)
    assert f"signed by {first}" in out
    out = shell.fine("promote", "app", "2", "--channel", "stable", "--seed-file", two, *common)
    assert f"signed by {second}" in out
    assert "waits for signatures" in shell.fine("keys", "app", "--remove", second, "--threshold", "1", *common)
    assert shell.fine("sign", "app", "--keys", "1", "--seed-file", two, *common)
    assert "key set 1 (trusted): 1 of 1 have to sign" in shell.fine("keys", "app", *common)
    assert "key set 1 (waits for signatures)" in shell.fine("keys", "app", "--trust", third, *common)
    (shell.directory / "one.seed").unlink()
    assert "key set 1 (trusted)" in shell.fine("keys", "app", *common)
    assert shell.run("keys", "app", "--add", second, *common)[0] == EXIT_CONFIG


@pytest.mark.fault("K14")
def test_a_folder_gets_signed_moves_and_new_keys_from_the_command_line(shell: Shell) -> None:
    """From two seeds to a subscriber that follows; and no seed is ever shown."""
    one, first = shell.seed("one.seed")
    two, second = shell.seed("two.seed")
    code, out, err = shell.run("promote", "app", "2", "--channel", "stable", "--seed-file", one)
    assert (code, out) == (EXIT_OK, f"app: channel stable: generation 2 (move 1, signed by {first})\n")
    assert "generation 2 itself is not signed" in err
    out = shell.fine("sign", "app", "--generation", "2", "--channel", "stable", "--seed-file", one)
    assert out.splitlines() == [
        f"app: generation 2: signed by {first}",
        f"app: channel stable: had been signed already by {first}",
    ]
    signed = json.loads(shell.fine("sign", "app", "--channel", "stable", "--seed-file", two, "--json"))
    assert signed == {
        "key": second,
        "signed": [{"what": "generation 2", "new": True}, {"what": "channel stable", "new": True}],
    }
    trust = Trust(frozenset((first, second)), 2)
    offer = asyncio.run(offer_of(shell.store.bucket("app"), "stable"))
    assert judge_offer(trust, Seen(), offer).move.who == "ann@desk"
    assert shell.fine("sign", "app", "--generation", "1", "--seed-file", one).endswith(f"signed by {first}\n")
    record = asyncio.run(read_record(shell.store.bucket("app"), 1))
    assert record is not None
    check_signed(Trust(frozenset((first,)), 1), Statement.GENERATION, record.data, record.info.metadata[SIGNATURES])
    assert "no key sets" in shell.fine("keys", "app")
    out = shell.fine("keys", "app", "--trust", first, "--add", second, "--threshold", "2", "--seed-file", one)
    assert out.splitlines()[0].startswith("key set 1 (trusted): 2 of 2 have to sign")
    assert set(out.split()) >= {first, second}
    arguments = ("keys", "app", "--trust", first, "--remove", first, "--threshold", "1", "--seed-file", two)
    assert "key set 2 (waits for signatures)" in shell.fine(*arguments, "--why", "stolen")
    code, out, err = shell.run(*arguments)
    assert (code, out, err.count("\n")) == (EXIT_FAILED, "", 1)
    assert shell.fine("sign", "app", "--keys", "2", "--seed-file", one) == f"app: key set 2: signed by {first}\n"
    states = json.loads(shell.fine("keys", "app", "--trust", first, "--json"))
    assert [(state["version"], state["keys"], state["trusted"]) for state in states][1] == (2, [second], True)
    assert "(not checked: --trust)" in shell.fine("keys", "app")
    for name in ("one.seed", "two.seed"):
        assert (shell.directory / name).read_text().strip() not in shell.shown


@pytest.mark.fault("K5")
def test_what_must_not_be_signed_ends_in_one_line(shell: Shell) -> None:
    """A move that leads elsewhere than its channel."""
    seed, _ = shell.seed("one.seed")

    async def forge() -> None:
        link = Link("app", generation_name(1))
        await shell.store.bucket("app").put_link(CHANNELS + "stable", link, metadata={MOVE: move_text(number=2)})

    asyncio.run(forge())
    code, out, err = shell.run("sign", "app", "--channel", "stable", "--seed-file", seed)
    assert (code, out, err.count("\n")) == (EXIT_NOPERM, "", 1)
    assert "the move leads to generation 2" in err
