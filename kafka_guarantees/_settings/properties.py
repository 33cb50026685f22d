"""The properties that librdkafka 2.16.0 has: which side reads them, what kind of value they take.

Data only. It was printed by librdkafka itself (``rd_kafka_conf_properties_show``); ``tests/test_settings.py`` compares
it with the installed library, so drift is a red test. Where librdkafka has two names for one property, the one that
users write is the name here and the other stands in ``ALIASES``.

Rules. A STRING without ``values`` is shown only if its name is in ``SHOWN``, or in ``PATHS`` and it looks like one (S01: what
is not known to be harmless is hidden). Not there is what has a key, a password, a token, a user, or a command; nor a file that
has one of these.
"""

from __future__ import annotations

from typing import NamedTuple

PRODUCER = "producer"
CONSUMER = "consumer"
BOTH = "both"

INTEGER = "integer"
FLOAT = "float"
BOOLEAN = "boolean"
ENUM = "enum"  # one of values
FLAGS = "flags"  # values, comma-separated
STRING = "string"
CALLBACK = "callback"  # has a C API of its own: cannot be set through a dict


class Property(NamedTuple):
    """One property: who reads it (PRODUCER, CONSUMER or BOTH), kind of value, librdkafka's default, known values."""

    side: str
    kind: str
    default: str = ""
    values: tuple[str, ...] = ()


ALIASES = {
    "auto.commit.enable": "enable.auto.commit",
    "compression.codec": "compression.type",
    "fetch.message.max.bytes": "max.partition.fetch.bytes",
    "max.in.flight.requests.per.connection": "max.in.flight",
    "message.send.max.retries": "retries",
    "message.timeout.ms": "delivery.timeout.ms",
    "metadata.broker.list": "bootstrap.servers",
    "queue.buffering.max.ms": "linger.ms",
    "request.required.acks": "acks",
    "sasl.mechanisms": "sasl.mechanism",
    "sasl.oauthbearer.client.id": "sasl.oauthbearer.client.credentials.client.id",
    "sasl.oauthbearer.client.secret": "sasl.oauthbearer.client.credentials.client.secret",
}

SHOWN = frozenset(
    {
        "bootstrap.servers",
        "broker.version.fallback",
        "builtin.features",
        "client.id",
        "client.rack",
        "group.id",
        "group.instance.id",
        "group.protocol.type",
        "group.remote.assignor",
        "share.acknowledgement.mode",
        "topic.blacklist",
        "transactional.id",
    }
)
PATHS = frozenset(
    {
        "https.ca.location",
        "offset.store.path",
        "plugin.library.paths",
        "ssl.ca.location",
        "ssl.certificate.location",
        "ssl.crl.location",
        "ssl.engine.location",
    }
)

