"""A broker that was a coordinator, stood still, and has not heard that another one is: it answers, and what it says is of old.

To say what is committed it needs no other broker. What its successor has written meanwhile it does not know.
"""

from __future__ import annotations

import struct
import threading
from typing import TYPE_CHECKING, Any

import pytest
from confluent_kafka import ElectionType
from confluent_kafka.admin import AdminClient

from kafka_guarantees._positions import Positions
from kafka_guarantees._transactional import AbortNeeded

from .conftest import fill
from .kafka_wire import END_TXN, GROUP, TRANSACTION, Held, Proxy, Wire, coordinator
from .world import World, in_thread, until

if TYPE_CHECKING:
    from collections.abc import Callable

    from kafka_guarantees import ExactlyOnce
    from kafka_guarantees.testing.local_kafka import LocalKafka

ANSWER = 20.0  # seconds
COUNT = 20  # messages at a time
COMMITTED = struct.pack(">ih", 0, 0)  # an answer to EndTxn v1


# -- of a group ---------------------------------------------------------------------------------------------------------


class Placed:
    """A world in a cluster, of which the coordinator of the group, and nothing else, is with one broker: the former one."""

    def __init__(self, kafka: LocalKafka, fresh: Callable[[str], str]) -> None:
        self._kafka = kafka
        self._fresh = fresh
        self._nodes = {self._address(n): n for n in range(kafka.brokers)}
        self._admin = AdminClient({"bootstrap.servers": kafka.bootstrap})
        self.world = World("", "", "", 1, "")
        until(self._apart, "a group and a transactional.id have two coordinators")
        self.others = [n for n in self._nodes.values() if n != self.former]
        self.world.bootstrap = kafka._address(self.others[0])  # who begins there does not wait for one that stands still
        self.world.source, self.world.sink = self._topic(), self._topic()

    def _apart(self) -> bool:
        """Take other names. Behind other tests one broker may lead all."""
        self._admin.elect_leaders(ElectionType.PREFERRED).result(ANSWER)
        self.world.group, self.world.transactional_id = self._fresh("group"), self._fresh("tx")
        heard = {self._coordinator(n, self.world.group, GROUP) for n in self._nodes.values()}
        self.former = heard.pop()
        return not heard and self._coordinator(0, self.world.transactional_id, TRANSACTION) != self.former

    def _topic(self) -> str:
        """One that another broker leads."""
        topic = self._fresh("topic")
        self._kafka.create_topic(topic)
        leader = self._admin.list_topics(topic, timeout=ANSWER).topics[topic].partitions[0].leader
        return topic if leader != self.former else self._topic()

    def _address(self, n: int) -> tuple[str, int]:
        host, port = self._kafka._address(n).rsplit(":", 1)
        return host, int(port)

    def _coordinator(self, asked: int, key: str, kind: int) -> int:
        """The number of a broker, as another one has heard."""
        return self._nodes[coordinator(self._address(asked), key, kind)]

    def complete(self) -> None:
        """Wait for what is written behind a commit: without the markers of a frozen broker no new producer would begin."""
        Wire(self.world.bootstrap, self.world.transactional_id).wait_for("CompleteCommit")

    def freeze(self) -> None:
        """The coordinator stands still, until another one is elected."""
        self._kafka.pause(self.former)
        asked = self.others[0]
        until(lambda: self._coordinator(asked, self.world.group, GROUP) != self.former, "another coordinator was elected")

    def thaw(self, answered: threading.Event) -> None:
        """It runs again, and hears nothing of the others until it has answered."""
        for n in self.others:
            self._kafka.pause(n)
        self._kafka.resume(self.former)
        answered.wait(ANSWER)
        self.heal()

    def heal(self) -> None:
        for n in self._nodes.values():
            self._kafka.resume(n)


