"""Models of a store and of an inbox, and Hypothesis, which looks for calls that are answered otherwise."""

# ruff: noqa: S101 - a suite of tests

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test

from kafka_guarantees.dedup.contract import DedupStore, Entry, Item, Outcome, Source
from kafka_guarantees.dedup.ids import key_of, position_of

if TYPE_CHECKING:
    from random import Random

    from kafka_guarantees.dedup.contract import Takeover

# The same examples each time: a store that passes today passes tomorrow.
EFFORT = settings(
    max_examples=60,
    stateful_step_count=25,
    deadline=None,
    derandomize=True,
    database=None,
    phases=(Phase.generate, Phase.shrink),  # explaining takes minutes where each step is a file or a server
    suppress_health_check=list(HealthCheck),
)

RETENTION = 100.25  # seconds; with leases of a half and waits of whole seconds nothing ends in the instant of a call
LEASES = (10.5, 40.5, 500.5)
WAITS = (1.0, 12.0, 60.0, 150.0, 400.0)


@dataclass
class Claimed:
    token: bytes
    position: bytes
    until: float
    certain: bool = True  # not after a purge that may have removed it, once its lease was over


@dataclass
class Completed:
    fingerprint: bytes
    certain_until: float
    gone_after: float  # and a purge


State = Claimed | Completed | None


class StoreModel:
    """What is known of each id. Where the contract leaves freedom, several answers are right, and the given one is believed."""

    def __init__(self) -> None:
        self.now = 0.0
        self.states: dict[tuple[str, bytes], State] = {}

    def outcomes(self, state: State, item: Item, token: bytes, takeover: Takeover) -> set[Outcome]:
        if state is None:
            return {Outcome.NEW}
        if isinstance(state, Completed):
            differ = state.fingerprint and item.fingerprint and state.fingerprint != item.fingerprint
            known = Outcome.MISMATCH if differ else Outcome.DUPLICATE
            return {known} if self.now < state.certain_until else {known, Outcome.NEW}
        if state.token == token:
            return {Outcome.NEW}
        if not self.certain(state):
            return {Outcome.NEW, Outcome.TAKEN_OVER}
        if state.until < self.now or (takeover == "position" and state.position == item.position):
            return {Outcome.TAKEN_OVER}
        return {Outcome.IN_PROGRESS}

    def certain(self, claim: Claimed) -> bool:
        return claim.certain and self.now < claim.until + RETENTION

    def claim(self, scope: str, item: Item, token: bytes, lease: float, *, takeover: Takeover, answer: Outcome) -> None:
        right = self.outcomes(self.states.get((scope, item.key)), item, token, takeover)
        assert answer in right, f"{answer!r} instead of {right}"
        if answer in {Outcome.NEW, Outcome.TAKEN_OVER}:
            self.states[scope, item.key] = Claimed(token, item.position, self.now + lease)

    def complete(self, scope: str, item: Item, token: bytes, answer: bool) -> None:  # noqa: FBT001
        state = self.states.get((scope, item.key))
        if isinstance(state, Completed):
            assert answer or self.now > state.certain_until
            if answer and self.now > state.certain_until:
                state.gone_after = self.now + 3 * RETENTION
        elif state is None or state.token != token:
            assert not answer
        else:
            assert answer or not self.certain(state)
            self.states[scope, item.key] = (
                Completed(item.fingerprint, self.now + RETENTION, self.now + 3 * RETENTION) if answer else None
            )

    def release(self, scope: str, item: Item, token: bytes) -> None:
        state = self.states.get((scope, item.key))
        if isinstance(state, Claimed) and state.token == token:
            del self.states[scope, item.key]

    def purge(self) -> None:
        for key, state in list(self.states.items()):
            if isinstance(state, Claimed) and state.until < self.now:
                state.certain = False
            if isinstance(state, Completed) and state.gone_after < self.now:
                del self.states[key]

    def fingerprint(self, scope: str, item: Item) -> Item:
        """A completed id is completed again with the fingerprint that it has: no other would make sense."""
        state = self.states.get((scope, item.key))
        return item._replace(fingerprint=state.fingerprint) if isinstance(state, Completed) else item


ITEM = st.tuples(st.integers(0, 4), st.integers(0, 1), st.sampled_from([b"", b"11111111", b"22222222"]))
BATCH = st.lists(ITEM, min_size=1, max_size=4, unique_by=lambda one: one[0]).map(
    lambda batch: [Item(key_of(str(n)), position_of(bytes(16), place, n), fingerprint) for n, place, fingerprint in batch]
)
SCOPES = st.sampled_from(["a", "b"])
TAKEOVERS = st.sampled_from(["position", "lease"])
TOKENS = st.sampled_from([b"x" * 16, b"y" * 16, b"z" * 16])


