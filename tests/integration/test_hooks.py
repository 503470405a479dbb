"""Hooks, with real programs: whatever one does, it has an outcome, and no process of it is left."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import json
import os
import resource
import signal
import subprocess
import sys
import textwrap
import time
import tracemalloc
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest
from structlog.testing import capture_logs

from syncd import hookguard, hooks
from syncd.errors import DiskProblem
from syncd.hooks import (
    Hook,
    HookOutcome,
    Report,
    changed_line,
    child_environment,
    fill,
    placeholders,
    read_report,
    reason_of,
    run_health,
    run_hook,
    shown,
    write_changed_file,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

LONG = 60.0
"""A timeout that is never reached: the machine may be slow."""
FOREVER = 1000
"""What a child sleeps that somebody has to end."""


def shell(script: str, timeout: float = LONG) -> Hook:
    return Hook("apply", ("/bin/sh", "-c", textwrap.dedent(script)), timeout)


def python(script: str, timeout: float = LONG) -> Hook:
    return Hook("apply", (sys.executable, "-I", "-S", "-c", textwrap.dedent(script)), timeout)


async def run(hook: Hook, cwd: Path, *, values: dict | None = None, environ: dict | None = None) -> HookOutcome:
    return await run_hook(hook, values=values or {}, environ=environ or {}, cwd=cwd)


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() not in {psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD}
    except psutil.NoSuchProcess:
        return False


def pids_in(directory: Path) -> list[int]:
    """The processes whose numbers a hook wrote, one file each."""
    return [int(text) for path in sorted(directory.glob("pid*")) if (text := path.read_text().strip())]


def names_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def open_descriptors() -> int:
    return len(names_in(Path("/proc/self/fd")))


async def until(condition: Callable[[], object], seconds: float = 30) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)


@pytest.fixture(autouse=True)
def nothing_is_left(tmp_path: Path) -> Iterator[None]:
    """No test leaves a child of ours or a descriptor, and those it left on purpose are ended."""
    before = open_descriptors()
    children = set(psutil.Process().children())
    yield
    for pid in pids_in(tmp_path):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    assert set(psutil.Process().children()) <= children
    assert open_descriptors() <= before + 1  # the loop's own may come and go


# --- what a hook is told ---


@pytest.mark.parametrize(
    ("item", "filled"),
    [
        ("{staged}/nginx.conf", "/m/.syncd/check/nginx.conf"),
        ("--at={path}:{generation}", "--at=/srv/my mirror:17"),
        ("{folder}{folder}", "{generation}{generation}"),
        ("{{path}}", "{/srv/my mirror}"),
        ("{unknown} {} { path} {PATH} ${HOME} %s {path", "{unknown} {} { path} {PATH} ${HOME} %s {path"),
        ("", ""),
    ],
)
def test_placeholders_are_replaced_once_and_nothing_else_is_touched(item, filled):
    """What stands for a placeholder is text, also where it looks like one."""
    values = {
        "staged": "/m/.syncd/check",
        "path": "/srv/my mirror",
        "generation": "17",
        "folder": "{generation}",
        "unknown": "no placeholder",
    }
    assert fill([item], values) == [filled]


def test_a_placeholder_without_a_value_stays_as_it_is():
    assert fill(["{staged}/x", "{path}"], {"path": "/m"}) == ["{staged}/x", "/m"]


def test_placeholders_of_an_argv_can_be_asked_for():
    assert placeholders(["a", "{staged}/{path}", "{other}"]) == {"staged", "path"}


@pytest.mark.fault("P8")
@pytest.mark.parametrize(
    "name",
    [
        "-rf",
        "a b",
        "$(touch pwned)",
        "`touch pwned`",
        "; touch pwned",
        "'\"",
        "%s%n",
        "a\nb",
        "*",
        "~",
        "{folder}",
        "\N{SNOWMAN}",
        "\\",
    ],
)
async def test_p8_names_reach_a_hook_as_text(tmp_path, name):
    """Names such as `$(touch pwned)`, `-rf` or one with a newline go to a real hook as argument and variable.

    They come back as they were, also from the list of changes, and nothing of them was run as shell text.
    """
    dir_fd = os.open(tmp_path, os.O_RDONLY)
    write_changed_file(dir_fd, "changes", [("M", name)])
    os.close(dir_fd)
    hook = Hook(
        "apply",
        (
            *(sys.executable, "-I", "-S", "-c"),
            "import json, os, sys; print(json.dumps([sys.argv[1:], os.environ['SYNCD_PATH']]), end='')",
            *("{path}", "x{path}x"),
        ),
        LONG,
    )
    outcome = await run(hook, tmp_path, values={"path": name, "folder": "no"}, environ={"SYNCD_PATH": name})
    assert outcome.ok, outcome
    assert json.loads(outcome.output) == [[name, f"x{name}x"], name]
    letter, text = (tmp_path / "changes").read_text().removesuffix("\n").split("\t")
    assert (letter, json.loads(f'"{text}"')) == ("M", name)
    assert not (tmp_path / "pwned").exists()


async def test_an_argv_is_no_shell_text(tmp_path):
    """Nothing in it is expanded, globbed or split."""
    outcome = await run(Hook("check", ("echo", "$HOME", "*", "a;b", "a  b", "|cat"), LONG), tmp_path)
    assert outcome.output == "$HOME * a;b a  b |cat"


ECHO_ENVIRONMENT = "import json, os; print(json.dumps(dict(os.environ)))"


@pytest.mark.fault("K14")
async def test_k14_a_hook_gets_its_own_environment_and_no_secret_of_ours(tmp_path, monkeypatch):
    """Our environment is given passwords, keys, LD_PRELOAD and PYTHONPATH; a real hook prints its own.

    It has what the documentation names and nothing else.
    """
    for key in list(os.environ):
        if key.startswith("LC_"):
            monkeypatch.delenv(key)
    ours = {
        "SYNCD_NATS__PASSWORD": "hunter2",
        "SYNCD_CRASH_POINT": "x",
        "SYNCD_STAGED": "an old one",
        "AWS_SECRET_ACCESS_KEY": "hunter2",
        "NOTIFY_SOCKET": "/run/notify",
        "LD_PRELOAD": "",
        "PYTHONPATH": "/nowhere",
    }
    told = {"SYNCD_FOLDER": "app", "SYNCD_GENERATION": "7", "SYNCD_PATH": "/m"}
    kept = {
        "HOME": "/home/x",
        "LANG": "C.UTF-8",
        "LC_TIME": "de_DE.UTF-8",
        "TZ": "UTC",
        "USER": "x",
        "LOGNAME": "x",
        "TMPDIR": "/tmp",
        "PATH": os.environ["PATH"],
    }
    for key, value in (ours | kept).items():
        monkeypatch.setenv(key, value)
    outcome = await run(python(ECHO_ENVIRONMENT), tmp_path, environ=told)
    found = json.loads(outcome.output)
    assert found.pop("LC_CTYPE", None) in {None, "C.UTF-8"}  # Python says so of itself in the C locale
    path = [part for part in kept.pop("PATH").split(":") if part.startswith("/")]
    assert found.pop("PATH").split(":") == path
    assert found == kept | told | {"SYNCD_HOOK": "apply"}


@pytest.mark.parametrize(
    ("own", "path"),
    [
        ("/usr/bin:/bin", "/usr/bin:/bin"),
        (":/bin:", "/bin"),
        (".:/bin:bin", "/bin"),
        ("", os.defpath),
        (".", os.defpath),
    ],
)
def test_no_program_is_looked_for_in_the_mirror(own, path):
    """An empty or relative directory of PATH would be the working directory: content that the publisher decides."""
    assert child_environment("check", {}, {"PATH": own})["PATH"] == path


@pytest.mark.parametrize(
    "named", ["surprise", "./surprise", "bin/surprise", "../{folder}/surprise", "{folder}/surprise"]
)
@pytest.mark.fault("R1")
async def test_a_program_in_the_working_directory_is_never_run(tmp_path, monkeypatch, named):
    """A program is planted in a hook's working directory, `.` leads PATH, and the hook names it bare or relatively.

    It is not run; the outcome says that it is not there, or a relative path.
    """
    monkeypatch.setenv("PATH", f".::{os.environ['PATH']}")
    for name in ("surprise", "bin/surprise", f"{tmp_path.name}/surprise"):
        program = tmp_path / name
        program.parent.mkdir(exist_ok=True)
        program.write_text("#!/bin/sh\necho ran\n")
        program.chmod(0o755)
    outcome = await run(Hook("check", (named,), LONG), tmp_path, values={"folder": tmp_path.name})
    assert (outcome.ok, outcome.code, outcome.output) == (False, None, "")
    assert "relative path" in outcome.reason if "/" in named else "is not there" in outcome.reason


async def test_a_program_of_a_tree_that_is_named_is_run(tmp_path):
    """``{path}`` and ``{staged}`` are absolute, and said by whoever wrote the configuration."""
    program = tmp_path / "program"
    program.write_text("#!/bin/sh\necho ran in $PWD\n")
    program.chmod(0o755)
    for word in ("path", "staged"):
        hook = Hook("check", (f"{{{word}}}/program",), LONG)
        outcome = await run_hook(hook, values={word: str(tmp_path)}, environ={})
        assert outcome.output == "ran in /"


async def test_hooks_begin_in_a_directory_of_nobody(tmp_path):
    """What looks for code in its working directory (``python -m``) finds none that a publisher wrote."""
    assert (await run_hook(shell("pwd"), values={}, environ={})).output == "/"
    outcome = await run_health(shell("pwd"), tries=1, pause=0, deadline=LONG, values={}, environ={})
    assert outcome.output == "/"


async def test_a_hook_starts_as_from_a_login(tmp_path):
    """Default signals, nothing blocked, a session of its own, /dev/null to read, no descriptor but three."""
    script = """
        import os
        print(os.getsid(0) == os.getpid() == os.getpgid(0), os.readlink("/proc/self/fd/0"), os.getcwd())
        print(os.getsid(os.getppid()) == os.getppid())  # the guard is not in ours either
        print(sorted(os.listdir("/proc/self/fd"), key=int)[:-1])  # the last one reads this directory
    """
    signals = ("grep", "-E", "^Sig(Ign|Blk)", "/proc/self/status")  # neither shell nor Python: they change them
    standard_input = os.dup(0)
    inheritable = os.open(__file__, os.O_RDONLY)
    os.set_inheritable(inheritable, True)
    os.dup2(inheritable, 0)
    ignored = [signal.SIGHUP, signal.SIGUSR1, signal.SIGPIPE, signal.SIGQUIT]
    before = [signal.signal(number, signal.SIG_IGN) for number in ignored]
    unblocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2, signal.SIGTERM})
    try:
        seen = await run(python(script), tmp_path)
        plain = await run(Hook("apply", signals, LONG), tmp_path)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, unblocked)
        for number, handler in zip(ignored, before, strict=True):
            signal.signal(number, handler)
        os.dup2(standard_input, 0)
        os.close(standard_input)
        os.close(inheritable)
    assert plain.output.split() == ["SigBlk:", "0" * 16, "SigIgn:", "0" * 16]
    assert seen.output.splitlines() == [f"True /dev/null {tmp_path}", "True", "['0', '1', '2']"]


async def test_more_descriptors_than_select_can_count_are_no_trouble(tmp_path):
    """The pipes to the guard keep the numbers that they have in the daemon."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 2048:
        pytest.skip("the hard limit of open files is below 2048")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2048), hard))
    held: list[int] = []
    try:
        while not held or held[-1] < 1100:
            held.append(os.open("/dev/null", os.O_RDONLY))
        assert (await run(shell("echo fine"), tmp_path)).output == "fine"
    finally:
        for fd in held:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# --- how a hook ends ---


