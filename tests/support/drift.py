"""A mirror with its index, as a subscriber would have it after a round; and ways to spoil it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from structlog.testing import capture_logs

from syncd.drift import DriftCheck
from syncd.index import Index, LocalRow, RemoteRow
from syncd.mirror import Mirror
from tests.support.mirror import REPOSITORY, Keeper, Node, Tree, lstat

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator


class Mirrored:
    """Both halves of an index, and a mirror that agrees with them."""

    def __init__(self, tmp: Path, tree: Tree, policy: Any = "repair", *, root: Path | None = None) -> None:
        self.root = root or tmp / "mirror"
        self.file = tmp / "index.db"
        self.policy = policy
        self.tree: Tree = {}
        self.mirror = Mirror.open(self.root)
        self.keeper = Keeper(self.mirror)
        self.index = Index(self.file)
        self.seq = 0
        self.drift = DriftCheck(self.mirror, self.index, policy, "app")
        self.go(tree)

    def go(self, tree: Tree) -> None:
        """Bring the mirror to a tree, and remember it."""
        outcome = self.keeper.go(tree)
        assert outcome.problems == []
        self.index.drop_local(done.path for done in outcome.placed if done.entry is None)
        self.index.put_local(
            LocalRow(done.path, done.entry, done.stat) for done in outcome.placed if done.entry and done.stat
        )
        self.index.drop_remote(self.tree.keys() - tree.keys())
        self.index.put_remote(self.remote(path, node) for path, node in tree.items())
        self.tree = tree

    def remote(self, path: str, node: Node) -> RemoteRow:
        self.seq += 1
        return RemoteRow(path, node.entry, "app", path, "n", 1, 1, self.seq, "us")

    def check(self, paths: Collection[str] | None = None) -> tuple[set[str] | None, list[dict[str, Any]]]:
        """Check; return the result and what was logged of drift."""
        with capture_logs() as lines:
            found = self.drift.check(paths)
        told = [line for line in lines if line["event"] in {"drift", "silent_corruption"}]
        assert self.drift.drifted == len(told)
        return found, told

    def differences(self) -> set[str]:
        """What a round would bring up."""
        return {path for path, _, _ in self.index.diff() if path not in self.drift.held}

    def problems(self) -> dict[str, tuple[str, str]]:
        return {problem.path: (problem.code, problem.text) for problem in self.drift.problems.all()}

    def rot(self, path: str, data: bytes) -> None:
        """Change content as a failing disk does: no stat field tells. (The index is told those of the new content.)"""
        row = self.index.local(path)
        assert row is not None
        assert len(data) == row.entry.size
        with (self.root / path).open("r+b") as opened:
            opened.write(data)
        os.utime(self.root / path, ns=(row.entry.mtime_ns, row.entry.mtime_ns))
        self.index.put_local([row._replace(stat=lstat(self.root / path))])

    def audit_all(self, budget: int = 1 << 30) -> set[str]:
        """Audit to the end of the mirror; return what was found."""
        found: set[str] = set()
        while True:
            done = self.drift.audit(budget)
            found |= done.found
            if done.wrapped:
                return found

    def restart(self) -> None:
        """What a new process has."""
        self.index.close()
        self.index = Index(self.file)
        self.drift = DriftCheck(self.mirror, self.index, self.policy, "app")

    def close(self) -> None:
        self.mirror.close()
        self.index.close()


@contextmanager
def nobodys() -> Iterator[Path]:
    """A directory that an unprivileged process can reach and owns."""
    path = Path(tempfile.mkdtemp(prefix="syncd-test-"))
    if os.getuid() == 0:
        os.chown(path, 65534, 65534)
    try:
        yield path
    finally:
        subprocess.run(["chmod", "-R", "u+rwX", path], check=True)
        shutil.rmtree(path)


def as_nobody(code: str, *arguments: str | Path) -> str:
    """Run code with :class:`Mirrored` at hand in a process that gave up its privileges; return what it printed."""
    preamble = (
        "import os, sys; from pathlib import Path\n"
        "import sqlite3; from tests.support.drift import Mirrored; from tests.support.mirror import *\n"
        "from tests.unit.test_drift import TREE\n"
        "import structlog; structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))\n"
        "if os.getuid() == 0: os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", preamble + code, *map(str, arguments)],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
