"""Over SASL_SSL with Kafka's own authorizer: the ACLs of docs/security.md are enough, and each one that is missing is named."""

from __future__ import annotations

import base64
import json
import threading
import time
import warnings
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from confluent_kafka import KafkaException
from confluent_kafka.admin import (  # type: ignore[attr-defined] # not re-exported by its stubs
    AclBinding,
    AclBindingFilter,
    AclOperation,
    AclPermissionType,
    AdminClient,
    ResourcePatternType,
    ResourceType,
)

from kafka_guarantees import (
    AtLeastOnce,
    AtMostOnce,
    AuthorizationError,
    BrokerError,
    DeliveryError,
    DeliveryUnknown,
    ExactlyOnce,
    Record,
    SecurityWarning,
    TransactionAborted,
)
from kafka_guarantees._client import Handle, _Tokens
from kafka_guarantees.testing import LocalKafka

from .conftest import fill, read_all, values

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from confluent_kafka import Message

pytestmark = pytest.mark.broker

DEADLINE = 30.0  # seconds
IDLE = 0.1  # seconds without a message that end a run here
TEN = [str(number).encode() for number in range(10)]
REFUSED = (AuthorizationError, DeliveryError, DeliveryUnknown, TransactionAborted)  # which says what became of the records
Client = AtMostOnce | AtLeastOnce | ExactlyOnce


class Acl(NamedTuple):
    """What is granted: an operation, and the resource by the name that it has in ``Names``."""

    operation: str
    resource: str
    name: str

    def said(self, names: dict[str, str]) -> str:
        """How an error names it."""
        return f"{self.operation} on {self.resource} {names[self.name]!r} (kafka-acls.sh --add"


READ_SOURCE = Acl("READ", "topic", "source")
WRITE_TARGET = Acl("WRITE", "topic", "target")
DESCRIBE_TARGET = Acl("DESCRIBE", "topic", "target")
READ_GROUP = Acl("READ", "group", "group.id")
WRITE_ID = Acl("WRITE", "transactional.id", "transactional.id")
RESOURCES = {
    "topic": ResourceType.TOPIC,
    "group": ResourceType.GROUP,
    "transactional.id": ResourceType.TRANSACTIONAL_ID,
}


class Rights:
    """The ACLs of one user. Each change is waited for."""

    def __init__(self, kafka: LocalKafka, names: dict[str, str]) -> None:
        self._admin = AdminClient({"bootstrap.servers": kafka.bootstrap})
        self._names = names

    def grant(self, acls: list[Acl]) -> None:
        bindings = [self._binding(acl) for acl in acls]
        for future in self._admin.create_acls(bindings).values() if bindings else ():
            future.result(DEADLINE)
        for acl in acls:
            self._wait(acl, there=True)

    def revoke(self, acl: Acl) -> None:
        for future in self._admin.delete_acls([self._filter(acl)]).values():
            future.result(DEADLINE)
        self._wait(acl, there=False)

    def _binding(self, acl: Acl) -> AclBinding:
        operation = AclOperation[acl.operation]
        user, name = f"User:{self._names['user']}", self._names[acl.name]
        kind = RESOURCES[acl.resource]
        return AclBinding(kind, name, ResourcePatternType.LITERAL, user, "*", operation, AclPermissionType.ALLOW)

    def _filter(self, acl: Acl) -> AclBindingFilter:
        b = self._binding(acl)
        return AclBindingFilter(b.restype, b.name, b.resource_pattern_type, b.principal, b.host, b.operation, b.permission_type)

    def _wait(self, acl: Acl, *, there: bool) -> None:
        deadline = time.monotonic() + DEADLINE
        while bool(self._admin.describe_acls(self._filter(acl)).result(DEADLINE)) is not there:
            assert time.monotonic() < deadline, acl
            time.sleep(0.02)


OAUTH = {  # beside SCRAM; a token need not be signed here
    "sasl.enabled.mechanisms": "SCRAM-SHA-512,OAUTHBEARER",
    "listener.name.sasl_ssl.oauthbearer.sasl.jaas.config": (
        'org.apache.kafka.common.security.oauthbearer.OAuthBearerLoginModule required unsecuredLoginStringClaim_sub="broker";'
    ),
    "listener.name.sasl_ssl.oauthbearer.connections.max.reauth.ms": "10000",
}


