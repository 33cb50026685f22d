"""What a deduplication store and an inbox are: the calls, what they answer, and what they promise.

A *store* remembers ids of messages whose effects happen elsewhere (mail, HTTP). An *inbox* keeps ids and offsets in the same
database transaction as the effects themselves.

Rules for both.
* Every call is a batch, and one round trip.
* Keys and positions are digests of 16 bytes, made by the caller; a *scope* (the consumer group) keeps those of one application
  apart from those of another (D07).
* What is not known is an error. ``StoreUnavailable`` says that the outcome is unknown; the same call may then be made again. A
  failed read never means "not a duplicate" (D16).

``kafka_guarantees.testing`` has a conformance suite for each.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from enum import IntEnum
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from contextlib import AbstractContextManager

Takeover = Literal["position", "lease"]

C_co = TypeVar("C_co", covariant=True)


def check_retention(retention: timedelta, least: timedelta = timedelta.resolution) -> None:
    """Raise TypeError or ValueError where this is no time that ids can be remembered for."""
    if not isinstance(retention, timedelta):
        raise TypeError(f"retention is a timedelta, such as timedelta(hours=24), not {retention!r}")
    if retention < least:
        raise ValueError(f"retention is {least.total_seconds()} s or longer, not {retention}")


class Outcome(IntEnum):
    """What became of a claim."""

    NEW = 1  # claimed by this call, or by an earlier one with the same token: handle it
    TAKEN_OVER = 2  # claimed as well; an earlier attempt did not finish, its effects may have happened
    DUPLICATE = 3  # completed within the retention: leave it out
    IN_PROGRESS = 4  # somebody handles the same id at another position: wait, and claim again; never leave it out (D09)
    MISMATCH = 5  # completed, with another fingerprint: one id for two different messages (D08)


class Item(NamedTuple):
    """One message, as a store sees it.

    Attributes:
        key: digest of the message id, 16 bytes.
        position: stands for topic id, partition and offset, 16 bytes. The same record that comes again has the same.
        fingerprint: digest of key and value, 8 bytes; empty: not compared.
    """

    key: bytes
    position: bytes
    fingerprint: bytes = b""


@dataclass(frozen=True)
class Capabilities:
    """What can be expected of a store.

    Attributes:
        shared: whether workers on several machines see the same ids.
        durable: what it survives: nothing (``"none"``), the end of its process (``"process"``), power loss (``"power"``).
        clock: whose clock leases and retention go by.
    """

    shared: bool
    durable: Literal["none", "process", "power"]
    clock: Literal["server", "client"]


class DedupStore(Protocol):
    """Remembers which message ids of a scope were handled. Safe to use from several threads.

    The keys in one call are distinct. All calls raise ``StoreUnavailable`` where the outcome is unknown.

    Attributes:
        capabilities: what can be expected of it.
        retention: how long a completed id is remembered at least, from its completion on. Not for ever: after three times that,
            and a ``purge()``, it is new.
    """

    @property
    def capabilities(self) -> Capabilities: ...

    @property
    def retention(self) -> timedelta: ...

    def claim(
        self, scope: str, items: Sequence[Item], *, token: bytes, lease: float, takeover: Takeover = "position"
    ) -> list[Outcome]:
        """Claim, atomically, each key that is absent or expired, or claimed with the same token or with a lease that is over.

        With ``takeover="position"`` also each key that is claimed with the same position: it *is* that record, which came
        again because its owner died or lost the partition. Whoever claims becomes the owner: token, position and lease are
        replaced.

        Args:
            scope: whose ids these are.
            items: with distinct keys.
            token: 16 bytes that name the owner of the claims.
            lease: seconds until anybody may take over.
            takeover: ``"lease"``: a claim is taken over only when its lease is over.

        Returns:
            An outcome for each item, in their order.
        """

    def complete(self, scope: str, items: Sequence[Item], *, token: bytes) -> list[bool]:
        """Turn claims with this token into completed ids with their fingerprints, for the time of the retention.

        A claim whose lease is over, and that nobody took, is completed too, unless ``purge()`` removed it.

        Returns:
            For each item, in their order, whether its id is completed now, by whomever. False: another owner has claimed it, or
            nobody has.
        """

    def release(self, scope: str, items: Sequence[Item], *, token: bytes) -> None:
        """Forget claims with this token, so that the next claim is NEW. Other keys are left alone, completed ones too."""

    def purge(self, *, limit: int = 10_000) -> int:
        """Remove at most about ``limit`` of what is expired. Returns how many; 0 where the store does that by itself."""

    def close(self) -> None:
        """Let go of what the store opened itself."""


class Source(NamedTuple):
    """A partition of one incarnation of a topic: deleted and created again it has another ``topic_id`` (D06)."""

    topic: str
    topic_id: bytes  # 16 bytes
    partition: int


class Entry(NamedTuple):
    """One message, as an inbox sees it.

    Attributes:
        source: where it comes from.
        offset: its offset there.
        key: digest of the message id, 16 bytes; None: only this record itself is recognised when it comes again.
        fingerprint: digest of key and value, 8 bytes; empty: not compared. All entries of a call that have a key have one, or
            none of them has.
    """

    source: Source
    offset: int
    key: bytes | None
    fingerprint: bytes = b""


class InboxTransaction(Protocol[C_co]):
    """An open transaction of an inbox.

    Attributes:
        connection: for the handler's own writes.
        fresh: which of the entries are to be handled, by their index and in their order. The others were handled before, or
            have the id of an earlier one in the same call.
    """

    @property
    def connection(self) -> C_co: ...

    @property
    def fresh(self) -> Sequence[int]: ...

    def finish(self, handled: int | None = None) -> None:
        """Advance the offsets. Called once, after the handler's writes; at the latest on the way out of ``transaction()``.

        Args:
            handled: how many of ``fresh`` are handled, if not all. In each partition the offset moves up to the first entry
                that is not handled, or repeats the id of one that is not; the ids that this transaction noted for what is
                not handled are forgotten.

        Raises:
            PartitionFenced: another owner advanced an offset since this transaction began. An inbox that writes the offsets
                together with its commit raises it on the way out of ``transaction()`` instead.
        """


class Inbox(Protocol[C_co]):
    """Keeps message ids and offsets in the database transaction that the handler writes in: one effect per message there.

    One transaction at a time, from one thread at a time.

    Attributes:
        retention: how long an id is remembered at least. Offsets are kept for ever.
    """

    @property
    def retention(self) -> timedelta: ...

    def start_offsets(self, scope: str, sources: Sequence[Source]) -> Mapping[Source, int | None]:
        """The offsets to go on at; None where nothing of the partition was handled yet.

        Raises:
            TopicRecreated: the offset that is stored belongs to another topic of the same name.
            StoreUnavailable: the database did not answer.
        """

    def transaction(self, scope: str, entries: Sequence[Entry]) -> AbstractContextManager[InboxTransaction[C_co]]:
        """Begin; lock the offsets of the partitions; find out what is fresh. Commit at the end, roll back on an exception.

        Args:
            scope: whose ids and offsets these are.
            entries: in the order of their offsets within each partition.

        Raises:
            PartitionFenced: another owner advanced an offset meanwhile. Nothing was written.
            TopicRecreated: an offset that is stored belongs to another topic of the same name.
            MessageIdReused: an entry that is not behind the offsets has an id that is known with another fingerprint, or that
                another entry of this call has (D08). Its ``index`` says which, one of them. Nothing was written.
            StoreUnavailable: the database did not answer. Whether it was committed is unknown: the next transaction with the
                same entries knows, and leaves out what was.
        """

    def purge(self, *, limit: int = 10_000) -> int:
        """Remove at most about ``limit`` of the ids that are expired. Returns how many."""

    def close(self) -> None:
        """Let go of what the inbox opened itself."""
