"""nats-py's client, made fit for a connection that a supervisor watches, and publishing with back-pressure.

The overrides are of nats-py 2.16; a test notices when a newer one has other inner names.
"""

from __future__ import annotations

import asyncio
import fcntl
import struct
import termios
from typing import TYPE_CHECKING, Any, Final

import nats.aio.client
import nats.errors
from nats.aio.client import Client
from nats.protocol.parser import AWAITING_MSG_PAYLOAD

from syncd.errors import StoreRejected

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

ROOM_FOR_HEADERS: Final = 64 * 1024
PENDING_BYTES: Final = 16 << 20
MAX_CONTROL_LINE: Final = 4096
"""The server's default; a longer line makes it close the connection under everybody who uses it."""
READ_BYTES: Final = 256 * 1024
"""What is read from the socket at once; nats-py's own 32 KiB cost a large download a tenth of its time."""

nats.aio.client.DEFAULT_BUFFER_SIZE = READ_BYTES

_CONTROL_LINE_REST: Final = 64  # verb, blanks and lengths beside subject and reply


class OneClient(Client):
    """nats-py's client for exactly one connection to exactly one server.

    The overrides are of nats-py 2.16; a test notices when a newer one has other inner names.
    """

    def __init__(self, *, must_tls: bool) -> None:
        super().__init__()
        self._must_tls = must_tls
        self._tasks: set[asyncio.Task[Any]] = set()
        self.wants_certificate = False
        self.on_lost: Callable[[], None] | None = None

    async def _select_next_server(self) -> None:
        # The original retries a server that does not answer at least once, and for ever with -1.
        server = self._server_pool[0]
        await self._connect_to_server(server)
        self._current_server = server

    async def _process_info(
        self,
        info: dict[str, Any],
        initial_connection: bool = False,  # noqa: FBT001, FBT002 - nats-py's signature
    ) -> None:
        # The original talks (and sends the password) in clear text where INFO, which anybody on the way may
        # have written, does not require TLS.
        self.wants_certificate = bool(info.get("tls_verify"))
        if initial_connection and self._must_tls and not self.options["tls_handshake_first"]:
            info["tls_required"] = bool(info.get("tls_required") or info.get("tls_available"))
            if not info["tls_required"]:
                raise nats.errors.SecureConnWantedError
        await super()._process_info(info, initial_connection)

    async def _process_pong(self) -> None:
        # The original dies (its read loop ends) on the late answer to a flush that has timed out.
        if self._pongs and self._pongs[0].done():
            self._pongs[0] = asyncio.get_running_loop().create_future()
        await super()._process_pong()

    async def _close(
        self,
        status: int,
        do_cbs: bool = True,  # noqa: FBT001, FBT002 - nats-py's signature
    ) -> None:
        # The original waits until the socket has taken all that is buffered (never, if the server is frozen), and
        # for the end of a transport that a failed TLS handshake has taken over (never).
        self.abort()
        self._transport = None
        for sub in self._subs.values():
            if isinstance(sub._wait_for_msgs_task, asyncio.Task):  # noqa: SLF001
                self._tasks.add(sub._wait_for_msgs_task)  # noqa: SLF001
        if current := asyncio.current_task():
            self._tasks.add(current)
        await super()._close(status, do_cbs)

    def abort(self) -> None:
        """Drop the socket now, with all that is buffered for it."""
        self._pending.clear()
        self._pending_data_size = 0
        writer = getattr(self._transport, "_io_writer", None)
        if writer is not None:
            writer.transport.abort()
        if self.on_lost is not None:
            self.on_lost()

    @property
    def unsent(self) -> int:
        """Bytes on their way out: in nats-py's buffer, asyncio's, and the kernel's, until the other end has them."""
        writer = getattr(self._transport, "_io_writer", None)
        if writer is None or (sock := writer.get_extra_info("socket")) is None or sock.fileno() < 0:
            return self._pending_data_size
        (queued,) = struct.unpack("i", fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, bytes(4)))
        return self._pending_data_size + int(writer.transport.get_write_buffer_size()) + int(queued)

    @property
    def arriving(self) -> int:
        """Bytes that are here of a message which is not whole yet."""
        return len(self._ps.buf) if self._ps.state == AWAITING_MSG_PAYLOAD else 0

    def note_life(self) -> None:
        """Count the unanswered pings anew: on a slow line the answers stand behind a message that takes a minute."""
        self._pings_outstanding = 0

    def loops(self) -> set[asyncio.Task[Any]]:
        """The tasks without which the client is dead, whatever its status says."""
        names = ("_reading_task", "_ping_interval_task", "_flusher_task")
        return {task for name in names if (task := getattr(self, name)) is not None}

    async def dispose(self) -> None:
        """Drop the socket and end all tasks, within a second; never raises but on cancellation."""
        self.on_lost = None
        self.abort()
        if self._flush_queue is not None:  # else connect() never began, and there is nothing to close
            await self.close()
        tasks = {t for t in self._tasks | self.loops() if not t.done()} - {asyncio.current_task()}
        if tasks:  # close() has cancelled them
            await asyncio.wait(tasks, timeout=1)
        await asyncio.sleep(0)  # the aborted transport closes its socket in the next turn of the loop


def _cancelling() -> int:
    task = asyncio.current_task()
    return task.cancelling() if task is not None else 0


async def send(
    client: Client,
    subject: str,
    payload: bytes,
    *,
    reply: str = "",
    headers: Mapping[str, str] | None = None,
    deadline: float,
) -> None:
    """Publish, with back-pressure, until ``deadline`` (the loop's clock).

    ``Client.publish`` swallows a cancellation that hits it while it waits for a full buffer; this does not.

    :raises TimeoutError: the buffer stayed full; the message may still be sent.
    :raises nats.errors.Error: see :func:`as_syncd_error`.
    """
    fields = dict(headers) if headers else None
    if client.is_connected and client.pending_data_size + len(payload) < PENDING_BYTES - ROOM_FOR_HEADERS:
        # Below its limit nats-py (2.16) only appends to its buffer: no wait to bound, or to be cancelled in.
        await client.publish(subject, payload, reply=reply, headers=fields)
        return
    cancelled = _cancelling()
    async with asyncio.timeout_at(deadline) as limit:
        await client.publish(subject, payload, reply=reply, headers=fields)
    if _cancelling() > cancelled:
        raise asyncio.CancelledError
    if limit.expired():
        raise TimeoutError


def check_size(client: Client, subject: str, reply: str, payload: bytes, headers: Mapping[str, str] | None) -> None:
    """Refuse what makes the server close the connection under everybody (nats-py looks at the payload)."""
    size = len(payload)
    if headers:
        size += len("NATS/1.0\r\n\r\n") + sum(len(k.encode()) + len(v.encode()) + 4 for k, v in headers.items())
    if size > client.max_payload:
        raise StoreRejected(f"a message of {size} bytes to {subject}: the server takes {client.max_payload}")
    if len(subject.encode()) + len(reply.encode()) + _CONTROL_LINE_REST > MAX_CONTROL_LINE:
        raise StoreRejected(f"a subject of {len(subject.encode())} bytes is too long: {subject[:64]}…")
