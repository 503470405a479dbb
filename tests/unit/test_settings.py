"""Settings: what is read, what is refused, and in which words."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
import tomllib
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import ValidationError

from syncd.checks import disk_findings, errors_of, problems_of
from syncd.errors import ConfigError
from syncd.settings import (
    BucketSettings,
    DaemonSettings,
    EmbeddedSettings,
    NatsSettings,
    PlacementSettings,
    PublishSettings,
    Settings,
    SubscribeSettings,
    TlsSettings,
    default_state_dir,
    load,
    parse_owner,
    parse_size,
    split_listen,
)
from syncd.signatures import generate
from syncd.tomllines import locate

if TYPE_CHECKING:
    from pydantic import BaseModel

CONFIG = Path(__file__).parents[2] / "config"
BOTH = """
[[publish]]
folder = "app"
path = "source"
{publish}
[[subscribe]]
folder = "app"
path = "mirror"
{subscribe}
"""


def write(directory: Path, text: str) -> Path:
    file = directory / "fleet.toml"
    file.write_text(textwrap.dedent(text))
    return file


def problems(directory: Path, text: str, environ: dict[str, str] | None = None) -> list[str]:
    file = write(directory, text)
    with pytest.raises(ConfigError) as caught:
        load(file, environ or {})
    return [line.replace(f"{directory}/", "") for line in caught.value.problems]


# --- reading ---


def test_without_file_and_environment_everything_is_at_its_default():
    settings = load(None, {})
    assert settings == Settings()
    assert settings.nats.servers == ("nats://127.0.0.1:4222",)
    assert settings.nats_store_dir is None
    assert re.fullmatch(r"[A-Za-z0-9._-]+", settings.daemon.host)


def test_the_environment_wins_over_the_file_key_by_key(tmp_path):
    file = write(
        tmp_path,
        """
        [nats]
        servers = ["nats://file:1"]
        domain = "leaf"
        [daemon]
        log_level = "error"
        labels = { site = "ams", ring = "canary" }
        """,
    )
    settings = load(
        file,
        {
            "SYNCD_NATS__SERVERS": '["nats://a:4222", "tls://b"]',
            "SYNCD_DAEMON__LOG_LEVEL": "debug",
            "SYNCD_DAEMON__LABELS__SITE": "fra",
            "SYNCD_NATS__TLS__HANDSHAKE_FIRST": "true",
            "SYNCD_NATS__TLS": '{"server_name": "x"}',
            "SYNCD_PUBLISH": '[{"folder": "a", "path": "/a", "settle_ms": 7, "bucket": {"max_bytes": "1kB"}}]',
            "PATH": "/bin",
        },
    )
    assert settings.nats.servers == ("nats://a:4222", "tls://b")
    assert settings.nats.domain == "leaf"
    assert settings.daemon.log_level == "debug"
    assert settings.daemon.labels == {"site": "fra", "ring": "canary"}
    assert settings.nats.tls == TlsSettings(server_name="x", handshake_first=True)
    assert settings.publish[0].settle_ms == 7
    assert settings.publish[0].bucket.max_bytes == 1000


def test_the_process_environment_is_not_read_behind_the_argument(monkeypatch):
    monkeypatch.setenv("SYNCD_DAEMON__LOG_LEVEL", "debug")
    monkeypatch.setenv("DAEMON", '{"log_level": "debug"}')
    assert load(None, {}).daemon.log_level == "info"


def test_syncd_config_names_the_file_and_is_no_key(tmp_path):
    file = write(tmp_path, '[daemon]\nhost = "web-17"')
    environ = {"SYNCD_CONFIG": str(file), "SYNCD_CRASH_POINT": "x", "_SYNCD_COMPLETE": "bash_source"}
    assert load(None, environ).daemon.host == "web-17"


def test_an_empty_variable_is_not_given():
    """Compose files and unit files set empty ones."""
    assert load(None, {"SYNCD_DAEMON__HOST": "", "SYNCD_NATS__SERVERS": "", "SYNCD_WHATEVER": ""}) == Settings()


def test_relative_paths_belong_to_the_files_directory_whatever_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "etc").mkdir()
    write(tmp_path / "etc", BOTH.format(publish="", subscribe="") + '[daemon]\nstate_dir = "../state"')
    monkeypatch.chdir(tmp_path)
    settings = load(Path("etc/fleet.toml"), {"SYNCD_NATS__CREDS_FILE": "user.creds"})
    assert settings.publish[0].path == tmp_path / "etc" / "source"
    assert settings.daemon.state_dir == tmp_path / "state"
    assert settings.nats.creds_file == tmp_path / "etc" / "user.creds"
    assert load(None, {"SYNCD_DAEMON__STATE_DIR": "here"}).daemon.state_dir == tmp_path / "here"


def test_dot_dot_is_what_the_kernel_means_and_a_root_that_is_a_symlink_stays_one(tmp_path):
    """``current -> releases/7`` may be pointed elsewhere while we run."""
    (tmp_path / "real" / "config").mkdir(parents=True)
    (tmp_path / "config").symlink_to("real/config")
    (tmp_path / "real" / "current").symlink_to("nowhere")
    write(tmp_path / "config", '[[publish]]\nfolder = "a"\npath = "../current"')
    assert load(tmp_path / "config" / "fleet.toml", {}).publish[0].path == tmp_path / "real" / "current"


def test_a_tilde_is_the_home_directory_of_the_environment():
    settings = load(None, {"HOME": "/home/u", "SYNCD_NATS__CREDS_FILE": "~/u.creds"})
    assert settings.nats.creds_file == Path("/home/u/u.creds")
    assert load(None, {"HOME": "/home/u", "SYNCD_DAEMON__STATE_DIR": "~"}).daemon.state_dir == Path("/home/u")


@pytest.mark.parametrize(
    ("environ", "root", "expected"),
    [
        ({"XDG_STATE_HOME": "/x"}, True, "/var/lib/syncd"),
        ({"XDG_STATE_HOME": "/x", "HOME": "/h"}, False, "/x/syncd"),
        ({"XDG_STATE_HOME": "x", "HOME": "/h"}, False, "/h/.local/state/syncd"),
        ({"HOME": "/h"}, False, "/h/.local/state/syncd"),
    ],
)
def test_state_dir_is_the_systems_for_root_and_the_xdg_one_otherwise(environ, root, expected):
    assert default_state_dir(environ, root=root) == Path(expected)


def test_settings_are_frozen_and_equal_wherever_they_were_written(tmp_path):
    settings = load(write(tmp_path, '[daemon]\nhost = "a"'), {})
    assert settings == load(None, {"SYNCD_DAEMON__HOST": "a"})
    assert settings != load(None, {"SYNCD_DAEMON__HOST": "b"})
    with pytest.raises(ValueError, match="frozen"):
        settings.daemon.host = "c"
    with pytest.raises(ValueError, match="frozen"):
        settings.daemon = DaemonSettings()


# --- refusing ---


@pytest.mark.fault("U1")
def test_all_problems_are_reported_at_once_each_with_its_line(tmp_path):
    """A configuration with unknown keys, wrong types and values out of range is loaded, and wrong variables beside it.

    It is refused with all twelve problems at once, each with its line or variable.
    """
    found = problems(
        tmp_path,
        """\
        [nats]
        servres = ["nats://a"]
        [daemon]
        log_level = "loud"

        [[publish]]
        folder = "ap/p"
        settle_ms = "50"
        max_delete_percent = 101
        bucket.replicas = 0
        [publish.bucket.placement]
        tags = [
          "ssd",
          7,
        ]
        [[subscribe]]
        folder = "fine"
        path = ""
        """,
        {"SYNCD_DAEMON__HOST": "a b", "SYNCD_LOG_LEVEL": "debug", "SYNCD_NATS__TLS": "{"},
    )
    assert found == [
        "SYNCD_LOG_LEVEL: not a key of syncd (did you mean SYNCD_DAEMON__LOG_LEVEL?)",
        'SYNCD_NATS__TLS: nats.tls: must be JSON, for example \'{"key": "…"}\'',
        "SYNCD_DAEMON__HOST: daemon.host (\"a b\"): only letters, digits, '.', '-' and '_', at most 253",
        "fleet.toml:2: nats.servres: unknown key (did you mean servers?)",
        "fleet.toml:4: daemon.log_level (\"loud\"): must be 'debug', 'info', 'warning' or 'error'",
        "fleet.toml:6: publish.0.path: is required",
        'fleet.toml:7: publish.0.folder ("ap/p"): only letters, digits, - and _',
        'fleet.toml:8: publish.0.settle_ms ("50"): must be a whole number',
        "fleet.toml:9: publish.0.max_delete_percent (101): must be at most 100",
        "fleet.toml:10: publish.0.bucket.replicas (0): must be at least 1",
        "fleet.toml:14: publish.0.bucket.placement.tags.1 (7): must be a string",
        'fleet.toml:18: subscribe.0.path (""): must not be empty',
    ]


def test_the_message_counts_the_problems(tmp_path):
    with pytest.raises(ConfigError, match=r"fleet\.toml: 2 problems") as caught:
        load(write(tmp_path, "a = 1\nb = 2"), {})
    assert caught.value.exit_code == 78
    with pytest.raises(ConfigError, match=r"environment: 1 problem "):
        load(None, {"SYNCD_NOPE": "1"})


@pytest.mark.fault("U1")
@pytest.mark.parametrize(
    ("publish", "subscribe", "words"),
    [
        ("", 'rate_limit = "50MB/s"', "subscribe.0.rate_limit: limiting the rate"),
        ("", '[daemon]\nhttp = "127.0.0.1:1"', "daemon.http: the metrics and health endpoint"),
    ],
)
def test_a_key_of_a_later_version_is_refused_by_name(tmp_path, publish, subscribe, words):
    """A configuration sets `rate_limit` or `daemon.http`, which this version does not have.

    It is refused by the key's name: nobody shall believe that it works.
    """
    (line,) = problems(tmp_path, BOTH.format(publish=publish, subscribe=subscribe))
    assert re.sub(r"^fleet\.toml:\d+: ", "", line) == f"{words} is not available in this version of syncd"


def test_a_key_of_a_later_version_is_refused_by_name_in_the_environment_too(tmp_path):
    assert problems(tmp_path, "", {"SYNCD_DAEMON__HTTP": ":1"}) == [
        "SYNCD_DAEMON__HTTP: daemon.http: the metrics and health endpoint is not available in this version of syncd"
    ]


KEY = "UCJWGZSXLQ4UU7TBQSLFVPO6JE533M6SC4HLGZ5CO446WRR7WXBZICSG"


@pytest.mark.fault("K8 U1")
@pytest.mark.parametrize(
    ("subscribe", "words"),
    [
        ('trusted_keys = ["K"]', "must be the public key that syncd keygen prints"),
        (f'trusted_keys = ["{KEY}", "{KEY}"]', "names a key twice"),
        (f'trusted_keys = ["{KEY}"]\ntrusted_threshold = 0', "must be at least 1"),
        ('channel = "a/b"', "only letters, digits, - and _"),
        ('channel = ""', "only letters, digits, - and _"),
        ("pin = -1", "must be at least 0"),
        ('modes = "0644"', 'must be "preserve" or a table'),
        ('modes = { files = "0044" }', "would keep the owner from reading"),
        ("keep_releases = 0", "must be at least 1"),
        ('share = "symlink"', "must be 'auto'"),
        ('hooks = { apply = "nginx -s reload" }', "must be a list"),
        ("hooks = { timeout_seconds = 0 }", "must be at least 1"),
        ('verify_rate = "fast"', "must be a number of bytes or a size"),
        ("verify_rate = true", 'must be a rate such as "4MB/s"'),
    ],
)
def test_what_cannot_be_meant_is_refused(tmp_path, subscribe, words):
    """A configuration has a threshold of 0, a key twice or none that is one, and senseless pins, modes, hooks, rates.

    Each of the 14 is refused with a line that says what to write.
    """
    found = problems(tmp_path, BOTH.format(publish="", subscribe=subscribe))
    assert any(words in line for line in found), found


@pytest.mark.fault("K14")
def test_no_message_holds_a_secret(tmp_path):
    """A password stands in misspelt keys and variables, in wrong types, an address and beside a NUL; loading fails.

    No message, no exception and no repr holds it.
    """
    found = problems(
        tmp_path,
        """
        [nats]
        servers = ["nats://u:hunter2@h"]
        pasword = "hunter2"
        password = ["hunter2"]
        creds_file = "hunter2\\u0000"
        token_file = 4711
        [nats.tls]
        key_password = "hunter2"
        """,
        {"SYNCD_NATS__PASWORD": "hunter2", "SYNCD_NATS__TLS__KEY_FILE": "hunter2\0"},
    )
    assert len(found) == 8
    assert not [line for line in found if "hunter2" in line or "4711" in line]
    with pytest.raises(ConfigError) as caught:
        load(write(tmp_path, 'nats = "nats://u:hunter2@h"'), {})
    assert "hunter2" not in str(caught.value) + "".join(caught.value.problems) + repr(caught.value.__context__)
    assert "hunter2" not in repr(load(None, {"SYNCD_NATS__PASSWORD": "hunter2"}))
    with pytest.raises(ValidationError) as refused:
        NatsSettings.model_validate({"password": ["hunter2"]})
    assert "hunter2" not in str(refused.value)


@pytest.mark.fault("P3")
def test_names_in_messages_are_printable(tmp_path):
    """A configuration has a key with a terminal's escape sequence in its name. The message shows it escaped."""
    assert problems(tmp_path, r'"a\u001b[2J" = 1') == [r"fleet.toml:1: a\x1b[2J: unknown key"]


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("SYNCD_FOO", "1", "SYNCD_FOO: not a key of syncd"),
        ("SYNCD_NATS__SERVER", "x", "SYNCD_NATS__SERVER: not a key of syncd (did you mean SYNCD_NATS__SERVERS?)"),
        ("SYNCD_PUBLISH__0__PATH", "/x", "SYNCD_PUBLISH__0__PATH: not a key (the whole list is one variable: "),
        ("SYNCD_NATS__SERVERS", "nats://a", "SYNCD_NATS__SERVERS: nats.servers: must be JSON, for example "),
        ("SYNCD_DAEMON__LABELS__A__B", "x", "SYNCD_DAEMON__LABELS__A__B: not a key of syncd"),
        ("SYNCD_NATS__SERVERS", "[1]", "SYNCD_NATS__SERVERS: nats.servers.0 (1): must be a string"),
        ("SYNCD_NATS__TLS__HANDSHAKE_FIRST", "si", 'SYNCD_NATS__TLS__HANDSHAKE_FIRST: nats.tls.handshake_first ("si"'),
        ("SYNCD_", "x", "SYNCD_: not a key of syncd"),
    ],
)
def test_a_variable_that_is_no_key_is_refused(variable, value, words):
    with pytest.raises(ConfigError) as caught:
        load(None, {variable: value})
    (line,) = caught.value.problems
    assert line.startswith(words)


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"[nats]\nservers = [\n", "fleet.toml:3: not TOML: "),
        (b"a = 1\na = 2\n", "fleet.toml:2: not TOML: Cannot overwrite a value"),
        (b"[nats]\nx = \xff\n", "fleet.toml:2: not valid UTF-8"),
    ],
)
def test_a_file_that_is_not_toml_is_refused_with_the_line(tmp_path, raw, words):
    file = tmp_path / "fleet.toml"
    file.write_bytes(raw)
    with pytest.raises(ConfigError) as caught:
        load(file, {})
    (line,) = caught.value.problems
    assert line.replace(f"{tmp_path}/", "").startswith(words)
    assert caught.value.hint