async def test_a_good_hook_tells_code_output_and_time(tmp_path):
    outcome = await run(shell("echo one; echo two >&2; sleep 0.2"), tmp_path)
    assert outcome == HookOutcome("apply", True, 0, False, "one\ntwo", outcome.seconds, "")
    assert 0.2 <= outcome.seconds < LONG


@pytest.mark.fault("R1")
@pytest.mark.parametrize(
    ("script", "code", "reason"),
    [
        ("exit 3", 3, "exit code 3"),
        ("exit 127", 127, "exit code 127"),
        ("kill -KILL $$", -9, "killed by SIGKILL"),
        ("kill -TERM $$", -15, "killed by SIGTERM"),
        ("kill -40 $$", -40, "killed by signal 40"),
    ],
)
async def test_r1_a_hook_that_fails_or_is_killed(tmp_path, script, code, reason):
    """A shell hook ends with exit code 3 or 127, or kills itself with SIGKILL, SIGTERM or signal 40.

    The outcome names the code or signal and keeps what was printed.
    """
    outcome = await run(shell(f"echo said; {script}"), tmp_path)
    assert outcome == HookOutcome("apply", False, code, False, "said", outcome.seconds, reason)


@pytest.mark.fault("R1")
async def test_r1_a_program_that_cannot_be_run_is_an_outcome(tmp_path):
    """A hook names a program that is absent, not executable, no program, a directory, or holds a NUL byte.

    Or its interpreter is missing, or an argument too long: each start fails with an outcome that says so in words.
    """
    files = {"plain": "#!/bin/sh\n", "no_shebang": "echo hello\n", "bad_shebang": "#!/no/such/interpreter\n"}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o644 if name == "plain" else 0o755)
    for program, part in [
        ("no-such-program", "no-such-program is not there"),
        ("/no/such/program", "/no/such/program is not there"),
        (f"{tmp_path}/plain", "/plain may not be executed"),
        (f"{tmp_path}/no_shebang", "is nothing the system can run"),
        (f"{tmp_path}/bad_shebang", "the program in its first line is not"),
        ("/tmp", "may not be executed"),
        (f"{tmp_path}/plain/x", "cannot be run: Not a directory"),
        ("./plain", "./plain is a relative path"),
        ("\x1b[2J", "\\x1b[2J is not there"),
        ("/bin/\0sh", "could not be started: embedded null byte"),
        ("/bin/echo", ""),
    ]:
        argv = (program, "x" * 3_000_000) if program == "/bin/echo" else (program,)
        outcome = await run(Hook("check", argv, LONG), tmp_path)
        assert (outcome.ok, outcome.code, outcome.timed_out, outcome.output) == (False, None, False, ""), program
        assert part in outcome.reason


