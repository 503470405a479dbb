"""docs/faults.md: no line of the catalogue is forgotten, no marker misspelt, and the page is in step with the tests."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import faults
from tests.faults import Catalogue, Marked, Result, Results, marked_tests, out_of_step, render, shown_on

ROOT = Path(__file__).parents[2]
MADE = """
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st


@pytest.mark.fault("A1 A2")
@pytest.mark.parametrize("number", [1, 2, pytest.param(3, marks=pytest.mark.fault("A3"))])
def test_cases(number):
    \"\"\"Something is provoked
    for three numbers. It is seen.

    What the report has no room for: eighty figures, and sixty, and sixty, and sixty, and sixty, and sixty, and sixty,
    and sixty, and sixty, and sixty, and sixty, and sixty, and sixty, and sixty, and sixty, and sixty, and sixty, and
    sixty, and sixty, and sixty, and sixty, and sixty, and sixty, and sixty, and sixty, and sixty, and six. More.\"\"\"


@pytest.mark.fault("A2", "B1")
def test_that_repeats(record_property):
    record_property("fault_runs", 500)


@pytest.mark.fault("B1")
@settings(max_examples=37, derandomize=True, database=None)
@given(st.integers())
def test_of_many_examples(number):
    pass


@pytest.mark.fault("B2")
@pytest.mark.parametrize("number", [1, 2])
def test_that_fails(number):
    assert number == 1


@pytest.mark.fault("B2")
def test_that_is_skipped():
    pytest.skip("needs root")


@pytest.fixture
def broken():
    yield
    raise OSError


@pytest.mark.fault("B2")
def test_whose_end_fails(broken):
    pass


class TestTogether:
    pytestmark = pytest.mark.fault("A1")

    async def test_within(self):
        \"\"\"A fact without an end\"\"\"


def test_of_no_fault():
    pass
"""
CATALOGUE = Catalogue(
    {"A": "One class", "B": "Another"},
    {"A1": "One.", "A2": "Two.", "A3": "Three.", "B1": "Four.", "B2": "Five.", "B3": "Six."},
    {"B3": "Nobody knows how."},
    {"A1": "The half of it."},
)


@pytest.fixture
def made(tmp_path: Path) -> Path:
    (tmp_path / "test_made.py").write_text(MADE)
    return tmp_path


# -- the tests of this repository --------------------------------------------------------------------------------------


def test_every_line_of_the_catalogue_has_tests_or_a_reason() -> None:
    """And no marker names a line that is not there; a line that has tests has no reason for having none."""
    assert Catalogue.read().check(marked_tests()) == []


def test_every_test_of_a_fault_says_how_it_is_provoked() -> None:
    """The report shows what its docstring says; a name alone says what comes out at most."""
    assert [test.name for test in marked_tests() if test.how == faults.by_name(test.name.split("::")[-1])] == []


def test_the_page_is_in_step_with_the_markers() -> None:
    """``python -m tests.faults`` writes it anew."""
    assert out_of_step(faults.PAGE.read_text(), Catalogue.read(), marked_tests()) == []


def test_the_markers_are_read_as_pytest_reads_them() -> None:
    """Of this very directory: each marked test is one that pytest collects, and the reverse."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", "-m", "fault"]
    listed = subprocess.run(
        [*command, "tests/unit"], cwd=ROOT, capture_output=True, text=True, timeout=100, check=False
    ).stdout
    collected = {line.partition("[")[0] for line in listed.splitlines() if "::" in line}
    assert {test.name for test in marked_tests() if test.name.startswith("tests/unit/")} == collected


# -- the tool ----------------------------------------------------------------------------------------------------------