def test_a_file_that_cannot_be_read_is_refused_with_a_hint(tmp_path):
    for path in (tmp_path / "missing.toml", tmp_path, Path("a\0b")):
        with pytest.raises(ConfigError) as caught:
            load(path, {})
        assert caught.value.hint
    endless = tmp_path / "endless"
    endless.symlink_to("/dev/zero")
    with pytest.raises(ConfigError, match="larger than"):
        load(endless, {})


def test_a_deeply_nested_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"nested too deeply|not TOML|problem"):
        load(write(tmp_path, "a = " + "[" * 5000 + "]" * 5000), {})


# --- single values ---


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (0, 0),
        (17, 17),
        ("17", 17),
        ("10GB", 10**10),
        ("10 GiB", 10 << 30),
        ("1.5MB", 1_500_000),
        ("0.5KiB", 512),
        ("3tb", 3 * 10**12),
    ],
)
def test_sizes_are_bytes_decimal_or_binary(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", [-1, "", "GB", "10XB", "-5", "1e9", "1.2.3", "10 G B", "1" * 30])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ValueError, match="must"):
        parse_size(text)


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:4222", ("127.0.0.1", 4222)),
        ("[::1]:1", ("::1", 1)),
        ("localhost:65535", ("localhost", 65535)),
    ],
)
def test_listen_is_host_and_port(text, address):
    assert split_listen(text) == address