@pytest.fixture(scope="module")
def secure() -> Iterator[LocalKafka]:
    with LocalKafka(security="sasl_ssl", config=OAUTH) as kafka:
        yield kafka


@pytest.fixture
def names(secure: LocalKafka, fresh: Callable[[str], str]) -> dict[str, str]:
    """Names that nobody has used; the topics exist."""
    names = {name: fresh(name) for name in ("user", "source", "target", "group.id", "transactional.id")}
    secure.create_topic(names["source"])
    secure.create_topic(names["target"])
    return names


@pytest.fixture
def config(secure: LocalKafka, names: dict[str, str]) -> dict[str, str]:
    """Of the user, who has no rights yet."""
    return secure.add_user(names["user"])


@pytest.fixture
def rights(secure: LocalKafka, names: dict[str, str]) -> Rights:
    return Rights(secure, names)


class Tokens:
    """Of a user, for ``oauth_cb``. They are soon over."""

    SECONDS = 2.0

    def __init__(self, user: str) -> None:
        self._user = user
        self.made = 0

    def __call__(self, _config: str) -> tuple[str, float]:
        self.made += 1
        now = time.time()
        over = now + self.SECONDS
        parts = ({"alg": "none"}, {"sub": self._user, "iat": now, "exp": over})
        encoded = [base64.urlsafe_b64encode(json.dumps(part).encode()).decode().rstrip("=") for part in parts]
        return ".".join([*encoded, ""]), over


def with_tokens(config: dict[str, str], oauth_cb: Callable[[str], tuple[str, float]]) -> dict[str, Any]:
    without = {name: value for name, value in config.items() if name not in {"sasl.username", "sasl.password"}}
    return {**without, "sasl.mechanism": "OAUTHBEARER", "oauth_cb": oauth_cb}


# -- each row of the table in docs/security.md ------------------------------------------------------------------------------


def client(guarantee: type[Client], config: dict[str, str], names: dict[str, str], **more: str) -> Any:
    """A client that reads from the beginning."""
    ids = ["group.id", "transactional.id"] if guarantee is ExactlyOnce else ["group.id"]
    return guarantee({**config, **{name: names[name] for name in ids}, **more}, start="earliest")


def run(service: Any, names: dict[str, str], handler: Callable[[Message], Any], idle: float | None = IDLE) -> None:
    """Run, for at most DEADLINE seconds."""
    guard = threading.Timer(DEADLINE, service.stop)
    guard.start()
    try:
        service.run([names["source"]], handler, until_idle=idle)
    finally:
        guard.cancel()
    assert not service._lifecycle.stopping, "the run did not end by itself"


class Use(NamedTuple):
    """A row: what is done with the library, and the ACLs that are enough for it."""

    guarantee: Any
    what: str
    acls: list[Acl]
    more: dict[str, str] = {}  # noqa: RUF012 - a row of a table

    def __str__(self) -> str:
        return "-".join([self.guarantee.__name__, self.what, *self.more.values()])

    def of(self, config: dict[str, str], names: dict[str, str]) -> list[bytes | None]:
        """Do it. Returns what came to the handler."""
        if self.what == "produce":
            self._produce(config, names)
            return []
        seen: list[bytes | None] = []

        def handler(message: Message) -> list[Record]:
            seen.append(message.value())
            return [Record(names["target"], message.value())] if self.what == "transform" else []

        with client(self.guarantee, config, names, **self.more) as service:
            run(service, names, handler)
        return seen

    def _produce(self, config: dict[str, str], names: dict[str, str]) -> None:
        if self.guarantee is ExactlyOnce:
            with (
                ExactlyOnce({**config, "transactional.id": names["transactional.id"]}) as service,
                service.transaction() as transaction,
            ):
                for value in TEN:
                    transaction.produce(names["target"], value)
            return
        with self.guarantee(config) as plain:
            for value in TEN:
                plain.produce(names["target"], value)
            plain.flush(DEADLINE)


