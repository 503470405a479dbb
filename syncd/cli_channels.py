"""Commands for channels and keys: promote, rollback, channels, keygen, keys, sign (docs/cli.md).

:data:`COMMANDS` are registered by :mod:`syncd.cli`. Rules kept here: a seed comes from a file and goes to a file, never
through an argument, the environment or the terminal; what others wrote into the bucket is escaped before it is shown.
"""

from __future__ import annotations

import asyncio
import getpass
import json
import os
import re
import stat
import sys
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import asdict
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar

import click

from syncd import logs, oneshot, render
from syncd.channels import MAX_TERM, Channels
from syncd.errors import EXIT_OK, DiskProblem, UsageError
from syncd.history import History
from syncd.keysets import KeyChange, KeySets
from syncd.paths import printable
from syncd.records import (
    EXPECT_DIGITS,
    Signable,
    check_expected,
    check_vouched,
    generation_to_sign,
    sign_record,
)
from syncd.settings import Settings, load
from syncd.signatures import generate
from syncd.store.base import HEAD
from syncd.trust import Statement
from syncd.wiring import read_signer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from syncd.channels import ChannelState, Moved
    from syncd.keysets import KeySetState
    from syncd.signatures import Signer
    from syncd.store.base import Bucket
    from syncd.trust import Trust

T = TypeVar("T")
Command = Callable[..., Any]

SEED_MODE: Final = 0o600
DAY: Final = 86400.0
_DIGEST: Final = re.compile(rf"[0-9a-f]{{{EXPECT_DIGITS},64}}")


# -- seeds -------------------------------------------------------------------------------------------------------------


def write_seed(file: Path) -> str:
    """Write a fresh seed to a new file that nobody else can read; return the public key. Blocking.

    :raises UsageError: there is something of that name already.
    :raises DiskProblem: it cannot be written; nothing is left then.
    """
    seed, public = generate()
    try:
        fd = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, SEED_MODE)
    except FileExistsError:
        raise UsageError(f"{file} is there already", hint="a seed is never written over: choose another name") from None
    except OSError as error:
        raise DiskProblem(f"cannot write {file}: {error.strerror}") from error
    try:
        with os.fdopen(fd, "w", encoding="ascii") as out:
            os.fchmod(fd, SEED_MODE)  # whatever the umask took away
            out.write(f"{seed}\n")
            out.flush()
            os.fsync(fd)
        _sync_directory(file.parent)
    except OSError as error:
        with suppress(OSError):
            file.unlink()
        raise DiskProblem(f"cannot write {file}: {error.strerror}") from error
    return public


