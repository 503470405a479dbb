"""What README.md and docs/ say is so: links, commands, options, codes, keys, events, formats, and whole sessions.

A ```console block is run if an HTML comment before it says so, and must otherwise say why not:

    <!-- run: SESSION on HOST[, with a server][, needs PROGRAM] -->     <!-- not run: REASON -->

Blocks of one session run in order, each host in a shell of its own (bash), so `export`, `$?` and `%1` work. What a
reader has to imagine is mapped, and nothing else: `nats.example.com:4222` and `--port 4222` become a nats-server of the
session's own (started by the session itself, or beforehand "with a server"), `/srv/` and `/var/lib/` directories of
its own, each host gets a state directory, and terminals are 200 columns wide. config/*.toml and blocks after
`<!-- file: NAME -->` lie in the working directory, mapped likewise. Output must be what the block claims, but for
blanks and what VOLATILE names; a line `...` stands for any lines. Commands that only look are asked again for a
while: their reader would wait a moment, too. Every job that is left runs into SIGTERM at the end, and syncd must answer
with 0.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import pytest

from syncd import errors
from syncd.checks import errors_of, problems_of
from syncd.cli import cli
from syncd.errors import SyncdError
from syncd.model import Entry, Kind
from syncd.settings import _LATER_KEYS, EmbeddedSettings, Settings, _unwrapped, default_state_dir, load
from syncd.store import mapping, wire
from syncd.store.base import EMPTY, BucketSpec, ObjectInfo, Stored
from syncd.store.bucket import new_stream
from syncd.trust import SIGNATURES
from tests.support.server import NatsServer, free_port, nats_server_binary

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
DOCS = sorted(
    path
    for path in ROOT.rglob("*.md")
    if not any(
        part.startswith(".") or part in {"demo", "build", "node_modules"} for part in path.relative_to(ROOT).parts
    )
)
PATIENCE = 30.0
LOOKING = re.compile(r"(cat|ls)\b|syncd\b.* (status|verify|ls|cat)\b")


def shown(path: Path) -> str:
    return str(path.relative_to(ROOT))


# --- reading Markdown ---


@dataclass
class Block:
    """One code block. ``note`` is the HTML comment right before it."""

    file: Path
    line: int
    language: str
    text: str
    note: str = ""

    def __str__(self) -> str:
        return f"{shown(self.file)}:{self.line}"


def blocks(file: Path) -> list[Block]:
    """Fenced blocks, and indented ones as language ``indented``."""
    found: list[Block] = []
    note, fence, indented = "", None, None
    for number, line in enumerate(file.read_text().splitlines(), 1):
        if fence is not None:
            if line.strip() == "```":
                found.append(fence)
                fence, note = None, ""
            else:
                fence.text += line + "\n"
        elif line.startswith("```"):
            fence, indented = Block(file, number, line[3:].strip(), "", note), None
        elif line.startswith("    "):
            if indented is None:
                indented = Block(file, number, "indented", "")
                found.append(indented)
            indented.text += line[4:] + "\n"
        elif line.startswith("<!--"):
            note = line.removeprefix("<!--").removesuffix("-->").strip()
        elif line.strip():
            note, indented = "", None
    assert fence is None, f"{shown(file)}: a code block is not closed"
    return found


def table(file: Path, heading: str) -> list[list[str]]:
    """The cells of all table rows between a heading and the next one of its level or above."""
    rows: list[list[str]] = []
    level = 0
    for line in file.read_text().splitlines():
        if line.startswith("#"):
            depth = len(line) - len(line.lstrip("#"))
            if line.lstrip("# ") == heading:
                level = depth
            elif level and depth <= level:
                break
        elif level and line.startswith("|") and not line.startswith("|---"):
            rows.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
    assert rows, f"{shown(file)}: no table under {heading!r}"
    return rows


def code(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def slugs(file: Path) -> set[str]:
    """The anchors that GitHub gives to headings."""
    headings = re.findall(r"^#+ +(.*)$", re.sub(r"```.*?```", "", file.read_text(), flags=re.DOTALL), re.MULTILINE)
    return {
        re.sub(r"[^\w\- ]", "", re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", text).lower()).replace(" ", "-")
        for text in headings
    }


# --- links and code ---


@pytest.mark.parametrize("file", DOCS, ids=shown)
def test_every_relative_link_leads_somewhere(file: Path) -> None:
    """Files and directories exist, and so do the headings that anchors name."""
    text = re.sub(r"```.*?```", "", file.read_text(), flags=re.DOTALL)
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", link) or "NNNN" in link:
            continue
        name, _, anchor = link.partition("#")
        target = (file.parent / name).resolve() if name else file
        if not target.exists() or (anchor and anchor not in slugs(target)):
            broken.append(link)
    assert broken == []


def test_the_list_of_decisions_is_complete() -> None:
    """0000-template.md names every decision by its title."""
    listed = dict(
        re.findall(
            r"^\* \[\d+\]\(([^)]+)\): (.*)$", (ROOT / "docs/decisions/0000-template.md").read_text(), re.MULTILINE
        )
    )
    titles = {}
    for path in sorted((ROOT / "docs/decisions").glob("*.md")):
        number, title = path.read_text().splitlines()[0].removeprefix("# ").split(": ", 1)
        assert path.name.startswith(f"{number}-")
        if number != "0000":
            titles[path.name] = title
    assert listed == titles


OPERATORS = set("();<>|&")


def commands_of(block: Block) -> Iterator[list[str]]:
    """The argument lists of every ``syncd`` in a block of shell text."""
    for line in block.text.replace("\\\n", " ").splitlines():
        if block.language == "console" and not line.startswith("$ "):
            continue
        try:
            lexer = shlex.shlex(line.removeprefix("$ "), posix=True, punctuation_chars=True)
            lexer.whitespace_split = True
            words = list(lexer)
        except ValueError:
            continue
        first = True
        for number, word in enumerate(words):
            if word == "syncd" or word.endswith("/bin/syncd"):
                end = next((n for n in range(number, len(words)) if words[n][:1] in OPERATORS), len(words))
                rest = words[number + 1 : end]
                synopsis = any("[" in argument for argument in rest)
                if not synopsis and (first or (rest and rest[0] in cli.commands)):
                    yield rest
                first = False
            elif word[:1] in OPERATORS or word in {"exec", "export"}:
                first = True
            elif not re.fullmatch(r"\w+=.*", word):
                first = False


def check_command(arguments: list[str]) -> None:
    """Parse as click does, without running anything; raises click's own errors."""
    context = click.Context(cli, info_name="syncd")
    _, rest, _ = cli.make_parser(context).parse_args(list(arguments))
    if not rest:
        return
    _, command, rest = cli.resolve_command(context, rest)
    assert command is not None
    inner = click.Context(command, parent=context, info_name=command.name)
    values, extra, _ = command.make_parser(inner).parse_args(rest)
    assert not extra, f"too many arguments: {extra}"
    for parameter in command.params:
        given = values.get(parameter.name or "")
        assert not parameter.required or isinstance(given, str | tuple), f"{parameter.name} is missing"


