"""Other addresses for the brokers of a cluster, where connections can be hurt: cut, slowed, their answers lost, requests late.

What lives here: ``Proxy``, and what its faults give back: ``Held`` with its ``Outcome``, ``Dropping`` and ``Refusing``.

Rules.
    * Clients that begin here stay here: every broker's address in an answer is replaced by one of ours (``wire`` knows where).
    * Everything happens in one thread with an event loop of its own. What is called from other threads goes there first.
    * In each direction frames keep their order, as TCP has it: after one is lost, the connection has no future.
    * Nothing is silently wrong: what cannot be looked into is passed on as it is, logged once for its kind, and counted.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import struct
import threading
import time
from collections import Counter
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from . import wire
from .wire import API, Request, WireError

if TYPE_CHECKING:
    import random
    from collections.abc import AsyncIterator, Callable, Collection, Iterator, Mapping

    from typing_extensions import Self

    Clients = Callable[[str], bool]
    Address = tuple[str, int]
    T = TypeVar("T")

__all__ = ["API", "Dropping", "Held", "Outcome", "Proxy", "Refusing", "Request"]

log = logging.getLogger(__name__)

_HERE = "127.0.0.1"
_CONNECT_S = 10.0
_CALL_S = 10.0
_ANSWER_S = 30.0  # how long the answer to a held request is waited for
_REFUSED_S = 0.3  # how long a refusal waits for the request behind it
_BACKLOG = 128
_QUEUED_FRAMES = 256  # of one direction of one connection; then it is read no further
_BUFFER = 1024 * 1024


@dataclass(frozen=True)
class Outcome:
    """What became of a request that was held back.

    Attributes:
        sent: whether it was sent to the broker after all.
        error: the error code in the broker's answer; None where there is no answer, or none that is understood (``wire``
            knows those of EndTxn, AddPartitionsToTxn, AddOffsetsToTxn, TxnOffsetCommit, OffsetCommit and Produce).
        detail: for people.
    """

    sent: bool
    error: int | None
    detail: str


class NotRunning(RuntimeError):
    """The proxy has ended, or has not begun."""


class Held:
    """A request that is to be held back, then is, then comes late. From :meth:`Proxy.hold`; for any thread.

    Attributes:
        request: what is held; None as long as nothing is.
        held_at, released_at: ``time.monotonic()``; None as long as it did not happen.
    """

    def __init__(self, proxy: Proxy, apis: Collection[int], seconds: float | None, clients: Clients | None) -> None:
        self.request: Request | None = None
        self.held_at: float | None = None
        self.released_at: float | None = None
        self._proxy = proxy
        self._apis = frozenset(apis)
        self._clients = clients
        self._seconds = seconds
        self._taken = threading.Event()
        self._done = threading.Event()
        self._outcome: Outcome | None = None
        self._release = asyncio.Event()

    def wait(self, timeout: float) -> Request:
        """Wait until a request is held, and its client was cut. Returns it.

        Raises:
            TimeoutError: no such request came.
        """
        if not self._taken.wait(timeout) or self.request is None:
            raise TimeoutError(f"no request was held within {timeout} s{self._how_it_ended()}")
        return self.request

    def release(self, timeout: float = _ANSWER_S) -> Outcome:
        """Send it to the broker now, and wait for the answer. Of one that was released already: what became of it.

        Raises:
            TimeoutError: no request is held yet, or the broker does not answer.
        """
        self.wait(0)
        if not self._done.is_set():
            self._proxy._call(self._release.set)
        return self.result(timeout)

    def result(self, timeout: float) -> Outcome:
        """Wait until it was released and answered.

        Raises:
            TimeoutError: it was not.
        """
        if not self._done.wait(timeout) or self._outcome is None:
            raise TimeoutError(f"what is held was not released and answered within {timeout} s")
        return self._outcome

    def cancel(self) -> None:
        """Hold nothing any more: what is held is thrown away, and what is not held yet will not be."""
        self._proxy._call(partial(self._proxy._forget, self))

    def _how_it_ended(self) -> str:
        return "" if self._outcome is None else f": {self._outcome.detail}"

    def _wants(self, request: Request) -> bool:
        return request.api in self._apis and _chosen(self._clients, request.client_id)

    def _take(self, request: Request) -> None:
        """The request is held, and its client does not know yet."""
        self.request = request
        self.held_at = time.monotonic()

    def _cut(self) -> None:
        """The client has lost its connection. Seconds are counted from here."""
        if self._seconds is not None:
            asyncio.get_running_loop().call_later(self._seconds, self._release.set)
        self._taken.set()

    def _finish(self, outcome: Outcome) -> None:
        if self._outcome is None:
            self._outcome = outcome
            self._taken.set()
            self._done.set()
            log.info("%s, held back: %s", self.request or "nothing", outcome.detail)


class Dropping:
    """Answers that are to be lost, and were. From :meth:`Proxy.drop_responses`; for any thread."""

    def __init__(
        self, proxy: Proxy, apis: Collection[int], count: int, clients: Clients | None, cut_after: float | None
    ) -> None:
        self._proxy = proxy
        self._apis = frozenset(apis)
        self._left = count
        self._clients = clients
        self._cut_after = cut_after
        self._dropped: list[Request] = []
        self._done = threading.Event()

    @property
    def dropped(self) -> list[Request]:
        """The requests whose answers were lost so far."""
        return list(self._dropped)

    def wait(self, timeout: float) -> list[Request]:
        """Wait until all answers that were to be lost are. Returns their requests.

        Raises:
            TimeoutError: there were not so many.
        """
        if not self._done.wait(timeout):
            raise TimeoutError(f"{len(self._dropped)} answers were dropped within {timeout} s, {self._left} were not")
        return self.dropped

    def cancel(self) -> None:
        """Drop no more."""
        self._proxy._call(partial(self._proxy._stop_dropping, self))

    def _take(self, request: Request) -> bool:
        if request.api not in self._apis or not _chosen(self._clients, request.client_id):
            return False
        self._left -= 1
        self._dropped.append(request)
        return True


class Refusing:
    """Produces that are to be refused, and were. From :meth:`Proxy.refuse_records`; for any thread.

    Attributes:
        refused: the requests that were, so far.
    """

    def __init__(self, proxy: Proxy, count: int, *, beginning: bool) -> None:
        self.refused: list[Request] = []
        self._proxy = proxy
        self._left = count
        self._begun: set[str] | None = set() if beginning else None  # who has a new producer id

    def cancel(self) -> None:
        """Refuse no more."""
        self._proxy._call(partial(self._proxy._refusing.pop, self, None))

    def _note(self, request: Request) -> None:
        if request.api == API["InitProducerId"] and self._begun is not None:
            self._begun.add(request.client_id)

    def _wants(self, request: Request) -> bool:
        begun = self._begun is None or request.client_id in self._begun
        return self._left > 0 and begun and request.answered

    def _take(self, request: Request) -> None:
        if self._begun is not None:
            self._begun.remove(request.client_id)  # and what it has on its way behind this one is taken
        self._left -= 1
        self.refused.append(request)


class Proxy:
    """A place on 127.0.0.1 for each broker of a cluster. Connections through it can be hurt. A context manager.

    For PLAINTEXT and SASL_PLAINTEXT (not with Kerberos, where the server's name counts); TLS cannot be looked into. Clients
    speak Produce up to 9 and Fetch up to 15, no share groups, and transactions before KIP-890's second part (see ``wire``).

    A broker that is down when a client comes: the client is disconnected. A broker that comes back on its address has the same
    place; a broker that is new has one as soon as an answer tells of it.

    A fault that takes ``clients`` hurts only these, by their ``client.id``; None means all.

    Args:
        bootstrap: ``"host:port,host:port"`` of the cluster.

    Raises:
        ValueError: bootstrap is empty or for TLS.
    """

    def __init__(self, bootstrap: str) -> None:
        self._bootstrap = wire.addresses(bootstrap)
        self._ports: dict[Address, int] = {}
        self._servers: list[socket.socket] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._links: set[_Link] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._stop = asyncio.Event()
        self._refusals = 0
        self._accepted: set[socket.socket] = set()  # that nobody serves yet
        self._delays: list[tuple[float, Clients | None]] = []
        self._holds: list[Held] = []
        self._droppings: list[Dropping] = []
        self._refusing: dict[Refusing, None] = {}
        self._requests: Counter[tuple[str, str]] = Counter()
        self._acks: dict[str, set[int]] = {}
        self._not_understood: Counter[str] = Counter()

    def __enter__(self) -> Self:
        started: Future[None] = Future()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main(started)), name="kafka-proxy", daemon=True)
        self._thread.start()
        started.result(_CALL_S)
        return self

    def __exit__(self, *_: object) -> None:
        loop, self._loop = self._loop, None
        if loop is not None and self._thread is not None:
            loop.call_soon_threadsafe(self._stop.set)
            self._thread.join()

    @property
    def bootstrap(self) -> str:
        """What goes into ``bootstrap.servers``."""
        routes = self.routes
        return ",".join(routes[f"{host}:{port}"] for host, port in self._bootstrap)

    @property
    def routes(self) -> Mapping[str, str]:
        """Broker's address -> its place here, of all brokers that were heard of."""
        return {f"{host}:{port}": f"{_HERE}:{ours}" for (host, port), ours in self._call(lambda: dict(self._ports)).items()}

    @property
    def connections(self) -> int:
        """How many clients' connections are open."""
        return self._call(lambda: len(self._links))

    def requests(self, clients: Clients | None = None) -> Mapping[str, int]:
        """How many requests were passed on to brokers, by the name of their API."""
        found: Counter[str] = Counter()
        for (client_id, name), count in self._call(lambda: dict(self._requests)).items():
            if _chosen(clients, client_id):
                found[name] += count
        return found

    @property
    def acks(self) -> Mapping[str, set[int]]:
        """With which acks each client has produced, by its ``client.id``: 0, 1 or -1 (all)."""
        return self._call(lambda: {client: set(acks) for client, acks in self._acks.items()})

    @property
    def not_understood(self) -> Mapping[str, int]:
        """What was passed on as it was since it could not be looked into, and how often. Empty where all is well."""
        return self._call(lambda: dict(self._not_understood))

    # -- faults --------------------------------------------------------------------------------------------------------

    def cut(self, only: float = 1.0, rng: random.Random | None = None, *, clients: Clients | None = None) -> int:
        """Close connections, on the clients' side and on the brokers'. What was on its way is lost, in both directions.

        Stands for a network that breaks, a load balancer, ``connections.max.idle.ms``: the client cannot know which of its
        requests took effect (X01; B03: librdkafka sends them again).

        Args:
            only: the probability with which each is closed.
            rng: decides; needed where ``only`` is less than 1.
            clients: which ones.

        Returns:
            how many were closed.

        Raises:
            ValueError: ``only`` without ``rng``.
        """
        if only < 1.0 and rng is None:
            raise ValueError("only: it takes a rng to choose")

        def doing() -> int:
            links = sorted(self._links_of(clients), key=lambda link: link.number)  # for the same choice with the same seed
            chosen = [link for link in links if rng is None or rng.random() < only]
            for link in chosen:
                link.cut()
            return len(chosen)

        return self._call(doing)

    @contextmanager
    def refuse(self) -> Iterator[None]:
        """Let nobody through: all connections are cut, and new ones are closed as soon as they are made.

        Stands for brokers that cannot be reached, all of them, while they work on: sessions and transactions time out.
        """

        def begin() -> None:
            self._refusals += 1
            for link in list(self._links):
                link.cut()

        def end() -> None:
            self._refusals -= 1

        self._call(begin)
        try:
            yield
        finally:
            self._call(end)

    @contextmanager
    def delay(self, seconds: float, *, clients: Clients | None = None) -> Iterator[None]:
        """Pass every frame on so much later, in both directions, so that an answer takes twice as long.

        Frames that are on their way at the end keep their delay. Several at a time add up.

        Stands for a slow network: commits that take longer than a second (X01), requests that time out on their way and
        arrive nevertheless, with delays beyond ``socket.timeout.ms``.

        Args:
            seconds: per frame and direction.
            clients: whose.
        """
        entry = (seconds, clients)
        self._call(partial(self._delays.append, entry))
        try:
            yield
        finally:
            self._call(partial(self._delays.remove, entry))

    def drop_responses(
        self,
        apis: Collection[int],
        count: int = 1,
        *,
        clients: Clients | None = None,
        cut_after: float | None = 0.2,
    ) -> Dropping:
        """Lose the next answers to requests of some APIs. The requests reach the broker, and take effect.

        After the first one no other answer passes on that connection either, as it is with TCP; then it is cut.

        Stands for a broker that fails, or a connection that breaks, between an effect and its answer: whoever sends again
        does it twice (Produce without idempotence), whoever does not may believe that it never happened (EndTxn: X01).

        Args:
            apis: API keys, as in ``API``.
            count: how many answers.
            clients: whose.
            cut_after: seconds from the first lost answer until the connection is cut. None: it is not, only these
                answers are missing, and librdkafka waits for ``socket.timeout.ms``.
        """
        dropping = Dropping(self, apis, count, clients, cut_after)
        self._call(partial(self._droppings.append, dropping))
        return dropping

    def refuse_records(self, count: int = 1, *, beginning: bool = False) -> Refusing:
        """Answer the next Produces as a broker does that does not lead their partitions. Nothing of them is written.

        The answer waits for another Produce to one of its partitions that reaches the broker, for a moment. Produce with
        acks=0, which has no answer, is not refused.

        Stands for partitions that get a leader, or another one, while they are produced to: whoever has several requests on
        their way sees the first refused, and the next one taken (P13, confluent-kafka-go 921).

        Args:
            count: how many.
            beginning: only the first one of a client that has asked for a producer id since: a broker that knows nothing of a
                producer takes any sequence number of it.
        """
        refusing = Refusing(self, count, beginning=beginning)
        self._call(partial(self._refusing.setdefault, refusing))
        return refusing

    def hold(self, apis: Collection[int], seconds: float | None = None, *, clients: Clients | None = None) -> Held:
        """Keep the next request of some APIs back, cut its client, and send the request to the broker later.

        The client connects again and sends its request anew; the one that was held arrives when nobody expects it, on its
        own connection, which the broker has had all the time. What the client sent behind it on that connection is lost.

        Stands for a request that waits in a router, a paused broker's socket, a proxy: of an earlier transaction, in a
        later one (X01, KAFKA-17754).

        Args:
            apis: API keys, as in ``API``.
            seconds: when it is sent, from the cut on. None: by :meth:`Held.release`.
            clients: whose.
        """

        def doing() -> Held:
            held = Held(self, apis, seconds, clients)
            self._holds.append(held)
            return held

        return self._call(doing)

    # -- in the thread of the loop -------------------------------------------------------------------------------------

    def _call(self, do: Callable[[], T]) -> T:
        """Do it there, wait for it here."""
        loop = self._loop
        if loop is None:
            raise NotRunning("the proxy is not running: use it in a with block")
        result: Future[T] = Future()

        def doing() -> None:
            try:
                result.set_result(do())
            except BaseException as exc:  # noqa: BLE001 - raised where it was called from
                result.set_exception(exc)

        loop.call_soon_threadsafe(doing)
        return result.result(_CALL_S)

    async def _main(self, started: Future[None]) -> None:
        try:
            for host, port in self._bootstrap:
                self._place_of(host, port)
        except OSError as exc:
            started.set_exception(exc)
        else:
            self._loop = asyncio.get_running_loop()
            started.set_result(None)
            await self._stop.wait()
        await self._close()

    async def _close(self) -> None:
        for server in self._servers:
            asyncio.get_running_loop().remove_reader(server)
            server.close()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for accepted in self._accepted:
            accepted.close()
        for held in self._holds:
            held._finish(Outcome(sent=False, error=None, detail="the proxy was closed before such a request came"))
        await asyncio.sleep(0)  # transports close their sockets in the loop's next round

    def _start(self, task: asyncio.Task[None]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (exc := task.exception()) is not None:
            log.error("a connection is closed, by an error in the proxy", exc_info=exc)

    def _place_of(self, host: str, port: int) -> tuple[str, int]:
        """Where a broker is found here: from now on, where it is new."""
        if (host, port) not in self._ports:
            server = socket.create_server((_HERE, 0), backlog=_BACKLOG)
            server.setblocking(False)  # noqa: FBT003 - the socket module's own signature
            self._servers.append(server)
            self._ports[host, port] = server.getsockname()[1]
            self._listen(server, (host, port))
        return _HERE, self._ports[host, port]

    def _listen(self, server: socket.socket, broker: Address) -> None:
        if not self._stop.is_set():
            asyncio.get_running_loop().add_reader(server, self._accept, server, broker)

    def _accept(self, server: socket.socket, broker: Address) -> None:
        """Not ``loop.sock_accept()``: where that is cancelled, what it has accepted is lost, and never closed."""
        loop = asyncio.get_running_loop()
        try:
            client, _ = server.accept()
        except BlockingIOError:  # it has gone again
            return
        except OSError as exc:  # too many open files: the next one may find room
            log.warning("a client of %s:%d was not accepted: %s", *broker, exc)
            loop.remove_reader(server)
            loop.call_later(0.1, self._listen, server, broker)
            return
        client.setblocking(False)  # noqa: FBT003 - as above
        self._accepted.add(client)
        self._start(loop.create_task(self._serve(client, broker)))

    async def _serve(self, accepted: socket.socket, broker: Address) -> None:
        client = await _Side.of(accepted)
        self._accepted.discard(accepted)
        try:
            if self._refusals:
                client.reset()
                return
            try:
                server = await _Side.to(broker)
            except (OSError, asyncio.TimeoutError) as exc:
                log.debug("a client of %s:%d is disconnected: %r", *broker, exc)
                client.reset()
                return
            try:
                if not self._refusals:
                    await _Link(self, client, server).run()
            finally:
                server.abort()
        finally:
            client.abort()

    def _links_of(self, clients: Clients | None) -> list[_Link]:
        return [link for link in self._links if _chosen(clients, link.client_id)]

    def _delay_of(self, client_id: str) -> float:
        return sum(seconds for seconds, clients in self._delays if _chosen(clients, client_id))

    def _hold_for(self, request: Request) -> Held | None:
        """Whoever waits for such a request."""
        for held in self._holds:
            if held._wants(request):
                self._holds.remove(held)
                return held
        return None

    def _forget(self, held: Held) -> None:
        if held in self._holds:
            self._holds.remove(held)
        held._finish(Outcome(sent=False, error=None, detail="it was cancelled"))
        held._release.set()

    def _dropping_of(self, request: Request) -> Dropping | None:
        for dropping in self._droppings:
            if dropping._take(request):
                if not dropping._left:
                    self._stop_dropping(dropping)
                return dropping
        return None

    def _stop_dropping(self, dropping: Dropping) -> None:
        if dropping in self._droppings:
            self._droppings.remove(dropping)
        if not dropping._left:
            dropping._done.set()

    def _rewritten(self, request: Request, frame: bytes) -> bytes:
        try:
            return wire.rewrite_answer(request, frame, self._place_of)
        except WireError as exc:
            self._odd(f"the answer to {request.name} v{request.version}", exc)
            return frame

    def _odd(self, what: str, why: object) -> None:
        self._not_understood[what] += 1
        if self._not_understood[what] == 1:
            log.warning("%s is passed on as it is: %s", what, why)


class _Side(NamedTuple):
    """One end of a connection."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    @classmethod
    async def of(cls, accepted: socket.socket) -> _Side:
        return cls._ready(*await asyncio.open_connection(sock=accepted, limit=_BUFFER))

    @classmethod
    async def to(cls, address: Address) -> _Side:
        return cls._ready(*await asyncio.wait_for(asyncio.open_connection(*address, limit=_BUFFER), _CONNECT_S))

    @classmethod
    def _ready(cls, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> _Side:
        writer.transport.set_write_buffer_limits(high=0)  # what send() has waited for is with the kernel
        return cls(reader, writer)

    async def receive(self) -> bytes:
        return await self.reader.readexactly(wire.frame_length(await self.reader.readexactly(4)))

    async def send(self, frame: bytes) -> None:
        self.writer.write(struct.pack(">i", len(frame)) + frame)
        await self.writer.drain()

    def abort(self) -> None:
        self.writer.transport.abort()

    def reset(self) -> None:
        """Close it so that the other side sees a reset, which is the nearest to a port where nobody listens."""
        connection: socket.socket | None = self.writer.get_extra_info("socket")
        if connection is not None:
            with suppress(OSError):
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.abort()


class _Parcel(NamedTuple):
    """A frame, and when it is due on the other side. Requests with what they are, where that is known."""

    due: float
    frame: bytes
    request: Request | None = None


_TURN = _Parcel(0.0, b"")  # no answer, but it may be the turn of a refusal


class _Link:
    """A client's connection and the one to the broker that belongs to it."""

    _numbers = iter(range(2**63))

    def __init__(self, proxy: Proxy, client: _Side, broker: _Side) -> None:
        self.number = next(self._numbers)
        self.client_id = ""
        self._proxy = proxy
        self._client = client
        self._broker = broker
        self._asked: dict[int, Request] = {}
        self._to_broker: asyncio.Queue[_Parcel | None] = asyncio.Queue(_QUEUED_FRAMES)
        self._to_client: asyncio.Queue[_Parcel | None] = asyncio.Queue(_QUEUED_FRAMES)
        self._refusals: dict[int, bytes] = {}  # answers of ours that are not given yet, by what they answer
        self._patient: dict[int, set[tuple[str, int]]] = {}  # of these, which wait, for more to which partitions
        self._muted = False
        self._kept: tuple[Held, Request, bytes] | None = None
        self._task = asyncio.current_task()

    def cut(self) -> None:
        """Close both sides now; but one that has something held back loses its client in any case, and needs its broker."""
        if self in self._proxy._links and self._kept is None and self._task is not None:
            self._proxy._links.discard(self)
            self._client.abort()
            self._broker.abort()
            self._task.cancel()

    async def run(self) -> None:
        """Pass frames on until one side is closed, and all that it had sent was passed on."""
        self._proxy._links.add(self)
        loop = asyncio.get_running_loop()
        readers = [loop.create_task(work) for work in (self._read_requests(), self._read_answers())]
        writers = [loop.create_task(work) for work in (self._send_requests(), self._send_answers())]
        try:
            await _first_of(readers, writers)
            self._proxy._links.discard(self)
            if self._kept is not None:
                readers[0].cancel()
                writers[1].cancel()
                self._client.abort()
                await self._keep(*self._kept)
        finally:
            self._proxy._links.discard(self)
            for task in (*readers, *writers):
                task.cancel()
            await asyncio.gather(*readers, *writers, return_exceptions=True)
            if self._kept is not None:
                self._kept[0]._finish(Outcome(sent=False, error=None, detail="the proxy was closed"))

    async def _read_requests(self) -> None:
        async for frame in self._frames(self._client):
            request = None
            try:
                request = wire.read_request(frame)
            except WireError as exc:
                self._proxy._odd("a request", exc)
            else:
                self.client_id = request.client_id
            await self._to_broker.put(_Parcel(self._due(), frame, request))
        await self._to_broker.put(None)

    async def _read_answers(self) -> None:
        async for frame in self._frames(self._broker):
            await self._to_client.put(_Parcel(self._due(), frame))
        await self._to_client.put(None)

    @staticmethod
    async def _frames(side: _Side) -> AsyncIterator[bytes]:
        while True:
            try:
                frame = await side.receive()
            except (OSError, asyncio.IncompleteReadError):
                return
            except WireError as exc:
                log.warning("a connection is closed: %s", exc)
                return
            yield frame

    async def _send_requests(self) -> None:
        while (parcel := await self._to_broker.get()) is not None:
            await _until(parcel.due)
            if (request := parcel.request) is not None:
                held = self._proxy._hold_for(request)
                if held is not None:
                    held._take(request)
                    self._kept = held, request, parcel.frame
                    return
                if request.acks is not None:
                    self._proxy._acks.setdefault(request.client_id, set()).add(request.acks)
                if self._refuses(request, parcel.frame):
                    continue
                self._proxy._requests[request.client_id, request.name] += 1
                if request.answered:
                    self._asked[request.correlation] = request
            with suppress(OSError):  # the answers end too, after those that the broker gave before it closed
                await self._broker.send(parcel.frame)

    async def _send_answers(self) -> None:
        while (parcel := await self._to_client.get()) is not None:
            await _until(parcel.due)
            frames = self._given_before(None if parcel is _TURN else parcel.frame)
            if parcel is not _TURN:
                frames += [self._answer(parcel.frame), *self._given_before(None)]
            for frame in frames:
                if frame is not None:
                    with suppress(OSError):
                        await self._client.send(frame)

    def _refuses(self, request: Request, frame: bytes) -> bool:
        """Whether a request goes no further, and will have an answer of ours; in its turn, as a broker gives it."""
        for one in self._proxy._refusing:
            one._note(request)
        refusing = next((one for one in self._proxy._refusing if one._wants(request)), None)
        if request.api != API["Produce"] or (refusing is None and not self._patient):
            return False
        try:
            partitions, answer = wire.partitions(frame), wire.not_leader(frame)
        except WireError as exc:
            self._proxy._odd(f"{request.name} v{request.version}", exc)
            return False
        if refusing is None:
            for correlation in [before for before, waited in self._patient.items() if waited & partitions]:
                self._lose_patience(correlation)
            return False
        refusing._take(request)
        self._asked[request.correlation] = request
        self._refusals[request.correlation] = answer
        self._patient[request.correlation] = partitions
        asyncio.get_running_loop().call_later(_REFUSED_S, self._lose_patience, request.correlation)
        return True

    def _lose_patience(self, correlation: int) -> None:
        """Have a refusal given once it is its turn."""
        if self._patient.pop(correlation, None) is not None:
            with suppress(asyncio.QueueFull):  # then there are answers, which have the same effect
                self._to_client.put_nowait(_TURN)

    def _given_before(self, answer: bytes | None) -> list[bytes | None]:
        """The refusals whose turn comes before an answer of the broker; None: those that have waited long enough."""
        given: list[bytes | None] = []
        with suppress(WireError):
            until = None if answer is None else wire.correlation_id(answer)
            for correlation in list(self._asked):
                if correlation == until or correlation not in self._refusals:
                    break
                if until is None and correlation in self._patient:
                    break
                self._patient.pop(correlation, None)
                del self._asked[correlation]
                frame = self._refusals.pop(correlation)
                given.append(None if self._muted else frame)
        return given

    def _answer(self, frame: bytes) -> bytes | None:
        """What the client gets of an answer; None: nothing."""
        try:
            request = self._asked.pop(wire.correlation_id(frame), None)
        except WireError:
            request = None
        if request is None:
            self._proxy._odd("an answer", "nothing that was understood asked for it")
            return None if self._muted else frame
        dropping = self._proxy._dropping_of(request)
        if dropping is not None and dropping._cut_after is not None and not self._muted:
            self._muted = True
            asyncio.get_running_loop().call_later(dropping._cut_after, self.cut)
        if dropping is not None or self._muted:
            return None
        return self._proxy._rewritten(request, frame)

    def _due(self) -> float:
        return asyncio.get_running_loop().time() + self._proxy._delay_of(self.client_id)

    async def _keep(self, held: Held, request: Request, frame: bytes) -> None:
        """Wait until the held request is released, send it, and see what the broker says."""
        held._cut()
        loop = asyncio.get_running_loop()
        answer = loop.create_task(self._answer_to(request.correlation))
        released = loop.create_task(held._release.wait())
        try:
            await asyncio.wait((answer, released), return_when=asyncio.FIRST_COMPLETED)
            if held._done.is_set():  # cancelled
                return
            if answer.done():
                held._finish(Outcome(sent=False, error=None, detail="the broker had closed the connection"))
                return
            held.released_at = time.monotonic()
            held._finish(await self._late(request, frame, answer))
        finally:
            answer.cancel()
            released.cancel()
            await asyncio.gather(answer, released, return_exceptions=True)

    async def _late(self, request: Request, frame: bytes, answer: asyncio.Task[bytes | None]) -> Outcome:
        try:
            await self._broker.send(frame)
        except OSError as exc:
            return Outcome(sent=False, error=None, detail=f"the broker had closed the connection: {exc}")
        self._proxy._requests[request.client_id, request.name] += 1
        if not request.answered:
            return Outcome(sent=True, error=None, detail="sent; no answer is due")
        await asyncio.wait((answer,), timeout=_ANSWER_S)
        if not answer.done():
            return Outcome(sent=True, error=None, detail=f"sent; the broker did not answer within {_ANSWER_S:.0f} s")
        return _said(request, answer.result())

    async def _answer_to(self, correlation: int) -> bytes | None:
        """The answer to one request; None when the broker closed the connection before."""
        while (parcel := await self._to_client.get()) is not None:
            with suppress(WireError):
                if wire.correlation_id(parcel.frame) == correlation:
                    return parcel.frame
        return None


def _said(request: Request, answer: bytes | None) -> Outcome:
    """What the answer to a late request means; None: the connection was closed instead."""
    if answer is None:
        return Outcome(sent=True, error=None, detail="sent; the broker closed the connection without an answer")
    try:
        error = wire.error_code(request, answer)
    except WireError as exc:
        return Outcome(sent=True, error=None, detail=f"sent, and answered with what cannot be understood: {exc}")
    return Outcome(sent=True, error=error, detail=f"sent, and answered with error {error}")


async def _until(due: float) -> None:
    left = due - asyncio.get_running_loop().time()
    if left > 0:
        await asyncio.sleep(left)


async def _first_of(readers: list[asyncio.Task[None]], writers: list[asyncio.Task[None]]) -> None:
    """Wait until one of the writers has ended, or anything failed."""
    pending: set[asyncio.Task[None]] = {*readers, *writers}
    while pending.issuperset(writers):
        done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()


def _chosen(clients: Clients | None, client_id: str) -> bool:
    return clients is None or clients(client_id)
