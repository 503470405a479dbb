"""systemd's notification protocol (sd_notify(3)): a datagram to the socket that ``$NOTIFY_SOCKET`` names.

Rules kept here: never blocks, never raises; without a service manager everything is a no-op.
"""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping


def sd_notify(state: str, environ: Mapping[str, str] = os.environ) -> bool:
    """Tell the service manager, for example ``READY=1`` or ``STATUS=3 folders``; lines may be joined.

    :returns: whether the message was handed over; ``False`` also where nobody listens.
    """
    address = environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return False
    name = "\0" + address[1:] if address.startswith("@") else address
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.settimeout(0)  # a manager that does not read must not stop the event loop
            sock.sendto(state.encode("utf-8", "backslashreplace"), name)
    except (OSError, ValueError):  # no such socket, a full one, a name that is too long or holds NUL
        return False
    return True


def watchdog_interval(environ: Mapping[str, str] = os.environ, *, pid: int | None = None) -> float | None:
    """Return how often, in seconds, to send ``WATCHDOG=1``: half of what the manager allows.

    :param pid: this process, an argument for tests.
    :returns: ``None`` where there is no watchdog, or it watches another process (``$WATCHDOG_PID``).
    """
    allowed = environ.get("WATCHDOG_USEC", "")
    watched = environ.get("WATCHDOG_PID", "")
    if not (allowed.isascii() and allowed.isdigit()) or int(allowed) == 0:
        return None
    if watched and watched != str(os.getpid() if pid is None else pid):
        return None
    return int(allowed) / 2_000_000
