"""Fixtures for tests on real servers: ``kafka``, ``kafka_cluster``, ``kafka_topic``, ``redis_server`` and ``postgres_server``.

Installing the package is enough::

    def test_orders_arrive(kafka, kafka_topic):
        topic = kafka_topic(partitions=4)
        service = Service({"bootstrap.servers": kafka.bootstrap}, topic)

Nothing is started or imported until a test asks for it. With ``KAFKA_GUARANTEES_BOOTSTRAP`` set, the Kafka that it
names is used instead of a new one. Tests on a database server are skipped where it is not installed, and fail there when
``CI`` is set.
"""

from __future__ import annotations

import os
import uuid
from contextlib import ExitStack
from typing import TYPE_CHECKING, TypeVar

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from contextlib import AbstractContextManager

    from kafka_guarantees.testing.local_kafka import LocalKafka, RunningKafka
    from kafka_guarantees.testing.servers import LocalPostgres, LocalRedis

S = TypeVar("S")


@pytest.fixture(scope="session")
def kafka() -> Iterator[RunningKafka]:
    """One broker for the whole session, with ``.bootstrap`` and ``.create_topic(...)``."""
    from kafka_guarantees.testing.local_kafka import (  # noqa: PLC0415 - pytest starts faster
        BOOTSTRAP_VARIABLE,
        LocalKafka,
        RunningKafka,
    )

    running = os.environ.get(BOOTSTRAP_VARIABLE)
    if running:
        yield RunningKafka(running)
        return
    with LocalKafka() as started:
        yield started


@pytest.fixture(scope="session")
def kafka_cluster() -> Iterator[LocalKafka]:
    """Three brokers for the whole session, which a test may kill, pause and restart: it leaves all three running."""
    from kafka_guarantees.testing.local_kafka import BOOTSTRAP_VARIABLE, LocalKafka  # noqa: PLC0415 - pytest starts faster

    if os.environ.get(BOOTSTRAP_VARIABLE):
        pytest.skip(f"kafka_cluster kills brokers, and {BOOTSTRAP_VARIABLE} names some that are not ours")
    with LocalKafka(brokers=3) as started:
        yield started


@pytest.fixture
def kafka_topic(kafka: RunningKafka) -> Callable[..., str]:
    """``kafka_topic(partitions=1, replication=None, config=None)`` creates a topic on ``kafka`` and returns its name."""

    def create(partitions: int = 1, replication: int | None = None, config: Mapping[str, object] | None = None) -> str:
        name = f"test-{uuid.uuid4().hex[:12]}"
        kafka.create_topic(name, partitions, replication, config)
        return name

    return create


@pytest.fixture(scope="session")
def redis_server() -> Iterator[LocalRedis]:
    """A Redis for the whole session, with ``.url``. A test that kills or pauses it leaves it running."""
    from kafka_guarantees.testing.servers import LocalRedis  # noqa: PLC0415 - pytest starts faster

    yield from _installed(LocalRedis())


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[LocalPostgres]:
    """A PostgreSQL for the whole session, with ``.dsn``. A test that kills or pauses it leaves it running."""
    from kafka_guarantees.testing.servers import LocalPostgres  # noqa: PLC0415 - pytest starts faster

    yield from _installed(LocalPostgres())


def _installed(server: AbstractContextManager[S]) -> Iterator[S]:
    from kafka_guarantees.testing.servers import ServerNotInstalled  # noqa: PLC0415 - pytest starts faster

    with ExitStack() as stack:
        try:
            started = stack.enter_context(server)
        except ServerNotInstalled as exc:
            (pytest.fail if os.environ.get("CI") else pytest.skip)(str(exc))
        yield started