async def test_a_working_directory_that_is_gone_is_an_outcome(tmp_path):
    outcome = await run(shell("echo ran"), tmp_path / "gone")
    assert (outcome.ok, outcome.code, outcome.output) == (False, None, "")
    assert outcome.reason == "its working directory cannot be entered: No such file or directory"


async def test_without_descriptors_a_hook_fails_in_words(tmp_path):
    """``code`` is ``None``: the hook gave no verdict."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (open_descriptors() + 2, hard))
    try:
        outcome = await run(shell("echo ran"), tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert (outcome.ok, outcome.code, outcome.timed_out) == (False, None, False)
    assert "could not be started: [Errno 24]" in outcome.reason


@pytest.mark.fault("R1")
async def test_r1_a_hook_that_hangs_is_asked_first(tmp_path):
    """A shell hook loops beyond its timeout of a second and answers SIGTERM with a word and exit code 0.

    It has failed by its timeout all the same, and the word is kept.
    """
    script = "trap 'echo asked; exit 0' TERM; echo begun; while :; do sleep 0.01; done"
    outcome = await run(shell(script, timeout=1), tmp_path)
    assert (outcome.ok, outcome.code, outcome.timed_out) == (False, 0, True)
    assert [line for line in outcome.output.splitlines() if line != "Terminated"] == ["begun", "asked"]  # sleep's end
    assert outcome.reason == "did not end within 1 s; it and all that it started was ended"
    assert outcome.seconds < hooks.GRACE_SECONDS + 1, "it was not waited for longer than it took"


@pytest.mark.fault("R1")
async def test_r1_a_hook_that_ignores_sigterm_is_killed(tmp_path, monkeypatch):
    """A shell hook ignores SIGTERM, SIGHUP and SIGINT and sleeps beyond its timeout.

    After its grace it is killed by SIGKILL, and nothing of it is alive.
    """
    monkeypatch.setattr(hooks, "GRACE_SECONDS", 0.5)
    script = f"echo $$ > pid; trap '' TERM HUP INT; while :; do sleep {FOREVER}; done"
    outcome = await run(shell(script, timeout=1), tmp_path)
    assert (outcome.ok, outcome.code, outcome.timed_out) == (False, -9, True)
    assert outcome.seconds >= 1.5, "it had its grace"
    assert not alive(*pids_in(tmp_path))


async def test_a_hook_that_stopped_itself_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(hooks, "GRACE_SECONDS", 0.2)
    outcome = await run(shell("kill -STOP $$", timeout=0.5), tmp_path)
    assert (outcome.ok, outcome.code, outcome.timed_out) == (False, -9, True)


@pytest.mark.fault("R1")
async def test_r1_a_hook_that_closes_its_output_and_sleeps_is_not_taken_for_done(tmp_path):
    """A shell hook closes input and output and sleeps beyond its timeout.

    It counts as timed out, not as done, and is ended.
    """
    script = f"echo $$ > pid; echo said; exec >&- 2>&- <&-; exec sleep {FOREVER}"
    outcome = await run(shell(script, timeout=1), tmp_path)
    assert (outcome.ok, outcome.timed_out, outcome.output) == (False, True, "said")
    assert not alive(*pids_in(tmp_path))


FORKS = {
    "child": f"sleep {FOREVER} & echo $! > pid1",
    "grandchild": f"(sleep {FOREVER} & echo $! > pid1; wait) & echo $! > pid2",
    "own session": f"setsid sh -c 'echo $$ > pid1; exec sleep {FOREVER}' &",
    "orphan": f"(sh -c 'echo $$ > pid1; exec sleep {FOREVER}' &)",
    "daemon": f"(setsid sh -c 'echo $$ > pid1; exec sleep {FOREVER}' >/dev/null 2>&1 </dev/null &)",
    "daemon without environment": (
        f"(env -i /usr/bin/setsid /bin/sh -c 'echo $$ > pid1; exec sleep {FOREVER}' >/dev/null 2>&1 </dev/null &)"
    ),
    "deaf daemon": f"(setsid sh -c 'trap \"\" TERM HUP; echo $$ > pid1; sleep {FOREVER}; :' >/dev/null 2>&1 &)",
    "disguised": (
        "cp /bin/sleep 'a) R 1 1 1'; "
        f"(setsid sh -c 'echo $$ > pid1; exec \"./a) R 1 1 1\" {FOREVER}' >/dev/null 2>&1 &)"
    ),
}


@pytest.mark.fault("R1")
async def test_r1_a_hung_hook_leaves_none_of_its_children(tmp_path, monkeypatch):
    """Eight hooks hang beyond their timeout, each with another kind of child.

    Forked twice, in a session of its own, without environment, deaf to SIGTERM or under an odd name: none is alive
    afterwards.
    """
    monkeypatch.setattr(hooks, "GRACE_SECONDS", 0.5)

    async def hang(number: int, kind: str) -> str:
        cwd = tmp_path / f"kind-{number}"
        cwd.mkdir()
        script = f"echo $$ > pid0; {FORKS[kind]}\nwhile ! [ -s pid1 ]; do sleep 0.01; done; sleep {FOREVER}"
        outcome = await run(shell(script, timeout=5), cwd)
        pids = pids_in(cwd)
        left = [pid for pid in pids if alive(pid)]
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        assert len(pids) >= 2, (kind, outcome)
        return kind if left or outcome.ok or not outcome.timed_out else ""

    found = await asyncio.gather(*(hang(number, kind) for number, kind in enumerate(FORKS)))
    assert set(found) == {""}


@pytest.mark.fault("R1")
async def test_r1_children_that_left_the_group_are_asked_first_too(tmp_path):
    """A hook hangs beyond its timeout, and so does a child in a session of its own that answers SIGTERM.

    The child gets SIGTERM too, and the time to write its farewell.
    """
    script = """
        (setsid sh -c 'trap "echo bye > farewell; exit" TERM; echo $$ > pid1; while :; do sleep 0.01; done' &)
        while ! [ -s pid1 ]; do sleep 0.01; done
        exec sleep 1000
    """
    outcome = await run(shell(script, timeout=2), tmp_path)
    assert outcome.code == -signal.SIGTERM
    assert (tmp_path / "farewell").read_text() == "bye\n"
    assert not alive(*pids_in(tmp_path))


@pytest.mark.fault("R1")
async def test_r1_a_hook_that_forks_without_end_is_ended(tmp_path, monkeypatch):
    """A hook that ignores SIGTERM starts up to 150 children that do too, each in a session of its own.

    At its timeout, in the midst of it, all are killed until nothing comes after.
    """
    monkeypatch.setattr(hooks, "GRACE_SECONDS", 0.2)
    script = f"""
        trap '' TERM HUP
        echo $$ > pid0
        n=0
        while [ $n -lt 150 ]; do
            n=$((n+1))
            (setsid sh -c 'trap "" TERM; echo $$ > pid1.'$n'; exec sleep {FOREVER}' >/dev/null 2>&1 &)
            sleep 0.01
        done
        sleep {FOREVER}
    """
    outcome = await run(shell(script, timeout=0.5), tmp_path)
    assert (outcome.timed_out, "could not be ended" in outcome.reason) == (True, False)
    assert len(pids_in(tmp_path)) > 1
    await until(lambda: not any(map(alive, pids_in(tmp_path))))


@pytest.mark.fault("R1")
async def test_r1_a_hook_that_kills_its_guard_has_an_outcome(tmp_path):
    """A shell hook kills its parent, the guard, with SIGKILL and sleeps on beside a child.

    The outcome says so, and hook and child are ended without the guard.
    """
    script = f"echo $$ > pid0; sleep {FOREVER} & echo $! > pid1; kill -9 $PPID; sleep {FOREVER}"
    outcome = await run(shell(script), tmp_path)
    assert (outcome.ok, outcome.code, outcome.timed_out) == (False, None, False)
    assert outcome.reason == "the process that guards it was killed"
    await until(lambda: not any(map(alive, pids_in(tmp_path))))


async def test_a_guard_that_does_not_answer_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(hooks, "GRACE_SECONDS", 0.1)
    monkeypatch.setattr(hooks, "SLACK_SECONDS", 0.3)
    outcome = await run(shell(f"echo $$ > pid0; kill -STOP $PPID; sleep {FOREVER}", timeout=0.5), tmp_path)
    assert (outcome.ok, outcome.timed_out) == (False, True)
    await until(lambda: not any(map(alive, pids_in(tmp_path))))


async def test_signals_to_everybody_do_not_loosen_the_guard(tmp_path):
    """An init that stops a unit may signal all of its processes; the daemon's word is what counts."""
    script = f"""
        echo $$ > pid0; (setsid sh -c 'echo $$ > pid1; exec sleep {FOREVER}' >/dev/null 2>&1 &)
        while ! [ -s pid1 ]; do sleep 0.01; done
        for s in TERM INT HUP QUIT USR1 USR2; do kill -$s $PPID; done
        sleep {FOREVER}
    """
    outcome = await run(shell(script, timeout=2), tmp_path)
    assert outcome.timed_out
    assert not any(map(alive, pids_in(tmp_path)))


