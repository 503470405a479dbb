"""The state directory: who may use it, what is where in it.

    <state_dir>/lock                            held by the daemon; its text is the process id
    <state_dir>/<role>-<folder>-<tag>/index.db  one index per folder and path, locked by SQLite
    <state_dir>/status/<role>-<folder>-<tag>.json, daemon.json
    <state_dir>/allow/<role>-<folder>           a person's word on a safety halt, used once
    <state_dir>/pin/<folder>                    the generation that a person wants this host to stay at
    <state_dir>/nats/                           the embedded server's store

Status files are caches for people: written by rename, never synced; a torn or foreign one is ignored. A person's word,
and that it was used or taken back, is durable when the call returns: no power cut brings an old one back.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import time
from typing import TYPE_CHECKING, Any

from syncd.errors import DiskProblem, Locked
from syncd.status import Allowance, FolderStatus, path_tag

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

DAEMON_FILE = "daemon.json"
LOCK_TRIES = 10
PIN_DIGITS = 10
LOCK_WAIT_SECONDS = 0.02
_USER = "use the daemon's user"


class FileAllowance(Allowance):
    """A person's word as an empty file."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def give(self) -> None:
        """Allow the held plan.

        :raises DiskProblem: the state directory cannot be written.
        """
        try:
            self._file.touch()
            _sync(self._file.parent)
        except OSError as error:
            raise _refused(error, f"cannot write {self._file}", _USER) from error

    def given(self) -> bool:
        """See :class:`Allowance`."""
        return self._file.exists()

    def clear(self) -> None:
        """See :class:`Allowance`. A word that cannot be removed is taken for one that stands."""
        with contextlib.suppress(OSError):
            self._file.unlink(missing_ok=True)
            _sync(self._file.parent)  # else a power cut brings it back, and it allows what nobody has looked at


