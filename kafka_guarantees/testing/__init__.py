"""A real Kafka for tests, examples and experiments, without Docker."""

from __future__ import annotations

from kafka_guarantees.testing.local_kafka import LocalKafka, LocalKafkaError, RunningKafka, local_or_running

__all__ = ["LocalKafka", "LocalKafkaError", "RunningKafka", "local_or_running"]
