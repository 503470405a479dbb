"""Hooks: the operator's own programs, run around an apply; what they may see, say and leave behind.

Rules kept here (docs/hooks.md tells the operator):
 * no shell, ever: placeholders are replaced inside the items of an argv list, and what replaces them is not looked at;
 * what runs is what the operator names: a bare name is looked for in absolute directories, a relative path is refused,
   and no hook begins in the mirror, whose content is the publisher's;
 * whatever a hook does, it has an outcome: what cannot be started, hangs, is killed or prints a gigabyte is one, too;
 * no process of a hook outlives its timeout, our being cancelled, or our death: ``hookguard.py`` sees to that;
 * of our own environment a hook gets what is named here and nothing else: ``SYNCD_*`` may hold passwords;
 * memory is bounded, and what is logged is printable.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import re
import signal
import subprocess
import sys
from collections import deque
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import structlog

from syncd.errors import DiskProblem
from syncd.paths import printable

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

log = structlog.get_logger()

HookName = Literal["check", "apply", "health"]
ChangeLetter = Literal["A", "M", "D"]

PLACEHOLDERS: Mapping[HookName, frozenset[str]] = {
    "check": frozenset({"staged", "path", "generation", "folder"}),
    "apply": frozenset({"path", "generation", "folder"}),
    "health": frozenset({"path", "generation", "folder"}),
}
"""What each hook may use; after the check there is no staged tree any more."""

VARIABLES = frozenset(
    {
        *("SYNCD_HOOK", "SYNCD_FOLDER", "SYNCD_GENERATION", "SYNCD_PREVIOUS"),
        *("SYNCD_PATH", "SYNCD_STAGED", "SYNCD_CHANGED_FILE"),
    }
)
"""What hooks are told in their environment: a ``syncd`` command within a hook must not take these for settings."""

OUTPUT_BYTES = 64 * 1024
"""The last bytes of what a hook says are kept."""
GRACE_SECONDS = 5.0
"""Between SIGTERM and SIGKILL where a hook's time is up."""
SHORT_GRACE_SECONDS = 0.5
"""The same where the daemon stops: it has five seconds for everything, and most are over when it cancels."""
DRAIN_SECONDS = 1.0
"""How long the output is read on after the hook's end, where something it left still holds it."""
SLACK_SECONDS = 3.0
"""What the guard may take beyond the grace, before it is given up."""
LOGGED_LINES = 20
NOT_STARTED = "could not be started"
"""How a reason begins where this host had no room for a process: that is no verdict on anything."""
LOGGED_CHARACTERS = 200

ROOT = Path("/")
"""Where hooks begin: a directory that no publisher writes into."""
_GUARD = Path(__file__).with_name("hookguard.py")
_REPORT_BYTES = 4096
_READ_BYTES = 256 * 1024
_PASSED_ON = frozenset({"HOME", "LANG", "TZ", "USER", "LOGNAME", "TMPDIR"})
_PLACEHOLDER = re.compile(r"\{(staged|path|generation|folder)\}")
_TOLD_APART = re.compile("[\x7f-\x9f\u2028\u2029\ud800-\udfff]")
"""What JSON leaves as it is, and a reader of lines or a terminal does not."""


@dataclass(frozen=True, slots=True)
class Hook:
    """One program to run.

    :ivar argv: the program and its arguments, with placeholders.
    :ivar timeout: seconds until it is ended.
    """

    name: HookName
    argv: tuple[str, ...]
    timeout: float


@dataclass(frozen=True, slots=True)
class HookOutcome:
    """How a hook ended.

    :ivar ok: it ran, and ended in time with exit code 0.
    :ivar code: the exit code, negative for a signal's number; ``None``: it never ran, or nobody knows.
    :ivar output: the last 64 KiB of what it said, printable, lines separated by newlines.
    :ivar seconds: from start to end, with :func:`run_health` of all tries together.
    :ivar reason: why it is not ``ok``, in words; of a good one, what is odd about it, mostly "".
    """

    name: HookName
    ok: bool
    code: int | None
    timed_out: bool
    output: str
    seconds: float
    reason: str


# --- what a hook gets ---


def fill(argv: Sequence[str], values: Mapping[str, str]) -> list[str]:
    """Replace the placeholders that have a value, once: what a value holds is text, also where it looks like one."""
    return [_PLACEHOLDER.sub(lambda match: values.get(match[1], match[0]), item) for item in argv]


def placeholders(argv: Sequence[str]) -> frozenset[str]:
    """Return the names of the placeholders in an argv, for whoever checks a configuration."""
    return frozenset(name for item in argv for name in _PLACEHOLDER.findall(item))


def is_relative(program: str) -> bool:
    """Tell whether a program is a path that depends on the directory it is looked at from."""
    return "/" in program and not program.startswith(("/", "{staged}", "{path}"))


