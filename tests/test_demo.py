"""Laws of the demo: it counts right, it can fail, and on a real Kafka it says so with its exit status."""

from __future__ import annotations

import io
import mmap
import re
import sys
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from kafka_guarantees.cli import main
from kafka_guarantees.demo import process
from kafka_guarantees.demo.check import History, judge, percentile, verdict
from kafka_guarantees.demo.effects import LINE, EffectLog, effects_in
from kafka_guarantees.demo.offers import FLOWS, INBOX, STORE, code
from kafka_guarantees.demo.screen import Screen
from kafka_guarantees.demo.sender import SENDERS, Stream
from kafka_guarantees.demo.table import WIDTH, notes, table

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from kafka_guarantees.testing import RunningKafka

GUARANTEES = ("at-most-once", "at-least-once", STORE, INBOX, "exactly-once")
OFFERS = tuple(f"offer-{n}" for n in range(10))
A, B = OFFERS[:2]
MS = 1_000_000


def kept(guarantee: str) -> History:
    """Ten offers, sent at 0, 1, ... ms, handled 5 ms and visible 9 ms later, in two seconds and with one kill."""
    return History(
        guarantee=guarantee,
        tried={offer: n * MS for n, offer in enumerate(OFFERS)},
        acknowledged=frozenset() if guarantee == "at-most-once" else frozenset(OFFERS),
        inputs=OFFERS,
        handled=[(offer, (n + 5) * MS) for n, offer in enumerate(OFFERS)],
        outputs=[(offer, code(offer)) for offer in OFFERS],
        visible={offer: (n + 9) * MS for n, offer in enumerate(OFFERS)},
        killed=(50 * MS,),
        seconds=2.0,
    )


def unhandled(history: History, *offers: str) -> History:
    return replace(history, handled=[(offer, at) for offer, at in history.handled if offer not in offers])


def without_output(history: History, *offers: str) -> History:
    return replace(history, outputs=[(offer, value) for offer, value in history.outputs if offer not in offers])


def handled_again(history: History, *offers: str) -> History:
    return replace(history, handled=[*history.handled, *((offer, 99 * MS) for offer in offers)])


def sent_twice(history: History) -> History:
    return replace(history, inputs=OFFERS * 2)


def with_output(history: History, offer: str, value: str) -> History:
    return replace(history, outputs=[*history.outputs, (offer, value)])


# -- counting -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guarantee", GUARANTEES)
def test_a_history_without_a_fault_is_kept(guarantee: str) -> None:
    """Where everything happened once, every figure says so and nothing is broken."""
    figures = judge(kept(guarantee))
    assert (figures.sent, figures.handled, figures.lost, figures.twice, figures.again) == (10, 10, 0, 0, 0)
    assert (figures.rate, figures.kills, figures.broken) == (5.0, 1, ())
    latency = 9.0 if guarantee == "exactly-once" else 5.0
    assert (figures.p50, figures.p99) == (latency, latency)
    line = verdict(replace(figures, handled=123_456, lost=123_456, unwritten=123_456, again=123_456))
    assert line.startswith(f"kept    {guarantee}: ")
    assert len(line) <= WIDTH


@pytest.mark.parametrize(
    ("history", "lost", "twice"),
    [
        (without_output(unhandled(kept("at-most-once"), A, B), A, B), 2, 0),
        (without_output(kept("at-most-once"), A), 0, 0),
        (handled_again(kept("at-least-once"), A, A, B), 0, 2),
        (with_output(kept("at-least-once"), A, code(A)), 0, 0),
        (replace(kept("at-least-once"), inputs=(*OFFERS, A)), 0, 0),
        (handled_again(kept("exactly-once"), A, B), 0, 0),
        (handled_again(sent_twice(kept(STORE)), A, B), 0, 2),
        (with_output(sent_twice(kept(STORE)), A, code(A)), 0, 0),
        (handled_again(sent_twice(kept(INBOX)), A, B), 0, 0),
    ],
)
def test_what_a_guarantee_allows_is_counted_and_kept(history: History, lost: int, twice: int) -> None:
    """Losses at most once, repeats at least once and, with a store, by kills, and what was rolled back: figures, not faults."""
    figures = judge(history)
    assert (figures.lost, figures.twice, figures.broken) == (lost, twice, ())