def test_markers_are_found_wherever_they_stand(made: Path) -> None:
    """On functions, parameters, classes; in one text or in several; the sentences that fit, or else the name."""
    assert marked_tests(made, made) == [
        Marked("test_made.py::test_cases", ("A1", "A2", "A3"), "Something is provoked for three numbers. It is seen."),
        Marked("test_made.py::test_that_repeats", ("A2", "B1"), "That repeats."),
        Marked("test_made.py::test_of_many_examples", ("B1",), "Of many examples."),
        Marked("test_made.py::test_that_fails", ("B2",), "That fails."),
        Marked("test_made.py::test_that_is_skipped", ("B2",), "That is skipped."),
        Marked("test_made.py::test_whose_end_fails", ("B2",), "Whose end fails."),
        Marked("test_made.py::TestTogether::test_within", ("A1",), "A fact without an end"),
    ]


@pytest.mark.parametrize("marker", ["fault(1)", 'fault(*["A1"])', "fault(name)"])
def test_a_marker_that_cannot_be_read_is_refused(tmp_path: Path, marker: str) -> None:
    """By the name of its test: a report without it would be a lie."""
    (tmp_path / "test_made.py").write_text(f"@pytest.mark.{marker}\ndef test_it(): pass\n")
    with pytest.raises(ValueError, match=r"test_made.py::test_it"):
        marked_tests(tmp_path, tmp_path)


def results_of(directory: Path, *options: str) -> dict[str, Any]:
    """Run the made tests with the options of this repository."""
    file = directory / "results.json"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.conftest", "-p", "no:cacheprovider", *options]
    command += ["-c", "/dev/null", "--rootdir", str(directory), "-o", "asyncio_mode=auto"]
    command += ["--fault-results", str(file), str(directory / "test_made.py")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    fields: dict[str, dict[str, Any]] = json.loads(file.read_text())
    file.rename(directory / f"results{len(list(directory.glob('results*')))}.json")
    return fields["tests"]


def outcome(runs: int, passed: int = 0, failed: int = 0, skipped: int = 0, reason: str = "") -> dict[str, Any]:
    return vars(Result(runs, passed, failed, skipped, reason))


def test_a_run_leaves_its_results_and_several_add_up(made: Path) -> None:
    """Cases, examples and repetitions are counted; the same from one process and from two workers."""
    found = results_of(made)
    assert found == {
        "test_made.py::TestTogether::test_within": outcome(1, 1),
        "test_made.py::test_cases": outcome(3, 3),
        "test_made.py::test_of_many_examples": outcome(37, 1),
        "test_made.py::test_that_fails": outcome(2, 1, 1),
        "test_made.py::test_that_is_skipped": outcome(0, skipped=1, reason="needs root"),
        "test_made.py::test_that_repeats": outcome(500, 1),
        "test_made.py::test_whose_end_fails": outcome(1, 0, 1),
    }
    assert results_of(made, "-n", "2") == found
    results = Results()
    for file in sorted(made.glob("results*.json")):
        results.add(file)
    assert len(results.origins) == 2
    page = render(CATALOGUE, marked_tests(made, made), results)
    for row in (
        "| `test_made.py::test_cases` | Something is provoked for three numbers. It is seen. | 6 | passed |",
        "| `test_made.py::test_that_repeats` | That repeats. | 1000 | passed |",
        "| `test_made.py::test_that_fails` | That fails. | 4 | **failed** (2 of 4 cases) |",
        "| `test_made.py::test_that_is_skipped` | That is skipped. |  | skipped: needs root |",
    ):
        assert row in page.splitlines()
    assert "| runs | 1,088 |" in page


def test_a_file_of_something_else_is_no_result(tmp_path: Path) -> None:
    """It is refused by its name."""
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match=r"other.json"):
        Results().add(tmp_path / "other.json")


