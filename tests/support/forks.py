"""Processes that start within milliseconds: forked from one that has imported syncd already.

What runs in them are functions that a test names (``module:function``); they get and give plain JSON values. Each is a
process of its own, so SIGKILL means to it what it means to a daemon: nothing is flushed, closed or cleaned up.

At a named crash point (:mod:`syncd.crashpoints`) one either dies, or *freezes*: it is stopped there by SIGSTOP while
the test changes the world around it, and is thawed or killed afterwards. So one test process can bring several
others into any order, the same one every time.
"""

from __future__ import annotations

import asyncio
import ctypes
import faulthandler
import gc
import importlib
import inspect
import itertools
import json
import os
import select
import signal
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

from syncd import crashpoints, logs
from syncd.errors import SyncdError

REPOSITORY = Path(__file__).resolve().parents[2]
PR_SET_PDEATHSIG = 1
BUG = 70


@dataclass(frozen=True)
class Outcome:
    """How a process ended.

    :ivar killed: by SIGKILL.
    :ivar value: what its function returned.
    :ivar error: the name of the SyncdError that it raised, with its ``text``; "" for none.
    """

    killed: bool = False
    value: Any = None
    error: str = ""
    text: str = ""


class Job:
    """One process."""

    def __init__(self, forks: Forks, number: int, what: str) -> None:
        self._forks = forks
        self._number = number
        self.what = what
        self.frozen = False
        self.code: int | None = None

    @property
    def log(self) -> Path:
        return self._forks.directory / f"{self._number}.log"

    def wait(self, seconds: float = 60) -> Outcome:
        """Wait until it has ended.

        :raises AssertionError: it takes longer, or ended by a bug.
        """
        self._forks.wait_for(self, lambda: self.code is not None, seconds)
        return self._outcome()

    def wait_frozen(self, seconds: float = 60) -> Outcome | None:
        """Wait until it is frozen (``None``), or has ended without getting there."""
        self._forks.wait_for(self, lambda: self.frozen or self.code is not None, seconds)
        return None if self.frozen else self._outcome()

    def has_ended(self) -> bool:
        """Tell without waiting."""
        self._forks.hear(0)
        return self.code is not None

    def thaw(self) -> None:
        self.frozen = False
        self._forks.tell({"signal": signal.SIGCONT, "number": self._number})

    def kill(self) -> Outcome:
        """SIGKILL, unless it has ended by itself; wait until it is gone."""
        self.frozen = False
        if self.code is None:
            self._forks.tell({"signal": signal.SIGKILL, "number": self._number})
        return self.wait()

    def _outcome(self) -> Outcome:
        if self.code == -signal.SIGKILL:
            return Outcome(killed=True)
        assert self.code == 0, f"{self.what} ended with {self.code}:\n{self.log.read_text()[-5000:]}"
        found = json.loads((self._forks.directory / f"{self._number}.json").read_text())
        return Outcome(**found)


