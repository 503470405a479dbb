"""The command line: commands, one-line errors, exit codes after sysexits.h (docs/cli.md).

Rules kept here:
 * whatever a person can mend ends in one line on stderr and a documented exit code, never in a traceback;
 * ``--config`` goes before or after the command; without a command the daemon runs;
 * names from disk or wire are escaped before they reach the terminal; ``--json`` is for machines.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Coroutine
from dataclasses import asdict
from datetime import UTC, datetime
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.shell_completion import get_completion_class
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

from syncd import __version__, logs, oneshot
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
from syncd.paths import printable
from syncd.settings import Settings, load
from syncd.statedir import StateDir
from syncd.status import FolderState

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from syncd.model import Problem
    from syncd.progress import Progress as Step
    from syncd.status import FolderStatus

T = TypeVar("T")
Command = Callable[..., Any]

SHOWN_PROBLEMS = 20
STALE_SECONDS = 30.0
WIDE = 200
"""Columns of a table that goes to a file or a pipe."""


def main() -> None:
    """Run the command line and exit."""
    gc.freeze()  # what the imports made stays; collecting it again and again costs some 5 % of a push
    gc.set_threshold(100_000, 50, 50)
    sys.exit(run(sys.argv[1:]))


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
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@_settings(needs_file=True)
def push(settings: Settings, folder: str, *, allow_delete: bool, take_over: bool, as_json: bool) -> int:
    """Publish FOLDER once. Exit code 1 when some paths could not be published."""
    with _progress("push", quiet=as_json) as step:
        work = oneshot.push(settings, folder, allow_delete=allow_delete, take_over=take_over, progress=step)
        result = _run(work)
    again = sorted(printable(path) for path in result.again)
    if as_json:
        _print_json(
            {
                "puts": result.puts,
                "deletes": result.deletes,
                "uploaded_bytes": result.uploaded_bytes,
                "reused_bytes": result.reused_bytes,
                "problems": [asdict(problem) for problem in result.problems],
                "not_quiet": again,
            }
        )
    else:
        click.echo(
            f"{folder}: {result.puts} put, {result.deletes} deleted, "
            f"{_size(result.uploaded_bytes)} uploaded, {_size(result.reused_bytes)} known already"
        )
        _show_problems(result.problems)
        for path in again[:SHOWN_PROBLEMS]:
            click.echo(f"  {path}: kept changing while it was read", err=True)
    return EXIT_FAILED if result.problems or again else EXIT_OK


@cli.command()
@click.argument("folder")
@click.argument("directory", type=click.Path(path_type=Path, file_okay=False))
@click.option("--allow-delete", is_flag=True, help="Let a plan pass that a safety halt would hold.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@_settings()
def pull(settings: Settings, folder: str, directory: Path, allow_delete: bool, as_json: bool) -> int:  # noqa: FBT001
    """Bring DIRECTORY up to FOLDER once. Exit code 1 when some paths could not be mirrored."""
    with _progress("pull", quiet=as_json) as step:
        result = _run(oneshot.pull(settings, folder, directory, allow_delete=allow_delete, progress=step))
    if as_json:
        _print_json(
            {
                "placed": result.placed,
                "removed": result.removed,
                "downloaded_bytes": result.downloaded_bytes,
                "reused_bytes": result.reused_bytes,
                "drifted": result.drifted,
                "problems": [asdict(problem) for problem in result.problems],
            }
        )
    else:
        click.echo(
            f"{folder}: {result.placed} placed, {result.removed} removed, "
            f"{_size(result.downloaded_bytes)} downloaded, {_size(result.reused_bytes)} here already"
        )
        _show_problems(result.problems)
    return EXIT_FAILED if result.problems else EXIT_OK


@cli.command("ls")
@click.argument("folder")
@click.option("--filter", "filters", multiple=True, metavar="KEY=VALUE", help="Only objects with this metadata.")
@click.option("--long", "-l", "long", is_flag=True, help="Kind, mode, size, time and digest as well.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per line.")
@_settings()
def ls(settings: Settings, folder: str, filters: tuple[str, ...], long: bool, as_json: bool) -> int:  # noqa: FBT001
    """List the objects of FOLDER's bucket."""
    wanted = dict(_key_value(text) for text in filters)

    async def show() -> None:
        async for item in oneshot.list_objects(settings, folder, wanted):
            if as_json:
                click.echo(
                    json.dumps(
                        {
                            "name": item.name,
                            "size": item.size,
                            "chunks": item.chunks,
                            "digest": item.digest,
                            "written": _time(item.mtime_ns / 1e9),
                            "seq": item.seq,
                            "metadata": dict(item.metadata),
                            "link": asdict(item.link) if item.link else None,
                        }
                    )
                )
            elif long:
                kind = "link" if item.link else item.metadata.get("syncd-kind", "file")
                mode = item.metadata.get("syncd-mode", "-")
                when = _time(item.mtime_ns / 1e9)
                click.echo(f"{printable(kind):7} {printable(mode):5} {item.size:>12} {when} {printable(item.name)}")
            else:
                click.echo(printable(item.name))

    _run(show())
    return EXIT_OK


@cli.command()
@click.argument("folder")
@click.argument("path")
@_settings()
def cat(settings: Settings, folder: str, path: str) -> int:
    """Write the verified content of PATH in FOLDER's bucket to standard output."""
    _run(oneshot.cat(settings, folder, path, sys.stdout.buffer))
    return EXIT_OK


