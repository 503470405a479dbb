"""Moving channels, replacing keys and adding signatures from the command line, down to a bucket in memory."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import re
import stat
import sys
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from syncd import cli as command_line
from syncd import cli_channels, oneshot
from syncd.channels import Channels
from syncd.errors import EXIT_CONFIG, EXIT_FAILED, EXIT_NOPERM, EXIT_OK, EXIT_TEMPFAIL, EXIT_USAGE, Untrusted
from syncd.nodes import digest_of, encode_record
from syncd.records import read_record, signature_text
from syncd.settings import load
from syncd.store.base import CHANNELS, BucketSpec, Link, ObjectMeta, SmallPut
from syncd.store.memory import MemoryBucket, MemoryStore
from syncd.trees import generation_name
from syncd.trust import MOVE, SIGNATURES, Seen, Statement, Trust, check_signed, judge_offer, keys_name
from syncd.wiring import read_signer
from tests.support.channels import AT, BOB, NOW, fill, link_of, meanwhile, metas, move_text, offer_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

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

    def bucket(self) -> MemoryBucket:
        return self.store.bucket("app")

    def record(self, number: int) -> str:
        """The digest of a generation's record, as a person finds it."""
        side = json.loads(self.fine("diff", "app", str(number), str(number), "--stat", "--json"))["to"]
        return str(side["record"])

    def move(self, channel: str) -> str:
        """The digest of a channel's move."""
        found = {one["name"]: one for one in json.loads(self.fine("channels", "app", "--json"))}
        return str(found[channel]["digest"])

    def key_set(self, version: int) -> str:
        """The digest of a key set."""
        return str(json.loads(self.fine("keys", "app", "--json"))[version - 1]["digest"])

    def metas(self) -> list[Any]:
        return asyncio.run(metas(self.bucket()))

    def refused(self, *arguments: str) -> str:
        """A signature that is not given: 77, one line, and nothing is written."""
        before = self.metas()
        code, out, err = self.run("sign", "app", *arguments)
        assert (code, out, err.count("\n")) == (EXIT_NOPERM, "", 1), err
        assert self.metas() == before
        return err


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
    assert lines[0] == ["channel", "generation", "behind", "moves", "time", "by", "signed", "digest", "why"]
    assert lines[2][7] == shell.move("stable")[:32]
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
        (("promote", "app", "1", "--channel", "s", "--valid-days", "nan"), EXIT_USAGE, "no number of days"),
        (("promote", "app", "1", "--channel", "s", "--valid-days", "inf"), EXIT_USAGE, "valid-days"),
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
        (("keys", "app", "--trust-threshold", "2"), EXIT_USAGE, "says nothing without --trust"),
        (("sign", "app", "--keys", "1", "--trust-threshold", "2", "--seed-file", "x"), EXIT_CONFIG, "cannot be read"),
        (("pull", "app", "/nonexistent/x", "--trust-threshold", "2"), EXIT_USAGE, "says nothing without --trust"),
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


@pytest.mark.fault("K3")
def test_a_count_that_hosts_would_take_for_an_old_one_is_refused(shell: Shell) -> None:
    """`syncd promote --count` names 1 or 2 after two moves; later the channel's move is overwritten with `{`.

    Old counts are a usage error and 9 is taken; after the damage `rollback --count 4` is taken, too.
    """
    for generation in ("1", "2"):
        shell.fine("promote", "app", generation, "--channel", "stable")
    for count in ("1", "2"):
        code, _, err = shell.run("promote", "app", "3", "--channel", "stable", "--count", count)
        assert (code, "is counted 2 (choose 3 or more, or none)" in err) == (EXIT_USAGE, True)
    assert "(move 9)" in shell.fine("promote", "app", "3", "--channel", "stable", "--count", "9")

    async def damage() -> None:
        link = Link("app", generation_name(3))
        await shell.store.bucket("app").put_link(CHANNELS + "stable", link, metadata={MOVE: "{"})

    asyncio.run(damage())
    assert "(move 4)" in shell.fine("rollback", "app", "--to", "1", "--channel", "stable", "--count", "4")


