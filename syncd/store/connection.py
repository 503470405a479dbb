"""The one supervised connection of a daemon to NATS.

Rules this module keeps:

* One nats-py client per connection: whenever a connection ends, for whatever reason, its client is thrown
  away and a new one is made (``epoch`` grows). nats-py's own reconnecting is switched off, because in 2.16 it
  can stop for ever: it waits for the old socket to take its buffered bytes (a frozen server never does), any
  exception of an unforeseen type ends the reconnecting task silently, an expired JWT or an unknown ``-ERR``
  closes the client for good, and TLS files and nkeys are read only once. Subscriptions therefore belong to a
  client: make them anew when ``epoch`` has grown.
* Credentials and TLS files are read anew, in a thread, for every connection.
* Nothing waits without a deadline, and a lost connection fails its waiting requests at once.
* The log tells changes of state: the first failure of each kind and the recovery, not the middle.
* No secret in a log event, an error message or a repr (user info in server addresses included).
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import nats.errors
import structlog

from syncd.errors import ConfigError, NotPermitted, StoreTimeout, SyncdError, Unavailable
from syncd.retry import backoff
from syncd.store.address import ConnectionOptions, Server, check_options, wants_tls
from syncd.store.client import PENDING_BYTES, OneClient, check_size, send
from syncd.store.login import load, sign_nonce
from syncd.store.reasons import (
    CertificateProblem,
    NoResponders,
    as_syncd_error,
    certificate_refused,
    check_version,
    denied_subject,
    explain,
    not_permitted,
    parse_version,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from nats.aio.msg import Msg
    from nats.aio.subscription import Subscription

RETRY_FIRST: Final = 0.25
RETRY_CAP: Final = 4.0
"""Seconds between attempts, before jitter: a large fleet spreads over two seconds, and is back soon."""

STEADY_SECONDS: Final = 10.0
"""A connection that lived that long was a good one: the next attempt begins with the short wait again."""

MAX_OUTSTANDING_PINGS: Final = 2
FLUSH_SECONDS: Final = 10
CLOSE_SECONDS: Final = 1.5
CANCEL_SECONDS: Final = 2.0
"""More than ending a connection takes, which a second cancellation would cut short."""
_MAX_DISCOVERED: Final = 64
_MAX_REMEMBERED_DENIALS: Final = 256
_JETSTREAM_NOT_ENABLED: Final = frozenset({10039, 10076})  # for the account; on the server
_NO_RESPONDERS: Final = "503"


@dataclass(slots=True, eq=False)
class _Waiting:
    subject: str
    future: asyncio.Future[Msg]


@dataclass(slots=True, eq=False)
class _Link:
    """A living connection and the requests that wait on it, by the last token of their reply subjects."""

    client: OneClient
    server: Server
    lost: asyncio.Future[None]
    inbox: str = ""
    subscription: Subscription | None = None
    waiting: dict[str, _Waiting] = field(default_factory=dict)

    def fail(self, error: SyncdError, subject: str | None = None) -> None:
        """Fail all waiting requests, or those to one (lower-cased) subject."""
        for waiting in list(self.waiting.values()):
            if not waiting.future.done() and (subject is None or waiting.subject.lower() == subject):
                waiting.future.set_exception(error)


@dataclass(slots=True, eq=False)
class _DenialWatch:
    subject: str
    callback: Callable[[NotPermitted], None]

    def takes(self, lowered: str) -> bool:
        mine = self.subject.lower()
        return lowered == mine or (mine.endswith((">", ".")) and lowered.startswith(mine.removesuffix(">")))


class Connection:
    """The supervised connection. Use it from one event loop.

    :param options: see there.
    :param log: a structlog logger; default: the global one.
    :param rng: uniform numbers in [0, 1) for the jitter.
    :raises ConfigError: the options can never work.
    """

    def __init__(
        self, options: ConnectionOptions, *, log: Any = None, rng: Callable[[], float] = random.random
    ) -> None:
        self._options = options
        self._pool = check_options(options)
        random.shuffle(self._pool)
        self._log = log if log is not None else structlog.get_logger()
        self._rng = rng
        self._task: asyncio.Task[None] | None = None
        self._link: _Link | None = None
        self._closed = False
        self._changed = asyncio.Event()
        self._error: SyncdError | None = None
        self._refusals = 0
        self._told: set[type[SyncdError]] = set()
        self._denials_told: set[str] = set()
        self._watches: list[_DenialWatch] = []
        self._tokens = itertools.count(1)
        self.epoch = 0

    def __repr__(self) -> str:
        return f"<Connection {self._options.name!r} {self.state} epoch {self.epoch}>"

    # --- state ---

    @property
    def state(self) -> str:
        """One of connecting (never connected yet) | connected | disconnected | closed (or not started)."""
        if self._closed or self._task is None:
            return "closed"
        if self._link is not None:
            return "connected"
        return "disconnected" if self.epoch else "connecting"

    @property
    def last_error(self) -> str:
        """Why the last attempt failed or the last connection ended, "" if none did; one line, no secrets."""
        return str(self._error) if self._error else ""

    @property
    def api(self) -> str:
        """The prefix of JetStream's API subjects, without a dot at its end."""
        if self._options.api_prefix:
            return self._options.api_prefix.rstrip(".")
        return f"$JS.{self._options.domain}.API" if self._options.domain else "$JS.API"

    @property
    def host(self) -> str:
        """The connected server's ``host:port``; all configured ones where there is none."""
        return self._link.server.host if self._link else ", ".join(s.host for s in self._pool if not s.discovered)

    async def server_version(self) -> tuple[int, int, int]:
        """Return the version of the connected server (not of other servers of its cluster).

        :raises Unavailable, NotPermitted: not connected, see :meth:`client`.
        """
        return parse_version((await self.client()).connected_server_version)

    # --- life ---

    async def start(self, max_seconds: float | None = None) -> None:
        """Begin to connect, and stay connected until :meth:`close`.

        :param max_seconds: wait that long for the first connection; ``None``: return at once, try for ever.
        :raises ConfigError, NotPermitted, Unavailable: (with ``max_seconds``) no connection; nothing is left
            running. What waiting does not mend is raised once each server was tried, the rest at the end.
        """
        if self._task is not None:
            raise RuntimeError("a Connection is started once")
        self._task = asyncio.create_task(self._supervise(), name=f"nats-connection-{self._options.name}")
        if max_seconds is None:
            return
        try:
            await self._first(max_seconds)
        except BaseException:
            await self.close()
            raise

    async def _first(self, max_seconds: float) -> None:
        try:
            async with asyncio.timeout(max_seconds):
                while not self.epoch:
                    if self._error is not None and self._refusals >= len(self._pool):
                        raise self._error
                    await self._changed.wait()
        except TimeoutError:
            raise self._error or self._silent(max_seconds) from None

    def _silent(self, max_seconds: float) -> Unavailable:
        return Unavailable(f"no connection to nats server at {self.host} within {max_seconds:g} s")

    async def close(self) -> None:
        """Let the server take what was published (for CLOSE_SECONDS at most), then close; no task is left."""
        if self._closed or self._task is None:
            self._closed = True
            return
        self._closed = True
        flush = asyncio.create_task(self._link.client.flush()) if self._link else None
        try:
            if flush is not None:
                await asyncio.wait({flush}, timeout=CLOSE_SECONDS)
        finally:
            while not self._task.done():  # bounded: _supervise sees that it is closed, and waits only for dispose()
                self._task.cancel()
                await asyncio.wait({self._task}, timeout=CANCEL_SECONDS)
            self._notify()
            if flush is not None:
                await _end(flush)

    async def _supervise(self) -> None:
        loop = asyncio.get_running_loop()
        waits = backoff(RETRY_FIRST, RETRY_CAP, rng=self._rng)
        while True:
            server = self._pool.pop(0)
            self._pool.append(server)
            try:
                link = await self._connect(server)
            except SyncdError as error:
                self._note_failure(server, error)
            else:
                began = loop.time()
                self._note_connected(link)
                try:
                    await asyncio.wait({link.lost, *link.client.loops()}, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    self._drop(link)
                    await link.client.dispose()
                self._note_disconnected(link)
                if loop.time() - began >= STEADY_SECONDS:
                    waits = backoff(RETRY_FIRST, RETRY_CAP, rng=self._rng)
            if self._closed:  # connect() of nats-py can take the cancellation by close() for a failure
                return
            await asyncio.sleep(next(waits))

    async def _connect(self, server: Server) -> _Link:
        """Make one connection to one server.

        :raises SyncdError: why not; nothing is left open.
        """
        options = self._options
        secrets = await asyncio.to_thread(load, options, server)
        client = OneClient(must_tls=wants_tls(options, server))
        link = _Link(client, server, lost=asyncio.get_running_loop().create_future())

        async def on_error(exc: Exception) -> None:
            self._on_error(link, exc)

        try:
            async with asyncio.timeout(3 * options.connect_seconds):
                await client.connect(
                    servers=[server.url.geturl()],
                    name=options.name,
                    error_cb=on_error,
                    allow_reconnect=False,
                    connect_timeout=options.connect_seconds,  # type: ignore[arg-type]  # any number works
                    ping_interval=options.ping_seconds,  # type: ignore[arg-type]
                    max_outstanding_pings=MAX_OUTSTANDING_PINGS,
                    pending_size=PENDING_BYTES,
                    flush_timeout=FLUSH_SECONDS,
                    inbox_prefix=options.inbox_prefix,
                    tls=secrets.tls,
                    tls_hostname=(options.tls_server_name or server.tls_name) or None,
                    tls_handshake_first=options.tls_handshake_first,
                    user=options.user or None,
                    password=secrets.password,
                    token=secrets.token,
                    user_jwt_cb=secrets.jwt.encode if secrets.jwt else None,
                    signature_cb=(lambda nonce: sign_nonce(secrets.seed, nonce)) if secrets.jwt else None,
                    nkeys_seed_str=secrets.seed if not secrets.jwt and secrets.seed else None,
                )
            # nats-py 2.16 takes a closed socket for a PONG, and stays "connecting".
            if not client.is_connected:
                raise client.last_error or nats.errors.UnexpectedEOF()
        except Exception as exc:  # a border: whatever nats-py raises, the daemon goes on trying
            error = explain(exc, server, options)
            # RACE: with TLS 1.3 the server judges our certificate after the handshake; its alert gets lost where it
            # closes the socket on bytes of ours it has not read. Then only the loss is seen.
            if client.wants_certificate and isinstance(exc, ConnectionError | nats.errors.UnexpectedEOF):
                error = certificate_refused(server, "it wants one that it trusts")
            await client.dispose()
            raise error from exc
        except BaseException:
            await client.dispose()
            raise
        client.on_lost = lambda: self._drop(link)
        return link

    # --- changes of state ---

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _note_connected(self, link: _Link) -> None:
        self.epoch += 1
        self._link = link
        self._refusals = 0
        self._told.clear()
        self._learn(link)
        version = ".".join(map(str, parse_version(link.client.connected_server_version)))
        self._log.info("nats_connected", server=link.server.host, epoch=self.epoch, version=version)
        self._notify()

    def _learn(self, link: _Link) -> None:
        """Take the other servers of the cluster into the pool, before the one we have."""
        known = {server.host for server in self._pool}
        for url in link.client.discovered_servers:
            sibling = link.server.sibling(url.geturl())
            if sibling is not None and sibling.host not in known and len(self._pool) < _MAX_DISCOVERED:
                known.add(sibling.host)
                self._pool.insert(0, sibling)

    def _note_failure(self, server: Server, error: SyncdError) -> None:
        refused = isinstance(error, ConfigError | NotPermitted | CertificateProblem)
        self._refusals = self._refusals + 1 if refused else 0
        self._error = error
        if server.discovered:
            self._pool.remove(server)  # its cluster tells us again when it is back
        if type(error) not in self._told:
            self._told.add(type(error))
            self._log.warning("nats_refused", server=server.host, error=str(error))
        self._notify()

    def _drop(self, link: _Link) -> None:
        """Take a connection out of use; called at the moment it ends, and again when it is cleaned up."""
        if not link.lost.done():
            link.lost.set_result(None)
        if self._link is link:
            self._link = None
            self._notify()
        link.fail(Unavailable(f"the connection to nats server at {link.server.host} ended before the answer came"))

    def _note_disconnected(self, link: _Link) -> None:
        self._learn(link)  # those that joined since
        reason = link.client.last_error or nats.errors.UnexpectedEOF()
        error = as_syncd_error(reason, f"nats server at {link.server.host} ended the connection")
        if isinstance(reason, nats.errors.StaleConnectionError) and not isinstance(reason, nats.errors.UnexpectedEOF):
            error = Unavailable(f"nats server at {link.server.host} fell silent")
        self._error = error
        self._log.warning("nats_disconnected", server=link.server.host, epoch=self.epoch, error=str(error))

    def _on_error(self, link: _Link, exc: Exception) -> None:
        """nats-py's error callback: runs inside its read loop, so it must be quick and must not raise."""
        if (denied := denied_subject(str(exc))) is not None and isinstance(exc, nats.errors.Error):
            self._on_denial(link, *denied)
        elif isinstance(exc, nats.errors.SlowConsumerError):
            self._log.warning("nats_slow_consumer", subject=exc.subject)
        elif not isinstance(exc, nats.errors.Error | OSError):
            self._log.error("nats_callback_failed", error=repr(exc), exc_info=exc)
        # The rest (no connection, end of file) ends the client, and is told by the supervisor.

    def _on_denial(self, link: _Link, kind: str, lowered: str) -> None:
        watches = [watch for watch in self._watches if watch.takes(lowered)]
        names = [w.subject for w in link.waiting.values()] + [w.subject for w in watches]
        subject = next((name for name in names if name.lower() == lowered), lowered)
        error = not_permitted(kind, subject)
        if lowered not in self._denials_told and len(self._denials_told) < _MAX_REMEMBERED_DENIALS:
            self._denials_told.add(lowered)
            self._log.warning("nats_permission_denied", action=kind, subject=subject)
        if kind == "publish":
            link.fail(error, lowered)
        elif link.inbox and lowered == f"{link.inbox}.*".lower():
            link.inbox = ""  # the next request subscribes anew: the right may have been granted meanwhile
            link.fail(error)
        for watch in watches:
            try:
                watch.callback(error)
            except Exception as exc:  # noqa: BLE001 - nats-py's read loop must not end by a bug elsewhere
                self._log.error("nats_callback_failed", error=repr(exc), exc_info=exc)

    # --- use ---

    async def client(self, max_seconds: float = 10) -> OneClient:
        """Return the connected client; it belongs to the current ``epoch``.

        :raises Unavailable, NotPermitted: none within ``max_seconds``; names the last error.
        """
        return (await self._connected(max_seconds)).client

    async def _connected(self, max_seconds: float) -> _Link:
        try:
            async with asyncio.timeout(max_seconds):
                while self._link is None:
                    if self.state == "closed":
                        raise Unavailable("the connection to the nats server is closed")
                    await self._changed.wait()
                return self._link
        except TimeoutError:
            error = self._error or self._silent(max_seconds)
            kind = NotPermitted if isinstance(error, NotPermitted) else Unavailable
            raise kind(error.message, hint=error.hint) from None

    async def wait_epoch(self, seen: int, max_seconds: float) -> int:
        """Return the epoch as soon as it is greater than ``seen``, or when ``max_seconds`` have passed."""
        try:
            async with asyncio.timeout(max_seconds):
                while self.epoch <= seen:
                    await self._changed.wait()
        except TimeoutError:
            pass
        return self.epoch

    def on_denied(self, subject: str, callback: Callable[[NotPermitted], None]) -> Callable[[], None]:
        """Call back when the server denies us to publish or to subscribe to a subject.

        The server's message reaches us in lower case: subjects that differ in case only are not told apart.

        :param subject: ending in ">" or ".": every subject that begins so.
        :param callback: quick; runs in the event loop.
        :returns: call it to end the interest.
        """
        watch = _DenialWatch(subject, callback)
        self._watches.append(watch)

        def unregister() -> None:
            if watch in self._watches:
                self._watches.remove(watch)

        return unregister

    async def request(
        self,
        subject: str,
        payload: bytes = b"",
        *,
        headers: Mapping[str, str] | None = None,
        max_seconds: float | None = None,
    ) -> Msg:
        """Send a request and return its (first) answer.

        A request that failed with Unavailable or StoreTimeout may have been carried out all the same.

        :param max_seconds: for everything: waiting for a connection, sending, the answer.
        :raises NoResponders: nobody listens on ``subject``.
        :raises Unavailable: not connected, or the connection ended.
        :raises StoreTimeout: no answer.
        :raises NotPermitted: told at once, with the subject; also where our inbox is not permitted.
        :raises StoreRejected: larger than the server takes.
        """
        seconds = self._options.request_seconds if max_seconds is None else max_seconds
        loop = asyncio.get_running_loop()
        deadline = loop.time() + seconds
        link = await self._connected(seconds)
        token = f"{next(self._tokens):x}"
        waiting = _Waiting(subject, loop.create_future())
        link.waiting[token] = waiting
        try:
            inbox = await self._inbox(link, deadline)
            reply = f"{inbox}.{token}"
            check_size(link.client, subject, reply, payload, headers)
            await send(link.client, subject, payload, reply=reply, headers=headers, deadline=deadline)
            async with asyncio.timeout_at(deadline):
                answer = await waiting.future
        except TimeoutError:
            raise StoreTimeout(f"no answer on {subject} within {seconds:g} s") from None
        except nats.errors.Error as exc:
            raise as_syncd_error(exc, f"request to {subject}") from exc
        finally:
            del link.waiting[token]
            if waiting.future.done() and not waiting.future.cancelled():
                waiting.future.exception()  # it counts as seen, also if something else was raised first
        if answer.headers and answer.headers.get("Status") == _NO_RESPONDERS:
            raise NoResponders(f"nobody answers on {subject}")
        return answer

    async def _inbox(self, link: _Link, deadline: float) -> str:
        if not link.inbox:
            link.inbox = link.client.new_inbox()

            async def on_answer(message: Msg) -> None:
                waiting = link.waiting.get(message.subject.rpartition(".")[2])
                if waiting is not None and not waiting.future.done():
                    waiting.future.set_result(message)

            dead, link.subscription = link.subscription, None
            try:
                async with asyncio.timeout_at(deadline):
                    # Concurrent requests go on with the new inbox: their PUB is queued after this SUB.
                    link.subscription = await link.client.subscribe(f"{link.inbox}.*", cb=on_answer)
                    if dead is not None:
                        await dead.unsubscribe()
            except BaseException:
                link.inbox = ""
                raise
        return link.inbox


async def _end(task: asyncio.Task[Any]) -> None:
    """Cancel until it has ended: parts of nats-py swallow a first cancellation."""
    while not task.done():
        task.cancel()
        await asyncio.wait({task}, timeout=0.1)
    if not task.cancelled():
        task.exception()


async def require_jetstream(conn: Connection) -> None:
    """Check that the connected server is new enough and gives our account JetStream.

    Not for subscribers: their account may rightly have none (it imports the few services they need).

    :raises Unavailable: too old a server, or no JetStream here.
    :raises NotPermitted, StoreTimeout: we could not ask.
    """
    check_version(await conn.server_version(), conn.host)
    try:
        answer = await conn.request(f"{conn.api}.INFO")
    except NoResponders:
        hint = "enable jetstream in the server's configuration; for a leaf node see nats.domain"
        raise Unavailable(f"JetStream is not enabled on nats server at {conn.host}", hint=hint) from None
    try:
        error = json.loads(answer.data).get("error") or {}
        is_disabled, text = error.get("err_code", 0) in _JETSTREAM_NOT_ENABLED, str(error.get("description", ""))
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise Unavailable(f"nats server at {conn.host} gave no readable answer on {conn.api}.INFO") from None
    if is_disabled:
        raise Unavailable(
            f"JetStream is not enabled for our account on nats server at {conn.host}",
            hint="enable jetstream for the account",
        )
    if error:
        raise Unavailable(f"JetStream on nats server at {conn.host} is not available: {text}")
