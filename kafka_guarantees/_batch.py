"""What a fetch brings. Pure: no I/O."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ._offsets import membership, next_offsets, spans

if TYPE_CHECKING:
    from collections.abc import Sequence

    from confluent_kafka import Message, TopicPartition

    from ._offsets import Partition, Span


class Batch:
    """Messages of one fetch, in the order of their partitions, and the membership that they were fetched under.

    Attributes:
        fetched: when that was, on the monotonic clock.
        served: when the group was last heard with the batch in hand: that is how long it is ours. -inf: it was given away.
    """

    __slots__ = ("_messages", "_spans", "fetched", "member", "metadata", "served", "topic")

    def __init__(self, messages: Sequence[Message], metadata: bytes, fetched: float, topic: str | None = None) -> None:
        self.messages = messages
        self.topic = topic  # if they can be of one only
        self.belongs_to(metadata)
        self.fetched = self.served = fetched

    @property
    def messages(self) -> Sequence[Message]:
        """What is left in hand."""
        return self._messages

    @messages.setter
    def messages(self, messages: Sequence[Message]) -> None:
        self._messages = messages
        self._spans: dict[Partition, Span] | None = None

    @property
    def spans(self) -> dict[Partition, Span]:
        """What of each partition is among these. They are walked once."""
        if self._spans is None:
            self._spans = spans(self._messages, self.topic)
        return self._spans

    def next_offsets(self, messages: Sequence[Message]) -> dict[Partition, TopicPartition]:
        """What to commit once these of its messages, which follow each other, are finished."""
        if len(messages) == len(self._messages):
            return {partition: span.behind for partition, span in self.spans.items()}
        return next_offsets(messages, self.topic)

    def belongs_to(self, metadata: bytes) -> None:
        """Take over the membership that holds the batch."""
        self.metadata = metadata
        self.member = membership(metadata)

    @property
    def partitions(self) -> set[Partition]:
        """Where its messages come from."""
        return set(self.spans)
