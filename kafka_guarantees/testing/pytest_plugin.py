"""Fixtures for tests on a real Kafka: ``kafka``, ``kafka_cluster`` and ``kafka_topic``.

Installing the package is enough::

    def test_orders_arrive(kafka, kafka_topic):
        topic = kafka_topic(partitions=4)
        service = Service({"bootstrap.servers": kafka.bootstrap}, topic)

Nothing is started or imported until a test asks for it. With ``KAFKA_GUARANTEES_BOOTSTRAP`` set, the Kafka that it
names is used instead of a new one.
"""

from __future__ import annotations

import os
import uuid
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from kafka_guarantees.testing.local_kafka import LocalKafka, RunningKafka

_BOOTSTRAP_VARIABLE = "KAFKA_GUARANTEES_BOOTSTRAP"


@pytest.fixture(scope="session")
def kafka() -> Iterator[RunningKafka]:
    """One broker for the whole session, with ``.bootstrap`` and ``.create_topic(...)``."""
    from kafka_guarantees.testing.local_kafka import LocalKafka, RunningKafka  # noqa: PLC0415 - pytest starts faster

    running = os.environ.get(_BOOTSTRAP_VARIABLE)
    if running:
        yield RunningKafka(running)
        return
    with LocalKafka() as started:
        yield started


@pytest.fixture(scope="session")
def kafka_cluster() -> Iterator[LocalKafka]:
    """Three brokers for the whole session, which a test may kill, pause and restart: it leaves all three running."""
    from kafka_guarantees.testing.local_kafka import LocalKafka  # noqa: PLC0415 - pytest starts faster

    if os.environ.get(_BOOTSTRAP_VARIABLE):
        pytest.skip(f"kafka_cluster kills brokers, and {_BOOTSTRAP_VARIABLE} names some that are not ours")
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
