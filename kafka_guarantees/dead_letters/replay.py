"""Dead letters go back to where they came from, each exactly once.

What happens to a portion of one partition::

    fetched -> transaction begun -> markers read to the end -> those that have none produced, with a marker each -> committed

* A message may have several letters: one of them is sent, and all that are there get a marker.
* The transactional.id belongs to the dead letter topic. Whoever begins a transaction has ended that of any other replay, so
  that after its beginning nobody else can write a marker; if somebody does later, this transaction cannot commit.
* Therefore the markers are read inside the transaction, and whatever aborted it, or left it in doubt, it can be done again:
  the markers say what is still to be done. This also holds for a replay that was killed.
* A record that the brokers refuse is found by halving the portion, and left.
* The brokers may take a portion more slowly than a transaction may last: one that was aborted is halved as well.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from functools import cache
from itertools import groupby
from typing import TYPE_CHECKING

from kafka_guarantees import DeliveryError, DeliveryUnknown, ExactlyOnce, Record, TransactionAborted
from kafka_guarantees._dead_letters import marker, origin_of
from kafka_guarantees._settings.properties import canonical

from .reading import place_of, reaching

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from confluent_kafka import Message

    from kafka_guarantees import Transaction
    from kafka_guarantees._dead_letters import DeadLetter

    from .reading import Contents, Entry, Place, TopicReader

PORTION = 500  # records in a transaction
PORTION_SIZE = 16_000_000  # bytes in a transaction that has more than one
TRIES = 3  # transactions in a row that may be aborted for a reason that is neither a record's nor the size
NOT_OURS = ("log_level", "socket.timeout.ms")  # may contradict a transaction; a service of another guarantee may have them
LATE = "another dead letter of the same message was replayed before it came: name its place, if it is to be sent as well"
MESSAGE_SIZE = 50_000_000  # bytes: the brokers decide, not the client


@dataclass
class Outcome:
    """What became of the chosen dead letters.

    Attributes:
        sent: those that are back.
        before: those that had a marker.
        copies: those of messages of which another one is chosen.
        left: those that stay, with the reason.
    """

    sent: list[Place] = field(default_factory=list)
    before: list[Place] = field(default_factory=list)
    copies: list[Place] = field(default_factory=list)
    left: list[tuple[Place, str]] = field(default_factory=list)


def producer(config: Mapping[str, str], topic: str) -> ExactlyOnce:
    """The client that replays. Its id is the topic's, whatever the configuration says: two replays must meet in it."""
    theirs = {name: value for name, value in reaching(config).items() if name not in NOT_OURS}
    # some records are small enough for the brokers only as their producer has compressed them
    theirs |= {name: value for name, value in config.items() if canonical(name).startswith("compression.")}
    return ExactlyOnce({"message.max.bytes": MESSAGE_SIZE, **theirs, "transactional.id": transactional_id(topic)})


def transactional_id(topic: str) -> str:
    """The transactional.id of every replay of this dead letter topic."""
    return f"kafka-guarantees-dead-letters-{topic}"


def end_earlier(kafka: ExactlyOnce) -> None:
    """End what an earlier replay left open, so that it hides nothing."""
    with kafka.transaction():
        pass


def sort_out(
    reader: TopicReader,
    contents: Contents,
    places: Sequence[Place],
    outcome: Outcome,
    *,
    named: bool = False,
    without_headers: bool = False,
    present_time: bool = False,
) -> list[Entry]:
    """Those of these places that can be sent, one of each message. What became of the others is put into ``outcome``.

    One whose message was replayed already, with an earlier letter, is sent only if its place was ``named``: it may be a repeat,
    or the letter of another message, as in a topic that was made anew and filled with the old ones.
    """
    good: dict[tuple[object, ...], Entry] = {}
    refused: list[tuple[Entry, str]] = []
    partitions_of = cache(reader.partitions_of)
    for place in dict.fromkeys(places):
        entry = contents.entries.get(place)
        if entry is None:
            outcome.left.append((place, "there is no dead letter"))
        elif place in contents.replayed:
            outcome.before.append(place)
        elif entry.message in good:
            outcome.copies.append(place)
        else:
            late = not (named or contents.replayed.isdisjoint(contents.copies(place)))
            letter, partitions = entry.letter, partitions_of(entry.letter.topic)
            refusal = LATE if late else _refusal(letter, reader.topic, partitions, without_headers=without_headers)
            if refusal is None and not present_time:
                refusal = _age_refusal(letter, reader)
            if refusal is None:
                good[entry.message] = entry
            else:
                refused.append((entry, refusal))
    for entry, refusal in refused:
        if entry.message in good:  # another of its letters lacks less
            outcome.copies.append(entry.place)
        else:
            outcome.left.append((entry.place, refusal))
    return list(good.values())


def _refusal(letter: DeadLetter, own: str, partitions: int, *, without_headers: bool) -> str | None:
    if {"value", "key"} & set(letter.lost):
        gone = " and ".join(sorted(letter.lost))
        origin = f"topic {letter.topic!r} partition {letter.partition} offset {letter.offset}"
        return f"its {gone} would have made it too large for a dead letter: the message is at {origin}, if it is still kept"
    if "headers" in letter.lost and not without_headers:
        return "its headers could not be kept, and a message id with them; --without-headers sends it all the same"
    if letter.topic.startswith("__") or letter.topic == own:
        return f"topic {letter.topic!r} is one of Kafka's own, or the dead letter topic itself"
    if not partitions:
        return f"topic {letter.topic!r} does not exist, or this client may not write to it"
    if letter.partition >= partitions:
        return f"topic {letter.topic!r} has no partition {letter.partition}"
    return None


