"""Laws of the judge: it holds what is right, it finds what is wrong under its right name, and takes nothing legal for wrong.

``Made`` is a little cluster in memory: it writes down what workers, brokers and readers would have. ``clean`` lets a plain run
happen in it, ``simulate`` a wild one that keeps its guarantee; the tests then break something in what is written down.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kafka_guarantees.prove.checks import LAWS, verdict_and_figures
from kafka_guarantees.prove.checks.calm import ALLOWED
from kafka_guarantees.prove.checks.law import SHOWN
from kafka_guarantees.prove.checks.story import tell
from kafka_guarantees.prove.evidence import (
    FAIL,
    GROUPS,
    INFO,
    INVOKE,
    OK,
    OUTPUTS,
    REFUSED,
    Event,
    Evidence,
    Sample,
    Seen,
    Verdict,
    View,
)
from kafka_guarantees.prove.history import History, read

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from kafka_guarantees.prove.checks.story import Place

MS = 1_000_000
PARTITIONS = 3
CALM = 12  # records that are sent when nothing is done to anybody any more
AMO, ALO, EOS = "at-most-once", "at-least-once", "exactly-once"
EVERY = (AMO, ALO, EOS)


def judge(evidence: Evidence) -> list[Verdict]:
    return verdict_and_figures(evidence)[0]


def figures(evidence: Evidence) -> dict[str, int]:
    return verdict_and_figures(evidence)[1]


class Made:
    """What a run has left behind, still to be changed."""

    def __init__(self, guarantee: str) -> None:
        self.guarantee = guarantee
        self.now = 0
        self.events: list[Event] = []
        self.source: list[Seen] = []
        self.sink: list[Seen] = []
        self.aborted_source: list[Seen] = []
        self.aborted_sink: list[Seen] = []
        self.samples: dict[str, list[Sample]] = {group: [] for group in GROUPS}
        self.committed: dict[str, dict[int, int]] = {group: {} for group in GROUPS}
        self.unfinished: list[int] = []
        self.calm: int | None = None
        self.partitions: int | None = PARTITIONS
        self.lives: Counter[str] = Counter()
        self._ends: Counter[tuple[str, int]] = Counter()
        self._attempts = 0
        self._numbers: Counter[str] = Counter()

    def evidence(self) -> Evidence:
        return Evidence(
            self.guarantee,
            sorted(self.events, key=lambda event: event.at),
            View(self.source, [*self.source, *self.aborted_source], self.unfinished),
            View(self.sink, [*self.sink, *self.aborted_sink]),
            self.samples,
            self.calm,
            self.partitions,
        )

    def tick(self, ms: int = 1) -> int:
        self.now += ms * MS
        return self.now

    def note(self, who: str, what: str, type_: str, **fields: Any) -> None:
        self.events.append(Event(self.tick(), who, self.lives[who], what, type_, **fields))

    def begin(self, who: str) -> None:
        """A new life."""
        self.lives[who] += 1
        self.note(who, "life", INVOKE)

    # -- senders --------------------------------------------------------------------------------------------------------

    def send(self, who: str, key: int = 0, outcome: str | None = OK, *, written: bool = True, tx: str | None = None) -> str:
        """A record and its fate; in a transaction, ``written`` says whether that will be committed."""
        self._numbers[who] += 1
        id_ = f"{who}.{self.lives[who]}.{self._numbers[who]}"
        number = self._numbers[who]
        self.note(who, "send", INVOKE, id=id_, key=f"k{key}", content=f"sum of {id_}", number=number, transaction=tx)
        place = self.append(id_, key % PARTITIONS, key, committed=written) if written or tx else None
        if outcome and not tx:
            at = {"partition": place[0], "offset": place[1]} if place and outcome == OK else {}
            self.note(who, "send", outcome, id=id_, **at)
        return id_

    def append(self, id_: str, partition: int, key: int = 0, *, committed: bool = True) -> Place:
        seen = Seen(partition, self._offset("source", partition), f"k{key}", id_, content=f"sum of {id_}")
        (self.source if committed else self.aborted_source).append(seen)
        return seen.partition, seen.offset

    def _offset(self, topic: str, partition: int) -> int:
        self._ends[topic, partition] += 1
        return self._ends[topic, partition] - 1

    def transaction(
        self, who: str, keys: list[int], outcome: str | None = OK, *, written: bool = True, asked: bool = True
    ) -> list[str]:
        """A transaction of a sender: of one record for each key; ``asked`` to be committed, or not."""
        tx = f"{who}.{self.lives[who]}.t{self.tick()}"
        self.note(who, "transaction", INVOKE, transaction=tx)
        ids = [self.send(who, key, tx=tx, written=written) for key in keys]
        if asked:
            self.note(who, "transaction", "commit", transaction=tx)
        if outcome:
            self.note(who, "transaction", outcome, transaction=tx)
        for partition in {key % PARTITIONS for key in keys}:
            self._offset("source", partition)  # the mark of its end
        return ids

    # -- members --------------------------------------------------------------------------------------------------------

    def handle(self, who: str, seen: Seen, outcome: str | None = OK, *, visible: bool = True, made: int = OUTPUTS) -> str:
        """A handler, with its outputs: visible, or in a transaction that is aborted."""
        self._attempts += 1
        attempt = f"a{self._attempts}"
        place: dict[str, Any] = {"id": seen.id, "attempt": attempt, "partition": seen.partition, "offset": seen.offset}
        self.note(who, "handle", INVOKE, content=seen.content, **place)
        for number in range(made if who.startswith("transformer") else 0):
            partition = (seen.partition + number) % PARTITIONS
            offset, origin = self._offset("sink", partition), (seen.partition, seen.offset)
            output = Seen(partition, offset, seen.key, f"{seen.id}/{number}", attempt, origin, seen.content)
            (self.sink if visible else self.aborted_sink).append(output)
        if outcome:
            self.note(who, "handle", outcome, **place)
        return attempt

    def commit(self, group: str, seen: Seen) -> None:
        self.committed[group][seen.partition] = seen.offset + 1

    def sample(self, group: str, offsets: dict[int, int] | None = None, ms: int = 1) -> None:
        asked = self.now
        self.samples[group].append(Sample(asked, self.tick(ms), dict(self.committed[group] if offsets is None else offsets)))

    # -- finding what is to be changed ------------------------------------------------------------------------------------

    def index(self, what: str, type_: str, **fields: Any) -> int:
        """Of the first such event."""
        return next(
            number
            for number, event in enumerate(self.events)
            if event.what == what and event.type == type_ and all(getattr(event, name) == to for name, to in fields.items())
        )

    def verdict(self, name: str) -> Verdict:
        return next(check for check in LAWS[self.guarantee] if check.name == name).on(tell(self.evidence()))

    def found(self, name: str) -> list[str]:
        return list(self.verdict(name).anomalies)

    def lacking(self) -> list[str]:
        """What there was too little of."""
        return [sentence for verdict in judge(self.evidence()) for sentence in verdict.lacking]

    def broken(self) -> dict[str, list[str]]:
        """The checks that found something."""
        return {verdict.check: list(verdict.anomalies) for verdict in judge(self.evidence()) if verdict.anomalies}


def clean(guarantee: str, records: int = 120) -> Made:
    """A run in which nothing goes wrong but what a sender may see: some sends, or transactions, fail, and some are unknown.

    Of the last records nothing of that is said: nothing is done to anybody then.
    """
    made = Made(guarantee)
    for who in ("sender-0", "transformer-0", "consumer-0"):
        made.begin(who)
    number = 0
    while len(made.source) < records:
        number += 1
        if made.calm is None and len(made.source) >= records - CALM:
            made.calm = made.tick()
        unlucky = {8: (FAIL, False), 9: (INFO, True), 10: (INFO, False)} if made.calm is None else {}
        outcome, written = unlucky.get(number % 11, (OK, True))
        if guarantee == EOS:
            made.transaction("sender-0", [number, number + 1, number + 2], outcome, written=written)
        elif guarantee == AMO and outcome == OK:
            made.send("sender-0", number, None)
        else:
            made.send("sender-0", number, outcome, written=written)
    work(made)
    return made


def work(made: Made) -> None:
    """One member for each group handles everything, in order, and commits as its guarantee says."""
    for group in GROUPS:
        for number, seen in enumerate(sorted(made.source)):
            made.handle(f"{group}-0", seen)
            made.commit(group, seen)
            if number % 20 == 0:
                made.sample(group)
        made.sample(group)


def at(made: Made, partition: int, nth: int) -> Seen:
    """The nth record of a partition of the input topic."""
    return sorted(seen for seen in made.source if seen.partition == partition)[nth]


def outputs_of(made: Made, seen: Seen) -> list[Seen]:
    return [output for output in made.sink if output.origin == (seen.partition, seen.offset)]


# --- all checks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guarantee", EVERY)
def test_a_clean_run_holds_and_every_check_looked_at_something(guarantee: str) -> None:
    """H01: a check that examines nothing says nothing."""
    for verdict in judge(clean(guarantee).evidence()):
        assert not verdict.anomalies, verdict
        assert verdict.examined > 0, verdict


def test_a_name_and_a_meaning_for_every_check() -> None:
    """The report shows them: a sentence each, taken from the docstring, and no name twice under one guarantee."""
    for laws in LAWS.values():
        assert len({check.name for check in laws}) == len(laws)
        for check in laws:
            assert check.meaning.endswith(".")
            assert (check.look.__doc__ or "").startswith(check.meaning)


def test_which_laws_hold_for_whom() -> None:
    """The catalogue, section 6: what each guarantee is asked for."""
    names = {guarantee: {check.name for check in laws} for guarantee, laws in LAWS.items()}
    everywhere = {"altered record", "aborted read", "inconsistent offset", "drained", "activity"}
    forward = {"offset regression", "non-monotonic poll"}
    both = {"lost write", "poll skip", "order per key", "unseen"}
    assert names == {
        AMO: {*everywhere, *forward, "duplicate", "handled more than once", "calm loss"},
        ALO: {*everywhere, *both, "lost output"},
        EOS: {*everywhere, *forward, *both, "duplicate", "torn transaction", "precommitted read"},
    }


def test_many_anomalies_are_counted_and_the_first_are_told() -> None:
    """A report of thousands of lines is read by nobody; how many they are is never lost."""
    made = clean(ALO, 2 * SHOWN)
    lost = len(made.sink)
    made.sink.clear()
    verdict = made.verdict("lost output")
    assert len(verdict.anomalies) == SHOWN
    assert verdict.found == lost // OUTPUTS > SHOWN


def test_a_handler_that_says_not_what_it_handles_cannot_be_judged() -> None:
    """The worker is at fault then, and no verdict must come of it."""
    made = clean(ALO)
    made.note("consumer-0", "handle", INVOKE, id="x", attempt="lost")
    with pytest.raises(ValueError, match="with which message"):
        judge(made.evidence())


# --- lost write ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guarantee", [ALO, EOS])
def test_lost_write_is_found(guarantee: str) -> None:
    """P01: acknowledged, or in a committed transaction, and not there."""
    made = clean(guarantee)
    victim = at(made, 1, 5)
    made.source.remove(victim)
    assert victim.id in made.found("lost write")[0]


def test_lost_write_is_not_one_of_unknown_outcome() -> None:
    """H04: what nobody knows may be there or not."""
    made = clean(ALO)
    for outcome in (INFO, None):
        for written in (True, False):
            made.send("sender-0", 1, outcome, written=written)
    work_on(made)
    assert made.broken() == {}


def work_on(made: Made) -> None:
    """Handle what has come since ``work``."""
    for group in GROUPS:
        for seen in sorted(made.source):
            if seen.offset >= made.committed[group].get(seen.partition, 0):
                made.handle(f"{group}-0", seen)
                made.commit(group, seen)
        made.sample(group)


# --- duplicate -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guarantee", [AMO, EOS])
def test_duplicate_is_found_in_both_topics(guarantee: str) -> None:
    """P08, X01: the same id at two places."""
    made = clean(guarantee)
    twice = at(made, 0, 3)
    made.append(twice.id, 0)
    assert twice.id in made.found("duplicate")[0]
    assert "input topic" in made.found("duplicate")[0]

    made = clean(guarantee)
    output = made.sink[7]
    made.sink.append(output._replace(offset=10_000))
    assert output.id in made.found("duplicate")[0]
    assert "10000 of the output topic" in made.found("duplicate")[0]


@pytest.mark.parametrize(("when", "whose", "excused"), [(1, 0, True), (0, 0, False), (11, 0, False), (1, 1, False)])
def test_what_librdkafka_sends_again_as_a_broker_leaves_is_no_duplicate(when: int, whose: int, excused: bool) -> None:  # noqa: FBT001 - a table
    """P06: at-most-once with acks=1, shortly before, by the client that has seen it; and no output of it is one."""
    made = clean(AMO)
    sent = next(event for event in made.events if event.what == "send" and event.type == INVOKE)
    life = sent.life + whose
    made.events.append(Event(sent.at - 1 + when * 1_000_000_000, sent.who, life, "broker left", INFO))
    again = made.append(sent.id or "", 0)
    output = next(seen for seen in made.sink if seen.id.startswith(f"{sent.id}/"))
    made.sink.append(output._replace(offset=10_000, origin=again))
    assert bool(made.found("duplicate")) is not excused
    made.sink.append(output._replace(offset=10_001))
    assert output.id in made.found("duplicate")[-1], "each copy has its outputs once"


def test_duplicate_is_allowed_at_least_once_and_in_what_was_aborted() -> None:
    """At-least-once repeats; an aborted output is read by nobody."""
    made = clean(ALO)
    made.append(at(made, 0, 3).id, 0)
    made.handle("transformer-0", at(made, 1, 4))
    work_on(made)
    assert made.broken() == {}

    made = clean(EOS)
    made.aborted_sink.append(made.sink[7]._replace(offset=10_000))
    assert made.broken() == {}


# --- aborted read ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guarantee", EVERY)
def test_aborted_read_of_a_record_that_certainly_failed(guarantee: str) -> None:
    """G1a: it is in the committed view, though its sender was told that it is not."""
    made = clean(guarantee)
    if guarantee == EOS:
        made.transaction("sender-0", [1, 2], FAIL, written=True)
    else:
        made.send("sender-0", 1, FAIL, written=True)
    assert any("failed, and is at" in line for line in made.found("aborted read"))


def test_aborted_read_by_a_handler() -> None:
    """X08: a member with read_uncommitted handles what the committed view does not have."""
    made = clean(EOS)
    made.handle("consumer-0", made.aborted_source[0])
    (line,) = made.found("aborted read")
    assert "is handled" in line
    assert "consumer-0 (life 1)" in line


def test_aborted_read_of_an_output() -> None:
    """X13: the output of an attempt that was aborted, or whose handler raised, is visible."""
    made = clean(EOS)
    output = made.sink[4]
    made.note("transformer-0", "attempt", FAIL, attempt=output.attempt)
    assert output.id in made.found("aborted read")[0]

    made = clean(EOS)
    index = made.index("handle", OK, attempt=made.sink[4].attempt)
    made.events[index] = made.events[index]._replace(type=FAIL)
    assert made.sink[4].id in made.found("aborted read")[0]


def test_aborted_read_is_not_what_has_an_unknown_outcome() -> None:
    """H04: of ``info``, and of what was cut short by a kill, everything may be visible."""
    made = clean(EOS)
    made.transaction("sender-0", [1, 2], INFO, written=True)
    made.transaction("sender-0", [1, 2], None, written=True)
    made.transaction("sender-0", [1, 2], None, written=False, asked=False)
    work_on(made)
    seen = at(made, 0, 0)
    made.handle("transformer-0", seen, None, visible=False)  # and so may an attempt that was cut short be aborted
    assert made.broken() == {}


def test_aborted_read_is_not_a_handler_that_raised_without_a_transaction() -> None:
    """At-least-once: what a handler produced before it raised is there, and is made again."""
    made = clean(ALO)
    made.send("sender-0", 0)
    made.handle("transformer-0", at(made, 0, -1), FAIL, made=1)
    work_on(made)
    assert made.broken() == {}


# --- torn transaction ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("outcome", [OK, INFO, None])
def test_torn_transaction_of_a_sender(outcome: str | None) -> None:
    """All or none, also where nobody knows which."""
    made = clean(EOS)
    ids = made.transaction("sender-0", [0, 1, 2], outcome)
    made.source = [seen for seen in made.source if seen.id != ids[1]]
    work_on(made)
    (line,) = made.found("torn transaction")
    assert ids[1] in line
    assert "without 1 of its 3" in line


def test_torn_transaction_with_a_swallowed_failure() -> None:
    """X05: a record that could not be produced, and a transaction that was committed nevertheless."""
    made = clean(EOS)
    index = made.index("transaction", "commit")
    tx = made.events[index].transaction
    made.events.insert(index, made.events[index - 1]._replace(what="send", type=INVOKE, id="x", transaction=tx, offset=None))
    made.events.insert(index + 1, made.events[index]._replace(type=FAIL))
    assert "without 1 of its 4 records: x" in made.found("torn transaction")[0]
    assert not made.found("lost write")  # nobody was told that it is there


def test_torn_transaction_of_a_transformer() -> None:
    """X01, X02: half of the outputs, or of two attempts, or without the offset, or the offset without them."""
    made = clean(EOS)
    seen = at(made, 1, 6)
    half = outputs_of(made, seen)[1]
    made.sink.remove(half)
    assert half.id in made.found("torn transaction")[0]
    made.sink.append(half._replace(attempt="other"))
    assert "2 attempts" in made.found("torn transaction")[0]

    made = clean(EOS)
    for output in outputs_of(made, seen):
        made.sink.remove(output)
    assert f"{seen.id}/0, {seen.id}/1" in made.found("torn transaction")[0]

    made = clean(EOS)
    last = at(made, 1, -1)
    made.sample("transformer", {**made.committed["transformer"], 1: last.offset})
    assert f"{last.id} at 1/{last.offset} is not committed" in made.found("torn transaction")[0]


def test_torn_transaction_is_not_one_that_was_aborted_and_run_again() -> None:
    """An abort leaves its records to readers of uncommitted ones; then the same messages are handled again."""
    made = clean(EOS)
    made.transaction("sender-0", [0, 1, 2], FAIL, written=False)
    made.transaction("sender-0", [0, 0, 0])
    tail = [at(made, 0, nth) for nth in (-3, -2, -1)]
    attempts = [made.handle("transformer-0", seen, visible=False) for seen in tail]
    made.note("transformer-0", "attempt", FAIL, attempt=attempts[0])
    made.handle("transformer-0", tail[0], FAIL, visible=False, made=1)
    work_on(made)
    assert made.broken() == {}
    assert figures(made.evidence())["handled again"] == 4


# --- lost output ---------------------------------------------------------------------------------------------------------


def test_lost_output_is_found() -> None:
    """L03: the offset moved past a record that no broker has."""
    made = clean(ALO)
    gone = made.sink.pop(11)
    assert gone.id in made.found("lost output")[0]


def test_lost_output_is_not_what_is_not_committed_yet() -> None:
    """A message that nobody finished has no outputs, which is for other checks to complain of."""
    made = clean(ALO)
    made.send("sender-0")
    assert made.found("lost output") == []
    assert made.found("drained")


# --- inconsistent offset ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guarantee", EVERY)
def test_inconsistent_offset_between_readers_senders_and_handlers(guarantee: str) -> None:
    """A log that was cut and written again: two ids at one place."""
    made = clean(guarantee)
    seen, other = at(made, 1, 5), at(made, 2, 5)
    index = made.index("handle", INVOKE, id=seen.id)
    made.events[index] = made.events[index]._replace(id=other.id)
    assert f"at 1/{seen.offset} is {seen.id}" in made.found("inconsistent offset")[0]

    made = clean(guarantee)
    made.note("sender-0", "send", OK, id=seen.id, partition=other.partition, offset=other.offset)
    assert "the acknowledgement to sender-0 (life 1)" in made.found("inconsistent offset")[0]

    made = clean(guarantee)
    made.aborted_source.append(seen._replace(id=other.id))
    assert "uncommitted reader" in made.found("inconsistent offset")[0]

    made = clean(guarantee)
    made.aborted_sink.append(made.sink[3]._replace(id=made.sink[4].id))
    assert "uncommitted reader" in made.found("inconsistent offset")[0]


@pytest.mark.parametrize("guarantee", EVERY)
def test_inconsistent_offset_of_outputs_and_phantoms(guarantee: str) -> None:
    """An output belongs to the message that it says it is for; and nothing comes from nowhere."""
    other = at(clean(guarantee), 2, 5)
    changes: list[tuple[dict[str, Any], str]] = [
        ({"origin": (other.partition, other.offset)}, f"where {other.id} is"),
        ({"origin": (0, 99_999)}, "where no record is"),
        ({"origin": None}, "nowhere"),
        ({"id": "nobody/0"}, "belongs to no record"),
        ({"id": f"{other.id}/{OUTPUTS}"}, "belongs to no record"),
    ]
    for change, words in changes:
        made = clean(guarantee)
        made.sink[2] = made.sink[2]._replace(**change)
        assert words in made.found("inconsistent offset")[0]
    made = clean(guarantee)
    made.append("phantom", 1)
    assert "phantom" in made.found("inconsistent offset")[0]


def test_inconsistent_offset_is_not_what_acks_0_reports() -> None:
    """Without acknowledgements librdkafka reports offset -1 for every record."""
    made = clean(AMO)
    for seen in made.source[:2]:
        made.note("sender-0", "send", OK, id=seen.id, partition=0, offset=-1)
    assert made.broken() == {}


# --- altered record -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guarantee", EVERY)
def test_altered_record_on_its_way_into_the_topic(guarantee: str) -> None:
    """P01: another key, value or headers than the sender gave to the library."""
    made = clean(guarantee)
    seen = at(made, 1, 5)
    index = made.index("send", INVOKE, id=seen.id)
    made.events[index] = made.events[index]._replace(content="other")
    (line,) = made.found("altered record")
    assert f"{seen.id} at 1/{seen.offset} of the input topic has the content sum of {seen.id}" in line
    assert "sender-0 (life 1) sent other" in line
    assert set(made.broken()) == {"altered record"}


@pytest.mark.parametrize("guarantee", EVERY)
@pytest.mark.parametrize("group", GROUPS)
def test_altered_record_that_a_handler_is_given(guarantee: str, group: str) -> None:
    """C01: the topic has something else at that place."""
    made = clean(guarantee)
    seen = at(made, 1, 5)
    index = made.index("handle", INVOKE, id=seen.id, who=f"{group}-0")
    made.events[index] = made.events[index]._replace(content="other")
    (line,) = made.found("altered record")
    assert f"{seen.id} at 1/{seen.offset} is handled by {group}-0 (life 1) with the content other" in line
    assert set(made.broken()) == {"altered record"}


@pytest.mark.parametrize("guarantee", EVERY)
def test_altered_record_of_an_output(guarantee: str) -> None:
    """L03: other content than its message, or in another partition than it was sent to."""
    made = clean(guarantee)
    output = made.sink[7]
    made.sink[7] = output._replace(content="other")
    (line,) = made.found("altered record")
    assert f"output {output.id} at {output.partition}/{output.offset} has the content other" in line
    assert set(made.broken()) == {"altered record"}

    partition = (output.partition + 1) % PARTITIONS
    made.sink[7] = output._replace(partition=partition, offset=9999)
    (line,) = made.found("altered record")
    assert f"output {output.id} at {partition}/9999" in line
    assert f"was sent to partition {output.partition}" in line
    made.partitions = None
    assert made.found("altered record") == []


@pytest.mark.parametrize("guarantee", EVERY)
def test_altered_record_is_not_what_has_no_content(guarantee: str) -> None:
    """Nothing is known of it, so it is compared with nothing; and then nothing is said."""
    looked = clean(guarantee).verdict("altered record").examined
    made = clean(guarantee)
    made.events = [event._replace(content=None) for event in made.events]
    assert made.broken() == {}
    assert 0 < made.verdict("altered record").examined < looked
    made = clean(guarantee)
    made.sink = [seen._replace(content=None) for seen in made.sink]
    assert made.broken() == {}
    made = clean(guarantee)
    made.source = [seen._replace(content=None) for seen in made.source]
    assert made.broken() == {}
    made.sink = [seen._replace(content=None) for seen in made.sink]
    assert made.broken() == {}
    assert made.verdict("altered record").examined == len(made.sink)  # their partitions
    made.partitions = None
    assert made.verdict("altered record").examined == 0


def test_altered_record_is_not_one_that_is_there_or_handled_twice() -> None:
    """Repeats are alike; and an output of what was aborted is compared with nothing."""
    made = clean(ALO)
    made.append(at(made, 0, 3).id, 0)
    made.handle("transformer-0", at(made, 1, 4))
    work_on(made)
    assert made.broken() == {}
    made = clean(EOS)
    made.aborted_sink.append(made.sink[7]._replace(offset=10_000, content="other"))
    assert made.broken() == {}


# --- calm loss ----------------------------------------------------------------------------------------------------------


def in_calm(made: Made) -> list[Seen]:
    """The records that were sent in it."""
    sent = {event.id for event in made.events if event.what == "send" and event.type == INVOKE and event.at > (made.calm or 0)}
    return [seen for seen in made.source if seen.id in sent]


@pytest.mark.parametrize("outcome", [None, INFO, OK])
def test_calm_loss_of_a_record(outcome: str | None) -> None:
    """M01: at most once is no reason to lose what nobody has touched, whatever is known of it."""
    made = clean(AMO)
    id_ = made.send("sender-0", 1, outcome, written=False)
    (line,) = made.found("calm loss")
    assert f"{id_} of sender-0 (life 1)" in line
    assert "is not in the input topic" in line
    assert set(made.broken()) == {"calm loss"}


@pytest.mark.parametrize("group", GROUPS)
def test_calm_loss_of_a_handling(group: str) -> None:
    """Committed, and dropped."""
    made = clean(AMO)
    seen = in_calm(made)[4]
    made.events = [e for e in made.events if e.what != "handle" or e.id != seen.id or not e.who.startswith(group)]
    (line,) = made.found("calm loss")
    assert f"{seen.id} of sender-0" in line
    assert line.endswith(f"was never begun by the group {group}")
    assert set(made.broken()) == {"calm loss"}


def test_calm_loss_of_an_output() -> None:
    """One of them, or all; and what lacks in several places is told once."""
    made = clean(AMO)
    seen = in_calm(made)[4]
    first, second = outputs_of(made, seen)
    made.sink.remove(second)
    (line,) = made.found("calm loss")
    assert line.endswith(f"is without {second.id}")
    assert set(made.broken()) == {"calm loss"}
    made.sink.remove(first)
    made.events = [event for event in made.events if event.what != "handle" or event.id != seen.id]
    (line,) = made.found("calm loss")
    assert "by the group transformer and was never begun by the group consumer and is without" in line
    assert line.endswith(f"{first.id}, {second.id}")


def test_calm_loss_is_not_what_was_lost_before_or_what_failed() -> None:
    """Whoever was told that nothing was written can send it again. And a handler that began need not have ended."""
    made = clean(AMO)
    examined = made.verdict("calm loss").examined
    assert examined == len(in_calm(made)) == CALM
    made.send("sender-0", 1, FAIL, written=False)
    early = made.source[0]
    made.events = [event for event in made.events if event.what != "handle" or event.id != early.id]
    made.sink = [output for output in made.sink if output.id.rpartition("/")[0] != early.id]
    del made.events[made.index("handle", OK, id=in_calm(made)[4].id)]
    assert made.broken() == {}
    assert made.verdict("calm loss").examined == examined


def test_calm_loss_is_not_a_second_copy_with_which_nobody_began() -> None:
    """That there are two is for another check; the record is not lost."""
    made = clean(AMO)
    made.append(in_calm(made)[4].id, 0)
    assert made.found("calm loss") == []
    assert made.found("duplicate")


def test_calm_loss_says_nothing_without_a_calm() -> None:
    """Everything may have been lost for a reason then."""
    made = clean(AMO)
    made.calm = None
    made.send("sender-0", 1, None, written=False)
    assert made.broken() == {}
    assert made.verdict("calm loss").examined == 0


# --- offset regression --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guarantee", [AMO, EOS])
def test_offset_regression_is_found(guarantee: str) -> None:
    """M03, X02: the group goes back, and stays there."""
    made = clean(guarantee)
    back = {**made.committed["consumer"], 1: 4}
    for _ in range(4):
        made.sample("consumer", back, ms=600)
    made.sample("consumer")
    (line,) = made.found("offset regression")
    assert "the group consumer went back from 1/" in line
    assert "to 1/4" in line


@pytest.mark.parametrize("guarantee", [AMO, EOS])
def test_offset_regression_is_not_one_answer_from_the_past_or_a_missing_partition(guarantee: str) -> None:
    """A broker that wakes up answers with what it knew; an unstable partition has no answer at all (H08)."""
    made = clean(guarantee)
    now = made.committed["consumer"]
    for offsets in ({**now, 1: 4}, now, {**now, 1: 4}, now, {0: now[0]}, {}, now):
        made.sample("consumer", offsets, ms=5000)
    for offsets in ({**now, 1: 4}, {**now, 1: 4}, now):
        made.sample("consumer", offsets, ms=200)
    assert made.broken() == {}


# --- poll skip ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guarantee", [ALO, EOS])
def test_poll_skip_is_found_even_if_made_good_later(guarantee: str) -> None:
    """C01, X13: the messages after a lost one are handled first. Each that was skipped is told once."""
    made = clean(guarantee)
    skipped = [at(made, 1, 5), at(made, 1, 6)]
    late = [event for event in made.events if event.who == "consumer-0" and event.id in {seen.id for seen in skipped}]
    for event in late:
        made.events.remove(event)
        made.events.append(event._replace(at=made.tick()))
    found = made.found("poll skip")
    assert len(found) == 2
    assert skipped[0].id in found[0]
    assert made.found("unseen") == []


@pytest.mark.parametrize("guarantee", [ALO, EOS])
def test_poll_skip_behind_a_handler_that_did_not_end(guarantee: str) -> None:
    """L01: log the error and go on."""
    made = clean(guarantee)
    index = made.index("handle", OK, who="transformer-0", id=at(made, 0, 3).id)
    made.events[index] = made.events[index]._replace(type=FAIL)
    assert at(made, 0, 3).id in made.found("poll skip")[0]


@pytest.mark.parametrize("guarantee", [ALO, EOS])
def test_a_record_that_cannot_be_written_is_noticed_later(guarantee: str) -> None:
    """L03, X05: messages behind it are handled before; that is no skip. But never to handle it to its end is one too few."""
    made = clean(guarantee)
    index = made.index("handle", OK, who="transformer-0", id=at(made, 0, 3).id)
    made.events[index] = made.events[index]._replace(type=FAIL, detail=REFUSED)
    assert not made.found("poll skip")
    assert at(made, 0, 3).id in made.found("unseen")[0]


def test_order_per_key_leaves_out_the_outputs_of_a_message_that_failed_at_first() -> None:
    """They may come after those of later messages, which were handled before that was known."""
    made = clean(ALO)
    late = at(made, 0, 3)
    index = next(n for n, seen in enumerate(made.sink) if seen.id == f"{late.id}/0")
    behind = max(seen.offset for seen in made.sink if seen.partition == made.sink[index].partition) + 1
    made.sink[index] = made.sink[index]._replace(offset=behind)
    assert made.found("order per key")
    made.events.append(made.events[made.index("handle", OK, who="transformer-0", id=late.id)]._replace(type=FAIL))
    assert not made.found("order per key")


@pytest.mark.parametrize("guarantee", [ALO, EOS])
def test_poll_skip_is_not_a_zombie_that_handles_old_messages(guarantee: str) -> None:
    """A member that was paused goes on where it was; others are ahead of it. Nothing is skipped by that."""
    made = clean(guarantee)
    made.begin("consumer-1")
    made.events[-1] = made.events[-1]._replace(at=0)
    for nth in (2, 3):
        made.handle("consumer-1", at(made, 1, nth))
    assert made.broken() == {}


# --- non-monotonic poll ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guarantee", [AMO, EOS])
def test_non_monotonic_poll_of_a_newcomer(guarantee: str) -> None:
    """What was committed before a process began is not for that process."""
    made = clean(guarantee)
    made.tick()
    made.begin("transformer-0")
    made.handle("transformer-0", at(made, 1, 2), visible=False)
    (line,) = made.found("non-monotonic poll")
    assert "transformer-0 (life 2)" in line


def test_non_monotonic_poll_within_a_life_is_for_at_most_once_only() -> None:
    """After an abort exactly-once goes back; at-most-once never may, whoever committed what."""
    for guarantee in (AMO, EOS):
        made = clean(guarantee)
        made.handle("consumer-0", at(made, 1, 2))
        assert bool(made.found("non-monotonic poll")) == (guarantee == AMO)


@pytest.mark.parametrize("guarantee", [EOS])
def test_non_monotonic_poll_is_not_what_was_committed_only_after_the_life_began(guarantee: str) -> None:
    """A sample that was answered later says nothing about what a newcomer has found."""
    made = clean(guarantee)
    made.events = [event._replace(life=1) for event in made.events]
    made.begin("consumer-1")
    made.events[-1] = made.events[-1]._replace(at=made.samples["consumer"][0].asked)
    made.handle("consumer-1", at(made, 0, 1))
    assert made.broken() == {}


# --- order per key ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guarantee", [ALO, EOS])
def test_order_per_key_of_what_a_sender_sent(guarantee: str) -> None:
    """P02: overtaken on the way, or in another partition."""
    made = clean(guarantee)
    ids = made.transaction("sender-0", [4, 4]) if guarantee == EOS else [made.send("sender-0", 4) for _ in "ab"]
    first, second = (next(seen for seen in made.source if seen.id == id_) for id_ in ids)
    others = [seen for seen in made.source if seen.id not in ids]
    made.source = [*others, first._replace(id=second.id), second._replace(id=first.id)]
    assert f"{first.id} at" in made.found("order per key")[0]
    assert "sent it first" in made.found("order per key")[0]
    made.source = [*others, first, second._replace(partition=0, offset=9999)]
    assert "two partitions" in made.found("order per key")[0]


@pytest.mark.parametrize("guarantee", [ALO, EOS])
def test_order_per_key_of_outputs(guarantee: str) -> None:
    """X13: the outputs of one partition's messages overtake each other."""
    made = clean(guarantee)
    early, late = outputs_of(made, at(made, 1, 4))[0], outputs_of(made, at(made, 1, 5))[0]
    made.sink.remove(early)
    made.sink.remove(late)
    made.sink += [early._replace(offset=late.offset), late._replace(offset=early.offset)]
    assert early.id in made.found("order per key")[0]
    made = clean(guarantee)
    made.handle("transformer-0", at(made, 1, 4))
    assert bool(made.found("order per key")) == (guarantee == EOS)