class Forks:
    """Starts processes and hears of their ends; to be closed, which leaves none of them.

    :param directory: gets a log and an outcome per process.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self._numbers = itertools.count(1)
        self._jobs: dict[int, Job] = {}
        self._heard = b""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.forks", str(directory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=REPOSITORY,
            bufsize=0,
        )

    def start(self, task: str, *, crash: str = "", freeze: str = "", **arguments: Any) -> Job:
        """Run ``module:function`` with the arguments.

        :param crash, freeze: ``point`` or ``point:N``, see :mod:`syncd.crashpoints`.
        """
        job = Job(self, next(self._numbers), f"{task.partition(':')[2]} {crash or freeze}".rstrip())
        self._jobs[job._number] = job
        self.tell(
            {"number": job._number, "task": task, "crash": crash, "freeze": freeze, "arguments": arguments, "signal": 0}
        )
        return job

    def run(self, task: str, *, crash: str = "", **arguments: Any) -> Outcome:
        return self.start(task, crash=crash, **arguments).wait()

    def tell(self, request: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request).encode() + b"\n")

    def wait_for(self, job: Job, claim: Any, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not claim():
            if not self.hear(max(0.0, deadline - time.monotonic())):
                self.tell({"signal": signal.SIGUSR1, "number": job._number})
                time.sleep(1)
                raise AssertionError(f"{job.what}: nothing within {seconds} s\n{job.log.read_text()[-9000:]}")

    def hear(self, seconds: float) -> bool:
        """Take in what is told within that time; ``False``: nothing."""
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], seconds)
        if not ready:
            return False
        heard = os.read(self._process.stdout.fileno(), 65536)
        assert heard, "the process that forks is gone"
        *lines, self._heard = (self._heard + heard).split(b"\n")
        for line in lines:
            event = json.loads(line)
            told = self._jobs[event["number"]]
            told.frozen = event["code"] is None
            told.code = event["code"]
        return True

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(20)
        self._process.stdout.close()


# -- the process that forks --------------------------------------------------------------------------------------------


class _Nursery:
    """Reads requests from standard input, tells on standard output who froze and who ended."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._pids: dict[int, int] = {}
        self._woken, self._wake = os.pipe()
        os.set_blocking(self._wake, False)
        signal.set_wakeup_fd(self._wake)
        signal.signal(signal.SIGCHLD, lambda *_: None)

    def serve(self) -> None:
        pending = b""
        while True:
            ready, _, _ = select.select([0, self._woken], [], [])
            if self._woken in ready:
                os.read(self._woken, 4096)
                self._reap()
            if 0 in ready:
                read = os.read(0, 65536)
                if not read:
                    break
                *lines, pending = (pending + read).split(b"\n")
                for line in lines:
                    self._do(json.loads(line))
        for pid in self._pids:
            os.kill(pid, signal.SIGKILL)
        for pid in self._pids:
            os.waitpid(pid, 0)

    def _do(self, request: dict[str, Any]) -> None:
        number = request["number"]
        if request["signal"]:
            for pid, known in self._pids.items():
                if known == number:  # not reaped yet: the pid is still its own
                    os.kill(pid, request["signal"])
            return
        pid = os.fork()
        if pid == 0:
            self._become(request)
        self._pids[pid] = number

    def _reap(self) -> None:
        for pid in list(self._pids):
            found, status = os.waitpid(pid, os.WNOHANG | os.WUNTRACED)
            if found == 0:
                continue
            event: dict[str, Any] = {"number": self._pids[pid], "code": None}
            if not os.WIFSTOPPED(status):
                event["code"] = os.waitstatus_to_exitcode(status)
                del self._pids[pid]
            os.write(1, json.dumps(event).encode() + b"\n")

    def _become(self, request: dict[str, Any]) -> NoReturn:
        """Be the child."""
        code = BUG
        try:
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os.close(self._woken)
            os.close(self._wake)
            log = os.open(self._directory / f"{request['number']}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            null = os.open(os.devnull, os.O_RDWR)
            for old, new in ((null, 0), (log, 1), (log, 2)):
                os.dup2(old, new)
            logs.configure("info", "json")
            signal.signal(signal.SIGUSR1, _tell_where)
            arm(request["crash"], request["freeze"])
            outcome = _perform(request["task"], request["arguments"])
            (self._directory / f"{request['number']}.json").write_text(json.dumps(outcome))
            code = 0
        except BaseException:  # noqa: BLE001 - a bug, told by the exit code
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)


def arm(crash: str, freeze: str) -> None:
    """Choose the crash point of this process."""
    crashpoints._armed = crashpoints._parse(crash or freeze)
    if freeze:
        vars(crashpoints)["signal"] = SimpleNamespace(SIGKILL=signal.SIGSTOP)


def _tell_where(*_: Any) -> None:
    """Say what everything waits for: the test has lost its patience."""
    faulthandler.dump_traceback()
    for task in asyncio.all_tasks(asyncio.get_running_loop()):
        task.print_stack()


def _perform(task: str, arguments: dict[str, Any]) -> dict[str, Any]:
    module, _, name = task.partition(":")
    try:
        value = getattr(importlib.import_module(module), name)(**arguments)
        if inspect.iscoroutine(value):
            value = asyncio.run(value)
    except SyncdError as error:
        return {"error": type(error).__name__, "text": str(error)}
    return {"value": value}


if __name__ == "__main__":
    for module in ("tests.support.fleet", "tests.support.returns"):
        importlib.import_module(module)
    gc.freeze()
    _Nursery(Path(sys.argv[1])).serve()