BROKEN = [
    (handled_again(kept("at-most-once"), A), "1 handled more than once (offer-0)"),
    (with_output(kept("at-most-once"), A, code(A)), "1 with more than one output (offer-0)"),
    (replace(kept("at-most-once"), inputs=(*OFFERS, A)), "1 in the topic more than once (offer-0)"),
    (unhandled(kept("at-least-once"), A), "1 acknowledged and never handled (offer-0)"),
    (without_output(kept("at-least-once"), A), "1 acknowledged and without output (offer-0)"),
    (replace(kept("at-least-once"), inputs=OFFERS[1:]), "1 acknowledged and not in the topic (offer-0)"),
    (without_output(kept("exactly-once"), *OFFERS[:4]), "4 committed and without output (offer-0, offer-1, offer-2, ...)"),
    (with_output(kept("exactly-once"), B, code(B)), "1 with more than one output (offer-1)"),
    (replace(kept("exactly-once"), inputs=OFFERS[1:]), "1 committed and not in the topic (offer-0)"),
    (replace(kept("exactly-once"), inputs=(*OFFERS, A)), "1 in the topic more than once (offer-0)"),
    (replace(kept("exactly-once"), acknowledged=frozenset(OFFERS[1:])), "1 handled and never sent (offer-0)"),
    (unhandled(kept(STORE), A), "1 acknowledged and never handled (offer-0)"),
    (without_output(kept(STORE), A), "1 acknowledged and without output (offer-0)"),
    (replace(kept(STORE), inputs=OFFERS[1:]), "1 acknowledged and not in the topic (offer-0)"),
    (replace(handled_again(kept(STORE), A), killed=(4 * MS,)), "1 handled again by a worker that lived (offer-0)"),
    (replace(handled_again(kept(STORE), A), killed=(100 * MS,)), "1 handled again by a worker that lived (offer-0)"),
    (handled_again(handled_again(kept(STORE), A), A), "1 handled again by a worker that lived (offer-0)"),
    (without_output(kept(INBOX), A), "1 acknowledged and without a row (offer-0)"),
    (with_output(kept(INBOX), A, code(A)), "1 with more than one row (offer-0)"),
    (replace(kept(INBOX), inputs=OFFERS[1:]), "1 acknowledged and not in the topic (offer-0)"),
    *(
        case
        for guarantee in GUARANTEES
        for case in (
            (with_output(without_output(kept(guarantee), A), A, "?"), "1 with an output that is not f(input) (offer-0)"),
            (with_output(kept(guarantee), "x", code("x")), "1 handled and never sent (x)"),
            (unhandled(without_output(kept(guarantee), *OFFERS[4:]), *OFFERS[4:]), "no progress: 4 of 10 handled"),
            (replace(kept(guarantee), tried={}, acknowledged=frozenset(), inputs=[]), "nothing was sent"),
            (replace(kept(guarantee), killed=()), "nothing was killed"),
            (replace(kept(guarantee), troubles=("the worker ended by itself",)), "the worker ended by itself"),
        )
    ),
]


@pytest.mark.parametrize(("history", "complaint"), BROKEN)
def test_what_a_guarantee_forbids_breaks_it(history: History, complaint: str) -> None:
    """Each promise, when it is not kept, is named with the offers that show it."""
    figures = judge(history)
    assert complaint in figures.broken
    assert verdict(figures).startswith(f"BROKEN  {history.guarantee}: ")


def test_at_most_once_counts_what_is_in_the_topic() -> None:
    """An offer that acks=0 lost on the way was not sent: nobody said that it was."""
    history = kept("at-most-once")
    history = replace(without_output(unhandled(history, A), A), inputs=OFFERS[1:])
    figures = judge(history)
    assert (figures.sent, figures.lost, figures.unwritten, figures.broken) == (9, 0, 1, ())