def test_every_syncd_command_in_the_documentation_exists() -> None:
    """Commands, options and numbers of arguments are those of the command line."""
    seen = 0
    for file in DOCS:
        for block in blocks(file):
            if block.language not in {"console", "sh", "indented", ""}:
                continue
            for arguments in commands_of(block):
                seen += 1
                try:
                    check_command(arguments)
                except (click.ClickException, AssertionError) as error:
                    raise AssertionError(f"{block}: syncd {shlex.join(arguments)}: {error}") from error
    assert seen > 20


def test_a_command_that_does_not_exist_is_found() -> None:
    """The check above is not blind."""
    for wrong in (["nothing"], ["push"], ["push", "a", "b"], ["check", "--online"], ["--configuration", "x"]):
        with pytest.raises((click.ClickException, AssertionError)):
            check_command(wrong)


def test_every_inline_syncd_command_exists() -> None:
    """So do the commands within sentences: `syncd allow FOLDER`."""
    for file in DOCS:
        for inline in re.findall(r"(?<!`)`(syncd [a-z][^`]*)`", file.read_text()):
            words = inline.split()
            known = words[1] in cli.commands or words[1].startswith("-")
            assert known or file.name == "architecture.md", f"{shown(file)}: {inline}"


# --- TOML and environment ---


def toml_examples() -> list[Any]:
    found = [pytest.param(path.read_text(), id=shown(path)) for path in sorted((ROOT / "config").glob("*.toml"))]
    found += [
        pytest.param(block.text, id=str(block)) for file in DOCS for block in blocks(file) if block.language == "toml"
    ]
    return found


