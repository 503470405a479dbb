"""The command line: commands, one-line errors, exit codes after sysexits.h (docs/cli.md).

Rules kept here:
 * whatever a person can mend ends in one line on stderr and a documented exit code, never in a traceback;
 * ``--config`` goes before or after the command; without a command the daemon runs;
 * names from disk or wire are escaped before they reach the terminal; ``--json`` is for machines.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Coroutine
from dataclasses import asdict
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.shell_completion import get_completion_class

from syncd import __version__, logs, oneshot, render
from syncd.cli_channels import COMMANDS, trust_options
from syncd.daemon import run_daemon
from syncd.errors import (
    EXIT_CONFIG,
    EXIT_FAILED,
    EXIT_OK,
    EXIT_USAGE,
    ConfigError,
    SyncdError,
    UsageError,
)
from syncd.history import DiffStat, History
from syncd.model import Kind
from syncd.paths import printable
from syncd.render import SHOWN_PROBLEMS
from syncd.settings import Settings, load
from syncd.statedir import StateDir
from syncd.store.base import HEAD

if TYPE_CHECKING:
    from syncd.history import Side, Summary
    from syncd.model import Problem
    from syncd.nodes import Child
    from syncd.outlet import PushResult
    from syncd.store.base import Bucket, ObjectInfo
    from syncd.treediff import Change

T = TypeVar("T")
Command = Callable[..., Any]

STALE_SECONDS = 30.0
SHOWN_DIGITS = 12
"""Of a digest that a person reads."""


def run(arguments: list[str]) -> int:
    """Run one command; return its exit code."""
    try:
        code = cli.main(arguments, prog_name="syncd", standalone_mode=False)
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.ClickException as error:
        _say(error.format_message(), hint="syncd --help")
        return EXIT_USAGE
    except click.Abort:
        return 128 + signal.SIGINT
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:
        # The reader of our output went away (| head): that is its right, and Python must not complain at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_OK
    except ConfigError as error:
        _say(error.message, hint=error.hint)
        for problem in error.problems:
            click.echo(f"  {printable(problem)}", err=True)
        return EXIT_CONFIG
    except SyncdError as error:
        _say(error.message, hint=error.hint)
        return error.exit_code
    return code if isinstance(code, int) else EXIT_OK


def _say(message: str, *, hint: str = "") -> None:
    click.echo(f"syncd: {printable(message)}" + (f" ({printable(hint)})" if hint else ""), err=True)


# -- shared options ------------------------------------------------------------------------------------------------


def _config_option(command: Command) -> Command:
    return click.option(
        "--config",
        "-c",
        "config",
        type=click.Path(path_type=Path, dir_okay=False),
        envvar="SYNCD_CONFIG",
        help="The configuration file (TOML).",
    )(command)


def _settings(needs_file: bool = False) -> Callable[[Command], Command]:  # noqa: FBT001, FBT002
    """Give a command its settings, from ``--config`` before or after it, and quiet logs."""

    def decorate(command: Command) -> Command:
        @_config_option
        @click.pass_context
        @wraps(command)
        def wrapped(context: click.Context, /, config: Path | None, **arguments: Any) -> Any:
            config = config or (context.find_root().params.get("config"))
            if needs_file and config is None:
                raise UsageError("no configuration", hint="name one: --config fleet.toml, or set SYNCD_CONFIG")
            settings = load(config, os.environ)
            logs.configure("error", settings.daemon.log_format)
            return command(settings, **arguments)

        return wrapped

    return decorate


def _generation_option(command: Command) -> Command:
    return click.option(
        "--generation",
        type=click.IntRange(min=1),
        metavar="N",
        help="This generation instead of the newest.",
    )(command)


def _run(work: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(work)


@click.group(invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="syncd")
@_config_option
@click.pass_context
def cli(context: click.Context, config: Path | None) -> Any:
    """Distribute directories to a fleet over NATS JetStream. Without a command, the daemon runs."""
    if context.invoked_subcommand is None:
        return _daemon(config)
    return None


# -- commands ------------------------------------------------------------------------------------------------------


def _daemon(config: Path | None) -> int:
    if config is None and not any(name.startswith("SYNCD_") for name in os.environ):
        raise UsageError("no configuration", hint="name one: syncd --config fleet.toml, or set SYNCD_CONFIG")
    settings = load(config, os.environ)
    logs.configure(settings.daemon.log_level, settings.daemon.log_format)
    return _run(run_daemon(settings, config, os.environ))


@cli.command("run")
@_config_option
@click.pass_context
def run_command(context: click.Context, config: Path | None) -> int:
    """Run the daemon: every [[publish]] and [[subscribe]] of the file."""
    return _daemon(config or context.find_root().params.get("config"))


@cli.command()
@click.option("--offline", is_flag=True, help="Do not connect to the server.")
@_settings(needs_file=True)
def check(settings: Settings, offline: bool) -> int:  # noqa: FBT001
    """Validate the configuration; connect; say which permissions are missing."""
    findings = _run(oneshot.check(settings, connect=not offline))
    for finding in findings:
        click.echo(f"{finding.severity}: {printable(str(finding))}")
    errors = sum(finding.severity == "error" for finding in findings)
    if errors:
        return EXIT_CONFIG
    click.echo("configuration is fine" + (f", {len(findings)} warnings" if findings else ""))
    return EXIT_OK


@cli.command()
@click.argument("folder")
@click.option("--allow-delete", is_flag=True, help="Let a plan pass that a safety halt would hold.")
@click.option("--take-over", is_flag=True, help="Become the folder's publisher, whoever was before.")
@click.option("--change-layout", is_flag=True, help="Give the bucket the configured layout; what it holds goes.")
@click.option("--note", default="", metavar="TEXT", help="A line of text for the generation.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@_settings(needs_file=True)
def push(settings: Settings, folder: str, *, as_json: bool, **wishes: Any) -> int:
    """Publish FOLDER once. Exit code 1 when some paths could not be published."""
    with render.progress("push", quiet=as_json) as step:
        result = _run(oneshot.push(settings, folder, **wishes, progress=step))
    again = sorted(printable(path) for path in result.again)
    if as_json:
        _print_json(
            {
                "generation": result.generation,
                "committed": result.committed,
                "puts": result.puts,
                "deletes": result.deletes,
                "uploaded_bytes": result.uploaded_bytes,
                "reused_bytes": result.reused_bytes,
                "problems": [asdict(problem) for problem in result.problems],
                "not_quiet": again,
            }
        )
    else:
        click.echo(f"{folder}: {_pushed(result)}")
        _show_problems(result.problems)
        for path in again[:SHOWN_PROBLEMS]:
            click.echo(f"  {path}: kept changing while it was read", err=True)
    return EXIT_FAILED if result.problems or again else EXIT_OK


def _pushed(result: PushResult) -> str:
    if result.generation and not result.committed:
        return f"nothing changed: generation {result.generation}"
    generation = f"generation {result.generation}: " if result.generation else ""
    return (
        f"{generation}{result.puts} put, {result.deletes} deleted, "
        f"{render.size(result.uploaded_bytes)} uploaded, {render.size(result.reused_bytes)} known already"
    )


@cli.command()
@click.argument("folder")
@click.argument("directory", type=click.Path(path_type=Path, file_okay=False))
@click.option("--allow-delete", is_flag=True, help="Let a plan pass that a safety halt would hold.")
@_generation_option
@trust_options
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@_settings()
def pull(
    settings: Settings,
    folder: str,
    directory: Path,
    *,
    allow_delete: bool,
    generation: int | None,
    trust: tuple[str, ...],
    trust_threshold: int | None,
    as_json: bool,
) -> int:
    """Bring DIRECTORY up to FOLDER once. Exit code 1 when some paths could not be mirrored."""
    named = oneshot.trusted(settings, folder, trust, trust_threshold) if trust or trust_threshold else None
    notices: list[str] = []
    with render.progress("pull", quiet=as_json) as step:
        work = oneshot.pull(
            settings,
            folder,
            directory,
            allow_delete=allow_delete,
            generation=generation or 0,
            trust=named,
            unchecked=notices.append,
            progress=step,
        )
        result = _run(work)
    for why in notices:
        _say(f"signatures are not checked: {why}")
    if as_json:
        _print_json(
            {
                "generation": result.generation,
                "tree": result.root,
                "placed": result.placed,
                "removed": result.removed,
                "downloaded_bytes": result.downloaded_bytes,
                "reused_bytes": result.reused_bytes,
                "drifted": result.drifted,
                "problems": [asdict(problem) for problem in result.problems],
            }
        )
    else:
        what = f"generation {result.generation}: " if result.generation else ""
        click.echo(
            f"{folder}: {what}{result.placed} placed, {result.removed} removed, "
            f"{render.size(result.downloaded_bytes)} downloaded, {render.size(result.reused_bytes)} here already"
        )
        _show_problems(result.problems)
    return EXIT_FAILED if result.problems else EXIT_OK


@cli.command("log")
@click.argument("folder")
@click.option("--limit", "-n", type=click.IntRange(min=1), metavar="N", help="Only the newest N.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@_settings()
def log_command(settings: Settings, folder: str, *, limit: int | None, as_json: bool) -> int:
    """List the generations of FOLDER, the newest first."""

    async def read() -> list[Summary]:
        async with oneshot.open_history(settings, folder) as history:
            return await history.log()

    generations = _run(read())[:limit]
    if as_json:
        _print_json([one.to_json() for one in generations])
    else:
        render.show_log(generations)
    return EXIT_OK


@cli.command()
@click.argument("folder")
@click.argument("one", metavar="A")
@click.argument("other", metavar="B")
@click.option("--stat", is_flag=True, help="Only how many paths, and how many bytes.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per path, or one with --stat.")
@_settings()
def diff(settings: Settings, folder: str, one: str, other: str, *, stat: bool, as_json: bool) -> int:
    """Say what changed in FOLDER from A to B: generation numbers, or names of channels (head).

    A added, M content, m only mode or time, D removed, T another kind of entry. First which two these are (---, +++),
    with the digests by which syncd sign --expect knows them.
    """
    ends: list[Side] = []

    def sides(before: Side, after: Side) -> None:
        ends.extend((before, after))
        if as_json:
            if not stat:
                click.echo(json.dumps(_sides_json(ends)))
            return
        click.echo(f"--- {printable(str(before))}")
        click.echo(f"+++ {printable(str(after))}")

    async def show() -> DiffStat:
        total = DiffStat()
        async with oneshot.open_history(settings, folder) as history:
            async for change in history.differences(one, other, sides):
                total.add(change)
                if not stat:
                    click.echo(_change_json(change) if as_json else f"{change.mark} {printable(change.path)}")
        return total

    total = _run(show())
    if stat and as_json:
        _print_json(_sides_json(ends) | total.to_json())
    elif stat:
        for mark, counts in total.marks.items():
            click.echo(f"{mark} {counts.paths:>9} {render.size(counts.bytes):>10}  {mark.words}")
    return EXIT_OK


def _sides_json(ends: list[Side]) -> dict[str, Any]:
    return {name: asdict(side) for name, side in zip(("from", "to"), ends, strict=True)}


def _change_json(change: Change) -> str:
    before, after = (_fields(one) if one is not None else None for one in (change.before, change.after))
    return json.dumps({"path": change.path, "mark": str(change.mark), "before": before, "after": after})


@cli.command("ls")
@click.argument("folder")
@_generation_option
@click.option("--filter", "filters", multiple=True, metavar="KEY=VALUE", help="Only objects with this metadata.")
@click.option("--long", "-l", "long", is_flag=True, help="Kind, mode, size, time and digest as well.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per line.")
@_settings()
def ls(
    settings: Settings, folder: str, *, generation: int | None, filters: tuple[str, ...], long: bool, as_json: bool
) -> int:
    """List what FOLDER holds: the paths of a generation, or the objects of a bucket of the objects layout."""
    wanted = dict(_key_value(text) for text in filters)

    async def show() -> None:
        async with oneshot.open_bucket(settings, folder) as bucket:
            history = await History.open(bucket) if generation else await History.find(bucket)
            if history is None:
                await _list_objects(bucket, wanted, long=long, as_json=as_json)
            elif wanted:
                raise UsageError("--filter goes with the objects layout: a path in a generation has no metadata")
            else:
                await _list_entries(history, generation or HEAD, long=long, as_json=as_json)

    _run(show())
    return EXIT_OK


async def _list_entries(history: History, which: str | int, *, long: bool, as_json: bool) -> None:
    async for path, child in history.entries(which):
        entry = child.entry
        if as_json:
            click.echo(json.dumps({"path": path} | _fields(child)))
        elif long:
            target = f" -> {printable(entry.target)}" if entry.kind is Kind.SYMLINK else ""
            digest = (entry.digest or child.tree)[:SHOWN_DIGITS]
            when = render.when(entry.mtime_ns // 10**9)
            click.echo(
                f"{entry.kind:7} {entry.mode:04o} {entry.size:>12} {when} {digest:{SHOWN_DIGITS}} "
                f"{printable(path)}{target}"
            )
        else:
            click.echo(printable(path))


def _fields(child: Child) -> dict[str, Any]:
    """Return plain JSON types; a directory's digest is its tree digest."""
    entry = child.entry
    return {
        "kind": entry.kind.value,
        "mode": f"{entry.mode:04o}",
        "size": entry.size,
        "mtime_ns": entry.mtime_ns,
        "digest": entry.digest or child.tree,
        "target": entry.target,
    }