# --- what a good hook leaves behind ---


async def test_a_good_hook_may_leave_a_daemon(tmp_path):
    """What detaches itself as it should lives on; it does not become ours to reap."""
    script = FORKS["daemon"] + "\nwhile ! [ -s pid1 ]; do sleep 0.01; done"
    outcome = await run(shell(script), tmp_path)
    assert (outcome.ok, outcome.reason) == (True, "")
    [pid] = pids_in(tmp_path)
    assert alive(pid)
    assert psutil.Process(pid).ppid() != os.getpid()


@pytest.mark.parametrize("status", [0, 3])
async def test_a_child_that_holds_the_output_is_not_waited_for(tmp_path, status):
    """The verdict is the hook's own; that something still holds its output is said."""
    outcome = await run(shell(f"sleep {FOREVER} & echo $! > pid1; echo done; exit {status}"), tmp_path)
    assert (outcome.ok, outcome.code, outcome.output) == (status == 0, status, "done")
    expected = "exit code 3" if status else "it left a process behind that still holds its output"
    assert outcome.reason == expected
    assert outcome.seconds < LONG / 2
    assert alive(*pids_in(tmp_path))


async def test_what_a_child_says_right_after_the_end_is_kept(tmp_path):
    outcome = await run(shell("(sleep 0.2; echo late) & echo done"), tmp_path)
    assert (outcome.ok, outcome.output, outcome.reason) == (True, "done\nlate", "")


