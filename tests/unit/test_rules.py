"""Which paths take part, measured against git itself where git is there."""

from __future__ import annotations

import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from syncd.errors import ConfigError
from syncd.paths import ancestors
from syncd.rules import Rules

if TYPE_CHECKING:
    from pathlib import Path

TREE = [
    "a.txt",
    "b.log",
    "build/",
    "build/out.bin",
    "build/keep/",
    "build/keep/k.txt",
    "src/",
    "src/build",
    "src/main.py",
    "src/lib/",
    "src/lib/x.py",
    "src/lib/y.log",
    "docs/",
    "docs/private/",
    "docs/private/s.md",
    "docs/i.md",
    "#hash",
    "!bang",
    "sp ",
    "new\nline.log",
]


def taken(rules: Rules, tree: list[str] = TREE) -> set[str]:
    """What a walk would take: it enters only directories that may hold something."""
    out = set()
    for path in tree:
        name = path.rstrip("/")
        if all(rules.may_descend(above) for above in ancestors(name)) and rules.takes(name, is_dir=path != name):
            out.add(path)
    return out


def test_without_patterns_everything_takes_part() -> None:
    """All but what is syncd's own."""
    rules = Rules()
    assert taken(rules) == set(TREE)
    assert rules.may_descend("")
    assert not rules.takes(".syncd", is_dir=True)
    assert not rules.may_descend(".syncd")
    assert not rules.takes(".syncd/lock", is_dir=False)
    assert not rules.takes("a/.syncd", is_dir=True)
    assert not rules.may_descend("a/.Syncd")
    assert rules.takes(".syncdignore", is_dir=False)


@pytest.mark.parametrize(
    ("exclude", "gone"),
    [
        pytest.param(["*.log"], {"b.log", "src/lib/y.log", "new\nline.log"}, id="a base name anywhere"),
        pytest.param(["/*.log"], {"b.log", "new\nline.log"}, id="anchored"),
        pytest.param(["*.log", "!b.log"], {"src/lib/y.log", "new\nline.log"}, id="taken back"),
        pytest.param(["!b.log", "*.log"], {"b.log", "src/lib/y.log", "new\nline.log"}, id="last match wins"),
        pytest.param(
            ["build/"], {"build/", "build/out.bin", "build/keep/", "build/keep/k.txt"}, id="directories only"
        ),
        pytest.param(
            ["build/", "!build/keep/k.txt"],
            {"build/", "build/out.bin", "build/keep/", "build/keep/k.txt"},
            id="below an excluded directory nothing comes back",
        ),
        pytest.param(["build/*", "!build/keep/"], {"build/out.bin"}, id="a directory inside comes back"),
        pytest.param(["**/lib/**"], {"src/lib/x.py", "src/lib/y.log"}, id="inside, not itself"),
        pytest.param(
            ["*", "!*/", "!*.py"],
            {path for path in TREE if not path.endswith(("/", ".py"))},
            id="only python files",
        ),
        pytest.param(["src/**/x.py", "# no", "", "\\#hash", "\\!bang", "sp\\ "],
            {"src/lib/x.py", "#hash", "!bang", "sp "}, id="double star, comment, escapes"),
    ],
)  # fmt: skip
def test_excluded_is_what_git_would_ignore(exclude: list[str], gone: set[str]) -> None:
    """Each row is a sentence of gitignore(5)."""
    assert set(TREE) - taken(Rules(exclude=exclude)) == gone


@pytest.mark.parametrize(
    ("include", "expected"),
    [
        pytest.param(["*.py"], {"src/main.py", "src/lib/x.py"}, id="only matching files"),
        pytest.param(["lib/"], {"src/lib/", "src/lib/x.py", "src/lib/y.log"}, id="a directory and all below"),
        pytest.param(["/src/lib/x.py"], {"src/lib/x.py"}, id="one path"),
        pytest.param(["docs/", "!docs/private/"], {"docs/", "docs/i.md"}, id="but not that part of it"),
        pytest.param(["/src/**"], {p for p in TREE if p.startswith("src/") and p != "src/"}, id="inside"),
        pytest.param(["lib"], {"src/lib/", "src/lib/x.py", "src/lib/y.log"}, id="without a slash"),
        pytest.param(["nothing"], set(), id="no match"),
    ],
)
def test_included_is_what_matches_and_all_below_it(include: list[str], expected: set[str]) -> None:
    """A directory that is only an ancestor is not taken by itself, but it may be entered."""
    assert taken(Rules(include=include)) == expected