def _sync_directory(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _signer(settings: Settings, folder: str, file: Path | None) -> Signer | None:
    """Return who signs: with the seed in a file that is named, else with that of the folder's [[publish]]. Blocking.

    :raises ConfigError: there is no seed in it. The message never holds what is in it.
    """
    file = file or next((item.sign_seed_file for item in settings.publish if item.folder == folder), None)
    if file is None:
        return None
    signer = read_signer(file)
    with suppress(OSError):
        if stat.S_IMODE(file.stat().st_mode) & 0o077:
            click.echo(f"syncd: {printable(str(file))} can be read by others (chmod 600)", err=True)
    return signer


# -- shared options ----------------------------------------------------------------------------------------------------


def _with_settings(command: Command) -> Command:
    """Give a command its settings, from ``--config`` before or after it, and quiet logs."""

    @click.option(
        "--config",
        "-c",
        type=click.Path(path_type=Path, dir_okay=False),
        envvar="SYNCD_CONFIG",
        help="The configuration file (TOML).",
    )
    @click.pass_context
    @wraps(command)
    def wrapped(context: click.Context, /, config: Path | None, **arguments: Any) -> Any:
        settings = load(config or context.find_root().params.get("config"), os.environ)
        logs.configure("error", settings.daemon.log_format)
        return command(settings, **arguments)

    return wrapped


_FILE = click.Path(path_type=Path, dir_okay=False)
_seed_option = click.option(
    "--seed-file", type=_FILE, metavar="FILE", help="Sign with the seed in FILE; sign_seed_file unless named."
)
_json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
_why_option = click.option("--why", default="", metavar="TEXT", help="A line of text: the reason, for people.")


class _Days(click.FloatRange):
    """Days; a number that is none is in no range, and passes every comparison."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        days = super().convert(value, param, ctx)
        if days != days:  # noqa: PLR0124 - NaN
            self.fail(f"{value!r} is no number of days", param, ctx)
        return days


def trust_options(command: Command) -> Command:
    """Give a command what names the keys that subscribers start from."""
    options = (
        click.option(
            "--trust", multiple=True, metavar="KEY", help="A key of subscribers' trusted_keys, if not configured here."
        ),
        click.option(
            "--trust-threshold", type=click.IntRange(min=1), metavar="N", help="And their threshold; 1 unless named."
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


def _move_options(command: Command) -> Command:
    """Give a command what all moves of channels have."""
    options = (
        _why_option,
        _seed_option,
        click.option(
            "--valid-days",
            type=_Days(min=0, max=MAX_TERM / DAY),
            metavar="DAYS",
            help="After so long without a newer move, subscribers raise an alarm; 0: never. Unless given: as before.",
        ),
        click.option(
            "--count",
            type=click.IntRange(min=1),
            metavar="N",
            help="Count the move as this one: what the bucket says of the one before is lost or forged.",
        ),
        _json_option,
    )
    for option in reversed(options):
        command = option(command)
    return command


def _run(work: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(work)


def _print_json(data: object) -> None:
    click.echo(json.dumps(data, indent=2))


def who_moves(settings: Settings) -> str:
    """Return who runs this command: user@host."""
    user = os.environ.get("SUDO_USER", "")
    if not user:
        try:
            user = getpass.getuser()
        except (KeyError, OSError):  # a container's user may have no name
            user = str(os.getuid())
    return printable(f"{user}@{settings.daemon.host}")


def _columns(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table as wide as it is."""
    cells = [list(heads), *([printable(text) for text in row] for row in rows)]
    widths = [max(len(row[place]) for row in cells) for place in range(len(heads))]
    for row in cells:
        click.echo("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())


# -- moving channels ---------------------------------------------------------------------------------------------------


@click.command()
@click.argument("folder")
@click.argument("generation", metavar="N")
@click.option("--channel", required=True, metavar="NAME", help="The channel to move; it is made if there is none.")
@_move_options
@_with_settings
def promote(settings: Settings, folder: str, generation: str, channel: str, *, as_json: bool, **wishes: Any) -> int:
    """Point a channel of FOLDER at generation N, or at the one that channel N points at."""

    async def move(bucket: Bucket, wish: dict[str, Any]) -> Moved:
        commit = await (await History.open(bucket)).commit(generation)
        return await Channels(bucket, time.time).promote(commit.generation.number, channel, **wish)

    _show_moved(folder, _moved(settings, folder, move, wishes), as_json=as_json)
    return EXIT_OK


@click.command()
@click.argument("folder")
@click.option("--to", type=click.IntRange(min=1), metavar="N", help="To this generation instead of the one before.")
@click.option("--channel", default=HEAD, metavar="NAME", help="The channel to move; the head unless named.")
@_move_options
@_with_settings
def rollback(settings: Settings, folder: str, to: int | None, channel: str, *, as_json: bool, **wishes: Any) -> int:
    """Point a channel of FOLDER at an older generation: the one before, or the one named."""

    async def move(bucket: Bucket, wish: dict[str, Any]) -> Moved:
        history = await History.open(bucket)
        if to is not None:
            await history.commit(to)  # in plain words, before anything else
        return await Channels(bucket, time.time).rollback(channel, to=to, **wish)

    _show_moved(folder, _moved(settings, folder, move, wishes), as_json=as_json)
    return EXIT_OK


def _moved(
    settings: Settings,
    folder: str,
    move: Callable[[Bucket, dict[str, Any]], Coroutine[Any, Any, Moved]],
    wishes: dict[str, Any],
) -> Moved:
    oneshot.check_note(wishes["why"])
    wish = {
        "who": who_moves(settings),
        "why": wishes["why"],
        "signer": _signer(settings, folder, wishes["seed_file"]),
        "valid_seconds": None if wishes["valid_days"] is None else wishes["valid_days"] * DAY,
        "count": wishes["count"] or 0,
    }

    async def work() -> Moved:
        async with oneshot.open_bucket(settings, folder) as bucket:
            return await move(bucket, wish)

    return _run(work())


def _show_moved(folder: str, moved: Moved, *, as_json: bool) -> None:
    if as_json:
        _print_json(asdict(moved))
        return
    before = f"generation {moved.before} -> " if moved.before else ""
    signed = f", signed by {moved.signed_by}" if moved.signed_by else ""
    until = f", valid until {moved.expires}" if moved.expires else ""
    click.echo(
        f"{folder}: channel {moved.channel}: {before}generation {moved.number} (move {moved.count}{signed}{until})"
    )
    if moved.signed_before and not moved.signed_by:
        click.echo(
            f"  this move is not signed, and the one before was: subscribers with trusted_keys refuse it "
            f"(syncd sign {folder} --channel {moved.channel} --first --seed-file FILE)",
            err=True,
        )
    if moved.signed_by and not moved.signatures:
        click.echo(
            f"  generation {moved.number} itself is not signed: subscribers with trusted_keys refuse it "
            f"(syncd sign {folder} --generation {moved.number} --seed-file FILE)",
            err=True,
        )


@click.command("channels")
@click.argument("folder")
@click.option("--remove", metavar="NAME", help="Remove this channel; its subscribers stay where they are.")
@_json_option
@_with_settings
def channels_command(settings: Settings, folder: str, *, remove: str | None, as_json: bool) -> int:
    """List the channels of FOLDER: where each points, since when, by whom and why."""

    async def work() -> list[ChannelState]:
        async with oneshot.open_bucket(settings, folder) as bucket:
            await History.open(bucket)
            channels = Channels(bucket, time.time)
            if remove is not None:
                await channels.remove(remove)
            return await channels.show()

    found = _run(work())
    if as_json:
        _print_json([asdict(one) for one in found])
        return EXIT_OK
    heads = ["channel", "generation", "behind", "moves", "time", "by", "signed", "digest", "why"]
    rows = [
        [
            one.name,
            str(one.number or "-"),
            str(one.behind or "-"),
            str(one.count or "-"),
            one.at.partition(".")[0].removesuffix("Z") + "Z" if one.at else "-",
            one.who or "-",
            str(len(one.signers) or "-"),
            one.digest[:EXPECT_DIGITS] or "-",
            one.why,
        ]
        for one in found
    ]
    _columns(heads, rows)
    for one in found:
        if one.problem:
            click.echo(f"  {printable(one.name)}: {printable(one.problem)}", err=True)
    return EXIT_OK


# -- keys --------------------------------------------------------------------------------------------------------------


@click.command()
@click.argument("file", type=_FILE)
def keygen(file: Path) -> int:
    """Make a signing key: write its seed (secret) to the new FILE and print the public key."""
    click.echo(write_seed(file))
    return EXIT_OK


@click.command()
@click.argument("folder")
@click.option("--add", multiple=True, metavar="KEY", help="Trust this public key as well.")
@click.option("--remove", multiple=True, metavar="KEY", help="Trust this one no more.")
@click.option("--threshold", type=click.IntRange(min=1), metavar="N", help="So many keys have to sign.")
@trust_options
@click.option(
    "--seed-file", "seed_files", type=_FILE, multiple=True, metavar="FILE", help="Sign with this; may be repeated."
)
@click.option("--instead", is_flag=True, help="Write over a key set that waits for signatures.")
@_why_option
@_json_option
@_with_settings
def keys(
    settings: Settings,
    folder: str,
    *,
    add: tuple[str, ...],
    remove: tuple[str, ...],
    threshold: int | None,
    trust: tuple[str, ...],
    trust_threshold: int | None,
    seed_files: tuple[Path, ...],
    instead: bool,
    why: str,
    as_json: bool,
) -> int:
    """Show the keys that FOLDER is trusted by, or replace them: with --add, --remove, --threshold.

    A change is a new key set, signed by keys that are trusted now; subscribers follow it without a change of their
    configuration.
    """
    oneshot.check_note(why)
    configured = oneshot.trusted(settings, folder, trust, trust_threshold)
    changes = bool(add or remove or threshold)
    if changes and configured is None:
        raise UsageError("it is not known which keys are trusted now", hint="name those of trusted_keys: --trust KEY")
    files = seed_files or (None,) if changes else ()
    signers = [signer for file in files if (signer := _signer(settings, folder, file)) is not None]

    async def work() -> list[KeySetState]:
        async with oneshot.open_bucket(settings, folder) as bucket:
            await History.open(bucket)
            sets = KeySets(bucket, time.time)
            if configured is not None and changes:
                change = KeyChange(add, remove, threshold or 0, why)
                await sets.change(configured, change, signers, instead=instead)
            return await sets.show(configured)

    found = _run(work())
    if as_json:
        _print_json([asdict(one) for one in found])
    else:
        _show_keys(folder, found, configured)
    return EXIT_OK


def _show_keys(folder: str, found: list[KeySetState], configured: Trust | None) -> None:
    if not found:
        click.echo(f"{folder}: no key sets: subscribers trust what their trusted_keys name")
    waits = "waits for signatures" if configured is not None else "not checked: --trust"
    for one in found:
        state = "trusted" if one.trusted else waits
        if one.problem:
            click.echo(f"key set {one.version}: {printable(one.problem)}")
            continue
        why = f": {printable(one.why)}" if one.why else ""
        click.echo(
            f"key set {one.version} ({state}): {one.threshold} of {len(one.keys)} have to sign; {one.at}, "
            f"{len(one.signers)} signatures{why}"
        )
        for key in one.keys:
            click.echo(f"  {key}")
        click.echo(f"  digest {one.digest}")


# -- adding signatures -------------------------------------------------------------------------------------------------


@click.command()
@click.argument("folder")
@click.option("--generation", type=click.IntRange(min=1), metavar="N", help="Sign generation N.")
@click.option("--channel", metavar="NAME", help="Sign the move of this channel, and the generation it points at.")
@click.option("--keys", "version", type=click.IntRange(min=1), metavar="N", help="Sign key set N.")
@click.option("--expect", metavar="DIGEST", help="Sign what has this digest and nothing else, without asking.")
@click.option("--first", is_flag=True, help="Sign also what no key that is trusted now has signed.")
@trust_options
@_seed_option
@_json_option
@_with_settings
def sign(
    settings: Settings,
    folder: str,
    *,
    generation: int | None,
    channel: str | None,
    version: int | None,
    expect: str | None,
    first: bool,
    trust: tuple[str, ...],
    trust_threshold: int | None,
    seed_file: Path | None,
    as_json: bool,
) -> int:
    """Add a signature to what FOLDER has already: a generation, a channel's move, a key set.

    Look first: syncd diff, syncd channels, syncd keys tell the digest of what they show. Without --expect this shows
    what would be signed, and asks.
    """
    wanted = _wanted(generation, channel, version)
    pin = None if expect is None else _digest(expect)
    signer = _signer(settings, folder, seed_file)
    if signer is None:
        raise UsageError("nothing to sign with", hint="name a seed: --seed-file FILE")
    configured = oneshot.trusted(settings, folder, trust, trust_threshold)
    if pin is None and not _on_terminal():
        raise UsageError(
            "nobody to ask here what is to be signed, and no --expect says it",
            hint="look at it: syncd diff, channels and keys name the digest of what they show",
        )
    # Two connections: a person may take longer to look than a server waits. What they saw is what is written over, or
    # the fence says that it is there no more.
    things, keys = _run(_look(settings, folder, wanted, configured))
    if pin is not None:
        check_expected(things[-1], pin)
    if not first:
        for one in things:
            check_vouched(one, keys)
    if pin is None:
        _ask(things, keys or frozenset(), signer)
    done = _run(_write(settings, folder, things, signer))
    if as_json:
        signed = [{"what": one.what, "digest": one.digest, "new": new} for one, new in done]
        _print_json({"key": signer.public, "signed": signed})
        return EXIT_OK
    for one, new in done:
        said = "signed" if new else "had been signed already"
        click.echo(f"{folder}: {printable(one.what)}: {said} by {signer.public}")
    return EXIT_OK


class _Wanted(NamedTuple):
    """What is to be signed: one of the three."""

    generation: int | None
    channel: str | None
    version: int | None


def _wanted(generation: int | None, channel: str | None, version: int | None) -> _Wanted:
    """Return what is to be signed.

    :raises UsageError: nothing; or more than one thing, which no one digest could name.
    """
    wanted = _Wanted(generation, channel, version)
    named = sum(one is not None for one in wanted)
    if named != 1:
        raise UsageError(
            "more than one thing to sign at once" if named else "nothing to sign",
            hint="name it: --generation N, --channel NAME or --keys N",
        )
    return wanted


async def _look(
    settings: Settings, folder: str, wanted: _Wanted, configured: Trust | None
) -> tuple[list[Signable], frozenset[str] | None]:
    """Return what is to be signed, what --expect names last, and the keys that are trusted now."""
    async with oneshot.open_bucket(settings, folder) as bucket:
        await History.open(bucket)
        sets = KeySets(bucket, time.time)
        keys = None if configured is None else (await sets.trusted(configured)).keys
        if wanted.generation is not None:
            return [await generation_to_sign(bucket, wanted.generation)], keys
        if wanted.channel is not None:
            return list(await Channels(bucket, time.time).to_sign(wanted.channel)), keys
        assert wanted.version is not None
        return [await sets.to_sign(wanted.version)], keys


async def _write(
    settings: Settings, folder: str, things: Sequence[Signable], signer: Signer
) -> list[tuple[Signable, bool]]:
    """Add signatures to what was looked at; tell of each whether it is new."""
    async with oneshot.open_bucket(settings, folder) as bucket:
        channels = Channels(bucket, time.time)
        done: list[tuple[Signable, bool]] = []
        for one in things:
            move = one.kind is Statement.MOVE
            done.append((one, await (channels.sign(one, signer) if move else sign_record(bucket, one, signer))))
        return done


def _digest(text: str) -> str:
    """Return the digits that name what was looked at.

    :raises UsageError: they name nothing, or too much.
    """
    digits = text.lower()
    if not _DIGEST.fullmatch(digits):
        raise UsageError(
            f"--expect {printable(text)!r} is no digest",
            hint=f"it has 64 hex digits, of which {EXPECT_DIGITS} will do",
        )
    return digits


def _on_terminal() -> bool:
    """Tell whether there is somebody who sees what is shown, and can answer. Either may be closed."""
    return all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stderr))


def _ask(things: Sequence[Signable], trusted: frozenset[str], signer: Signer) -> None:
    """Show what would be signed, and let a person decide.

    :raises click.Abort: it is not to be signed.
    """
    for one in things:
        for line in render.signable_lines(one, trusted):
            click.echo(line, err=True)
    click.echo(f"Sign this with {signer.public}? [y/N]: ", nl=False, err=True)
    if sys.stdin.readline().strip().lower() not in {"y", "yes"}:
        click.echo("syncd: nothing was signed", err=True)
        raise click.Abort


COMMANDS: Final[tuple[click.Command, ...]] = (promote, rollback, channels_command, keygen, keys, sign)
"""What :mod:`syncd.cli` registers."""
