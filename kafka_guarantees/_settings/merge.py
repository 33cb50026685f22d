"""From a guarantee and the user's dict to what each client gets, or to an error that says why not.

    names -> values -> presets and overrides -> refusals -> librdkafka's own opinion -> orders -> sides, or an explanation

Rules. The tables are in other files; here they are walked. No network. The user's dict is read once and never changed
(Y13). Properties go by their one name from the first step on. No value leaves this file in a text unless
``values.shown`` lets it (S01).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ..errors import UnsafeConfigError
from . import librdkafka
from .explanation import (
    BY_GUARANTEE,
    BY_LIBRDKAFKA,
    BY_LOCK,
    BY_USER,
    COMMITTED,
    NOTABLE,
    STARTS,
    Explanation,
    Row,
)
from .names import USER_CALLBACKS, refuse_name
from .presets import PRESETS, Guarantee, Kind, Preset
from .properties import ALIASES, BOTH, CONSUMER, PRODUCER, PROPERTIES, canonical
from .refusals import (
    BROKERS_WITH_KIP_848,
    ORDERS,
    REFUSALS,
    WEAKENINGS,
    Order,
    Refusal,
    Weakening,
    milliseconds,
)
from .values import HIDDEN, Value, normalise, shown, shown_raw

_DEFAULT_SESSION_MS = 45_000  # librdkafka's and the broker's (KIP-735)
_COMMIT_INTERVAL = 0.1  # seconds: fits every transaction.timeout.ms that librdkafka takes

# Who gives tokens where there is no oauth_cb: librdkafka, and confluent-kafka, which makes an oauth_cb of its own for AWS.
_GIVE_TOKENS = {
    "sasl.oauthbearer.method": "oidc",
    "enable.sasl.oauthbearer.unsecure.jwt": "true",
    "sasl.oauthbearer.metadata.authentication.type": "aws_iam",
}
_OF_TOKENS = frozenset({"oauth_cb", "security.protocol", "sasl.mechanism", *_GIVE_TOKENS})


@dataclass(frozen=True)
class Settings:
    """Everything that the clients of one guarantee need. ``repr`` shows no value that could be a secret.

    Attributes:
        guarantee: which one.
        producer: for ``confluent_kafka.Producer``; the caller adds callbacks.
        consumer: for ``confluent_kafka.Consumer``; the caller adds callbacks.
        admin: for ``confluent_kafka.admin.AdminClient``: what reaches the cluster.
        group_id: the consumer group, if there is one.
        transactional_id: the id that fences older instances (exactly-once).
        max_poll_interval: seconds until the group gives a silent member's partitions away.
        session_timeout: seconds without a heartbeat until the group counts a member as dead.
        retry_backoff: seconds after which librdkafka sends a request again, at first.
        fetch_wait: seconds that a broker may keep a fetch, and with it what is asked by the same connection after it.
        delivery_timeout: seconds a record is tried; infinite if the user asked for 0.
        transaction_timeout: seconds until the coordinator aborts a transaction; 0 without transactions.
        callbacks: what the user gave of ``USER_CALLBACKS``; only ``oauth_cb`` is also in the dicts.
    """

    guarantee: Guarantee
    producer: Mapping[str, object] = field(repr=False)
    consumer: Mapping[str, object] = field(repr=False)
    admin: Mapping[str, object] = field(repr=False)
    group_id: str | None
    transactional_id: str | None
    max_poll_interval: float
    session_timeout: float
    retry_backoff: float
    fetch_wait: float
    delivery_timeout: float
    transaction_timeout: float
    callbacks: Mapping[str, Callable[..., Any]] = field(repr=False)


def resolve(
    guarantee: Guarantee,
    config: Mapping[str, object],
    *,
    commit_interval: float = _COMMIT_INTERVAL,
) -> Settings:
    """Merge the user's dict with what the guarantee sets.

    Args:
        guarantee: which one.
        config: librdkafka's properties, for both sides.
        commit_interval: seconds after which a transaction is closed (exactly-once only).

    Raises:
        TypeError: ``config`` is not a mapping.
        UnsafeConfigError: a setting breaks the guarantee, or nobody knows it.
    """
    merged = _merge(guarantee, config, commit_interval, for_client=True)
    for weakening in merged.weaker:
        if weakening.warning is not None:
            warnings.warn(merged.sentence(weakening), weakening.warning, stacklevel=3)  # the line that makes the client
    return merged.settings()


def explain(guarantee: Guarantee, config: Mapping[str, object] | None = None) -> Explanation:
    """What the guarantee sets, with the user's dict on top if there is one. Needs no broker and no ids.

    Raises:
        TypeError: ``config`` is not a mapping.
        UnsafeConfigError: as the constructor would.
    """
    return _merge(guarantee, {} if config is None else config, _COMMIT_INTERVAL, for_client=False).explanation()


def _merge(guarantee: Guarantee, config: Mapping[str, object], commit_interval: float, *, for_client: bool) -> _Merged:
    """The dict on its way through the tables; all that is wrong with it is one error.

    What is refused is left out, and the rest is looked at once more.
    """
    refused: dict[str, UnsafeConfigError] = {}
    left = config
    while True:
        try:
            merged = _Merged(guarantee, left, commit_interval)
            merged.check_tokens(refused, for_client=for_client)
            if for_client:
                merged.require(refused)
        except UnsafeConfigError as error:
            if error.setting in refused:
                break
            refused[error.setting] = error
            left = {name: value for name, value in left.items() if name != error.setting}
        else:
            if not refused:
                return merged
            break
    first, *others = refused.values()
    first.others = tuple(others)
    raise first


class _Merged:
    """One guarantee and one dict, on their way through the tables."""

    def __init__(self, guarantee: Guarantee, config: Mapping[str, object], commit_interval: float) -> None:
        self.guarantee = guarantee
        self.callbacks, self.spelled = _read(config)
        self.given = {name: entry.value for name, entry in self.spelled.items()}
        self.kip_848 = self.given.get("group.protocol", _DEFAULTS["group.protocol"]) == "consumer"
        elsewhere = BROKERS_WITH_KIP_848 if self.kip_848 else ()
        rows = [r for r in PRESETS if guarantee in r.guarantees and r.setting not in elsewhere]
        self.presets: dict[str, Preset] = {}
        for row in rows:
            self.presets.setdefault(row.setting, row)
        self.beside = [row for row in rows if row is not self.presets[row.setting]]  # of the other side, where it has its own
        self.set = {name: self._preset_value(row) for name, row in self.presets.items()}
        for name in self.presets.keys() & self.given.keys():
            if self.presets[name].kind is Kind.ADDED:
                self.given[name] = normalise(name, f"{self.set[name]},{self.given[name]}")
        self.effective = {**_DEFAULTS, **self.set, **self.given}
        self._refuse()
        librdkafka.check({**self.given, **self.set, **self.given})
        self._refuse_orders(commit_interval)
        self.weaker = [row for row in WEAKENINGS if self._applies(row)]

    def require(self, refused: Container[str]) -> None:
        """What a client needs and an explanation does not; not again what was given and is refused."""
        if "bootstrap.servers" not in self.given and "bootstrap.servers" not in refused:
            raise UnsafeConfigError(
                "bootstrap.servers", None, "there is no broker to connect to", "give host:port, comma-separated"
            )
        needed = self.guarantee is Guarantee.EXACTLY_ONCE and "transactional.id" not in refused
        if needed and "transactional.id" not in self.given:
            raise UnsafeConfigError(
                "transactional.id",
                None,
                "exactly-once needs it: with this id a new start of an instance shuts out what is left of the old one",
                "give one that is stable per instance and unique among instances, for example "
                '"<service>-<StatefulSet ordinal>"; never random at each start and never the process id, '
                "which fence nothing",
            )

    def check_tokens(self, refused: Iterable[str], *, for_client: bool) -> None:
        """Who asks for tokens, and who gives them, belong together: the one waits for the other, and librdkafka for ever.

        A client needs a giver, and an explanation does not, as of a file, which has no functions. Nothing is said of it where
        one of the settings that decide it is refused.
        """
        if not _OF_TOKENS.isdisjoint(map(canonical, refused)):
            return
        sasl = self.effective["security.protocol"] in {"sasl_plaintext", "sasl_ssl"}
        asked = sasl and self.effective["sasl.mechanism"] == "OAUTHBEARER"
        if "oauth_cb" in self.callbacks and not asked:
            raise UnsafeConfigError(
                "oauth_cb",
                HIDDEN,
                "only sasl.mechanism=OAUTHBEARER, with a security.protocol that has SASL, asks it: confluent-kafka would wait "
                "for a token, and make no client",
                "set both, or leave it out",
            )
        given = "oauth_cb" in self.callbacks or any(self.effective.get(name) == value for name, value in _GIVE_TOKENS.items())
        if for_client and asked and not given:
            raise self._error(
                "sasl.mechanism",
                "nobody gives it tokens, and librdkafka would wait for one for ever",
                "give oauth_cb, or sasl.oauthbearer.method=oidc and its settings",
            )

    def sentence(self, row: Weakening) -> str:
        """The warning for one weakening."""
        return f"{row.setting}={shown(row.setting, self.given[row.setting])}: {row.costs} ({self.guarantee.value})"

    def settings(self) -> Settings:
        """The result for the clients."""
        oauth = {name: value for name, value in self.callbacks.items() if name == "oauth_cb"}
        transactions = self.guarantee is Guarantee.EXACTLY_ONCE
        consumer = self._side(CONSUMER)
        return Settings(
            guarantee=self.guarantee,
            producer={**self._side(PRODUCER), **oauth},
            consumer={**consumer, **oauth},
            admin={**{name: value for name, value in consumer.items() if side_of(name) == BOTH}, **oauth},
            group_id=_text(self.given.get("group.id")),
            transactional_id=_text(self.given.get("transactional.id")),
            max_poll_interval=self._seconds("max.poll.interval.ms"),
            session_timeout=_DEFAULT_SESSION_MS / 1000 if self.kip_848 else self._seconds("session.timeout.ms"),
            delivery_timeout=self._seconds("delivery.timeout.ms"),
            transaction_timeout=self._seconds("transaction.timeout.ms") if transactions else 0.0,
            retry_backoff=min(self._seconds("retry.backoff.ms"), self._seconds("retry.backoff.max.ms")),
            fetch_wait=self._seconds("fetch.wait.max.ms"),
            callbacks=self.callbacks,
        )

    def explanation(self) -> Explanation:
        """The result for people."""
        marked = {row.setting: row.costs for row in self.weaker}
        rows = [
            *(self._preset_row(row, marked) for row in self.presets.values()),
            *(self._beside_row(row) for row in self.beside if row.setting not in self.given),
            *self._position_rows(),
            *(self._user_row(name, marked) for name in self.given if name not in self.presets),
            *self._default_rows(),
        ]
        return Explanation(self.guarantee, tuple(rows), tuple(self.sentence(row) for row in self.weaker))

    def _preset_value(self, row: Preset) -> Value:
        return row.value(self.given) if callable(row.value) else row.value

    def _applies(self, row: Refusal | Weakening) -> bool:
        name = row.setting
        return self.guarantee in row.guarantees and name in self.given and row.when(self.given[name], self.effective)

    def _refuse(self) -> None:
        for name, preset in self.presets.items():
            if preset.kind is Kind.LOCKED and self.given.get(name, self.set[name]) != self.set[name]:
                raise self._error(name, preset.breaks, preset.instead)
        for refusal in REFUSALS:
            if self._applies(refusal):
                raise self._error(refusal.setting, refusal.breaks, refusal.instead)
        for name in BROKERS_WITH_KIP_848 if self.kip_848 else ():
            if name in self.given:
                raise self._error(
                    name,
                    "with group.protocol=consumer (KIP-848) the broker decides it for the whole group",
                    "leave it out and set it on the broker or the group, or use group.protocol=classic",
                )

    def _refuse_orders(self, commit_interval: float) -> None:
        for order in ORDERS:
            elsewhere = self.kip_848 and not {order.shorter, order.longer}.isdisjoint(BROKERS_WITH_KIP_848)
            if self.guarantee in order.guarantees and not elsewhere:
                self._refuse_order(order)
        if self.guarantee is Guarantee.EXACTLY_ONCE:
            self._refuse_commit_interval(commit_interval)

    def _refuse_order(self, order: Order) -> None:
        short, long = milliseconds(self.effective, order.shorter), milliseconds(self.effective, order.longer)
        if short + order.margin < long or (order.equal and short + order.margin == long):
            return
        relation = f"at least {order.margin} ms below" if order.margin else "at most" if order.equal else "below"
        blamed = order.shorter if order.shorter in self.given else order.longer
        raise self._error(
            blamed,
            f"{order.shorter} ({_ms(short)}) must be {relation} {order.longer} ({_ms(long)}): {order.breaks}",
            f"lower {order.shorter} or raise {order.longer}",
        )

    def _refuse_commit_interval(self, seconds: object) -> None:
        limit = self._seconds("transaction.timeout.ms")
        if isinstance(seconds, (int, float)) and not isinstance(seconds, bool) and 0 < seconds < limit:
            return
        raise UnsafeConfigError(
            "commit_interval",
            shown_raw("linger.ms", seconds),  # shown as any number is
            f"it must be a number of seconds above 0 and below transaction.timeout.ms ({_ms(limit * 1000)}): "
            "the coordinator would abort each transaction before it is committed",
            "lower commit_interval or raise transaction.timeout.ms",
        )

    def _error(self, name: str, breaks: str, instead: str) -> UnsafeConfigError:
        spelled, raw, _ = self.spelled.get(name) or _Given(name, self.effective.get(name), "")
        return UnsafeConfigError(spelled, shown_raw(name, raw), f"{breaks} ({self.guarantee.value})", instead)

    def _seconds(self, name: str) -> float:
        return milliseconds(self.effective, name) / 1000

    def _side(self, side: str) -> dict[str, object]:
        presets = {name: value for name, value in self.set.items() if self.presets[name].side in {side, BOTH}}
        given = {name: value for name, value in self.given.items() if side_of(name) in {side, BOTH}}
        beside = {row.setting: self._preset_value(row) for row in self.beside if row.side == side}
        return {**presets, **beside, **given}

    def _preset_row(self, row: Preset, marked: Mapping[str, str]) -> Row:
        name = row.setting
        if row.kind is Kind.LOCKED:
            return Row(name, shown(name, self.set[name]), BY_LOCK, row.side, row.why)
        if name in self.given:
            return self._user_row(name, marked)
        return Row(name, shown(name, self.set[name]), BY_GUARANTEE, row.side, row.why)

    def _beside_row(self, row: Preset) -> Row:
        return Row(row.setting, shown(row.setting, self._preset_value(row)), BY_GUARANTEE, row.side, row.why)

    def _user_row(self, name: str, marked: Mapping[str, str]) -> Row:
        why = marked.get(name) or (self.presets[name].why if name in self.presets else NOTABLE.get(name, ""))
        return Row(name, shown(name, self.given[name]), BY_USER, side_of(name), why, name in marked)

    def _position_rows(self) -> list[Row]:
        start, why_start = STARTS[self.guarantee]
        committed, why_committed = COMMITTED[self.guarantee]
        rows = [
            Row("start", start, BY_GUARANTEE, CONSUMER, why_start),
            Row("offsets are committed", committed, BY_LOCK, CONSUMER, why_committed),
        ]
        if self.guarantee is Guarantee.EXACTLY_ONCE and "transactional.id" not in self.given:
            rows.append(Row("transactional.id", "(yours to give)", BY_USER, PRODUCER, "required: stable and unique"))
        return rows

    def _default_rows(self) -> list[Row]:
        return [
            Row(name, shown(name, _DEFAULTS[name]), BY_LIBRDKAFKA, side, why)
            for name, why in NOTABLE.items()
            if name not in self.given and not (self.kip_848 and name in BROKERS_WITH_KIP_848)
            for side in self._sides_left(name)
        ]

    def _sides_left(self, name: str) -> list[str]:
        """The side that takes librdkafka's default although the other has a preset."""
        whole = side_of(name)
        if name not in self.presets:
            return [whole]
        preset = self.presets[name].side
        beside = any(row.setting == name for row in self.beside)
        return [] if preset == whole or beside else [CONSUMER if preset == PRODUCER else PRODUCER]


