"""The fault report: which test provokes which fault of the catalogue, how, how often, and what came of it.

python -m pytest --fault-results unit.json tests/unit      (and so on, as many files as there are runs)
python -m tests.faults --results unit.json --results e2e.json

writes docs/faults.md from the ``fault`` markers of the tests, the catalogue (tests/faults.toml) and the results;
``--check`` writes nothing and says whether the page is in step with the markers. Results of several files add up.
"""

from __future__ import annotations

import argparse
import ast
import json
import platform
import re
import sys
import tomllib
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    import pytest

ROOT = Path(__file__).parents[1]
TESTS = ROOT / "tests"
CATALOGUE = TESTS / "faults.toml"
PAGE = ROOT / "docs/faults.md"
FORMAT = 1
IDS = "fault"
"""The name of the marker, and of the user property that carries its ids to the results file."""
HOW_MAX = 300
"""Characters of a test's docstring that the report shows: as many whole sentences as fit, and always the first."""
RUNS = "fault_runs"
"""A test that repeats its fault within itself says how often: ``record_property("fault_runs", 500)``."""

_PASSING = re.compile(r"(\d+) passing")
_SENTENCE = re.compile(r"(?<=[.!?])\s+")


# -- the catalogue -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Catalogue:
    """What can go wrong.

    :ivar classes: letter -> title.
    :ivar faults: id -> sentence, in the order of the list.
    :ivar reasons: id -> why no test provokes it.
    :ivar notes: id -> what of it no test provokes, or people do by hand.
    """

    classes: Mapping[str, str]
    faults: Mapping[str, str]
    reasons: Mapping[str, str]
    notes: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, file: Path = CATALOGUE) -> Self:
        fields = tomllib.loads(file.read_text())
        return cls(fields["classes"], fields["faults"], fields["reasons"], fields["notes"])

    def check(self, marked: Iterable[Marked]) -> list[str]:
        """What does not fit together, one line each."""
        marked = list(marked)
        provoked = {one for test in marked for one in test.ids}
        return [
            *(f"{one}: nobody's class" for one in self.faults if one.rstrip("0123456789") not in self.classes),
            *(
                f"{test.name} is marked with {one}, which is not in the catalogue"
                for test in marked
                for one in test.ids
                if one not in self.faults
            ),
            *(f"{one}: a reason for what is no fault" for one in self.reasons if one not in self.faults),
            *(f"{one}: has tests, and a reason why it has none" for one in self.reasons if one in provoked),
            *(f"{one}: a note on what is no fault" for one in self.notes if one not in self.faults),
            *(f"{one}: a note, and no test that it is about" for one in self.notes if one in self.reasons),
            *(
                f"{one}: no test is marked with it, and [reasons] of {CATALOGUE.name} does not say why"
                for one in self.faults
                if one not in provoked and one not in self.reasons
            ),
        ]


# -- the markers -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Marked:
    """One test function.

    :ivar name: file and function, as pytest names them, without parameters.
    :ivar how: what its docstring says first, or its name in words.
    """

    name: str
    ids: tuple[str, ...]
    how: str


def split_ids(arguments: Iterable[object]) -> tuple[str, ...]:
    """The ids of one marker: ``fault("C1 C2")`` and ``fault("C1", "C2")`` are the same.

    :raises ValueError: something else than text.
    """
    ids: list[str] = []
    for argument in arguments:
        if not isinstance(argument, str):
            raise ValueError(f"a fault marker holds {argument!r}")  # noqa: TRY004 - one error for all callers
        ids += argument.split()
    return tuple(dict.fromkeys(ids))


def marked_tests(directory: Path = TESTS, root: Path = ROOT) -> list[Marked]:
    """All tests that bear a fault marker, in the order of files and lines; nothing is imported."""
    return [
        test
        for file in sorted(directory.rglob("test_*.py"))
        for test in _marked_in(ast.parse(file.read_text()), file.relative_to(root).as_posix())
    ]


def _marked_in(module: ast.Module | ast.ClassDef, name: str, above: Sequence[ast.expr] = ()) -> Iterator[Marked]:
    common = [*above, *_module_marks(module)]
    for node in module.body:
        here = f"{name}::{getattr(node, 'name', '')}"
        if isinstance(node, ast.ClassDef) and node.name.startswith("Test"):
            yield from _marked_in(node, here, [*common, *node.decorator_list])
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test"):
            ids = [one for place in (*common, *node.decorator_list) for one in _ids_in(place, here)]
            if ids:
                yield Marked(here, tuple(dict.fromkeys(ids)), _how(node))