@pytest.mark.parametrize(
    "text", ["", "4222", ":4222", "a:", "a:0", "a:65536", "a:-1", "::1:4222", "[x]:1", 'a":1', "a:1\n", "a:٤"]
)
def test_what_is_no_listen_address_is_refused(text):
    with pytest.raises(ConfigError):
        load(None, {"SYNCD_NATS__EMBEDDED__LISTEN": text or " "})


@pytest.mark.parametrize("folder", ["", "a b", "a/b", "a.b", "ä", "app\n", "*", ">", "a" * 65, "-" * 65])
def test_a_folder_is_a_bucket_name_of_at_most_64_characters(tmp_path, folder):
    """``app\\n`` is what nats-py's own check lets pass."""
    escaped = folder.replace("\n", "\\n")
    assert len(problems(tmp_path, f'[[publish]]\nfolder = "{escaped}"\npath = "/x"')) == 1


@pytest.mark.parametrize(
    "server", ["h:4222", "http://h", "nats://", "nats://h:0", "nats://h:99999", "nats://u@h", "nats://h?x=1", ""]
)
def test_what_is_no_server_url_is_refused(tmp_path, server):
    (line,) = problems(tmp_path, f'[nats]\nservers = ["{server}"]')
    assert line.startswith("fleet.toml:2: nats.servers.0")


