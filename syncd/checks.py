"""What no single key can tell: whether the values fit together, and the disk fits them.

Used by ``syncd check`` and by the daemon at its start, which therefore say the same in the same words.
Nothing here changes anything.
"""

from __future__ import annotations

import ipaddress
import os
import shutil
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from urllib.parse import urlsplit

from syncd.errors import ConfigError
from syncd.hooks import PLACEHOLDERS, is_relative, placeholders
from syncd.paths import printable
from syncd.rules import Rules
from syncd.settings import failed, parse_owner, split_listen
from syncd.wiring import read_signer

if TYPE_CHECKING:
    from collections.abc import Callable

    from syncd.settings import Settings, SubscribeSettings
    from syncd.tomllines import Loc


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that does not fit, in the words that both ``syncd check`` and the daemon use.

    :ivar where: ``fleet.toml:12: publish.0.path``.
    """

    where: str
    text: str
    severity: Literal["error", "warning"] = "error"

    def __str__(self) -> str:
        return f"{self.where}: {self.text}"


def errors_of(settings: Settings, findings: list[Finding]) -> ConfigError | None:
    """Put the findings that forbid a start into one error; ``None`` where there are none."""
    problems = [(0, str(finding)) for finding in findings if finding.severity == "error"]
    return failed(settings.origin, problems) if problems else None


def problems_of(settings: Settings, *, resolve: Callable[[Path], str] = os.path.realpath) -> list[Finding]:
    """Check what no single key can tell: paths against paths, credentials against credentials.

    Pure but for ``resolve``, which follows symlinks so that paths are compared as the kernel sees them.
    """
    check = _Checks(settings, resolve)
    check.folders()
    check.roots()
    check.own_places()
    check.credentials()
    check.patterns()
    check.signing()
    check.hooks()
    check.embedded()
    if not settings.publish and not settings.subscribe:
        check.warn((), "nothing to do: there is no [[publish]] and no [[subscribe]]")
    return check.findings


def _inside(path: str, root: str) -> bool:
    return path == root or path.startswith(root.rstrip("/") + "/")


class _Checks:
    """Collects findings about one configuration."""

    def __init__(self, settings: Settings, resolve: Callable[[Path], str] = os.path.realpath) -> None:
        self.settings = settings
        self.resolve = resolve
        self.findings: list[Finding] = []
        self.sources: dict[Loc, str] = {
            ("publish", number, "path"): resolve(item.path) for number, item in enumerate(settings.publish)
        }
        self.mirrors: dict[Loc, str] = {
            ("subscribe", number, "path"): resolve(item.path) for number, item in enumerate(settings.subscribe)
        }

    def say(self, loc: Loc, text: str, severity: Literal["error", "warning"] = "error") -> None:
        origin = self.settings.origin
        where = ": ".join(filter(None, (origin.where(loc), ".".join(str(part) for part in loc))))
        self.findings.append(Finding(where, text, severity))

    def warn(self, loc: Loc, text: str) -> None:
        self.say(loc, text, "warning")

    def folders(self) -> None:
        """One bucket has one publisher; it may have several mirrors, on one host too."""
        seen: dict[str, int] = {}
        for number, item in enumerate(self.settings.publish):
            first = seen.setdefault(item.folder, number)
            if first != number:
                self.say(
                    ("publish", number, "folder"), f'folder "{item.folder}" is already published by publish.{first}'
                )
            if item.layout == "generations" and item.bucket.ttl_seconds is not None:
                self.say(
                    ("publish", number, "bucket", "ttl_seconds"),
                    'would take blobs away that generations need; use keep_days, or layout = "objects"',
                )

    def roots(self) -> None:
        """Refuse mirrors that overlap with one another or a source: A -> B -> A is a loop."""
        mirrors = list(self.mirrors.items())
        for number, (loc, mirror) in enumerate(mirrors):
            for other, root in mirrors[:number]:
                if mirror == root:
                    self.say(loc, f"{printable(mirror)} is already the mirror of {_name(other)}")
                elif _inside(mirror, root) or _inside(root, mirror):
                    self.say(loc, f"mirrors must not be nested: {printable(root)} is the mirror of {_name(other)}")
            for other, source in self.sources.items():
                if mirror == source:
                    self.say(
                        loc,
                        f"{printable(mirror)} is also the source of {_name(other)}: what arrives would be"
                        " published again; publish from the origin, or subscribe to a copy",
                    )
                elif _inside(mirror, source):
                    self.say(loc, f"mirror inside the source of {_name(other)} ({printable(source)})")
                elif _inside(source, mirror):
                    self.say(loc, f"the source of {_name(other)} ({printable(source)}) is inside this mirror")

    def own_places(self) -> None:
        """What syncd keeps for itself is neither distributed nor overwritten."""
        store = self.settings.nats_store_dir
        own: list[tuple[Loc, str, str]] = [
            (("daemon", "state_dir"), "the state directory", self.resolve(self.settings.daemon.state_dir))
        ]
        if store is not None:
            own.append((("nats", "embedded", "store_dir"), "the embedded server's store", self.resolve(store)))
        for roots, word in ((self.sources, "source"), (self.mirrors, "mirror")):
            for other, root in roots.items():
                for loc, what, place in own:
                    if _inside(place, root):
                        self.say(loc, f"{what} {printable(place)} is inside the {word} of {_name(other)}")
                    elif _inside(root, place):
                        self.say(other, f"the {word} is inside {what} {printable(place)}")

    def credentials(self) -> None:
        nats = self.settings.nats
        ways = [name for name in ("creds_file", "nkey_seed_file", "user", "token_file") if getattr(nats, name)]
        if len(ways) > 1:
            self.say(("nats", ways[1]), f"only one way to log in, but there are {' and '.join(ways)}")
        given = bool(nats.password.get_secret_value())
        if given and nats.password_file:
            self.say(("nats", "password_file"), "password and password_file are both given: keep password_file")
        if (given or nats.password_file) and not nats.user:
            self.say(("nats", "password" if given else "password_file"), "a password without nats.user")
        if nats.user and not given and not nats.password_file:
            self.say(("nats", "user"), "user without password_file (or password)")
        if bool(nats.tls.cert_file) != bool(nats.tls.key_file):
            has, lacks = ("cert_file", "key_file") if nats.tls.cert_file else ("key_file", "cert_file")
            self.say(("nats", "tls", has), f"{has} without {lacks}")
        if nats.domain and nats.prefix:
            self.say(("nats", "prefix"), "domain and prefix are both given, but a domain is a prefix")

    def patterns(self) -> None:
        for section in ("publish", "subscribe"):
            for number, item in enumerate(getattr(self.settings, section)):
                for key in ("include", "exclude"):
                    for index, pattern in enumerate(getattr(item, key)):
                        try:
                            Rules(exclude=(pattern,))
                        except ConfigError as exc:
                            self.say((section, number, key, index), exc.message)

    def signing(self) -> None:
        for number, source in enumerate(self.settings.publish):
            if source.layout != "generations":
                for key in ("sign_seed_file", "expire_hours"):
                    if getattr(source, key):
                        self.say(("publish", number, key), 'only generations are signed: layout = "generations"')
        for number, mirror in enumerate(self.settings.subscribe):
            keys = len(mirror.trusted_keys)
            if keys and mirror.trusted_threshold > keys:
                loc = ("subscribe", number, "trusted_threshold")
                self.say(loc, f"{mirror.trusted_threshold} signatures cannot come from {keys} keys")
            if not keys and mirror.trusted_threshold > 1:
                self.say(("subscribe", number, "trusted_threshold"), "without trusted_keys nothing is checked")

    def hooks(self) -> None:
        for number, mirror in enumerate(self.settings.subscribe):
            for name, known in PLACEHOLDERS.items():
                argv: tuple[str, ...] = getattr(mirror.hooks, name)
                loc = ("subscribe", number, "hooks", name)
                if argv and not argv[0]:
                    self.say(loc, "the program's name is empty")
                elif argv and is_relative(argv[0]):
                    self.say(loc, f"{printable(argv[0])} is a relative path: give a name, or an absolute path")
                if any("\0" in item for item in argv):
                    self.say(loc, "an argument holds a NUL, which no program can be given")
                for word in sorted(placeholders(argv) - known):
                    self.say(loc, f"{{{word}}} is not known to this hook: there is no staged tree any more")

    def embedded(self) -> None:
        nats = self.settings.nats
        if nats.embedded is None:
            return
        host, port = split_listen(nats.embedded.listen)
        if all((urlsplit(server).port or 4222) != port for server in nats.servers):
            self.warn(("nats", "servers"), f"none of them is the embedded server ({nats.embedded.listen})")
        if nats.embedded.config_file is None and not _is_loopback(host):
            self.warn(
                ("nats", "embedded", "listen"),
                "everybody who reaches this address may read and delete everything:"
                " use config_file with accounts, or 127.0.0.1",
            )


def _name(loc: Loc) -> str:
    return ".".join(str(part) for part in loc[:2])


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


# --- does the disk fit? -------------------------------------------------------------------------------------


def disk_findings(settings: Settings) -> list[Finding]:
    """Look at the files and directories that the configuration names. Blocking; changes nothing."""
    check = _Checks(settings)
    for number, item in enumerate(settings.publish):
        _check_source(check, ("publish", number, "path"), item.path)
        _check_seed(check, ("publish", number, "sign_seed_file"), item.sign_seed_file)
    for number, mirror in enumerate(settings.subscribe):
        _check_writable(check, ("subscribe", number, "path"), mirror.path)
        _check_mirror(check, number, mirror)
    _check_writable(check, ("daemon", "state_dir"), settings.daemon.state_dir)
    nats = settings.nats
    if settings.nats_store_dir is not None and nats.embedded is not None:
        _check_writable(check, ("nats", "embedded", "store_dir"), settings.nats_store_dir)
        _check_file(check, ("nats", "embedded", "config_file"), nats.embedded.config_file, secret=False)
    for key in ("creds_file", "nkey_seed_file", "password_file", "token_file"):
        _check_file(check, ("nats", key), getattr(nats, key), secret=True)
    _check_file(check, ("nats", "tls", "ca_file"), nats.tls.ca_file, secret=False)
    _check_file(check, ("nats", "tls", "cert_file"), nats.tls.cert_file, secret=False)
    _check_file(check, ("nats", "tls", "key_file"), nats.tls.key_file, secret=True)
    _check_secrets_outside(check)
    file = settings.origin.file
    if file is not None and ("nats", "password") in settings.origin.lines and _world_readable(file):
        check.warn(("nats", "password"), f"everybody on this host may read {printable(str(file))}: use password_file")
    return check.findings


def _world_readable(path: Path) -> bool:
    try:
        return bool(path.stat().st_mode & stat.S_IROTH)
    except OSError:
        return False


def _may(path: Path, what: int) -> bool:
    """Ask for the effective user: with ambient capabilities the real one says no although open() works."""
    return os.access(path, what, effective_ids=True)


def _check_source(check: _Checks, loc: Loc, path: Path) -> None:
    shown = printable(str(path))
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        check.warn(loc, f"{shown} does not exist: it will be published when it appears")
    except OSError as exc:
        check.say(loc, f"{shown} cannot be read: {exc.strerror}")
    else:
        if not stat.S_ISDIR(mode):
            check.say(loc, f"{shown} is not a directory")
        elif not _may(path, os.R_OK | os.X_OK):
            check.say(loc, f"{shown} cannot be read: it needs read and search permission")


def _check_writable(check: _Checks, loc: Loc, path: Path) -> None:
    """Check that a directory can be written to or, where it is missing, be made."""
    shown = printable(str(path))
    at = path
    while True:
        try:
            mode = at.stat().st_mode
        except FileNotFoundError:
            if at.is_symlink():
                check.say(loc, f"{shown}: {printable(str(at))} is a symlink to nothing")
                return
            at = at.parent
            continue
        except OSError as exc:
            check.say(loc, f"{shown} cannot be used: {exc.strerror}")
            return
        break
    if not stat.S_ISDIR(mode):
        check.say(loc, f"{shown}: {printable(str(at))} is not a directory")
    elif not _may(at, os.W_OK | os.X_OK):
        what = "is not writable" if at == path else f"cannot be made: {printable(str(at))} is not writable"
        check.say(loc, f"{shown} {what}")


def _check_seed(check: _Checks, loc: Loc, path: Path | None) -> None:
    _check_file(check, loc, path, secret=True)
    if path is None or not path.is_file() or not _may(path, os.R_OK):
        if path is not None and path.exists() and not path.is_dir() and not path.is_file():
            check.say(loc, f"{printable(str(path))} is no regular file")
        return
    try:
        read_signer(path)
    except ConfigError as error:
        check.say(loc, error.message)


def _check_mirror(check: _Checks, number: int, mirror: SubscribeSettings) -> None:
    for name in PLACEHOLDERS:
        argv: tuple[str, ...] = getattr(mirror.hooks, name)
        if argv and not is_relative(argv[0]) and "{" not in argv[0] and shutil.which(argv[0]) is None:
            check.warn(("subscribe", number, "hooks", name), f"{printable(argv[0])} is no program that can be run here")
    current = mirror.path / "current"
    if mirror.mode == "release" and os.path.lexists(current) and not current.is_symlink():
        what = f"{printable(str(current))} is no symlink: release mode needs that name"
        check.say(("subscribe", number, "path"), what)
    if mirror.owner and parse_owner(mirror.owner)[0] not in {-1, os.geteuid()} and not _may_chown():
        check.warn(("subscribe", number, "owner"), "needs root or CAP_CHOWN, which this user does not have")


def _may_chown() -> bool:
    """Tell whether this process has CAP_CHOWN, the first of Linux's capabilities (capabilities(7))."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return True
    found = [line.split()[1] for line in lines if line.startswith("CapEff:")]
    return not found or bool(int(found[0], 16) & 1)