class StoreMachine(RuleBasedStateMachine):
    """Makes calls, and tells the model what was answered."""

    def __init__(self, make: Callable[[timedelta, Callable[[], float]], DedupStore]) -> None:
        super().__init__()
        self.model = StoreModel()
        self.store = make(timedelta(seconds=RETENTION), lambda: 1_800_000_000 + self.model.now)

    @rule(scope=SCOPES, batch=BATCH, token=TOKENS, lease=st.sampled_from(LEASES), takeover=TAKEOVERS)
    def claim(self, scope: str, batch: list[Item], token: bytes, lease: float, takeover: Takeover) -> None:
        answers = self.store.claim(scope, batch, token=token, lease=lease, takeover=takeover)
        for item, answer in zip(batch, answers, strict=True):
            self.model.claim(scope, item, token, lease, takeover=takeover, answer=answer)

    @rule(scope=SCOPES, batch=BATCH, token=TOKENS)
    def complete(self, scope: str, batch: list[Item], token: bytes) -> None:
        batch = [self.model.fingerprint(scope, item) for item in batch]
        for item, answer in zip(batch, self.store.complete(scope, batch, token=token), strict=True):
            self.model.complete(scope, item, token, answer)

    @rule(scope=SCOPES, batch=BATCH, token=TOKENS)
    def release(self, scope: str, batch: list[Item], token: bytes) -> None:
        self.store.release(scope, batch, token=token)
        for item in batch:
            self.model.release(scope, item, token)

    @rule(seconds=st.sampled_from(WAITS))
    def wait(self, seconds: float) -> None:
        self.model.now += seconds

    @rule()
    def purge(self) -> None:
        self.store.purge()
        self.model.purge()

    def teardown(self) -> None:
        self.store.close()


def try_store(make: Callable[[timedelta, Callable[[], float]], DedupStore]) -> None:
    """Raise where a new store answers otherwise than the model."""

    class Machine(StoreMachine):
        def __init__(self) -> None:
            super().__init__(make)

    run_state_machine_as_test(Machine, settings=EFFORT)


# -- inboxes --------------------------------------------------------------------------------------------------------------

SOURCES = tuple(Source("model", bytes(16), partition) for partition in range(2))
Deliver = Callable[[str, Sequence[Entry], "int | None", bool], "list[int] | None"]
_numbers = itertools.count()


class InboxModel:
    """Which ids are known, and the next offset of each partition."""

    def __init__(self) -> None:
        self.ids: set[bytes] = set()
        self.next: dict[Source, int] = {}

    def fresh(self, batch: Sequence[Entry]) -> list[int]:
        found, seen = [], set(self.ids)
        for index, entry in enumerate(batch):
            if entry.offset >= self.next.get(entry.source, 0) and entry.key not in seen:
                found.append(index)
                if entry.key is not None:
                    seen.add(entry.key)
        return found

    def commit(self, batch: Sequence[Entry], handled: int | None) -> None:
        fresh = self.fresh(batch)
        done = fresh if handled is None else fresh[:handled]
        left = {batch[index] for index in set(fresh) - set(done)}
        unknown = {entry.key for entry in left} - {None}
        self.ids |= {key for index in done if (key := batch[index].key) is not None}
        stopped = set()
        for entry in batch:
            if entry.offset >= self.next.get(entry.source, 0):
                stopped |= {entry.source} if entry in left or entry.key in unknown else set()
                if entry.source not in stopped:
                    self.next[entry.source] = entry.offset + 1


class InboxMachine(RuleBasedStateMachine):
    """Two partitions whose logs grow, and batches of them."""

    def __init__(self, deliver: Deliver, next_offset: Callable[[str, Source], int | None]) -> None:
        super().__init__()
        self.scope = f"example {next(_numbers)}"
        self.model = InboxModel()
        self.logs: dict[Source, list[Entry]] = {source: [] for source in SOURCES}
        self.deliver_to = deliver
        self.next_offset = next_offset

    @rule(source=st.sampled_from(SOURCES), names=st.lists(st.sampled_from(["", "a", "b", "c", "d"]), min_size=1, max_size=4))
    def send(self, source: Source, names: list[str]) -> None:
        log = self.logs[source]
        log += [Entry(source, len(log) + number, key_of(name) if name else None) for number, name in enumerate(names)]

    @precondition(lambda self: any(self.logs.values()))
    @rule(
        back=st.tuples(st.integers(0, 3), st.integers(0, 3)),
        counts=st.tuples(st.integers(0, 5), st.integers(0, 5)),
        handled=st.none() | st.integers(0, 4),
        fail=st.sampled_from([False, False, False, True]),
        order=st.randoms(use_true_random=False),
    )
    def deliver(self, back: Sequence[int], counts: Sequence[int], handled: int | None, fail: bool, order: Random) -> None:  # noqa: FBT001
        """Some messages of both partitions, the last few once more, in the order of each and in any order between them."""
        queues = []
        for source, rewind, count in zip(SOURCES, back, counts, strict=True):
            start = max(0, self.model.next.get(source, 0) - rewind)
            queues.append(self.logs[source][start : start + count])
        batch = []
        while any(queues):
            batch.append(order.choice([queue for queue in queues if queue]).pop(0))
        expected = self.model.fresh(batch)
        handled = handled if handled is None else min(handled, len(expected))
        answer = self.deliver_to(self.scope, batch, handled, fail)
        if not fail:
            assert answer == expected
            self.model.commit(batch, handled)
        for source in SOURCES:
            assert (self.next_offset(self.scope, source) or 0) == self.model.next.get(source, 0)


def try_inbox(deliver: Deliver, next_offset: Callable[[str, Source], int | None]) -> None:
    """Raise where an inbox answers otherwise than the model. Each example has a scope of its own."""

    class Machine(InboxMachine):
        def __init__(self) -> None:
            super().__init__(deliver, next_offset)

    run_state_machine_as_test(Machine, settings=EFFORT)