def child_environment(name: HookName, environ: Mapping[str, str], own: Mapping[str, str]) -> dict[str, str]:
    """Return a hook's whole environment: what is told to it, and of our own only what no secret is in.

    A PATH with an empty or relative directory would look for programs in the working directory.
    """
    kept = {key: text for key, text in own.items() if key in _PASSED_ON or key.startswith("LC_")}
    path = [directory for directory in own.get("PATH", "").split(os.pathsep) if directory.startswith("/")]
    kept["PATH"] = os.pathsep.join(path) or os.defpath
    return kept | dict(environ) | {"SYNCD_HOOK": name}


def changed_line(letter: ChangeLetter, path: str) -> str:
    r"""Return a line of the changed-paths file, with its newline: ``A``, ``M`` or ``D``, a tab, the path.

    The path is escaped as within a JSON string, without the quotes: ``\n``, ``\t``, ``\"``, ``\\``, ``\u001b``. So a
    line is a change whatever the name holds, and ``json.loads(f'"{text}"')`` gives the name back.
    """
    text = _TOLD_APART.sub(_escape, json.dumps(path, ensure_ascii=False)[1:-1])
    return f"{letter}\t{text}\n"


def _escape(match: re.Match[str]) -> str:
    return f"\\u{ord(match[0]):04x}"


def write_changed_file(dir_fd: int, name: str, lines: Iterable[tuple[ChangeLetter, str]]) -> int:
    """Write the changed-paths file; return how many lines it has. Blocking.

    It appears whole under its name, in the place of what was there, and is durable when this returns: a hook that runs
    again after a crash gets it again. Memory does not grow with the changes. Mode 0600.

    :param dir_fd: an open directory of ours, where nobody else makes names.
    :param lines: letters (added, modified, deleted) and paths; what this raises leaves the file before as it was.
    :raises DiskProblem: the disk refuses.
    """
    fresh = f"{name}.new"
    count = 0
    try:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(fresh, dir_fd=dir_fd)
        # O_EXCL does not follow a link either, should one come back in between.
        fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode=0o600, dir_fd=dir_fd)
        try:
            with os.fdopen(fd, "wb") as file:
                for letter, path in lines:
                    file.write(changed_line(letter, path).encode())
                    count += 1
                file.flush()
                os.fsync(fd)
            os.rename(fresh, name, src_dir_fd=dir_fd, dst_dir_fd=dir_fd)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(fresh, dir_fd=dir_fd)
            raise
        os.fsync(dir_fd)
    except OSError as exc:
        raise DiskProblem(f"the list of changes for the hooks cannot be written: {exc.strerror}") from exc
    return count


# --- running one ---


async def run_hook(
    hook: Hook, *, values: Mapping[str, str], environ: Mapping[str, str], cwd: Path = ROOT
) -> HookOutcome:
    """Run a hook to its end, or to the end of its time; raises nothing but the caller's own cancellation.

    When that comes, everything that the hook started is ended before it goes on.

    :param values: what the placeholders stand for.
    :param environ: ``SYNCD_FOLDER`` and so on; ``SYNCD_HOOK`` is added.
    :param cwd: the directory it starts in.
    """
    outcome = await _attempt(hook, values, environ, cwd)
    _log_outcome(outcome, environ, tries=1)
    return outcome


async def run_health(
    hook: Hook,
    *,
    tries: int,
    pause: float,
    deadline: float,
    values: Mapping[str, str],
    environ: Mapping[str, str],
    cwd: Path = ROOT,
) -> HookOutcome:
    """Run a hook again and again, until it is good, ``tries`` are used up, or ``deadline`` seconds are over.

    The last try is cut off at the deadline, and its outcome is returned. Otherwise as :func:`run_hook`.

    :param pause: seconds between the end of a try and the next one.
    :param deadline: 0: there is one try, with the hook's own time.
    """
    clock = asyncio.get_running_loop().time
    begun = clock()
    number = 0
    while True:
        number += 1
        left = begun + deadline - clock() if deadline else hook.timeout
        outcome = await _attempt(replace(hook, timeout=min(hook.timeout, left)), values, environ, cwd)
        if outcome.ok or number >= tries or clock() + pause >= begun + deadline:
            break
        _logger(environ).debug("hook_tried_again", hook=hook.name, reason=outcome.reason, tries=number)
        await asyncio.sleep(pause)
    outcome = replace(outcome, seconds=clock() - begun)
    if not outcome.ok:
        outcome = replace(outcome, reason=f"{outcome.reason} (try {number}, after {outcome.seconds:.1f} s)")
    _log_outcome(outcome, environ, tries=number)
    return outcome


