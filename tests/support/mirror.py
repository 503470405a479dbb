"""A mirror's caller in miniature: stage what a target tree needs, plan, commit, remember. Also run as a subprocess:

python -m tests.support.mirror apply  ROOT STATE DRIFT  go to the tree pickled in STATE, once
python -m tests.support.mirror flip   ROOT STATE        go to and fro between two trees for ever
python -m tests.support.mirror recover ROOT             open and recover
"""

from __future__ import annotations

import os
import pickle
import stat
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3

from syncd.crashpoints import ENV_CRASH_POINT
from syncd.mirror import Mirror, Outcome, Placed
from syncd.mirror.apply import same_stat
from syncd.mirror.root import lstat_at, to_stat
from syncd.model import Entry, Kind, Stat
from syncd.plan import Difference, DirMeta, MirrorPlan, parents_of, plan_mirror

T0 = 1_700_000_000_000_000_000
REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Node:
    """One path of a wanted tree."""

    entry: Entry
    data: bytes = b""


Tree = dict[str, Node]


def file(data: bytes | str, *, mode: int = 0o644, mtime_ns: int = T0 + 1) -> Node:
    raw = data.encode() if isinstance(data, str) else data
    return Node(Entry(Kind.FILE, mode, mtime_ns, len(raw), blake3(raw).hexdigest()), raw)


def folder(*, mode: int = 0o755, mtime_ns: int = T0 + 2) -> Node:
    return Node(Entry(Kind.DIR, mode, mtime_ns))


def link(target: str, *, mtime_ns: int = T0 + 3) -> Node:
    return Node(Entry(Kind.SYMLINK, 0o777, mtime_ns, target=target))


class Keeper:
    """Knows what it wrote (the index) and brings a mirror to a tree."""

    def __init__(self, mirror: Mirror, index: dict[str, tuple[Entry, Stat]] | None = None) -> None:
        self.mirror = mirror
        self.index = index if index is not None else {}

    def plan(self, tree: Tree) -> MirrorPlan:
        rows = []
        for path in sorted({*tree, *self.index}):
            have, found = self.index.get(path, (None, None))
            want = tree[path].entry if path in tree else None
            if have is not None and want is not None and have.same(want):
                continue
            staged = ""
            if want is not None and want.kind is not Kind.DIR and not (have is not None and have.same_content(want)):
                staged = self.stage(tree[path])
            rows.append(Difference(path, have, found, want, staged))
        above = {path: tree[path].entry for path in parents_of(row.path for row in rows) if path in tree}
        metas = [DirMeta(path, it.mode, it.mtime_ns) for path, it in above.items() if it.kind is Kind.DIR]
        return plan_mirror(rows, metas)

    def stage(self, node: Node) -> str:
        if node.entry.kind is Kind.SYMLINK:
            return self.mirror.stage_symlink(node.entry)
        (staged,) = self.mirror.stage_bytes([(node.entry, node.data)])
        if isinstance(staged, Exception):
            raise staged
        return staged

    def go(self, tree: Tree, *, drift: str = "repair") -> Outcome:
        outcome = self.mirror.commit(self.plan(tree), drift=drift)
        self.remember(outcome.placed)
        return outcome

    def remember(self, placed: list[Placed]) -> None:
        for done in placed:
            if done.entry is None or done.stat is None:
                self.index.pop(done.path, None)
            else:
                self.index[done.path] = (done.entry, done.stat)

    def stale(self) -> list[str]:
        """Paths for which the index's quick check does not hold."""
        wrong = []
        for path, (_, known) in self.index.items():
            found = self.mirror.look(path)
            if found is None or not same_stat(found.stat, known):
                wrong.append(path)
        return wrong


def snapshot(root: Path) -> dict[str, tuple[object, ...]]:
    """Everything below a root but .syncd: kind, mode, mtime, content."""
    found: dict[str, tuple[object, ...]] = {}
    for top, dirs, files in os.walk(root):
        if Path(top) == root and ".syncd" in dirs:
            dirs.remove(".syncd")
        for name in [*dirs, *files]:
            path = Path(top) / name
            now = path.lstat()
            mode = stat.S_IMODE(now.st_mode)
            key = str(path.relative_to(root))
            if stat.S_ISLNK(now.st_mode):
                found[key] = ("symlink", now.st_mtime_ns, str(path.readlink()))
            elif stat.S_ISDIR(now.st_mode):
                found[key] = ("dir", mode, now.st_mtime_ns)
            elif stat.S_ISREG(now.st_mode):
                found[key] = ("file", mode, now.st_mtime_ns, path.read_bytes())
            else:
                found[key] = ("special", now.st_mode)
    return found


def expected(tree: Tree) -> dict[str, tuple[object, ...]]:
    """What :func:`snapshot` says of a mirror that equals the tree."""
    out: dict[str, tuple[object, ...]] = {}
    for path, node in tree.items():
        entry = node.entry
        if entry.kind is Kind.SYMLINK:
            out[path] = ("symlink", entry.mtime_ns, entry.target)
        elif entry.kind is Kind.DIR:
            out[path] = ("dir", entry.mode, entry.mtime_ns)
        else:
            out[path] = ("file", entry.mode, entry.mtime_ns, node.data)
    return out


def litter(root: Path) -> list[str]:
    """What is in .syncd besides the lock and an empty staging directory."""
    private = root / ".syncd"
    names = [str(path.relative_to(private)) for path in private.rglob("*")]
    return sorted(set(names) - {"lock", "stage"})


def lstat(path: Path) -> Stat:
    fd = os.open(path.parent, os.O_RDONLY)
    try:
        found = lstat_at(fd, path.name)
        assert found is not None
        return to_stat(found)
    finally:
        os.close(fd)


def run(*arguments: str | Path, crash: str = "", wait: bool = True) -> subprocess.Popen[str]:
    """Start this module as a process of its own."""
    env = {**os.environ, ENV_CRASH_POINT: crash}
    command = [sys.executable, "-m", "tests.support.mirror", *map(str, arguments)]
    process = subprocess.Popen(
        command, cwd=REPOSITORY, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if wait:
        process.communicate(timeout=60)
    return process


def as_nobody(code: str, *arguments: str | Path) -> str:
    """Run code in a process that gave up its privileges after its imports; return what it printed."""
    preamble = (
        "import os, sys; from pathlib import Path\n"
        "from tests.support.mirror import *; from tests.support.mirror import Mirror\n"
        "from syncd.errors import *; from syncd.plan import *; from syncd.model import *\n"
        "os.umask(0o077)\n"
        "if os.getuid() == 0: os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", preamble + code, *map(str, arguments)],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def dump(state: Path, index: dict[str, tuple[Entry, Stat]], *trees: Tree) -> Path:
    state.write_bytes(pickle.dumps((index, trees)))
    return state


def _main() -> None:
    command, root = sys.argv[1], Path(sys.argv[2])
    mirror = Mirror.open(root)
    if command == "hold":
        print("held", flush=True)
        time.sleep(60)
    placed = mirror.recover()
    if command == "recover":
        return
    index, trees = pickle.loads(Path(sys.argv[3]).read_bytes())
    keeper = Keeper(mirror, index)
    keeper.remember(placed)
    if command == "apply":
        keeper.go(trees[0], drift=sys.argv[4])
        return
    print("ready", flush=True)
    for count in range(1_000_000):
        outcome = keeper.go(trees[count % 2])
        assert not outcome.problems, outcome.problems


if __name__ == "__main__":
    _main()