def test_at_least_once_may_handle_what_was_not_acknowledged() -> None:
    """An offer without acknowledgement may be in the topic all the same: that is not a fault."""
    figures = judge(replace(kept("at-least-once"), acknowledged=frozenset(OFFERS[1:])))
    assert (figures.sent, figures.unwritten, figures.broken) == (9, 1, ())


@pytest.mark.parametrize("guarantee", [STORE, INBOX])
def test_what_was_sent_twice_and_left_out_is_told(guarantee: str) -> None:
    """The line says how many records repeat an earlier one: they are in the topic, and have no effect."""
    figures = judge(sent_twice(kept(guarantee)))
    assert (figures.sent, figures.repeats, figures.twice, figures.broken) == (10, 10, 0, ())
    assert ", 10 repeats left out (" in verdict(figures)


def test_latency_ends_with_the_first_handling() -> None:
    """A repeat does not make an offer slower."""
    assert judge(handled_again(kept("at-least-once"), *OFFERS)).p99 == 5.0


@pytest.mark.parametrize(
    ("values", "percent", "expected"),
    [((), 50, None), ((7.0,), 99, 7.0), ((1.0, 2.0), 50, 1.0), ((1.0, 2.0, 3.0), 50, 2.0), (tuple(range(1, 201)), 99, 198)],
)
def test_percentile_is_the_nearest_rank(values: Sequence[float], percent: int, expected: float | None) -> None:
    """A percentile is one of the values: the smallest that so many percent do not exceed."""
    assert percentile(values, percent) == expected


# -- the parts ------------------------------------------------------------------------------------------------------------


def test_the_effect_log_gives_back_what_was_written(tmp_path: Path) -> None:
    """What any number of workers appended, one after the other, is read in that order."""
    path = tmp_path / "effects"
    for offer in (A, B, A):
        with EffectLog(path) as log:
            log.append(offer)
    effects = effects_in(path.read_text())
    assert [offer for offer, _ in effects] == [A, B, A]
    assert [at for _, at in effects] == sorted(at for _, at in effects)


@pytest.mark.parametrize("doctored", ["offer-1 12\n", "offer-1 12".ljust(LINE), f"{'offer-1':<{LINE - 1}}\n"])
def test_a_doctored_effect_log_is_refused(doctored: str) -> None:
    """A line that no worker writes is an error: no count may rest on it."""
    with pytest.raises(ValueError, match=r"no worker wrote|unpack"):
        effects_in(f"{'offer-0 11':<{LINE - 1}}\n{doctored}")


def test_a_line_of_the_effect_log_never_crosses_a_page() -> None:
    """Lines divide a page evenly: only at its end could a kill cut a write."""
    assert mmap.PAGESIZE % LINE == 0


def test_the_table_is_readable_at_110_columns() -> None:
    """No line of the table or its notes is wider, whatever the figures."""
    figures = judge(kept("at-least-once"))
    large = replace(figures, sent=123_456, handled=123_456, lost=123_456, twice=123_456, rate=1e5, p50=1e5, p99=1e5, kills=100)
    text = table([(figures, ["acks=all", "a.very.long.setting=with.a.long.value.of.its.own"]), (large, [])])
    assert max(map(len, f"{text}\n{notes()}".splitlines())) <= WIDTH == 110
    assert re.search(r"^at-least-once +10 +10 +0 +0 +5 +5\.0 +5\.0 +1  acks=all$", text, re.MULTILINE)


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_one_line_on_a_terminal_and_lines_elsewhere() -> None:
    """On a terminal the line renews itself; elsewhere nothing but plain lines is written, and not too many."""
    for out, expected in ((_Terminal(), "\r\x1b[K1\r\x1b[K2\r\x1b[K3\r\x1b[Kdone\n"), (io.StringIO(), "1\n3\ndone\n")):
        now = iter((0.0, 0.0, 1.0, 5.0))
        screen = Screen(out, lambda now=now: next(now))  # type: ignore[misc] # mypy does not see the default's type
        for text in ("1", "2", "3"):
            screen.progress(lambda text=text: text)  # type: ignore[misc] # likewise
        screen.say("done")
        assert out.getvalue() == expected