def test_exclude_overrules_include() -> None:
    """What is excluded never takes part."""
    assert taken(Rules(include=["src/"], exclude=["*.log", "build"])) == {
        "src/",
        "src/main.py",
        "src/lib/",
        "src/lib/x.py",
    }


def test_directories_that_cannot_hold_anything_are_not_entered() -> None:
    """An anchored include keeps the walk out of everything else."""
    rules = Rules(include=["/src/lib/*.py", "docs/**/x"])
    entered = {path for path in ("src", "src/lib", "src/lib/deep", "docs", "docs/a/b", "build", "src/other")
               if rules.may_descend(path)}  # fmt: skip
    assert entered == {"src", "src/lib", "docs", "docs/a/b"}
    assert not Rules(exclude=["build/"]).may_descend("build")
    assert Rules(include=["x"]).may_descend("any/where")
    assert Rules(include=["/src/*"]).may_descend("src/lib/below/a/match")
    assert not Rules(include=["!docs"]).may_descend("src")
    assert not Rules(include=["/x"]).may_descend("y")


def test_a_nested_ignore_file_counts_from_its_directory_and_overrules() -> None:
    """Nearer files win over farther ones and over the configuration, but not over an excluded directory."""
    rules = Rules(exclude=["*.log", "/build/"])
    root = rules.with_ignore_file("", "\ufeff!/b.log\r\n*.py\n")
    lib = root.with_ignore_file("src/lib", "!*.py\n/y.log\n")
    build = root.with_ignore_file("build", "!keep")
    assert not rules.takes("b.log", is_dir=False)
    assert root.takes("b.log", is_dir=False)
    assert not root.takes("src/lib/x.py", is_dir=False)
    assert lib.takes("src/lib/x.py", is_dir=False)
    assert not lib.takes("src/main.py", is_dir=False)
    assert not lib.takes("src/lib/y.log", is_dir=False)
    assert not build.takes("build/keep", is_dir=True)
    assert rules.with_ignore_file("src", "# nothing\n") is rules


@pytest.mark.parametrize("pattern", ["a[", "!", "x\\", "[z-a]", "//"])
def test_a_pattern_that_does_not_parse_is_named(pattern: str) -> None:
    """In the configuration it is an error; in an ignore file the other lines still count."""
    with pytest.raises(ConfigError) as caught:
        Rules(include=["ok"], exclude=["fine", pattern])
    assert repr(pattern) in caught.value.message
    with pytest.raises(ConfigError):
        Rules().with_ignore_file("", pattern)
    skipped: list[str] = []
    rules = Rules().with_ignore_file("", f"{pattern}\n*.log", skipped=skipped)
    assert len(skipped) == 1
    assert not rules.takes("b.log", is_dir=False)


def test_many_directories_are_not_all_remembered() -> None:
    """The memory of answers is bounded, and forgetting changes none."""
    rules = Rules(exclude=["x9*"])
    answers = {rules.takes(f"x{number}/f", is_dir=False) for number in range(5000) if str(number)[0] != "9"}
    assert answers == {True}
    assert not rules.takes("x99/f", is_dir=False)
    assert len(rules._dirs) < 2000


