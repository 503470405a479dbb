"""syncd pull from the command line: which keys a directory is checked with, and where that is remembered."""

from __future__ import annotations

import asyncio
import json
import os
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from syncd import cli as command_line
from syncd import oneshot
from syncd.channels import Channels
from syncd.errors import EXIT_NOPERM, EXIT_OK, EXIT_USAGE
from syncd.outlet import PublishOptions
from syncd.publisher import Publisher
from syncd.rules import Rules
from syncd.signatures import Signer, generate
from syncd.status import FolderStatus, StatusKeeper
from syncd.store.base import CHANNELS, HEAD, Link
from syncd.store.memory import MemoryStore
from syncd.subscriber import TRUST_FILE
from syncd.trees import generation_name
from tests.support.signing import sign_generation, sign_move

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from syncd.settings import Settings

UNCHECKED = "syncd: signatures are not checked: no trusted_keys are configured for app"


class Host:
    """A host with a configured mirror of a folder whose bucket anybody may write to."""

    def __init__(self, tmp: Path, capture: Any) -> None:
        self.tmp = tmp
        self.store = MemoryStore()
        self.signer = Signer(generate()[0])
        self.other = Signer(generate()[0])
        self.mirror = tmp / "host" / "mirror"
        self.mirror.mkdir(parents=True)
        (tmp / "host" / "link").symlink_to(self.mirror)
        (tmp / "up").symlink_to(tmp / "host")
        self._capture = capture

    def configure(self, *mirrors: tuple[Path, Signer | None]) -> None:
        """One [[subscribe]] each."""
        tables = (
            f'[[subscribe]]\nfolder = "app"\npath = "{path}"\n'
            + (f'trusted_keys = ["{signer.public}"]\n' if signer else "")
            for path, signer in mirrors
        )
        (self.tmp / "fleet.toml").write_text("\n".join(tables))

    def publish(self, text: str, signer: Signer | None, *, folder: str = "app") -> None:
        """A generation, by its publisher or, without a signer, by whoever may write to the bucket."""
        source = self.tmp / "source"
        source.mkdir(exist_ok=True)
        (source / "f").write_text(text)
        options = PublishOptions(folder, source, Rules(), "here:/source", signer=signer)
        status = StatusKeeper(FolderStatus("publish", folder, "/"), clock=lambda: 0.0, report=lambda _: None)
        asyncio.run(Publisher(options, self.store, self.tmp / f"publish-{folder}.db", status=status).push())
        self._capture.readouterr()  # what it logs is not of the command

    def pull(self, directory: Path | str, *options: str, folder: str = "app") -> tuple[int, str, str]:
        arguments = ["pull", folder, str(directory), *options, "--config", str(self.tmp / "fleet.toml")]
        code = command_line.run(arguments)
        out, err = (text.decode() for text in self._capture.readouterr())
        return code, out, err

    def states(self) -> list[Path]:
        """What is remembered, one directory per mirror."""
        return sorted((self.tmp / "state").glob("subscribe-app-*"))


@pytest.fixture
def host(tmp_path: Path, capfdbinary: Any, monkeypatch: pytest.MonkeyPatch) -> Host:
    host = Host(tmp_path, capfdbinary)

    @asynccontextmanager
    async def open_store(_: Settings) -> AsyncIterator[tuple[MemoryStore, None]]:
        yield host.store, None

    monkeypatch.setattr(oneshot, "open_store", open_store)
    monkeypatch.setenv("SYNCD_DAEMON__STATE_DIR", str(tmp_path / "state"))
    monkeypatch.chdir(tmp_path / "host")
    return host


def text_of(directory: Path) -> str:
    file = directory / "f"
    return file.read_text() if file.exists() else ""


