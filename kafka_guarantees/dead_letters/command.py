"""``list``, ``show`` and ``replay``: what they print. Data goes to stdout, what is said about it to stderr.

Rules. Everything in a dead letter was written by others: nothing of it reaches a terminal unescaped (S09). Each function
returns True if all was done.
"""

from __future__ import annotations

import sys
from base64 import b64encode
from collections import Counter
from contextlib import ExitStack
from dataclasses import asdict
from datetime import datetime, timezone
from json import dumps
from typing import TYPE_CHECKING

from kafka_guarantees._dead_letters import headers_of, origin_of
from kafka_guarantees._printable import printable

from .reading import Contents, NotRead, TopicReader
from .replay import Outcome, Replay, end_earlier, producer, sort_out

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from confluent_kafka import Message

    from kafka_guarantees._dead_letters import DeadLetter

    from .reading import Entry, Filter, Place

ON_A_LINE = 200  # characters of an error
PART = 1000  # characters of a key or of a header
VALUE = 4000  # characters of a value, unless all of it is asked for
REASONS = 20  # places that are named where something was left


def list_(config: Mapping[str, str], topic: str, chosen: Filter, *, limit: int | None, count: bool, json: bool) -> bool:
    """Print a line for each dead letter, the oldest first; or only how many there are.

    Args:
        config: librdkafka's properties.
        topic: the dead letter topic.
        chosen: which.
        limit: only the newest so many.
        count: a line for each topic of origin and type of error instead, the most first.
        json: an object on each line.
    """
    with TopicReader(_reachable(config), topic) as reader:
        contents = Contents.of(reader)
    found = chosen.of(contents.entries.values())
    shown = found if limit is None else found[-limit:]
    if count:
        _print_counts(found, contents, json=json)
    else:
        for entry in shown:
            _print((_json if json else _line)(entry, replayed=entry.place in contents.replayed))
    replayed = sum(entry.place in contents.replayed for entry in found)
    _say(f"dead letters: {len(found)}, replayed: {replayed}" + (f", shown: {len(shown)}" if len(shown) < len(found) else ""))
    return _read_all(contents)


def show(config: Mapping[str, str], topic: str, place: Place, *, full: bool, raw: bool) -> bool:
    """Print one dead letter.

    Args:
        config: librdkafka's properties.
        topic: the dead letter topic.
        place: partition and offset.
        full: all of the value.
        raw: nothing but the bytes of the value.

    Raises:
        NotRead: there is none.
    """
    partition, offset = place
    with TopicReader(_reachable(config), topic) as reader:
        if partition not in reader.partitions:
            raise NotRead(f"topic {topic!r} has no partition {partition}")
        message = next(iter(reader.fetch(partition, [offset])), None) if offset < reader.end(partition) else None
        if message is None:
            raise NotRead(f"topic {topic!r} has no record at {_named(place)} that a reader of committed records could see")
        contents = Contents.of(reader, {partition: offset})
    letter = origin_of(message)
    value = message.value()
    if raw and letter is not None and "value" in letter.lost:
        raise NotRead(f"its value found no room: it is at topic {letter.topic!r} {_named((letter.partition, letter.offset))}")
    if raw and value is not None:
        sys.stdout.buffer.write(value)
    elif raw:
        _say("null")
    elif letter is None:
        _print(f"record      {_named(place)}\n{_content(message, headers_of(message) or (), full=full)}")
    else:
        _print(f"{_about(letter, place, replayed=place in contents.replayed)}\n{_content(message, letter.headers, full=full)}")
    if letter is None:
        _say("it is not a dead letter, or its headers are damaged")
    return _read_all(contents) and letter is not None


def replay(
    config: Mapping[str, str],
    topic: str,
    chosen: Filter,
    places: Sequence[Place] | None,
    *,
    dry_run: bool,
    without_headers: bool,
    present_time: bool,
) -> bool:
    """Send dead letters back to where they came from, each exactly once, and print a line for each.

    Args:
        config: librdkafka's properties.
        topic: the dead letter topic.
        chosen: which.
        places: which, if not all that ``chosen`` lets through.
        dry_run: send nothing.
        without_headers: also those whose headers are lost.
        present_time: also those that are older than their topic keeps a record, with the time of now.

    Raises:
        FencedError: another replay of this topic has begun.
        KafkaGuaranteesError, KafkaException, NotRead: the rest was not sent.
    """
    outcome = Outcome()
    with ExitStack() as stack:
        reader = stack.enter_context(TopicReader(_reachable(config), topic))
        kafka = None if dry_run else stack.enter_context(producer(config, topic))
        if kafka is not None:
            end_earlier(kafka)
        contents = Contents.of(reader)
        wanted = [entry.place for entry in chosen.of(contents.entries.values())] if places is None else places
        good = sort_out(
            reader,
            contents,
            wanted,
            outcome,
            named=places is not None,
            without_headers=without_headers,
            present_time=present_time,
        )
        try:
            if kafka is not None:
                Replay(kafka, reader, contents, outcome, _print_sent).run(good)
        finally:
            _say(f"sent: {len(outcome.sent)}" if kafka is not None else f"would be sent: {len(good)}")
            _account(outcome)
        if kafka is None:
            for entry in good:
                _print_sent(entry)
    return _read_all(contents) and not outcome.left


