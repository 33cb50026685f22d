"""Guards of stores and inboxes, and of who asks them, without a broker: each is removed by a mutant that no other test saw."""

from __future__ import annotations

import uuid
from collections import Counter
from concurrent.futures import Future
from contextlib import contextmanager
from datetime import timedelta
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from confluent_kafka import KafkaError, KafkaException, Uuid

from kafka_guarantees._failures import RETRY, Failed, Failures, GaveUp
from kafka_guarantees._lifecycle import Lifecycle
from kafka_guarantees._recognition.claims import TIDY_AT_ONCE, TIDY_EVERY, tidy
from kafka_guarantees._recognition.message_ids import MessageIds
from kafka_guarantees._recognition.options import BY_HEADER, Recognition
from kafka_guarantees._recognition.patience import patiently
from kafka_guarantees._recognition.portions import Portions
from kafka_guarantees._recognition.topics import RENEW_EVERY, TopicIds
from kafka_guarantees._serialization import Reading
from kafka_guarantees._settings import Guarantee, resolve
from kafka_guarantees.dedup import MemoryDedupStore, PostgresInbox, SqliteInbox
from kafka_guarantees.dedup.contract import Entry, Item, Source
from kafka_guarantees.dedup.ids import key_of, position_of
from kafka_guarantees.dedup.redis import RedisDedupStore
from kafka_guarantees.errors import (
    AuthorizationError,
    BrokerError,
    DeliveryError,
    ForkedClientError,
    KafkaGuaranteesError,
    MessageIdMissing,
    StoreUnavailable,
)

from .test_dedup_claims import Answers, claims, keys, message

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from confluent_kafka import Message

    from kafka_guarantees.testing.servers import LocalPostgres

SETTINGS = resolve(Guarantee.AT_LEAST_ONCE, {"bootstrap.servers": "127.0.0.1:1", "group.id": "group"})
POLL = 300.0  # max.poll.interval.ms of claims(), in seconds