@pytest.mark.fault("K1 K11")
@pytest.mark.parametrize("name", ["{tmp}/host/mirror", "link", "mirror", "../up/./link/../mirror/", "{tmp}/up/link"])
def test_a_mirror_is_checked_by_whatever_name_it_is_called(host: Host, name: str) -> None:
    """An unsigned generation is pulled from the command line into a mirror by its path, a relative one, or symlinks.

    It is refused; a signed one is not, and what was seen is remembered in one place.
    """
    host.configure((host.mirror, host.signer))
    named = name.format(tmp=host.tmp)
    host.publish("good", host.signer)
    assert host.pull(host.mirror)[::2] == (EXIT_OK, "")
    host.publish("evil", None)
    code, out, err = host.pull(named)
    assert (code, out, err.count("\n")) == (EXIT_NOPERM, "", 1)
    host.publish("better", host.signer)
    assert host.pull(named)[::2] == (EXIT_OK, "")
    assert text_of(host.mirror) == "better"
    (state,) = host.states()
    seen = json.loads((state / TRUST_FILE).read_text())["seen"]["head"]
    assert seen["highest"] == 3
    assert host.pull(host.mirror)[::2] == (EXIT_OK, "")


@pytest.mark.fault("K2 K11")
def test_what_was_seen_by_one_name_is_known_by_the_other(host: Host) -> None:
    """A newer head was pulled by the mirror's path; the old one is written back and pulled by a symlink to it.

    It is refused as a replay, and the mirror stays.
    """
    host.configure((host.mirror, host.signer))
    host.publish("one", host.signer)
    bucket = host.store.bucket("app")
    old = asyncio.run(bucket.get_info(CHANNELS + HEAD))
    assert old is not None
    host.publish("two", host.signer)
    assert host.pull(host.mirror)[0] == EXIT_OK
    link = Link("app", generation_name(1))
    asyncio.run(bucket.put_link(CHANNELS + HEAD, link, metadata=old.metadata))
    code, _, err = host.pull("link")
    assert (code, "rollback or replay" in err) == (EXIT_NOPERM, True)
    assert text_of(host.mirror) == "two"