class _Produced(list[str]):
    """Stands for the client of a sender."""

    def produce(self, _topic: str, *, key: str, message_id: str) -> Any:
        assert key == message_id
        self.append(key)
        return self

    def result(self, _timeout: float) -> Any:
        return self

    def flush(self) -> None:
        pass

    close = flush


def test_a_relay_sends_each_offer_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every offer, with its id, once in order and again a while later; at the end of the stream too."""
    produced = _Produced()
    monkeypatch.setattr("kafka_guarantees.demo.sender.AtLeastOnce", lambda _config: produced)
    sender = SENDERS[STORE]("broker", "topic")
    offers = [f"offer-{n}" for n in range(100)]
    for n in range(0, 100, 2):
        sender.send(offers[n : n + 2])
    assert 100 < len(produced) < 200
    assert sender.acknowledged() == frozenset(offers)
    first = list(dict.fromkeys(produced))
    again = [produced.index(offer, produced.index(offer) + 1) - produced.index(offer) for offer in offers]
    assert first == offers
    assert Counter(produced) == Counter(offers * 2)
    assert min(again) > 1
    sender.close()


class _Notebook:
    def __init__(self) -> None:
        self.offers: list[str] = []

    def send(self, offers: Sequence[str]) -> None:
        self.offers += offers

    def acknowledged(self) -> frozenset[str]:
        return frozenset(self.offers)

    def close(self) -> None:
        pass


def test_a_stream_sends_what_is_due(monkeypatch: pytest.MonkeyPatch) -> None:
    """By each tick, time * rate offers were sent, each once; a late tick catches up."""
    sender, now = _Notebook(), iter((100.0, 100.25, 100.25, 101.0))
    monkeypatch.setattr("kafka_guarantees.demo.sender.time.monotonic", lambda: next(now))
    stream, sent = Stream(sender, rate=40), []
    for _ in range(4):
        stream.tick()
        sent.append(len(sender.offers))
    assert sent == [0, 10, 10, 40]
    assert sender.offers == sorted(set(sender.offers)) == list(stream.tried)


# -- on a real Kafka ------------------------------------------------------------------------------------------------------

TWO_KILLS = ("demo", "--kills", "2", "--rate", "250", "--seed", "89")  # short lives, some of which end in the backlog
ONE_KILL = ("demo", "--kills", "1", "--rate", "100", "--seed", "51")  # soon after the first handling

# What people write: offsets committed on a timer (or, to lose instead of to repeat, before the work), no transaction.
NAIVE = """
import json, os, signal, sys, time
from confluent_kafka import Consumer, Producer, TopicPartition
from kafka_guarantees.demo.effects import EffectLog
from kafka_guarantees.demo.offers import code

task = json.loads(sys.argv[1])
config = {name: value for name, value in task["config"].items() if name != "transactional.id"}
too_early = task["guarantee"] == "at-least-once"
running = [True]
signal.signal(signal.SIGTERM, lambda *_: running.clear())

def begin(consumer, partitions):
    fresh = [TopicPartition(p.topic, p.partition, 0) for p in consumer.committed(partitions, 10) if p.offset < 0]
    if fresh:
        consumer.commit(offsets=fresh, asynchronous=False)  # the demo waits for a group to have offsets

consumer = Consumer({**config, "auto.offset.reset": "earliest", "enable.auto.commit": not too_early,
                     "auto.commit.interval.ms": 2500})
producer = Producer({"bootstrap.servers": config["bootstrap.servers"]})
consumer.subscribe([task["reads"]], on_assign=begin)
with EffectLog(task["effects"]) as effects:
    while running:
        messages = consumer.consume(500, 0.1)
        if too_early and messages:
            consumer.commit(asynchronous=False)
        for number, message in enumerate(messages):
            effects.append(message.key().decode())
            time.sleep(0.007 if number or not too_early else 0.1)  # a handler that takes its time: the kill finds it at work
            producer.produce(task["writes"], key=message.key(), value=code(message.key().decode()))
            producer.poll(0)