def _log_outcome(outcome: HookOutcome, environ: Mapping[str, str], *, tries: int) -> None:
    """Write one line with the last words."""
    told = _logger(environ)
    lines = [line[:LOGGED_CHARACTERS] for line in deque(outcome.output.splitlines(), LOGGED_LINES)]
    said, seconds = "\n".join(lines), round(outcome.seconds, 3)
    if outcome.ok:
        told.info("hook_done", hook=outcome.name, seconds=seconds, tries=tries, output=said, reason=outcome.reason)
    else:
        told.warning(
            "hook_failed",
            hook=outcome.name,
            seconds=seconds,
            tries=tries,
            output=said,
            reason=outcome.reason,
            code=outcome.code,
        )


def _logger(environ: Mapping[str, str]) -> Any:
    """Return a logger that says, as every line about a folder does, which one, and of which generation."""
    generation = environ.get("SYNCD_GENERATION", "")
    return log.bind(folder=environ.get("SYNCD_FOLDER", ""), role="subscribe", generation=generation)


async def _attempt(hook: Hook, values: Mapping[str, str], environ: Mapping[str, str], cwd: Path) -> HookOutcome:
    clock = asyncio.get_running_loop().time
    begun = clock()
    argv = fill(hook.argv, values)
    if is_relative(argv[0]):
        reason = f"{printable(argv[0])} is a relative path: which program that is would depend on the directory"
        return HookOutcome(hook.name, ok=False, code=None, timed_out=False, output="", seconds=0.0, reason=reason)
    try:
        run = _Run(argv, child_environment(hook.name, environ, os.environ), cwd)
    except (OSError, ValueError) as exc:  # no descriptors, no memory, a NUL byte
        reason = f"{NOT_STARTED}: {exc}"
        return HookOutcome(hook.name, ok=False, code=None, timed_out=False, output="", seconds=0.0, reason=reason)
    try:
        timed_out = not await run.report.ended_within(hook.timeout)
        if timed_out:
            run.time_is_up()
            await run.report.ended_within(GRACE_SECONDS + SLACK_SECONDS)
        held = not await run.output.ended_within(DRAIN_SECONDS)
    finally:
        await run.close()
    report = read_report(run.report.kept())
    return HookOutcome(
        hook.name,
        ok=report.code == 0 and not timed_out,
        code=report.code,
        timed_out=timed_out,
        output=shown(run.output.kept(), run.output.total),
        seconds=clock() - begun,
        reason=reason_of(report, printable(argv[0]), hook.timeout if timed_out else None, held=held),
    )


@dataclass(frozen=True, slots=True)
class Report:
    """What the guard told.

    :ivar pid: the hook's process; 0: none was begun.
    :ivar code: as in :class:`HookOutcome`.
    :ivar error: what could not be done for it (``exec``, ``chdir``) and the errno.
    :ivar left: processes that could not be ended.
    """

    pid: int = 0
    code: int | None = None
    error: tuple[str, int] | None = None
    left: tuple[int, ...] = ()


def read_report(data: bytes) -> Report:
    """Read the guard's lines."""
    report = Report()
    for line in data.decode("ascii").splitlines():
        match line.split():
            case ["pid", number]:
                report = replace(report, pid=int(number))
            case ["error", step, number]:
                report = replace(report, error=(step, int(number)))
            case ["exit", number] if report.error is None:  # else it is only how our half of the fork ended
                report = replace(report, code=int(number))
            case ["signal", number]:
                report = replace(report, code=-int(number))
            case ["left", *numbers]:
                report = replace(report, left=tuple(map(int, numbers)))
    return report


_NOT_RUN = {
    errno.ENOENT: "is not there, or the program in its first line is not",
    errno.ENOEXEC: "is nothing the system can run: a script needs a first line that begins with #!",
    errno.EACCES: "may not be executed",
}


def reason_of(report: Report, program: str, timeout: float | None, *, held: bool) -> str:
    """Say in words why a hook failed, or what is odd about one that did not.

    :param timeout: the seconds that were over; ``None``: it ended in time.
    :param held: something still held its output when it had ended.
    """
    if report.error is not None:
        step, number = report.error
        if step == "chdir":
            return f"its working directory cannot be entered: {os.strerror(number)}"
        return f"{program} {_NOT_RUN.get(number, f'cannot be run: {os.strerror(number)}')}"
    if timeout is not None:
        reason = f"did not end within {round(timeout, 2):g} s; it and all that it started was ended"
    elif report.code is None:
        reason = "the process that guards it was killed" if report.pid else "the process that guards it did not start"
    elif report.code < 0:
        reason = f"killed by {_signal_name(-report.code)}"
    elif report.code > 0:
        reason = f"exit code {report.code}"
    else:
        reason = "it left a process behind that still holds its output" if held else ""
    if report.left:
        reason += f"; could not be ended: {', '.join(map(str, report.left))}"
    return reason


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def shown(kept: bytes, total: int) -> str:
    """Return the last of a hook's output as printable lines, with a note of what is missing before them."""
    lines = [printable(line.removesuffix(b"\r").expandtabs()) for line in kept.split(b"\n")]
    if lines[-1] == "":
        lines.pop()
    if total > len(kept):
        lines.insert(0, f"[{total - len(kept)} bytes before this were dropped]")
    return "\n".join(lines)


