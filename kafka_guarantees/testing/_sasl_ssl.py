"""What a broker needs for a SASL_SSL listener and Kafka's own authorizer: a certificate, and settings.

Rules.
    * The certificate is for 127.0.0.1 alone: a client that connects to ``localhost`` finds another name in it.
    * Secrets are random, and live in the folder of the cluster, which only its owner can read.
"""

from __future__ import annotations

from pathlib import Path

from kafka_guarantees.testing._jars import run

MECHANISM = "SCRAM-SHA-512"

_KEYSTORE = "broker.p12"
_CA = "ca.pem"
_PASSWORD = "only-for-tests"  # noqa: S105 - keytool wants one; what protects the file is its folder
_TIMEOUT_S = 60


def make_certificate(folder: Path, java: str) -> Path:
    """Make a keystore for the brokers. Returns the PEM file that clients trust.

    Args:
        folder: where the files go.
        java: the path of the ``java`` command.

    Raises:
        LocalKafkaError: keytool failed.
    """
    keytool = [str(Path(java).resolve().with_name("keytool")), "-J-XX:TieredStopAtLevel=1", "-J-XX:-UsePerfData"]
    store = ["-keystore", str(folder / _KEYSTORE), "-storetype", "PKCS12", "-storepass", _PASSWORD, "-alias", "broker"]
    subject = ["-dname", "CN=LocalKafka", "-ext", "san=ip:127.0.0.1", "-ext", "bc:c=ca:true", "-validity", "7"]
    run([*keytool, "-genkeypair", "-keyalg", "EC", "-groupname", "secp256r1", *subject, *store], folder, _TIMEOUT_S)
    run([*keytool, "-exportcert", "-rfc", "-file", str(folder / _CA), *store], folder, _TIMEOUT_S)
    return folder / _CA


def broker_settings(folder: Path) -> dict[str, object]:
    """The settings beside the listeners. Who comes without a name, over PLAINTEXT, may do anything: the brokers do."""
    return {
        "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT,SASL_SSL:SASL_SSL",
        "sasl.enabled.mechanisms": MECHANISM,
        "listener.name.sasl_ssl.scram-sha-512.sasl.jaas.config": (
            "org.apache.kafka.common.security.scram.ScramLoginModule required;"
        ),
        "ssl.keystore.type": "PKCS12",
        "ssl.keystore.location": folder / _KEYSTORE,
        "ssl.keystore.password": _PASSWORD,
        "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
        "super.users": "User:ANONYMOUS",
    }
