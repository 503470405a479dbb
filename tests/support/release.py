"""The caller of a mirror in release mode, in miniature: build, check, publish, switch, load, prune. Also as a process:

python -m tests.support.release go   ROOT STATE NUMBER...  go to these generations, one after the other
python -m tests.support.release flip ROOT STATE            go to the next generation for ever
python -m tests.support.release repair ROOT STATE          mend the current release
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from blake3 import blake3

from syncd.crashpoints import ENV_CRASH_POINT
from syncd.index import Index, LocalRow
from syncd.index.releases import ReleaseTables, prune_release_files, release_file
from syncd.mirror import BuildItem, Mirror, release_name
from syncd.model import Kind
from syncd.paths import sort_key
from syncd.plan import Difference, DirMeta, parents_of, plan_mirror
from tests.support.mirror import REPOSITORY, Node, Tree, snapshot

if TYPE_CHECKING:
    from collections.abc import Iterator

    from syncd.mirror import Built, Outcome


def read_only(tree: Tree) -> Tree:
    """What a mirror's modes make of a tree in a read-only release."""
    return {path: _without_write(node) for path, node in tree.items()}


def _without_write(node: Node) -> Node:
    if node.entry.kind is Kind.SYMLINK:
        return node
    return Node(node.entry._replace(mode=node.entry.mode & ~0o222), node.data)


def in_order(tree: Tree) -> list[str]:
    return sorted(tree, key=sort_key)


def name_of(number: int, tree: Tree) -> str:
    return release_name(number, blake3(repr(sorted(tree.items())).encode()).hexdigest())


class Releaser:
    """Knows what is in each release (the index and its files) and goes from one to another."""

    def __init__(self, mirror: Mirror, index_file: Path, *, keep: int = 3) -> None:
        self.mirror = mirror
        self.file = index_file
        self.keep = keep
        self.index = Index(index_file)
        self.tables = ReleaseTables(self.index)
        self.shared = 0

    def start(self) -> None:
        """Recover, and find out which release there is."""
        self.mirror.recover()
        current = self.mirror.current()
        if self.tables.loaded() != current:
            loaded = self.tables.load(release_file(self.file, current)) if current else False
            assert loaded or not current, f"nothing is known of {current}"

    def items(self, tree: Tree) -> list[BuildItem]:
        items = []
        for path in in_order(tree):
            entry = tree[path].entry
            row = self.index.local(path)
            if entry.kind is not Kind.FILE:
                items.append(BuildItem(path, entry))
            elif row is not None and row.entry.same_content(entry):
                items.append(BuildItem(path, entry, source=row))
                self.shared += 1
            else:
                items.append(BuildItem(path, entry, staged=self.stage(tree[path])))
        return items

    def stage(self, node: Node) -> str:
        (staged,) = self.mirror.stage_bytes([(node.entry, node.data)])
        assert isinstance(staged, str), staged
        return staged

    def build(self, name: str, tree: Tree, **options: object) -> list[Built]:
        rows: list[Built] = []

        def made() -> Iterator[Built]:
            for row in self.mirror.build(name, self.items(tree), **options):  # type: ignore[arg-type]
                rows.append(row)
                yield row

        self.tables.save(release_file(self.file, name), made(), {"applied": name})
        return rows

    def go(self, number: int, tree: Tree, **options: object) -> str:
        """Build what is not there yet, and switch to it."""
        name = name_of(number, tree)
        if name not in self.mirror.releases():
            self.build(name, tree, **options)
            self.mirror.publish_release(name)
        self.switch(name)
        self.mirror.prune(self.keep)
        prune_release_files(self.file, self.mirror.releases())
        return name

    def switch(self, name: str) -> None:
        self.mirror.switch(name)
        assert self.tables.load(release_file(self.file, name))

    def drifted(self) -> list[str]:
        """Paths for which the quick check of the index does not hold."""
        wrong = []
        for row in self.index.iter_local():
            found = self.mirror.look(row.path)
            if found is None or found.stat != row.stat:
                wrong.append(row.path)
        return wrong

    def repair(self, tree: Tree, drift: str = "repair") -> Outcome:
        """Put back in place what is not as it was."""
        rows = []
        for path in self.drifted():
            known = self.index.local(path)
            assert known is not None
            node = tree[path]
            if node.entry.kind is Kind.FILE:
                rows.append(Difference(path, known.entry, known.stat, node.entry, self.stage(node)))
        metas = [
            DirMeta(path, tree[path].entry.mode, tree[path].entry.mtime_ns)
            for path in parents_of(row.path for row in rows)
        ]
        outcome = self.mirror.commit(plan_mirror(rows, metas), drift=drift)
        self.remember(outcome)
        return outcome

    def remember(self, outcome: Outcome) -> None:
        self.index.put_local(
            LocalRow(done.path, done.entry, done.stat)
            for done in outcome.placed
            if done.entry is not None and done.stat is not None
        )


@contextmanager
def opened(root: Path, *, keep: int = 3, state: Path | None = None) -> Iterator[Releaser]:
    """A mirror in release mode and its index, started."""
    file = state or root.with_name(root.name + "-state") / "index"
    with Mirror.open(root, mode="release") as mirror:
        releaser = Releaser(mirror, file, keep=keep)
        try:
            releaser.start()
            yield releaser
        finally:
            releaser.index.close()


def litter(root: Path) -> list[str]:
    """What is in the private directory, and in ``releases`` under other names than those of releases."""
    private = [str(path.relative_to(root)) for path in (root / ".syncd").rglob("*")]
    hidden = [str(path.relative_to(root)) for path in (root / "releases").glob(".*")]
    top = [path.name for path in root.iterdir() if path.name not in {".syncd", "releases", "current"}]
    return sorted({*private, *hidden, *top} - {".syncd/lock", ".syncd/stage"})


def seen(root: Path) -> dict[str, tuple[object, ...]]:
    """What a reader finds at ``current``."""
    return snapshot((root / "current").resolve(strict=True))


def run(*arguments: str | Path, crash: str = "", wait: bool = True) -> subprocess.Popen[str]:
    """Start this module as a process of its own."""
    env = {**os.environ, ENV_CRASH_POINT: crash}
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.support.release", *map(str, arguments)],
        cwd=REPOSITORY, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    if wait:
        process.communicate(timeout=60)
    return process


def as_nobody(code: str, *arguments: str | Path) -> str:
    """Run code in a process that gave up its privileges after its imports; return what it printed."""
    preamble = (
        "import os, sys; from pathlib import Path\n"
        "from tests.support.release import *; from tests.support.mirror import expected, file, folder, link\n"
        "os.umask(0o077)\n"
        "if os.getuid() == 0: os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", preamble + code, *map(str, arguments)],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def _main() -> None:
    command, root, state = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    trees: list[Tree] = pickle.loads((state / "trees").read_bytes())
    with opened(root, keep=2, state=state / "index") as releaser:
        if command == "repair":
            releaser.repair(trees[0])
        elif command == "go":
            for number in map(int, sys.argv[4:]):
                releaser.go(number, trees[number % len(trees)])
        else:
            print("ready", flush=True)
            number = int(releaser.mirror.current().partition("-")[0])
            while True:
                number += 1
                releaser.go(number, trees[number % len(trees)])


if __name__ == "__main__":
    _main()