PROPERTIES = {
    "acks": Property(PRODUCER, INTEGER, "-1"),
    "allow.auto.create.topics": Property(BOTH, BOOLEAN, "false"),
    "api.version.fallback.ms": Property(BOTH, INTEGER, "0"),
    "api.version.request": Property(BOTH, BOOLEAN, "true"),
    "api.version.request.timeout.ms": Property(BOTH, INTEGER, "10000"),
    "auto.commit.interval.ms": Property(CONSUMER, INTEGER, "5000"),
    "auto.offset.reset": Property(
        CONSUMER, ENUM, "largest", ("smallest", "earliest", "beginning", "largest", "latest", "end", "error")
    ),
    "background_event_cb": Property(BOTH, CALLBACK),
    "batch.num.messages": Property(PRODUCER, INTEGER, "10000"),
    "batch.size": Property(PRODUCER, INTEGER, "1000000"),
    "bootstrap.servers": Property(BOTH, STRING),
    "broker.address.family": Property(BOTH, ENUM, "any", ("any", "v4", "v6")),
    "broker.address.ttl": Property(BOTH, INTEGER, "1000"),
    "broker.version.fallback": Property(BOTH, STRING),
    "builtin.features": Property(BOTH, STRING),
    "check.crcs": Property(CONSUMER, BOOLEAN, "false"),
    "client.dns.lookup": Property(
        BOTH, ENUM, "use_all_dns_ips", ("use_all_dns_ips", "resolve_canonical_bootstrap_servers_only")
    ),
    "client.id": Property(BOTH, STRING, "rdkafka"),
    "client.rack": Property(BOTH, STRING),
    "closesocket_cb": Property(BOTH, CALLBACK),
    "compression.level": Property(PRODUCER, INTEGER, "-1"),
    "compression.type": Property(PRODUCER, ENUM, "none", ("none", "gzip", "snappy", "lz4", "zstd")),
    "connect_cb": Property(BOTH, CALLBACK),
    "connections.max.idle.ms": Property(BOTH, INTEGER, "0"),
    "consume.callback.max.messages": Property(CONSUMER, INTEGER, "0"),
    "consume_cb": Property(CONSUMER, CALLBACK),
    "coordinator.query.interval.ms": Property(CONSUMER, INTEGER, "600000"),
    "debug": Property(
        BOTH,
        FLAGS,
        "",
        (
            "generic",
            "broker",
            "topic",
            "metadata",
            "feature",
            "queue",
            "msg",
            "protocol",
            "cgrp",
            "security",
            "fetch",
            "interceptor",
            "plugin",
            "consumer",
            "admin",
            "eos",
            "mock",
            "assignor",
            "conf",
            "telemetry",
            "all",
        ),
    ),
    "default_topic_conf": Property(BOTH, CALLBACK),
    "delivery.report.only.error": Property(PRODUCER, BOOLEAN, "false"),
    "delivery.timeout.ms": Property(PRODUCER, INTEGER, "300000"),
    "dr_cb": Property(PRODUCER, CALLBACK),
    "dr_msg_cb": Property(PRODUCER, CALLBACK),
    "enable.auto.commit": Property(CONSUMER, BOOLEAN, "true"),
    "enable.auto.offset.store": Property(CONSUMER, BOOLEAN, "true"),
    "enable.gapless.guarantee": Property(PRODUCER, BOOLEAN, "false"),
    "enable.idempotence": Property(PRODUCER, BOOLEAN, "false"),
    "enable.metrics.push": Property(BOTH, BOOLEAN, "true"),
    "enable.partition.eof": Property(CONSUMER, BOOLEAN, "false"),
    "enable.random.seed": Property(BOTH, BOOLEAN, "true"),
    "enable.sasl.oauthbearer.unsecure.jwt": Property(BOTH, BOOLEAN, "false"),
    "enable.ssl.certificate.verification": Property(BOTH, BOOLEAN, "true"),
    "enabled_events": Property(BOTH, INTEGER, "0"),
    "error_cb": Property(BOTH, CALLBACK),
    "fetch.error.backoff.ms": Property(CONSUMER, INTEGER, "500"),
    "fetch.max.bytes": Property(CONSUMER, INTEGER, "52428800"),
    "fetch.min.bytes": Property(CONSUMER, INTEGER, "1"),
    "fetch.queue.backoff.ms": Property(CONSUMER, INTEGER, "1000"),
    "fetch.wait.max.ms": Property(CONSUMER, INTEGER, "500"),
    "group.id": Property(CONSUMER, STRING),
    "group.instance.id": Property(CONSUMER, STRING),
    "group.protocol": Property(CONSUMER, ENUM, "classic", ("classic", "consumer")),
    "group.protocol.type": Property(CONSUMER, STRING, "consumer"),
    "group.remote.assignor": Property(CONSUMER, STRING),
    "heartbeat.interval.ms": Property(CONSUMER, INTEGER, "3000"),
    "https.ca.location": Property(BOTH, STRING),
    "https.ca.pem": Property(BOTH, STRING),
    "interceptors": Property(BOTH, CALLBACK),
    "internal.termination.signal": Property(BOTH, INTEGER, "0"),
    "isolation.level": Property(CONSUMER, ENUM, "read_committed", ("read_uncommitted", "read_committed")),
    "linger.ms": Property(PRODUCER, FLOAT, "5"),
    "log.connection.close": Property(BOTH, BOOLEAN, "true"),
    "log.queue": Property(BOTH, BOOLEAN, "false"),
    "log.thread.name": Property(BOTH, BOOLEAN, "true"),
    "log_cb": Property(BOTH, CALLBACK),
    "log_level": Property(BOTH, INTEGER, "6"),
    "max.in.flight": Property(BOTH, INTEGER, "1000000"),
    "max.partition.fetch.bytes": Property(CONSUMER, INTEGER, "1048576"),
    "max.poll.interval.ms": Property(CONSUMER, INTEGER, "300000"),
    "max.poll.records": Property(CONSUMER, INTEGER, "500"),
    "message.copy.max.bytes": Property(BOTH, INTEGER, "65535"),
    "message.max.bytes": Property(BOTH, INTEGER, "1000000"),
    "metadata.max.age.ms": Property(BOTH, INTEGER, "900000"),
    "metadata.recovery.rebootstrap.trigger.ms": Property(BOTH, INTEGER, "300000"),
    "metadata.recovery.strategy": Property(BOTH, ENUM, "rebootstrap", ("none", "rebootstrap")),
    "msg_order_cmp": Property(PRODUCER, CALLBACK),
    "oauthbearer_token_refresh_cb": Property(BOTH, CALLBACK),
    "offset.store.method": Property(CONSUMER, ENUM, "broker", ("none", "file", "broker")),
    "offset.store.path": Property(CONSUMER, STRING),
    "offset.store.sync.interval.ms": Property(CONSUMER, INTEGER, "-1"),
    "offset_commit_cb": Property(CONSUMER, CALLBACK),
    "opaque": Property(BOTH, CALLBACK),
    "open_cb": Property(BOTH, CALLBACK),
    "partition.assignment.strategy": Property(
        CONSUMER, STRING, "range,roundrobin", ("range", "roundrobin", "cooperative-sticky")
    ),
    "partitioner": Property(
        PRODUCER,
        STRING,
        "consistent_random",
        ("random", "consistent", "consistent_random", "murmur2", "murmur2_random", "fnv1a", "fnv1a_random"),
    ),
    "partitioner_cb": Property(PRODUCER, CALLBACK),
    "plugin.library.paths": Property(BOTH, STRING),
    "produce.offset.report": Property(PRODUCER, BOOLEAN, "false"),
    "queue.buffering.backpressure.threshold": Property(PRODUCER, INTEGER, "1"),
    "queue.buffering.max.kbytes": Property(PRODUCER, INTEGER, "1048576"),
    "queue.buffering.max.messages": Property(PRODUCER, INTEGER, "100000"),
    "queued.max.messages.kbytes": Property(CONSUMER, INTEGER, "65536"),
    "queued.min.messages": Property(CONSUMER, INTEGER, "100000"),
    "queuing.strategy": Property(PRODUCER, ENUM, "fifo", ("fifo", "lifo")),
    "rebalance_cb": Property(CONSUMER, CALLBACK),
    "receive.message.max.bytes": Property(BOTH, INTEGER, "100000000"),
    "reconnect.backoff.jitter.ms": Property(BOTH, INTEGER, "0"),
    "reconnect.backoff.max.ms": Property(BOTH, INTEGER, "10000"),
    "reconnect.backoff.ms": Property(BOTH, INTEGER, "100"),
    "request.timeout.ms": Property(PRODUCER, INTEGER, "30000"),
    "resolve_cb": Property(BOTH, CALLBACK),
    "retries": Property(PRODUCER, INTEGER, "2147483647"),
    "retry.backoff.max.ms": Property(BOTH, INTEGER, "1000"),
    "retry.backoff.ms": Property(BOTH, INTEGER, "100"),
    "sasl.kerberos.keytab": Property(BOTH, STRING),
    "sasl.kerberos.kinit.cmd": Property(BOTH, STRING),
    "sasl.kerberos.min.time.before.relogin": Property(BOTH, INTEGER, "60000"),
    "sasl.kerberos.principal": Property(BOTH, STRING),
    "sasl.kerberos.service.name": Property(BOTH, STRING),
    "sasl.mechanism": Property(BOTH, STRING, "GSSAPI", ("GSSAPI", "PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512", "OAUTHBEARER")),
    "sasl.oauthbearer.assertion.algorithm": Property(BOTH, ENUM, "RS256", ("RS256", "ES256")),
    "sasl.oauthbearer.assertion.claim.aud": Property(BOTH, STRING),
    "sasl.oauthbearer.assertion.claim.exp.seconds": Property(BOTH, INTEGER, "300"),
    "sasl.oauthbearer.assertion.claim.iss": Property(BOTH, STRING),
    "sasl.oauthbearer.assertion.claim.jti.include": Property(BOTH, BOOLEAN, "false"),
    "sasl.oauthbearer.assertion.claim.nbf.seconds": Property(BOTH, INTEGER, "60"),
    "sasl.oauthbearer.assertion.claim.sub": Property(BOTH, STRING),
    "sasl.oauthbearer.assertion.file": Property(BOTH, STRING),
    "sasl.oauthbearer.assertion.jwt.template.file": Property(BOTH, STRING),
    "sasl.oauthbearer.assertion.private.key.file": Property(BOTH, STRING),
    "sasl.oauthbearer.assertion.private.key.passphrase": Property(BOTH, STRING),
    "sasl.oauthbearer.assertion.private.key.pem": Property(BOTH, STRING),
    "sasl.oauthbearer.client.credentials.client.id": Property(BOTH, STRING),
    "sasl.oauthbearer.client.credentials.client.secret": Property(BOTH, STRING),
    "sasl.oauthbearer.config": Property(BOTH, STRING),
    "sasl.oauthbearer.extensions": Property(BOTH, STRING),
    "sasl.oauthbearer.grant.type": Property(
        BOTH, ENUM, "client_credentials", ("client_credentials", "urn:ietf:params:oauth:grant-type:jwt-bearer")
    ),
    "sasl.oauthbearer.metadata.authentication.type": Property(BOTH, ENUM, "none", ("none", "azure_imds", "aws_iam")),
    "sasl.oauthbearer.method": Property(BOTH, ENUM, "default", ("default", "oidc")),
    "sasl.oauthbearer.scope": Property(BOTH, STRING),
    "sasl.oauthbearer.sub.claim.name": Property(BOTH, STRING),
    "sasl.oauthbearer.token.endpoint.url": Property(BOTH, STRING),
    "sasl.password": Property(BOTH, STRING),
    "sasl.username": Property(BOTH, STRING),
    "security.protocol": Property(BOTH, ENUM, "plaintext", ("plaintext", "ssl", "sasl_plaintext", "sasl_ssl")),
    "session.timeout.ms": Property(CONSUMER, INTEGER, "45000"),
    "share.acknowledgement.mode": Property(CONSUMER, STRING),
    "socket.blocking.max.ms": Property(BOTH, INTEGER, "1000"),
    "socket.connection.setup.timeout.ms": Property(BOTH, INTEGER, "30000"),
    "socket.keepalive.enable": Property(BOTH, BOOLEAN, "false"),
    "socket.max.fails": Property(BOTH, INTEGER, "1"),
    "socket.nagle.disable": Property(BOTH, BOOLEAN, "true"),
    "socket.receive.buffer.bytes": Property(BOTH, INTEGER, "0"),
    "socket.send.buffer.bytes": Property(BOTH, INTEGER, "0"),
    "socket.timeout.ms": Property(BOTH, INTEGER, "60000"),
    "socket_cb": Property(BOTH, CALLBACK),
    "ssl.ca.certificate.stores": Property(BOTH, STRING),
    "ssl.ca.location": Property(BOTH, STRING),
    "ssl.ca.pem": Property(BOTH, STRING),
    "ssl.certificate.location": Property(BOTH, STRING),
    "ssl.certificate.pem": Property(BOTH, STRING),
    "ssl.certificate.verify_cb": Property(BOTH, CALLBACK),
    "ssl.cipher.suites": Property(BOTH, STRING),
    "ssl.crl.location": Property(BOTH, STRING),
    "ssl.curves.list": Property(BOTH, STRING),
    "ssl.endpoint.identification.algorithm": Property(BOTH, ENUM, "https", ("none", "https")),
    "ssl.engine.id": Property(BOTH, STRING),
    "ssl.engine.location": Property(BOTH, STRING),
    "ssl.key.location": Property(BOTH, STRING),
    "ssl.key.password": Property(BOTH, STRING),
    "ssl.key.pem": Property(BOTH, STRING),
    "ssl.keystore.location": Property(BOTH, STRING),
    "ssl.keystore.password": Property(BOTH, STRING),
    "ssl.providers": Property(BOTH, STRING),
    "ssl.sigalgs.list": Property(BOTH, STRING),
    "ssl_ca": Property(BOTH, CALLBACK),
    "ssl_certificate": Property(BOTH, CALLBACK),
    "ssl_engine_callback_data": Property(BOTH, CALLBACK),
    "ssl_key": Property(BOTH, CALLBACK),
    "statistics.interval.ms": Property(BOTH, INTEGER, "0"),
    "stats_cb": Property(BOTH, CALLBACK),
    "sticky.partitioning.linger.ms": Property(PRODUCER, INTEGER, "10"),
    "throttle_cb": Property(BOTH, CALLBACK),
    "topic.blacklist": Property(BOTH, STRING),
    "topic.metadata.propagation.max.ms": Property(BOTH, INTEGER, "30000"),
    "topic.metadata.refresh.fast.cnt": Property(BOTH, INTEGER, "10"),
    "topic.metadata.refresh.fast.interval.ms": Property(BOTH, INTEGER, "100"),
    "topic.metadata.refresh.interval.ms": Property(BOTH, INTEGER, "300000"),
    "topic.metadata.refresh.sparse": Property(BOTH, BOOLEAN, "true"),
    "transaction.timeout.ms": Property(PRODUCER, INTEGER, "60000"),
    "transactional.id": Property(PRODUCER, STRING),
}


def canonical(name: str) -> str:
    """The one name of a property that has two."""
    return ALIASES.get(name, name)