async def test_a_child_that_never_stops_writing_is_not_waited_for(tmp_path):
    outcome = await run(shell("yes & echo $! > pid1"), tmp_path)
    assert outcome.ok
    assert outcome.seconds < LONG / 2


# --- output ---


@pytest.mark.fault("R1")
async def test_r1_a_gigabyte_of_output_neither_stalls_nor_grows(tmp_path):
    """A shell hook prints 1 GiB.

    It ends well, our memory's peak stays below 4 MiB, and the last part of the output is kept.
    """
    tracemalloc.start()
    try:
        outcome = await run(shell("echo first; head -c 1073741824 /dev/zero | tr '\\0' x; echo; echo last"), tmp_path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert outcome.ok, outcome.reason
    assert peak < 4 * 1024 * 1024
    first, *rest = outcome.output.splitlines()
    dropped = 1073741824 + len("first\n\nlast\n") - hooks.OUTPUT_BYTES
    assert first == f"[{dropped} bytes before this were dropped]"
    assert rest == ["x" * (hooks.OUTPUT_BYTES - len("\nlast\n")), "last"]


async def test_output_is_printable(tmp_path):
    """Escapes of a terminal, undecodable bytes and line separators do not reach a log or a screen."""
    outcome = await run(shell(r"printf 'a\033[31mb\r\nc\td\000\377\n\n\342\200\256\303\274 end'"), tmp_path)
    assert outcome.output.splitlines() == [
        "a\\x1b[31mb",
        "c       d\\x00\\xff",
        "",
        "\\u202e\N{LATIN SMALL LETTER U WITH DIAERESIS} end",
    ]


@pytest.mark.parametrize(
    ("kept", "total", "text"),
    [
        (b"", 0, ""),
        (b"\n", 1, ""),
        (b"a", 1, "a"),
        (b"a\n\n", 3, "a\n"),
        (b"b\n", 4, "[2 bytes before this were dropped]\nb"),
    ],
)
def test_the_end_of_an_output_as_lines(kept, total, text):
    assert shown(kept, total) == text


async def test_each_hook_is_one_log_line_with_its_last_words(tmp_path):
    environ = {"SYNCD_GENERATION": "7", "SYNCD_FOLDER": "app"}
    with capture_logs() as lines:
        await run(shell("seq 30"), tmp_path, environ=environ)
        await run(shell(f"printf {'x' * 500}; exit 1"), tmp_path, environ=environ)
    done, failed = lines
    assert (done["event"], done["log_level"]) == ("hook_done", "info")
    assert (done["hook"], done["generation"], done["tries"], done["reason"]) == ("apply", "7", 1, "")
    assert (done["folder"], done["role"]) == ("app", "subscribe")
    assert done["output"].split() == [str(number) for number in range(11, 31)]
    assert (failed["event"], failed["log_level"]) == ("hook_failed", "warning")
    assert (failed["code"], failed["reason"], failed["output"]) == (1, "exit code 1", "x" * hooks.LOGGED_CHARACTERS)


# --- we stop, or die ---


@pytest.mark.fault("R1")
async def test_r1_a_cancelled_hook_leaves_nothing(tmp_path):
    """The task of a running hook is cancelled; hook and child, in a session of its own, both ignore SIGTERM.

    Both are gone before the cancellation goes on, within seconds.
    """
    script = f"trap '' TERM; echo $$ > pid0; {FORKS['deaf daemon']}\nwhile :; do sleep 0.05; done"
    task = asyncio.create_task(run(shell(script), tmp_path))
    await until(lambda: len(pids_in(tmp_path)) == 2)
    begun = time.monotonic()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not any(map(alive, pids_in(tmp_path)))
    assert time.monotonic() - begun < hooks.SHORT_GRACE_SECONDS + 2


async def test_a_cancelled_hook_is_asked_first(tmp_path):
    script = "trap 'echo bye > farewell; exit' TERM; echo $$ > pid0; while :; do sleep 0.01; done"
    task = asyncio.create_task(run(shell(script), tmp_path))
    await until(lambda: pids_in(tmp_path))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (tmp_path / "farewell").exists()


async def test_cancelling_shortens_the_grace_of_a_hook_whose_time_is_up(tmp_path, monkeypatch):
    """The daemon has five seconds for everything."""
    monkeypatch.setattr(hooks, "GRACE_SECONDS", LONG)
    script = "trap 'echo x > asked' TERM; echo $$ > pid0; while :; do sleep 0.05; done"
    task = asyncio.create_task(run(shell(script, timeout=0.5), tmp_path))
    await until((tmp_path / "asked").exists)
    begun = time.monotonic()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not alive(*pids_in(tmp_path))
    assert time.monotonic() - begun < hooks.SHORT_GRACE_SECONDS + 2


async def test_waiting_for_the_end_of_a_hook_costs_little(tmp_path, monkeypatch):
    """The end of the leash is seen once, not all the time."""
    monkeypatch.setattr(hooks, "SHORT_GRACE_SECONDS", 3.0)
    script = f"trap '' TERM; (setsid sleep {FOREVER} &) ; echo $$ > pid0; exec sleep {FOREVER}"
    task = asyncio.create_task(run(shell(script), tmp_path))
    await until(lambda: pids_in(tmp_path))
    task.cancel()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with pytest.raises(asyncio.CancelledError):
        await task
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5


async def test_a_hook_that_is_cancelled_at_once_does_not_begin_or_is_ended(tmp_path):
    for delay in (0, 0, 0.005, 0.02, 0.04):
        task = asyncio.create_task(run(shell(f"echo $$ > pid$$; exec sleep {FOREVER}"), tmp_path))
        await asyncio.sleep(delay)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert not any(map(alive, pids_in(tmp_path)))


async def test_a_second_cancellation_leaves_the_end_to_the_guard(tmp_path):
    before = set(psutil.Process().children())

    def children() -> set[psutil.Process]:
        return set(psutil.Process().children()) - before

    task = asyncio.create_task(run(shell("trap '' TERM; echo $$ > pid0; while :; do sleep 0.05; done"), tmp_path))
    await until(lambda: pids_in(tmp_path))
    for _ in range(2):
        task.cancel()
        await asyncio.sleep(0.05)
    assert task.cancelled(), "the second cancellation is not waited with"
    del task
    gc.collect()  # the process is not dropped with the task: Python would warn of that
    await until(lambda: not any(map(alive, pids_in(tmp_path))))
    await until(lambda: all(child.status() == psutil.STATUS_ZOMBIE for child in children()))
    assert (await run(shell("true"), tmp_path)).ok
    assert not children(), "the next one that begins reaps it"


DAEMON = """
import asyncio, sys
from pathlib import Path
from syncd.hooks import Hook, run_hook
hook = Hook("apply", ("/bin/sh", "-c", sys.argv[1]), 1000.0)
asyncio.run(run_hook(hook, values={}, environ={}, cwd=Path(sys.argv[2])))
"""


@pytest.mark.fault("R1")
async def test_r1_a_hook_does_not_outlive_a_killed_daemon(tmp_path):
    """The process that runs a hook, with a child in a session of its own, is killed by SIGKILL.

    Guard, hook and child end by themselves, so that the hook of the next start is alone.
    """
    script = f"echo $$ > pid0; {FORKS['daemon']}\nsleep {FOREVER}"
    daemon = subprocess.Popen([sys.executable, "-c", DAEMON, script, str(tmp_path)])
    try:
        await until(lambda: len(pids_in(tmp_path)) == 2)
        guard = psutil.Process(pids_in(tmp_path)[0]).ppid()
        assert all(map(alive, pids_in(tmp_path)))
    finally:
        daemon.kill()
        daemon.wait()
    await until(lambda: not any(map(alive, [guard, *pids_in(tmp_path)])))


# --- health ---


async def health(hook: Hook, cwd: Path, *, tries: int = 5, pause: float = 0.01, deadline: float = LONG) -> HookOutcome:
    return await run_health(hook, tries=tries, pause=pause, deadline=deadline, values={}, environ={}, cwd=cwd)


COUNTING = "echo x >> tries; "


def tries_in(directory: Path) -> int:
    return len((directory / "tries").read_text().split())


async def test_health_is_asked_until_it_is_good(tmp_path):
    with capture_logs() as lines:
        outcome = await health(shell(COUNTING + "[ $(wc -l < tries) -ge 3 ]"), tmp_path, pause=0.4)
    assert (outcome.ok, outcome.reason, tries_in(tmp_path)) == (True, "", 3)
    assert outcome.seconds >= 0.8, "two pauses"
    assert [(line["event"], line["tries"]) for line in lines] == [
        ("hook_tried_again", 1),
        ("hook_tried_again", 2),
        ("hook_done", 3),
    ]


async def test_health_fails_after_its_tries_with_the_last_reason(tmp_path):
    with capture_logs() as lines:
        outcome = await health(shell(COUNTING + "exit 7"), tmp_path, tries=3)
    assert (outcome.ok, outcome.code, tries_in(tmp_path)) == (False, 7, 3)
    assert outcome.reason.startswith("exit code 7 (try 3, after ")
    assert lines[-1]["event"] == "hook_failed"


async def test_health_does_not_begin_a_try_after_its_deadline(tmp_path):
    outcome = await health(shell(COUNTING + "exit 1"), tmp_path, tries=1000, pause=1, deadline=0.9)
    assert (outcome.ok, tries_in(tmp_path)) == (False, 1)
    assert outcome.seconds < 1


@pytest.mark.parametrize(("script", "ok"), [("exit 0", True), ("exit 1", False)])
async def test_health_without_time_is_tried_once(tmp_path, script, ok):
    outcome = await health(shell(COUNTING + script), tmp_path, pause=0, deadline=0)
    assert (outcome.ok, outcome.timed_out, tries_in(tmp_path)) == (ok, False, 1)


async def test_a_hung_health_is_cut_off_at_the_deadline(tmp_path):
    outcome = await health(shell(f"echo $$ > pid0; exec sleep {FOREVER}"), tmp_path, deadline=1)
    assert (outcome.ok, outcome.timed_out) == (False, True)
    assert 1 <= outcome.seconds < LONG / 2
    assert not alive(*pids_in(tmp_path))


async def test_a_try_has_no_more_than_the_hooks_own_time(tmp_path):
    script = COUNTING + f"[ $(wc -l < tries) -ge 2 ] || exec sleep {FOREVER}"
    outcome = await health(shell(script, timeout=1), tmp_path)
    assert (outcome.ok, tries_in(tmp_path)) == (True, 2)
    assert outcome.seconds < LONG / 2


# --- the list of changes ---


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    yield fd
    os.close(fd)


@pytest.mark.fault("P8")
@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("a/b c", "a/b c"),
        ("a\nb", "a\\nb"),
        ("a\tb", "a\\tb"),
        ('a"\\b', 'a\\"\\\\b'),
        ("\x1b[2J", "\\u001b[2J"),
        ("\x7f\x85\u2028", "\\u007f\\u0085\\u2028"),
        ("\udcff", "\\udcff"),
        ("\N{SNOWMAN}\U0001f600", "\N{SNOWMAN}\U0001f600"),
    ],
)
def test_p8_a_line_is_one_change_whatever_the_name_holds(path, text):
    """Names with newline, tab, quotes, escape sequences, line separators or a surrogate go into the list of changes.

    Each makes one line, from which the name can be read back.
    """
    line = changed_line("A", path)
    assert line == f"A\t{text}\n"
    assert json.loads(f'"{text}"') == path
    assert line.encode().decode().splitlines() == [line[:-1]]


