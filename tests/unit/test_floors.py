"""The house: every module has a floor, imports point down only, every outside package has one home.

The table of docs/architecture.md as data. A module that does not exist is no failure; a module without a floor is.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

FLOORS: dict[str, int] = {
    "syncd": 0,
    "syncd.errors": 0,
    "syncd.model": 0,
    "syncd.paths": 0,
    "syncd.plan": 0,
    "syncd.nodes": 0,
    "syncd.retry": 0,
    "syncd.crashpoints": 0,
    "syncd.status": 0,
    "syncd.tomllines": 0,
    "syncd.index": 1,
    "syncd.rules": 1,
    "syncd.scan": 1,
    "syncd.watch": 1,
    "syncd.mirror": 1,
    "syncd.store": 1,
    "syncd.concurrency": 1,
    "syncd.progress": 1,
    "syncd.chunker": 1,
    "syncd.trees": 2,
    "syncd.treediff": 2,
    "syncd.publisher": 2,
    "syncd.subscriber": 2,
    "syncd.fleet": 2,
    "syncd.source": 2,
    "syncd.agenda": 2,
    "syncd.announced": 2,
    "syncd.problems": 2,
    "syncd.service": 2,
    "syncd.drift": 2,
    "syncd.fetch": 2,
    "syncd.upstream": 2,
    "syncd.objects": 2,
    "syncd.checkout": 2,
    "syncd.gather": 2,
    "syncd.holdings": 2,
    "syncd.outlet": 2,
    "syncd.announce": 2,
    "syncd.commit": 2,
    "syncd.build": 2,
    "syncd.retention": 2,
    "syncd.relayout": 2,
    "syncd.settings": 3,
    "syncd.modes": 0,
    "syncd.signatures": 0,
    "syncd.trust": 0,
    "syncd.moves": 2,
    "syncd.hooks": 1,
    "syncd.hookguard": 1,
    "syncd.mirrorwatch": 1,
    "syncd.reread": 1,
    "syncd.standing": 1,
    "syncd.guard": 2,
    "syncd.channels": 2,
    "syncd.keysets": 2,
    "syncd.records": 2,
    "syncd.whole": 2,
    "syncd.extraneous": 2,
    "syncd.rollout": 2,
    "syncd.checks": 3,
    "syncd.allocator": 1,
    "syncd.logs": 3,
    "syncd.embedded": 3,
    "syncd.notify": 3,
    "syncd.statedir": 3,
    "syncd.wiring": 3,
    "syncd.daemon": 3,
    "syncd.history": 3,
    "syncd.audit": 3,
    "syncd.oneshot": 3,
    "syncd.render": 4,
    "syncd.cli_channels": 4,
    "syncd.cli": 4,
    "syncd.__main__": 4,
}
"""A package's floor is that of every module within it."""

HOMES: dict[str, tuple[str, ...]] = {
    "nats": ("syncd.store",),
    "nkeys": ("syncd.store", "syncd.signatures"),
    "nacl": ("syncd.signatures",),
    "watchfiles": ("syncd.watch",),
    "sqlite3": ("syncd.index",),
    "pydantic": ("syncd.settings",),
    "pydantic_settings": ("syncd.settings",),
    "pathspec": ("syncd.rules",),
    "click": ("syncd.cli", "syncd.cli_channels"),
    "rich": ("syncd.cli", "syncd.render"),
    "blake3": ("syncd.nodes", *(name for name, floor in FLOORS.items() if floor == 1)),
    "zstandard": ("syncd.store",),
    "pyfastcdc": ("syncd.chunker",),
    "structlog": tuple(name for name, floor in FLOORS.items() if floor > 0),
}
STRANGERS = (("syncd.publisher", "syncd.subscriber"), ("syncd.subscriber", "syncd.publisher"))
OUTSIDE_WORLD = {"time", "datetime", "os", "socket", "logging", "asyncio", "subprocess", "threading", "sqlite3"}
EXEMPT_FROM_FLOOR_0 = {"syncd.crashpoints"}  # it kills the process where a test says so


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted((ROOT / "syncd").rglob("*.py"))}


def home_of(module: str) -> str:
    """The entry of FLOORS that a module belongs to, "" where there is none."""
    while module != "syncd" and module:
        if module in FLOORS:
            return module
        module = module.rpartition(".")[0]
    return ""


def floor_of(module: str) -> int | None:
    return FLOORS["syncd"] if module == "syncd" else FLOORS.get(home_of(module))