class Clock:
    """Stands for the module ``time``."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    for module in ("claims", "topics"):
        monkeypatch.setattr(f"kafka_guarantees._recognition.{module}.time", made)
    return made


# -- claims ------------------------------------------------------------------------------------------------------------------


class Leases(Answers):
    """Notes how long it is asked to hold a claim; may refuse."""

    def __init__(self) -> None:
        super().__init__()
        self.leases: list[float] = []
        self.error: Exception | None = None

    def claim(self, _scope: str, items: Sequence[Item], **_named: Any) -> list[int]:
        self.leases.append(_named["lease"])
        if self.error is not None:
            raise self.error
        return super().claim(_scope, items, **_named)


def test_a_claim_outlives_the_ownership_of_its_partition() -> None:
    """D04: over before the group has noticed, the new owner of the partition would handle what the old one still handles."""
    store = Leases()
    claims(store).claim([message("a", 0)])
    assert store.leases[0] >= POLL + 30  # the group needs a while


def test_claims_are_renewed_before_their_leases_are_over_and_not_all_the_time(clock: Clock) -> None:
    """D04: a slow handler, or a long retry, is not taken over; and a batch costs no call for each of its messages."""
    store = Leases()
    tested = claims(store)
    work, _ = tested.claim([message(name, offset) for offset, name in enumerate("abc")])
    tested.complete(1, work.finished(1))
    tested.renew()
    assert [what for what, _ in store.asked] == ["claim", "complete"]
    for _ in range(3):  # each time anew
        clock.now += store.leases[0] / 2
        tested.renew()
        tested.renew()
    assert store.asked[2:] == [("claim", keys("b", "c"))] * 3
    assert set(store.leases) == {store.leases[0]}


@pytest.mark.parametrize("error", [StoreUnavailable("it is away"), AuthorizationError("no login")])
def test_a_store_that_does_not_renew_ends_no_batch(clock: Clock, error: Exception) -> None:
    """What is in hand is handled: the leases hold for a while, and the next claim raises what is wrong."""
    store = Leases()
    tested = claims(store)
    tested.claim([message("a", 0)])
    store.error = error
    clock.now += POLL
    tested.renew()
    assert len(store.leases) == 2


@pytest.mark.parametrize("error", [StoreUnavailable("it is away"), AuthorizationError("no right to DELETE")])
def test_a_store_that_does_not_tidy_ends_no_run(clock: Clock, error: Exception) -> None:
    """D18: and it is not asked in each round of the loop."""

    class Refusing(MemoryDedupStore):
        def purge(self, *, limit: int = 0) -> int:
            raise error

    with Refusing() as store:
        assert tidy(store, clock.now) == clock.now + TIDY_EVERY


def test_where_more_is_expired_it_is_tidied_at_once(clock: Clock) -> None:
    """D18: else a table grows for ever where more than that many ids come in a minute."""
    removed = [TIDY_AT_ONCE, TIDY_AT_ONCE - 1]

    class Full(MemoryDedupStore):
        def purge(self, *, limit: int = 0) -> int:
            assert limit == TIDY_AT_ONCE
            return removed.pop(0)

    with Full() as store:
        assert tidy(store, clock.now + 1) == clock.now + 1
        assert len(removed) == 2  # it was not time
        assert tidy(store, clock.now) == clock.now
        assert tidy(store, clock.now) == clock.now + TIDY_EVERY


@pytest.mark.parametrize(
    ("found", "says"),
    [
        ("", "on_missing_id"),
        (b"", "on_missing_id"),
        (None, "on_missing_id"),
        (7, "returned int"),
        (KeyError("k"), "raised KeyError"),
    ],
)
def test_what_is_no_id_is_never_taken_for_one(found: object, says: str) -> None:
    """D06: all messages with an empty id would be repeats of the first, and lost. A mistake in the function says where."""

    def extractor(_message: Message) -> Any:
        if isinstance(found, Exception):
            raise found
        return found

    def ids(on_missing: Any) -> MessageIds:
        return MessageIds(extractor, on_missing, lambda _topic: bytes(16), fingerprint=True)

    strange = "on_missing_id" not in says
    with pytest.raises(MessageIdMissing, match=rf"orders.* offset 8 has no id.*{says}"):
        ids("raise").key(message("a", 8))
    if strange:  # a mistake in the function, whatever is said of messages that have none
        with pytest.raises(MessageIdMissing, match=says):
            ids("process").key(message("a", 8))
    else:
        assert ids("process").key(message("a", 8)) is None
        assert ids("position").key(message("a", 8)) == position_of(bytes(16), 0, 8)


# -- what stands around them -----------------------------------------------------------------------------------------------


def test_that_a_store_is_local_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    """D11: it is asked for with every batch, and a log that says it each time is not read any more."""
    with MemoryDedupStore() as store:
        recognition = Recognition(
            SETTINGS,
            store,
            None,
            BY_HEADER,
            on_missing_id="raise",
            on_store_error="wait",
            takeover="position",
            scope=None,
            fingerprint=True,
        )
        for others in (False, True, True):
            recognition.note(others=lambda others=others: others)  # type: ignore[misc]
            assert caplog.text.count("is local") == int(others)


def test_brokers_that_do_not_say_which_topic_it_is_are_asked_again() -> None:
    """D16: a call of the store needs the id of a topic as well; brokers that are away for a moment end no run."""
    failing: list[Exception] = [BrokerError("no answer"), StoreUnavailable("no answer")]
    rests: list[float] = []

    def call() -> str:
        if failing:
            raise failing.pop()
        return "answer"

    consumer: Any = SimpleNamespace(keep_alive=lambda _batch, seconds: rests.append(seconds))
    batch: Any = None
    assert patiently(call, consumer, batch, lambda: False, StoreUnavailable, BrokerError) == "answer"
    assert len(rests) == 2  # and the group is served meanwhile


def described(*answers: Uuid | KafkaError) -> tuple[Any, list[list[str]]]:
    """An admin client that answers these one after the other; and what it was asked for."""
    asked: list[list[str]] = []
    left = list(answers)

    def describe(topics: Any, **_: Any) -> dict[str, Future[Any]]:
        asked.append(topics.topic_names)
        future: Future[Any] = Future()
        answer = left.pop(0)
        if isinstance(answer, KafkaError):
            future.set_exception(KafkaException(answer))
        else:
            future.set_result(SimpleNamespace(topic_id=answer))
        return dict.fromkeys(asked[-1], future)

    return SimpleNamespace(describe_topics=describe), asked


def test_a_topic_that_is_created_again_while_it_is_read_is_another(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    """D06: its messages would be taken for those of the old one at the same places, and left out: lost."""
    ids = TopicIds(SETTINGS)
    denied = KafkaError(KafkaError.TOPIC_AUTHORIZATION_FAILED)
    admin, asked = described(Uuid(0, 1), denied, Uuid(0, 2))
    monkeypatch.setattr(ids, "raw", admin)
    old = ids("t")
    ids.renew()
    assert ids("t") == old
    assert len(asked) == 1  # it is not asked for each batch
    clock.now += RENEW_EVERY
    ids.renew()  # brokers that do not say so end no run
    ids.renew()
    assert ids("t") == old
    assert len(asked) == 2
    clock.now += RENEW_EVERY
    ids.renew()
    assert ids("t") != old


def test_a_topic_that_was_deleted_does_not_hide_that_another_was_created_again(
    monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    """D06: the ids of all topics of a run are asked for together, and the refusal of one is not that of the others."""
    ids = TopicIds(SETTINGS)
    answers: dict[str, list[Any]] = {
        "gone": [Uuid(0, 1), KafkaError(KafkaError.UNKNOWN_TOPIC_OR_PART)],
        "again": [Uuid(0, 2), Uuid(0, 3)],
    }

    def describe(topics: Any, **_: Any) -> dict[str, Future[Any]]:
        return {topic: described(answers[topic].pop(0))[0].describe_topics(topics)[topic] for topic in topics.topic_names}

    monkeypatch.setattr(ids, "raw", SimpleNamespace(describe_topics=describe))
    before = ids("gone"), ids("again")
    clock.now += RENEW_EVERY
    ids.renew()
    assert ids("gone") == before[0]
    assert ids("again") != before[1]


# -- transactions of an inbox ------------------------------------------------------------------------------------------------


class Ours:
    """A consumer whose batch is ours."""

    def still_ours(self, _batch: object) -> bool:
        return True

    def send_commit(self, _offsets: object) -> None:
        pass


BATCH: Any = SimpleNamespace()
PLACE = Source("orders", bytes(16), 0)


@pytest.fixture
def inbox(tmp_path: Path) -> Iterator[SqliteInbox]:
    with SqliteInbox(tmp_path / "inbox.db") as inbox:
        yield inbox


def portions(inbox: SqliteInbox, acknowledged: Callable[[], None] = lambda: None, sent: list[object] | None = None) -> Portions:
    consumer: Any = Ours()
    failures: Any = SimpleNamespace(letter=lambda message, _outcome: message)
    recognition: Any = SimpleNamespace(scope="scope", mark="shown", counts=Counter())
    kept: list[object] = [] if sent is None else sent
    return Portions(
        Lifecycle("test"),
        consumer,
        inbox=inbox,
        recognition=recognition,
        acknowledged=acknowledged,
        failures=failures,
        send=kept.append,  # type: ignore[arg-type] # the reports are not looked at
    )


def batch(*names: str | None) -> tuple[list[Message], list[Entry]]:
    """Messages with these ids, from offset 0 on."""
    messages = [message(name, offset) for offset, name in enumerate(names)]
    return messages, [Entry(PLACE, offset, None if name is None else key_of(name)) for offset, name in enumerate(names)]


def every(messages: Sequence[Message], _connection: object) -> tuple[int, None]:
    return len(messages), None


def test_a_child_that_returns_from_its_handler_moves_no_offset(inbox: SqliteInbox) -> None:
    """Y04: whatever the inbox is: one around an ORM does not know of forks."""
    run = portions(inbox)

    def handle(messages: Sequence[Message], _connection: object) -> tuple[int, None]:
        run._lifecycle.forked = True
        return len(messages), None

    with pytest.raises(ForkedClientError):
        run.transact(BATCH, *batch("a"), handle)
    assert inbox.start_offsets("scope", [PLACE]) == {PLACE: None}


def test_offsets_wait_for_the_records_that_a_handler_produced(inbox: SqliteInbox) -> None:
    """P01: moved before, the message is passed over, and what it was to produce is lost."""

    def refused() -> None:
        raise DeliveryError("for the test", None, None)

    with pytest.raises(DeliveryError):
        portions(inbox, refused).transact(BATCH, *batch("a"), every)
    assert inbox.start_offsets("scope", [PLACE]) == {PLACE: None}
    assert portions(inbox).transact(BATCH, *batch("a"), every) == (1, None)  # nor was its id noted
    assert inbox.start_offsets("scope", [PLACE]) == {PLACE: 1}


def test_a_producer_that_cannot_go_on_is_no_database_that_does_not_answer(inbox: SqliteInbox) -> None:
    """P09, D16: asked again, that would have the handler called once more, and its message blamed. It ends the run."""
    handled: list[int] = []

    def broken() -> None:
        raise BrokerError("the producer cannot go on")

    def handle(messages: Sequence[Message], _connection: object) -> tuple[int, None]:
        handled.append(len(messages))
        return len(messages), None

    tested = portions(inbox, broken)
    group: Any = tested._consumer
    group.keep_alive = lambda *_: tested._lifecycle.stop()
    with pytest.raises(BrokerError, match="cannot go on"):
        tested.transact(BATCH, *batch("a"), handle)
    assert handled == [1]


def test_a_database_that_does_not_answer_is_asked_again(inbox: SqliteInbox) -> None:
    """D16: with the group served meanwhile."""
    failing, rests = [StoreUnavailable("for the test")], list[float]()

    def away() -> None:
        if failing:
            raise failing.pop()

    tested = portions(inbox, away)
    group: Any = tested._consumer
    group.keep_alive = lambda _batch, seconds: rests.append(seconds)
    assert tested.transact(BATCH, *batch("a"), every) == (1, None)
    assert len(rests) == 1


def test_what_an_inbox_sets_aside_can_be_sent_again(inbox: SqliteInbox) -> None:
    """D09: a replay of it has the same id. Left out as a duplicate, it would never be handled."""
    sent: list[object] = []
    tested = portions(inbox, sent=sent)
    [first], [entry] = batch("a")
    assert tested.set_aside(BATCH, first, entry, GaveUp(ValueError("bad"), 1)) == 1
    assert sent == [first]
    assert inbox.start_offsets("scope", [PLACE]) == {PLACE: 1}
    with inbox.transaction("scope", [entry._replace(offset=9)]) as transaction:
        assert list(transaction.fresh) == [0]


def test_of_a_batch_that_was_cut_short_nothing_is_said_of_what_failed_behind(inbox: SqliteInbox) -> None:
    """L05: whoever is told that the next message failed tries that again, and sets it aside: it never failed."""
    stopped: list[bool] = []

    def handle(messages: Sequence[Message], _connection: object) -> tuple[int, Failed | None]:
        if not stopped:
            stopped.append(True)
            return 2, Failed(1, ValueError("of the third"))
        return 1, None  # the client is to stop meanwhile

    assert portions(inbox).transact(BATCH, *batch("a", "b", "c"), handle) == (1, None)
    assert inbox.start_offsets("scope", [PLACE]) == {PLACE: 1}


def test_a_message_that_failed_alone_stays_alone(inbox: SqliteInbox) -> None:
    """L05: tried with the repeats of others behind it, it is a batch: set aside would be what did not fail."""

    def handle(messages: Sequence[Message], _connection: object) -> tuple[int, Failed | None]:
        return 1, Failed(1, ValueError("bad")) if len(messages) > 1 else None

    done, failed = portions(inbox).transact(BATCH, *batch("a", "b", "a", "c"), handle)
    assert done == 1
    assert failed is not None
    assert failed.size == 1


class AroundAnOrm:
    """Joins a transaction that somebody else ends, as an inbox around a session does: it cannot tell why a handler raised."""

    def __init__(self, inner: PostgresInbox, dsn: str) -> None:
        self._inner, self._dsn = inner, dsn
        self.start_offsets = inner.start_offsets

    @contextmanager
    def transaction(self, scope: str, entries: Sequence[Entry]) -> Iterator[Any]:
        with psycopg.connect(self._dsn) as connection:
            joined = self._inner.enlist(connection, scope, entries)
            yield SimpleNamespace(connection=connection, fresh=joined.fresh, finish=joined.finish)


class OrmError(Exception):
    """As that of an ORM, which has the driver's as its cause."""