def test_the_list_replaces_the_one_before_and_follows_no_link(tmp_path, directory):
    """It is private, and a link of its name, or of the one it is written under, leads nowhere."""
    outside = tmp_path / "outside"
    outside.write_text("precious")
    for name in ("changes", "changes.new"):
        (tmp_path / name).symlink_to(outside)
    assert write_changed_file(directory, "changes", [("A", "new"), ("M", "old"), ("D", "gone")]) == 3
    assert (tmp_path / "changes").read_text() == "A\tnew\nM\told\nD\tgone\n"
    assert (tmp_path / "changes").stat().st_mode & 0o777 == 0o600
    assert not (tmp_path / "changes").is_symlink()
    assert outside.read_text() == "precious"
    assert names_in(tmp_path) == ["changes", "outside"]
    assert write_changed_file(directory, "changes", []) == 0
    assert (tmp_path / "changes").read_bytes() == b""


def test_a_link_that_comes_back_is_not_followed(tmp_path, directory, monkeypatch):
    outside = tmp_path / "outside"
    outside.write_text("precious")
    unlink = os.unlink

    def unlink_and_plant(name: str, *, dir_fd: int) -> None:
        with contextlib.suppress(FileNotFoundError):
            unlink(name, dir_fd=dir_fd)
        os.symlink("outside", name, dir_fd=dir_fd)

    monkeypatch.setattr(os, "unlink", unlink_and_plant)
    with pytest.raises(DiskProblem, match="File exists"):
        write_changed_file(directory, "changes", [("A", "x")])
    assert outside.read_text() == "precious"


