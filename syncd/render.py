"""What the command line shows: tables, progress bars, times and sizes in words.

Rules kept here: names from disk or wire are escaped before they reach the terminal; a table that goes to a file or a
pipe is wide, one on a terminal fits it.
"""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

from syncd.nodes import decode_record
from syncd.paths import printable
from syncd.trust import Statement, decode_keys, decode_move

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Sequence
    from contextlib import AbstractContextManager

    from syncd.history import Summary
    from syncd.progress import Progress as Step
    from syncd.records import Signable
    from syncd.status import FolderStatus

SHOWN_PROBLEMS = 20
WIDE = 200
"""Columns of a table that goes to a file or a pipe."""


def show_status(folders: list[FolderStatus], *, running: bool, clear: bool) -> None:
    """Show this host's folders."""
    console = _console()
    if clear:
        console.clear()
    heads = [
        "folder",
        "role",
        "state",
        "last sync",
        "generation",
        "follows",
        "pending",
        "entries",
        "size",
        "problems",
        "path",
    ]
    rows = [
        [
            one.folder,
            one.role,
            one.state.value if running else "stopped",
            ago(one.last_sync),
            str(one.generation or "-"),
            f"pin {one.pinned}" if one.pinned else one.channel or "-",
            str(one.pending),
            str(one.entries),
            size(one.bytes),
            str(one.problem_count),
            one.path,
        ]
        for one in folders
    ]
    console.print("daemon is running" if running else "daemon is not running")
    if folders:
        console.print(_table(heads, rows))
    for one in folders:
        _show_folder_problems(console, one)


def _show_folder_problems(console: Console, one: FolderStatus) -> None:
    if one.error:
        hint = f" ({one.hint})" if one.hint else ""
        console.print(f"{escape(one.folder)} ({one.role}): {escape(printable(one.error + hint))}", soft_wrap=True)
    for problem in one.problems[:SHOWN_PROBLEMS]:
        where = f"{printable(problem.path)}: " if problem.path else ""
        text = f"{where}{problem.code}: {printable(problem.text)}"
        console.print(f"  {escape(one.folder)}: {escape(text)}", soft_wrap=True)
    if (more := one.problem_count - min(len(one.problems), SHOWN_PROBLEMS)) > 0:
        console.print(f"  {escape(one.folder)}: and {more} more problems")


def show_log(generations: Sequence[Summary]) -> None:
    """Show generations as a table."""
    console = _console()
    heads = ["generation", "time", "files", "size", "changes", "channels", "publisher", "note"]
    rows = [
        [
            str(one.number),
            _second(one.created),
            _count(one.files),
            "-" if one.bytes is None else size(one.bytes),
            f"+{_count(one.added)} ~{_count(one.changed)} -{_count(one.removed)}",
            ", ".join(one.channels),
            one.publisher,
            one.note,
        ]
        for one in generations
    ]
    console.print(_table(heads, rows))


def _table(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> Table:
    table = Table(*heads, box=None)
    for row in rows:
        table.add_row(*(escape(printable(text)) for text in row))
    return table


def _console() -> Console:
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = WIDE
    return console


def _count(number: int | None) -> str:
    return "-" if number is None else str(number)


def _second(moment: str) -> str:
    """Return an RFC 3339 time without the fraction of a second; what is none as it is."""
    try:
        return when(datetime.fromisoformat(moment).timestamp())
    except (ValueError, OverflowError):
        return moment


# -- what is to be signed ------------------------------------------------------------------------------------------


def signable_lines(one: Signable, trusted: Collection[str]) -> list[str]:
    """Return what would be signed, in lines for a person: read from the very bytes that a signature would be over.

    :param trusted: the keys that are trusted now.
    """
    told = {Statement.GENERATION: _generation_lines, Statement.MOVE: _move_lines, Statement.KEYS: _keys_lines}
    head, *rest = told[one.kind](one.data)
    rest.append(f"digest {one.digest}")
    rest += [f"signed by {key}{'' if key in trusted else ' (not trusted)'}" for key in one.signers]
    if not one.signers:
        rest.append("signed by nobody")
    return [printable(head), *(f"  {printable(line)}" for line in rest)]


def _generation_lines(data: bytes) -> list[str]:
    record = decode_record(data)
    lines = [
        f"generation {record.number} of folder {record.folder}",
        f"made {record.created} by {record.publisher}",
        f"{record.files} files, {size(record.size)}",
        f"+{record.added} ~{record.changed} -{record.removed} against the one before",
        f"tree {record.root.tree}",
        f"after the record {record.parent}" if record.parent else "the first",
    ]
    if record.note:
        lines.append(f"note: {record.note}")
    if record.expires:
        lines.append(f"until {record.expires}")
    return lines


def _move_lines(data: bytes) -> list[str]:
    move = decode_move(data)
    lines = [
        f"channel {move.channel} of folder {move.folder}: move {move.count}, to generation {move.number}",
        f"made {move.at} by {move.who or 'somebody who does not say'}",
        f"to the record {move.record}",
        f"until {move.expires}" if move.expires else "without an end",
    ]
    if move.why:
        lines.append(f"why: {move.why}")
    return lines


def _keys_lines(data: bytes) -> list[str]:
    keys = decode_keys(data)
    lines = [
        f"key set {keys.version} of folder {keys.folder}: {keys.threshold} of {len(keys.keys)} have to sign",
        f"made {keys.at}",
        *(f"key {key}" for key in keys.keys),
    ]
    if keys.why:
        lines.append(f"why: {keys.why}")
    return lines


# -- progress ------------------------------------------------------------------------------------------------------


def progress(what: str, *, quiet: bool) -> AbstractContextManager[Callable[[Step], None] | None]:
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


# -- times and sizes -----------------------------------------------------------------------------------------------


def when(seconds: float) -> str:
    """Return a moment in UTC to the second."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def ago(moment: float | None) -> str:
    """Return how long ago a wall clock time was."""
    if moment is None:
        return "never"
    seconds = max(0, int(time.time() - moment))
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= 2 * length:
            return f"{seconds // length}{unit} ago"
    return f"{seconds}s ago"


def size(count: float) -> str:
    """Return bytes with a unit."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:  # noqa: PLR2004
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
