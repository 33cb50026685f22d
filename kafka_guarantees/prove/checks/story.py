"""The evidence, sorted out once for all checks: what became of each id, who handled what, what is where.

* The outcome of an id in a transaction is that of the transaction: written and aborted is failed. Only a failure of its own
  goes before that.
* What has no outcome is unknown, never failed (H04).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from ..evidence import FAIL, GROUPS, INFO, INVOKE, OK, OUTPUTS, REFUSED

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from ..evidence import Event, Evidence, Seen

Place = tuple[int, int]  # partition and offset
Life = tuple[str, int]  # a worker, and the number of its process

NUMBERS = frozenset(range(OUTPUTS))  # of the outputs of a message
FEW = 5  # names in a sentence


class Step(NamedTuple):
    """A handler begins with a message, or ends."""

    at: int
    life: Life
    type: str
    place: Place
    id: str
    attempt: str | None
    content: str | None
    refused: bool = False  # its handler returned a record that cannot be written, and said nothing


@dataclass
class SenderTransaction:
    """A transaction of a sender.

    Attributes:
        life: whose.
        ids: that were sent in it.
        committing: when its block was about to be left in order; None if that never happened.
        outcome: what became of it.
    """

    life: Life
    ids: list[str] = field(default_factory=list)
    committing: int | None = None
    outcome: str = INFO


@dataclass(frozen=True)
class Story:
    """What the checks look at.

    Attributes:
        evidence: where it is from.
        sends: id -> its invocation.
        outcomes: id -> ok, fail or info.
        acknowledged: invocation or acknowledgement of sends, as far as they say where the record is.
        transactions: of senders, by name.
        steps: group -> what its handlers did, in the order of time.
        aborted: attempt -> how it is known that its transaction, where it has one, was aborted, a few words.
        lives: when each began.
        left: when a broker left the cluster's metadata, as a life saw it.
        source: place -> record of the input topic, committed, in the order of places.
        copies: id -> its places in the input topic, committed.
        outputs: place of a message -> its outputs, committed, in the order of places.
        committed: group -> partition -> offset, as it was last known: not every sample has every partition (H08).
    """

    evidence: Evidence
    sends: Mapping[str, Event]
    outcomes: Mapping[str, str]
    acknowledged: Sequence[Event]
    transactions: Mapping[str, SenderTransaction]
    steps: Mapping[str, Sequence[Step]]
    aborted: Mapping[str, str]
    lives: Mapping[Life, int]
    left: Mapping[Life, Sequence[int]]
    source: Mapping[Place, Seen]
    copies: Mapping[str, Sequence[Place]]
    outputs: Mapping[Place, Sequence[Seen]]
    committed: Mapping[str, Mapping[int, int]]

    @property
    def guarantee(self) -> str:
        """Whose laws are to hold."""
        return self.evidence.guarantee

    @property
    def exactly_once(self) -> bool:
        """Whether a handler works inside of a transaction."""
        return self.guarantee == "exactly-once"

    def handled(self, group: str, kind: str = OK) -> set[Place]:
        """The places with which a handler of a group has ended in order; with INVOKE: has begun."""
        return {step.place for step in self.steps[group] if step.type == kind}

    def missing(self, place: Place) -> list[int]:
        """The numbers of the outputs that the message at a place does not have."""
        return sorted(NUMBERS - {named(output.id)[1] for output in self.outputs.get(place, ())})

    def below(self, place: Place) -> bool:
        """Whether the transformers have committed the message at a place."""
        partition, offset = place
        return offset < self.committed["transformer"].get(partition, 0)


def tell(evidence: Evidence) -> Story:
    """Sort the evidence out: one walk over the events, one over each view.

    Raises:
        ValueError: a handler did not say with which message it began: nothing can be judged then.
    """
    senders, handlers = _Senders(), _Handlers()
    lives: dict[Life, int] = {}
    left: dict[Life, list[int]] = {}
    for event in evidence.events:
        if event.what == "handle":
            handlers.note(event)
        elif event.what == "send":
            senders.note_send(event)
        elif event.what == "transaction":
            senders.note_transaction(event)
        elif event.what == "attempt" and event.attempt is not None:
            handlers.aborted[event.attempt] = "its transaction was aborted"
        elif event.what == "life" and event.type == INVOKE:
            lives[event.who, event.life] = event.at
        elif event.what == "broker left":
            left.setdefault((event.who, event.life), []).append(event.at)
    source = {where(seen): seen for seen in sorted(evidence.source.committed, key=where)}
    return Story(
        evidence=evidence,
        sends=senders.sends,
        outcomes=senders.outcomes(),
        acknowledged=senders.acknowledged,
        transactions=senders.transactions,
        steps=handlers.steps,
        aborted=handlers.aborted,
        lives=lives,
        left=left,
        source=source,
        copies=_copies(source.values()),
        outputs=_outputs(evidence.sink.committed),
        committed={group: _last(evidence, group) for group in GROUPS},
    )


class _Senders:
    """What senders did."""

    def __init__(self) -> None:
        self.sends: dict[str, Event] = {}
        self.acknowledged: list[Event] = []
        self.transactions: dict[str, SenderTransaction] = {}
        self._own: dict[str, str] = {}

    def note_send(self, event: Event) -> None:
        """One event of a send."""
        if event.id is None:
            raise ValueError(f"a send without an id: {event}")
        if event.type == INVOKE:
            self.sends[event.id] = event
            if event.transaction is not None:
                self._transaction(event).ids.append(event.id)
            return
        self._own[event.id] = event.type
        if event.type == OK and event.offset is not None and event.offset >= 0:  # acks=0: librdkafka calls it -1
            self.acknowledged.append(event)

    def note_transaction(self, event: Event) -> None:
        """One event of a transaction."""
        transaction = self._transaction(event)
        if event.type == "commit":
            transaction.committing = event.at
        elif event.type != INVOKE:
            transaction.outcome = event.type

    def outcomes(self) -> dict[str, str]:
        """What became of each id."""
        return {id_: self._outcome(id_, send.transaction) for id_, send in self.sends.items()}

    def _outcome(self, id_: str, transaction: str | None) -> str:
        own = self._own.get(id_, INFO)
        return own if transaction is None or own == FAIL else self.transactions[transaction].outcome

    def _transaction(self, event: Event) -> SenderTransaction:
        name = event.transaction or ""
        if name not in self.transactions:
            self.transactions[name] = SenderTransaction((event.who, event.life))
        return self.transactions[name]


class _Handlers:
    """What handlers did, by group."""

    def __init__(self) -> None:
        self.steps: dict[str, list[Step]] = {group: [] for group in GROUPS}
        self.aborted: dict[str, str] = {}
        self._begun: dict[str, Event] = {}

    def note(self, event: Event) -> None:
        """One event of a handler. Its end needs to name the attempt only: the beginning tells the rest."""
        began = event
        if event.attempt is not None:
            began = self._begun.setdefault(event.attempt, event)
            if event.type == FAIL:
                self.aborted[event.attempt] = "its handler raised"
        if began.partition is None or began.offset is None:
            raise ValueError(f"a handler that does not say with which message it began: {event}")
        place, id_ = (began.partition, began.offset), began.id or "a record without id"
        step = Step(
            event.at, (event.who, event.life), event.type, place, id_, event.attempt, event.content, event.detail == REFUSED
        )
        self.steps[group_of(event.who)].append(step)


def _copies(source: Iterable[Seen]) -> dict[str, list[Place]]:
    copies: dict[str, list[Place]] = {}
    for seen in source:
        copies.setdefault(seen.id, []).append(where(seen))
    return copies


def _outputs(sink: Iterable[Seen]) -> dict[Place, list[Seen]]:
    outputs: dict[Place, list[Seen]] = {}
    for seen in sorted(sink, key=where):
        if seen.origin is not None:
            outputs.setdefault(seen.origin, []).append(seen)
    return outputs


def _last(evidence: Evidence, group: str) -> Mapping[int, int]:
    known: dict[int, int] = {}
    for sample in evidence.samples.get(group, ()):
        known.update(sample.offsets)
    return known


# -- words for sentences --------------------------------------------------------------------------------------------------


def group_of(who: str) -> str:
    """The group that a worker is in."""
    return who.rsplit("-", 1)[0]


def where(seen: Seen) -> Place:
    """The place of a record."""
    return seen.partition, seen.offset


def named(output: str) -> tuple[str, int | None]:
    """The input and the number in the id of an output; None for the number where it is not the id of one."""
    id_, _, number = output.rpartition("/")
    return id_, int(number) if number.isdecimal() else None


def spot(place: Place) -> str:
    """A place, for people."""
    return f"{place[0]}/{place[1]}"


def by(life: Life) -> str:
    """A process, for people."""
    return f"{life[0]} (life {life[1]})"


def few(names: Sequence[object]) -> str:
    """Some names, for people."""
    return ", ".join(str(name) for name in names[:FEW]) + (f" and {len(names) - FEW} more" if len(names) > FEW else "")