KIP_848 = {"group.protocol": "consumer"}
COOPERATIVE = {"partition.assignment.strategy": "cooperative-sticky"}
CONSUME = [READ_SOURCE, READ_GROUP]
USES = [
    Use(AtMostOnce, "produce", [WRITE_TARGET]),
    Use(AtMostOnce, "consume", CONSUME),
    Use(AtMostOnce, "transform", [*CONSUME, WRITE_TARGET]),
    Use(AtLeastOnce, "produce", [WRITE_TARGET]),
    Use(AtLeastOnce, "consume", CONSUME),
    Use(AtLeastOnce, "consume", CONSUME, COOPERATIVE),
    Use(AtLeastOnce, "consume", CONSUME, KIP_848),
    Use(AtLeastOnce, "transform", [*CONSUME, WRITE_TARGET]),
    Use(ExactlyOnce, "produce", [WRITE_TARGET, WRITE_ID]),
    Use(ExactlyOnce, "transform", [*CONSUME, WRITE_TARGET, WRITE_ID]),
    Use(ExactlyOnce, "transform", [*CONSUME, WRITE_TARGET, WRITE_ID], KIP_848),
]
MISSING = [
    (use, acl, instead)
    for use in USES
    for acl in use.acls
    for instead in ("nothing", "DESCRIBE")
    # where at-most-once writes, a record may be lost without a word: it has tests of its own
    if not (use.guarantee is AtMostOnce and acl is WRITE_TARGET)
]


def check(use: Use, secure: LocalKafka, names: dict[str, str], seen: list[bytes | None]) -> None:
    """Everything was done, once."""
    if use.what != "produce":
        assert sorted(value or b"" for value in seen) == TEN
    if use.what != "consume":
        assert values(read_all(secure.bootstrap, names["target"])) == TEN


@pytest.mark.parametrize("use", USES, ids=str)
def test_the_listed_acls_are_enough(
    use: Use, secure: LocalKafka, names: dict[str, str], config: dict[str, str], rights: Rights
) -> None:
    """S02, S07: over SASL_SSL, deny by default, with exactly these ACLs: everything works."""
    fill(secure.bootstrap, names["source"], TEN)
    rights.grant(use.acls)
    check(use, secure, names, use.of(config, names))


@pytest.mark.parametrize(("use", "missing", "instead"), MISSING, ids=str)
def test_an_acl_that_is_missing_is_named_and_nothing_is_lost(
    *, use: Use, missing: Acl, instead: str, secure: LocalKafka, names: dict[str, str], config: dict[str, str], rights: Rights
) -> None:
    """S07: without it the error says which, and how to grant it; once it is granted, all is handled.

    With DESCRIBE alone the brokers let a client see the resource, and refuse it later.
    """
    fill(secure.bootstrap, names["source"], TEN)
    rights.grant([acl for acl in use.acls if acl is not missing])
    if instead == "DESCRIBE":
        rights.grant([missing._replace(operation="DESCRIBE")])
    with pytest.raises(REFUSED) as caught:
        use.of(config, names)
    assert missing.said(names) in str(caught.value)
    rights.grant([missing])
    check(use, secure, names, use.of(config, names))


@pytest.mark.parametrize("ids", [1, 2, 3])
def test_as_many_transactions_are_in_flight_as_acls_allow(  # noqa: PLR0917 - fixtures
    secure: LocalKafka,
    names: dict[str, str],
    config: dict[str, str],
    rights: Rights,
    caplog: pytest.LogCaptureFixture,
    ids: int,
) -> None:
    """S07: a producer whose id may not be used takes no turn, which is logged with the ACL that is missing; all is handled."""
    fill(secure.bootstrap, names["source"], TEN)
    names.update({f"id {number}": f"{names['transactional.id']}-in-flight-{number}" for number in range(1, ids)})
    more = [Acl("WRITE", "transactional.id", f"id {number}") for number in range(1, ids)]
    rights.grant([READ_SOURCE, READ_GROUP, WRITE_TARGET, WRITE_ID, *more])
    seen: list[bytes | None] = []

    def handler(message: Message) -> list[Record]:
        seen.append(message.value())
        return [Record(names["target"], message.value())]

    given = {**config, **{name: names[name] for name in ("group.id", "transactional.id")}}
    with ExactlyOnce(given, transactions_in_flight=3) as service:
        run(service, names, handler)
        assert [producer.raw is not None for producer in service._in_flight.producers] == [number < ids for number in range(3)]
    assert values(read_all(secure.bootstrap, names["target"])) == TEN
    said = [record.getMessage() for record in caplog.records if "transactions in flight" in record.getMessage()]
    assert [line.startswith(f"{ids} of 3 ") and f"-in-flight-{ids}'" in line for line in said] == [True] * (ids < 3)