async def _list_objects(bucket: Bucket, wanted: dict[str, str], *, long: bool, as_json: bool) -> None:
    async for item in oneshot.list_objects(bucket, wanted):
        if as_json:
            click.echo(_object_json(item))
        elif long:
            kind = "link" if item.link else item.metadata.get("syncd-kind", "file")
            mode = item.metadata.get("syncd-mode", "-")
            when = render.when(item.mtime_ns / 1e9)
            click.echo(f"{printable(kind):7} {printable(mode):5} {item.size:>12} {when} {printable(item.name)}")
        else:
            click.echo(printable(item.name))


def _object_json(item: ObjectInfo) -> str:
    return json.dumps(
        {
            "name": item.name,
            "size": item.size,
            "chunks": item.chunks,
            "digest": item.digest,
            "written": render.when(item.mtime_ns / 1e9),
            "seq": item.seq,
            "metadata": dict(item.metadata),
            "link": asdict(item.link) if item.link else None,
        }
    )


@cli.command()
@click.argument("folder")
@click.argument("path")
@_generation_option
@_settings()
def cat(settings: Settings, folder: str, path: str, *, generation: int | None) -> int:
    """Write the verified content of PATH in FOLDER to standard output."""
    _run(oneshot.cat(settings, folder, path, sys.stdout.buffer, generation=generation or 0))
    return EXIT_OK


