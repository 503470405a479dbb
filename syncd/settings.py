"""The configuration at the door: TOML and environment in, frozen plain values out.

Rules kept here:
 * the only importer of pydantic; what leaves this module are attributes with units in their names;
 * unknown keys are refused, in the file and in the environment, and a key of a later version is refused by
   name, so that nobody believes, for example, that a signature is checked;
 * all problems are reported at once, each with its line; no message holds a password, nor the value of an
   unknown key;
 * relative paths belong to the configuration file's directory, not to the one the daemon was started in;
 * an empty string means "not given" wherever it could mean nothing else (environment variables included), so
   that ``config/fleet.toml`` can show every key at its default.

Whether the values fit together, and the disk, is the business of :mod:`syncd.checks`.
"""

from __future__ import annotations

import difflib
import grp
import ipaddress
import json
import os
import pwd
import re
import socket
import tomllib
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Union, get_args, get_origin
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    SecretStr,
    Strict,
    TypeAdapter,
    ValidationError,
)
from pydantic_settings import BaseSettings, InitSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict

from syncd.errors import ConfigError
from syncd.hooks import VARIABLES
from syncd.modes import parse_modes
from syncd.paths import printable
from syncd.signatures import MAX_SIGNATURES, is_public
from syncd.tomllines import Loc, locate

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

ENV_PREFIX = "SYNCD_"
ENV_DELIMITER = "__"
ENV_OURS = frozenset({"SYNCD_CONFIG", "SYNCD_CRASH_POINT", "_SYNCD_COMPLETE"}) | VARIABLES
"""Variables that begin like ours but are not keys."""

MAX_CONFIG_BYTES = 1 << 20
_MAX_SHOWN = 60

_LATER_KEYS: Mapping[tuple[str, str], str] = {
    ("daemon", "http"): "the metrics and health endpoint",
    ("subscribe", "rate_limit"): "limiting the rate",
}
_NOT_AVAILABLE = "is not available in this version of syncd"


# --- the door: what the validators below need to know of the world ------------------------------------------


@dataclass(frozen=True, slots=True)
class _Door:
    """Where relative paths begin, and the environment, for the duration of one :func:`load`."""

    base: Path
    environ: Mapping[str, str]


_door: ContextVar[_Door | None] = ContextVar("syncd_settings_door", default=None)


def _at_door() -> _Door:
    return _door.get() or _Door(Path.cwd(), os.environ)


def home_directory(environ: Mapping[str, str]) -> str:
    """Return the user's home directory.

    :raises ValueError: there is none (a service's user may have none).
    """
    try:
        return environ.get("HOME") or str(Path.home())
    except RuntimeError:
        raise ValueError("this user has no home directory: give an absolute path") from None


def anchored(text: str, door: _Door) -> Path:
    """Make a path absolute as the kernel would; a leading ``~/`` is the home directory.

    Symlinks are resolved only as far as the last ``..`` needs it: a root that is itself a symlink stays one,
    because it may be pointed elsewhere while we run.
    """
    if text == "~" or text.startswith("~/"):
        text = home_directory(door.environ) + text[1:]
    path = door.base / text
    if ".." not in path.parts:
        return path
    last = len(path.parts) - 1 - path.parts[::-1].index("..")
    above = os.path.realpath(Path(*path.parts[: last + 1]))  # unlike Path.resolve, no exception for a symlink loop
    return Path(above, *path.parts[last + 1 :])


def _path(value: object) -> object:
    if isinstance(value, Path):
        value = str(value)
    if not isinstance(value, str):
        raise ValueError("must be a path (a string)")  # noqa: TRY004 - pydantic collects only ValueError
    if value == "":
        raise ValueError("must not be empty")
    if "\0" in value:
        raise ValueError("must not hold a NUL byte")
    return anchored(value, _at_door())


def _maybe_path(value: object) -> object:
    return None if value is None or value == "" else _path(value)


def default_state_dir(environ: Mapping[str, str], *, root: bool) -> Path:
    """Return where indexes live unless told otherwise: the system's place for root, else the XDG one."""
    if root:
        return Path("/var/lib/syncd")
    state = environ.get("XDG_STATE_HOME", "")
    if state.startswith("/"):  # the XDG specification: a relative one is to be ignored
        return Path(state) / "syncd"
    return Path(home_directory(environ)) / ".local" / "state" / "syncd"