@pytest.mark.parametrize("key", ["syncd-mode", "SYNCD-x", "syncd.layout", "_nats.x", "", "a\\nb"])
def test_reserved_and_unprintable_metadata_keys_are_refused(tmp_path, key):
    (line,) = problems(tmp_path, f'[[publish]]\nfolder = "a"\npath = "/a"\nmetadata = {{ "{key}" = "x" }}')
    assert line.startswith("fleet.toml:4: publish.0.metadata")


# --- where keys are ---


def test_every_key_of_a_document_is_found_on_its_line():
    text = textwrap.dedent(
        '''\
        # a comment with a "quote and a [bracket
        top = 1
        [a."b c".d]  # comment
        x.y = { p = 1, "q.r" = [ 1, { s = 2 } ] }
        text = """
        z = "not a key"
        [not.a.table]
        \\""" still text
        """
        lit = \'\'\'it''s # no comment\'\'\'
        many = [   # comment ]
          "a]",  'b,',
          # comment
          [ 1,
            2 ],
          { k = "}" },
        ]
        [[list]]
        n = 1
        [[list]]
        [list.sub]
        m = 2
        [[list.inner]]
        [[list.inner]]
        deep = 1979-05-27T07:32:00Z
        \'quoted key\'  =  "\\\\"
        '''
    )
    tomllib.loads(text)
    lines = locate(text)
    expected = {
        ("top",): 2,
        ("a", "b c", "d"): 3,
        ("a", "b c", "d", "x", "y"): 4,
        ("a", "b c", "d", "x", "y", "q.r", 1, "s"): 4,
        ("a", "b c", "d", "text"): 5,
        ("a", "b c", "d", "lit"): 10,
        ("a", "b c", "d", "many"): 11,
        ("a", "b c", "d", "many", 0): 12,
        ("a", "b c", "d", "many", 1): 12,
        ("a", "b c", "d", "many", 2): 14,
        ("a", "b c", "d", "many", 2, 1): 15,
        ("a", "b c", "d", "many", 3, "k"): 16,
        ("list", 0, "n"): 19,
        ("list", 1): 20,
        ("list", 1, "sub", "m"): 22,
        ("list", 1, "inner", 0): 23,
        ("list", 1, "inner", 1, "deep"): 25,
        ("list", 1, "inner", 1, "quoted key"): 26,
    }
    assert {loc: lines.get(loc) for loc in expected} == expected
    assert not [loc for loc in lines if "not" in loc or "z" in loc]


_scalars = st.one_of(
    st.integers(-99, 99), st.booleans(), st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12)
)
_values = st.recursive(
    _scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab. \"'#[]=", max_size=4), inner, max_size=3),
    max_leaves=8,
)


def to_toml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return str(value)
    if isinstance(value, str):
        return (
            '"'
            + "".join(f"\\U{ord(char):08x}" if char in '"\\' or not char.isprintable() else char for char in value)
            + '"'
        )
    if isinstance(value, list):
        return "[" + ", ".join(map(to_toml, value)) + "]"
    assert isinstance(value, dict)
    return "{ " + ", ".join(f"{to_toml(key)} = {to_toml(item)}" for key, item in value.items()) + " }"