class Pin:
    """A person's pin of a folder on this host, as a small file."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def number(self) -> int:
        """Return the generation to stay at, 0 for none.

        :raises DiskProblem: it cannot be read, or is no number: nobody said that the channel may be followed again.
        """
        try:
            text = self._file.read_text("ascii").strip()
        except FileNotFoundError:
            return 0
        except OSError as error:
            raise DiskProblem(f"cannot read {self._file}: {error.strerror}", hint="use the daemon's user") from error
        except ValueError:
            text = ""
        if not text.isdigit() or len(text) > PIN_DIGITS:
            raise DiskProblem(
                f"the pin {self._file} is damaged",
                hint=f"say it again: syncd pin {self._file.name} N, or --clear",
            )
        return int(text)

    def set(self, number: int) -> None:
        """Stay at a generation; 0: follow the channel again.

        :raises DiskProblem: the state directory cannot be written.
        """
        try:
            if not number:
                self._file.unlink(missing_ok=True)
                _sync(self._file.parent)
                return
            _replace(self._file, f"{number}\n", durable=True)
        except OSError as error:
            raise _refused(error, f"cannot write {self._file}", _USER) from error


class StateDir:
    """One state directory. All methods block briefly."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def prepare(self) -> None:
        """Make the directory.

        :raises DiskProblem: it cannot be made or written.
        """
        try:
            self.root.mkdir(parents=True, exist_ok=True, mode=0o750)
            for name in ("status", "allow", "pin"):
                (self.root / name).mkdir(exist_ok=True)
        except OSError as error:
            hint = "set daemon.state_dir to a directory that this user may write"
            raise _refused(error, f"cannot use the state directory {self.root}", hint) from error

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the directory for one daemon.

        :raises Locked: another daemon has it.
        """
        try:
            descriptor = os.open(self.root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o640)
        except OSError as error:
            raise _refused(error, f"cannot lock the state directory {self.root}", _USER) from error
        try:
            if not _flock(descriptor):
                holder = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip()
                raise Locked(
                    f"state directory {self.root} is in use by another syncd (process {holder or 'unknown'})",
                    hint="stop it, or give this one a daemon.state_dir of its own",
                )
            with contextlib.suppress(OSError):  # a full disk: the number is for people, what counts is held already
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
            _sweep_drafts(self.root / "status")
            _sweep_drafts(self.root / "pin")
            yield
        finally:
            os.close(descriptor)

    def index_file(self, role: str, folder: str, path: Path) -> Path:
        """Return where a folder's index lives."""
        return self.root / f"{role}-{folder}-{path_tag(str(path))}" / "index.db"

    def allowance(self, role: str, folder: str) -> FileAllowance:
        """Return where a person's word on a folder's safety halt is found."""
        return FileAllowance(self.root / "allow" / f"{role}-{folder}")

    def pin(self, folder: str) -> Pin:
        """Return where a person's pin of a folder is found."""
        return Pin(self.root / "pin" / folder)

    # -- status ----------------------------------------------------------------------------------------------------

    def write_status(self, name: str, data: dict[str, Any]) -> None:
        """Replace one status file.

        :raises OSError: the disk refuses; a status is not worth stopping for, the caller decides.
        """
        _replace(self.root / "status" / name, json.dumps(data), durable=False)

    def drop_status(self, name: str) -> None:
        """Remove one status file."""
        (self.root / "status" / name).unlink(missing_ok=True)

    def read_status(self) -> tuple[dict[str, Any] | None, list[FolderStatus]]:
        """Return what the daemon wrote: its own record (``None``: never ran here) and the folders, sorted."""
        folders: list[FolderStatus] = []
        for file in sorted((self.root / "status").glob("[!.]*.json")):
            data = _read_json(file)
            if data is None or file.name == DAEMON_FILE:
                continue
            with contextlib.suppress(ValueError, KeyError, TypeError):
                folders.append(FolderStatus.from_json(data))
        return _read_json(self.root / "status" / DAEMON_FILE), folders

    def daemon_runs(self) -> bool:
        """Tell whether a daemon holds the directory now."""
        try:
            descriptor = os.open(self.root / "lock", os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
        else:
            return False
        finally:
            os.close(descriptor)


def _flock(descriptor: int) -> bool:
    """Take the lock; a ``syncd status`` that looks at it at this moment is waited for."""
    for _ in range(LOCK_TRIES):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(LOCK_WAIT_SECONDS)
        else:
            return True
    return False


def _replace(file: Path, text: str, *, durable: bool) -> None:
    """Replace a small file by rename; where the disk refuses, the old one stays and nothing is left beside it.

    :raises OSError: the disk refuses.
    """
    draft = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        with draft.open("w") as opened:
            opened.write(text)
            opened.flush()
            if durable:
                os.fsync(opened.fileno())
        draft.replace(file)
        if durable:
            _sync(file.parent)
    except OSError:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)
        raise


def _sweep_drafts(directory: Path) -> None:
    """Remove what processes that were killed in :func:`_replace` have left: drafts end with the number of theirs."""
    with contextlib.suppress(OSError):  # it is litter, and can wait for the next start
        for draft in directory.glob(".*.*"):
            number = draft.name.rpartition(".")[2]
            if number.isdecimal() and not _is_running(int(number)):
                draft.unlink(missing_ok=True)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def _sync(directory: Path) -> None:
    """Make the names in a directory durable.

    :raises OSError: the disk refuses.
    """
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _refused(error: OSError, what: str, hint: str) -> DiskProblem:
    """Word an OSError.

    :param hint: what to do unless it is room that lacks.
    """
    full = error.errno in {errno.ENOSPC, errno.EDQUOT}
    return DiskProblem(f"{what}: {error.strerror}", hint="free some space, or inodes (df -i)" if full else hint)


def _read_json(file: Path) -> dict[str, Any] | None:
    try:
        data = json.loads(file.read_text())
    except (OSError, ValueError):
        return None
    return data if isinstance(data, dict) else None
