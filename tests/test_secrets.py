"""S01: a secret goes to librdkafka, and nowhere else: not into a text, a log, an error, a pickle, a file or a command line."""

from __future__ import annotations

import json
import logging
import pickle
import subprocess
import sys
import threading
import time
import traceback
import warnings
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest

from kafka_guarantees import AtLeastOnce, AtMostOnce, ExactlyOnce, KafkaGuaranteesError
from kafka_guarantees._settings.properties import ALIASES, PROPERTIES, SHOWN, STRING
from kafka_guarantees.cli import main
from kafka_guarantees.testing import LocalKafka

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MARKER = "s3cr3t-Marker-7bX"
CLASSES = [AtMostOnce, AtLeastOnce, ExactlyOnce]
DEADLINE = 30.0  # seconds

# Every property whose value is free text and not known to be harmless, under each of its names, and those of other clients.
SECRETS = sorted(
    {
        *(name for name, row in PROPERTIES.items() if row.kind == STRING and not row.values and name not in SHOWN),
        *(alias for alias, name in ALIASES.items() if PROPERTIES[name].kind == STRING and name not in SHOWN),
        "sasl.jaas.config",
        "ssl.truststore.password",
        "ssl_key",
    }
    - {"sasl.mechanisms"}
)


def test_the_keys_that_hold_secrets_are_among_them() -> None:
    """What is known to be a secret, whatever the table of properties says of it."""
    assert {
        "sasl.password",
        "sasl.username",
        "sasl.jaas.config",
        "sasl.oauthbearer.client.secret",
        "sasl.oauthbearer.client.credentials.client.secret",
        "sasl.oauthbearer.assertion.private.key.passphrase",
        "sasl.oauthbearer.assertion.private.key.pem",
        "sasl.oauthbearer.config",
        "ssl.key.password",
        "ssl.key.pem",
        "ssl.keystore.password",
        "ssl_key",
    } <= set(SECRETS)


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and all that hangs on it."""
    while error is not None:
        yield error
        yield from chain(error.__cause__)
        error = error.__context__


def texts_of(error: BaseException) -> Iterator[str]:
    for one in chain(error):
        yield from (str(one), repr(one), repr(vars(one)), repr(one.args))
        with suppress(TypeError, pickle.PicklingError):
            yield repr(pickle.dumps(one))
    yield "".join(traceback.format_exception(error))


def texts_of_client(config: dict[str, Any], kind: type[Any]) -> Iterator[str]:
    """Whatever a client says while it is made, used without a broker, and closed."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            explanation = kind.explain(config)
            yield from (str(explanation), repr(explanation), json.dumps(explanation.as_dict()), repr(list(explanation)))
            with kind(config) as client:
                yield from (repr(client), str(client), repr(client._settings), str(client._settings), repr(client._lifecycle))
                stop = threading.Timer(0.05, client.stop)
                stop.start()
                client.run(["t"], print)
                stop.join()
        except KafkaGuaranteesError as error:
            yield from texts_of(error)
    yield from (str(warning.message) for warning in caught)