@given(st.dictionaries(st.text("ab. \"'#[]=", max_size=4), _values, min_size=1, max_size=6))
def test_the_line_locator_agrees_with_tomllib_on_every_key(document):
    """Each top-level key is written on a line of its own, so its line is known."""
    text = "".join(f"{to_toml(key)} = {to_toml(value)}\n" for key, value in document.items())
    assert tomllib.loads(text) == document
    lines = locate(text)
    for number, (key, value) in enumerate(document.items(), 1):
        for loc in places((key,), value):
            assert lines.get(loc) == number, (text, loc)


def places(loc, value):
    yield loc
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inner:
        yield from places((*loc, key), item)


@example("[#]")
@given(st.text("a=[]{}\"'\\#\n., 1", max_size=40))
def test_the_line_locator_ends_on_any_text(text):
    """It promises nothing for what tomllib refuses, but it must come to an end."""
    locate(text)


# --- do the parts fit together? ---


def findings(directory: Path, text: str) -> list[str]:
    settings = load(write(directory, text), {})
    return [f"{item.severity}: {item}".replace(f"{directory}/", "") for item in problems_of(settings)]


def roots(*pairs: tuple[str, str, str], extra: str = "") -> str:
    tables = "".join(f'[[{kind}]]\nfolder = "{folder}"\npath = "{path}"\n' for kind, folder, path in pairs)
    return f'[daemon]\nstate_dir = "state"\n{extra}\n{tables}'


def test_objects_that_vanish_do_not_go_with_generations(tmp_path):
    """A time to live would take blobs that kept generations need; the objects layout may have one."""
    text = roots(("publish", "a", "src")) + "[publish.bucket]\nttl_seconds = 60\n"
    [finding] = findings(tmp_path, text)
    assert "publish.0.bucket.ttl_seconds" in finding
    assert findings(tmp_path, text.replace('folder = "a"', 'folder = "a"\nlayout = "objects"')) == []


def test_a_sound_configuration_has_no_findings(tmp_path):
    assert (
        findings(tmp_path, roots(("publish", "a", "src"), ("publish", "b", "src/b"), ("subscribe", "a", "dst"))) == []
    )


@pytest.mark.fault("U1")
@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        (
            [("publish", "a", "x"), ("publish", "a", "y")],
            'error: fleet.toml:8: publish.1.folder: folder "a" is already published by publish.0',
        ),
        (
            [("subscribe", "a", "x"), ("subscribe", "b", "./x")],
            "error: fleet.toml:9: subscribe.1.path: x is already the mirror of subscribe.0",
        ),
        (
            [("subscribe", "a", "x/in"), ("subscribe", "b", "x")],
            "error: fleet.toml:9: subscribe.1.path: mirrors must not be nested: x/in is the mirror of subscribe.0",
        ),
        (
            [("publish", "a", "x"), ("subscribe", "b", "x/m")],
            "error: fleet.toml:9: subscribe.0.path: mirror inside the source of publish.0 (x)",
        ),
        (
            [("publish", "a", "m/x"), ("subscribe", "b", "m")],
            "error: fleet.toml:9: subscribe.0.path: the source of publish.0 (m/x) is inside this mirror",
        ),
        (
            [("publish", "a", "x"), ("subscribe", "b", "link")],
            (
                "error: fleet.toml:9: subscribe.0.path: x is also the source of publish.0:"
                " what arrives would be published again; publish from the origin, or subscribe to a copy"
            ),
        ),
        (
            [("publish", "a", ".")],
            "error: fleet.toml:2: daemon.state_dir: the state directory state is inside the source of publish.0",
        ),
        (
            [("subscribe", "a", "state")],
            "error: fleet.toml:2: daemon.state_dir: the state directory state is inside the mirror of subscribe.0",
        ),
        (
            [("subscribe", "a", "state/app")],
            "error: fleet.toml:6: subscribe.0.path: the mirror is inside the state directory state",
        ),
    ],
)
def test_roots_that_overlap_are_refused(tmp_path, pairs, expected):
    """A configuration has sources, mirrors and state directory in one another, also by symlink, or a folder twice.

    Each is an error with its line: A to B to A would be a loop.
    """
    (tmp_path / "link").symlink_to("x")
    assert expected in findings(tmp_path, roots(*pairs))


def test_names_that_merely_begin_alike_do_not_overlap(tmp_path):
    assert findings(tmp_path, roots(("publish", "a", "app"), ("subscribe", "b", "app2"))) == []


def test_the_root_of_the_filesystem_holds_everything(tmp_path):
    assert any("inside the source" in line for line in findings(tmp_path, roots(("publish", "a", "/"))))