@pytest.mark.parametrize("text", toml_examples())
def test_every_toml_example_loads(text: str, tmp_path: Path) -> None:
    """The loader takes it, and nothing in it contradicts something else."""
    (tmp_path / "config").mkdir()
    file = tmp_path / "config/example.toml"
    file.write_text(text)
    settings = load(file, {"HOME": str(tmp_path)})
    assert errors_of(settings, problems_of(settings)) is None


def test_the_environment_variables_shown_are_read() -> None:
    """The block of assignments in configuration.md."""
    [block] = [one for one in blocks(ROOT / "docs/configuration.md") if one.language == "sh"]
    environ = dict(word.split("=", 1) for word in shlex.split(block.text))
    assert all(name.startswith("SYNCD_") for name in environ)
    settings = load(None, environ)
    assert settings.daemon.labels == {"site": "fra"}
    assert settings.nats.password.get_secret_value() == "..."
    assert [item.folder for item in settings.subscribe] == ["app"]


def model_keys(model: Any, above: str = "") -> dict[str, set[str]]:
    """Table -> keys, as headings write them: ``[nats.tls]``, ``[[publish]]``."""
    found: dict[str, set[str]] = {}
    for name, info in model.model_fields.items():
        kind = _unwrapped(info.annotation)
        inner = [_unwrapped(arg) for arg in getattr(kind, "__args__", ()) if arg is not Ellipsis]
        where = f"{above}.{name}" if above else name
        if hasattr(kind, "model_fields"):
            found |= model_keys(kind, where)
        elif inner and hasattr(inner[0], "model_fields"):
            found |= model_keys(inner[0], where)
        else:
            found.setdefault(above, set()).add(name)
    return found


CONFIGURATION = ROOT / "docs/configuration.md"
TABLES = {"publish": "[[publish]]", "subscribe": "[[subscribe]]"}


def documented_keys() -> dict[str, dict[str, str]]:
    """Table -> key -> default, as configuration.md has them."""
    found: dict[str, dict[str, str]] = {}
    for name in re.findall(r"^## `\[+([a-z.]+)\]+`$", CONFIGURATION.read_text(), re.MULTILINE):
        rows = table(CONFIGURATION, f"`{TABLES.get(name, f'[{name}]')}`")[1:]
        found[name] = {code(key)[0]: (code(default) or [default])[0] for key, default, _ in rows}
        assert len(found[name]) == len(rows)
    return found


def test_configuration_md_names_every_key_and_no_other() -> None:
    """Derived from the settings' models."""
    assert {name: set(keys) for name, keys in documented_keys().items()} == model_keys(Settings)


def test_configuration_md_gives_the_defaults() -> None:
    """A file of all documented defaults means the same as one that only names what is required."""
    documented = documented_keys()
    required = {"publish": {"folder": '"a"', "path": '"/s"'}, "subscribe": {"folder": '"a"', "path": '"/m"'}}

    def text(only_required: bool) -> str:
        lines = []
        for name, keys in documented.items():
            lines.append(TABLES.get(name, f"[{name}]"))
            for key, default in keys.items():
                given = required.get(name, {}).get(key)
                assert (default == "required") == (given is not None), f"{name}.{key}"
                if given or not only_required:
                    lines.append(f"{key} = {given or default}")
        return "\n".join(lines)

    environ = {"HOME": "/home/somebody"}
    loaded = [load_text(text(only), environ) for only in (True, False)]
    assert loaded[0] == loaded[1]
    assert loaded[0].nats.embedded == EmbeddedSettings()
    assert str(default_state_dir(environ, root=True)) in CONFIGURATION.read_text()


def load_text(text: str, environ: dict[str, str]) -> Settings:
    file = Path(os.environ["PYTEST_TMP"]) / "all.toml"
    file.write_text(text)
    return load(file, environ)


@pytest.fixture(autouse=True)
def _own_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTEST_TMP", str(tmp_path))


def test_no_key_of_a_later_version_is_documented_as_one_of_this() -> None:
    """What is refused by name has no row."""
    documented = documented_keys()
    assert [key for table_, key in _LATER_KEYS if key in documented[table_]] == []


# --- exit codes, commands, options ---

CLI = ROOT / "docs/cli.md"


def error_classes() -> list[type[SyncdError]]:
    return [
        value
        for value in vars(errors).values()
        if isinstance(value, type) and issubclass(value, SyncdError) and value is not SyncdError
    ]