def test_a_list_that_fails_leaves_the_one_before(tmp_path, directory):
    def lines():
        yield "A", "one"
        raise RuntimeError("the index is gone")

    write_changed_file(directory, "changes", [("A", "before")])
    with pytest.raises(RuntimeError, match="the index is gone"):
        write_changed_file(directory, "changes", lines())
    assert (tmp_path / "changes").read_text() == "A\tbefore\n"
    assert names_in(tmp_path) == ["changes"]


@pytest.mark.fault("X1")
def test_a_full_disk_is_a_disk_problem(tmp_path, directory):
    """A list of 100,000 changes is written for a hook under a file size limit of 4 KiB (RLIMIT_FSIZE).

    It is a DiskProblem, the list of before stays, and no draft is left.
    """
    write_changed_file(directory, "changes", [("A", "before")])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(DiskProblem, match="the list of changes for the hooks cannot be written"):
            write_changed_file(directory, "changes", (("A", f"f{number}") for number in range(100_000)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert (tmp_path / "changes").read_text() == "A\tbefore\n"
    assert names_in(tmp_path) == ["changes"]


def test_a_long_list_needs_no_memory(tmp_path, directory):
    tracemalloc.start()
    try:
        count = write_changed_file(directory, "changes", (("M", f"directory/file-{n}") for n in range(50_000)))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert count == 50_000
    assert peak < 1024 * 1024


# --- the guard's small decisions ---


def stat_line(name: str, state: str, parent: int, group: int, threads: int = 1) -> bytes:
    return f"77 ({name}) {state} {parent} {group} 5 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 {threads} 0 99 100".encode()


@pytest.mark.parametrize(
    ("line", "found"),
    [
        (stat_line("sleep", "S", 12, 13), (12, 13)),
        (stat_line("a) R 1 1", "D", 12, 13), (12, 13)),
        (stat_line("a\n(b", "T", 12, 13), (12, 13)),
        (stat_line("sleep", "Z", 12, 13), None),
        (stat_line("sleep", "X", 12, 13, threads=0), None),
        (stat_line("first thread ended", "Z", 12, 13, threads=2), (12, 13)),
    ],
)
def test_the_guard_reads_what_the_kernel_says_of_a_process(line, found):
    assert hookguard.parse_stat(line) == found


def test_the_guard_reads_this_process():
    assert hookguard.running()[os.getpid()] == (os.getppid(), os.getpgrp())


def test_descendants_are_all_below_and_nobody_else():
    parents = {1: 0, 2: 1, 3: 2, 4: 3, 5: 1, 6: 3, 7: 7}
    processes = {pid: (parent, 0) for pid, parent in parents.items()}
    assert hookguard.descendants(2, processes) == {3, 4, 6}
    assert hookguard.descendants(7, processes) == {7}
    assert hookguard.descendants(9, processes) == set()


@pytest.mark.parametrize(
    ("status", "signalled"),
    [
        (None, [("group", 2), ("process", 4)]),
        (0, [("process", 2), ("process", 3), ("process", 4)]),  # reaped: the number of the group may be another's
    ],
)
def test_nobody_gets_a_signal_twice(monkeypatch, status, signalled):
    """Many programs take a second SIGTERM as "at once": the group gets one, the strays theirs."""
    found: list[tuple[str, int]] = []
    monkeypatch.setattr(hookguard, "running", lambda: {1: (0, 1), 2: (1, 2), 3: (2, 2), 4: (2, 4), 5: (0, 5)})
    monkeypatch.setattr(os, "getpid", lambda: 1)
    monkeypatch.setattr(os, "killpg", lambda pid, _: found.append(("group", pid)))
    monkeypatch.setattr(os, "kill", lambda pid, _: found.append(("process", pid)))
    guard = object.__new__(hookguard.Guard)  # a real one would change the signals of this process
    guard._hook, guard._status = 2, status
    guard._signal(signal.SIGTERM)
    assert sorted(found) == signalled


def test_a_hook_without_a_session_yet_and_what_cannot_be_signalled_keep_nobody_from_the_signal(monkeypatch):
    """The hook is not in a group of its own yet, one process has ended, and one is another user's."""
    found: list[int] = []
    monkeypatch.setattr(hookguard, "running", lambda: {1: (0, 1), 2: (1, 1), 3: (2, 1), 4: (2, 4), 5: (2, 5)})
    monkeypatch.setattr(os, "getpid", lambda: 1)

    def killpg(*_: int) -> None:
        raise ProcessLookupError(errno.ESRCH, "no such group")

    def kill(pid: int, _: int) -> None:
        found.append(pid)
        if pid in {3, 4}:
            raise OSError(errno.ESRCH if pid == 3 else errno.EPERM, "refused")

    monkeypatch.setattr(os, "killpg", killpg)
    monkeypatch.setattr(os, "kill", kill)
    guard = object.__new__(hookguard.Guard)
    guard._hook, guard._status = 2, None
    guard._signal(signal.SIGTERM)
    assert sorted(found) == [2, 3, 4, 5]


@pytest.mark.parametrize(("status", "left"), [(None, {2}), (0, set())])
def test_a_hook_counts_as_alive_until_it_is_reaped_whatever_proc_says(monkeypatch, status, left):
    """Where /proc cannot be read nobody is found below the guard: it must not take the hook for ended."""
    monkeypatch.setattr(hookguard, "running", dict)
    guard = object.__new__(hookguard.Guard)
    monkeypatch.setattr(guard, "_reap", lambda: None)
    guard._hook, guard._status = 2, status
    assert guard._alive() == left


def test_a_guard_whose_daemon_is_gone_already_begins_nothing(tmp_path):
    """The leash has ended before the hook began."""
    leash, pull = os.pipe()
    output, report = os.pipe()
    os.close(pull)
    words = [str(leash), str(report), "5", "5", str(tmp_path), "/bin/sh", "-c", "echo ran > ran"]
    guard = [sys.executable, "-I", "-S", hookguard.__file__, *words]
    subprocess.run(guard, pass_fds=(leash, report), check=True, timeout=LONG)
    os.close(report)
    os.close(leash)
    with os.fdopen(output, "rb") as file:
        assert file.read() == b""
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("data", "report"),
    [
        (b"", Report()),
        (b"pid 7\nexit 3\n", Report(7, 3)),
        (b"pid 7\nsignal 9\nleft 8 9\n", Report(7, -9, None, (8, 9))),
        (b"error exec 2\npid 7\nexit 127\n", Report(7, None, ("exec", 2))),
    ],
)
def test_what_the_guard_tells_is_read(data, report):
    assert read_report(data) == report


@pytest.mark.parametrize(
    ("report", "timeout", "reason"),
    [
        (Report(), None, "the process that guards it did not start"),
        (Report(7), None, "the process that guards it was killed"),
        (
            Report(7, -15, None, (8, 9)),
            60.0,
            "did not end within 60 s; it and all that it started was ended; could not be ended: 8, 9",
        ),
        (Report(7, None, ("exec", errno.ELOOP)), None, "p cannot be run: Too many levels of symbolic links"),
        (Report(7, 0), None, ""),
    ],
)
def test_reasons_in_words(report, timeout, reason):
    assert reason_of(report, "p", timeout, held=False) == reason