@pytest.mark.parametrize("guarantee", [AtMostOnce, AtLeastOnce, ExactlyOnce])
def test_tokens_are_renewed_while_a_run_goes_on(
    guarantee: type[Client], secure: LocalKafka, names: dict[str, str], config: dict[str, str], rights: Rights
) -> None:
    """``oauth_cb`` is asked by every client that is made for a guarantee, and again before a token is over."""
    fill(secure.bootstrap, names["source"], TEN)
    rights.grant([*CONSUME, WRITE_TARGET, WRITE_ID])
    tokens, seen, first = Tokens(names["user"]), list[bytes | None](), list[int]()

    def handler(message: Message) -> list[Record]:
        first.append(tokens.made)
        seen.append(message.value())
        time.sleep(2 * Tokens.SECONDS / len(TEN))
        return [Record(names["target"], message.value())]

    with client(guarantee, with_tokens(config, tokens), names) as service:
        run(service, names, handler)
    assert seen == TEN
    assert values(read_all(secure.bootstrap, names["target"])) == TEN
    assert tokens.made > first[0]


def test_a_right_that_is_missing_is_named_while_a_transaction_is_still_produced(
    names: dict[str, str], config: dict[str, str], rights: Rights, secure: LocalKafka, caplog: pytest.LogCaptureFixture
) -> None:
    """S07: librdkafka takes no more records then, and says nothing of why: it would be made again and again."""
    fill(secure.bootstrap, names["source"], [b"%d" % number for number in range(2000)])
    rights.grant([*CONSUME, WRITE_ID, WRITE_TARGET._replace(operation="DESCRIBE")])
    with client(ExactlyOnce, config, names) as service, pytest.raises(AuthorizationError) as caught:
        service.run([names["source"]], lambda message: [Record(names["target"], message.value())] * 50)
    assert WRITE_TARGET.said(names) in str(caught.value)
    assert caplog.text.count("fetched again") <= 1


def test_at_most_once_says_that_it_may_not_write(names: dict[str, str], config: dict[str, str], rights: Rights) -> None:
    """S07: nobody asks for an acknowledgement, so the refusal of one record is raised by the next call."""
    with AtMostOnce(config) as service:
        service.produce(names["target"], b"lost")
        with pytest.raises(DeliveryError) as caught:
            service.flush(DEADLINE)
        assert WRITE_TARGET.said(names) in str(caught.value)
        rights.grant([WRITE_TARGET])
    with AtMostOnce(config) as service:
        service.produce(names["target"], b"sent")
        assert service.flush(DEADLINE) == 0


def test_at_most_once_reports_each_message_whose_record_it_may_not_write(
    secure: LocalKafka, names: dict[str, str], config: dict[str, str], rights: Rights
) -> None:
    """S07, M04: in a run the refusal goes to on_error, with the message that is dropped."""
    rights.grant(CONSUME)
    fill(secure.bootstrap, names["source"], [b"x"] * 1000)
    dropped: list[str] = []

    def on_error(_message: Message, error: Exception) -> None:
        dropped.append(str(error))
        service.stop()

    def handler(message: Message) -> list[Record]:
        time.sleep(0.01)  # the brokers have told of the first before the last is sent
        return [Record(names["target"], message.value())]

    with AtMostOnce({**config, "group.id": names["group.id"]}, start="earliest", on_error=on_error) as service:
        service.run([names["source"]], handler, until_idle=DEADLINE)
    assert WRITE_TARGET.said(names) in dropped[0]


