"""The tools that syncd is measured beside."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks.peers.copy import Copy
from benchmarks.peers.lsyncd import Lsyncd
from benchmarks.peers.natspy import NatsPy
from benchmarks.peers.rclone import Rclone
from benchmarks.peers.rsync import Rsync, RsyncCompressed, RsyncWhole
from benchmarks.peers.syncd import Syncd
from benchmarks.peers.syncthing import Syncthing
from benchmarks.peers.unison import Unison

if TYPE_CHECKING:
    from benchmarks.peers.base import Peer

PEERS: dict[str, Peer] = {
    peer.name: peer
    for peer in (
        Syncd(), Rsync(), RsyncCompressed(), RsyncWhole(), Copy(), NatsPy(), Syncthing(), Unison(), Rclone(), Lsyncd(),
    )
}  # fmt: skip
