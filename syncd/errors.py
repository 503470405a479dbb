"""What can go wrong, in words for the person who has to mend it.

Every error answers three questions: what happened (the message), what to do next (``hint``) and what the
process does with it (``exit_code`` for commands, ``transient`` for daemons: try again, or wait for a person).
Exit codes follow sysexits.h and are documented in docs/cli.md.
"""

from __future__ import annotations

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_USAGE = 64
EXIT_UNAVAILABLE = 69
EXIT_TEMPFAIL = 75
EXIT_NOPERM = 77
EXIT_CONFIG = 78


class SyncdError(Exception):
    """The root of all errors that syncd raises on purpose.

    :param message: one line, what happened, with the names that matter.
    :param hint: one line, what to do next; empty where there is nothing to do.
    """

    exit_code = EXIT_FAILED
    transient = False

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class UsageError(SyncdError):
    """The command line asks for something that does not exist or does not fit together."""

    exit_code = EXIT_USAGE


class ConfigError(SyncdError):
    """The configuration is wrong; ``problems`` holds every problem found, one line each."""

    exit_code = EXIT_CONFIG

    def __init__(self, message: str, *, problems: tuple[str, ...] = (), hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.problems = problems


class Unavailable(SyncdError):
    """The server, JetStream or the bucket is not there, or is too old."""

    exit_code = EXIT_UNAVAILABLE
    transient = True


class BucketNotFound(Unavailable):
    """No bucket of this name exists (yet)."""


class NotPermitted(SyncdError):
    """The server refused our credentials, or a right we need."""

    exit_code = EXIT_NOPERM
    transient = True  # rights are granted and credentials rotated while we run


class StoreTimeout(SyncdError):
    """The server did not answer in time, or fell silent in the middle of an answer."""

    exit_code = EXIT_TEMPFAIL
    transient = True


class StoreFull(SyncdError):
    """The bucket or the server has no room for what was sent."""

    exit_code = EXIT_TEMPFAIL
    transient = True


class BucketSealed(SyncdError):
    """The bucket was sealed: nothing in it can change any more."""

    exit_code = EXIT_FAILED


class StoreRejected(SyncdError):
    """The server refused a request for a reason that trying again will not mend."""


class WriteConflict(SyncdError):
    """Somebody else wrote an object we hold to be ours since we last looked."""

    transient = True


class FolderTaken(SyncdError):
    """Another publisher distributes this folder; one of the two must stop."""


class ObjectGone(SyncdError):
    """An object, or its chunks, vanished or were replaced while being read: read the metadata again."""

    transient = True


class ObjectCorrupt(SyncdError):
    """An object's chunks do not match its metadata (size, count or digest), or the metadata is not readable."""


class BadSignatures(ObjectCorrupt):
    """What stands where signatures should be is no list of signatures."""


class Untrusted(SyncdError):
    """What the bucket offers is not signed as it must be, is older than what was seen, or contradicts it."""

    exit_code = EXIT_NOPERM


class FormatTooNew(SyncdError):
    """The bucket holds a format that a newer version wrote; this one would misread it."""


class LayoutMismatch(SyncdError):
    """The bucket has another layout than the configuration says; nothing is changed without being asked."""

    exit_code = EXIT_CONFIG


class BadName(SyncdError):
    """A name from the wire or from disk that must not be used as a path or object name."""


class FileChanged(SyncdError):
    """A file changed while it was read; it will be read again when it is quiet."""

    transient = True


class SafetyHalt(SyncdError):
    """A plan was refused because it would empty a folder or a mirror; a person has to allow it."""


class Locked(SyncdError):
    """Another syncd process holds this mirror or this state."""

    exit_code = EXIT_TEMPFAIL


class DiskProblem(SyncdError):
    """The local disk refused: no space, read-only, too many open files, an I/O error."""

    exit_code = EXIT_TEMPFAIL
    transient = True
