"""C22, KIP-320: a partition that lost its last records has grown beyond the group's offset before anybody reads it again."""

from __future__ import annotations

import shutil
import sqlite3
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from kafka_guarantees import AtLeastOnce, AtMostOnce, ExactlyOnce, OffsetsLost
from kafka_guarantees.dedup import SqliteInbox
from kafka_guarantees.testing.local_kafka import LocalKafka

from .conftest import fill

if TYPE_CHECKING:
    from collections.abc import Iterator

    from confluent_kafka import Message

pytestmark = pytest.mark.broker

KINDS = [AtMostOnce, AtLeastOnce, ExactlyOnce]
PROTOCOLS: dict[str, dict[str, str]] = {
    "eager": {},
    "cooperative": {"partition.assignment.strategy": "cooperative-sticky"},
    "KIP-848": {"group.protocol": "consumer"},
}


@pytest.fixture(scope="module")
def restored() -> Iterator[LocalKafka]:
    """Groups have committed offset 100; then the disk is as it was at 50, and 100 other records are written."""
    with LocalKafka() as kafka:
        kafka.create_topic("t")
        fill(kafka.bootstrap, "t", [b"%d" % number for number in range(50)])
        kafka.kill(0)
        partition, saved = kafka.data_dir / "broker-0" / "data" / "t-0", kafka.data_dir / "saved"
        shutil.copytree(partition, saved)
        kafka.restart(0)
        fill(kafka.bootstrap, "t", [b"%d" % number for number in range(50, 100)])
        for kind in KINDS:
            for name, protocol in PROTOCOLS.items():
                read: list[Message] = []
                with client(kind, kafka, f"{kind.__name__}-{name}", protocol) as reader:
                    reader.run(["t"], read.append, until_idle=0.5)
                assert len(read) == 100
        with inbox(kafka) as (book, reader):
            reader.run(["t"], book, until_idle=0.5)
        kafka.kill(0)
        shutil.rmtree(partition)
        shutil.copytree(saved, partition)
        for checkpoint in ("recovery-point-offset-checkpoint", "replication-offset-checkpoint"):
            (partition.parent / checkpoint).unlink(missing_ok=True)
        kafka.restart(0)
        fill(kafka.bootstrap, "t", [b"%d" % number for number in range(1000, 1100)])
        yield kafka


@contextmanager
def inbox(kafka: LocalKafka) -> Iterator[tuple[Any, AtLeastOnce]]:
    """A handler that counts in a database, and the client whose offsets are in it."""

    def book(_message: Message, connection: sqlite3.Connection) -> None:
        connection.execute("UPDATE effects SET number = number + 1")

    config = {"bootstrap.servers": kafka.bootstrap, "group.id": "inbox"}
    path = kafka.data_dir / "effects.db"
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("CREATE TABLE IF NOT EXISTS effects (number)")
        connection.execute("INSERT INTO effects SELECT 0 WHERE NOT EXISTS (SELECT * FROM effects)")
    with SqliteInbox(path) as books, AtLeastOnce(config, inbox=books, message_id=None, preflight="off") as reader:
        yield book, reader


def client(kind: type[Any], kafka: LocalKafka, group: str, protocol: dict[str, str]) -> Any:
    config = {"bootstrap.servers": kafka.bootstrap, "group.id": group, **protocol}
    if kind is ExactlyOnce:
        config["transactional.id"] = group
    return kind(config, start="earliest", preflight="off")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", PROTOCOLS)
def test_a_log_that_was_cut_and_has_grown_since_is_noticed(restored: LocalKafka, kind: type[Any], name: str) -> None:
    """Of the new records, those below the group's offset would be left out in silence (librdkafka issue 5158)."""
    read: list[Message] = []
    reader = client(kind, restored, f"{kind.__name__}-{name}", PROTOCOLS[name])
    with reader, pytest.raises(OffsetsLost, match="truncation detected at offset 100"):
        reader.run(["t"], read.append, until_idle=2)
    assert read == []


def test_an_inbox_notices_it_where_the_group_has_come_as_far(restored: LocalKafka) -> None:
    """It stores no epoch: the group's is compared, which is that of the same offset where the last run has ended in order."""
    with inbox(restored) as (book, reader), pytest.raises(OffsetsLost, match="truncation detected at offset 100"):
        reader.run(["t"], book, until_idle=2)
    with closing(sqlite3.connect(restored.data_dir / "effects.db")) as connection:
        assert connection.execute("SELECT number FROM effects").fetchone() == (100,)