def _state_dir(value: object) -> object:
    if value == "":
        return default_state_dir(_at_door().environ, root=os.geteuid() == 0)
    return _path(value)


_HOST = re.compile(r"[A-Za-z0-9._-]{1,253}")


def _host(value: object) -> object:
    if value == "":
        name = socket.gethostname()
        return re.sub(r"[^A-Za-z0-9._-]", "-", name)[:253] or "localhost"
    if isinstance(value, str) and not _HOST.fullmatch(value):
        raise ValueError("only letters, digits, '.', '-' and '_', at most 253")
    return value


_FOLDER = re.compile(r"[A-Za-z0-9_-]+")
_MAX_FOLDER = 64


def _folder(value: str) -> str:
    if not _FOLDER.fullmatch(value):
        raise ValueError("only letters, digits, - and _")
    if len(value) > _MAX_FOLDER:
        raise ValueError(f"at most {_MAX_FOLDER} characters")
    return value


_SCHEMES = {"nats", "tls"}


def _server(value: str) -> str:
    try:
        url = urlsplit(value)
        port = url.port
    except ValueError:
        raise ValueError("must be a URL such as nats://host:4222") from None
    if url.scheme not in _SCHEMES or not url.hostname or port == 0 or url.query or url.fragment:
        raise ValueError("must be a URL such as nats://host:4222 (nats or tls)")
    if url.username is not None or url.password is not None:
        raise ValueError(
            "credentials do not belong into a URL, where logs and status would show them: "
            "use nats.user and nats.password_file, or nats.token_file"
        )
    return value


def _not_empty(value: tuple[str, ...]) -> tuple[str, ...]:
    if not value:
        raise ValueError("must not be empty")
    return value


def split_listen(listen: str) -> tuple[str, int]:
    """Split ``host:port`` (``[::1]:4222`` for IPv6); :class:`ValueError` where it is something else."""
    host, colon, port = listen.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = str(ipaddress.IPv6Address(host[1:-1]))
    elif ":" in host or not re.fullmatch(r"[A-Za-z0-9._-]+", host):
        raise ValueError("must be host:port")
    if not colon or not re.fullmatch(r"[0-9]{1,5}", port) or not 0 < int(port) < 1 << 16:
        raise ValueError("must be host:port, with a port from 1 to 65535")
    return host, int(port)


def _listen(value: str) -> str:
    try:
        split_listen(value)
    except ipaddress.AddressValueError:
        raise ValueError("must be host:port") from None
    return value


_UNITS = {
    "": 1, "B": 1,
    "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40,
}  # fmt: skip
_SIZE = re.compile(r"([0-9]{1,15})(?:\.([0-9]{1,6}))? ?([A-Za-z]{0,3})")