@pytest.mark.parametrize("attempt", [1, 2])
@pytest.mark.parametrize("around", [True, False])
def test_a_handler_that_commits_ends_the_run_and_is_not_held_against_its_message(
    postgres_server: LocalPostgres, attempt: int, *, around: bool
) -> None:
    """D20: set aside for it, every message would be, one after the other; and nothing of them is left out the next time."""
    calls: list[int] = []

    def handle(messages: Sequence[Message], connection: Any) -> tuple[int, Failed | None]:
        calls.append(len(messages))
        if len(calls) < attempt:
            return 0, Failed(1, RuntimeError("of the message"))
        try:
            connection.commit()
        except psycopg.Error as error:
            wrapped = OrmError()
            wrapped.__cause__ = error
            return 0, Failed(1, wrapped)
        return len(messages), None

    with PostgresInbox(postgres_server.dsn, prefix=f"box_{uuid.uuid4().hex[:12]}") as inner:
        inbox: Any = AroundAnOrm(inner, postgres_server.dsn) if around else inner
        tested = portions(inbox)
        tested._failures = Failures(SETTINGS, Lifecycle("test"), Reading(None, None), retry=RETRY, dead_letter="letters")
        tested._failures.waiting = lambda *_: lambda _seconds: None  # type: ignore[method-assign]
        messages, found = batch("a", "b")

        def begin() -> None:
            _, failed = tested.transact(BATCH, messages, found, handle)
            assert failed is not None
            tested.again(BATCH, messages, found, failed, handle)

        with pytest.raises(KafkaGuaranteesError, match="the handler ended the transaction"):
            begin()
        assert len(calls) == attempt
        with inner.transaction("scope", found) as transaction:
            assert list(transaction.fresh) == [0, 1]


# -- Redis -------------------------------------------------------------------------------------------------------------------


class ValkeyError(Exception):
    """As that of valkey-py."""


class ValkeyClusterException(Exception):
    """Likewise; no ``ValkeyError``."""


AWAY = [
    ConnectionResetError("broken"),
    ValkeyError("for the test"),
    ValkeyClusterException("no node"),
    TimeoutError("no answer"),
]


@pytest.mark.parametrize("error", AWAY)
def test_whatever_a_client_calls_a_server_that_is_away(error: Exception) -> None:
    """D16: it is waited for, whether redis-py says so, valkey-py or the socket. Else a run ends with the first break."""

    class Away:
        def evalsha(self, *_: Any) -> Any:
            raise error

        eval = evalsha

        def config_get(self, _pattern: Any) -> dict[str, str]:
            return {"maxmemory-policy": "noeviction", "appendonly": "yes"}

    store = RedisDedupStore(Away(), retention=timedelta(hours=1))
    with pytest.raises(StoreUnavailable, match=type(error).__name__):
        store.complete("scope", [Item(key_of("a"), bytes(16))], token=b"t" * 16)
