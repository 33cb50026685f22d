"""What is known after a run, and what was found in it: plain data, which the workers, the checks and the report share.

Words.
* An *id* is given to every record that a sender sends, and never used again.
* An *operation* begins with an ``invoke`` and ends with ``ok`` (it happened), ``fail`` (it certainly did not) or ``info``
  (nobody knows). One that has only an ``invoke`` was cut short by a kill: that is ``info`` too, and never a failure (H04).
* An *attempt* is one call of the handler for one message. Outputs carry the attempt that made them, so that what a handler
  wrote in a transaction that was aborted can be told from what it wrote when it ran again.
* A *life* is one process of a worker: the worker keeps its name over all of its lives.
* Times are nanoseconds of the monotonic clock, which all processes of a machine share.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

INVOKE, OK, FAIL, INFO = "invoke", "ok", "fail", "info"


class Event(NamedTuple):
    """One line of a history.

    ============  ===========================================================================================================
    what          when
    ============  ===========================================================================================================
    life          ``invoke`` as a process begins its work; ``ok`` as it ends in order; ``info`` as an exception ends it
    send          ``invoke`` before a record is given to the library; then its outcome, where it has one of its own. The
                  records of a transaction have only an ``invoke``: their outcome is that of the transaction
    transaction   of a sender: ``invoke`` as it begins, ``commit`` right before the block is left, then its outcome
    handle        ``invoke`` as the handler begins with a message; ``ok`` once it has returned or yielded everything;
                  ``fail`` as it raises
    attempt       ``fail``: a transaction that this attempt was part of is certainly aborted
    log           ``info``: a warning of the library, word for word, for whoever reads the history
    broker left   ``info``: librdkafka found a broker gone from the cluster's metadata, and with it the answers that it owed
    broken        ``info``: the library did not do what its documentation says, and the worker has seen it
    ============  ===========================================================================================================

    Attributes:
        at: when.
        who: the worker: ``sender-0``, ``transformer-1``, ``consumer-0``.
        life: of the worker, counted from 1.
        what, type: see above.
        id: of the record.
        attempt: of the handler: unique in the run.
        transaction: of a sender: unique in the run.
        topic, partition, offset: where the record is, once that is known.
        key: of the record.
        content: of the record, as a checksum of its key, value and headers (without those of the proof): of a send what was
            given to the library, of a handling what came out of it.
        number: of a send, counted within a life: the order in which a sender called the library.
        detail: for people.
    """

    at: int
    who: str
    life: int
    what: str
    type: str
    id: str | None = None
    attempt: str | None = None
    transaction: str | None = None
    topic: str | None = None
    partition: int | None = None
    offset: int | None = None
    key: str | None = None
    content: str | None = None
    number: int | None = None
    detail: str | None = None


class Seen(NamedTuple):
    """One record, as a reader of a topic found it.

    Attributes:
        partition, offset: where.
        key: of the record.
        id: of the record. An output is called after its input: ``<id>/<number>``, counted from 0.
        attempt: of the handler that made it; None in the input topic.
        origin: partition and offset of the message that it was made for; None in the input topic.
        content: as in Event. An output has the key, the value and the headers of its input.
    """

    partition: int
    offset: int
    key: str | None
    id: str
    attempt: str | None = None
    origin: tuple[int, int] | None = None
    content: str | None = None


class View(NamedTuple):
    """A topic, read by a new consumer from the beginning to the end of every partition, twice (H02, H03).

    Attributes:
        committed: what a reader with ``read_committed`` finds.
        uncommitted: what a reader with ``read_uncommitted`` finds: besides, what was aborted.
        unfinished: partitions whose end the committed reader did not reach: a transaction was left open in them.
    """

    committed: Sequence[Seen]
    uncommitted: Sequence[Seen]
    unfinished: Sequence[int] = ()


class Sample(NamedTuple):
    """Committed offsets of a group at one time, by partition (asked with require_stable, H08). Without those that are none."""

    asked: int
    answered: int
    offsets: Mapping[int, int]


@dataclass(frozen=True)
class Evidence:
    """Everything that the checks look at.

    Attributes:
        guarantee: ``at-most-once``, ``at-least-once`` or ``exactly-once``.
        events: of all histories, in the order of time.
        source: the topic that senders write and both groups read.
        sink: the topic that transformers write. For each message they write ``OUTPUTS`` records: number 0 into the partition
            that the message came from, number 1 into the next, so that half a transaction shows.
        samples: by group (``transformer``, ``consumer``): all through the run. The last that is known of a
            partition is the state at the end.
        calm: from when on nothing was done to anybody, nothing done before had consequences any more, and no handler raised;
            None if there was no such time. Records were still sent after it.
        partitions: of each topic.
        troubles: what no fault explains, a sentence each: a worker that did not end when told to, an error that the library
            must not raise.
    """

    guarantee: str
    events: Sequence[Event]
    source: View
    sink: View
    samples: Mapping[str, Sequence[Sample]]
    calm: int | None = None
    partitions: int | None = None
    troubles: Sequence[str] = ()


REFUSED = "it returned a record that cannot be written, and said nothing"  # detail of a handling that failed
OUTPUTS = 2
GROUPS = ("transformer", "consumer")


@dataclass(frozen=True)
class Verdict:
    """What one check found.

    Attributes:
        check: its name.
        meaning: what it looks for, a sentence.
        examined: how many things it looked at. With none, it says nothing.
        anomalies: a sentence each, with ids and places; none where the law was kept.
        more: how many anomalies there are besides, where they are too many to be told.
        lacking: what there was too little of for the run to say anything, a sentence each. That is no anomaly.
    """

    check: str
    meaning: str
    examined: int
    anomalies: Sequence[str] = ()
    more: int = 0
    lacking: Sequence[str] = ()

    @property
    def found(self) -> int:
        """How many anomalies there are."""
        return len(self.anomalies) + self.more


@dataclass(frozen=True)
class Fault:
    """A fault that was done.

    Attributes:
        name: as in ``--faults``.
        target: a worker, a broker, a request.
        began, ended: seconds since the beginning of the run.
        detail: for people.
    """

    name: str
    target: str
    began: float
    ended: float
    detail: str = ""


@dataclass(frozen=True)
class Proof:
    """The result of ``kafka-guarantees prove``: all that the report shows.

    Attributes:
        guarantee: that was to be proven.
        version: of this package and of librdkafka.
        command: which repeats the run, seed included.
        began: date and time, ISO 8601.
        seconds: from the first worker to the last read.
        setting: name -> value, for the head of the report: brokers, workers, partitions, protocol, seed, time-outs.
        figures: name -> number: ids sent, acknowledged, transactions, handled, ...
        verdicts: of all checks.
        faults: in the order of time.
        rates: per second of the run: time, records sent, messages handled, outputs visible: counts within that second.
        lag: time, messages that the transformers' group has not committed yet.
        troubles: see Evidence.
        kept_in: folder with histories, logs and dumps.
    """

    guarantee: str
    version: str
    command: str
    began: str
    seconds: float
    setting: Mapping[str, str]
    figures: Mapping[str, int]
    verdicts: Sequence[Verdict]
    faults: Sequence[Fault]
    rates: Sequence[tuple[float, int, int, int]] = field(default=())
    lag: Sequence[tuple[float, int]] = field(default=())
    troubles: Sequence[str] = ()
    kept_in: str = ""

    @property
    def outcome(self) -> Literal["held", "broken", "inconclusive"]:
        """What it says: ``inconclusive`` where nothing went wrong, and too little happened, or was looked at, to say so."""
        if self.troubles or any(verdict.found for verdict in self.verdicts):
            return "broken"
        enough = not any(verdict.lacking for verdict in self.verdicts) and any(verdict.examined for verdict in self.verdicts)
        return "held" if enough else "inconclusive"