def test_the_exit_codes_are_those_of_the_code() -> None:
    """cli.md and the README name each EXIT_ constant once, and every error with its code."""
    rows = table(CLI, "Exit codes")
    codes = {code(row[1])[0]: int(row[0]) for row in rows if len(row) == 3 and row[0].isdigit()}
    assert codes == {
        name.removeprefix("EXIT_"): value for name, value in vars(errors).items() if name.startswith("EXIT_")
    }
    told = {code(row[0])[0]: (int(row[1]), row[2]) for row in rows if len(row) == 4 and code(row[0])}
    assert told == {one.__name__: (one.exit_code, "yes" if one.transient else "no") for one in error_classes()}
    assert {int(row[0]) for row in table(ROOT / "README.md", "Exit codes")[1:]} == set(codes.values())


def test_cli_md_has_every_command_with_its_arguments_and_options() -> None:
    """Headings are the commands, tables their options (without --config and --help)."""
    headings = re.findall(r"^### `syncd ([^`]+)`$", CLI.read_text(), re.MULTILINE)
    told = {words[0]: words[1:] for words in map(str.split, headings)}
    have = {
        name: [
            parameter.make_metavar(click.Context(command))
            for parameter in command.params
            if isinstance(parameter, click.Argument)
        ]
        for name, command in cli.commands.items()
    }
    assert {name: len(words) for name, words in told.items()} == {name: len(words) for name, words in have.items()}
    for heading in headings:
        name = heading.split()[0]
        options = {
            option
            for parameter in cli.commands[name].params
            if isinstance(parameter, click.Option) and parameter.name != "config"
            for option in parameter.opts
        }
        section = CLI.read_text().split(f"### `syncd {heading}`")[1].split("\n##")[0]
        rows = re.findall(r"^\| (`-[^|]*)\|", section, re.MULTILINE)
        assert {word.split()[0] for row in rows for word in code(row)} == options, name


def test_the_states_are_those_of_the_code() -> None:
    """The table of states under `syncd status`."""
    from syncd.status import FolderState  # noqa: PLC0415

    section = CLI.read_text().split("### `syncd status`")[1].split("\n###")[0]
    told = re.findall(r"^\| `([a-z_]+)` \|", section, re.MULTILINE)
    assert told == [state.value for state in FolderState]


# --- log events and problem codes ---

LEVELS = {"debug": "debug", "info": "info", "warning": "warning", "error": "error", "exception": "error"}