def test_the_embedded_servers_store_is_neither_distributed_nor_overwritten(tmp_path):
    extra = '[nats.embedded]\nstore_dir = "src/nats"'
    assert (
        "error: fleet.toml:4: nats.embedded.store_dir: the embedded server's store src/nats"
        " is inside the source of publish.0"
    ) in findings(tmp_path, roots(("publish", "a", "src"), extra=extra))


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        (
            'creds_file = "a"\nuser = "u"\npassword = "p"',
            "nats.user: only one way to log in, but there are creds_file and user",
        ),
        ('nkey_seed_file = "a"\ntoken_file = "b"', "nats.token_file: only one way to log in"),
        (
            'user = "u"\npassword = "p"\npassword_file = "f"',
            "nats.password_file: password and password_file are both given",
        ),
        ('password_file = "f"', "nats.password_file: a password without nats.user"),
        ('user = "u"', "nats.user: user without password_file"),
        ('tls = { cert_file = "c" }', "nats.tls.cert_file: cert_file without key_file"),
        ('tls = { key_file = "c" }', "nats.tls.key_file: key_file without cert_file"),
        ('domain = "d"\nprefix = "p"', "nats.prefix: domain and prefix are both given"),
    ],
)
def test_credentials_that_contradict_each_other_are_refused(tmp_path, keys, expected):
    (line,) = findings(tmp_path, f"[nats]\n{keys}\n" + roots(("publish", "a", "src")))
    assert re.sub(r"fleet\.toml:\d+: ", "", line).startswith(f"error: {expected}")


def test_a_pattern_that_does_not_parse_is_refused(tmp_path):
    text = roots(("publish", "a", "src")) + 'exclude = ["fine",\n  "!"]\n'
    (line,) = findings(tmp_path, text)
    assert line.startswith("error: fleet.toml:8: publish.0.exclude.1: ")


@pytest.mark.fault("U1")
@pytest.mark.parametrize("program", ["bin/reload", "./reload", "../reload", "{folder}/reload", "{generation}/x"])
def test_a_hook_that_is_a_relative_path_is_refused(tmp_path, program):
    """A configuration names a hook's program by a relative path, such as `./reload` or `{folder}/reload`.

    It is an error with its line and forbids a start (78): which program that is would depend on the directory.
    """
    text = roots(("subscribe", "a", "x")) + f'[subscribe.hooks]\napply = ["{program}", "x/y"]\n'
    [finding] = findings(tmp_path, text)
    assert finding.startswith(f"error: fleet.toml:8: subscribe.0.hooks.apply: {program} is a relative path")
    settings = load(write(tmp_path, text), {})
    error = errors_of(settings, problems_of(settings))
    assert error is not None
    assert error.exit_code == 78


@pytest.mark.parametrize("program", ["reload", "/usr/bin/reload", "{path}/bin/reload", "{staged}/bin/check"])
def test_a_hook_is_a_name_an_absolute_path_or_in_a_tree_that_is_named(tmp_path, program):
    text = roots(("subscribe", "a", "x")) + f'[subscribe.hooks]\ncheck = ["{program}", "x/y"]\n'
    assert findings(tmp_path, text) == []


def test_an_embedded_server_that_nobody_uses_or_everybody_reaches_is_a_warning(tmp_path):
    extra = '[nats.embedded]\nlisten = "0.0.0.0:4333"'
    found = findings(tmp_path, roots(("publish", "a", "src"), extra=extra))
    assert [line.split(": ")[0] for line in found] == ["warning", "warning"]
    assert "nats.servers: none of them is the embedded server" in found[0]
    assert "fleet.toml:4: nats.embedded.listen: everybody who reaches this address" in found[1]


def test_nothing_to_do_is_a_warning_and_warnings_do_not_forbid_a_start():
    settings = load(None, {})
    found = problems_of(settings)
    assert [item.severity for item in found] == ["warning"]
    assert errors_of(settings, found) is None


def test_errors_become_one_configuration_error(tmp_path):
    settings = load(write(tmp_path, roots(("publish", "a", "x"), ("subscribe", "a", "x"))), {})
    error = errors_of(settings, problems_of(settings))
    assert isinstance(error, ConfigError)
    assert error.message.endswith("fleet.toml: 1 problem")


# --- does the disk fit? ---


def disk(directory: Path, text: str) -> list[str]:
    settings = load(write(directory, text), {})
    return [f"{item.severity}: {item}".replace(f"{directory}/", "") for item in disk_findings(settings)]


@pytest.mark.fault("W5")
def test_a_missing_source_is_a_warning_because_it_may_appear(tmp_path):
    """The directory that a configuration publishes does not exist when it is checked.

    It is a warning with its line, not an error.
    """
    assert disk(tmp_path, roots(("publish", "a", "src"))) == [
        "warning: fleet.toml:6: publish.0.path: src does not exist: it will be published when it appears"
    ]


def test_roots_that_are_no_directories_are_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "dangling").symlink_to("nowhere")
    assert disk(
        tmp_path,
        roots(("publish", "a", "file"), ("subscribe", "b", "file/m"), ("subscribe", "c", "dangling/x")),
    ) == [
        "error: fleet.toml:6: publish.0.path: file is not a directory",
        "error: fleet.toml:9: subscribe.0.path: file/m cannot be used: Not a directory",
        "error: fleet.toml:12: subscribe.1.path: dangling/x: dangling is a symlink to nothing",
    ]


def test_missing_unreadable_and_exposed_credential_files_are_found(tmp_path):
    (tmp_path / "seed").write_text("SU")
    (tmp_path / "seed").chmod(0o644)
    (tmp_path / "ca.pem").write_text("x")
    (tmp_path / "ca.pem").chmod(0o644)
    (tmp_path / "key.pem").mkdir()
    text = (
        '[nats]\npassword = "x"\ncreds_file = "gone"\nnkey_seed_file = "seed"\n'
        'tls = { ca_file = "ca.pem", key_file = "key.pem" }\n' + roots()
    )
    write(tmp_path, text).chmod(0o644)
    assert disk(tmp_path, text) == [
        "error: fleet.toml:3: nats.creds_file: gone: No such file or directory",
        (
            "warning: fleet.toml:4: nats.nkey_seed_file: seed is a secret"
            " that everybody on this host may read: chmod o= it"
        ),
        "error: fleet.toml:5: nats.tls.key_file: key.pem is a directory",
        "warning: fleet.toml:2: nats.password: everybody on this host may read fleet.toml: use password_file",
    ]