def parse_size(value: int | str) -> int:
    """Read a size in bytes: a whole number, or ``10GB`` (decimal), ``10GiB`` (binary).

    :raises ValueError: for anything else, and below zero.
    """
    if isinstance(value, int):
        if value < 0:
            raise ValueError("must not be negative")
        return value
    match = _SIZE.fullmatch(value.strip())
    if match is None or match[3].upper() not in _UNITS:
        raise ValueError('must be a number of bytes or a size such as "10GB" or "512MiB"')
    unit = _UNITS[match[3].upper()]
    fraction = match[2] or ""
    return int(match[1]) * unit + (int(fraction) * unit // 10 ** len(fraction) if fraction else 0)


def _max_bytes(value: object) -> object:
    if value is None or isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError('must be a number of bytes or a size such as "10GB"')
    return (parse_size(value) if value != "" else 0) or None


def _zero_is_none(value: object) -> object:
    return None if value == 0 and not isinstance(value, bool) else value


def _pattern(value: str) -> str:
    if not value.strip():
        raise ValueError("a pattern must not be empty")
    return value


_CHANNEL = re.compile(r"[A-Za-z0-9_-]+")


def _channel(value: str) -> str:
    if not _CHANNEL.fullmatch(value):
        raise ValueError("only letters, digits, - and _")
    if value.isdigit():
        raise ValueError("not digits alone: that would be a generation")
    if len(value) > _MAX_FOLDER:
        raise ValueError(f"at most {_MAX_FOLDER} characters")
    return value


def _trusted_key(value: str) -> str:
    if not is_public(value):
        raise ValueError("must be the public key that syncd keygen prints (U…)")
    return value


def _different(value: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(value)) != len(value):
        raise ValueError("names a key twice")
    if len(value) > MAX_SIGNATURES:
        raise ValueError(f"more than {MAX_SIGNATURES} keys")
    return value


def _modes(value: object) -> object:
    parse_modes(value)
    return value


def _rate(value: object) -> object:
    """Read bytes per second: a size, with or without ``/s``."""
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError('must be a rate such as "4MB/s"')  # noqa: TRY004 - pydantic collects only ValueError
    return parse_size(value.removesuffix("/s") if isinstance(value, str) else value)


_LABEL = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_MAX_META_BYTES = 4096


def _labels(value: dict[str, str]) -> dict[str, str]:
    for key, text in value.items():
        if not _LABEL.fullmatch(key):
            raise ValueError(f"label {printable(key)!r}: only letters, digits, '.', '-' and '_', at most 64")
        if printable(text) != text or len(text) > _MAX_SHOWN * 4:
            raise ValueError(f"label {key!r}: only printable text of at most {_MAX_SHOWN * 4} characters")
    return value


def _metadata(value: dict[str, str]) -> dict[str, str]:
    for key in value:
        if not key or printable(key) != key:
            raise ValueError("a key must be printable and not empty")
        if key.lower().startswith(("syncd-", "syncd.", "_nats.")):
            raise ValueError(f"key {key!r} is reserved")
    if sum(len(key.encode()) + len(text.encode()) for key, text in value.items()) > _MAX_META_BYTES:
        raise ValueError(f"more than {_MAX_META_BYTES} bytes in all")
    return value


_MAX_ID = (1 << 32) - 2  # the last one means "as it is" to chown(2)


def parse_owner(text: str) -> tuple[int, int]:
    """Read ``user``, ``user:group`` or ``:group``, by name or number; -1 stands for "as it is".

    A user alone brings its own group, as with chown's ``user:``.

    :raises ValueError: this host knows no such user or group.
    """
    user, _, group = text.partition(":")
    if (not user and not group) or ":" in group:
        raise ValueError('must be "user", "user:group" or ":group"')
    uid, gid = -1, -1
    if user:
        try:
            known = pwd.getpwuid(int(user)) if user.isdecimal() else pwd.getpwnam(user)
        except (KeyError, OverflowError):
            if not user.isdecimal():
                raise ValueError(f"no user {printable(user)!r} on this host") from None
            uid = int(user)
        else:
            uid, gid = known.pw_uid, known.pw_gid
    if group:
        try:
            gid = int(group) if group.isdecimal() else grp.getgrnam(group).gr_gid
        except KeyError:
            raise ValueError(f"no group {printable(group)!r} on this host") from None
    if max(uid, gid) > _MAX_ID:
        raise ValueError(f"an id is at most {_MAX_ID}")
    return uid, gid


def _owner(value: str) -> str:
    if value:
        parse_owner(value)
    return value


# TOML has types: "50" is no number, and true is not 1. The environment's text is converted before.
_Int = Annotated[int, Strict()]
_Float = Annotated[float, Strict(), Field(allow_inf_nan=False)]
_Bool = Annotated[bool, Strict()]
_Path = Annotated[Path, BeforeValidator(_path)]
_MaybePath = Annotated[Path | None, BeforeValidator(_maybe_path)]
_Folder = Annotated[str, AfterValidator(_folder)]
_Patterns = tuple[Annotated[str, AfterValidator(_pattern)], ...]
_Servers = Annotated[tuple[Annotated[str, AfterValidator(_server)], ...], AfterValidator(_not_empty)]
_Metadata = Annotated[dict[str, str], AfterValidator(_metadata)]
_SettleMs = Annotated[_Int, Field(ge=0, le=60_000)]
_RescanSeconds = Annotated[_Float, Field(ge=1, le=7 * 86_400)]


# --- the models ---------------------------------------------------------------------------------------------


class _Model(BaseModel):
    """Frozen, closed to unknown keys, never showing input in its errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)


class TlsSettings(_Model):
    """``[nats.tls]``: a private authority, a client certificate; a ``tls://`` URL needs none of it."""

    ca_file: _MaybePath = None
    cert_file: _MaybePath = None
    key_file: _MaybePath = None
    server_name: str = ""
    handshake_first: _Bool = False

    @property
    def wanted(self) -> bool:
        """Whether any key is set, so that TLS is demanded of the server whatever the URL says."""
        return self != TlsSettings()


class EmbeddedSettings(_Model):
    """``[nats.embedded]``: its presence makes the daemon run a nats-server of its own.

    :ivar listen: ``host:port``; where ``config_file`` decides the address, this must say the same.
    :ivar store_dir: ``None``: see :attr:`Settings.nats_store_dir`.
    """

    listen: Annotated[str, AfterValidator(_listen)] = "127.0.0.1:4222"
    store_dir: _MaybePath = None
    config_file: _MaybePath = None


class NatsSettings(_Model):
    """``[nats]``: which servers, as whom.

    :ivar domain: JetStream domain of a leaf node; "" for none.
    :ivar prefix: JetStream API prefix of an imported service; "" for none. Not together with ``domain``.
    """

    servers: _Servers = ("nats://127.0.0.1:4222",)
    creds_file: _MaybePath = None
    nkey_seed_file: _MaybePath = None
    user: str = ""
    password: SecretStr = SecretStr("")
    password_file: _MaybePath = None
    token_file: _MaybePath = None
    inbox_prefix: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*\z")] = "_INBOX"
    tls: TlsSettings = TlsSettings()
    domain: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]*\z")] = ""
    prefix: Annotated[str, Field(pattern=r"^([A-Za-z0-9_$-]+(\.[A-Za-z0-9_$-]+)*)?\z")] = ""
    embedded: EmbeddedSettings | None = None