@pytest.mark.parametrize(
    ("guarantee", "instead"),
    # with DESCRIBE alone at-most-once loses it without a word
    [(AtMostOnce, []), *((guarantee, acls) for guarantee in (AtLeastOnce, ExactlyOnce) for acls in ([], [DESCRIBE_TARGET]))],
)
def test_a_dead_letter_topic_needs_the_right_to_write_to_it(
    *, guarantee: type[Client], instead: list[Acl], secure: LocalKafka, names: dict[str, str], config: Any, rights: Rights
) -> None:
    """S07: and no other; without it nothing is passed over."""
    rights.grant([*CONSUME, WRITE_ID, *instead])
    fill(secure.bootstrap, names["source"], [b"poison"])
    ids = {name: names[name] for name in ("group.id", *(["transactional.id"] if guarantee is ExactlyOnce else []))}
    more: Any = {} if guarantee is AtMostOnce else {"retry": None}

    def once() -> None:
        with guarantee({**config, **ids}, start="earliest", dead_letter=names["target"], **more) as service:
            run(service, names, lambda message: int(message.value() or b""))

    with pytest.raises(REFUSED) as caught:
        once()
    assert WRITE_TARGET.said(names) in str(caught.value)
    rights.grant([WRITE_TARGET])
    once()
    assert values(read_all(secure.bootstrap, names["target"])) == [b"poison"]


# -- an ACL that is taken away in the middle ------------------------------------------------------------------------------

LOST = [
    (guarantee, acl, more)
    for guarantee, more in ((AtLeastOnce, {}), (ExactlyOnce, {}), (ExactlyOnce, KIP_848))
    for acl in (*CONSUME, WRITE_TARGET, *([WRITE_ID] if guarantee is ExactlyOnce else []))
]


@pytest.mark.parametrize(("guarantee", "lost", "more"), LOST, ids=lambda x: getattr(x, "__name__", str(x)))
def test_an_acl_that_is_taken_away_ends_the_run_and_nothing_is_lost(
    *,
    guarantee: type[Client],
    lost: Acl,
    more: dict[str, str],
    secure: LocalKafka,
    names: dict[str, str],
    config: dict[str, str],
    rights: Rights,
) -> None:
    """S07: the run ends with the ACL's name; once it is back, the rest is handled, and exactly-once repeats nothing."""
    rights.grant([*CONSUME, WRITE_TARGET, WRITE_ID])
    everything = [str(number).encode() for number in range(100)]
    fill(secure.bootstrap, names["source"], everything)
    seen: list[bytes | None] = []

    def handler(message: Message) -> list[Record]:
        seen.append(message.value())
        if len(seen) == 20:
            rights.revoke(lost)
        return [Record(names["target"], message.value())]

    more = more or {"session.timeout.ms": "6000"}  # a group that may not be left keeps its member for so long
    with pytest.raises(REFUSED) as caught, client(guarantee, config, names, **more) as service:
        run(service, names, handler, idle=None)
    assert lost.said(names) in str(caught.value)
    rights.grant([lost])
    deadline = time.monotonic() + DEADLINE
    while not set(everything) <= set(written := values(read_all(secure.bootstrap, names["target"]))):
        assert time.monotonic() < deadline
        with client(guarantee, config, names, **more) as service:
            run(service, names, handler)
    assert set(written) == set(everything)
    assert guarantee is AtLeastOnce or len(written) == len(everything)


# -- who is not let in ----------------------------------------------------------------------------------------------------

SHUT_OUT = {
    "password": ({"sasl.password": "wrong"}, "_AUTHENTICATION", "sasl.password"),
    "host name": ({"bootstrap.servers": "localhost"}, "_SSL", "host names"),
    "authority": ({"ssl.ca.location": ""}, "_SSL", "ssl.ca.location"),
}


@pytest.fixture
def shut_out(config: dict[str, str], request: pytest.FixtureRequest) -> dict[str, str]:
    """The configuration of a user, with one thing wrong."""
    wrong = dict(SHUT_OUT[request.param][0])
    if "bootstrap.servers" in wrong:
        wrong["bootstrap.servers"] = config["bootstrap.servers"].replace("127.0.0.1", "localhost")
    right = {name: value for name, value in config.items() if wrong.get(name) != ""}
    return {**right, **{name: value for name, value in wrong.items() if value}, "error_cb": lambda error: None}  # type: ignore[dict-item]