def test_the_page_says_which_test_is_for_which_fault(made: Path) -> None:
    """With or without results; where there is none, why."""
    page = render(CATALOGUE, marked_tests(made, made), Results())
    assert shown_on(page) == {
        "A1": {"test_made.py::test_cases", "test_made.py::TestTogether::test_within", "The half of it."},
        "A2": {"test_made.py::test_cases", "test_made.py::test_that_repeats"},
        "A3": {"test_made.py::test_cases"},
        "B1": {"test_made.py::test_that_repeats", "test_made.py::test_of_many_examples"},
        "B2": {f"test_made.py::test_{name}" for name in ("that_fails", "that_is_skipped", "whose_end_fails")},
        "B3": {"Nobody knows how."},
    }
    assert page.index("## A. One class") < page.index("### A3") < page.index("## B. Another") < page.index("### B3")
    assert "\n### A1\n\nOne.\n\nLeft out: The half of it.\n\n| test" in page


def test_a_page_that_is_out_of_step_is_found_out(made: Path) -> None:
    """A test that is new, one that is gone, a line that is new, another reason, another note."""
    marked = marked_tests(made, made)
    page = render(CATALOGUE, marked, Results())
    assert out_of_step(page, CATALOGUE, marked) == []
    assert out_of_step(page, CATALOGUE, marked[1:]) != []
    assert out_of_step(page, CATALOGUE, [*marked, Marked("test_made.py::test_new", ("B2",), "")]) == [
        "B2: test_made.py::test_new is missing on the page"
    ]
    more = Catalogue(
        CATALOGUE.classes,
        {**CATALOGUE.faults, "B4": "Seven."},
        {"B3": "Another reason.", "B4": "None."},
        {"A1": "The other half."},
    )
    assert out_of_step(page, more, marked) == [
        "B4: on one side only",
        "A1: The other half. is missing on the page",
        "A1: The half of it. is on the page, and nowhere else",
        "B3: Another reason. is missing on the page",
        "B3: Nobody knows how. is on the page, and nowhere else",
    ]


@pytest.mark.parametrize(
    ("catalogue", "ids", "wrong"),
    [
        (CATALOGUE, "A1 A2 A3 B1 B2", []),
        (CATALOGUE, "A1 A2 A3 B1", ["B2: no test is marked with it, and [reasons] of faults.toml does not say why"]),
        (CATALOGUE, "A1 A2 A3 B1 B2 B3", ["B3: has tests, and a reason why it has none"]),
        (CATALOGUE, "A1 A2 A3 B1 B2 B22", ["it is marked with B22, which is not in the catalogue"]),
        (Catalogue({"A": ""}, {"A1": "", "B1": ""}, {}), "A1 B1", ["B1: nobody's class"]),
        (Catalogue({"A": ""}, {"A1": ""}, {"A2": ""}), "A1", ["A2: a reason for what is no fault"]),
        (Catalogue({"A": ""}, {"A1": ""}, {}, {"A2": ""}), "A1", ["A2: a note on what is no fault"]),
        (
            Catalogue({"A": ""}, {"A1": "", "A2": ""}, {"A2": ""}, {"A2": ""}),
            "A1",
            ["A2: a note, and no test that it is about"],
        ),
    ],
)
def test_what_does_not_fit_together_is_told(catalogue: Catalogue, ids: str, wrong: list[str]) -> None:
    """Lines without tests, tests without lines, reasons without need."""
    assert catalogue.check([Marked("it", tuple(ids.split()), "")]) == wrong


def test_the_command_writes_the_page_and_checks_it(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit code 1 where something is wrong; checking writes nothing."""
    monkeypatch.setattr(faults, "marked_tests", lambda: marked_tests(made, made))
    monkeypatch.setattr(Catalogue, "read", lambda: CATALOGUE)
    page = made / "faults.md"
    assert faults.main(["--check", "--output", str(page)]) == 1
    assert not page.exists()
    assert faults.main(["--output", str(page)]) == 0
    assert faults.main(["--check", "--output", str(page)]) == 0
    page.write_text(page.read_text().replace("test_cases", "test_case"))
    assert faults.main(["--check", "--output", str(page)]) == 1