def test_what_this_user_may_not_read_or_write_is_found(tmp_path):
    """Checked as an unprivileged user: root may do everything."""
    text = '[nats]\ncreds_file = "creds"\n' + roots(
        ("publish", "a", "src"), ("subscribe", "b", "closed"), ("subscribe", "c", "closed/m")
    )
    file = write(tmp_path, text)
    (tmp_path / "creds").touch(0o600)
    (tmp_path / "src").mkdir(0o700)
    (tmp_path / "closed").mkdir(0o755)
    (tmp_path / "state").mkdir(0o777)
    (tmp_path / "state").chmod(0o777)
    for directory in (tmp_path, *tmp_path.parents):
        if directory != Path("/") and directory != Path("/tmp"):
            directory.chmod(directory.stat().st_mode | 0o055)
    code = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from syncd.checks import disk_findings\n"
        "from syncd.settings import load\n"
        "settings = load(Path(sys.argv[1]), {'HOME': '/'})\n"
        "if os.geteuid() == 0: os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "for item in disk_findings(settings): print(item.severity + ': ' + item.text)\n"
    )
    if os.geteuid() != 0:
        (tmp_path / "creds").chmod(0)
        (tmp_path / "src").chmod(0)
        (tmp_path / "closed").chmod(0o555)
    result = subprocess.run(
        [sys.executable, "-c", code, str(file)], capture_output=True, text=True, timeout=60, check=False
    )
    assert result.stdout.replace(f"{tmp_path}/", "").splitlines() == [
        "error: src cannot be read: it needs read and search permission",
        "error: closed is not writable",
        "error: closed/m cannot be made: closed is not writable",
        "error: creds cannot be read: it needs read permission",
    ], result.stderr


@pytest.mark.fault("U1")
def test_a_seed_that_is_none_is_found(tmp_path):
    """The file of the signing seed is empty, holds a public key, or is a fifo.

    The check says so with its line, as the daemon would at its start, and does not wait for the fifo.
    """
    (tmp_path / "src").mkdir()
    (tmp_path / "good").write_text(generate()[0])
    (tmp_path / "empty").touch()
    (tmp_path / "public").write_text(generate()[1])
    os.mkfifo(tmp_path / "fifo")
    for name, said in [
        ("good", []),
        ("empty", ["error: fleet.toml:7: publish.0.sign_seed_file: empty: holds no seed of a user nkey (SU…)"]),
        ("public", ["error: fleet.toml:7: publish.0.sign_seed_file: public: holds no seed of a user nkey (SU…)"]),
        ("fifo", ["error: fleet.toml:7: publish.0.sign_seed_file: fifo is no regular file"]),
    ]:
        (tmp_path / name).chmod(0o600)
        assert disk(tmp_path, roots(("publish", "a", "src")) + f'sign_seed_file = "{name}"\n') == said


@pytest.mark.fault("K14")
def test_a_secret_inside_a_source_is_refused(tmp_path):
    """Credentials and a signing seed, by a symlink, lie in the directory that is published.

    Each is told as a secret that would be distributed; one that is excluded is not.
    """
    (tmp_path / "src").mkdir()
    (tmp_path / "link").symlink_to("src")
    for name in ("seed", "creds", "kept.seed"):
        (tmp_path / "src" / name).write_text(generate()[0])
        (tmp_path / "src" / name).chmod(0o600)
    source = roots(("publish", "a", "src"))
    head = '[nats]\ncreds_file = "src/creds"\n'
    assert [line.rpartition(": ")[2] for line in disk(tmp_path, head + source + 'sign_seed_file = "link/seed"\n')] == [
        "src/seed is a secret inside the source of publish.0, which distributes it",
        "src/creds is a secret inside the source of publish.0, which distributes it",
    ]
    assert disk(tmp_path, source + 'sign_seed_file = "src/kept.seed"\nexclude = ["*.seed"]\n') == []


def test_what_a_mirror_needs_on_this_host_is_looked_at(tmp_path):
    """Programs of hooks, and the name of the link."""
    (tmp_path / "m" / "current").mkdir(parents=True)
    (tmp_path / "tool").write_text("#!")
    text = roots(("subscribe", "a", "m")) + 'mode = "release"\n[subscribe.hooks]\n'
    hooks = f'check = ["{tmp_path}/tool"]\napply = ["sh", "-c", "x"]\nhealth = ["no-such-program"]\n'
    assert disk(tmp_path, text + hooks) == [
        "warning: fleet.toml:9: subscribe.0.hooks.check: tool is no program that can be run here",
        "warning: fleet.toml:11: subscribe.0.hooks.health: no-such-program is no program that can be run here",
        "error: fleet.toml:6: subscribe.0.path: m/current is no symlink: release mode needs that name",
    ]
    assert disk(tmp_path, roots(("subscribe", "a", "n")) + '[subscribe.hooks]\ncheck = ["{path}/tool"]\n') == []