def syntax() -> Iterator[tuple[str, ast.AST]]:
    for file in sorted((ROOT / "syncd").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            yield f"{shown(file)}:{getattr(node, 'lineno', 0)}", node


def constant(node: ast.AST | None) -> str | None:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def logged_events() -> dict[str, tuple[set[str], set[str]]]:
    """Event -> (levels, fields), from every ``log.<level>("event", field=...)`` in the package."""
    found: dict[str, tuple[set[str], set[str]]] = {}

    def add(event: str, levels: set[str], fields: set[str]) -> None:
        before = found.get(event, (set(), set()))
        found[event] = (before[0] | levels, before[1] | fields)

    for _, node in syntax():
        if isinstance(node, ast.Dict):  # a line that the log writes about itself
            fields = {constant(key): constant(value) for key, value in zip(node.keys, node.values, strict=True)}
            if {"event", "level"} <= fields.keys():
                names = {key for key in fields if key} - {"event", "level", "ts"}
                add(fields["event"] or "?", {fields["level"] or "?"}, names)
        if not isinstance(node, ast.Call) or not node.args:
            continue
        fields_ = {keyword.arg for keyword in node.keywords if keyword.arg} - {"exc_info"}
        if isinstance(node.func, ast.Attribute) and node.func.attr in LEVELS and (event := constant(node.args[0])):
            add(event, {LEVELS[node.func.attr]}, fields_)
        elif isinstance(node.func, ast.Call) and ast.unparse(node.func) == "getattr(self._log, level)":
            add(constant(node.args[0]) or "?", {"debug", "warning", "error"}, fields_)
        elif isinstance(node.func, ast.Name) and node.func.id == "ProblemBook":
            add(constant(node.args[1]) or "?", {"warning"}, {"path", "code", "text"})
    return found


def test_operations_md_lists_every_log_event_and_no_other() -> None:
    """Names, levels and fields: they are a public contract."""
    rows = table(ROOT / "docs/operations.md", "Reading logs")[1:]
    told = {code(name)[0]: (set(levels.split(", ")), set(code(fields))) for name, levels, fields, _ in rows}
    assert len(told) == len(rows)
    assert told == logged_events()
    assert all(meaning for *_, meaning in rows)


CODE_CALLS = {"Problem", "PathRefused", "_problem", "_note_remote_problem", "_BlockedError", "tell"}
CODE = re.compile(r"[a-z0-9]+(_[a-z0-9]+)+|drift|unreadable|refused|busy|missing|stale")


def problem_codes() -> set[str]:
    """What can stand in ``Problem.code``, from the calls and tables that set it."""
    found: set[str] = set()
    for _, node in syntax():
        values: list[ast.AST] = []
        if isinstance(node, ast.Call):
            name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
            if name in CODE_CALLS:
                values = list(node.args[:3])
            elif name == "get" and ast.unparse(node.func).startswith("_CODES"):
                values = list(node.args[1:])
        elif isinstance(node, ast.Assign):
            target = ast.unparse(node.targets[0])
            if target in {"code", "code, what", "(code, what)"}:
                values = [node.value] if not isinstance(node.value, ast.Call) else []
            elif target == "_CODES" and isinstance(node.value, ast.Dict):
                values = list(node.value.values)
        elif isinstance(node, ast.FunctionDef):
            named = node.args.args[len(node.args.args) - len(node.args.defaults) :]
            values = [d for a, d in zip(named, node.args.defaults, strict=True) if a.arg == "code"]
        for value in values:
            found |= {text for inner in ast.walk(value) if (text := constant(inner)) and CODE.fullmatch(text)}
    return found


def test_operations_md_lists_every_problem_code_and_no_other() -> None:
    """What a person reads in the status can be looked up."""
    told = [code(row[0])[0] for row in table(ROOT / "docs/operations.md", "Problems")[1:]]
    assert len(told) == len(set(told))
    assert set(told) == problem_codes()


# --- the format ---

FORMAT = ROOT / "docs/format.md"


def meta_examples() -> dict[str, dict[str, Any]]:
    return {
        block.note.removeprefix("meta: "): json.loads(block.text)
        for block in blocks(FORMAT)
        if block.note.startswith("meta: ")
    }


def decoded(fields: dict[str, Any]) -> ObjectInfo:
    subject = wire.meta_subject(fields["bucket"], fields["name"])
    payload = json.dumps(fields).encode()
    return wire.decode_info(fields["bucket"], subject, payload, {}, seq=7, time_ns=5)


def test_the_examples_in_format_md_are_what_syncd_writes() -> None:
    """Field by field, in the order of the wire."""
    examples = meta_examples()
    content = b"port = 8080\n"
    for kind in ("file", "dir", "symlink"):
        fields = examples[kind]
        meta = fields["metadata"]
        entry = Entry(
            Kind(kind),
            int(meta["syncd-mode"], 8),
            int(meta["syncd-mtime"]),
            size=fields["size"],
            digest=meta.get("syncd-digest", ""),
            target=meta.get("syncd-target", ""),
        )
        stored = EMPTY
        if kind == "file":
            from blake3 import blake3  # noqa: PLC0415

            assert (fields["size"], meta["syncd-digest"]) == (len(content), blake3(content).hexdigest())
            sha256 = decoded(fields).sha256
            stored = Stored(fields["nuid"], 1, len(content), entry.digest, sha256)
        extra = {key: value for key, value in meta.items() if not key.startswith("syncd-")}
        described = mapping.object_meta(fields["name"], entry, publisher=meta["syncd-publisher"], extra=extra)
        now_ns = wire.parse_time(fields["mtime"])
        written = wire.encode_put(fields["bucket"], described, stored, nuid=fields["nuid"], now_ns=now_ns)
        assert json.dumps(json.loads(written)) == json.dumps(fields), kind
    gone = examples["tombstone"]
    written = wire.encode_tombstone("app", gone["name"], nuid=gone["nuid"], metadata=gone["metadata"])
    assert json.dumps(json.loads(written)) == json.dumps(gone)


def test_the_examples_in_format_md_are_what_syncd_reads() -> None:
    """Each becomes the entry that its metadata says."""
    examples = meta_examples()
    for kind in ("file", "dir", "symlink"):
        row = mapping.remote_row(decoded(examples[kind]))
        assert (row.entry.kind.value, row.path, row.publisher) == (kind, examples[kind]["name"], "web-1:/srv/app")
    assert mapping.remote_row(decoded(examples["symlink"])).entry.target == "conf.d/app.conf"
    assert mapping.remote_row(decoded(examples["file"])).entry.mtime_ns == 1790000000123456789
    assert decoded(examples["tombstone"]).deleted


def test_format_md_names_all_metadata_keys_and_stream_fields() -> None:
    """The constants of mapping.py, and what a new stream is created with."""
    text = FORMAT.read_text()
    told = {
        word
        for heading in ("Metadata of an object", "Generation object")
        for row in table(FORMAT, heading)
        for word in code(row[0])
    }
    assert told == {SIGNATURES} | {
        value for name, value in vars(mapping).items() if name.isupper() and str(value).startswith("syncd-")
    }
    spec = BucketSpec(description="d", compression=True, placement_cluster="c", ttl_seconds=1.0)
    plain = {"name", "retention", "max_consumers", "max_msgs", "max_msg_size"}
    stream = {word for row in table(FORMAT, "The stream") for word in code(row[0])}
    assert stream == new_stream("app", spec).keys() - plain
    assert wire.meta_subject("app", "conf.d/app.conf") in text
    assert not any(line.startswith("subject_delete") for line in text.splitlines())


# --- sessions ---

RUN = re.compile(
    r"run: (?P<session>[\w-]+) on (?P<host>[\w-]+)(?P<server>, with a server)?(, needs (?P<needs>[\w-]+))?"
)


def sessions() -> list[Any]:
    found: dict[tuple[Path, str], list[Block]] = {}
    for file in DOCS:
        for block in blocks(file):
            if block.language == "console" and (match := RUN.fullmatch(block.note)):
                found.setdefault((file, match["session"]), []).append(block)
    return [pytest.param(file, parts, id=f"{shown(file)}:{name}") for (file, name), parts in found.items()]


def test_every_console_block_is_run_or_says_why_not() -> None:
    """A session that nobody runs goes stale."""
    for file in DOCS:
        for block in blocks(file):
            if block.language == "console":
                assert RUN.fullmatch(block.note) or block.note.startswith("not run: "), str(block)


@dataclass
class Step:
    """One command and the lines it is to print."""

    command: str
    expected: list[str] = field(default_factory=list)


def steps(block: Block) -> list[Step]:
    found: list[Step] = []
    for line in block.text.splitlines():
        if line.startswith("$ "):
            found.append(Step(line[2:]))
        else:
            assert found, f"{block}: output before the first command"
            found[-1].expected.append(line)
    return found


class World:
    """The mapped surroundings of one session."""

    def __init__(self, directory: Path, port: int) -> None:
        self.directory = directory
        self.port = port
        self.work = directory / "work"
        for place in ("srv", "var/lib", "work/config", "bin"):
            (directory / place).mkdir(parents=True)
        for file in (ROOT / "config").glob("*.toml"):
            (self.work / "config" / file.name).write_text(self.map(file.read_text()))
        shim = directory / "bin/syncd"
        shim.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m syncd "$@"\n')
        shim.chmod(0o755)

    def map(self, text: str) -> str:
        text = text.replace("nats.example.com:4222", f"127.0.0.1:{self.port}")
        text = text.replace("--port 4222", f"--addr 127.0.0.1 --port {self.port}")
        return re.sub(r"(?<![\w./])/(srv|var/lib)/", rf"{self.directory}/\1/", text)

    def unmap(self, text: str) -> str:
        return text.replace(f"{self.directory}/", "/").replace(f"127.0.0.1:{self.port}", "nats.example.com:4222")

    def environ(self, host: str) -> dict[str, str]:
        path = [str(self.directory / "bin"), str(Path(nats_server_binary()).parent), os.environ.get("PATH", os.defpath)]
        kept = {key: value for key, value in os.environ.items() if not key.startswith("SYNCD_")}
        return kept | {
            "PATH": os.pathsep.join(path),
            "PYTHONPATH": str(ROOT),
            "COLUMNS": "200",
            "SYNCD_DAEMON__STATE_DIR": str(self.directory / "hosts" / host),
        }


class Shell:
    """One host's shell: commands in, output and exit code out."""

    def __init__(self, world: World, host: str) -> None:
        self.log = world.directory / f"{host}.log"
        self.jobs: list[str] = []
        self.asked: set[int] = set()
        self.process = subprocess.Popen(
            ["bash", "--noprofile", "--norc"],
            cwd=world.work,
            env=world.environ(host),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self, command: str) -> tuple[list[str], int]:
        background = command.rstrip().endswith("&")
        if background:
            command = f"{command.rstrip()[:-1]} >>{shlex.quote(str(self.log))} 2>&1 &"
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        mark = f"@@{time.monotonic_ns()}"
        self.process.stdin.write(
            f"eval {shlex.quote(command)} </dev/null\n_status=$?; echo; echo {mark} $_status; (exit $_status)\n"
        )
        self.process.stdin.flush()
        if background:
            self.jobs.append(command)
        self.asked.update(map(int, re.findall(r"^kill %(\d+)", command)))
        lines: list[str] = []
        for line in self.process.stdout:
            if line.startswith(mark):
                status = int(line.split()[1])
                if lines and not lines[-1]:
                    lines.pop()
                return lines, status
            lines.append(line.rstrip("\n"))
        raise AssertionError(f"the shell ended: {lines}")

    def end(self) -> dict[str, int]:
        """SIGTERM for every job; command -> exit code."""
        codes = {}
        for number, job in reversed(list(enumerate(self.jobs, 1))):
            if number not in self.asked:  # a second SIGTERM means "at once"
                self.run(f"kill %{number}")
            lines, _ = self.run(f"wait %{number}; echo $?")
            codes[job] = int(lines[-1])
        return codes

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.communicate()


VOLATILE = (
    (re.compile(r"\b(\d+[smhd] ago|never)\b"), "AGO"),
    (re.compile(r"\b\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z"), "TIME"),
    (re.compile(r"^generation \d+, tree [0-9a-f]{12}\b"), "generation N, tree DIGEST"),
    (re.compile(r"\bAGO (\d+|-) (?=\d+ \d+ )"), "AGO N "),
    (re.compile(r"^(\S+: generation .*?)[\d.]+ ([KMG]i)?B (uploaded|downloaded)\b"), r"\1SIZE \3"),
    (re.compile(r"^(\S+: )[\d.]+ ([KMG]i)?B before\b"), r"\1SIZE before"),
    (re.compile(r"^(\S+ \(subscribe\): )generation \d+ of\b"), r"\1generation N of"),
    (re.compile(r"\bchannel head: generation \d+ -> (generation \d+) \(move \d+"), r"channel head: \1 (move N"),
    (re.compile(r"\bU[A-Z2-7]{55}\b"), "KEY"),
    (re.compile(r"\b([0-9a-f]{64}|[0-9a-f]{32})\b"), "DIGEST"),
    (re.compile(r"\b[\w.-]+@[\w.-]+"), "WHO@HOST"),
)
"""What no two runs share: times, digests over times, sizes of what is compressed with digests, into how many
generations a daemon puts what a shell wrote, keys, and who runs it."""


def normal(line: str) -> str:
    line = " ".join(line.split())
    for pattern, word in VOLATILE:
        line = pattern.sub(word, line)
    return line


def agrees(expected: list[str], lines: list[str]) -> bool:
    """Tell whether lines are as expected; ``...`` stands for any number of them."""
    if not expected:
        return not lines
    if expected[0] == "...":
        return any(agrees(expected[1:], lines[skip:]) for skip in range(len(lines) + 1))
    return bool(lines) and normal(expected[0]) == normal(lines[0]) and agrees(expected[1:], lines[1:])


def perform(world: World, shell: Shell, step: Step, where: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while True:
        lines, _ = shell.run(world.map(step.command))
        found = [world.unmap(line) for line in lines]
        if agrees(step.expected, found):
            return
        late = time.monotonic() > deadline
        if late or not LOOKING.match(step.command):
            logs = "\n".join(f"{log.name}:\n{log.read_text()[-3000:]}" for log in world.directory.glob("*.log"))
            told = "\n".join(found)
            raise AssertionError(f"{where}: $ {step.command}\nexpected:\n{step.expected}\nfound:\n{told}\n{logs}")
        time.sleep(0.1)  # between two looks at what other processes do; bounded by PATIENCE


@pytest.mark.timeout(240)
@pytest.mark.parametrize(("file", "parts"), sessions())
def test_a_session_runs_as_it_is_written(file: Path, parts: list[Block], tmp_path: Path) -> None:
    """Every command, in order, prints what the page says; every daemon ends with 0."""
    world = World(tmp_path / "world", free_port())
    for block in blocks(file):
        if block.note.startswith("file: "):
            (world.work / block.note.removeprefix("file: ")).write_text(world.map(block.text))
    server = None
    if any(match["server"] for block in parts if (match := RUN.fullmatch(block.note))):
        server = NatsServer(tmp_path / "nats", port=world.port).start()
    shells: dict[str, Shell] = {}
    try:
        for block in parts:
            match = RUN.fullmatch(block.note)
            assert match
            if match["needs"] and shutil.which(match["needs"]) is None:
                continue
            host = match["host"]
            shell = shells[host] = shells.get(host) or Shell(world, host)
            for step in steps(block):
                perform(world, shell, step, str(block))
        for shell in reversed(shells.values()):
            for job, status in shell.end().items():
                assert status == 0 or "nats-server" in job, (
                    f"{job}: exit code {status}: {shell.log.read_text()[-3000:]}"
                )
    finally:
        for shell in shells.values():
            shell.kill()
        if server is not None:
            server.stop()


# --- the first two commands of the README ---


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of this checkout, without what git ignores."""
    copy = tmp_path / "checkout"
    listing = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listing, capture_output=True, text=True, check=False)
    if names.returncode:  # not a checkout: an unpacked archive
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "demo", "__pycache__"), symlinks=True)
        return copy
    for name in filter(None, names.stdout.split("\0")):
        if (ROOT / name).exists() and name.split("/")[0] in {
            "syncd",
            "scripts",
            "config",
            "pyproject.toml",
            "README.md",
        }:
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)
    return copy


@pytest.fixture
def script_environ(tmp_path: Path) -> dict[str, str]:
    """The running environment for scripts/: used as it is, on a port of the test's own."""
    venv = Path(sys.prefix)
    if sys.prefix == sys.base_prefix or not (venv / "bin/python").exists():
        venv = tmp_path / "venv"
        (venv / "bin").mkdir(parents=True)
        (venv / "bin/python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
        (venv / "bin/python").chmod(0o755)
    address = f"127.0.0.1:{free_port()}"
    kept = {key: value for key, value in os.environ.items() if not key.startswith("SYNCD_")}
    return kept | {
        "SYNCD_VENV": str(venv),
        "SYNCD_SKIP_INSTALL": "1",
        "SYNCD_NATS__SERVERS": json.dumps([f"nats://{address}"]),
        "SYNCD_NATS__EMBEDDED__LISTEN": address,
    }


def test_the_demo_mirrors_what_is_edited(checkout: Path, script_environ: dict[str, str], tmp_path: Path) -> None:
    """scripts/demo makes demo/source, mirrors it to demo/mirror, follows an edit, and ends with 0 at SIGTERM."""
    log = tmp_path / "demo.log"
    mirror = checkout / "demo/mirror"
    with log.open("wb") as out:
        demo = subprocess.Popen([checkout / "scripts/demo"], stdout=out, stderr=out, env=script_environ, cwd=tmp_path)
    try:

        def wait_for(name: str, text: str) -> None:
            deadline = time.monotonic() + PATIENCE
            while not (mirror / name).exists() or (mirror / name).read_text() != text:
                assert demo.poll() is None, log.read_text()[-3000:]
                assert time.monotonic() < deadline, log.read_text()[-3000:]
                time.sleep(0.05)  # between two looks; bounded by PATIENCE

        wait_for("hello.txt", "Hello from the publisher.\n")
        wait_for("conf.d/app.conf", "port = 8080\n")
        (checkout / "demo/source/hello.txt").write_text("changed\n")
        wait_for("hello.txt", "changed\n")
        demo.terminate()
        assert demo.wait(10) == 0, log.read_text()[-3000:]
    finally:
        demo.kill()
        demo.wait()
    assert "Publishing" in log.read_text()


def test_the_test_script_hands_its_arguments_to_pytest(checkout: Path, script_environ: dict[str, str]) -> None:
    """scripts/test --version is pytest --version."""
    script = checkout / "scripts/test"
    done = subprocess.run(
        [script, "--version"], capture_output=True, text=True, env=script_environ, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "pytest" in done.stdout + done.stderr


@pytest.mark.parametrize("name", ["demo", "test"])
def test_the_scripts_document_their_environment(name: str) -> None:
    """Every variable that a script reads stands in the comment at its top."""
    text = (ROOT / "scripts" / name).read_text()
    head = text.split("set -eu")[0]
    read = set(re.findall(r"\$\{([A-Z_]+):-", text))
    assert read == {"PYTHON", "SYNCD_VENV", "SYNCD_SKIP_INSTALL"} | (
        {"SYNCD_TEST_WORKERS"} if name == "test" else set()
    )
    assert {word for word in read if f"#   {word}=" in head} == read
