"""Laws of the offset book: what is committed, what is handled, and what a consumer's group metadata says. No broker needed."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import pytest
from confluent_kafka import Consumer, Message, TopicPartition
from hypothesis import given, settings
from hypothesis import strategies as st

from kafka_guarantees._batch import Batch
from kafka_guarantees._offsets import Membership, membership, named, next_offsets, not_before, spans

if TYPE_CHECKING:
    from collections.abc import Sequence


def message(topic: str, partition: int, offset: int, epoch: int | None = None) -> Message:
    if epoch is None:
        return Message(topic=topic, partition=partition, offset=offset)
    return Message(topic=topic, partition=partition, offset=offset, leader_epoch=epoch)


def place(one: Message) -> tuple[str, int, int]:
    topic, partition, offset = one.topic(), one.partition(), one.offset()
    assert topic is not None
    assert partition is not None
    assert offset is not None
    return topic, partition, offset


@st.composite
def consumed(draw: st.DrawFn) -> list[Message]:
    """Messages as a consumer gives them: partitions mixed, offsets of each growing, with gaps (C23)."""
    reached: dict[tuple[str, int], int] = {}
    messages = []
    for topic, partition, gap in draw(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 2), st.integers(1, 5)))):
        offset = reached[topic, partition] = reached.get((topic, partition), -1) + gap
        messages.append(message(topic, partition, offset, draw(st.none() | st.integers(0, 3))))
    return messages


# --- next_offsets ----------------------------------------------------------------------------------------------------


def test_what_is_committed_is_the_offset_after_the_last_message() -> None:
    """C04: last + 1, per partition; never the last, never one maximum for all of them."""
    offsets = next_offsets([message("a", 0, 4), message("a", 1, 90), message("b", 0, 7), message("a", 0, 6)])
    assert {key: value.offset for key, value in offsets.items()} == {("a", 0): 7, ("a", 1): 91, ("b", 0): 8}
    assert all((value.topic, value.partition) == key for key, value in offsets.items())


def test_the_leader_epoch_of_the_last_message_goes_with_the_offset() -> None:
    """C22: without it the brokers cannot detect a truncated log (KIP-320)."""
    offsets = next_offsets([message("a", 0, 4, epoch=2), message("a", 0, 5, epoch=3)])
    assert offsets["a", 0].leader_epoch == 3


def test_a_message_without_a_leader_epoch_commits_none() -> None:
    """What old brokers leave out is not invented: the offset looks like one that never had an epoch."""
    assert next_offsets([message("a", 0, 4)])["a", 0].leader_epoch == TopicPartition("a", 0, 5).leader_epoch


def test_no_messages_commit_nothing() -> None:
    """An empty portion moves no offset."""
    assert next_offsets([]) == {}


@settings(deadline=None)
@given(consumed())
def test_a_restart_gives_no_finished_message_and_every_other(messages: list[Message]) -> None:
    """C04: for every cut of what was consumed, the offsets of the finished part lie after all of it, and not after the rest."""
    for cut in range(len(messages) + 1):
        book = next_offsets(messages[:cut])
        for topic, partition, offset in map(place, messages[:cut]):
            assert offset < book[topic, partition].offset
        for topic, partition, offset in map(place, messages[cut:]):
            assert (topic, partition) not in book or offset >= book[topic, partition].offset
        assert set(book) == {place(one)[:2] for one in messages[:cut]}


# --- not_before ------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(consumed(), st.dictionaries(st.tuples(st.sampled_from("ab"), st.integers(0, 2)), st.integers(0, 20)))
def test_exactly_the_messages_below_their_mark_are_left_out(messages: list[Message], marks: dict[tuple[str, int], int]) -> None:
    """M09: what was handled before is not handled again; everything else is, in the same order."""
    expected = [one for one in messages if place(one)[2] >= marks.get(place(one)[:2], 0)]
    assert [id(one) for one in not_before(messages, marks, spans(messages))] == [id(one) for one in expected]


def test_nothing_is_copied_where_nothing_is_left_out() -> None:
    """The usual case costs no copy: it is on the path of every batch."""
    messages: Sequence[Message] = [message("a", 0, 4), message("a", 0, 5)]
    assert not_before(messages, {}, spans(messages)) is messages
    assert not_before(messages, {("a", 0): 4}, spans(messages)) is messages


def test_an_offset_equal_to_the_mark_is_the_next_one_to_handle() -> None:
    """A mark is the offset after the last handled message, so a message at it is new."""
    messages = [message("a", 0, offset) for offset in (3, 4, 5)]
    assert [place(one)[2] for one in not_before(messages, {("a", 0): 4}, spans(messages))] == [4, 5]


# --- a batch ---------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(consumed(), st.booleans())
def test_a_batch_says_of_each_part_what_the_offset_book_does(messages: list[Message], mixed: bool) -> None:  # noqa: FBT001
    """C04: however it is cut, and whatever is left in hand of it; one that can be of one topic only as any other."""
    topic = None if mixed else "a"
    messages = [one for one in messages if mixed or one.topic() == topic]
    batch = Batch(messages, metadata(1, "group", "member"), 0.0, topic)
    for left in (messages, messages[1:]):
        batch.messages = left
        assert batch.partitions == {place(one)[:2] for one in left}
        for cut in range(len(left) + 1):
            of, book = batch.next_offsets(left[:cut]), next_offsets(left[:cut])
            assert {key: (found.offset, found.leader_epoch) for key, found in of.items()} == {
                key: (found.offset, found.leader_epoch) for key, found in book.items()
            }


# --- membership: decoding --------------------------------------------------------------------------------------------


def metadata(generation: int, group: str, member: str, instance: str | None = None) -> bytes:
    """Group metadata as librdkafka serializes it (rdkafka_cgrp.c)."""
    last = b"\x01" if instance is None else b"\x00" + instance.encode() + b"\0"
    head = b"CGMDv2:" + generation.to_bytes(4, "little", signed=True)
    return head + group.encode() + b"\0" + member.encode() + b"\0" + last


NAMES = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=40)


@settings(deadline=None)
@given(st.integers(-1, 2**31 - 1), NAMES, NAMES, st.none() | NAMES)
def test_generation_and_member_are_read_whatever_surrounds_them(
    generation: int, group: str, member: str, instance: str | None
) -> None:
    """X03: the generation may have bytes that are NUL, names may be any UTF-8, an instance id may follow."""
    assert membership(metadata(generation, group, member, instance)) == Membership(generation, member)


@pytest.mark.parametrize("protocol", ["classic", "consumer"])
@pytest.mark.parametrize("instance", [None, "instance-7"])
@pytest.mark.parametrize("group", ["offers", "zufällig ✓"])
def test_a_real_consumer_that_never_joined_is_not_active(protocol: str, instance: str | None, group: str) -> None:
    """X03: what the installed librdkafka says before the first join would switch fencing off. This also pins its layout."""
    config: dict[str, object] = {"bootstrap.servers": "127.0.0.1:1", "group.id": group, "group.protocol": protocol}
    if instance is not None:
        config["group.instance.id"] = instance
    consumer = Consumer({**config, "logger": logging.getLogger("test.silent")})
    try:
        raw = consumer.consumer_group_metadata()
    finally:
        consumer.close()
    assert isinstance(raw, bytes)
    read = membership(raw)
    assert read.generation == -1
    assert not read.active
    if protocol == "classic":
        assert read.member == ""
    assert raw == metadata(-1, group, read.member, instance)


@pytest.mark.parametrize(
    "junk",
    [
        b"",
        b"CGMDv2",
        b"CGMDv2:",
        b"CGMDv2:\x01\x00\x00",
        b"CGMDv2:\x01\x00\x00\x00",
        b"CGMDv2:\x01\x00\x00\x00group",
        b"CGMDv2:\x01\x00\x00\x00group\x00member",
        b"CGMDv1:\x01\x00\x00\x00group\x00member\x00\x01",
        b"CGMDv3:\x01\x00\x00\x00group\x00member\x00\x01",
        b"\x01\x00\x00\x00group\x00member\x00\x01",
        b"CGMDv2:\x01\x00\x00\x00group\x00\xff\xfe\x00\x01",
    ],
)
def test_a_layout_that_is_not_known_is_an_error(junk: bytes) -> None:
    """What cannot be read cannot be verified: it is never taken for a membership, and the error says so."""
    with pytest.raises(ValueError, match="form that is not known"):
        membership(junk)


@settings(deadline=None)
@given(st.binary(max_size=60))
def test_any_other_prefix_is_refused(junk: bytes) -> None:
    """No bytes without librdkafka's own prefix are a membership, and nothing but ValueError comes of them."""
    if not junk.startswith(b"CGMDv2:"):
        with pytest.raises(ValueError, match="form that is not known"):
            membership(junk)


