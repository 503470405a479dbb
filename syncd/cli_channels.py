"""Commands for channels and keys: promote, rollback, channels, keygen, keys, sign (docs/cli.md).

:data:`COMMANDS` are registered by :mod:`syncd.cli`. Rules kept here: a seed comes from a file and goes to a file, never
through an argument, the environment or the terminal; what others wrote into the bucket is escaped before it is shown.
"""

from __future__ import annotations

import asyncio
import getpass
import json
import os
import stat
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import asdict
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click

from syncd import logs, oneshot
from syncd.channels import MAX_TERM, Channels
from syncd.errors import EXIT_OK, DiskProblem, UsageError
from syncd.history import History
from syncd.keysets import KeyChange, KeySets
from syncd.paths import printable
from syncd.records import sign_generation
from syncd.settings import Settings, load
from syncd.signatures import generate
from syncd.store.base import HEAD
from syncd.trust import Trust
from syncd.wiring import read_signer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from syncd.channels import ChannelState, Moved
    from syncd.keysets import KeySetState
    from syncd.signatures import Signer
    from syncd.store.base import Bucket

T = TypeVar("T")
Command = Callable[..., Any]

SEED_MODE: Final = 0o600
DAY: Final = 86400.0


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


def _move_options(command: Command) -> Command:
    """Give a command what all moves of channels have."""
    options = (
        _why_option,
        _seed_option,
        click.option(
            "--valid-days",
            type=click.FloatRange(min=0, max=MAX_TERM / DAY),
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
    heads = ["channel", "generation", "behind", "moves", "time", "by", "signed", "why"]
    rows = [
        [
            one.name,
            str(one.number or "-"),
            str(one.behind or "-"),
            str(one.count or "-"),
            one.at.partition(".")[0].removesuffix("Z") + "Z" if one.at else "-",
            one.who or "-",
            str(len(one.signers) or "-"),
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
@click.option(
    "--trust", multiple=True, metavar="KEY", help="A key of subscribers' trusted_keys, if not configured here."
)
@click.option("--trust-threshold", type=click.IntRange(min=1), default=1, metavar="N", help="And their threshold.")
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
    trust_threshold: int,
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
    configured = _configured(settings, folder, trust, trust_threshold)
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


def _configured(settings: Settings, folder: str, keys: tuple[str, ...], threshold: int) -> Trust | None:
    """Return the keys that subscribers start from, ``None`` where nobody says.

    :raises UsageError: they are none.
    """
    named = next((item for item in settings.subscribe if item.folder == folder and item.trusted_keys), None)
    if not keys and named is not None:
        keys, threshold = named.trusted_keys, named.trusted_threshold
    if not keys:
        return None
    try:
        return Trust(frozenset(keys), threshold)
    except ValueError as error:
        raise UsageError(f"trusted keys: {error}") from None


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


@click.command()
@click.argument("folder")
@click.option("--generation", type=click.IntRange(min=1), metavar="N", help="Sign generation N.")
@click.option("--channel", metavar="NAME", help="Sign the move of this channel, and the generation it points at.")
@click.option("--keys", "version", type=click.IntRange(min=1), metavar="N", help="Sign key set N.")
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
    seed_file: Path | None,
    as_json: bool,
) -> int:
    """Add a signature to what FOLDER has already: a generation, a channel's move, a key set.

    Look at what you sign: syncd log, syncd diff, syncd channels, syncd keys.
    """
    if generation is None and channel is None and version is None:
        raise UsageError("nothing to sign", hint="name it: --generation N, --channel NAME or --keys N")
    signer = _signer(settings, folder, seed_file)
    if signer is None:
        raise UsageError("nothing to sign with", hint="name a seed: --seed-file FILE")

    async def work() -> list[tuple[str, bool]]:
        done: list[tuple[str, bool]] = []
        async with oneshot.open_bucket(settings, folder) as bucket:
            await History.open(bucket)
            channels = Channels(bucket, time.time)
            if generation is not None:
                done.append((f"generation {generation}", await sign_generation(bucket, generation, signer)))
            if channel is not None:
                number = await channels.target(channel)
                if number and number != generation:  # before the channel: whoever looks then finds both
                    done.append((f"generation {number}", await sign_generation(bucket, number, signer)))
                done.append((f"channel {channel}", await channels.sign(channel, signer)))
            if version is not None:
                done.append((f"key set {version}", await KeySets(bucket, time.time).sign(version, signer)))
        return done

    done = _run(work())
    if as_json:
        _print_json({"key": signer.public, "signed": [{"what": what, "new": new} for what, new in done]})
        return EXIT_OK
    for what, new in done:
        click.echo(f"{folder}: {printable(what)}: {'signed' if new else 'had been signed already'} by {signer.public}")
    return EXIT_OK


COMMANDS: Final[tuple[click.Command, ...]] = (promote, rollback, channels_command, keygen, keys, sign)
"""What :mod:`syncd.cli` registers."""