@pytest.mark.fault("K1")
def test_a_mirror_that_is_mounted_a_second_time_is_that_mirror(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """`os.path.realpath` follows no link (replaced), as with a second mount; the mirror is pulled by another name.

    Unsigned content is refused, and there is one memory for both names.
    """

    def unfollowed(path: Any, **_: Any) -> str:
        return str(Path(path).absolute())

    monkeypatch.setattr(os.path, "realpath", unfollowed)
    host.configure((host.mirror, host.signer))
    host.publish("evil", None)
    assert host.pull("link")[0] == EXIT_NOPERM
    assert text_of(host.mirror) == ""
    (state,) = host.states()
    host.publish("good", host.signer)
    assert host.pull(host.mirror)[0] == EXIT_OK
    assert host.states() == [state]


@pytest.mark.fault("K1")
def test_a_directory_that_is_no_mirror_is_checked_as_the_folders_mirrors_are(host: Host) -> None:
    """An unsigned generation is pulled into a directory that is no configured mirror, also by its number.

    It is refused, a signed one is not; two spellings of the directory are one.
    """
    host.configure((host.mirror, host.signer), (host.tmp / "plain", None))
    host.publish("evil", None)
    code, out, err = host.pull("other")
    assert (code, out, err.count("\n")) == (EXIT_NOPERM, "", 1)
    assert host.pull("other", "--generation", "1")[0] == EXIT_NOPERM
    assert text_of(Path("other")) == ""
    host.publish("good", host.signer)
    assert host.pull("other")[::2] == (EXIT_OK, "")
    Path("alias").symlink_to("other")
    assert host.pull("alias")[::2] == (EXIT_OK, "")
    assert text_of(Path("other")) == "good"
    assert len(host.states()) == 1


@pytest.mark.fault("K1")
def test_mirrors_that_trust_different_keys_keep_their_own(host: Host) -> None:
    """Two mirrors of a folder trust different keys; content by one of them is pulled into both and a third directory.

    Each is checked with its own key; for the third a person has to say which.
    """
    second = host.tmp / "host" / "second"
    host.configure((host.mirror, host.signer), (second, host.other))
    host.publish("text", host.other)
    assert host.pull("link")[0] == EXIT_NOPERM
    assert host.pull("../host/second")[::2] == (EXIT_OK, "")
    code, out, err = host.pull("third")
    assert (code, out, err.count("\n")) == (EXIT_USAGE, "", 1)
    assert "do not trust the same keys (say which: --trust KEY)" in err
    assert host.pull("third", "--trust", host.signer.public)[0] == EXIT_NOPERM
    assert text_of(Path("third")) == ""
    assert host.pull("third", "--trust", host.other.public)[::2] == (EXIT_OK, "")
    assert text_of(Path("third")) == "text"


@pytest.mark.fault("K1")
def test_a_mirror_of_one_folder_is_none_of_another(host: Host) -> None:
    """Another folder, signed by another key, is pulled into a mirror's directory.

    Only the key that the command names counts, and nothing is remembered of the mirror's folder.
    """
    host.configure((host.mirror, host.signer))
    host.publish("of lib", host.other, folder="lib")
    code, _, err = host.pull("link", "--trust", host.signer.public, folder="lib")
    assert (code, "0 good signatures" in err) == (EXIT_NOPERM, True)
    assert host.pull("link", "--trust", host.other.public, folder="lib")[::2] == (EXIT_OK, "")
    assert text_of(host.mirror) == "of lib"
    assert host.states() == []


@pytest.mark.fault("K1 K8")
def test_a_person_names_the_keys_where_no_configuration_does(host: Host) -> None:
    """`--trust` names two keys, both to sign, for content that one signed; then a cut key; then not the mirror's own.

    Each is refused; with both signatures the first is not.
    """
    host.configure()
    host.publish("text", host.signer)
    both = ("--trust", host.signer.public, "--trust", host.other.public, "--trust-threshold", "2")
    assert host.pull("one", *both)[0] == EXIT_NOPERM

    async def sign() -> None:
        await sign_generation(host.store.bucket("app"), 1, host.other)
        await sign_move(Channels(host.store.bucket("app"), lambda: 0.0), HEAD, host.other)

    asyncio.run(sign())
    assert host.pull("one", *both)[::2] == (EXIT_OK, "")
    code, _, err = host.pull("two", "--trust", host.signer.public[:-1])
    assert (code, "no public nkey" in err) == (EXIT_USAGE, True)
    host.configure((host.mirror, host.signer))
    code, _, err = host.pull("link", "--trust", host.other.public)
    assert (code, err.count("\n"), "says whom it trusts" in err) == (EXIT_USAGE, 1, True)


def test_that_nothing_is_checked_is_told_once(host: Host) -> None:
    """On standard error, beside the result and beside JSON; of a mirror that asks for no signatures, too."""
    host.configure()
    host.publish("text", None)
    code, out, err = host.pull("one")
    assert (code, err) == (EXIT_OK, f"{UNCHECKED}\n")
    assert out.startswith("app: generation 1: ")
    code, out, err = host.pull("one", "--json")
    assert (code, err, json.loads(out)["generation"]) == (EXIT_OK, f"{UNCHECKED}\n", 1)
    host.configure((host.mirror, None), (host.tmp / "signed", host.signer))
    assert host.pull("link")[::2] == (EXIT_OK, f"{UNCHECKED} at {host.mirror}\n")


def test_a_mirror_is_audited_by_whatever_name(host: Host, capfdbinary: Any) -> None:
    """syncd verify finds its [[subscribe]], and what it has applied."""
    host.configure((host.mirror, host.signer))
    host.publish("one", host.signer)
    assert host.pull("link")[0] == EXIT_OK
    host.publish("two", host.signer)
    for name in ("link", str(host.mirror), "../up/mirror"):
        assert command_line.run(["verify", name, "--config", str(host.tmp / "fleet.toml")]) == EXIT_OK
        assert capfdbinary.readouterr().out.startswith(b"generation 1, tree ")
