"""Another user of this host: does what it is told, and keeps open what it has opened. Only root can start one."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from types import TracebackType

UID = 65534

_LISTENER = f"""
import json, mmap, os, sys
os.umask(0)
os.setgroups([])
os.setresgid({UID}, {UID}, {UID})
os.setresuid({UID}, {UID}, {UID})  # here: the interpreter may lie where only root can read it
space = {{"mmap": mmap, "os": os, "held": []}}
for line in sys.stdin:
    try:
        exec(json.loads(line), space)
        said = ""
    except OSError as exc:
        said = os.strerror(exc.errno)
    print(json.dumps(said), flush=True)
"""

HOLD = """
fd = os.open({path!r}, os.O_RDWR)
view = mmap.mmap(fd, os.fstat(fd).st_size)
view[0:1] = view[0:1]
held.append(view)
"""

REPLACE = """
data = open({path!r}, "rb").read()
found = os.stat({path!r})
os.unlink({path!r})
fd = os.open({path!r}, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o755)
os.write(fd, data)
view = mmap.mmap(fd, len(data))
view[0:1] = view[0:1]
held.append(view)
os.utime({path!r}, ns=(found.st_atime_ns, found.st_mtime_ns))
"""

WRITE = """
for view in held:
    view[:] = b"EVIL".ljust(len(view))
"""


class Stranger:
    """A process of uid 65534."""

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _LISTENER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self._process.communicate(timeout=20)  # the end of its input is its own

    def does(self, code: str, **values: object) -> str:
        """Run some Python there; return the system's word for why it failed, "" where it did not."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        shown = {key: str(value) for key, value in values.items()}
        self._process.stdin.write(json.dumps(code.format(**shown)).encode() + b"\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, "the stranger died"
        said: str = json.loads(line)
        return said
