"""Logs: one event one line, harmless whatever it holds, and never an obstacle."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import structlog

from syncd import logs

EVIL = 'a\x1b[2J\n{"level":"info"}\r\u202egpj.exe\u2028\x7f\x9b\udcff'


@pytest.fixture(autouse=True)
def _restore():
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(capture=False)
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()


def configured(level: str = "info", style: str = "json") -> io.StringIO:
    stream = io.StringIO()
    logs.configure(level, style, stream)
    return stream


def events(stream: io.StringIO) -> list[dict]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_a_json_line_begins_with_time_level_and_event_in_utc():
    stream = configured()
    structlog.get_logger().info("file_applied", path="ファイル", bytes=3)
    (event,) = events(stream)
    assert list(event) == ["ts", "level", "event", "path", "bytes"]
    assert event["ts"].endswith("Z")
    assert event["ts"][10] == "T"
    assert (event["level"], event["event"], event["path"], event["bytes"]) == ("info", "file_applied", "ファイル", 3)
    assert "ファイル" in stream.getvalue()


def test_auto_is_json_unless_the_stream_is_a_terminal():
    stream = configured(style="auto")
    structlog.get_logger().info("x")
    assert events(stream)[0]["event"] == "x"
    leader, follower = os.openpty()
    with os.fdopen(follower, "w") as terminal:
        logs.configure("info", "auto", terminal)
        structlog.get_logger().info("file_applied", path="a")
        shown = os.read(leader, 4096).decode()
    os.close(leader)
    assert not shown.startswith("{")
    assert "file_applied" in shown
    assert "\x1b[" in shown  # colours


def test_a_console_that_is_no_terminal_has_no_colours():
    stream = configured(style="console")
    structlog.get_logger().info("file_applied", path="a")
    assert "\x1b" not in stream.getvalue()
    assert "path=a" in stream.getvalue()


@pytest.mark.parametrize(("level", "heard"), [("debug", 4), ("info", 3), ("warning", 2), ("error", 1)])
def test_levels_are_thresholds(level, heard):
    stream = configured(level)
    log = structlog.get_logger()
    log.debug("d")
    log.info("i")
    log.warning("w")
    log.error("e")
    assert len(events(stream)) == heard


@pytest.mark.fault("P3")
@pytest.mark.parametrize("style", ["json", "console"])
def test_no_name_can_forge_a_line_or_reach_the_terminal(style):
    """A name with line feeds, escape sequences, bidi marks and a lone surrogate is logged as value, key and event.

    As JSON and on the console, each event is one line that holds nothing unprintable.
    """
    stream = configured(style=style)
    log = structlog.get_logger()
    log.info("e", path=EVIL, **{"k\n\x1b": 1}, many=[EVIL, Path(EVIL)], table={EVIL: EVIL}, raw=b"\xff\n", p=Path(EVIL))
    log.info(EVIL)
    logging.getLogger("nats").warning("from %s", EVIL)
    text = stream.getvalue()
    assert text.count("\n") == 3
    assert len(text.splitlines()) == 3
    assert not [char for char in text if not char.isprintable() and char != "\n"]


@pytest.mark.fault("P3")
def test_json_lines_give_back_what_was_logged():
    """A name with line feeds, escape sequences, bidi marks and a lone surrogate is logged as JSON.

    Read again, the line gives back the very name.
    """
    stream = configured()
    structlog.get_logger().info("e", path=EVIL, n=None, f=1.5, t=True)
    (event,) = events(stream)
    assert (event["path"], event["n"], event["f"], event["t"]) == (EVIL, None, 1.5, True)


@pytest.mark.parametrize("style", ["json", "console"])
def test_a_traceback_belongs_to_its_event_and_shows_no_local_variables(style):
    def fails():
        password = "hunter2"  # noqa: F841
        raise OSError("cannot\n2026-01-01T00:00:00Z [info] forged" + EVIL)

    stream = configured(style=style)
    try:
        fails()
    except OSError:
        structlog.get_logger().exception("it_failed")
    text = stream.getvalue()
    assert "hunter2" not in text.replace('password = "hunter2"', "")
    assert "OSError" in text
    assert "\x1b" not in text
    lines = text.splitlines()
    if style == "json":
        assert len(lines) == 1
        assert json.loads(text)["level"] == "error"
    else:
        assert all(line.startswith("    ") for line in lines[1:])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1: 2, (1, 2): 3}, {1, 2}, ValueError("x"), object()])
def test_any_value_makes_a_valid_line(value):
    stream = configured()
    circle: list = []
    circle.append(circle)
    structlog.get_logger().info("e", value=value, circle=circle if isinstance(value, set) else 1)
    line = stream.getvalue()
    assert json.loads(line, parse_constant=pytest.fail)["event"] == "e"


def test_other_libraries_speak_through_the_same_renderer_from_warning_upwards():
    stream = configured("debug")
    logging.getLogger("asyncio").debug("quiet")
    logging.getLogger("watchfiles.main").info("quiet")
    logging.getLogger("nats.aio.client").warning("lost %d", 3)
    logging.getLogger("asyncio").error("Task exception was never retrieved", exc_info=ValueError("x"))
    first, second = events(stream)
    assert (first["event"], first["level"], first["logger"]) == ("lost 3", "warning", "nats.aio.client")
    assert first["ts"].endswith("Z")
    assert "ValueError: x" in second["exception"]


def test_python_warnings_are_log_lines_too():
    stream = configured()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(capture=True)
        warnings.warn("old", DeprecationWarning, stacklevel=1)
        logging.captureWarnings(capture=False)
    (event,) = events(stream)
    assert (event["level"], event["logger"]) == ("warning", "py.warnings")


def test_configuring_again_replaces_what_was_there():
    """A reload does."""
    log = structlog.get_logger()
    first = configured("error")
    second = configured("debug")
    log.debug("e")
    logging.getLogger("x").warning("w")
    assert first.getvalue() == ""
    assert [event["event"] for event in events(second)] == ["e", "w"]


def test_bound_context_is_part_of_the_line():
    stream = configured()
    structlog.contextvars.bind_contextvars(folder="app")
    structlog.get_logger().bind(generation=3).info("e")
    (event,) = events(stream)
    assert (event["folder"], event["generation"]) == ("app", 3)


@pytest.mark.fault("X1")
def test_a_full_disk_behind_stderr_is_survived_and_the_loss_is_told():
    """Logs go to /dev/full, and into a pipe that is swapped for /dev/full and back between lines.

    Nothing fails, and the first line that arrives again is preceded by how many were lost.
    """
    with Path("/dev/full").open("w") as full:
        logs.configure("info", "json", full)
        log = structlog.get_logger()
        log.info("lost")
        log.info("lost")
        logging.getLogger("x").warning("lost")
    reading, writing = os.pipe()
    with os.fdopen(writing, "w") as pipe:
        writer = logs.LineWriter(pipe)
        writer.notice = "dropped {}".format
        broken = os.open("/dev/full", os.O_WRONLY)
        saved = os.dup(writing)
        os.dup2(broken, writing)
        writer.write("one\n")
        writer.write("two\n")
        assert writer.dropped == 2
        os.dup2(saved, writing)
        writer.write("three\n")
        assert writer.dropped == 0
        os.close(broken)
        os.close(saved)
    with os.fdopen(reading) as got:
        assert got.read() == "dropped 2\nthree\n"


def test_closed_missing_and_odd_streams_are_survived(monkeypatch):
    """Logs go to a stream that is closed, to one that refuses its descriptor and all writes, and to a stderr of None.

    Logging goes on without an error; what a stream that is good again gets begins with how many lines were lost, and
    loggers that spoke to the bad ones speak to the good one that comes after them.
    """

    class Odd(io.StringIO):
        odd = True

        def write(self, text: str) -> int:
            if self.odd:
                raise OSError("odd")
            return super().write(text)

    closed, odd = io.StringIO(), Odd()
    closed.close()
    log, other = structlog.get_logger(), logging.getLogger("x")
    for stream in (closed, odd):
        logs.configure("info", "auto", stream)
        log.info("lost")
        other.error("lost")
    odd.odd = False
    log.info("heard")
    dropped, heard = events(odd)
    assert (dropped["count"], heard["event"]) == (2, "heard")
    monkeypatch.setattr(sys, "stderr", None)
    logs.configure("info", "auto")
    log.info("lost")
    other.error("lost")
    good = configured()
    log.info("heard")
    other.error("heard, too")
    assert [event["event"] for event in events(good)] == ["heard", "heard, too"]


def test_a_broken_stderr_pipe_changes_neither_the_work_nor_the_exit_code():
    """The reading end of a process's stderr pipe is closed before the process logs.

    It does its work and exits with 0.
    """
    code = (
        "import logging, sys, structlog\n"
        "from syncd import logs\n"
        "logs.configure('info', 'auto')\n"
        "sys.stdin.readline()\n"
        "for n in range(3): structlog.get_logger().info('e', n=n)\n"
        "logging.getLogger('nats').error('x')\n"
        "print('done')\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stderr is not None
        process.stderr.close()
        out, _ = process.communicate(b"go\n", timeout=60)
        assert (out, process.returncode) == (b"done\n", 0)


async def test_lines_of_many_threads_do_not_mix():
    """Lines that are longer than what a pipe takes at once, from our logger and from other libraries'."""
    reading, writing = os.pipe()

    def read_all() -> list[str]:
        with os.fdopen(reading) as got:
            return got.read().splitlines()

    def talk(name: int) -> None:
        for _ in range(5):
            if name % 2:
                structlog.get_logger().info("e", name=str(name), pad="x" * 100_000)
            else:
                logging.getLogger(str(name)).warning("x" * 100_000)

    lines = asyncio.create_task(asyncio.to_thread(read_all))
    with os.fdopen(writing, "w") as pipe:
        logs.configure("info", "json", pipe)
        await asyncio.gather(*(asyncio.to_thread(talk, name) for name in range(6)))
    events = [json.loads(line) for line in await lines]
    assert len(events) == 30
    assert {event.get("name", event.get("logger")) for event in events} == set("012345")