class Questions:
    """What a member is told when it asks how far the group is, once ``armed``."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, source: str) -> None:
        self.armed = False
        self.asked = threading.Event()
        self.answered = threading.Event()
        self.answers: list[int] = []
        ask = Positions.asked

        def asked(positions: Positions, question: Callable[[Any, float], Any], **limit: Any) -> Any:
            if self.armed:
                self.asked.set()
            answer = ask(positions, question, **limit)
            if self.armed and isinstance(answer, list):
                self.answers += [place.offset for place in answer if place.topic == source]
                self.answered.set()
            return answer

        monkeypatch.setattr(Positions, "asked", asked)


def abort_next(client: ExactlyOnce, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have its next transaction aborted: the messages are fetched again, and so the group is asked how far it is."""
    producer = client._producer
    flush = producer.flush

    def once() -> None:
        monkeypatch.setattr(producer, "flush", flush)
        raise AbortNeeded("for the test")

    monkeypatch.setattr(producer, "flush", once)


@pytest.mark.cluster
def test_x13_offsets_of_a_former_coordinator_are_not_gone_back_to(
    kafka_cluster: LocalKafka,
    fresh: Callable[[str], str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """X13: what was committed at its successor would be handled twice, and both times be visible.

    The producer has found the successor, and has committed there. The consumer still asks the former one, which is frozen, and
    answers as soon as it runs: before it hears from the others that it is no coordinator. So do members of the classic
    protocol; those of KIP-848 look for another coordinator where a heartbeat is not answered for a second.
    """
    caplog.set_level("INFO", "kafka_guarantees")
    placed = Placed(kafka_cluster, fresh)
    world = placed.world
    told = Questions(monkeypatch, world.source)
    client = world.client(transactions_in_flight=1)
    ended = in_thread(lambda: client.run([world.source], world.copy))

    written = [b"%06d" % number for number in range(3 * COUNT)]

    def write(first: int) -> None:
        fill(world.bootstrap, world.source, written[first : first + COUNT], idempotent=False)

    def commits(offset: int) -> None:
        until(lambda: client._places._claimed.get((world.source, 0)) == offset, f"{offset} messages are committed")

    try:
        write(0)
        commits(COUNT)
        placed.complete()
        placed.freeze()
        client._producer._state.disturb("its connection to the coordinator is cut")  # a new producer finds the successor
        write(COUNT)
        commits(2 * COUNT)
        told.armed = True
        abort_next(client, monkeypatch)
        write(2 * COUNT)
        assert told.asked.wait(ANSWER), "nobody has asked"
        placed.thaw(told.answered)
        assert COUNT in told.answers, "the former coordinator has not answered: then this test shows nothing"
        until(lambda: world.committed() == [3 * COUNT], "all is committed")
    finally:
        placed.heal()
        client.stop()
        error = ended()
        client.close()
    assert error is None
    assert world.output() == written
    assert f"the group is at offset {COUNT} of" in caplog.text


# -- of a transaction ---------------------------------------------------------------------------------------------------


@pytest.mark.broker
@pytest.mark.parametrize("in_flight", [1, 3])
def test_x09_a_commit_that_a_former_coordinator_confirms_is_found_out(world: Callable[..., World], in_flight: int) -> None:
    """X09: the group would go on behind messages whose outputs are aborted by the next producer: they would be lost.

    The connection to the coordinator is cut in the moment of the commit. librdkafka asks again, by chance a broker that was the
    coordinator, for which the same producer has committed one before. It says so, and commits nothing: the proxy speaks for it.
    """
    place, confirmed = world(), threading.Event()

    def confirm(again: Held) -> None:
        again.answer(COMMITTED)
        confirmed.set()

    def cut(first: Held) -> None:
        proxy.hold_next(END_TXN, confirm)
        proxy.cut()

    with Proxy(place.bootstrap) as proxy:
        client = place.client(bootstrap_servers=proxy.bootstrap, transactions_in_flight=in_flight)
        ended = in_thread(lambda: client.run([place.source], place.copy))
        try:
            written = place.fill(COUNT)
            until(lambda: place.committed() == place.ends, "some are committed")
            proxy.hold_next(END_TXN, cut)
            written += place.fill(COUNT)
            assert confirmed.wait(ANSWER), "the commit was not sent again: then this test shows nothing"
            written += place.fill(COUNT)
            until(lambda: place.committed() == place.ends, "all is committed")
        finally:
            client.stop()
            error = ended()
            client.close()
    assert error is None
    assert place.output() == written
