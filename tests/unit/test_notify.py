"""sd_notify against a real datagram socket."""

from __future__ import annotations

import os
import socket
import uuid

import pytest

from syncd.notify import sd_notify, watchdog_interval


def test_a_message_reaches_the_socket_that_the_manager_named(tmp_path):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.settimeout(10)
        manager.bind(str(tmp_path / "notify"))
        assert sd_notify("READY=1\nSTATUS=3 folders", {"NOTIFY_SOCKET": str(tmp_path / "notify")})
        assert manager.recv(100) == b"READY=1\nSTATUS=3 folders"


def test_an_abstract_socket_is_reached_too():
    name = f"syncd-test-{uuid.uuid4()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.settimeout(10)
        manager.bind("\0" + name)
        assert sd_notify("WATCHDOG=1", {"NOTIFY_SOCKET": "@" + name})
        assert manager.recv(100) == b"WATCHDOG=1"


def test_a_manager_that_does_not_read_never_blocks_us(tmp_path):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        environ = {"NOTIFY_SOCKET": str(tmp_path / "notify")}
        assert not all(sd_notify("WATCHDOG=1", environ) for _ in range(10_000))


@pytest.mark.parametrize(
    "address", ["", "/nowhere/notify", "@nobody-" + "x" * 20, "relative", "/" + "x" * 200, "/a\0b"]
)
def test_without_a_listener_nothing_happens(address):
    assert not sd_notify("READY=1", {"NOTIFY_SOCKET": address})
    assert not sd_notify("READY=1", {})


@pytest.mark.parametrize(
    ("environ", "interval"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "30000000"}, 15.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "77"}, 15.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "78"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "-5"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
    ],
)
def test_the_watchdog_is_fed_twice_in_its_time_and_only_by_the_process_it_watches(environ, interval):
    assert watchdog_interval(environ, pid=77) == interval


def test_this_process_is_the_watched_one_unless_told_otherwise():
    assert watchdog_interval({"WATCHDOG_USEC": "2000000", "WATCHDOG_PID": str(os.getpid())}) == 1.0