class DaemonSettings(_Model):
    """``[daemon]``.

    :ivar host: this host's name in the fleet.
    :ivar labels: what else the fleet may know of this host.
    """

    state_dir: Annotated[Path, BeforeValidator(_state_dir)] = Field(default="", validate_default=True)
    host: Annotated[str, BeforeValidator(_host), Field(validate_default=True)] = ""
    labels: Annotated[dict[str, str], AfterValidator(_labels)] = {}
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["auto", "console", "json"] = "auto"


class PlacementSettings(_Model):
    """``[publish.bucket.placement]``: where in a cluster the bucket lives."""

    cluster: str = ""
    tags: tuple[str, ...] = ()


class BucketSettings(_Model):
    """``[publish.bucket]``: how to create the bucket; an existing one keeps what it has.

    :ivar max_bytes: bytes on the server, old chunks included; ``None`` for unlimited (0 in the file).
    :ivar ttl_seconds: objects older than this vanish; ``None`` for never (0 in the file).
    """

    description: Annotated[str, Field(max_length=1024)] = ""
    storage: Literal["file", "memory"] = "file"
    replicas: Annotated[_Int, Field(ge=1, le=5)] = 1
    max_bytes: Annotated[int | None, BeforeValidator(_max_bytes)] = None
    ttl_seconds: Annotated[Annotated[_Float, Field(ge=1)] | None, BeforeValidator(_zero_is_none)] = None
    placement: PlacementSettings = PlacementSettings()
    compression: _Bool = False
    metadata: _Metadata = {}


class PublishSettings(_Model):
    """One ``[[publish]]``: a source directory and the folder it becomes.

    :ivar grace_seconds: how long replaced and deleted content stays readable on the server.
    :ivar keep_generations, keep_days: what is kept at most, 0: no limit (generations layout).
    """

    folder: _Folder
    path: _Path
    layout: Literal["generations", "objects"] = "generations"
    compression: Literal["auto", "off"] = "auto"
    include: _Patterns = ()
    exclude: _Patterns = (".git/", "*.swp")
    settle_ms: _SettleMs = 20
    rescan_seconds: _RescanSeconds = 60.0
    keep_generations: Annotated[_Int, Field(ge=0, le=1_000_000)] = 50
    keep_days: Annotated[_Float, Field(ge=0, le=36_500)] = 30.0
    symlinks: Literal["inside", "all", "skip"] = "inside"
    max_delete_percent: Annotated[_Float, Field(ge=0, le=100)] = 50.0
    grace_seconds: Annotated[_Float, Field(ge=1, le=30 * 86_400)] = 600.0
    metadata: _Metadata = {}
    sign_seed_file: _MaybePath = None
    expire_hours: Annotated[_Float, Field(ge=0, le=87_600)] = 0.0
    bucket: BucketSettings = BucketSettings()


