"""How a client recognises what was handled before: by a store, by an inbox, or not at all: options, and what they come to."""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final, get_args

from .._places import Stored
from ..dedup.contract import Source, Takeover
from ..dedup.ids import cloudevent, first_of, header, json_field, position
from ..errors import DurabilityWarning, UnsafeConfigError
from ..records import MESSAGE_ID
from .claims import Claims, OnStoreError
from .message_ids import MessageIds, OnMissingId

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from .._offsets import Partition
    from .._settings import Settings
    from ..dedup.contract import DedupStore, Inbox
    from ..dedup.ids import IdOf

log = logging.getLogger("kafka_guarantees")

BY_HEADER: Final = header(MESSAGE_ID)
_MAKERS: Final[tuple[object, ...]] = (cloudevent, first_of, header, json_field, position)  # of extractors, and none themselves
COUNTED = ("duplicate", "taken over", "waited for", "unprotected", "lost")  # see AtLeastOnce.dedup_counts
SHORT = timedelta(hours=1)  # a relay that starts again, or a worker that was down, repeats older messages than that


class Recognition:
    """The options, checked. See ``AtLeastOnce`` for what they mean.

    Attributes:
        inbox: the inbox, if there is one.
        retention: how long ids are remembered; None where there are none.
        waits: whether nothing is handled while the store is down.
        counts: of messages, by what became of them.

    Raises:
        TypeError, ValueError: they contradict each other.
        UnsafeConfigError: they would lose messages.
    """

    def __init__(
        self,
        settings: Settings,
        dedup: DedupStore | None,
        inbox: Inbox[Any] | None,
        message_id: IdOf | None,
        *,
        on_missing_id: OnMissingId,
        on_store_error: OnStoreError,
        takeover: Takeover,
        scope: str | None,
        fingerprint: bool,
    ) -> None:
        _one_of("on_missing_id", on_missing_id, OnMissingId)
        _one_of("on_store_error", on_store_error, OnStoreError)
        _one_of("takeover", takeover, Takeover)
        if scope is not None and not (isinstance(scope, str) and scope):
            raise ValueError(f"scope is a str that is not empty, not {scope!r}")
        if dedup is not None and inbox is not None:
            raise ValueError("dedup and inbox are two ways to the same end: give one of them")
        if dedup is None and inbox is None and message_id is not BY_HEADER:
            raise ValueError("message_id has no use without a store (dedup) or an inbox")
        if message_id is None and dedup is not None:
            raise ValueError("a store needs ids: give message_id; position() is the record itself")
        _check_extractor(message_id)
        if inbox is not None and on_store_error == "process":
            raise UnsafeConfigError(
                "on_store_error",
                "process",
                "the inbox is the handler's own database: without it nothing can be handled",
                'leave on_store_error at "wait"',
            )
        if not isinstance(fingerprint, bool):
            raise TypeError(f"fingerprint is True or False, not {fingerprint!r}")
        _check_made(dedup, "claim", "dedup is a store, such as SqliteDedupStore('ids.db')")
        _check_made(inbox, "transaction", "inbox is one, such as SqliteInbox('app.db')")
        memory = dedup if inbox is None else inbox
        if memory is not None and memory.retention < SHORT and message_id is not None:
            warnings.warn(
                f"retention={memory.retention}: an id is forgotten before a relay or a worker that was down repeats it. "
                "Then it is handled again. A day is usual; longer than the longest outage is right",
                DurabilityWarning,
                stacklevel=3,
            )
        self.inbox = inbox
        self.retention = None if memory is None else memory.retention
        self.waits = on_store_error == "wait"
        self.counts = Counter(dict.fromkeys(COUNTED, 0))
        self._settings = settings
        self._dedup = dedup
        self._message_id = message_id
        self._on_missing: OnMissingId = on_missing_id
        self._takeover: Takeover = takeover
        self._scope = scope
        self._fingerprint = fingerprint
        self._warns_of_others = dedup is not None and not dedup.capabilities.shared

    def note(self, *, others: Callable[[], bool]) -> None:
        """Say, once, that members of the group on other machines do not see what a local store remembers (D11)."""
        if self._warns_of_others and others():
            self._warns_of_others = False
            log.warning(
                "%s is local, and the group has other members. MemoryDedupStore knows what its process handled, "
                "SqliteDedupStore what its machine did: when partitions move elsewhere, messages may be handled again. Use a "
                "shared store; with SQLite one machine, with Memory one process.",
                type(self._dedup).__name__,
            )

    @property
    def scope(self) -> str:
        """Whose ids these are. A run without ``group.id`` is refused before it is asked for."""
        return self._scope or self._settings.group_id or ""

    @property
    def mark(self) -> str:
        """Stands beside offsets that are committed for show, as their metadata: the inbox knows better."""
        return f"in the inbox of {self.scope}"

    def ids(self, topic_id: Callable[[str], bytes]) -> MessageIds:
        """The ids of messages, for one run."""
        return MessageIds(self._message_id, self._on_missing, topic_id, fingerprint=self._fingerprint)

    def claims(self, topic_id: Callable[[str], bytes]) -> Claims | None:
        """The claims of one run; None without a store."""
        if self._dedup is None:
            return None
        return Claims(
            self._dedup,
            self.ids(topic_id),
            self.scope,
            max_poll_interval=self._settings.max_poll_interval,
            takeover=self._takeover,
            counts=self.counts,
        )

    def stored(self, topic_id: Callable[[str], bytes]) -> Stored | None:
        """Where partitions are read from, if that is stored beside the effects."""
        inbox = self.inbox
        if inbox is None:
            return None

        def offsets(partitions: Iterable[Partition]) -> Mapping[Partition, int]:
            sources = [Source(topic, topic_id(topic), number) for topic, number in partitions]
            found = inbox.start_offsets(self.scope, sources)
            return {(source.topic, source.partition): offset for source, offset in found.items() if offset is not None}

        return Stored(offsets, self.mark)


def _check_extractor(message_id: object) -> None:
    if any(message_id is maker for maker in _MAKERS):
        name = getattr(message_id, "__name__", "")
        raise TypeError(f"message_id is {name} itself, which makes a function of a message: call it, as in {name}(...)")
    if message_id is not None and not callable(message_id):
        raise TypeError(f"message_id is a function of a message, such as header({message_id!r}), not {message_id!r}")


def _check_made(value: object, call: str, wanted: str) -> None:
    if isinstance(value, type):
        raise TypeError(f"{wanted}, not the class {value.__name__} itself")
    if value is not None and not hasattr(value, call):
        raise TypeError(f"{wanted}, not a {type(value).__name__}")


def _one_of(name: str, value: object, allowed: Any) -> None:
    if value not in get_args(allowed):
        raise ValueError(f"{name} is one of {', '.join(map(repr, get_args(allowed)))}, not {value!r}")
