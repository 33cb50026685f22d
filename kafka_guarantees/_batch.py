"""What a fetch brings. Pure: no I/O."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ._offsets import membership, next_offsets

if TYPE_CHECKING:
    from collections.abc import Sequence

    from confluent_kafka import Message

    from ._offsets import Partition


class Batch:
    """Messages of one fetch, in the order of their partitions, and the membership that they were fetched under."""

    __slots__ = ("fetched", "member", "messages", "metadata", "taken", "topic")

    def __init__(self, messages: Sequence[Message], metadata: bytes, fetched: float, topic: str | None = None) -> None:
        self.messages = messages
        self.topic = topic  # if they can be of one only
        self.belongs_to(metadata)
        self.taken = fetched
        self.fetched = fetched  # later: when the group was last served with the batch in hand

    def belongs_to(self, metadata: bytes) -> None:
        """Take over the membership that holds the batch."""
        self.metadata = metadata
        self.member = membership(metadata)

    @property
    def partitions(self) -> set[Partition]:
        """Where its messages come from."""
        return set(next_offsets(self.messages, self.topic))