def _age_refusal(letter: DeadLetter, reader: TopicReader) -> str | None:
    if not _too_old(letter, reader):
        return None
    return (
        f"with its timestamp the brokers of topic {letter.topic!r} would not take it, or remove it within the hour "
        "(retention.ms, message.timestamp.before.max.ms); --present-time sends it with the time of now"
    )


def _too_old(letter: DeadLetter, reader: TopicReader) -> bool:
    return letter.timestamp is not None and letter.timestamp < reader.kept_from(letter.topic)


class Replay:
    """Sends dead letters of one topic back.

    Args:
        kafka: see ``producer``.
        reader: of the dead letter topic.
        contents: of it, read after ``end_earlier``.
        outcome: what became of each, up to date at any time.
        sent: called for each that is back.
    """

    def __init__(
        self,
        kafka: ExactlyOnce,
        reader: TopicReader,
        contents: Contents,
        outcome: Outcome,
        sent: Callable[[Entry], None],
    ) -> None:
        self._kafka = kafka
        self._reader = reader
        self._contents = contents
        self._sent = sent
        self._outcome = outcome
        self._doubtful: set[Place] = set()
        self._hidden: dict[int, str] = {}  # partitions where markers cannot be read, and why

    def run(self, chosen: Sequence[Entry]) -> None:
        """Send these. Nothing speaks against any of them.

        Raises:
            FencedError: another replay of this topic has begun.
            KafkaGuaranteesError, KafkaException, NotRead: the rest was not sent.
        """
        work = deque(_portions(chosen))
        tries = 0
        while work:
            portion = self._readable(work.popleft())
            if not portion:
                continue
            try:
                self._transaction(portion)
            except (DeliveryError, TransactionAborted, DeliveryUnknown) as error:
                refused = error if isinstance(error, DeliveryError) else error.__cause__
                if not isinstance(refused, DeliveryError) and isinstance(error, DeliveryUnknown):
                    self._doubtful |= {entry.place for entry in portion}
                elif len(portion) > 1:  # one of them is refused; or together they take longer than a transaction may
                    half = len(portion) // 2
                    work.extendleft([portion[half:], portion[:half]])
                    continue
                elif isinstance(refused, DeliveryError):
                    self._outcome.left.append((portion[0].place, str(refused)))
                    continue
                tries += 1
                if tries == TRIES:
                    raise
                work.appendleft(portion)
            else:
                tries = 0

    def _readable(self, portion: list[Entry]) -> list[Entry]:
        """Those of which markers can tell whether they were sent. The others are left."""
        if not self._hidden:
            return portion
        hidden = {entry.place: why for entry in portion if (why := self._hides(entry.place)) is not None}
        self._outcome.left += hidden.items()
        return [entry for entry in portion if entry.place not in hidden]

    def _hides(self, place: Place) -> str | None:
        """Why markers cannot tell whether the message whose letter is there was sent."""
        return next((self._hidden[number] for number, _ in self._contents.copies(place) if number in self._hidden), None)

    def _read_markers(self, portion: Sequence[Entry]) -> None:
        for partition in {number for entry in portion for number, _ in self._contents.copies(entry.place)}:
            self._contents.read_markers(partition)
            complaint = self._contents.complaint(partition)
            if complaint is not None:
                self._hidden[partition] = complaint

    def _transaction(self, portion: list[Entry]) -> None:
        letters = {  # before the transaction begins: how old may it be? The answer may take longer than a transaction
            place_of(message): _original(message, letter, present_time=_too_old(letter, self._reader))
            for message in self._reader.fetch(portion[0].place[0], [entry.place[1] for entry in portion])
            if (letter := origin_of(message)) is not None
        }
        with self._kafka.transaction() as tx:
            self._read_markers(portion)
            marked = {entry.place for entry in portion} & self._contents.replayed
            for place, record in letters.items():
                if place not in marked and self._hides(place) is None:
                    _produce(tx, record)
                    for copy in self._contents.copies(place):
                        if copy not in self._contents.replayed:
                            _produce(tx, marker(self._reader.topic, *copy))
        sent = []
        for entry in self._readable(portion):
            if entry.place in marked and entry.place not in self._doubtful:
                self._outcome.before.append(entry.place)
            elif entry.place not in marked and entry.place not in letters:
                self._outcome.left.append((entry.place, "it is no longer there"))
            else:
                sent.append(entry)
        self._outcome.sent += [entry.place for entry in sent]  # all of them are: before one is printed, which may fail
        for entry in sent:
            self._sent(entry)


def _original(message: Message, letter: DeadLetter, *, present_time: bool) -> Record:
    """The record as it was before it became a dead letter, but for its timestamp where it would not last with that."""
    timestamp = None if letter.timestamp is None or present_time else max(1, letter.timestamp)  # librdkafka: 0 is now
    return Record(
        letter.topic,
        message.value(),
        message.key(),
        headers=letter.headers,
        partition=letter.partition,
        timestamp=timestamp,
    )


def _produce(tx: Transaction, record: Record) -> None:
    tx.produce(
        record.topic,
        record.value,
        record.key,
        headers=record.headers,
        partition=record.partition,
        timestamp=record.timestamp,
    )


def _portions(chosen: Sequence[Entry]) -> Iterator[list[Entry]]:
    """Each of one partition, in order, and bounded."""
    in_order = sorted(chosen, key=lambda entry: entry.place)
    for _, entries in groupby(in_order, key=lambda entry: entry.place[0]):
        portion: list[Entry] = []
        size = 0
        for entry in entries:
            if portion and (len(portion) == PORTION or size + entry.size > PORTION_SIZE):
                yield portion
                portion, size = [], 0
            portion.append(entry)
            size += entry.size
        yield portion