def test_an_unsigned_move_after_a_signed_one_is_told(shell: Shell) -> None:
    """Whoever forgets the seed learns it before the hosts do."""
    seed, _ = shell.seed("ann.seed")
    told = "this move is not signed, and the one before was"
    for arguments, warns in [
        (("promote", "app", "1", "--channel", "stable"), False),
        (("promote", "app", "2", "--channel", "stable", "--seed-file", seed), False),
        (("rollback", "app", "--channel", "stable"), True),
        (("promote", "app", "3", "--channel", "stable"), False),
    ]:
        code, _, err = shell.run(*arguments)
        assert (code, told in err) == (EXIT_OK, warns)


@pytest.mark.fault("R7 R9")
def test_a_refused_move_ends_in_one_line(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another operator promotes in the middle of `syncd promote`; then a content blob of its generation is deleted.

    Both times the command fails, and its message says who was first or that blobs were collected.
    """
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
    """`syncd keygen` runs under umask 000, 022 and 777.

    The seed file has mode 0600, file and directory are synced, and only the public key is printed.
    """
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


def test_keygen_never_writes_over(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    """`syncd keygen` aims at a file, a dangling link, a directory, a missing one; then fsync says ENOSPC.

    Each is refused, nothing is overwritten or made through the link, and no half of a seed is left.
    """
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
    """`syncd sign` uses a seed file of mode 0640, then one with a cut seed, a mistyped one or a public key in it.

    The first signs with a warning; the others are refused by the file's name, never showing what it holds.
    """
    file, public = shell.seed("app.seed")
    path = shell.directory / "app.seed"
    seed = path.read_text()
    path.chmod(0o640)
    digest = shell.record(1)
    code, out, err = shell.run("sign", "app", "--generation", "1", "--first", "--expect", digest, "--seed-file", file)
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
    shell.fine("sign", "app", "--generation", "2", "--first", "--expect", shell.record(2), *common)
    out = shell.fine("promote", "app", "2", "--channel", "stable", *common)
    assert f"signed by {first}" in out
    out = shell.fine("promote", "app", "2", "--channel", "stable", "--seed-file", two, *common)
    assert f"signed by {second}" in out
    assert "waits for signatures" in shell.fine("keys", "app", "--remove", second, "--threshold", "1", *common)
    assert shell.fine("sign", "app", "--keys", "1", "--expect", shell.key_set(1), "--seed-file", two, *common)
    assert "key set 1 (trusted): 1 of 1 have to sign" in shell.fine("keys", "app", *common)
    assert "key set 1 (waits for signatures)" in shell.fine("keys", "app", "--trust", third, *common)
    (shell.directory / "one.seed").unlink()
    assert "key set 1 (trusted)" in shell.fine("keys", "app", *common)
    assert shell.run("keys", "app", "--add", second, *common)[0] == EXIT_CONFIG


@pytest.mark.fault("K14")
def test_a_folder_gets_signed_moves_and_new_keys_from_the_command_line(shell: Shell) -> None:
    """`syncd keygen`, `promote`, `sign` and `keys` run with two seed files, until one key is dropped.

    A host that trusts the keys follows, and neither seed shows in any output.
    """
    one, first = shell.seed("one.seed")
    two, second = shell.seed("two.seed")
    code, out, err = shell.run("promote", "app", "2", "--channel", "stable", "--seed-file", one)
    assert (code, out) == (EXIT_OK, f"app: channel stable: generation 2 (move 1, signed by {first})\n")
    assert "generation 2 itself is not signed" in err
    pin = ("--channel", "stable", "--expect", shell.move("stable"))
    out = shell.fine("sign", "app", *pin, "--first", "--seed-file", one)
    assert out.splitlines() == [
        f"app: generation 2: signed by {first}",
        f"app: channel stable: had been signed already by {first}",
    ]
    signed = json.loads(shell.fine("sign", "app", *pin, "--trust", first, "--seed-file", two, "--json"))
    assert signed == {
        "key": second,
        "signed": [
            {"what": "generation 2", "digest": shell.record(2), "new": True},
            {"what": "channel stable", "digest": shell.move("stable"), "new": True},
        ],
    }
    trust = Trust(frozenset((first, second)), 2)
    offer = asyncio.run(offer_of(shell.store.bucket("app"), "stable"))
    assert judge_offer(trust, Seen(), offer).move.who == "ann@desk"
    pin = ("--generation", "1", "--expect", shell.record(1))
    assert shell.fine("sign", "app", *pin, "--first", "--seed-file", one).endswith(f"signed by {first}\n")
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
    pin = ("--keys", "2", "--expect", shell.key_set(2), "--trust", first)
    assert shell.fine("sign", "app", *pin, "--seed-file", one) == f"app: key set 2: signed by {first}\n"
    states = json.loads(shell.fine("keys", "app", "--trust", first, "--json"))
    assert [(state["version"], state["keys"], state["trusted"]) for state in states][1] == (2, [second], True)
    assert "(not checked: --trust)" in shell.fine("keys", "app")
    for name in ("one.seed", "two.seed"):
        assert (shell.directory / name).read_text().strip() not in shell.shown


@pytest.mark.fault("K5")
def test_what_must_not_be_signed_ends_in_one_line(shell: Shell) -> None:
    """A channel that points at generation 1 is given a forged move to generation 2; `syncd sign` is to sign it.

    It is refused in one line, and nothing is written.
    """
    seed, _ = shell.seed("one.seed")

    async def forge() -> None:
        link = Link("app", generation_name(1))
        await shell.store.bucket("app").put_link(CHANNELS + "stable", link, metadata={MOVE: move_text(number=2)})

    asyncio.run(forge())
    err = shell.refused("--channel", "stable", "--first", "--expect", "0" * 64, "--seed-file", seed)
    assert "the move leads to generation 2" in err


# -- signing what was looked at ---------------------------------------------------------------------------------------


class Holders:
    """Two people with a key each, whom the fleet trusts, and a thief with one of his own."""

    def __init__(self, shell: Shell) -> None:
        (self.ann, self.anns), (self.bob, self.bobs), (self.thief, self.thiefs) = (
            shell.seed(f"{name}.seed") for name in ("ann", "bob", "thief")
        )
        self.trust = ("--trust", self.anns, "--trust", self.bobs, "--trust-threshold", "2")
        for number in (1, 2):
            pin = ("--generation", str(number), "--expect", shell.record(number))
            shell.fine("sign", "app", *pin, "--first", "--seed-file", self.ann)
        shell.fine("promote", "app", "2", "--channel", "stable", "--why", "tested", "--seed-file", self.ann)


@pytest.fixture
def holders(shell: Shell) -> Holders:
    return Holders(shell)


@pytest.mark.fault("K1")
def test_what_has_another_digest_is_not_signed(shell: Shell, holders: Holders) -> None:
    """`syncd sign --expect` names a digest with a digit changed, shifted, of another thing, too short or too long.

    Generation, move and key set stay unsigned; half of the digits, or capitals, will do.
    """
    change = ("keys", "app", "--trust", holders.anns, "--add", holders.bobs, "--seed-file", holders.ann)
    changed = shell.fine(*change)
    assert f"  digest {shell.key_set(1)}\n" in changed
    bob = (*holders.trust, "--seed-file", holders.bob)
    things = [
        (("--generation", "1"), shell.record(1)),
        (("--channel", "stable"), shell.move("stable")),
        (("--keys", "1"), shell.key_set(1)),
    ]
    for what, digest in things:
        for other in (digest[:31] + ("0" if digest[31] != "0" else "1"), digest[1:] + "0", *(d for _, d in things)):
            if other != digest:
                assert "is not what --expect names" in shell.refused(*what, "--expect", other, *bob)
        for wrong in ("", digest[:31], digest + "0", "x" * 64, digest[:40] + " "):
            code, out, err = shell.run("sign", "app", *what, "--expect", wrong, *bob)
            assert (code, out, "is no digest" in err) == (EXIT_USAGE, "", True)
        assert "signed by" in shell.fine("sign", "app", *what, "--expect", digest[:32].upper(), *bob)
        assert "signed already" in shell.fine("sign", "app", *what, "--expect", digest, *bob)
    code, _, err = shell.run("sign", "app", "--generation", "1", "--channel", "stable", "--first", *bob)
    assert (code, "more than one thing" in err) == (EXIT_USAGE, True)


@pytest.mark.fault("K1 R9")
def test_a_channel_that_is_moved_between_the_look_and_the_signature(shell: Shell, holders: Holders) -> None:
    """Bob looks at a channel; then Ann's stolen key moves it to generation 3, and later back to 2 by another move.

    Both times `syncd sign` with the digest that Bob saw is refused and says that it is another one; only the present
    move's is taken.
    """
    trust = Trust(frozenset((holders.anns, holders.bobs)), 2)
    head = shell.fine("diff", "app", "1", "stable").splitlines()[1]
    seen = head.rpartition("digest ")[2]
    assert seen == shell.move("stable")
    pin = ("--generation", "3", "--expect", shell.record(3))
    shell.fine("sign", "app", *pin, "--first", "--seed-file", holders.ann)
    shell.fine("promote", "app", "3", "--channel", "stable", "--seed-file", holders.ann)
    bob = (*holders.trust, "--seed-file", holders.bob)
    assert "is not what --expect names" in shell.refused("--channel", "stable", "--expect", seen, *bob)
    with pytest.raises(Untrusted):
        judge_offer(trust, Seen(), asyncio.run(offer_of(shell.bucket(), "stable")))
    shell.fine("rollback", "app", "--channel", "stable", "--seed-file", holders.ann)
    # the same generation, by another move
    assert "is not what --expect names" in shell.refused("--channel", "stable", "--expect", seen, *bob)
    shell.fine("sign", "app", "--channel", "stable", "--expect", shell.move("stable"), *bob)
    assert judge_offer(trust, Seen(), asyncio.run(offer_of(shell.bucket(), "stable"))).move.number == 2


@pytest.mark.fault("K1 K9")
def test_what_nobody_trusted_signed_is_not_made_good(shell: Shell, holders: Holders) -> None:
    """`syncd sign` names what is unsigned, signed by a thief, or signed in its move alone, by its right digest.

    Generation, move and key set are refused alike, but for --first.
    """
    ann = (*holders.trust, "--seed-file", holders.ann)
    generation = ("--generation", "3", "--expect", shell.record(3))
    assert "generation 3 has no good signature by a key that is trusted now" in shell.refused(*generation, *ann)
    shell.fine("sign", "app", *generation, "--first", "--seed-file", holders.thief)
    shell.refused(*generation, *ann)
    shell.fine("promote", "app", "3", "--channel", "stable", "--seed-file", holders.ann)
    move = ("--channel", "stable", "--expect", shell.move("stable"))
    assert "generation 3 has no" in shell.refused(*move, *holders.trust, "--seed-file", holders.bob)
    for options in ((), ("--seed-file", holders.thief)):
        shell.run("promote", "app", "2", "--channel", "stable", *options)
        move = ("--channel", "stable", "--expect", shell.move("stable"))
        assert "channel stable has no" in shell.refused(*move, *holders.trust, "--seed-file", holders.bob)
    assert "not known which keys are trusted" in shell.refused(*move, "--seed-file", holders.bob)
    thief = ("--trust", holders.thiefs, "--seed-file", holders.thief)
    shell.fine("keys", "app", "--add", holders.anns, *thief)
    assert "key set 1 has no" in shell.refused("--keys", "1", "--expect", shell.key_set(1), *ann)
    shell.fine("sign", "app", *move, "--first", "--seed-file", holders.bob)
    assert "signed by" in shell.fine("sign", "app", *generation, "--first", *ann)


@pytest.mark.fault("K9")
def test_keys_are_replaced_step_by_step_and_nothing_forged_gets_in(shell: Shell) -> None:
    """While a key is replaced, an unsigned rollback moves the head; later the dropped key signs generation 3.

    The new key signs neither; the honest head that it signed is followed by hosts that trust it alone.
    """
    old, olds = shell.seed("old.seed")
    new, news = shell.seed("new.seed")
    shell.fine("sign", "app", "--generation", "2", "--expect", shell.record(2), "--first", "--seed-file", old)
    shell.fine("rollback", "app", "--to", "2", "--seed-file", old)
    shell.fine("keys", "app", "--trust", olds, "--add", news, "--seed-file", old)
    pin = ("--channel", "head", "--expect", shell.move("head"))
    honest = asyncio.run(link_of(shell.bucket(), "head"))
    shell.run("rollback", "app", "--to", "1")
    evil = ("--channel", "head", "--expect", shell.move("head"), "--trust", olds)
    assert "generation 1 has no good signature" in shell.refused(*evil, "--seed-file", new)
    assert honest.link is not None
    asyncio.run(shell.bucket().put_link(honest.name, honest.link, metadata=honest.metadata))
    shell.fine("sign", "app", *pin, "--trust", olds, "--seed-file", new)
    shell.fine("keys", "app", "--trust", olds, "--remove", olds, "--seed-file", new)
    offer = asyncio.run(offer_of(shell.bucket(), "head"))
    assert judge_offer(Trust(frozenset((news,)), 1), Seen(), offer).move.number == 2
    shell.fine("sign", "app", "--generation", "3", "--expect", shell.record(3), "--first", "--seed-file", old)
    revoked = ("--generation", "3", "--expect", shell.record(3), "--trust", olds)
    assert "generation 3 has no good signature" in shell.refused(*revoked, "--seed-file", new)


class Person:
    """Somebody at a terminal, who answers once, and before that something may happen."""

    def __init__(self, answer: str, meanwhile: Callable[[], object] = lambda: None) -> None:
        self._answer = answer
        self._meanwhile = meanwhile
        self.asked = 0

    def isatty(self) -> bool:
        return True

    def readline(self) -> str:
        self.asked += 1
        self._meanwhile()
        return self._answer


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Person | None], Callable[[], str]]]:
    """Put somebody before a real terminal (``None``: whoever types into it); return how to read what it shows."""
    leader, follower = os.openpty()
    with open(follower, "w", buffering=1) as shown, open(os.dup(follower)) as typed:  # noqa: PTH123

        def sit(person: Person | None) -> Callable[[], str]:
            monkeypatch.setattr(sys, "stdin", person or typed)
            monkeypatch.setattr(sys, "stderr", shown)
            if person is None:
                os.write(leader, b"y\n")

            def read() -> str:
                shown.write("\x04")  # where it ends: a terminal that shows nothing would be waited for
                shown.flush()
                text = b""
                while not text.endswith(b"\x04"):
                    text += os.read(leader, 65536)
                return text.decode().replace("\r\n", "\n").removesuffix("\x04")

            return read

        yield sit
    os.close(leader)


@pytest.mark.fault("K1")
def test_a_person_is_shown_what_they_sign_and_asked(
    shell: Shell, holders: Holders, terminal: Callable[[Person | None], Callable[[], str]]
) -> None:
    """`syncd sign` asks before a pseudo-terminal, and gets an empty line, `n`, the end of input, `yet`, then `y`.

    Only `y` signs; before, it shows digests, target, who, why, and which trusted or other keys have signed.
    """
    common = ("sign", "app", "--channel", "stable", *holders.trust, "--seed-file", holders.bob)
    for answer in ("\n", "n\n", "", "yet\n"):
        before = shell.metas()
        read = terminal(Person(answer))
        assert shell.run(*common)[:2] == (130, "")
        assert read().endswith("syncd: nothing was signed\n")
        assert shell.metas() == before
    shell.fine("sign", "app", "--generation", "2", "--expect", shell.record(2), "--first", "--seed-file", holders.thief)
    read = terminal(None)
    code, out, _ = shell.run(*common, "--json")
    assert (code, [one["new"] for one in json.loads(out)["signed"]]) == (EXIT_OK, [True, True])
    shown = read()
    record, move = shell.record(2), shell.move("stable")
    for text in (
        "generation 2 of folder app",
        f"  digest {record}\n",
        f"  signed by {holders.anns}\n",
        f"  signed by {holders.thiefs} (not trusted)\n",
        "channel stable of folder app: move 1, to generation 2\n",
        "by ann@desk\n",
        "  why: tested\n",
        "  without an end\n",
        f"  to the record {record}\n",
        f"  digest {move}\n",
        f"Sign this with {holders.bobs}? [y/N]: ",
    ):
        assert text in shown, (text, shown)


def test_what_others_wrote_is_asked_about_without_harm(
    shell: Shell, holders: Holders, terminal: Callable[[Person | None], Callable[[], str]]
) -> None:
    """Escape sequences of a move that a thief with a key made, and of a key set."""

    async def forge() -> None:
        text = move_text(record=digest, who="\x1b[31m\n  signed by all", why="\u202e", expires=AT)
        signature = signature_text(Statement.MOVE, text.encode(), read_signer(Path(holders.ann)))
        link = Link("app", generation_name(1))
        await shell.bucket().put_link(CHANNELS + "stable", link, metadata={MOVE: text, SIGNATURES: signature})

    digest = shell.record(1)
    asyncio.run(forge())
    change = ("keys", "app", "--trust", holders.anns, "--threshold", "1", "--why", "\u202e", "--seed-file", holders.ann)
    shell.fine(*change)
    for what, said in (("--channel", "stable"), f"until {AT}"), (("--keys", "1"), f"key {holders.anns}\n"):
        read = terminal(Person("n\n"))
        shell.run("sign", "app", *what, *holders.trust, "--seed-file", holders.bob)
        shown = read()
        assert said in shown
        assert not {"\x1b", "\u202e"} & set(shown)
        assert "\n  signed by all" not in shown


@pytest.mark.fault("K1 R9")
@pytest.mark.parametrize("what", [("--generation", "1"), ("--channel", "stable"), ("--keys", "1")])
def test_what_changes_while_a_person_looks_is_not_signed(
    shell: Shell,
    holders: Holders,
    terminal: Callable[[Person | None], Callable[[], str]],
    what: tuple[str, str],
) -> None:
    """While `syncd sign` waits for the answer `y`, the generation, the channel or the key set is written anew.

    It ends with a failure, and what the other one wrote stays as it is.
    """
    change = ("keys", "app", *holders.trust, "--threshold", "1", "--seed-file", holders.ann)
    shell.fine(*change, "--why", "one")

    async def rewrite() -> None:
        record = await read_record(shell.bucket(), 1)
        assert record is not None
        other = encode_record(replace(record.generation, note="evil"))
        meta = ObjectMeta(record.info.name, metadata=record.info.metadata)
        await shell.bucket().put_many([SmallPut(meta, other, None, record.info.seq)])

    def interfere() -> None:
        changes = {
            "--generation": lambda: asyncio.run(rewrite()),
            "--channel": lambda: shell.run("promote", "app", "1", "--channel", "stable", "--seed-file", holders.ann),
            "--keys": lambda: shell.run(*change, "--why", "two", "--instead"),
        }
        changes[what[0]]()
        seen.extend(shell.metas())

    seen: list[Any] = []
    terminal(person := Person("y\n", interfere))
    common = ("sign", "app", *what, *holders.trust, "--seed-file", holders.bob)
    code, out, _ = shell.run(*common)
    assert (code, out, person.asked) == (EXIT_FAILED, "", 1)
    after = {item.name: item for item in shell.metas()}
    name = {"--generation": generation_name(1), "--channel": CHANNELS + "stable", "--keys": keys_name(1)}[what[0]]
    assert after[name] in seen


@pytest.mark.fault("K1")
def test_where_nobody_can_be_asked_the_digest_has_to_be_named(
    shell: Shell, holders: Holders, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`syncd sign` runs without --expect, and its stdin is no terminal or missing.

    It is a usage error that does not show the digest, and nothing is written.
    """
    before = shell.metas()
    for stdin in (sys.stdin, None):
        monkeypatch.setattr(sys, "stdin", stdin)
        for what in (("--generation", "1"), ("--channel", "stable")):
            code, out, err = shell.run("sign", "app", *what, *holders.trust, "--seed-file", holders.bob)
            assert (code, out, err.count("\n")) == (EXIT_USAGE, "", 1)
            assert "syncd diff, channels and keys name the digest" in err
            assert not re.search("[0-9a-f]{32}", err)
    assert shell.metas() == before


def test_keys_that_the_configuration_does_not_agree_on_are_asked_for(shell: Shell, holders: Holders) -> None:
    """Two mirrors of a folder that trust different keys: a person says whose are meant."""
    config = shell.directory / "fleet.toml"
    config.write_text(
        "".join(
            f'[[subscribe]]\nfolder = "app"\npath = "/srv/{key}"\ntrusted_keys = ["{key}"]\n'
            for key in (holders.anns, holders.bobs)
        )
    )
    pin = ("--generation", "1", "--expect", shell.record(1))
    for arguments in (("sign", "app", *pin, "--seed-file", holders.bob), ("keys", "app")):
        code, out, err = shell.run(*arguments, "--config", str(config))
        assert (code, out, err.count("\n")) == (EXIT_USAGE, "", 1)
        assert "do not trust the same keys (say which: --trust KEY)" in err
    shell.fine("sign", "app", *pin, "--trust", holders.anns, "--seed-file", holders.bob, "--config", str(config))