def _check_secrets_outside(check: _Checks) -> None:
    """Refuse a secret within a source: it would be distributed."""
    settings = check.settings
    nats = settings.nats
    secrets: list[tuple[Loc, Path | None]] = [
        (("publish", number, "sign_seed_file"), item.sign_seed_file) for number, item in enumerate(settings.publish)
    ]
    secrets += [(("nats", key), getattr(nats, key)) for key in ("creds_file", "nkey_seed_file", "password_file")]
    secrets += [(("nats", "token_file"), nats.token_file), (("nats", "tls", "key_file"), nats.tls.key_file)]
    for loc, path in secrets:
        if path is None:
            continue
        at = check.resolve(path)
        for number, item in enumerate(settings.publish):
            source = check.sources["publish", number, "path"]
            if not _inside(at, source) or at == source:
                continue
            if Rules(item.include, item.exclude).takes(os.path.relpath(at, source), is_dir=False):
                check.say(
                    loc, f"{printable(at)} is a secret inside the source of publish.{number}, which distributes it"
                )


def _check_file(check: _Checks, loc: Loc, path: Path | None, *, secret: bool) -> None:
    if path is None:
        return
    shown = printable(str(path))
    try:
        mode = path.stat().st_mode
    except OSError as exc:
        check.say(loc, f"{shown}: {exc.strerror}")
        return
    if stat.S_ISDIR(mode):
        check.say(loc, f"{shown} is a directory")
    elif not _may(path, os.R_OK):
        check.say(loc, f"{shown} cannot be read: it needs read permission")
    elif secret and mode & stat.S_IROTH:
        check.warn(loc, f"{shown} is a secret that everybody on this host may read: chmod o= it")