@pytest.mark.parametrize("doing", ["run", "pattern", "KIP-848", "exactly once", "transaction"])
@pytest.mark.parametrize(("shut_out", "wrong"), [(name, name) for name in SHUT_OUT], indirect=["shut_out"])
def test_who_is_not_let_in_hears_of_it_at_once(shut_out: dict[str, str], wrong: str, doing: str, names: dict[str, str]) -> None:
    """S02: librdkafka would try for ever; the error says what to look at. A wrong host name is not connected to."""
    _, code, look = SHUT_OUT[wrong]
    guarantee = ExactlyOnce if doing in ("exactly once", "transaction") else AtLeastOnce
    topic = f"^{names['source']}" if doing == "pattern" else names["source"]
    began = time.monotonic()
    with (
        client(guarantee, shut_out, names, **(KIP_848 if doing == "KIP-848" else {})) as service,
        pytest.raises(BrokerError, match=code) as caught,
        service.transaction() if doing == "transaction" else nullcontext(),
    ):
        service.run([topic], print)
    assert time.monotonic() - began < DEADLINE
    assert look in str(caught.value)


@pytest.mark.parametrize(("shut_out", "wrong"), [(name, name) for name in SHUT_OUT], indirect=["shut_out"])
def test_whose_producer_is_not_let_in_hears_of_it_with_the_first_record(shut_out: dict[str, str], wrong: str) -> None:
    """It would be DeliveryUnknown after two minutes, although it was certainly not sent, and the brokers are up."""
    _, code, look = SHUT_OUT[wrong]
    with AtLeastOnce(shut_out) as service, pytest.raises(BrokerError, match=code) as caught:
        service.produce("topic", b"1")
    assert look in str(caught.value)


def test_without_the_check_of_the_host_name_it_would_have_been_let_in(config: dict[str, str], names: dict[str, str]) -> None:
    """S02: it was the name alone that was wrong; and to switch the check off is a SecurityWarning."""
    elsewhere = {**config, "bootstrap.servers": config["bootstrap.servers"].replace("127.0.0.1", "localhost")}
    with pytest.warns(SecurityWarning, match="ssl.endpoint.identification.algorithm"):
        service = AtLeastOnce({**elsewhere, "group.id": names["group.id"], "ssl.endpoint.identification.algorithm": "none"})
    with service, pytest.raises(AuthorizationError, match="READ on topic"):
        service.run([names["source"]], print)


def test_a_password_that_is_corrected_lets_the_same_client_in(
    config: dict[str, str], names: dict[str, str], rights: Rights
) -> None:
    """An error about the credentials is no state of a client: the next run starts anew."""
    rights.grant(CONSUME)
    with pytest.raises(BrokerError), client(AtLeastOnce, {**config, "sasl.password": "x"}, names) as service:
        service.run([names["source"]], print)
    with client(AtLeastOnce, config, names) as service:
        run(service, names, print)