class HookSettings(_Model):
    """``[subscribe.hooks]``: programs as lists of arguments, never a shell's line (docs/hooks.md).

    :ivar timeout_seconds: how long one run may take.
    :ivar health_seconds: how long ``health`` is tried until it succeeds.
    :ivar max_failures: so often the hooks of one generation may begin without ending (crashes).
    """

    check: tuple[str, ...] = ()
    apply: tuple[str, ...] = ()
    health: tuple[str, ...] = ()
    timeout_seconds: Annotated[_Float, Field(ge=1, le=86_400)] = 60.0
    health_seconds: Annotated[_Float, Field(ge=0, le=86_400)] = 30.0
    max_failures: Annotated[_Int, Field(ge=1, le=100)] = 3


class SubscribeSettings(_Model):
    """One ``[[subscribe]]``: a folder and the mirror it is kept in.

    :ivar owner: whom everything in the mirror belongs to, see :func:`parse_owner`; "": whoever runs syncd.
    :ivar pin: the generation to stay at, whatever the channel says; 0: none.
    :ivar trusted_keys: non-empty: what ``trusted_threshold`` of them have not signed is refused.
    :ivar keep_releases, read_only, share: of release mode (docs/configuration.md).
    :ivar verify_rate: bytes per second that are read to find silent changes, 0: none.
    """

    folder: _Folder
    path: _Path
    mode: Literal["mirror", "release"] = "mirror"
    channel: Annotated[str, AfterValidator(_channel)] = "head"
    pin: Annotated[_Int, Field(ge=0, le=9_999_999_999)] = 0
    include: _Patterns = ()
    exclude: _Patterns = ()
    trusted_keys: Annotated[tuple[Annotated[str, AfterValidator(_trusted_key)], ...], AfterValidator(_different)] = ()
    trusted_threshold: Annotated[_Int, Field(ge=1, le=MAX_SIGNATURES)] = 1
    drift: Literal["repair", "report", "keep"] = "repair"
    extraneous: Literal["keep", "delete"] = "keep"
    verify_rate: Annotated[int, BeforeValidator(_rate)] = 4_000_000
    owner: Annotated[str, AfterValidator(_owner)] = ""
    modes: Annotated[Literal["preserve"] | dict[str, str], BeforeValidator(_modes)] = "preserve"
    keep_releases: Annotated[_Int, Field(ge=1, le=1000)] = 3
    read_only: _Bool = True
    share: Literal["auto", "reflink", "hardlink", "copy"] = "auto"
    hooks: HookSettings = HookSettings()
    rescan_seconds: _RescanSeconds = 60.0
    settle_ms: _SettleMs = 10


@dataclass(frozen=True, slots=True)
class Origin:
    """Where each key was written, for messages. Takes no part in comparing settings."""

    file: Path | None = field(default=None, compare=False)
    lines: Mapping[Loc, int] = field(default_factory=dict, compare=False)
    variables: Mapping[Loc, str] = field(default_factory=dict, compare=False)

    def where(self, loc: Loc) -> str:
        """Return ``fleet.toml:12`` or the variable's name for a key, or for the nearest table around it."""
        for end in range(len(loc), 0, -1):
            if loc[:end] in self.variables:
                return self.variables[loc[:end]]
            if loc[:end] in self.lines:
                return f"{self.name}:{self.lines[loc[:end]]}"
        return self.name

    @property
    def name(self) -> str:
        """What was read, for a person."""
        return printable(str(self.file)) if self.file else "environment"