def test_order_per_key_is_not_asked_of_repeats_or_of_other_lives() -> None:
    """At-least-once: what is handled again comes behind what came later. And two lives of a sender are two senders."""
    made = clean(ALO)
    for nth in (3, 4):
        made.handle("transformer-0", at(made, 1, nth))
    made.begin("sender-0")
    made.send("sender-0", 50)
    index = made.index("send", INVOKE, life=2)
    made.events[index] = made.events[index]._replace(number=1)
    work_on(made)
    assert made.broken() == {}


# --- handled more than once, unseen --------------------------------------------------------------------------------------


def test_handled_more_than_once_is_found() -> None:
    """Also by another member, and whatever became of the first time."""
    made = clean(AMO)
    made.begin("consumer-1")
    made.events[-1] = made.events[-1]._replace(at=0)
    made.handle("consumer-1", at(made, 1, 2), None)
    (line,) = made.found("handled more than once")
    assert "consumer-0 (life 1), consumer-1 (life 1)" in line


def test_at_most_once_may_lose_a_little() -> None:
    """A process that is killed takes its portion with it, and its handler may be cut short."""
    made = clean(AMO)
    lost = {at(made, 1, nth).id for nth in (5, 6, 7)}
    made.events = [event for event in made.events if event.what != "handle" or event.id not in lost]
    made.sink = [output for output in made.sink if output.id.rpartition("/")[0] not in lost]
    made.sink.pop(5)
    del made.events[made.index("handle", OK)]
    assert made.broken() == {}