# -- warnings -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guarantee", [AtMostOnce, AtLeastOnce, ExactlyOnce])
@pytest.mark.parametrize(
    "weak",
    [
        {"enable.ssl.certificate.verification": "false"},
        {"ssl.endpoint.identification.algorithm": "none"},
        {"security.protocol": "sasl_plaintext", "sasl.mechanism": "PLAIN", "sasl.username": "u", "sasl.password": "p"},
    ],
    ids=str,
)
def test_weak_transport_is_a_security_warning_at_the_users_line(guarantee: type[Client], weak: dict[str, str]) -> None:
    """S02: anybody on the way can answer for the brokers, or read the password. The warning is at the constructor's caller."""
    ids = {"transactional.id": "t"} if guarantee is ExactlyOnce else {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        guarantee({"bootstrap.servers": "127.0.0.1:1", "group.id": "g", **ids, **weak}).close()
    assert [(warning.category, warning.filename) for warning in caught] == [(SecurityWarning, __file__)]


@pytest.mark.parametrize("guarantee", [AtLeastOnce, ExactlyOnce])
def test_a_provider_of_tokens_that_is_down_is_named(guarantee: type[Client], caplog: pytest.LogCaptureFixture) -> None:
    """And not a setting that would be wrong. What ``oauth_cb`` raised is the cause; its text may hold anything (S01)."""

    def down(_config: str) -> tuple[str, float]:
        raise ConnectionError("no route to the provider")

    config = with_tokens({"bootstrap.servers": "127.0.0.1:1", "security.protocol": "SASL_SSL"}, down)
    ids = {"transactional.id": "t"} if guarantee is ExactlyOnce else {}
    expected = pytest.raises(BrokerError, match=r"oauth_cb gave .* \(ConnectionError\)")
    with guarantee({**config, **ids}) as service, expected as caught:
        if isinstance(service, ExactlyOnce):
            with service.transaction():
                pass
        else:
            service.produce("topic", b"x")
    assert isinstance(caught.value.__cause__, ConnectionError)
    assert "oauth_cb raised; there is no token before" in caplog.text


def test_a_provider_of_tokens_that_goes_down_later_is_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    """With what that costs: the token before serves until it is over."""
    answers = iter([("token", time.time() + 60)])
    tokens = _Tokens(lambda _config: next(answers))
    tokens("")
    with pytest.raises(StopIteration):
        tokens("")
    assert [record.message for record in caplog.records] == [
        "oauth_cb raised; it is asked again after 10 s, and the token before serves until it is over"
    ]


@pytest.mark.parametrize(
    "given",
    [
        None,
        "token",
        ("token",),
        ["token", 0.0],
        (b"token", 0.0),
        ("to\0ken", 0.0),
        ("to\udc80ken", 0.0),
        ("token", "0"),
        ("token", None),
        ("token", 10**400),
        ("token", 0.0, None),
        ("token", 0.0, "me", None),
        ("token", 0.0, "me", {"a": b"b"}),
        ("token", 0.0, "me", {1: "b"}),
        ("token", 0.0, "me", {}, ""),
    ],
)
def test_what_is_no_token_counts_as_none(given: object, caplog: pytest.LogCaptureFixture) -> None:
    """Else confluent-kafka would tell librdkafka nothing, which would never ask again."""
    answers = iter([("token", time.time() + 60), given])
    tokens = _Tokens(lambda _config: next(answers))  # type: ignore[arg-type] # as a user may write it
    tokens("")
    with pytest.raises(TypeError, match="oauth_cb returns a tuple"):
        tokens("")
    assert "oauth_cb raised; it is asked again after 10 s" in caplog.text


@pytest.mark.parametrize("given", [("token", 5), ("token", 0.5, "me"), ("tökén", 0.5, "", {"a": "b"})])
def test_a_token_is_handed_on_as_it_is(given: tuple[Any, ...]) -> None:
    assert _Tokens(lambda _config: given)("") is given


@pytest.mark.parametrize("reason", [SystemError("returned NULL"), KafkaException("OAuth token not set")])
def test_a_token_that_is_refused_is_named(reason: Exception) -> None:
    """One that is over, or no token at all: librdkafka takes it for none."""

    def refuses(config: dict[str, Any]) -> None:
        config["oauth_cb"]("")
        raise reason

    with pytest.raises(BrokerError, match="what it returned was refused"):
        Handle().make(refuses, {"oauth_cb": lambda _config: ("token", 0.0)})  # type: ignore[arg-type] # called like one


@pytest.mark.parametrize("mechanism", ["SCRAM-SHA-256", "SCRAM-SHA-512"])
def test_scram_without_tls_is_no_warning(mechanism: str) -> None:
    """SCRAM does not send the password: a network that is trusted may do without TLS, as it may with PLAINTEXT."""
    sasl = {"security.protocol": "sasl_plaintext", "sasl.mechanism": mechanism, "sasl.username": "u", "sasl.password": "p"}
    AtLeastOnce({"bootstrap.servers": "127.0.0.1:1", **sasl}).close()