_SEGMENT = st.sampled_from(["a", "b", "*", "**", "a*", "?", "[ab]", "*.b", "c", "[!a]b"])
_PATTERN = st.builds(
    lambda negative, lead, segments, trail: negative + lead + "/".join(segments) + trail,
    st.sampled_from(["", "", "!"]),
    st.sampled_from(["", "/"]),
    st.lists(_SEGMENT, min_size=1, max_size=3),
    st.sampled_from(["", "/"]),
)
_LISTS = st.tuples(st.lists(_PATTERN, max_size=4), st.lists(_PATTERN, max_size=3))


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tree with every combination of the names down to three levels; files are called f."""
    if shutil.which("git") is None:
        pytest.skip("needs git")
    root = tmp_path_factory.mktemp("git")
    subprocess.run(["git", "init", "-q", root], check=True)
    for one in ("a", "b", "ab"):
        for two in ("a", "b", "a.b"):
            (root / one / two / "c").mkdir(parents=True)
            for name in ("a", "ab", "c"):
                if not (root / one / two / name).exists():
                    (root / one / two / name).touch()
            (root / one / two / "c" / "b").touch()
    (root / "c").touch()
    return root


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(_LISTS)
def test_any_lists_of_patterns_decide_as_git_does(repository: Path, lists: tuple[list[str], list[str]]) -> None:
    """A list at the root and one nested in a/: git and we take the same paths of the whole tree."""
    (repository / ".gitignore").write_text("\n".join(lists[0]))
    (repository / "a" / ".gitignore").write_text("\n".join(lists[1]))
    rules = Rules().with_ignore_file("", "\n".join(lists[0])).with_ignore_file("a", "\n".join(lists[1]))
    paths = sorted(
        str(path.relative_to(repository)) + "/" * path.is_dir()
        for path in repository.rglob("*")
        if ".git" not in path.parts and path.name != ".gitignore"
    )
    asked = subprocess.run(
        ["git", "-C", repository, "check-ignore", "--no-index", "-z", "--stdin"],
        input="\0".join(path.rstrip("/") for path in paths).encode(),
        stdout=subprocess.PIPE,
        check=False,
    )
    ignored = set(asked.stdout.decode().split("\0")) - {""}
    assert {path for path in paths if path not in taken(rules, paths)} == {
        path for path in paths if path.rstrip("/") in ignored
    }


_SMALL_TREE = [f"{a}/{b}/{c}" for a in ("a", "b", "ab") for b in ("a", "a.b") for c in ("a", "b", "c")]


@settings(max_examples=200, deadline=None)
@given(st.lists(_PATTERN, max_size=3), st.lists(_PATTERN, max_size=2))
def test_no_directory_that_holds_something_is_skipped(include: list[str], exclude: list[str]) -> None:
    """may_descend is False only where takes is False for all that is below."""
    rules = Rules(include, exclude)
    for path in _SMALL_TREE:
        if rules.takes(path, is_dir=False):
            assert all(rules.may_descend(above) for above in ancestors(path))


# -- patterns that a hostile publisher mirrors -------------------------------------------------------------------------


@pytest.mark.fault("O5")
@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    ("pattern", "path", "excluded"),
    [
        ("*?" * 12 + "\x01", "a" * 43, False),
        ("*a" * 100, "a" * 250, True),
        ("*a" * 100 + "b", "a" * 250, False),
        ("*[ab]" * 60 + "c", "ab" * 120, False),
        ("*" * 200 + "b", "a" * 250, False),
        ("x/" + "**/a/" * 8 + "b", "x/" + "a/" * 700 + "c", False),
        ("x/" + "**/a/" * 8 + "b", "x/" + "a/" * 700 + "b", True),
        ("/".join(["**/*a*a*a*"] * 8) + "/b", "/".join(["a" * 250] * 10), False),
    ],
    ids=lambda value: str(value)[:12],
)
def test_no_pattern_takes_for_ever(pattern: str, path: str, excluded: bool) -> None:
    """Ignore patterns of up to 200 stars are asked about long paths that almost match.

    The right answer comes within the test's time: stars are not tried in all ways.
    """
    rules = Rules().with_ignore_file("", pattern)
    assert rules.takes(path, is_dir=False) is not excluded
    assert rules.takes("free", is_dir=False)


@pytest.mark.fault("O5")
def test_a_path_of_a_thousand_directories_is_judged() -> None:
    """A path of 1,400 directories, as it may come from the wire, is asked about under including and excluding rules.

    Each answer is right, and none ends in an error.
    """
    path = "/".join("d" * 1400)
    rules = Rules(["d/"], ["x"])
    assert rules.takes(path, is_dir=False)
    assert rules.may_descend(path)
    assert not Rules(["e/"]).takes(path, is_dir=False)
    assert not Rules([], ["/d/d/d"]).takes(path, is_dir=False)


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("a/" * 5000 + "b", "longer than any path"),
        ("**/a/" * 9 + "b", "more than 8 times"),
        ("[[:alpha:]]x", "are not known"),
    ],
    ids=["long", "any", "class"],
)
def test_what_would_take_its_time_or_mean_something_else_does_not_parse(pattern: str, said: str) -> None:
    """In an ignore file it is told, and the other lines count."""
    with pytest.raises(ConfigError, match=said):
        Rules([pattern])
    skipped: list[str] = []
    rules = Rules().with_ignore_file("", f"{pattern}\nx", skipped=skipped)
    assert (len(skipped), rules.takes("x", is_dir=False)) == (1, False)
