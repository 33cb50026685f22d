"""Never run, only type-checked: every public signature, used as a user would. ``assert_type`` pins what comes back."""

from __future__ import annotations

import logging
from datetime import timedelta
from typing import TYPE_CHECKING, Literal

from typing_extensions import assert_type

from kafka_guarantees import (
    AtLeastOnce,
    AtMostOnce,
    AuthorizationError,
    BrokerError,
    Delivery,
    DeliveryError,
    DeliveryUnknown,
    DurabilityWarning,
    ExactlyOnce,
    Explanation,
    FencedError,
    ForkedClientError,
    HandlerError,
    KafkaGuaranteesError,
    OffsetsLost,
    Record,
    StoreUnavailable,
    Transaction,
    TransactionAborted,
    UnsafeConfigError,
)
from kafka_guarantees.dedup import (
    Capabilities,
    DedupStore,
    Item,
    MemoryDedupStore,
    Outcome,
    SqliteDedupStore,
    SqliteInbox,
    cloudevent,
    first_of,
    header,
    json_field,
    position,
)

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from confluent_kafka import Message

CONFIG = {"bootstrap.servers": "localhost:9092", "group.id": "g", "linger.ms": 5, "enable.idempotence": True}
ONLY_TEXT: dict[str, str] = {"bootstrap.servers": "localhost:9092"}

# -- stores and inboxes ----------------------------------------------------------------------------------------------


class OwnStore:
    """Has what a store needs, without knowing of ours."""

    capabilities = Capabilities(shared=True, durable="process", clock="server")
    retention = timedelta(days=2)

    def claim(
        self,
        scope: str,
        items: Sequence[Item],
        *,
        token: bytes,
        lease: float,
        takeover: Literal["position", "lease"] = "position",
    ) -> list[Outcome]:
        return [Outcome.NEW for _ in items]

    def complete(self, scope: str, items: Sequence[Item], *, token: bytes) -> list[bool]:
        return [True for _ in items]

    def release(self, scope: str, items: Sequence[Item], *, token: bytes) -> None: ...

    def purge(self, *, limit: int = 10_000) -> int:
        return 0

    def close(self) -> None: ...


def id_of(message: Message) -> str | None:
    return None if message.key() is None else "id"


def writes(message: Message, connection: sqlite3.Connection) -> list[Record]:
    connection.execute("INSERT INTO t VALUES (1)")
    return []


def writes_all(messages: Sequence[Message], connection: sqlite3.Connection) -> None:
    connection.execute("INSERT INTO t VALUES (1)")


def recognising() -> None:
    stores: list[DedupStore] = [OwnStore(), MemoryDedupStore(), SqliteDedupStore("ids.db", retention=timedelta(hours=2))]
    for extractor in (header("id"), cloudevent(), json_field("event.id"), first_of(header("id"), position()), id_of):
        with AtLeastOnce(CONFIG, dedup=stores[0], message_id=extractor, on_missing_id="position", scope="s") as kafka:
            kafka.run(["in"], returns_nothing)
            assert_type(kafka.dedup_counts, "Mapping[str, int]")
    inbox = SqliteInbox("effects.db")
    with AtLeastOnce(CONFIG, inbox=inbox, message_id=None) as ledger:
        ledger.run(["in"], writes)
        ledger.run_batches(["in"], writes_all)


# -- handlers: every form that a user may write ---------------------------------------------------------------------


def returns_nothing(message: Message) -> None:
    print(message.value())  # noqa: T201 - never run


def returns_a_list(message: Message) -> list[Record]:
    return [Record("out", message.value(), message.key())]


def may_return(message: Message) -> Record | None:
    return Record("out") if message.value() is not None else None


def returns_a_list_or_none(message: Message) -> list[Record] | None:
    record = may_return(message)
    return None if record is None else [record]


def yields(message: Message) -> Iterator[Record]:
    yield Record("out", message.value(), headers=[("a", "1"), ("b", None)])


def batch_of_nothing(messages: Sequence[Message]) -> None:
    print(len(messages))  # noqa: T201 - never run


def batch_yields(messages: Sequence[Message]) -> Iterable[Record]:
    return (Record("out", message.value()) for message in messages)


def of_what_was_deserialized(message: Message[str, dict[str, int]]) -> Record:
    return Record("out", message.value())


def batch_as_a_list(messages: list[Message]) -> None:
    messages.reverse()


class Service:
    """A bound method is a handler too."""

    def handle(self, message: Message) -> tuple[Record, ...]:
        return (Record("out", message.value()),)


def report(message: Message, error: Exception) -> None:
    logging.getLogger("app").error("%s %s", message.topic(), error)


# -- records --------------------------------------------------------------------------------------------------------


def records() -> None:
    record = Record("t", b"v", "k", headers={"a": b"1", "b": None}, partition=3, timestamp=1_700_000_000_000)
    assert_type(record.topic, str)
    assert_type(record.partition, "int | None")
    assert_type(record.timestamp, "int | None")
    Record("t")
    Record("t", None, bytearray(b"k"), headers=[("a", memoryview(b"x"))])
    Record(topic="t", value="v", key=None, message_id="order-1-booked")
    Record("t", b"v", b"k", {"a": b"1"})  # type: ignore[call-arg]  # headers are given by name
    Record("t", {"price": 5}, 7)  # for the serializers of the client; without them it is refused when it is produced
    Record("t", headers={1: b"x"})  # type: ignore[dict-item]
    record.topic = "u"  # type: ignore[misc]