class _Given(NamedTuple):
    """A setting of the user's: the name and the value as they were written, and the value in its one spelling."""

    name: str
    raw: object
    value: Value


def _read(config: Mapping[str, object]) -> tuple[dict[str, Callable[..., Any]], dict[str, _Given]]:
    """The user's callbacks, and the user's settings by their one name."""
    if not isinstance(config, Mapping):
        raise TypeError(f"config is a dict of librdkafka's properties, not {type(config).__name__}")
    callbacks: dict[str, Callable[..., Any]] = {}
    given: dict[str, _Given] = {}
    taken = dict(config)
    for name, value in taken.items():
        refuse_name(name, taken)
        if name in USER_CALLBACKS:
            callbacks[name] = _callback(name, value)
        else:
            _add(given, name, value)
    return callbacks, given


def _add(given: dict[str, _Given], name: str, raw: object) -> None:
    one = canonical(name)
    if one == "partitioner" and callable(raw):
        raise UnsafeConfigError(
            name,
            HIDDEN,
            "librdkafka cannot call a partitioner written in Python",
            "give each record its partition, or name one of librdkafka's partitioners",
        )
    value = normalise(one, raw, name)
    if one in given and given[one].value != value:
        names = " and ".join(sorted({one, *(alias for alias, of in ALIASES.items() if of == one)}))
        raise UnsafeConfigError(
            name,
            shown_raw(one, raw),
            f"{names} are one setting, and two different values are given",
            "give one of them",
        )
    given.setdefault(one, _Given(name, raw, value))


def _callback(name: str, value: object) -> Callable[..., Any]:
    if name == "logger" and callable(getattr(value, "log", None)):
        return value  # type: ignore[return-value]  # a logging.Logger: kept among the callbacks as it is
    if name == "logger" or not callable(value):
        need = "a logging.Logger" if name == "logger" else "a function"
        raise UnsafeConfigError(name, HIDDEN, f"it is not {need}", f"give {need}")
    return value


def side_of(name: str) -> str:
    """Whether a property is read by producers, consumers, or both: as those are that reach the cluster."""
    # a property that only a newer librdkafka knows goes to both: each side ignores what it does not read
    return PROPERTIES[name].side if name in PROPERTIES else BOTH


def _ms(number: float) -> str:
    return "no limit" if math.isinf(number) else f"{number:.15g} ms"


def _text(value: Value | None) -> str | None:
    return None if value is None else str(value)


def _default(name: str) -> Value:
    return normalise(name, PROPERTIES[name].default)


_DEFAULTS: dict[str, Value] = {name: _default(name) for name, row in PROPERTIES.items() if row.default}