def imports_of(source: str, known: set[str]) -> set[str]:
    """Everything that is imported, for type checking only included: full names of our modules and of others."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            members = {f"{base}.{alias.name}" for alias in node.names}
            found |= {name if name in known else base for name in members}
    return found


def complaints(module: str, source: str, known: set[str]) -> list[str]:
    """What is wrong with one module, one line each."""
    floor = floor_of(module)
    if floor is None:
        return [f"{module} has no floor: put it into the table here and into docs/architecture.md"]
    found = []
    for name in sorted(imports_of(source, known)):
        top = name.partition(".")[0]
        if not top:
            found.append(f"{module} imports {name}: write imports in full")
            continue
        if top == "syncd":
            other = floor_of(name)
            if other is None:
                found.append(f"{module} imports {name}, which has no floor")
            elif other > floor:
                found.append(f"{module} (floor {floor}) imports {name} (floor {other}): imports point down only")
            if (home_of(module), home_of(name)) in STRANGERS:
                found.append(f"{module} imports {name}: publisher and subscriber never meet")
        elif top in HOMES:
            if home_of(module) not in HOMES[top]:
                found.append(f"{module} imports {top}, which lives in {', '.join(HOMES[top])} only")
        elif top not in sys.stdlib_module_names:
            found.append(f"{module} imports {top}, which has no home in the table")
        elif floor == 0 and top in OUTSIDE_WORLD and module not in EXEMPT_FROM_FLOOR_0:
            found.append(f"{module} imports {top}: floor 0 decides, it does not touch the world")
    if floor == 0 and module not in EXEMPT_FROM_FLOOR_0:
        found += [f"{module}:{line}: {what} on floor 0" for line, what in doings(source)]
    return found


def doings(source: str) -> list[tuple[int, str]]:
    """Awaits, opens and clocks of a source text."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.AsyncFunctionDef | ast.Await | ast.AsyncFor | ast.AsyncWith):
            found.append((node.lineno, "async"))
        elif isinstance(node, ast.Call):
            name = node.func.id if isinstance(node.func, ast.Name) else ""
            name = node.func.attr if isinstance(node.func, ast.Attribute) else name
            if name in {"open", "read_text", "write_text", "read_bytes", "write_bytes", "get_logger"}:
                found.append((node.lineno, f"{name}()"))
    return found


@pytest.mark.parametrize("module", MODULES)
def test_every_module_keeps_to_its_floor(module):
    assert complaints(module, MODULES[module].read_text(), set(MODULES)) == []


def test_no_two_modules_import_each_other_in_a_circle():
    """On one floor the order is not given by the table, but there must be one. Type checking may look both ways."""
    graph = {name: runtime_imports(path.read_text()) for name, path in MODULES.items()}
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join([*above[above.index(name) :], name])
        if name in done:
            return
        for other in sorted(graph[name]):
            visit(other, (*above, name))
        done.add(name)

    for name in graph:
        visit(name, ())


def runtime_imports(source: str) -> set[str]:
    """Our modules that are imported when this one is (not within functions, not for type checking only)."""
    tree = ast.parse(source)
    top = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    text = "\n".join(ast.unparse(node) for node in top)
    return imports_of(text, set(MODULES)) & set(MODULES)


# --- the guards themselves ---

KNOWN = {"syncd", *FLOORS, "syncd.store.base", "syncd.store.bucket", "syncd.mirror.apply"}


@pytest.mark.parametrize(
    ("module", "source", "complaint"),
    [
        ("syncd.brand_new", "", "has no floor"),
        ("syncd.plan", "from syncd.index import Index", "imports point down only"),
        ("syncd.plan", "from syncd import index", "imports point down only"),
        ("syncd.plan", "import syncd.index", "imports point down only"),
        ("syncd.plan", "from .index import Index", "write imports in full"),
        ("syncd.scan", "def f():\n    from syncd.publisher import P", "imports point down only"),
        ("syncd.scan", "if TYPE_CHECKING:\n    from syncd.settings import Settings", "imports point down only"),
        ("syncd.store.bucket", "from syncd.publisher import P", "imports point down only"),
        ("syncd.daemon", "from syncd.cli import main", "imports point down only"),
        ("syncd.publisher", "from syncd.subscriber import S", "never meet"),
        ("syncd.subscriber", "import syncd.publisher", "never meet"),
        ("syncd.publisher", "import nats.errors", "lives in syncd.store only"),
        ("syncd.index", "from nkeys import x", "lives in syncd.store, syncd.signatures only"),
        ("syncd.scan", "import watchfiles", "lives in syncd.watch only"),
        ("syncd.settings", "import sqlite3", "lives in syncd.index only"),
        ("syncd.daemon", "from pydantic import BaseModel", "lives in syncd.settings only"),
        ("syncd.scan", "from pathspec import PathSpec", "lives in syncd.rules only"),
        ("syncd.daemon", "import click", "lives in syncd.cli, syncd.cli_channels only"),
        ("syncd.logs", "import rich.console", "lives in syncd.cli, syncd.render only"),
        ("syncd.publisher", "import blake3", "imports blake3, which lives in"),
        ("syncd.plan", "import structlog", "imports structlog, which lives in"),
        ("syncd.scan", "import requests", "no home in the table"),
        ("syncd.plan", "import time", "does not touch the world"),
        ("syncd.plan", "from datetime import UTC", "does not touch the world"),
        ("syncd.model", "import os.path", "does not touch the world"),
        ("syncd.retry", "import socket", "does not touch the world"),
        ("syncd.plan", "async def f(): pass", "async on floor 0"),
        ("syncd.plan", "def f(): return open('x')", "open() on floor 0"),
        ("syncd.plan", "def f(p): return p.open()", "open() on floor 0"),
        ("syncd.plan", "from syncd.nowhere import x", "which has no floor"),
    ],
)
def test_each_breach_is_seen(module, source, complaint):
    found = complaints(module, source, KNOWN)
    assert [line for line in found if complaint in line], found


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("syncd.crashpoints", "import os, signal, time"),
        ("syncd.retry", "import random\nfrom syncd.errors import SyncdError"),
        (
            "syncd.store.bucket",
            "import nats, blake3\nfrom syncd.store import base\nfrom syncd.store.base import Bucket",
        ),
        ("syncd.mirror.apply", "import blake3, os, structlog"),
        ("syncd.publisher", "import asyncio, structlog\nfrom syncd.index import Index\nfrom syncd.store import base"),
        ("syncd.cli", "import click, rich\nfrom syncd import __version__, daemon"),
    ],
)
def test_what_is_allowed_is_not_complained_about(module, source):
    assert complaints(module, source, KNOWN) == []
