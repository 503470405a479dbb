"""Runs one hook and holds on to everything that it starts: a small program of its own, started by ``hooks.py``.

Rules kept here:
 * no process of a hook outlives its time or our daemon: this program is the "subreaper" of all that the hook starts,
   so also what forked twice, began a session of its own and cleared its environment stays findable below it;
 * the daemon holds the other end of the leash, a pipe. One byte on it means that the time is up; its end means that
   the daemon does not want the hook any more, or is dead: SIGKILL of the daemon ends its hook, too;
 * no signal ends this program but SIGKILL, so that nothing is left because a terminal or an init signals everybody;
 * the hook starts as from a login: no signal ignored or blocked, a session of its own, no descriptor but 0, 1 and 2.

It is a process because none of this can be had from within the daemon: Python code between fork and exec of a process
with threads can deadlock, and a subreaper must be ready to reap children that it does not know. It is run by path with
``python -I -S``, imports nothing of syncd, and starts in some 25 ms.

    hookguard.py LEASH REPORT GRACE SHORT_GRACE DIRECTORY PROGRAM [ARGUMENT...]

LEASH and REPORT are descriptors. The report is lines of ASCII: ``pid N``; ``error chdir|exec ERRNO``; ``exit N`` or
``signal N``; ``left N...`` for processes that even SIGKILL did not end.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import sys
import time

KILL_SECONDS = 1.0
"""How long SIGKILL is tried: a process in the middle of disk I/O takes it later, one of another user never."""
_STEP_SECONDS = 0.1
_KILL_STEP_SECONDS = 0.01
_PR_SET_CHILD_SUBREAPER = 36
_CANNOT_RUN = 127
_NAMED = 100
_IGNORED = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGPIPE", "SIGTSTP", "SIGTTIN", "SIGTTOU")
_GONE = (b"Z", b"X")


def parse_stat(stat: bytes) -> tuple[int, int] | None:
    """Return (parent, process group) from a ``/proc/PID/stat``; ``None`` for what has ended.

    The program's name stands in parentheses and may hold any character, so what follows the last one counts. A first
    thread that ended before the others looks like a zombie: the number of threads tells.
    """
    fields = stat[stat.rindex(b")") + 1 :].split()
    if fields[0] in _GONE and int(fields[17]) <= 1:
        return None
    return int(fields[1]), int(fields[2])


def descendants(ancestor: int, processes: dict[int, tuple[int, int]]) -> set[int]:
    """Return the processes below one, from (parent, group) of each."""
    children: dict[int, list[int]] = {}
    for pid, (parent, _) in processes.items():
        children.setdefault(parent, []).append(pid)
    found: set[int] = set()
    todo = [ancestor]
    while todo:
        for pid in children.get(todo.pop(), ()):
            if pid not in found:
                found.add(pid)
                todo.append(pid)
    return found


def running() -> dict[int, tuple[int, int]]:
    """Return (parent, group) of every process that runs; nothing where /proc cannot be read."""
    found = {}
    with contextlib.suppress(OSError):
        for name in filter(str.isdigit, os.listdir("/proc")):  # noqa: PTH208 -- pathlib doubles the time of our start
            with contextlib.suppress(OSError), open(f"/proc/{name}/stat", "rb") as file:  # noqa: PTH123 -- likewise
                known = parse_stat(file.read())
                if known is not None:
                    found[int(name)] = known
    return found


def strays(pids: set[int], group: int, processes: dict[int, tuple[int, int]]) -> set[int]:
    """Return those that left a group, or never were in it."""
    return {pid for pid in pids if processes[pid][1] != group}


class Guard:
    """One hook, from its start to the end of all that must not be left."""

    def __init__(self, leash: int, report: int, grace: float, short_grace: float) -> None:
        self._leash = leash
        self._report = report
        self._grace = grace
        self._short_grace = short_grace
        self._hook = 0
        self._status: int | None = None
        for fd in (leash, report):
            os.set_inheritable(fd, False)  # noqa: FBT003 -- positional only
        self._wake, waker = os.pipe()
        for fd in (self._wake, waker):
            os.set_blocking(fd, False)
        signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)  # a handler is what makes the wakeup fd work
        for name in _IGNORED:
            signal.signal(getattr(signal, name), signal.SIG_IGN)
        self._poll = select.poll()  # not select(): a descriptor keeps the number it had in the daemon, perhaps > 1023
        self._poll.register(self._wake, select.POLLIN)
        self._poll.register(leash, select.POLLIN)
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)

    def run(self, directory: str, command: list[str]) -> None:
        """Run the hook; end what it started if it is not wanted any more; report."""
        if self._pulled(0) is not None:  # the daemon changed its mind, or died, while this program started
            return
        self._hook = os.fork()
        if self._hook == 0:
            self._become(directory, command)
        self._tell(f"pid {self._hook}")
        left = self._watch()
        if self._status is not None:
            code = os.waitstatus_to_exitcode(self._status)
            self._tell(f"exit {code}" if code >= 0 else f"signal {-code}")
        if left:
            self._tell("left " + " ".join(map(str, sorted(left)[:_NAMED])))

    def _become(self, directory: str, command: list[str]) -> None:
        """In the child: become the hook. Never returns."""
        step = "exec"
        try:
            os.setsid()
            signal.set_wakeup_fd(-1)
            for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
                with contextlib.suppress(OSError):  # two belong to the C library
                    signal.signal(number, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_SETMASK, [])
            step = "chdir"
            os.chdir(directory)
            step = "exec"
            os.execvp(command[0], command)  # noqa: S606 -- no shell is the point
        except OSError as exc:
            self._tell(f"error {step} {exc.errno}")
        finally:
            os._exit(_CANNOT_RUN)

    def _watch(self) -> set[int]:
        """Wait for the hook's end or the leash; return what could not be ended."""
        while True:
            self._reap()
            if self._status is not None:
                return set()
            pulled = self._pulled(None)
            if pulled is not None:
                return self._end_all(self._grace if pulled else self._short_grace)

    def _pulled(self, seconds: float | None) -> bytes | None:
        """Wait for a child's end, the leash or the time; return what the leash gave: b"" is its end."""
        pulled = None
        for fd, _ in self._poll.poll(None if seconds is None else seconds * 1000):
            if fd == self._wake:
                os.read(self._wake, 4096)
            else:
                pulled = os.read(self._leash, 1)
                if not pulled:
                    self._poll.unregister(self._leash)
        return pulled

    def _end_all(self, grace: float) -> set[int]:
        """SIGTERM once to everything, then SIGKILL until nothing is left; return what did not end."""
        self._signal(signal.SIGTERM)
        deadline = time.monotonic() + grace
        while self._alive() and (left := deadline - time.monotonic()) > 0:
            if self._pulled(min(left, _STEP_SECONDS)) == b"":  # the daemon is going now
                deadline = min(deadline, time.monotonic() + self._short_grace)
        deadline = time.monotonic() + KILL_SECONDS
        while (alive := self._alive()) and time.monotonic() < deadline:
            # RACE: what is forked between looking and killing is found the next time round.
            self._signal(signal.SIGKILL)
            self._pulled(_KILL_STEP_SECONDS)
        return alive

    def _signal(self, number: int) -> None:
        """Signal the hook's group at once, then everything below us that left it: nobody twice, as some count."""
        processes = running()
        pids = descendants(os.getpid(), processes)
        if self._status is None:  # once it is reaped, its number might already be another's
            with contextlib.suppress(OSError):  # not in its session yet: then it is a stray
                os.killpg(self._hook, number)
            pids = strays(pids, self._hook, processes)
        for pid in pids:
            with contextlib.suppress(OSError):  # ended by itself, or another user's: it stays among the living
                os.kill(pid, number)

    def _alive(self) -> set[int]:
        self._reap()
        found = descendants(os.getpid(), running())
        return found | {self._hook} if self._status is None else found

    def _reap(self) -> None:
        """Collect what ended: the hook, and orphans that fell to us."""
        with contextlib.suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == 0:
                    return
                if pid == self._hook:
                    self._status = status

    def _tell(self, line: str) -> None:
        with contextlib.suppress(OSError):  # nobody listens any more
            os.write(self._report, line.encode() + b"\n")


def main(argv: list[str]) -> None:
    """Read the arguments and run."""
    leash, report, grace, short_grace, directory, *command = argv[1:]
    Guard(int(leash), int(report), float(grace), float(short_grace)).run(directory, command)


if __name__ == "__main__":
    main(sys.argv)
