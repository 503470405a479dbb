"""A network of a test's own that loses packets: the kernel's rules and queues, in a namespace that ends with a thread.

A thread that leaves the network it was born into takes along the threads and processes that it begins from then on, and
nobody else (unshare(2)). The namespace has no name and is mounted nowhere: when that thread, its children and their
sockets are gone, it is gone with every rule in it, however the test ended. The host's own network has no part in it.

Everything in there talks over ``lo``. Segments are cut to an Ethernet's 1500 bytes before they get there, so that what
is lost is a packet as a network knows it, not a buffer of 64 KiB.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import shutil
import subprocess
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

MTU = 1500
TOOLS = ("ip", "tc", "nft")
_CLONE_NEWNET = 0x40000000
_PERMILLE = 1000
_CHAIN = "inet syncd lossy"
_LATE = "1:2"
_LATE_RATE = "10mbit"  # what goes this way arrives a millisecond or more after what followed it
_BURST = "burst 2k cburst 2k"


class NoNetwork(Exception):
    """There is none to be had here: not root, no tool, or not in this kernel."""


class Network:
    """The network of the thread that made it; what it does to packets can be changed at any time.

    :raises NoNetwork: the kernel or a tool refuses.
    """

    def __init__(self) -> None:
        missing = [tool for tool in TOOLS if shutil.which(tool) is None]
        if missing:
            raise NoNetwork(f"needs {' and '.join(missing)} (Debian: iproute2, nftables)")
        if ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNET) != 0:
            raise NoNetwork(f"no network namespace: {os.strerror(ctypes.get_errno())}")
        _run(f"ip link set lo mtu {MTU} gso_max_segs 1 up")
        self.heal()

    def lose(self, permille: int, which: str = "") -> None:
        """Lose packets on their way, at random; 1000: all.

        :param which: nftables' words for those that can be lost, such as ``tcp sport 4222``; "": any.
        """
        self.heal()
        _run(f"nft add chain {_CHAIN} {{ type filter hook prerouting priority raw ; }}")
        _run(f"nft add rule {_CHAIN} {which} {_one_of(permille)} counter drop")

    def lose_and_reorder(self, lost: int, late: int) -> None:
        """Lose some packets and make others late, so that those which follow overtake them; both in permille."""
        self.lose(lost)
        _run("tc qdisc replace dev lo root handle 1: htb default 1")
        _run(f"tc class replace dev lo parent 1: classid 1:1 htb rate 1gbit quantum {MTU}")
        _run(f"tc class replace dev lo parent 1: classid {_LATE} htb rate {_LATE_RATE} {_BURST} quantum {MTU}")
        _run("nft add chain inet syncd late { type filter hook output priority mangle ; }")
        _run(f"nft add rule inet syncd late {_one_of(late)} meta priority set {_LATE}")

    def trickle(self, rate: int) -> None:
        """Let so many bytes a second through, of both directions together."""
        self.heal()
        _run(f"tc qdisc replace dev lo root tbf rate {rate * 8}bit burst 2k limit 200k")

    def heal(self) -> None:
        """Let everything through, as quick as it comes."""
        _run("tc qdisc replace dev lo root pfifo limit 1000")
        for command in ("add", "delete", "add"):  # only what is there can be deleted
            _run(f"nft {command} table inet syncd")

    def lost(self) -> int:
        """How many packets :meth:`lose` has lost."""
        told = _run(f"nft list chain {_CHAIN}")
        return int(told.partition("packets ")[2].split(maxsplit=1)[0])

    def tcp(self, name: str) -> int:
        """One of the kernel's counters of this network, such as ``TCPLostRetransmit``."""
        lines = Path("/proc/thread-self/net/netstat").read_text().splitlines()
        counts: dict[str, str] = {}
        for names, values in zip(lines[::2], lines[1::2], strict=True):
            counts |= dict(zip(names.split(), values.split(), strict=True))
        return int(counts[name])


def _one_of(permille: int) -> str:
    return f"numgen random mod {_PERMILLE} < {permille}" if permille < _PERMILLE else ""


def _run(command: str) -> str:
    done = subprocess.run(command.split(), capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise NoNetwork(f"{command}: {done.stderr.strip()}")
    return done.stdout


def in_network(work: Callable[[Network], Coroutine[Any, Any, None]]) -> None:
    """Run a coroutine in a loop, a thread and a network of its own; skip the test where there is no such network.

    What it begins, threads and processes, is in that network as well, if it is begun by the loop's own thread or one of
    those.
    """
    ended: list[BaseException | None] = []
    running: list[tuple[asyncio.AbstractEventLoop, asyncio.Task[Any]]] = []

    async def noted(network: Network) -> None:
        task = asyncio.current_task()
        assert task is not None
        running.append((asyncio.get_running_loop(), task))
        await work(network)

    def run() -> None:
        try:
            asyncio.run(noted(Network()))
        except BaseException as error:  # noqa: BLE001 - it goes to who waits
            ended.append(error)
        else:
            ended.append(None)

    thread = threading.Thread(target=run, name="network", daemon=True)
    thread.start()
    try:
        thread.join()
    except BaseException:  # the test's time is over, or a person ends it: its servers are not to outlive it
        for loop, task in running:
            loop.call_soon_threadsafe(task.cancel)
        thread.join(10)
        raise
    [error] = ended
    if isinstance(error, NoNetwork):
        pytest.skip(str(error))
    if error is not None:
        raise error