def _module_marks(module: ast.Module | ast.ClassDef) -> list[ast.expr]:
    assigned = [node for node in module.body if isinstance(node, ast.Assign)]
    return [node.value for node in assigned if any(getattr(it, "id", "") == "pytestmark" for it in node.targets)]


def _ids_in(place: ast.expr, name: str) -> Iterator[str]:
    """The ids of the markers anywhere in a decorator: those of single parameters count for the whole test."""
    for node in ast.walk(place):
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(f"mark.{IDS}"):
            try:
                yield from split_ids(ast.literal_eval(argument) for argument in node.args)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None


def by_name(test: str) -> str:
    """Make a sentence of a test's name, for want of a docstring."""
    words = test.removeprefix("test").strip("_").replace("_", " ")
    return f"{words[:1].upper()}{words[1:]}."


def _how(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    text = " ".join((ast.get_docstring(node) or "").split(":param")[0].split())
    if not text:
        return by_name(node.name)
    said, *more = _SENTENCE.split(text)
    for sentence in more:
        if len(said) + len(sentence) >= HOW_MAX:
            break
        said += f" {sentence}"
    return said


# -- results -----------------------------------------------------------------------------------------------------------


@dataclass
class Result:
    """What came of one test function, over all its parameters and all result files.

    :ivar runs: how often the fault was provoked.
    :ivar reason: why the first case that was skipped was.
    """

    runs: int = 0
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    reason: str = ""

    def add(self, other: Result) -> None:
        self.runs += other.runs
        self.passed += other.passed
        self.failed += other.failed
        self.skipped += other.skipped
        self.reason = self.reason or other.reason

    def __str__(self) -> str:
        if self.failed:
            return f"**failed** ({self.failed} of {self.passed + self.failed} cases)"
        if not self.passed:
            return f"skipped: {self.reason}" if self.skipped else "not run"
        return "passed" + (f" ({self.skipped} skipped: {self.reason})" if self.skipped else "")


class ResultWriter:
    """A pytest plugin that writes the results of all marked tests into a file when the session ends."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._cases: dict[str, Result] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        properties = dict(report.user_properties)
        if IDS not in properties or (report.when != "call" and report.passed):
            return
        skipped = Result(skipped=1, reason=_why_skipped(report))
        runs = int(str(properties.get(RUNS, 1)))
        outcomes = {"passed": Result(runs, passed=1), "failed": Result(runs, failed=1), "skipped": skipped}
        found = outcomes[report.outcome]
        before = self._cases.get(report.nodeid)
        if before is None or found.failed:  # a failing teardown makes it a failure
            self._cases[report.nodeid] = found

    def pytest_sessionfinish(self) -> None:
        tests: dict[str, Result] = {}
        for case, result in self._cases.items():
            tests.setdefault(case.partition("[")[0], Result()).add(result)
        write_results(self._file, tests)


def count_runs(report: pytest.TestReport, statistics: str) -> None:
    """Say how many examples hypothesis tried, unless the test itself says how often it provoked its fault."""
    examples = sum(map(int, _PASSING.findall(statistics)))
    if examples and RUNS not in dict(report.user_properties):
        report.user_properties.append((RUNS, examples))


def _why_skipped(report: pytest.TestReport) -> str:
    if not report.skipped:
        return ""
    expected = getattr(report, "wasxfail", "")
    text = f"expected to fail: {expected}" if expected else str(report.longrepr[-1] if report.longrepr else "")  # type: ignore[index]
    return " ".join(text.removeprefix("Skipped: ").split())[:200]


def write_results(file: Path, tests: Mapping[str, Result]) -> None:
    fields = {
        "syncd_fault_results": FORMAT,
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "where": f"{platform.system()} {platform.release()} {platform.machine()}, Python {platform.python_version()}",
        "tests": {name: vars(tests[name]) for name in sorted(tests)},
    }
    file.write_text(json.dumps(fields, indent=1) + "\n")


@dataclass
class Results:
    """Result files put together.

    :ivar origins: when and where each of them was made.
    """

    tests: dict[str, Result] = field(default_factory=dict)
    origins: list[str] = field(default_factory=list)

    def add(self, file: Path) -> None:
        """Add one file.

        :raises ValueError: it is no such file.
        """
        fields: dict[str, Any] = json.loads(file.read_text())
        if fields.get("syncd_fault_results") != FORMAT:
            raise ValueError(f"{file}: no results of --fault-results")
        for name, values in fields["tests"].items():
            self.tests.setdefault(name, Result()).add(Result(**values))
        self.origins.append(f"{fields['when']} on {fields['where']}")


# -- the page ----------------------------------------------------------------------------------------------------------

HEAD = """\
<!-- Made by `python -m tests.faults`; do not edit. -->
# Fault report

What goes wrong with software of this kind, and the tests that provoke it. The numbers are those of tests/faults.toml; a
test bears them as its `fault` marker, and its docstring says how: most of them kill, unmount, fill or plant for real,
some in `tests/unit` only turn a clock or make up the state that a decision is about. A run is one case of a test, one
example of a generated input, or one repetition (a kill, a power cut) within a test. How to make this page: see
tests/faults.py.
"""


NOT_COVERED = "Not covered: "
NOTE = "Left out: "
"""What begins the sentence of a note."""


def render(catalogue: Catalogue, marked: Sequence[Marked], results: Results) -> str:
    """The page."""
    lines = [HEAD, *_summary(catalogue, marked, results)]
    letter = ""
    for one, sentence in catalogue.faults.items():
        if one.rstrip("0123456789") != letter:
            letter = one.rstrip("0123456789")
            lines += [f"## {letter}. {catalogue.classes[letter]}", ""]
        lines += [f"### {one}", "", sentence, ""]
        if one in catalogue.notes:
            lines += [f"{NOTE}{catalogue.notes[one]}", ""]
        tests = [test for test in marked if one in test.ids]
        if not tests:
            lines += [f"{NOT_COVERED}{catalogue.reasons.get(one, 'no test bears this number yet.')}", ""]
            continue
        lines += ["| test | how it is provoked | runs | result |", "|---|---|---:|---|"]
        for test in tests:
            result = results.tests.get(test.name, Result())
            lines.append(f"| `{test.name}` | {_cell(test.how)} | {result.runs or ''} | {_cell(str(result))} |")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def _summary(catalogue: Catalogue, marked: Sequence[Marked], results: Results) -> list[str]:
    provoked = {one for test in marked for one in test.ids}
    found = [results.tests[test.name] for test in marked if test.name in results.tests]
    counts = [
        ("lines of the catalogue", len(catalogue.faults)),
        ("lines with tests", sum(one in provoked for one in catalogue.faults)),
        ("tests", len(marked)),
        ("tests that passed", sum(bool(it.passed and not it.failed) for it in found)),
        ("tests that failed", sum(bool(it.failed) for it in found)),
        ("tests that were skipped", sum(bool(it.skipped and not it.passed and not it.failed) for it in found)),
        ("tests that were not run", len(marked) - len(found)),
        ("runs", sum(it.runs for it in found)),
    ]
    made = [f"Results of {origin}." for origin in results.origins] or ["Without results."]
    return [*made, "", "| | |", "|---|---:|", *(f"| {what} | {count:,} |" for what, count in counts), ""]


def _cell(text: str) -> str:
    return text.replace("|", r"\|").replace("<", "&lt;")


def shown_on(page: str) -> dict[str, set[str]]:
    """What a page says: id -> names of tests, and the sentences of why there are none, or what they leave out."""
    found: dict[str, set[str]] = {}
    tests: set[str] = set()
    for line in page.splitlines():
        if line.startswith("### "):
            tests = found.setdefault(line.removeprefix("### "), set())
        elif line.startswith("| `"):
            tests.add(line.split("`")[1])
        for word in (NOT_COVERED, NOTE):
            if line.startswith(word):
                tests.add(line.removeprefix(word))
    return found


def out_of_step(page: str, catalogue: Catalogue, marked: Sequence[Marked]) -> list[str]:
    """Where a page is not what the markers and the catalogue say now; results do not count."""
    there, due = shown_on(page), shown_on(render(catalogue, marked, Results()))
    wrong = [f"{one}: on one side only" for one in sorted(there.keys() ^ due.keys())]
    for one in sorted(there.keys() & due.keys()):
        wrong += [f"{one}: {name} is missing on the page" for name in sorted(due[one] - there[one])]
        wrong += [f"{one}: {name} is on the page, and nowhere else" for name in sorted(there[one] - due[one])]
    return wrong


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, action="append", default=[], metavar="FILE")
    parser.add_argument("--output", type=Path, default=PAGE, metavar="FILE")
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if the page is out of step")
    given = parser.parse_args(arguments)
    catalogue, marked, results = Catalogue.read(), marked_tests(), Results()
    for file in given.results:
        results.add(file)
    wrong = catalogue.check(marked)
    if given.check:
        wrong += out_of_step(given.output.read_text(), catalogue, marked) if given.output.exists() else ["no page"]
    else:
        given.output.write_text(render(catalogue, marked, results))
    for line in wrong:
        print(line, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