# -- AtMostOnce -----------------------------------------------------------------------------------------------------


def at_most_once() -> None:
    with AtMostOnce(CONFIG, start="latest", on_error=report) as kafka:
        assert_type(kafka, AtMostOnce)
        kafka.run(["in"], returns_nothing)
        kafka.run(("in", "^pattern"), returns_a_list, max_batch=10, until_idle=1.5)
        kafka.run(["in"], Service().handle)
        kafka.run_batches(["in"], batch_of_nothing, max_batch=10, until_idle=1)
        for message in kafka.messages(["in"], max_batch=1, until_idle=None):
            assert_type(message, "Message")
        kafka.produce("t", b"v", b"k", headers={"a": "1"}, partition=0, timestamp=1)
        assert_type(kafka.flush(timeout=1.0), int)
        assert_type(kafka.flush(), int)
        kafka.stop()
        kafka.close(timeout=3)
        kafka.run(["in"], may_return)
        kafka.run(["in"], of_what_was_deserialized)
        kafka.run_batches(["in"], batch_as_a_list)
        kafka.run(["in"], batch_of_nothing)  # type: ignore[arg-type]
        kafka.produce("t", message_id="1")  # type: ignore[call-arg]  # for a reader who cannot see repeats, it has no use
    AtMostOnce(ONLY_TEXT)
    AtMostOnce(CONFIG, on_error=lambda message, error: (message, error))
    AtMostOnce(CONFIG, start="middle")  # type: ignore[arg-type]
    AtMostOnce(config=CONFIG)  # type: ignore[call-arg]
    assert_type(AtMostOnce.explain(), Explanation)


# -- AtLeastOnce ----------------------------------------------------------------------------------------------------


def at_least_once() -> None:
    with AtLeastOnce(CONFIG, start="earliest") as kafka:
        assert_type(kafka, AtLeastOnce)
        kafka.run(["in"], yields, max_batch=10, until_idle=1.5)
        kafka.run(["in"], returns_a_list_or_none)
        kafka.run(["in"], lambda message: [Record("out", message.value())])
        kafka.run_batches(["in"], batch_yields, max_batch=10, until_idle=1)
        for message in kafka.messages(["in"], max_batch=1, until_idle=0.5):
            assert_type(message, "Message")
        delivery = kafka.produce("t", "v", None, headers=[("a", b"1")], partition=None, timestamp=None, message_id=b"id")
        assert_type(delivery, Delivery)
        assert_type(delivery.result(), Delivery)
        assert_type(delivery.result(timeout=1.5), Delivery)
        assert_type(delivery.topic, str)
        assert_type(delivery.partition, "int | None")
        assert_type(delivery.offset, "int | None")
        assert_type(delivery.done, bool)
        kafka.produce("t", message_id="id")
        kafka.flush()
        kafka.flush(timeout=1.0)
        kafka.stop()
        kafka.close(timeout=3)
        kafka.produce("t", b"v", b"k", {"a": b"1"})  # type: ignore[call-arg]  # headers are given by name
    assert_type(AtLeastOnce.explain(CONFIG), Explanation)


# -- ExactlyOnce ----------------------------------------------------------------------------------------------------


def exactly_once(given: Mapping[str, object]) -> None:
    with ExactlyOnce(given, start="earliest", commit_interval=0.2, transactions_in_flight=2) as kafka:
        assert_type(kafka, ExactlyOnce)
        kafka.run(["in"], yields, max_batch=10, until_idle=1.5)
        kafka.run_batches(["in"], batch_yields, max_batch=10, until_idle=1)
        with kafka.transaction() as tx:
            assert_type(tx, Transaction)
            tx.produce("t", b"v", "k", headers={"a": None}, partition=1, timestamp=2)
        for transaction in kafka.transactions(["in"], max_batch=5, until_idle=0.5):
            assert_type(transaction, Transaction)
            with transaction as same:
                assert_type(same, Transaction)
                for message in transaction.messages:
                    assert_type(message, "Message")
                    transaction.produce("out", message.value(), message.key(), headers=message.headers())
        kafka.stop()
        kafka.close(timeout=3)
        kafka.produce("t", b"v")  # type: ignore[attr-defined]  # only inside a transaction
    assert_type(ExactlyOnce.explain(), Explanation)


# -- explanations, errors -------------------------------------------------------------------------------------------


def explanation() -> None:
    found = AtLeastOnce.explain(CONFIG)
    assert_type(str(found), str)
    for row in found:
        assert_type(row.setting, str)


def errors() -> None:
    try:
        at_least_once()
    except UnsafeConfigError as error:
        assert_type(error.setting, str)
        assert_type(error.value, object)
        caught_as_value_error: ValueError = error
        raise caught_as_value_error from None
    except (DeliveryError, DeliveryUnknown, HandlerError, TransactionAborted, FencedError, OffsetsLost) as error:
        root: KafkaGuaranteesError = error
        raise root from None
    except (AuthorizationError, StoreUnavailable, BrokerError, ForkedClientError) as error:
        other: KafkaGuaranteesError = error
        raise other from None


def warning() -> type[UserWarning]:
    return DurabilityWarning