@cli.command()
@click.argument("directory", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--folder", help="The folder it mirrors, if the configuration does not say.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@_settings()
def verify(settings: Settings, directory: Path, folder: str | None, as_json: bool) -> int:  # noqa: FBT001
    """Read every file of the mirror DIRECTORY and compare it with the bucket. Exit code 1 when it differs."""
    verdict = _run(oneshot.verify(settings, directory, folder))
    if as_json:
        _print_json(asdict(verdict))
    else:
        for deviation in verdict.deviations[:SHOWN_PROBLEMS]:
            click.echo(f"  {printable(deviation.path)}: {deviation.what}")
        if len(verdict.deviations) > SHOWN_PROBLEMS:
            click.echo(f"  and {len(verdict.deviations) - SHOWN_PROBLEMS} more (--json has all)")
        click.echo(
            f"{verdict.checked} paths checked, {len(verdict.deviations)} differ, "
            f"{verdict.extraneous} not from this folder"
        )
    return EXIT_FAILED if verdict.deviations else EXIT_OK


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
@click.option("--watch", is_flag=True, help="Show again every second.")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
@_settings()
def status(settings: Settings, watch: bool, as_json: bool) -> int:  # noqa: FBT001
    """Show this host's folders. Exit code 1 when the daemon is down or a folder has failed or is held."""
    state = StateDir(settings.daemon.state_dir)
    while True:
        daemon, folders = state.read_status()
        running = state.daemon_runs() and daemon is not None and time.time() - daemon.get("beat", 0) < STALE_SECONDS
        if as_json:
            _print_json({"running": running, "daemon": daemon, "folders": [one.to_json() for one in folders]})
        else:
            _show_status(folders, running=running, clear=watch)
        if not watch:
            return EXIT_OK if running and all(_healthy(one) for one in folders) else EXIT_FAILED
        time.sleep(1)


@cli.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> int:
    """Print the completion script of a shell: eval "$(syncd completion bash)"."""
    source = get_completion_class(shell)
    assert source is not None
    click.echo(source(cli, {}, "syncd", "_SYNCD_COMPLETE").source())
    return EXIT_OK


# -- rendering -----------------------------------------------------------------------------------------------------


def _healthy(folder: FolderStatus) -> bool:
    return folder.state not in {FolderState.FAILED, FolderState.HALTED, FolderState.STOPPED}


def _show_status(folders: list[FolderStatus], *, running: bool, clear: bool) -> None:
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = WIDE
    if clear:
        console.clear()
    table = Table("folder", "role", "state", "last sync", "pending", "entries", "size", "problems", "path", box=None)
    for one in folders:
        table.add_row(
            *(
                escape(text)
                for text in (
                    one.folder,
                    one.role,
                    one.state.value if running else "stopped",
                    _ago(one.last_sync),
                    str(one.pending),
                    str(one.entries),
                    _size(one.bytes),
                    str(one.problem_count),
                    printable(one.path),
                )
            )
        )
    console.print("daemon is running" if running else "daemon is not running")
    if folders:
        console.print(table)
    for one in folders:
        if one.error:
            hint = f" ({one.hint})" if one.hint else ""
            console.print(f"{escape(one.folder)} ({one.role}): {escape(printable(one.error + hint))}", soft_wrap=True)
        for problem in one.problems[:SHOWN_PROBLEMS]:
            text = f"{printable(problem.path)}: {problem.code}: {printable(problem.text)}"
            console.print(f"  {escape(one.folder)}: {escape(text)}", soft_wrap=True)
        if (more := one.problem_count - min(len(one.problems), SHOWN_PROBLEMS)) > 0:
            console.print(f"  {escape(one.folder)}: and {more} more problems")


def _show_problems(problems: list[Problem]) -> None:
    for problem in problems[:SHOWN_PROBLEMS]:
        click.echo(f"  {printable(problem.path)}: {problem.code}: {printable(problem.text)}", err=True)
    if len(problems) > SHOWN_PROBLEMS:
        click.echo(f"  and {len(problems) - SHOWN_PROBLEMS} more (--json has all)", err=True)


def _progress(what: str, *, quiet: bool) -> AbstractContextManager[Callable[[Step], None] | None]:
    """Return a progress bar on a terminal, nothing elsewhere."""
    console = Console(stderr=True)
    return _Bar(what, console) if console.is_terminal and not quiet else _NoBar()


class _NoBar:
    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        return None


class _Bar:
    """One bar: bytes done of bytes in total, and files."""

    def __init__(self, what: str, console: Console) -> None:
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[files]} files"),
            console=console,
            transient=True,
        )
        self._task = self._bar.add_task(what, total=None, files="0")

    def __enter__(self) -> Callable[[Step], None]:
        self._bar.start()
        return self._step

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def _step(self, step: Step) -> None:
        files = f"{step.files}/{step.total_files}"
        self._bar.update(self._task, total=max(step.total_bytes, step.bytes), completed=step.bytes, files=files)


def _print_json(data: object) -> None:
    click.echo(json.dumps(data, indent=2))


def _key_value(text: str) -> tuple[str, str]:
    key, separator, value = text.partition("=")
    if not separator or not key:
        raise UsageError(f"--filter {text!r} is not KEY=VALUE")
    return key, value


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def _ago(when: float | None) -> str:
    if when is None:
        return "never"
    seconds = max(0, int(time.time() - when))
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= 2 * size:
            return f"{seconds // size}{unit} ago"
    return f"{seconds}s ago"


def _size(size: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:  # noqa: PLR2004
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
