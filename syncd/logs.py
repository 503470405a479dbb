"""Log lines: for people on a terminal, JSON lines for machines otherwise.

Rules kept here:
 * one event is one line (on the console a traceback follows, indented), whatever names and messages hold;
 * a stderr that is closed, broken or full never disturbs the program: lines are dropped, counted,
   and the loss is told as soon as a line goes through again;
 * other libraries log through the same renderer, from warning upwards;
 * tracebacks never show local variables: those may be secrets.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import sys
import threading
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, TextIO

import structlog

from syncd.paths import printable

if TYPE_CHECKING:
    from collections.abc import Callable

    from structlog.typing import EventDict, Processor, WrappedLogger

LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}
FORMATS = ("auto", "console", "json")


def configure(level: str, format: str, stream: TextIO | None = None) -> None:  # noqa: A002
    """Send everything that is logged, here and by other libraries, to one stream.

    :param level: a key of :data:`LEVELS`; other libraries are heard from warning upwards.
    :param format: ``console``, ``json``, or ``auto``: console where the stream is a terminal.
    :param stream: standard error unless given.
    """
    writer = LineWriter(sys.stderr if stream is None else stream)
    console = format == "console" or (format == "auto" and writer.is_terminal)
    render = console_renderer(colors=writer.is_terminal) if console else render_json
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True, key="ts"),
        structlog.processors.StackInfoRenderer(),
        structlog.processors.format_exc_info,  # plain: no local variables
    ]
    writer.notice = lambda count: render(
        None, "warning", {"ts": _now(), "level": "warning", "event": "log_lines_dropped", "count": count}
    )
    logger = structlog.WriteLogger(writer)  # type: ignore[arg-type]
    structlog.configure(
        processors=[*shared, render],
        wrapper_class=structlog.make_filtering_bound_logger(LEVELS[level]),
        logger_factory=lambda *_: logger,
        cache_logger_on_first_use=False,  # a reload configures again
    )
    handler = logging.StreamHandler(writer)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[structlog.stdlib.add_logger_name, *shared],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, render],
        )
    )
    root = logging.getLogger()
    for old in root.handlers[:]:
        if getattr(old, "syncd", False):
            root.removeHandler(old)
    handler.syncd = True  # type: ignore[attr-defined]
    root.addHandler(handler)
    root.setLevel(max(logging.WARNING, LEVELS[level]))
    logging.captureWarnings(capture=True)


def _now() -> str:
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")


class LineWriter:
    """A text stream as loggers want it, one whole line per write, that cannot fail. Thread-safe.

    Writes to the descriptor, past Python's buffer: a line that stays in the buffer of a broken pipe would be
    tried again when the interpreter ends, which turns the exit code into 120.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream
        self._lock = threading.Lock()
        self._fd: int | None = None
        self.dropped = 0
        self.notice: Callable[[int], str] = "log_lines_dropped count={}".format
        self.is_terminal = False
        if stream is not None:
            with contextlib.suppress(OSError, ValueError):  # closed, or no descriptor behind it
                self._fd = stream.fileno()
                self.is_terminal = stream.isatty()

    def write(self, text: str) -> int:
        """Write text that ends in a newline; what cannot be written is counted in ``dropped``."""
        with self._lock:
            if self.dropped:
                if not self._put(self.notice(self.dropped) + "\n"):
                    self.dropped += 1
                    return len(text)
                self.dropped = 0
            if not self._put(text):
                self.dropped += 1
        return len(text)

    def flush(self) -> None:
        """Nothing is ever held back."""

    def _put(self, text: str) -> bool:
        raw = text.encode("utf-8", "backslashreplace")
        try:
            if self._fd is not None:
                while raw:
                    raw = raw[os.write(self._fd, raw) :]
            elif self._stream is not None:
                self._stream.write(raw.decode())
                self._stream.flush()
        except (OSError, ValueError):  # ValueError: I/O operation on closed file
            return False
        return True


# --- JSON lines ---------------------------------------------------------------------------------------------

_ODD = re.compile(r"[^\x20-\x7e]")


def render_json(logger: WrappedLogger, name: str, event: EventDict) -> str:
    """Render ``ts``, ``level``, ``event``, then the fields, as a line of JSON that is safe in a terminal."""
    del logger, name
    first = {key: event.pop(key) for key in ("ts", "level", "event") if key in event}
    fields = {**first, **event}
    try:
        text = json.dumps(fields, default=_as_text, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError):  # NaN, keys that are no text, circles
        text = json.dumps({str(key): _as_text(value) for key, value in fields.items()}, ensure_ascii=False)
    return _ODD.sub(_json_escape, text)


def _json_escape(match: re.Match[str]) -> str:
    char = match[0]
    if printable(char) == char:
        return char
    return json.dumps(char)[1:-1] if char != "\x7f" else "\\u007f"


def _as_text(value: object) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, bytes | os.PathLike):
        return printable(os.fsdecode(value))
    if isinstance(value, BaseException):
        return f"{type(value).__name__}: {value}"
    return repr(value)


# --- console ------------------------------------------------------------------------------------------------


def console_renderer(*, colors: bool) -> Callable[[WrappedLogger, str, EventDict], str]:
    """Return a renderer for people: aligned, coloured on a terminal."""
    render = structlog.dev.ConsoleRenderer(
        colors=colors,
        timestamp_key="ts",
        sort_keys=False,
        exception_formatter=structlog.dev.plain_traceback,  # rich's shows local variables
    )

    def render_console(logger: WrappedLogger, name: str, event: EventDict) -> str:
        return render(logger, name, {printable(str(key)): _for_console(key, item) for key, item in event.items()})

    return render_console


def _for_console(key: str, value: Any) -> Any:
    if key in {"exception", "stack"} and isinstance(value, str):
        # Indented, so that a message with a line break cannot pass for a log line of its own.
        return "\n".join("    " + printable(line) for line in value.split("\n"))
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, os.PathLike | bytes | BaseException):
        return printable(_as_text(value))
    return value if value is None or isinstance(value, bool | int | float) else printable(repr(value))