def test_an_argument_with_a_nul_is_refused(tmp_path):
    settings = load(
        write(tmp_path, roots(("subscribe", "a", "m")) + '[subscribe.hooks]\napply = ["sh", "a\\u0000b"]\n'), {}
    )
    (found,) = problems_of(settings)
    assert found.text == "an argument holds a NUL, which no program can be given"


def test_an_owner_without_the_right_to_give_files_away_is_told(tmp_path):
    """Of this user, whoever that is."""
    code = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from syncd.checks import disk_findings\n"
        "from syncd.settings import load\n"
        "settings = load(Path(sys.argv[1]), {'HOME': '/'})\n"
        "told = lambda: sum('CAP_CHOWN' in item.text for item in disk_findings(settings))\n"
        "if os.geteuid() == 0:\n"
        "    assert told() == 0\n"
        "    os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "print(told())\n"
    )
    file = write(tmp_path, roots(("subscribe", "a", "m")) + 'owner = "12:34"\n')
    run = [sys.executable, "-c", code, str(file)]
    result = subprocess.run(run, capture_output=True, text=True, timeout=60, check=False)
    assert result.stdout.split() == ["1"], result.stderr


# --- the example files ---


def uncommented(text: str) -> str:
    return re.sub(r"(?m)^# (?=\w+ = |\[)", "", text)


def test_fleet_toml_as_it_stands_is_at_its_defaults():
    settings = load(CONFIG / "fleet.toml", {})
    assert settings == Settings(
        publish=(PublishSettings(folder="app", path="/srv/app"),),
        subscribe=(SubscribeSettings(folder="app", path="/var/lib/app"),),
    )
    assert [item.text for item in problems_of(settings) if item.severity == "error"] == []


def test_fleet_toml_shows_every_key_at_its_default(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    text = uncommented((CONFIG / "fleet.toml").read_text())
    settings = load(write(tmp_path, text), {})
    assert settings == Settings(
        nats=NatsSettings(embedded=EmbeddedSettings()),
        publish=(PublishSettings(folder="app", path="/srv/app"),),
        subscribe=(SubscribeSettings(folder="app", path="/var/lib/app"),),
    )
    data = tomllib.loads(text)
    tables: list[tuple[type[BaseModel], dict[str, object]]] = [
        (Settings, data),
        (NatsSettings, data["nats"]),
        (TlsSettings, data["nats"]["tls"]),
        (EmbeddedSettings, data["nats"]["embedded"]),
        (DaemonSettings, data["daemon"]),
        (PublishSettings, data["publish"][0]),
        (BucketSettings, data["publish"][0]["bucket"]),
        (PlacementSettings, data["publish"][0]["bucket"]["placement"]),
        (SubscribeSettings, data["subscribe"][0]),
    ]
    for model, table in tables:
        assert list(table) == list(model.model_fields) or set(table) == set(model.model_fields)


def test_every_key_of_fleet_toml_has_its_line_of_explanation():
    lines = (CONFIG / "fleet.toml").read_text().splitlines()
    for above, line in pairwise(lines):
        if re.match(r"(# )?\w+ = ", line) and "key_file" not in line:
            assert re.match(r"# (?!\w+ = )[A-Za-z$<\"]", above), line


@pytest.mark.parametrize(
    ("name", "publishes", "subscribes"),
    [("publisher", 1, 0), ("subscriber", 0, 1), ("demo", 1, 1)],
)
def test_the_other_example_files_load_without_errors(name, publishes, subscribes):
    settings = load(CONFIG / f"{name}.toml", {})
    assert (len(settings.publish), len(settings.subscribe)) == (publishes, subscribes)
    assert problems_of(settings) == []


def test_the_demo_keeps_everything_below_one_directory_and_uses_its_own_server():
    settings = load(CONFIG / "demo.toml", {})
    demo = CONFIG.parent / "demo"
    assert settings.daemon.state_dir == demo / "state"
    assert settings.nats_store_dir == demo / "state" / "nats"
    assert (settings.publish[0].path, settings.subscribe[0].path) == (demo / "source", demo / "mirror")
    assert settings.nats.embedded is not None
    assert settings.nats.servers == (f"nats://{settings.nats.embedded.listen}",)


@pytest.mark.fault("M1")
@pytest.mark.parametrize(
    ("owner", "words"),
    [
        ("nobody-of-this-name", "no user 'nobody-of-this-name' on this host"),
        ("root:nogroup-of-this-name", "no group 'nogroup-of-this-name' on this host"),
        (":", 'must be "user", "user:group" or ":group"'),
        ("root:root:root", 'must be "user", "user:group" or ":group"'),
        ("4294967295", "an id is at most 4294967294"),
    ],
)
def test_an_unknown_owner_is_refused_with_its_line(tmp_path, owner, words):
    """A configuration's owner is a user or group unknown here, an id too large, or none at all.

    It is refused with its line, and never becomes uid 0 later.
    """
    (line,) = problems(tmp_path, f'[[subscribe]]\nfolder = "app"\npath = "/m"\nowner = "{owner}"\n')
    assert words in line
    assert line.startswith("fleet.toml:4: subscribe.0.owner")


def test_an_owner_is_read_by_name_and_by_number():
    """A user alone brings its own group; -1 leaves a part as it is."""
    assert [parse_owner(text) for text in ("root", "0:5", ":0", "54321")] == [(0, 0), (0, 5), (-1, 0), (54321, -1)]