@pytest.mark.parametrize("guarantee", [ALO, EOS])
@pytest.mark.parametrize("group", GROUPS)
def test_unseen_is_found_in_both_groups(guarantee: str, group: str) -> None:
    """A handler that began and did not end does not count."""
    made = clean(guarantee)
    seen = at(made, 2, -1)
    del made.events[made.index("handle", OK, id=seen.id, who=f"{group}-0")]
    (line,) = made.found("unseen")
    assert seen.id in line
    assert group in line


@pytest.mark.parametrize("guarantee", [ALO, EOS])
def test_unseen_is_not_what_is_handled_at_the_second_attempt(guarantee: str) -> None:
    """By another life, after the first was killed in the middle."""
    made = clean(guarantee)
    if guarantee == EOS:
        made.transaction("sender-0", [1])
    else:
        made.send("sender-0", 1)
    made.handle("transformer-0", at(made, 1, -1), None, visible=False)
    made.begin("transformer-0")
    work_on(made)
    assert made.broken() == {}


# --- precommitted read ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", [True, False])
def test_precommitted_read_is_found(*, asked: bool) -> None:
    """X08: handled while its transaction was open, or though nobody ever asked for a commit."""
    made = clean(EOS)
    made.transaction("sender-0", [1], None, asked=asked)
    work_on(made)
    assert bool(made.found("precommitted read")) == (not asked)
    index = made.index("handle", INVOKE, id=at(made, 1, -1).id)
    made.events[index] = made.events[index]._replace(at=made.events[made.index("transaction", INVOKE)].at)
    assert at(made, 1, -1).id in made.found("precommitted read")[0]