class Settings(BaseSettings):
    """Everything a syncd process is told. Built by :func:`load`."""

    model_config = SettingsConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    nats: NatsSettings = NatsSettings()
    daemon: DaemonSettings = Field(default_factory=DaemonSettings)
    publish: tuple[PublishSettings, ...] = ()
    subscribe: tuple[SubscribeSettings, ...] = ()

    _origin: Origin = PrivateAttr(default_factory=Origin)

    layers: ClassVar[tuple[dict[str, Any], ...]] = ()
    """What to merge, the stronger one first; set by the subclass that :func:`load` makes."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Take what :func:`load` read: the environment is its argument, problems have a place."""
        del env_settings, dotenv_settings, file_secret_settings
        return (init_settings, *(InitSettingsSource(settings_cls, layer) for layer in cls.layers))

    @property
    def origin(self) -> Origin:
        """Where each key was written."""
        return self._origin

    @property
    def nats_store_dir(self) -> Path | None:
        """Where the embedded server stores; ``None`` where there is no embedded server."""
        if self.nats.embedded is None:
            return None
        return self.nats.embedded.store_dir or self.daemon.state_dir / "nats"

    def __eq__(self, other: object) -> bool:
        """Tell whether both say the same, wherever it was written (a reload asks this)."""
        return isinstance(other, Settings) and all(
            getattr(self, name) == getattr(other, name) for name in Settings.model_fields
        )

    __hash__ = None  # type: ignore[assignment]


# --- reading ------------------------------------------------------------------------------------------------


def load(path: Path | None, environ: Mapping[str, str]) -> Settings:
    """Read the configuration: defaults, then the file, then the environment (``SYNCD_DAEMON__HOST=web-17``).

    Blocking (reads one file, may resolve symlinks).

    :param path: the file; ``None``: the one that ``SYNCD_CONFIG`` names, else none at all.
    :raises ConfigError: with every problem found.
    """
    if path is None and environ.get("SYNCD_CONFIG"):
        path = Path(environ["SYNCD_CONFIG"])
    text = _read(path) if path is not None else ""
    data = _parse(path, text) if path is not None else {}
    lines = locate(text)
    layer, variables, problems = _from_environment(environ)
    origin = Origin(path, lines, variables)

    class Loaded(Settings):
        layers: ClassVar[tuple[dict[str, Any], ...]] = (layer, data)

    try:
        base = path.absolute().parent if path is not None else Path.cwd()
    except FileNotFoundError:
        raise ConfigError("the working directory is gone", hint="give --config an absolute path") from None
    token = _door.set(_Door(base, environ))
    try:
        settings = Loaded()
    except ValidationError as exc:
        problems += [_problem(error, origin) for error in exc.errors(include_url=False)]
    else:
        if not problems:
            settings._origin = origin  # noqa: SLF001 - its constructor, so to speak
            return settings
    finally:
        _door.reset(token)
    raise failed(origin, problems)


def failed(origin: Origin, problems: list[tuple[int, str]]) -> ConfigError:
    """Put (line, text) problems into one error, in the order of lines."""
    unique = tuple(dict.fromkeys(text for _, text in sorted(problems, key=lambda item: item[0])))
    count = f"{len(unique)} problem" + ("s" if len(unique) != 1 else "")
    return ConfigError(f"{origin.name}: {count}", problems=unique, hint="every key is explained in config/fleet.toml")