@cli.command()
@click.argument("directory", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--folder", help="The folder it mirrors, if the configuration does not say.")
@click.option(
    "--generation", type=click.IntRange(min=1), metavar="N", help="Compare with this one, not with what was applied."
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@_settings()
def verify(settings: Settings, directory: Path, *, folder: str | None, generation: int | None, as_json: bool) -> int:
    """Read every file of the mirror DIRECTORY and compare it with the bucket. Exit code 1 when it differs."""
    verdict = _run(oneshot.verify(settings, directory, folder, generation=generation or 0))
    if as_json:
        _print_json(asdict(verdict))
    else:
        for deviation in verdict.deviations[:SHOWN_PROBLEMS]:
            click.echo(f"  {printable(deviation.path)}: {deviation.what}")
        if len(verdict.deviations) > SHOWN_PROBLEMS:
            click.echo(f"  and {len(verdict.deviations) - SHOWN_PROBLEMS} more (--json has all)")
        where = f"generation {verdict.generation}, " if verdict.generation else ""
        tree = f"tree {verdict.found[:SHOWN_DIGITS]}: " if verdict.found else ""
        click.echo(
            f"{where}{tree}{verdict.checked} paths checked, {len(verdict.deviations)} differ, "
            f"{verdict.extraneous} not from this folder"
        )
    return EXIT_OK if verdict.sound else EXIT_FAILED


@cli.command("gc")
@click.argument("folder")
@click.option("--dry-run", is_flag=True, help="Only say what would be freed.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@_settings(needs_file=True)
def gc_command(settings: Settings, folder: str, *, dry_run: bool, as_json: bool) -> int:
    """Free what no kept generation of FOLDER reaches, as its publisher does by itself."""
    result = _run(oneshot.collect(settings, folder, dry_run=dry_run))
    if as_json:
        _print_json(asdict(result) | {"dry_run": dry_run})
        return EXIT_OK
    would = "would be " if dry_run else ""
    click.echo(
        f"{folder}: {result.generations_kept} generations kept, {result.generations_removed} {would}removed; "
        f"{result.freed_blobs} of {result.blobs} blobs {would}freed, {result.repacked} packs {would}packed anew"
    )
    after = "" if dry_run else f", {render.size(result.size_after)} after"
    click.echo(f"{folder}: {render.size(result.size)} before{after}")
    return EXIT_OK


@cli.command()
@click.argument("folder")
@click.option("--yes", is_flag=True, help="Do not ask.")
@_settings()
def seal(settings: Settings, folder: str, yes: bool) -> int:  # noqa: FBT001
    """Make FOLDER's bucket read-only for ever."""
    if not yes:
        click.confirm(f"Sealing {folder} can not be undone. Go on?", abort=True)
    _run(oneshot.seal(settings, folder))
    click.echo(f"{folder}: sealed")
    return EXIT_OK


@cli.command()
@click.argument("folder")
@_settings()
def allow(settings: Settings, folder: str) -> int:
    """Let the plan pass that a safety halt of FOLDER holds on this host."""
    for role in oneshot.allow(settings, folder):
        click.echo(f"{folder} ({role}): allowed")
    return EXIT_OK


@cli.command()
@click.argument("folder")
@click.argument("generation", metavar="[N]", required=False, type=click.IntRange(min=1))
@click.option("--clear", is_flag=True, help="Follow the channel again.")
@_settings()
def pin(settings: Settings, folder: str, generation: int | None, *, clear: bool) -> int:
    """Keep this host's mirrors of FOLDER at generation N, whatever their channel says.

    Without N: say where they are kept.
    """
    if clear and generation:
        raise UsageError("--clear goes without a generation")
    number = _run(oneshot.pin(settings, folder, generation, clear=clear))
    click.echo(f"{folder}: pinned to generation {number}" if number else f"{folder}: follows its channel")
    return EXIT_OK


@cli.command()
@click.option("--watch", is_flag=True, help="Show again every second.")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
@_settings()
def status(settings: Settings, watch: bool, as_json: bool) -> int:  # noqa: FBT001
    """Show this host's folders. Exit code 1: the daemon is down, or somebody has to look at a folder."""
    state = StateDir(settings.daemon.state_dir)
    while True:
        daemon, folders = state.read_status()
        running = state.daemon_runs() and daemon is not None and time.time() - daemon.get("beat", 0) < STALE_SECONDS
        if as_json:
            _print_json({"running": running, "daemon": daemon, "folders": [one.to_json() for one in folders]})
        else:
            render.show_status(folders, running=running, clear=watch)
        if not watch:
            return EXIT_OK if running and all(one.is_healthy for one in folders) else EXIT_FAILED
        time.sleep(1)


@cli.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> int:
    """Print the completion script of a shell: eval "$(syncd completion bash)"."""
    source = get_completion_class(shell)
    assert source is not None
    click.echo(source(cli, {}, "syncd", "_SYNCD_COMPLETE").source())
    return EXIT_OK


for _command in COMMANDS:
    cli.add_command(_command)


# -- rendering -----------------------------------------------------------------------------------------------------


def _show_problems(problems: list[Problem]) -> None:
    for problem in problems[:SHOWN_PROBLEMS]:
        where = f"{printable(problem.path)}: " if problem.path else ""
        click.echo(f"  {where}{problem.code}: {printable(problem.text)}", err=True)
    if len(problems) > SHOWN_PROBLEMS:
        click.echo(f"  and {len(problems) - SHOWN_PROBLEMS} more (--json has all)", err=True)


def _print_json(data: object) -> None:
    click.echo(json.dumps(data, indent=2))


def _key_value(text: str) -> tuple[str, str]:
    key, separator, value = text.partition("=")
    if not separator or not key:
        raise UsageError(f"--filter {text!r} is not KEY=VALUE")
    return key, value