def test_precommitted_read_is_not_one_between_the_request_and_the_answer() -> None:
    """The sender learns of the commit after readers do."""
    made = clean(EOS)
    made.transaction("sender-0", [1])
    end = made.events.pop()
    work_on(made)
    made.events.append(end._replace(at=made.tick()))
    assert made.broken() == {}


# --- drained --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guarantee", EVERY)
def test_drained_is_broken_by_a_lag_and_an_open_transaction(guarantee: str) -> None:
    """X24, H10: each is told, and so is a group of which nobody knows anything."""
    made = clean(guarantee)
    made.sample("consumer", {**made.committed["consumer"], 1: 3})
    assert "the group consumer has committed 1/3" in made.found("drained")[0]
    known = [sample._replace(offsets={0: sample.offsets.get(0, 0), 2: 9999}) for sample in made.samples["consumer"]]
    made.samples["consumer"] = known
    assert "committed nothing" in made.found("drained")[0]
    made.samples["consumer"].clear()
    assert "nobody knows" in made.found("drained")[0]

    made = clean(guarantee)
    made.unfinished.append(2)
    assert "left open in partition 2 of the input topic" in made.found("drained")[0]


@pytest.mark.parametrize("guarantee", EVERY)
def test_activity_wants_something_to_have_happened(guarantee: str) -> None:
    """H10: a library that does nothing is at most once, and must not pass; but too short a run is no crime."""
    made = clean(guarantee, records=60)
    assert "prove nothing" in made.lacking()[0]
    assert made.broken() == {}
    assert clean(guarantee).lacking() == []
    assert [line for line in Made(guarantee).lacking() if "prove nothing" in line]


