"""The commands of Apache Kafka that mend a finding, with the names that were asked for."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from .._settings.values import HIDDEN, shown

if TYPE_CHECKING:
    from .._settings import Settings


class Commands:
    """Command lines for one cluster. They show no secret: what else it takes to get in is in a file of the operator's."""

    def __init__(self, settings: Settings) -> None:
        admin = settings.admin
        servers = shown("bootstrap.servers", admin.get("bootstrap.servers"))
        self._servers = "HOST:PORT" if servers == HIDDEN else servers
        plain = str(admin.get("security.protocol", "plaintext")).lower() == "plaintext"
        self._secure = () if plain else ("--command-config", "admin.properties")

    def create(self, topic: str, replicas: int, in_sync: int) -> str:
        """Create a topic that keeps what it acknowledges."""
        config = f"min.insync.replicas={in_sync}"
        return self._line("topics", "--create", "--topic", topic, "--replication-factor", str(replicas), "--config", config)

    def set(self, topic: str, setting: str, value: str) -> str:
        """Set something of a topic."""
        where = ("--entity-type", "topics", "--entity-name", topic)
        return self._line("configs", "--alter", *where, "--add-config", f"{setting}={value}")

    def replicate(self, topic: str) -> str:
        """Give a topic more replicas. The file is the operator's: where they go is a matter of racks and space."""
        return self._line("reassign-partitions", "--execute", "--reassignment-json-file", f"{topic}-3-replicas.json")

    def allow(self, operation: str, kind: str, name: str | None = None) -> str:
        """Give this client a right: on a topic, a group, a transactional.id, or the cluster, which has no name."""
        what = (f"--{kind}",) if name is None else (f"--{kind}", name)
        return self._line("acls", "--add", "--allow-principal", "User:NAME", "--operation", operation, *what)

    def _line(self, tool: str, *arguments: str) -> str:
        return shlex.join([f"kafka-{tool}.sh", "--bootstrap-server", self._servers, *self._secure, *arguments])