# -- printing ---------------------------------------------------------------------------------------------------------------


def _print(text: str) -> None:
    sys.stdout.write(text + "\n")


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")


def _reachable(config: Mapping[str, str]) -> Mapping[str, str]:
    if not config.get("bootstrap.servers"):
        raise ValueError("which cluster? Give -b HOST:PORT, or bootstrap.servers in --config")
    return config


def _read_all(contents: Contents) -> bool:
    if contents.others:
        _say(f"not a dead letter, or with damaged headers: {contents.others}")
    complaints = contents.complaints()
    for complaint in complaints:
        _say(complaint)
    return not complaints


def _account(outcome: Outcome) -> None:
    if outcome.before:
        _say(f"replayed before, and left out: {len(outcome.before)}")
    if outcome.copies:
        _say(f"the same messages again, and left out: {len(outcome.copies)}")
    for reason, count in Counter(reason for _, reason in outcome.left).items():
        places = [_named(place) for place, why in outcome.left if why == reason]
        more = ", ..." if count > REASONS else ""
        _say(f"not sent: {count} ({', '.join(places[:REASONS])}{more}): {reason}")


def _print_counts(found: Sequence[Entry], contents: Contents, *, json: bool) -> None:
    kinds: dict[tuple[str, str], list[Entry]] = {}
    for entry in found:
        kinds.setdefault((entry.letter.topic, entry.letter.error_type), []).append(entry)
    for (topic, error_type), entries in sorted(kinds.items(), key=lambda kind: (-len(kind[1]), kind[0])):
        replayed = sum(entry.place in contents.replayed for entry in entries)
        first, last = entries[0].letter.time, entries[-1].letter.time  # they are in this order
        if json:
            kind = {"origin": {"topic": topic}, "error_type": error_type}
            _print(dumps({**kind, "count": len(entries), "replayed": replayed, "first": first, "last": last}))
        else:
            error = printable(error_type, ON_A_LINE)
            _print(f"{len(entries)}  replayed {replayed}  {_time(first)} to {_time(last)}  {topic}  {error}")


def _print_sent(entry: Entry) -> None:
    _print(f"{_named(entry.place)} -> {entry.letter.topic}/{entry.letter.partition}")


def _named(place: Place) -> str:
    return f"{place[0]}:{place[1]}"


def _time(milliseconds: int) -> str:
    try:
        moment = datetime.fromtimestamp(milliseconds / 1000, timezone.utc)
    except (OverflowError, OSError, ValueError):
        return f"{milliseconds} ms"  # after the year 9999
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _line(entry: Entry, *, replayed: bool) -> str:
    letter = entry.letter
    error = printable(f"{letter.error_type}: {letter.error}", ON_A_LINE)
    return (
        f"{_named(entry.place)}  {_time(letter.time)}  {letter.topic}/{letter.partition}:{letter.offset}  "
        f"attempts {letter.attempts}  {'replayed  ' if replayed else ''}"
        f"{f'without {_lost(letter)}  ' if letter.lost else ''}{error}"
    )


def _lost(letter: DeadLetter) -> str:
    return " and ".join(letter.lost)


def _json(entry: Entry, *, replayed: bool) -> str:
    letter = asdict(entry.letter)
    del letter["headers"]
    partition, offset = entry.place
    origin = {name: letter.pop(name) for name in ("topic", "partition", "offset", "timestamp")}
    return dumps({"partition": partition, "offset": offset, "origin": origin, **letter, "replayed": replayed})


def _about(letter: DeadLetter, place: Place, *, replayed: bool) -> str:
    timestamp = "none" if letter.timestamp is None else _time(letter.timestamp)
    return "\n".join(
        (
            f"dead letter {_named(place)}" + (", replayed" if replayed else ""),
            f"time        {_time(letter.time)}",
            f"origin      {letter.topic}/{letter.partition}:{letter.offset}, timestamp {timestamp}",
            f"group       {printable(letter.group or 'none', PART)}",
            f"attempts    {letter.attempts}",
            f"error       {printable(f'{letter.error_type}: {letter.error}', 2 * PART)}",
            *((f"left out    {_lost(letter)}, which found no room or could not be read",) if letter.lost else ()),
        )
    )


def _content(message: Message, headers: Sequence[tuple[str, bytes | None]], *, full: bool) -> str:
    value = message.value()
    size = "" if value is None else f", {len(value)} bytes"
    lines = [f"header      {printable(name, PART)}: {_in_line(content)}" for name, content in headers]
    return "\n".join((f"key         {_in_line(message.key())}", *lines, f"value{size}", _shown(value, None if full else VALUE)))


def _in_line(content: bytes | None) -> str:
    """Without line breaks: what is made of several could look like what this command says."""
    return printable(_shown(content, None), PART)


def _shown(content: bytes | None, most: int | None) -> str:
    """Text if it can be printed, else base64."""
    if content is None:
        return "null"
    try:
        text = content.decode()
    except UnicodeDecodeError:
        text = ""
    if not text.replace("\n", "").replace("\t", "").isprintable() or (content and not text):
        text = f"base64 {b64encode(content).decode()}"
    if most is None or len(text) <= most:
        return text
    return f"{text[:most]}... ({len(text) - most} characters more)"