consumer.close()
producer.flush()
"""


@pytest.fixture
def _on(kafka: RunningKafka, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KAFKA_GUARANTEES_BOOTSTRAP", kafka.bootstrap)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


@pytest.mark.broker
@pytest.mark.usefixtures("_on")
def test_the_demo_keeps_every_guarantee(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Under kills all classes keep their guarantee, with a store and an inbox too: status 0, one row each whose figures fit."""
    status = main(TWO_KILLS)
    out = capsys.readouterr().out
    assert status == 0, out
    assert re.findall(r"^(kept|BROKEN) +(\S.*?):", out, re.MULTILINE) == [("kept", guarantee) for guarantee in GUARANTEES]
    rows = re.findall(
        r"^(at-\S+|exactly-once|AtLeastOnce) +(\d+) +(\d+) +(\d+) +(\d+) +\d+ +[\d.]+ +[\d.]+ +(\d+)  \w", out, re.MULTILINE
    )
    assert [name for name, *_ in rows] == [guarantee.split(" + ")[0] for guarantee in GUARANTEES]
    assert re.findall(r"^\+ (\S+ \S+) ", out, re.MULTILINE) == ["SQLite store", "SQLite inbox"]
    twice_sent = [
        (int(sent), int(repeats)) for sent, repeats in re.findall(r"of (\d+) (?:lost|has one row), (\d+) repeats", out)
    ]
    assert [sent for sent, _ in twice_sent] == [int(sent) for name, sent, *_ in rows if name == "AtLeastOnce"]
    assert all(repeats == sent for sent, repeats in twice_sent)
    for name, *numbers in rows:
        sent, handled, lost, twice, kills = map(int, numbers)
        assert handled + lost == sent > 250
        assert kills == 2
        assert lost == 0 or name == "at-most-once"
        assert twice == 0 or name in {"at-least-once", "AtLeastOnce"}
    [(_, _, _, _, by_inbox, _)] = [row for row, guarantee in zip(rows, GUARANTEES, strict=True) if guarantee == INBOX]
    assert by_inbox == "0"
    assert "session.timeout.ms=1500" in out
    assert not list(tmp_path.iterdir()), "nothing is left where nothing was broken"


@pytest.mark.broker
@pytest.mark.usefixtures("_on")
def test_the_demo_fails_with_workers_that_keep_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """A plain consumer in place of each class breaks each guarantee, the demo says how, and fails."""
    monkeypatch.setattr(process, "COMMAND", (sys.executable, "-c", NAIVE))
    status = main(ONE_KILL)
    out = capsys.readouterr().out
    assert status == 1, out
    assert re.search(r"^BROKEN  at-most-once: \d+ handled more than once", out, re.MULTILINE), out
    assert re.search(r"^BROKEN  at-least-once: \d+ acknowledged and (never handled|without output)", out, re.MULTILINE), out
    assert re.search(r"^BROKEN  exactly-once: \d+ with more than one output", out, re.MULTILINE), out
    assert re.search(rf"^BROKEN  {re.escape(STORE)}: \d+ handled again by a worker that lived", out, re.MULTILINE), out
    assert re.search(rf"^BROKEN  {re.escape(INBOX)}: \d+ acknowledged and without a row", out, re.MULTILINE), out
    assert len(list(tmp_path.glob("*/*.effects"))) == len(FLOWS), "the evidence is kept"


@pytest.mark.broker
@pytest.mark.usefixtures("_on")
def test_the_demo_fails_with_a_worker_that_ends(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A worker that ends by itself is a failure, told at once and with its last words."""
    monkeypatch.setattr(process, "COMMAND", (sys.executable, "-c", "import sys; sys.exit('no more offers')"))
    assert main(ONE_KILL) == 1
    out = capsys.readouterr().out
    assert len(re.findall(r"BROKEN .*the worker ended by itself \(exit status 1\): no more offers", out)) == len(FLOWS)