class _Tail:
    """Reads a pipe to its end and keeps the last bytes. Never stops reading: who writes must not stall."""

    def __init__(self, fd: int, keep: int) -> None:
        self._fd = fd
        self._keep = keep
        self._loop = asyncio.get_running_loop()
        self._ended = self._loop.create_future()
        self._bytes = bytearray()
        self.total = 0
        os.set_blocking(fd, False)
        self._loop.add_reader(fd, self._read)

    async def ended_within(self, seconds: float) -> bool:
        """Wait for the end of the pipe: everybody who could write has closed it or ended."""
        done, _ = await asyncio.wait({self._ended}, timeout=max(0.0, seconds))
        return bool(done)

    def has_ended(self) -> bool:
        return self._ended.done()

    def kept(self) -> bytes:
        return bytes(self._bytes[-self._keep :])

    def close(self) -> None:
        self._loop.remove_reader(self._fd)
        os.close(self._fd)

    def _read(self) -> None:
        try:
            data = os.read(self._fd, _READ_BYTES)
        except BlockingIOError:
            return
        self.total += len(data)
        self._bytes += data
        if len(self._bytes) > 2 * self._keep:
            del self._bytes[: -self._keep]
        if not data:
            self._loop.remove_reader(self._fd)
            self._ended.set_result(None)


_unreaped: list[subprocess.Popen[bytes]] = []
"""Guards that ended, or will, after nobody could wait for them any more: each next one that starts reaps them."""


class _Run:
    """One guard with its hook, and our ends of its pipes.

    Starting takes no ``await``, so no cancellation can come between the process and somebody who answers for it.

    :raises OSError: no process or descriptor to be had.
    :raises ValueError: a NUL byte in an argument.
    """

    def __init__(self, argv: Sequence[str], environ: Mapping[str, str], cwd: Path) -> None:
        _unreaped[:] = [guard for guard in _unreaped if guard.poll() is None]
        with contextlib.ExitStack() as ours, contextlib.ExitStack() as theirs:
            output, output_end = _pipe(ours, theirs)
            report, report_end = _pipe(ours, theirs)
            leash_end, self._leash = _pipe(theirs, ours)
            times = (str(GRACE_SECONDS), str(SHORT_GRACE_SECONDS))
            self._guard = subprocess.Popen(
                [
                    *(sys.executable, "-I", "-S", "-X", "utf8", str(_GUARD)),
                    *(str(leash_end), str(report_end), *times, str(cwd.absolute())),
                    *argv,
                ],
                stdin=subprocess.DEVNULL,
                stdout=output_end,
                stderr=subprocess.STDOUT,
                pass_fds=(leash_end, report_end),
                env=dict(environ),
                cwd="/",  # the guard itself keeps no filesystem busy
                start_new_session=True,  # a terminal's ^C is ours to act on
            )
            ours.pop_all()
        self.output = _Tail(output, OUTPUT_BYTES)
        self.report = _Tail(report, _REPORT_BYTES)

    def time_is_up(self) -> None:
        """Have everything ended, politely first."""
        with contextlib.suppress(BrokenPipeError):
            os.write(self._leash, b"t")

    async def close(self) -> None:
        """End what still runs, and let go of everything.

        When even this is cancelled, the guard goes on by itself: it has seen the end of the leash.
        """
        os.close(self._leash)
        try:
            if not await self.report.ended_within(SHORT_GRACE_SECONDS + SLACK_SECONDS):
                self._guard.kill()  # stopped, or starved: it does not answer
                await self.report.ended_within(SLACK_SECONDS)
            if self.report.has_ended():
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._guard.wait(SLACK_SECONDS)  # it closed its last descriptor by ending
                self._end_orphans()
        finally:
            self.output.close()
            self.report.close()
            if self._guard.poll() is None:
                _unreaped.append(self._guard)

    def _end_orphans(self) -> None:
        """End the hook's group where its guard was killed and could not."""
        report = read_report(self.report.kept())
        if report.pid and report.code is None and report.error is None:
            with contextlib.suppress(OSError):
                os.killpg(report.pid, signal.SIGKILL)


def _pipe(reader: contextlib.ExitStack, writer: contextlib.ExitStack) -> tuple[int, int]:
    """Make a pipe (read end, write end); each end is closed with its stack."""
    read_end, write_end = os.pipe()
    reader.callback(os.close, read_end)
    writer.callback(os.close, write_end)
    return read_end, write_end