@pytest.mark.parametrize("name", SECRETS)
def test_no_text_of_a_client_has_a_secret(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """Whether the client can be made with it or not: nothing that it says, logs, raises or pickles has the value."""
    caplog.set_level(logging.DEBUG)
    config = {"bootstrap.servers": "127.0.0.1:1", "group.id": "g", "debug": "security,broker,conf", name: MARKER}
    if name.startswith("sasl."):
        config |= {"security.protocol": "sasl_ssl", "sasl.mechanism": "SCRAM-SHA-512"}
        config = {"sasl.username": "u", "sasl.password": "p", **config}
    elif name.startswith("ssl"):
        config["security.protocol"] = "ssl"
    assert not [text for text in texts_of_client(config, AtLeastOnce) if MARKER in text]
    # what librdkafka itself dumps with debug=conf is its own: it knows what is a password, and not that a user name is private
    ours = [record for record in caplog.records if record.name != "kafka_guarantees.librdkafka"]
    assert not [record for record in ours if MARKER in record.getMessage() or MARKER in (record.exc_text or "")]


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize(
    "secret", ["sasl.password", "sasl.oauthbearer.client.secret", "ssl.key.password", "ssl.keystore.password"]
)
def test_librdkafka_dumps_its_passwords_redacted(kind: type[Any], secret: str, caplog: pytest.LogCaptureFixture) -> None:
    """With debug=all, in all lines of its log: what it counts as a password is not there."""
    caplog.set_level(logging.DEBUG)
    config = {"bootstrap.servers": "127.0.0.1:1", "group.id": "g", "debug": "all", secret: MARKER}
    if kind is ExactlyOnce:
        config["transactional.id"] = "t"
    assert not [text for text in texts_of_client(config, kind) if MARKER in text]
    assert "[redacted]" in caplog.text
    assert MARKER not in caplog.text


@pytest.mark.parametrize("name", SECRETS)
def test_the_command_line_shows_no_secret(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """``explain`` with it in a file: printed as ``<hidden>``, or refused without its value."""
    file = tmp_path / "client.properties"
    file.write_text(f"{name}={MARKER}\n")
    for form in ([], ["--format", "json"]):
        with suppress(SystemExit):
            main(["explain", "at-least-once", "--config", str(file), *form])
    printed = capsys.readouterr()
    assert MARKER not in printed.out + printed.err
    assert printed.out + printed.err


@pytest.fixture(scope="module")
def secure() -> Iterator[LocalKafka]:
    with LocalKafka(security="sasl_ssl") as kafka:
        yield kafka


@pytest.mark.broker
@pytest.mark.parametrize("kind", CLASSES)
def test_a_client_that_logs_in_says_its_password_to_nobody(
    kind: type[Any], secure: LocalKafka, caplog: pytest.LogCaptureFixture
) -> None:
    """Logged in by SCRAM, refused an ACL, with everything logged: the password and its coded forms are in no line."""
    caplog.set_level(logging.DEBUG)
    user = secure.add_user(f"secret-{kind.__name__}")
    config = {**user, "group.id": "g", "debug": "security,broker,protocol,conf"}
    if kind is ExactlyOnce:
        config["transactional.id"] = "t"
    with pytest.raises(KafkaGuaranteesError) as caught, kind(config) as client:
        client.run(["nothing-may-be-read"], print)
    with pytest.raises(KafkaGuaranteesError) as wrong, kind({**config, "sasl.password": MARKER}) as client:
        client.run(["nothing-may-be-read"], print)
    said = [*texts_of(caught.value), *texts_of(wrong.value), caplog.text]
    assert "SCRAM" in caplog.text  # the lines of the login are there
    assert not [text for text in said if user["sasl.password"] in text or MARKER in text]


@pytest.mark.broker
def test_a_proof_shows_no_secret(secure: LocalKafka, tmp_path: Path) -> None:
    """prove: neither its output, nor its report and histories, nor the command line of any of its processes."""
    user = secure.add_user("prover")  # without rights: the proof ends soon, and says why
    file = tmp_path / "client.properties"
    file.write_text("".join(f"{name}={value}\n" for name, value in user.items()))
    report = tmp_path / "out" / "proof.html"
    report.parent.mkdir()
    argv = ["prove", "at-least-once", "--config", str(file), "--duration", "5", "--report", str(report)]
    lines: list[str] = []
    with subprocess.Popen(
        [sys.executable, "-m", "kafka_guarantees", *argv],
        cwd=report.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            deadline = time.monotonic() + 4 * DEADLINE
            while process.poll() is None:
                assert time.monotonic() < deadline
                listing = subprocess.run(["ps", "-A", "-ww", "-o", "args="], capture_output=True, text=True, check=True)
                lines.append(listing.stdout)
                time.sleep(0.1)
            said = process.stdout.read() if process.stdout is not None else ""
        finally:
            process.kill()
    files = [path.read_text(errors="replace") for path in report.parent.rglob("*") if path.is_file()]
    assert said
    assert any("kafka_guarantees prove" in line for line in lines)
    assert not [text for text in (said, *lines, *files) if user["sasl.password"] in text]