def _read(path: Path) -> str:
    shown = printable(str(path))
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_CONFIG_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError(f"{shown}: no such file", hint="give --config FILE or set SYNCD_CONFIG") from None
    except (OSError, ValueError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else "not a file name"
        raise ConfigError(f"{shown}: cannot be read: {reason}", hint="check its owner and mode") from exc
    if len(raw) > MAX_CONFIG_BYTES:
        raise ConfigError(f"{shown}: larger than {MAX_CONFIG_BYTES} bytes", hint="is it a configuration file?")
    try:
        return raw.decode()
    except UnicodeDecodeError as exc:
        line = raw.count(b"\n", 0, exc.start) + 1
        problem = f"{shown}:{line}: not valid UTF-8"
        raise ConfigError(f"{shown}: 1 problem", problems=(problem,), hint="save the file as UTF-8") from None


_TOML_AT = re.compile(r" \(at (?:line (\d+), column \d+|end of document)\)\Z")


def _parse(path: Path, text: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as exc:
        # tomllib (3.11 to 3.14) says where only in the text of its message.
        message = str(exc)
        at = _TOML_AT.search(message)
        line = int(at[1]) if at and at[1] else text.count("\n") + 1
        shown = printable(str(path))
        problem = f"{shown}:{line}: not TOML: {printable(_TOML_AT.sub('', message))}"
        raise ConfigError(f"{shown}: 1 problem", problems=(problem,), hint="see https://toml.io") from None
    except RecursionError:
        raise ConfigError(f"{printable(str(path))}: nested too deeply") from None


def _from_environment(
    environ: Mapping[str, str],
) -> tuple[dict[str, Any], dict[Loc, str], list[tuple[int, str]]]:
    """Read ``SYNCD_<TABLE>__<KEY>`` variables: lists and tables as JSON, everything else as plain text.

    :returns: the values as nested tables, which variable each key came from, and problems.
    """
    tree: dict[str, Any] = {}
    variables: dict[Loc, str] = {}
    problems: list[tuple[int, str]] = []
    for name in sorted(environ):
        text = environ[name]
        if not name.upper().startswith(ENV_PREFIX) or name in ENV_OURS or text == "":
            continue
        shown = printable(name)
        loc = tuple(name[len(ENV_PREFIX) :].lower().split(ENV_DELIMITER))
        kind = _type_at(Settings, loc)
        if kind is None:
            problems.append((-1, f"{shown}: {_unknown_variable(loc)}"))
            continue
        try:
            value = _from_text(text, kind)
        except ValueError:
            problems.append((-1, f"{shown}: {'.'.join(loc)}: must be JSON, for example {_json_example(kind)}"))
            continue
        if not _put(tree, loc, value):
            problems.append((-1, f"{shown}: {'.'.join(loc)}: given twice, also by {_holder(variables, loc)}"))
            continue
        variables.update(dict.fromkeys(_locs(loc, value), shown))
    return tree, variables, problems


def _locs(loc: Loc, value: Any) -> Iterator[Loc]:
    """Yield the place of a value and of everything within it."""
    yield loc
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inner:
        yield from _locs((*loc, key), item)


def _put(tree: dict[str, Any], loc: tuple[str, ...], value: Any) -> bool:
    """Store a value at its place; False where another variable already stored something there.

    ``SYNCD_NATS='{…}'`` sorts before ``SYNCD_NATS__USER``: the table first, then its keys, which win.
    """
    at = tree
    for part in loc[:-1]:
        at = at.setdefault(part, {})
        if not isinstance(at, dict):
            return True  # a table that is not one: reported where it is validated
    if loc[-1] in at and not isinstance(at[loc[-1]], dict):
        return False
    at[loc[-1]] = value
    return True


def _holder(variables: Mapping[Loc, str], loc: Loc) -> str:
    return next((variables[loc[:end]] for end in range(len(loc), 0, -1) if loc[:end] in variables), "another variable")


def _unwrapped(kind: Any) -> Any:
    """Strip ``Annotated`` and ``None``: what a value of this annotation is when there is one."""
    while True:
        if get_origin(kind) is Annotated:
            kind = get_args(kind)[0]
        elif get_origin(kind) in {Union, UnionType}:
            rest = [arg for arg in get_args(kind) if arg is not type(None)]
            if len(rest) != 1:
                return str
            kind = rest[0]
        else:
            return kind


def _type_at(model: type[BaseModel], loc: Loc) -> Any:
    """Return the type of the key at ``loc``, ``None`` where no version that we know of has it."""
    kind: Any = model
    for depth, part in enumerate(loc):
        if get_origin(kind) is dict:
            return str if depth == len(loc) - 1 else None
        if not (isinstance(kind, type) and issubclass(kind, BaseModel)) or part not in kind.model_fields:
            # A later version's key passes, so that validation refuses it by name.
            return str if depth == 1 and (loc[0], part) in _LATER_KEYS else None
        info = kind.model_fields[part]
        if any(isinstance(item, BeforeValidator) and item.func in {_max_bytes, _rate} for item in info.metadata):
            return str
        kind = _unwrapped(info.annotation)
    return kind


def _from_text(text: str, kind: Any) -> Any:
    if kind in {int, float, bool}:
        try:
            return TypeAdapter(kind).validate_python(text.strip())
        except ValidationError:
            return text  # refused with the key's own words
    if get_origin(kind) in {tuple, dict} or (isinstance(kind, type) and issubclass(kind, BaseModel)):
        return json.loads(text)
    return text


def _json_example(kind: Any) -> str:
    if get_origin(kind) is tuple:
        inner = _unwrapped(get_args(kind)[0])
        return "'[\"…\"]'" if inner is str else '\'[{"folder": "…", "path": "…"}]\''
    return '\'{"key": "…"}\''


def _unknown_variable(loc: Loc) -> str:
    if len(loc) > 1 and loc[0] in {"publish", "subscribe"}:
        return f"not a key (the whole list is one variable: {ENV_PREFIX}{str(loc[0]).upper()}='[{{…}}]')"
    known = [ENV_DELIMITER.join(item).upper() for item in _all_keys(Settings)]
    close = difflib.get_close_matches(ENV_DELIMITER.join(map(str, loc)).upper(), known, n=1)
    return "not a key of syncd" + (f" (did you mean {ENV_PREFIX}{close[0]}?)" if close else "")


def _all_keys(model: type[BaseModel], above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, info in model.model_fields.items():
        kind = _unwrapped(info.annotation)
        yield (*above, name)
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from _all_keys(kind, (*above, name))


# --- saying what is wrong -----------------------------------------------------------------------------------

_SECRET_KEYS = re.compile(r"password|token|seed|creds|secret|key", re.IGNORECASE)

_WORDS: Mapping[str, str] = {
    "missing": "is required",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "string_type": "must be a string",
    "tuple_type": "must be a list",
    "dict_type": "must be a table",
    "model_type": "must be a table",
    "model_attributes_type": "must be a table",
    "string_pattern_mismatch": "holds characters that are not allowed here",
}


def _problem(error: Any, origin: Origin) -> tuple[int, str]:
    """Word one of pydantic's errors; returns (line, text), line -1 for the environment."""
    loc: Loc = error["loc"]
    kind: str = error["type"]
    value = error.get("input")
    section = (str(loc[0]), str(loc[-1]))
    at_section = len(loc) == (2 if section[0] == "daemon" else 3)
    shown = ""
    if kind == "extra_forbidden":
        later = _LATER_KEYS.get(section) if at_section else None
        text = f"{later} {_NOT_AVAILABLE}" if later else "unknown key" + _suggestion(loc)
    elif kind == "literal_error":
        text = f"must be {error['ctx']['expected']}"
        shown = _shown(loc, value)
    else:
        ctx = error.get("ctx", {})
        limits = {
            "greater_than_equal": f"must be at least {ctx.get('ge', 0):g}",
            "less_than_equal": f"must be at most {ctx.get('le', 0):g}",
            "string_too_long": f"must not be longer than {ctx.get('max_length')} characters",
            "value_error": str(ctx.get("error", "")),
        }
        text = _WORDS.get(kind) or limits.get(kind) or error["msg"]
        shown = "" if kind == "missing" else _shown(loc, value)
    key = ".".join(printable(str(part)) for part in loc)
    where = origin.where(loc)
    line = int(where.rpartition(":")[2]) if where.startswith(f"{origin.name}:") else -1
    return line, f"{where}: {key}{shown}: {text}"


def _shown(loc: Loc, value: object) -> str:
    """Return a value for a message, "" where it could be a secret or says nothing."""
    if isinstance(value, bool):
        return f" ({str(value).lower()})"
    if isinstance(value, int | float):
        return f" ({value})" if not any(isinstance(p, str) and _SECRET_KEYS.search(p) for p in loc) else ""
    if not isinstance(value, str) or "://" in value or len(value) > _MAX_SHOWN or loc[-1] == "nats":
        return ""
    if any(isinstance(part, str) and _SECRET_KEYS.search(part) for part in loc):
        return ""
    return f' ("{printable(value)}")'


def _suggestion(loc: Loc) -> str:
    known = _keys_beside(loc)
    close = difflib.get_close_matches(str(loc[-1]), known, n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def _keys_beside(loc: Loc) -> list[str]:
    kind: Any = Settings
    for part in loc[:-1]:
        if isinstance(part, int):
            kind = _unwrapped(get_args(kind)[0]) if get_origin(kind) is tuple else None
        elif isinstance(kind, type) and issubclass(kind, BaseModel) and part in kind.model_fields:
            kind = _unwrapped(kind.model_fields[part].annotation)
    return list(kind.model_fields) if isinstance(kind, type) and issubclass(kind, BaseModel) else []