@settings(deadline=None)
@given(st.binary(max_size=60))
def test_junk_after_the_prefix_is_read_or_refused(junk: bytes) -> None:
    """Whatever follows the prefix: a membership, or ValueError; never another exception."""
    try:
        read = membership(b"CGMDv2:" + junk)
    except ValueError:
        return
    assert junk.count(b"\0") >= 2
    assert -(2**31) <= read.generation < 2**31


# --- membership: continuity ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("now", "earlier", "expected"),
    [
        ((3, "m"), (3, "m"), True),
        ((4, "m"), (3, "m"), True),  # a rebalance that took nothing: a revocation would need a poll
        ((0, "m"), (0, "m"), True),
        ((2, "m"), (3, "m"), False),
        ((3, "n"), (3, "m"), False),
        ((4, "n"), (3, "m"), False),
        ((-1, "m"), (3, "m"), False),
        ((-1, "m"), (-1, "m"), False),
        ((-1, ""), (-1, ""), False),
        ((3, ""), (3, ""), False),
        ((3, "m"), (-1, "m"), False),
        ((3, ""), (3, "m"), False),
    ],
)
def test_a_membership_continues_only_unbroken(now: tuple[int, str], earlier: tuple[int, str], *, expected: bool) -> None:
    """C09: the same member, in the same or a later generation, never thrown out in between and never unjoined (X03)."""
    assert Membership(*now).continues(Membership(*earlier)) is expected


MEMBERSHIPS = st.builds(Membership, st.integers(-1, 4), st.sampled_from(["", "m", "n"]))


@settings(deadline=None)
@given(MEMBERSHIPS, MEMBERSHIPS, MEMBERSHIPS)
def test_continuing_is_an_order(first: Membership, second: Membership, third: Membership) -> None:
    """Reflexive for the active, transitive, and both ways round only where nothing changed."""
    assert first.continues(first) is first.active
    if second.continues(first) and third.continues(second):
        assert third.continues(first)
    if second.continues(first) and first.continues(second):
        assert first == second


@pytest.mark.parametrize(
    ("partitions", "text"),
    [
        ([], "nothing"),
        ([("t", 3)], "t 3"),
        ([("t", 2), ("t", 0), ("t", 1), ("t", 7), ("a", 10), ("a", 9)], "a 9-10; t 0-2,7"),
        ([("t", number) for number in range(500)], "t 0-499"),
    ],
)
def test_partitions_are_named_in_a_line(partitions: list[tuple[str, int]], text: str) -> None:
    """A log line of 500 partitions is as long as one of two."""
    assert named(partitions) == text