@pytest.mark.parametrize("group", GROUPS)
def test_activity_wants_most_to_be_handled_at_most_once(group: str) -> None:
    """H10: commit, and drop."""
    for part, found in ((0.75, 1), (0.85, 0)):
        made = clean(AMO)
        kept = {seen.id for seen in made.source[: int(part * len(made.source))]}
        made.events = [event for event in made.events if not event.who.startswith(group) or event.id in {None, *kept}]
        assert len(made.lacking()) == found


@pytest.mark.parametrize("guarantee", EVERY)
def test_drained_knows_a_partition_from_the_sample_that_had_it_last(guarantee: str) -> None:
    """H08: an unstable partition is missing in a sample, which says nothing of what was committed in it before."""
    made = clean(guarantee)
    for group in GROUPS:
        now = made.committed[group]
        made.sample(group, {0: now[0]})
        made.sample(group, {})
    assert made.broken() == {}
    made.sample("consumer", {1: 3})
    made.sample("consumer", {})
    (line,) = made.found("drained")
    assert "the group consumer has committed 1/3" in line


def test_activity_wants_most_outputs_at_most_once() -> None:
    """H10, P01: a library that commits, handles, and writes nothing."""
    for part, found in ((0.75, 1), (0.85, 0)):
        made = clean(AMO)
        made.sink = made.sink[: int(part * len(made.sink))]
        lines = [line for line in made.lacking() if "outputs of what the transformers have handled" in line]
        assert len(made.lacking()) == len(lines) == found
    for outcome in (FAIL, INFO):  # of those that were not handled to their end nothing is asked
        made = clean(AMO)
        kept = {seen.id for seen in made.source[: len(made.source) // 2]}
        made.sink = [output for output in made.sink if output.id.rpartition("/")[0] in kept]
        for index, event in enumerate(made.events):
            if event.what == "handle" and event.type == OK and event.id not in kept and event.who.startswith("transformer"):
                made.events[index] = event._replace(type=outcome)
        assert made.lacking() == []


def test_activity_wants_half_of_what_was_sent_at_most_once() -> None:
    """H10: acks=0 loses what is on its way, and not nearly everything; the others have a check for what they lose."""
    for guarantee in EVERY:
        for more, found in ((0, 0), (150, 1)):
            made = clean(guarantee)
            for _ in range(more):
                if guarantee == EOS:
                    made.transaction("sender-0", [1], INFO, written=False)
                else:
                    made.send("sender-0", 1, None, written=False)
            lines = [line for line in made.lacking() if "records that were sent are in the input topic" in line]
            assert len(made.lacking()) == len(lines) == (found if guarantee == AMO else 0)


def test_drained_does_not_wait_for_marks_of_transactions() -> None:
    """H07: behind the last record is the mark of its transaction, to which nobody commits."""
    made = clean(EOS)
    made.transaction("sender-0", [0, 1, 2], FAIL, written=False)
    assert made.found("drained") == []


# --- figures ----------------------------------------------------------------------------------------------------------------


def test_figures_count_what_happened() -> None:
    """The numbers of the report."""
    made = clean(ALO)
    before = figures(made.evidence())
    made.send("sender-0", outcome=FAIL, written=False)
    made.send("sender-0", outcome=None)
    made.handle("transformer-0", at(made, 0, 0))
    made.handle("transformer-0", at(made, 0, 1), FAIL)
    made.begin("transformer-0")
    made.handle("transformer-0", at(made, 0, 2), None)
    made.note("transformer-0", "life", OK)
    after = figures(made.evidence())
    assert {name: after[name] - before[name] for name in after if after[name] != before[name]} == {
        "ids sent": 2,
        "failed": 1,
        "unknown": 1,
        "records in the input topic": 1,
        "records in the output topic (committed)": 6,
        "handled again": 3,
        "not handled": 1,
        "handlers that raised": 1,
        "handlers cut short": 1,
        "lives": 1,
    }
    assert before["messages handled"] == before["records in the input topic"]
    assert before["lives cut short"] == 3


def test_figures_of_transactions() -> None:
    """They are there where transactions are; and what was aborted is counted where only readers of everything find it."""
    made = clean(EOS)
    found = figures(made.evidence())
    assert found["ids sent"] == 3 * sum(found[f"transactions {how}"] for how in ("committed", "aborted", "unknown"))
    assert found["records in the output topic (aborted)"] == 0
    made.handle("transformer-0", at(made, 0, 0), visible=False)
    assert figures(made.evidence())["records in the output topic (aborted)"] == OUTPUTS
    assert "transactions committed" not in figures(clean(ALO).evidence())


# --- any run ----------------------------------------------------------------------------------------------------------------


UNLUCKY: list[tuple[str | None, bool, bool]] = [  # outcome of a transaction, whether it is visible, whether that was asked for
    (FAIL, False, True),
    (FAIL, False, False),
    (INFO, True, True),
    (INFO, False, True),
    (None, True, True),
    (None, False, False),
]


class Simulation:
    """A wild run that keeps its guarantee: every outcome, kills, aborts, rebalances, zombies, answers from the past."""

    def __init__(self, guarantee: str, seed: int, steps: int = 60) -> None:
        self.dice = random.Random(seed)
        self.made = Made(guarantee)
        self.steps = steps
        self.owner: dict[tuple[str, int], str] = {}
        self.position: dict[tuple[str, str, int], int] = {}  # of a member, while it believes that a partition is its own

    def run(self) -> Made:
        for who in ("sender-0", "sender-1", *(f"{group}-{n}" for group in GROUPS for n in (0, 1))):
            self.made.begin(who)
        for group in GROUPS:
            self._rebalance(group)
        while self.steps > 0 or len({seen.id for seen in self.made.source}) < 110:
            self.steps -= 1
            self.dice.choice([self._send, self._send, self._member, self._member, self._member, self._trouble])()
            self._sample()
        self.made.calm = self.made.tick()
        for _ in range(5):
            self._send(luck=1)
        self._drain()
        return self.made

    def _send(self, luck: float = 0.7) -> None:
        made, dice, who = self.made, self.dice, self.dice.choice(["sender-0", "sender-1"])
        lucky = dice.random() < luck
        keys = [dice.randrange(6) for _ in range(dice.randint(1, 6))]
        if made.guarantee == EOS:
            fate = (OK, True, True) if lucky else dice.choice(UNLUCKY)
            outcome, written, asked = fate
            made.transaction(who, keys, outcome, written=written, asked=asked)
            if outcome is None:
                made.begin(who)
            return
        for key in keys:
            known = None if made.guarantee == AMO else OK
            unlucky = dice.choice([(FAIL, False), (INFO, True), (INFO, False), (None, False)])
            outcome, written = (known, True) if lucky else unlucky
            id_ = made.send(who, key, outcome, written=written)
            if written and made.guarantee == ALO and dice.random() < 0.05:
                made.append(id_, key % PARTITIONS, key)  # P08

    def _member(self) -> None:
        group, partition = self.dice.choice(GROUPS), self.dice.randrange(PARTITIONS)
        if self.dice.random() < 0.1 and self.made.guarantee != AMO:
            self._zombie(group, partition)
        else:
            self._portion(group, partition, self.owner[group, partition])

    def _rest(self, group: str, partition: int, who: str) -> list[Seen]:
        start = self.position.setdefault((group, who, partition), self.made.committed[group].get(partition, 0))
        return sorted(seen for seen in self.made.source if seen.partition == partition and seen.offset >= start)

    def _portion(self, group: str, partition: int, who: str, faults: float = 0.15) -> None:
        """Fetch, handle and commit in the order of the guarantee; something may come in between."""
        made, dice = self.made, self.dice
        portion = self._rest(group, partition, who)[: dice.randint(1, 3 if made.guarantee == AMO else 8)]
        if not portion:
            return
        fault = dice.choice(["kill", "abort", "raise", "kill after"]) if dice.random() < faults else ""
        if made.guarantee == AMO:
            made.commit(group, portion[-1])
            self.position[group, who, partition] = portion[-1].offset + 1
        committed = made.guarantee != EOS or fault in {"", "kill after"}
        upto = dice.randrange(len(portion)) if fault in {"kill", "raise"} else len(portion)
        attempts = [made.handle(who, seen, visible=committed) for seen in portion[:upto]]
        if upto < len(portion) and dice.random() < 0.7:
            attempts.append(made.handle(who, portion[upto], FAIL if fault == "raise" else None, visible=committed, made=1))
        if made.guarantee != AMO:
            if fault in {"", "kill after"}:
                made.commit(group, portion[-1])
                self.position[group, who, partition] = portion[-1].offset + 1
            else:
                del self.position[group, who, partition]  # it goes back to what is committed
                if fault == "abort" and made.guarantee == EOS:
                    for attempt in attempts:
                        made.note(who, "attempt", FAIL, attempt=attempt)
        if fault in {"kill", "kill after"}:
            self._kill(who)

    def _zombie(self, group: str, partition: int) -> None:
        """It goes on where it was, though the partition is another's: nothing of that is committed."""
        for who in (f"{group}-0", f"{group}-1"):
            if who != self.owner[group, partition] and (group, who, partition) in self.position:
                for seen in self._rest(group, partition, who)[:2]:
                    self.made.handle(who, seen, visible=self.made.guarantee != EOS)
                del self.position[group, who, partition]

    def _trouble(self) -> None:
        if self.dice.random() < 0.5:
            self._rebalance(self.dice.choice(GROUPS))
        else:
            self._kill(f"{self.dice.choice(GROUPS)}-{self.dice.randrange(2)}")

    def _kill(self, who: str) -> None:
        self.position = {at: offset for at, offset in self.position.items() if at[1] != who}
        self.made.begin(who)
        self._rebalance(who.rpartition("-")[0])

    def _rebalance(self, group: str) -> None:
        for partition in range(PARTITIONS):
            to = f"{group}-{self.dice.randrange(2)}"
            if self.owner.get((group, partition)) != to:
                self.position.pop((group, to, partition), None)
            self.owner[group, partition] = to

    def _sample(self) -> None:
        made, dice = self.made, self.dice
        for group in GROUPS:
            offsets = dict(made.committed[group])
            if dice.random() < 0.1:
                offsets = {partition: offset for partition, offset in offsets.items() if dice.random() < 0.5}
            made.sample(group, offsets, ms=dice.choice([1, 50, 300]))
            if made.samples[group] and dice.random() < 0.05:
                made.sample(group, dict(dice.choice(made.samples[group]).offsets))
                made.sample(group)

    def _drain(self) -> None:
        for group in GROUPS:
            for partition in range(PARTITIONS):
                while self._rest(group, partition, self.owner[group, partition]):
                    self._portion(group, partition, self.owner[group, partition], faults=0)
            self.made.sample(group)


def some(guarantee: str) -> Made:
    return Simulation(guarantee, 1).run()


@pytest.mark.parametrize("guarantee", EVERY)
@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_no_run_that_keeps_its_guarantee_is_accused(guarantee: str, seed: int) -> None:
    """Whatever happens, as long as it is allowed."""
    assert Simulation(guarantee, seed).run().broken() == {}


def sink_without(made: Made, dice: random.Random) -> None:
    made.sink.remove(dice.choice(made.sink))


def sink_without_all(made: Made, dice: random.Random) -> None:
    origin = dice.choice(made.sink).origin
    made.sink = [output for output in made.sink if output.origin != origin]


def sink_with_double(made: Made, dice: random.Random) -> None:
    output = dice.choice(made.sink)
    made.sink.append(output._replace(offset=100_000))


def sink_with_aborted(made: Made, dice: random.Random) -> None:
    """An attempt that nobody knows to be aborted becomes visible, besides that which is committed."""
    seen = dice.choice([seen for seen in made.source if outputs_of(made, seen)])
    made.handle(f"transformer-{dice.randrange(2)}", seen)


def sink_swapped(made: Made, dice: random.Random) -> None:
    """Two outputs of one stream overtake each other."""
    first = {output.id: output for output in sorted(made.sink, reverse=True)}.values()  # of repeats
    of_one = [output for output in first if output.partition == 0 and output.origin and output.origin[0] == 0]
    one, other = dice.sample(of_one, 2)
    made.sink = [output for output in made.sink if output.id not in {one.id, other.id} or output.partition != 0]
    made.sink += [one._replace(offset=other.offset), other._replace(offset=one.offset)]


def sink_of_another(made: Made, dice: random.Random) -> None:
    index, other = dice.randrange(len(made.sink)), dice.choice(made.source)
    if made.sink[index].origin == (other.partition, other.offset):
        other = next(seen for seen in made.source if seen != other)
    made.sink[index] = made.sink[index]._replace(id=f"{other.id}/{made.sink[index].id[-1]}")


def source_without(made: Made, dice: random.Random) -> None:
    acknowledged = {
        event.id if made.guarantee == ALO else event.transaction
        for event in made.events
        if event.type == OK and event.what in TOLD
    }
    sent = [
        event.id
        for event in made.events
        if event.what == "send" and event.type == INVOKE and (event.transaction or event.id) in acknowledged
    ]
    gone = dice.choice(sent)
    made.source = [seen for seen in made.source if seen.id != gone]


TOLD = {"send", "transaction"}


def source_with_double(made: Made, dice: random.Random) -> None:
    made.source.append(dice.choice(made.source)._replace(offset=100_000))


def source_with_failed(made: Made, dice: random.Random) -> None:
    """A send that certainly failed is there."""
    key = dice.randrange(6)
    if made.guarantee == EOS:
        made.transaction("sender-0", [key], FAIL, written=True)
    else:
        made.send("sender-0", key, FAIL, written=True)


def offsets_back(made: Made, dice: random.Random) -> None:
    group, partition = dice.choice(GROUPS), dice.randrange(PARTITIONS)
    offset = dice.randrange(made.committed[group][partition])
    made.committed[group][partition] = offset
    for _ in range(3):
        made.sample(group, ms=700)


def handled_again(made: Made, dice: random.Random) -> None:
    group = dice.choice(GROUPS)
    begun = [event for event in made.events if event.what == "handle" and event.type == INVOKE and event.who.startswith(group)]
    event = dice.choice(begun)
    made.events.append(event._replace(at=made.tick(), attempt="again"))


def handled_by_a_newcomer(made: Made, dice: random.Random) -> None:
    group = dice.choice(GROUPS)
    made.tick()
    made.begin(f"{group}-0")
    seen = dice.choice(made.source)
    made.events.append(
        Event(made.tick(), f"{group}-0", made.lives[f"{group}-0"], "handle", INVOKE, seen.id, "new", None, None, *seen[:2])
    )


def never_handled(made: Made, dice: random.Random) -> None:
    group, seen = dice.choice(GROUPS), dice.choice(made.source)
    made.events = [
        event
        for event in made.events
        if event.what != "handle" or not event.who.startswith(group) or (event.partition, event.offset) != seen[:2]
    ]


def handled_too_early(made: Made, dice: random.Random) -> None:
    index = dice.choice([n for n, event in enumerate(made.events) if event.what == "handle" and event.type == INVOKE])
    sent = made.events[made.index("send", INVOKE, id=made.events[index].id)]
    made.events[index] = made.events[index]._replace(at=sent.at)


def source_altered(made: Made, dice: random.Random) -> None:
    """All who read it agree, and have something else than its sender gave to the library."""
    id_ = dice.choice(made.source).id
    index = made.index("send", INVOKE, id=id_)
    made.events[index] = made.events[index]._replace(content="other")


def handled_altered(made: Made, dice: random.Random) -> None:
    places = {seen[:2] for seen in made.source}
    begun = [
        number
        for number, event in enumerate(made.events)
        if event.what == "handle" and event.type == INVOKE and (event.partition, event.offset) in places
    ]
    index = dice.choice(begun)
    made.events[index] = made.events[index]._replace(content="other")


def sink_altered(made: Made, dice: random.Random) -> None:
    index = dice.randrange(len(made.sink))
    made.sink[index] = made.sink[index]._replace(content="other")


def sink_elsewhere(made: Made, dice: random.Random) -> None:
    index = dice.randrange(len(made.sink))
    partition = (made.sink[index].partition + dice.randint(1, PARTITIONS - 1)) % PARTITIONS
    made.sink[index] = made.sink[index]._replace(partition=partition, offset=100_000)


def calm_without(made: Made, dice: random.Random) -> None:
    """Some of what was sent in the calm is lost: the records with all that came of them, handlings, or outputs."""
    calm = in_calm(made)
    what = dice.choice(["source", "output", *GROUPS])
    for seen in dice.sample(calm, int(2 * ALLOWED * len(calm)) + 1):
        if what == "output":
            made.sink.remove(dice.choice(outputs_of(made, seen)))
        else:
            _lose(made, seen, what)


def _lose(made: Made, seen: Seen, what: str) -> None:
    made.source = [other for other in made.source if other != seen or what != "source"]
    made.sink = [output for output in made.sink if output.origin != seen[:2] or what == "consumer"]
    made.events = [
        event
        for event in made.events
        if event.what != "handle" or event.id != seen.id or not (what == "source" or event.who.startswith(what))
    ]


MUTATIONS: list[tuple[Callable[[Made, random.Random], None], dict[str, str]]] = [
    (sink_without, {EOS: "torn transaction"}),
    (sink_without_all, {ALO: "lost output", EOS: "torn transaction"}),
    (sink_with_double, {AMO: "duplicate", EOS: "duplicate"}),
    (sink_with_aborted, {AMO: "duplicate", EOS: "torn transaction"}),
    (sink_swapped, {ALO: "order per key", EOS: "order per key"}),
    (sink_of_another, dict.fromkeys(EVERY, "inconsistent offset")),
    (source_without, {ALO: "lost write", EOS: "lost write"}),
    (source_with_double, {AMO: "duplicate", EOS: "duplicate"}),
    (source_with_failed, dict.fromkeys(EVERY, "aborted read")),
    (offsets_back, dict.fromkeys((AMO, EOS), "offset regression")),
    (handled_again, {AMO: "handled more than once"}),
    (handled_by_a_newcomer, dict.fromkeys((AMO, EOS), "non-monotonic poll")),
    (never_handled, {ALO: "unseen", EOS: "unseen"}),
    (handled_too_early, {EOS: "precommitted read"}),
    (source_altered, dict.fromkeys(EVERY, "altered record")),
    (handled_altered, dict.fromkeys(EVERY, "altered record")),
    (sink_altered, dict.fromkeys(EVERY, "altered record")),
    (sink_elsewhere, dict.fromkeys(EVERY, "altered record")),
    (calm_without, {AMO: "calm loss"}),
]


@pytest.mark.parametrize(
    ("guarantee", "mutate", "name"),
    [
        pytest.param(guarantee, mutate, name, id=f"{mutate.__name__}-{guarantee}")
        for mutate, names in MUTATIONS
        for guarantee, name in names.items()
    ],
)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_one_thing_wrong_in_any_run_is_found(
    guarantee: str, mutate: Callable[[Made, random.Random], None], name: str, seed: int
) -> None:
    """H01: among everything that is allowed, a single thing that is not."""
    made = Simulation(guarantee, seed).run()
    mutate(made, random.Random(seed))
    assert name in made.broken()


@pytest.mark.parametrize("guarantee", EVERY)
def test_a_simulated_run_has_everything_in_it(guarantee: str) -> None:
    """H01, H10: a simulation in which nothing happens would accuse nobody, either."""
    totals: Counter[str] = Counter()
    for seed in range(5):
        evidence = Simulation(guarantee, seed).run().evidence()
        totals.update(figures(evidence))
        totals.update({f"check: {verdict.check}": verdict.examined for verdict in judge(evidence)})
    empty = {
        AMO: {"acknowledged", "handled again", "records in the output topic (aborted)"},
        ALO: {"not handled", "records in the output topic (aborted)"},
        EOS: {"not handled"},
    }
    assert {name for name, total in totals.items() if not total} == empty[guarantee]


@pytest.mark.parametrize("guarantee", EVERY)
def test_a_long_run_is_judged_in_no_time(guarantee: str) -> None:
    """Time grows with the run, not with its square: 100,000 events in seconds."""
    evidence = clean(guarantee, records=17_000).evidence()
    assert len(evidence.events) > 80_000
    start = time.process_time()
    assert not [verdict for verdict in judge(evidence) if verdict.anomalies]
    assert time.process_time() - start < 10


# --- histories --------------------------------------------------------------------------------------------------------------

WRITER = """
import sys
from kafka_guarantees.prove.history import History
history = History(sys.argv[1], "sender-0", int(sys.argv[2]))
print("ready", flush=True)
number = 0
while True:
    number += 1
    history.note("send", "invoke", id=str(number), number=number, detail="x" * (number % 700))
"""


def test_a_history_is_read_as_it_was_written(tmp_path: Path) -> None:
    """Of several files, in the order of time; what is None is left out, and comes back as None."""
    with History(tmp_path / "a", "sender-0", 1) as a, History(tmp_path / "b", "consumer-1", 2) as b:
        a.note("send", INVOKE, id="x", key=None, number=1)
        b.note(type=OK, what="handle", id="ä\n", partition=0, offset=0, topic="t")
        a.note("send", OK, id="x")
        assert len(read([tmp_path / "a"])) == 2
    first, second, third = read([tmp_path / "b", tmp_path / "a"])
    assert first.at <= second.at <= third.at
    assert first == Event(first.at, "sender-0", 1, "send", INVOKE, id="x", number=1)
    assert second == Event(second.at, "consumer-1", 2, "handle", OK, id="ä\n", topic="t", partition=0, offset=0)
    assert b"null" not in (tmp_path / "a").read_bytes()


def test_events_of_one_time_stay_in_the_order_of_their_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock may stand still between two of them."""
    monkeypatch.setattr(time, "monotonic_ns", lambda: 5)
    with History(tmp_path / "a", "sender-0", 1) as history:
        for number in range(20):
            history.note("send", INVOKE, number=number)
    assert [event.number for event in read([tmp_path / "a"])] == list(range(20))


def test_a_history_survives_a_kill_at_any_instant(tmp_path: Path) -> None:
    """H06: whole lines, none missing between two others; and the next life appends to the same file."""
    path = tmp_path / "history"
    for life in range(1, 6):
        with subprocess.Popen([sys.executable, "-c", WRITER, str(path), str(life)], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(0.02 * life)
            process.send_signal(signal.SIGKILL)
        events = [event for event in read([path]) if event.life == life]
        assert events
        assert [event.number for event in events] == list(range(1, len(events) + 1))


def test_a_torn_line_is_skipped_and_cut_off_by_the_next_life(tmp_path: Path) -> None:
    """A kill in the middle of a write may leave half a line, longer than one look from the end finds."""
    path = tmp_path / "history"
    for torn in (b'{"at":1,"who', b"x" * 10_000):
        path.unlink(missing_ok=True)
        with History(path, "sender-0", 1) as history:
            history.note("send", INVOKE, id="whole")
        with path.open("ab") as file:
            file.write(torn)
        assert [event.id for event in read([path])] == ["whole"]
        with History(path, "sender-0", 2) as history:
            history.note("send", INVOKE, id="next")
        assert [event.id for event in read([path])] == ["whole", "next"]
    path.write_bytes(b"only half a line")
    History(path, "sender-0", 1).close()
    assert path.read_bytes() == b""


def test_a_line_that_is_not_an_event_is_an_error(tmp_path: Path) -> None:
    """A history that cannot be read proves nothing."""
    for line in ("[]\n", "{}\n", "not json\n", '{"at":1,"unknown":2}\n'):
        (tmp_path / "bad").write_text(line)
        with pytest.raises(ValueError, match="bad:1 is not an event"):
            read([tmp_path / "bad"])


def test_a_line_that_is_not_written_as_a_whole_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is full: the worker must not go on as if it were noted."""
    with History(tmp_path / "a", "sender-0", 1) as history:
        monkeypatch.setattr(os, "write", lambda _file, _line: 3)
        with pytest.raises(OSError, match="as a whole"):
            history.note("send", INVOKE, id="x")


def test_exceptions_out_of_signal_handlers_tear_no_line(tmp_path: Path) -> None:
    """They hit the writer between any two steps: each line is there as a whole, or not at all."""

    class Storm(Exception):
        pass

    def raise_it(*_: object) -> None:
        raise Storm

    def storms(history: History) -> Iterator[bool]:
        for number in range(3000):
            try:
                history.note("send", INVOKE, number=number)
            except Storm:
                yield True

    before = signal.signal(signal.SIGALRM, raise_it)
    try:
        with History(tmp_path / "a", "sender-0", 1) as history:
            signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
            try:
                hits = sum(storms(history))
            except Storm:
                hits = 1
            finally:
                signal.signal(signal.SIGALRM, signal.SIG_IGN)
                signal.setitimer(signal.ITIMER_REAL, 0)
    finally:
        signal.signal(signal.SIGALRM, before)
    numbers = [event.number for event in read([tmp_path / "a"])]
    assert hits
    assert numbers == sorted({number for number in numbers if number is not None})


def test_the_disk_is_asked_at_most_every_fifty_milliseconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sync takes longer than the work; and the end of a history is always on the disk."""
    synced: list[int] = []
    clock = [0]
    monkeypatch.setattr(os, "fdatasync", synced.append)
    monkeypatch.setattr(time, "monotonic_ns", lambda: clock[0])
    with History(tmp_path / "a", "sender-0", 1) as history:
        for _ in range(200):
            clock[0] += MS
            history.note("send", INVOKE)
        assert len(synced) == 4
    assert len(synced) == 5
