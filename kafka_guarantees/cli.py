"""The ``kafka-guarantees`` command: ``explain``, ``preflight``, ``broker``, ``demo``, ``prove``, ``bench``, ``dead-letters``.

Rules. Importing this file loads no more than the package itself: each command imports what it needs when it runs. Exit
status: 0 done, 1 a guarantee was broken, or not shown, or no Kafka could be had, 2 the command line or a setting is wrong,
128 + n ended by signal n.
"""

from __future__ import annotations

import argparse
import io
import logging
import os
import re
import signal
import sys
import warnings
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from kafka_guarantees import (
    AtLeastOnce,
    AtMostOnce,
    DurabilityWarning,
    ExactlyOnce,
    Explanation,
    KafkaGuaranteesError,
    __version__,
)

from ._settings.properties import canonical

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

EXPLAIN: Mapping[str, Callable[[Mapping[str, object]], Explanation]] = {
    "at-most-once": AtMostOnce.explain,
    "at-least-once": AtLeastOnce.explain,
    "exactly-once": ExactlyOnce.explain,
}
OK, FAILED, WRONG = 0, 1, 2
BY_SIGNAL = 128
_SERVERS = "bootstrap.servers"  # commands look for it by this name


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments; those of the process by default.

    Returns:
        The exit status.
    """
    arguments = _parser().parse_args(argv)
    command: Callable[[argparse.Namespace], int] = arguments.command
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal that is not UTF-8 is no reason to say nothing
    logging.getLogger("kafka_guarantees.librdkafka").addHandler(logging.NullHandler())  # errors are raised, and said once
    try:
        with _signals_like_ctrl_c():
            status = command(arguments)
            if sys.stdout is not None:
                sys.stdout.flush()
            return status
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains when it flushes
        return BY_SIGNAL + signal.SIGPIPE
    except _EndedBySignal as ended:
        return BY_SIGNAL + ended.number
    except KeyboardInterrupt:
        return BY_SIGNAL + signal.SIGINT


# -- the command line -----------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kafka-guarantees", description="At-most-once, at-least-once and exactly-once for Kafka."
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_explain(commands.add_parser("explain", help="the settings of a guarantee, with the reason for each"))
    _add_preflight(commands.add_parser("preflight", help="whether your brokers and topics are as a guarantee needs them"))
    _add_broker(commands.add_parser("broker", help="a local Kafka in the foreground"))
    _add_demo(commands.add_parser("demo", help="kill workers of every guarantee on a real Kafka, and count"))
    _add_prove(commands.add_parser("prove", help="put a guarantee to the proof under many faults, here or on your cluster"))
    _add_bench(commands.add_parser("bench", help="what each guarantee costs on your cluster: throughput, latency, memory"))
    _add_dead_letters(commands.add_parser("dead-letters", help="list, show and replay what is in a dead letter topic"))
    return parser


def _add_explain(parser: argparse.ArgumentParser) -> None:
    parser.description = "Print what a guarantee sets and why, with your settings on top. Needs no broker; shows no secret."
    parser.add_argument("guarantee", choices=list(EXPLAIN), metavar="GUARANTEE", help=" | ".join(EXPLAIN))
    _add_settings(parser)
    parser.set_defaults(command=_explain)


def _add_preflight(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Ask the brokers for what would void a guarantee, and print it with the commands that mend it. Nothing is changed. "
        "Exit status 0: nothing is unsafe; 1: something is, or nobody answered."
    )
    parser.add_argument("guarantee", choices=list(EXPLAIN), metavar="GUARANTEE", help=" | ".join(EXPLAIN))
    _add_cluster(parser)
    parser.add_argument(
        "-t", "--topic", action="append", default=[], metavar="TOPIC", dest="topics", help="consumed or produced to; repeatable"
    )
    parser.add_argument("--dead-letter", metavar="TOPIC", help="the dead letter topic")
    parser.add_argument("--format", choices=("text", "json"), default="text", help="of what is printed (default: text)")
    parser.set_defaults(command=_preflight)


def _add_broker(parser: argparse.ArgumentParser) -> None:
    parser.description = "Run Apache Kafka on loopback until Ctrl-C. Its data is removed at the end. Needs Java and Maven."
    parser.add_argument("--brokers", type=int, choices=(1, 3), default=1, help="three replicate (default: 1)")
    parser.set_defaults(command=_broker)


def _add_demo(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Send user offers through each class while its worker is killed again and again, and count what was lost and what "
        "was handled twice. Uses the Kafka that KAFKA_GUARANTEES_BOOTSTRAP names, or starts one."
    )
    parser.add_argument("--seed", type=int, help="of the moments at which workers are killed (default: a new one)")
    parser.add_argument("--kills", type=_positive, default=3, help="how often each worker is killed (default: 3)")
    parser.add_argument("--rate", type=_positive, default=400, help="messages sent per second (default: 400)")
    parser.set_defaults(command=_demo)


def _add_prove(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Workers of this library send, handle and transform under faults; then what they did and what is in the topics is "
        "checked. On a cluster of yours (-b, or bootstrap.servers in --config) only workers and their own connections are "
        "hurt, and nothing is touched but three topics and two groups that are made for it and removed."
    )
    parser.add_argument("guarantee", choices=list(EXPLAIN), metavar="GUARANTEE", help=" | ".join(EXPLAIN))
    where = parser.add_mutually_exclusive_group()
    where.add_argument("-b", "--bootstrap", metavar="HOST:PORT", help="a cluster that runs already")
    where.add_argument("--brokers", type=int, choices=(1, 3), help="a local cluster of so many (default: 3)")
    parser.add_argument("--config", type=Path, metavar="FILE", help="properties of all clients: key=value lines")
    parser.add_argument("--duration", type=_positive, default=60, metavar="S", help="seconds of faults (default: 60)")
    parser.add_argument("--workers", type=_positive, default=3, metavar="N", help="that transform (default: 3)")
    parser.add_argument("--partitions", type=_positive, default=8, metavar="N", help="of each topic (default: 8)")
    parser.add_argument(
        "--faults",
        type=lambda text: [name.strip() for name in text.split(",") if name.strip()],
        metavar="A,B",
        help="default: all that are possible; hold-frame:EndTxn hits only these requests; 'none' for none",
    )
    parser.add_argument("--seed", type=int, metavar="N", help="of the faults (default: a new one)")
    parser.add_argument(
        "--protocol",
        choices=("mixed", "classic", "cooperative", "consumer"),
        default="mixed",
        help="of the groups (default: mixed, one classic and one cooperative)",
    )
    parser.add_argument("--report", type=Path, metavar="FILE.html", help="default: proof-GUARANTEE.html; JSON is put beside it")
    parser.set_defaults(command=_prove)


def _add_dead_letters(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "What is in a dead letter topic, and back with it to where it came from. Data goes to stdout, the rest to stderr."
    )
    actions = parser.add_subparsers(required=True, metavar="ACTION", dest="action")
    listing = actions.add_parser("list", help="a line for each, and which of them were replayed")
    showing = actions.add_parser("show", help="one of them, with its headers and value")
    replaying = actions.add_parser("replay", help="send some of them back, each exactly once")
    for action in (listing, showing, replaying):
        action.add_argument("topic", metavar="TOPIC", help="the dead letter topic")
        _add_cluster(action)
        action.set_defaults(command=_dead_letters)
    for action in (listing, replaying):
        action.add_argument("--origin", metavar="TOPIC", help="only those that came from this topic")
        action.add_argument("--error", metavar="TYPE", help="only those with this error, as ValueError or json.JSONDecodeError")
        action.add_argument("--since", type=_moment, metavar="TIME", help="only from then on: ISO 8601, UTC if it does not say")
    how_many = listing.add_mutually_exclusive_group()
    how_many.add_argument("--limit", type=_positive, metavar="N", help="only the newest so many")
    how_many.add_argument("--count", action="store_true", help="a line for each topic of origin and type of error: how many")
    listing.add_argument("--format", choices=("text", "json"), default="text", help="json: an object on each line")
    showing.add_argument("place", type=_place, metavar="PARTITION:OFFSET")
    how = showing.add_mutually_exclusive_group()
    how.add_argument("--full", action="store_true", help="all of a long value")
    how.add_argument("--raw", action="store_true", help="the bytes of the value to stdout, and nothing else")
    # options after the places: before Python 3.12.7 a list of positionals is empty if an option comes first
    replaying.usage = "%(prog)s TOPIC (PARTITION:OFFSET ... | --all) [options]"
    which = replaying.add_mutually_exclusive_group(required=True)
    which.add_argument("places", type=_place, nargs="*", default=[], metavar="PARTITION:OFFSET")
    which.add_argument("--all", action="store_true", help="all that the filters let through")
    replaying.add_argument("--dry-run", action="store_true", help="only say what would be sent")
    replaying.add_argument("--without-headers", action="store_true", help="also those whose headers are lost")
    replaying.add_argument(
        "--present-time",
        action="store_true",
        help="also those that are older than their topic keeps a record: with the time of now",
    )


def _add_bench(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Measure what each guarantee costs on a cluster: messages per second, latency, start-up, memory. It makes topics and "
        "groups of its own, and removes them. Without -b, and without bootstrap.servers, on one local broker."
    )
    _add_cluster(parser)
    parser.add_argument("--messages", type=_positive, default=200_000, metavar="N", help="of each measure (default: 200000)")
    parser.add_argument("--size", type=_positive, default=100, metavar="BYTES", help="of a value (default: 100)")
    parser.add_argument("--seconds", type=_positive, default=20, metavar="S", help="of latency, each guarantee (default: 20)")
    parser.add_argument("--partitions", type=_positive, default=8, metavar="N", help="of each topic (default: 8)")
    parser.add_argument("--replication", type=_positive, metavar="N", help="default: 3, or as many as there are brokers")
    parser.add_argument("--report", type=Path, default=Path("bench.html"), metavar="FILE.html", help="JSON is put beside it")
    parser.set_defaults(command=_bench)


def _add_cluster(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-b", "--bootstrap", metavar="HOST:PORT", help="wins over bootstrap.servers")
    _add_settings(parser)


def _add_settings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, metavar="FILE", help="a properties file: key=value lines, # for comments")
    parser.add_argument(
        "--set", type=_setting, action="append", default=[], metavar="KEY=VALUE", dest="settings", help="wins over the file"
    )


def _positive(text: str) -> int:
    number = int(text) if text.strip().isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of 1 or more")
    return number


def _moment(text: str) -> int:
    try:
        moment = datetime.fromisoformat(re.sub("[zZ]$", "+00:00", text))  # 3.10 does not know the Z
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is not a time like 2026-01-31T12:00:00Z") from None
    return int((moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)).timestamp() * 1000)


def _place(text: str) -> tuple[int, int]:
    match = re.fullmatch("([0-9]{1,9}):([0-9]{1,18})", text)  # so that both fit into C
    if match is None:
        raise argparse.ArgumentTypeError(f"{text} is not PARTITION:OFFSET")
    return int(match[1]), int(match[2])


def _setting(text: str) -> tuple[str, str]:
    key, equals, value = (part.strip() for part in text.partition("="))
    if not (key and equals):
        raise argparse.ArgumentTypeError("not KEY=VALUE")  # without the text: it may hold a secret
    return key, value


def properties(text: str) -> dict[str, str]:
    """The settings in a properties file: ``key=value`` lines, blank lines, and comments that begin with ``#``.

    Raises:
        ValueError: a line is none of these. It is named by its number, since it may hold a secret.
    """
    found = {}
    for number, line in enumerate(text.split("\n"), 1):  # no other character: a part of a password would be a line
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        try:
            key, value = _setting(line)
        except argparse.ArgumentTypeError:
            raise ValueError(f"line {number} is neither key=value nor a comment") from None
        found[key] = value
    return found


# -- the commands ---------------------------------------------------------------------------------------------------------


def _explain(arguments: argparse.Namespace) -> int:
    try:
        config = _config(arguments.config, arguments.settings)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DurabilityWarning)  # the table marks them and says why
            explanation = EXPLAIN[arguments.guarantee](config)
    except (OSError, ValueError) as error:  # UnsafeConfigError is a ValueError
        return _complain(error, WRONG)
    print(explanation)  # noqa: T201 - a command prints
    return OK


def _preflight(arguments: argparse.Namespace) -> int:
    from ._preflight import preflight  # noqa: PLC0415 - importing stays cheap
    from ._settings import Guarantee, resolve  # noqa: PLC0415 - likewise

    guarantee = Guarantee(arguments.guarantee)
    try:
        config = _config(arguments.config, arguments.settings, arguments.bootstrap)
        if guarantee is Guarantee.EXACTLY_ONCE:
            config.setdefault("transactional.id", "preflight")  # nothing is begun with it
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DurabilityWarning)  # of the client's settings, which `explain` explains
            report = preflight(resolve(guarantee, config), arguments.topics, dead_letter=arguments.dead_letter)
    except (OSError, ValueError) as error:  # UnsafeConfigError is a ValueError
        return _complain(error, WRONG)
    print(report.to_json() if arguments.format == "json" else report)  # noqa: T201 - a command prints
    return OK if report.ok else FAILED


def _config(file: Path | None, settings: Sequence[tuple[str, str]], bootstrap: str | None = None) -> dict[str, str]:
    """What --config, --set and -b say; the later of them wins, also over another name of the same setting."""
    config = _file(file)
    for name, value in (*settings, *([(_SERVERS, bootstrap)] if bootstrap else [])):
        config = {other: kept for other, kept in config.items() if canonical(other) != canonical(name)} | {name: value}
    named = [name for name in config if canonical(name) == _SERVERS]
    return config if len(named) != 1 else {_SERVERS if name in named else name: value for name, value in config.items()}


def _file(path: Path | None) -> dict[str, str]:
    if path is None:
        return {}
    try:
        return properties(path.read_bytes().decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not a text in UTF-8") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _broker(arguments: argparse.Namespace) -> int:
    from .testing.local_kafka import BOOTSTRAP_VARIABLE, LocalKafka, LocalKafkaError  # noqa: PLC0415 - importing stays cheap

    try:
        with LocalKafka(brokers=arguments.brokers) as kafka:
            print(  # noqa: T201 - a command prints
                f"Kafka runs at {kafka.bootstrap}\n"
                f"  in Python:     {{'bootstrap.servers': '{kafka.bootstrap}'}}\n"
                f"  in the shell:  export {BOOTSTRAP_VARIABLE}={kafka.bootstrap}\n"
                f"  its logs:      {kafka.data_dir}\n"
                "Topics are not created by themselves. Ctrl-C ends it and removes its data.",
                flush=True,
            )
            kafka.wait()
    except (KeyboardInterrupt, _EndedBySignal):
        return OK  # that is how it ends
    except LocalKafkaError as error:
        return _complain(error, FAILED)


def _demo(arguments: argparse.Namespace) -> int:
    from confluent_kafka import KafkaException  # noqa: PLC0415 - importing stays cheap

    from .demo.show import run_demo  # noqa: PLC0415 - likewise
    from .testing.local_kafka import LocalKafkaError  # noqa: PLC0415 - likewise

    try:
        return OK if run_demo(seed=arguments.seed, kills=arguments.kills, rate=arguments.rate) else FAILED
    except (LocalKafkaError, KafkaException) as error:
        return _complain(error, FAILED)


def _prove(arguments: argparse.Namespace) -> int:
    try:
        from .prove.command import Asked, run_proof  # noqa: PLC0415 - importing stays cheap
    except ModuleNotFoundError as error:
        return _complain(f"the report needs {error.name}, which is not installed: pip install 'kafka-guarantees[prove]'", WRONG)
    from confluent_kafka import KafkaException  # noqa: PLC0415 - likewise

    from .testing.local_kafka import LocalKafkaError  # noqa: PLC0415 - likewise

    try:
        asked = Asked(
            guarantee=arguments.guarantee,
            config=_config(arguments.config, (), arguments.bootstrap),
            brokers=arguments.brokers,
            duration=arguments.duration,
            workers=arguments.workers,
            partitions=arguments.partitions,
            faults=arguments.faults,
            seed=arguments.seed,
            protocol=arguments.protocol,
            report=arguments.report or Path(f"proof-{arguments.guarantee}.html"),
            config_file=arguments.config,
        )
        return OK if run_proof(asked) else FAILED
    except (LocalKafkaError, KafkaException, TimeoutError) as error:
        return _complain(error, FAILED)
    except (OSError, ValueError) as error:  # of the arguments and the files; UnsafeConfigError is a ValueError
        return _complain(error, WRONG)


def _bench(arguments: argparse.Namespace) -> int:
    try:
        from .bench.command import Asked, Refused, run_bench  # noqa: PLC0415 - importing stays cheap
    except ModuleNotFoundError as error:
        return _complain(f"the report needs {error.name}, which is not installed: pip install 'kafka-guarantees[prove]'", WRONG)
    from .bench.plan import Plan  # noqa: PLC0415 - likewise
    from .bench.process import WorkFailed  # noqa: PLC0415 - likewise
    from .testing.local_kafka import LocalKafkaError  # noqa: PLC0415 - likewise

    try:
        plan = Plan(arguments.messages, arguments.size, arguments.seconds, arguments.partitions, arguments.replication)
        config = _config(arguments.config, arguments.settings, arguments.bootstrap)
        run_bench(Asked(config, plan, arguments.report, arguments.config))
    except (WorkFailed, Refused, LocalKafkaError, TimeoutError) as error:
        return _complain(error, FAILED)
    except (OSError, ValueError) as error:  # of the arguments and the files; UnsafeConfigError is a ValueError
        return _complain(error, WRONG)
    return OK


def _dead_letters(arguments: argparse.Namespace) -> int:
    from confluent_kafka import KafkaException  # noqa: PLC0415 - importing stays cheap

    from .dead_letters.command import list_, replay, show  # noqa: PLC0415 - likewise
    from .dead_letters.reading import Filter, NotRead  # noqa: PLC0415 - likewise

    try:
        config = _config(arguments.config, arguments.settings, arguments.bootstrap)
        if arguments.action == "show":
            done = show(config, arguments.topic, arguments.place, full=arguments.full, raw=arguments.raw)
        else:
            chosen = Filter(arguments.origin, arguments.error, arguments.since)
            if arguments.action == "replay" and not arguments.all and chosen != Filter():
                raise ValueError("--origin, --error and --since choose among --all")  # noqa: TRY301
            if arguments.action == "list":
                json = arguments.format == "json"
                done = list_(config, arguments.topic, chosen, limit=arguments.limit, count=arguments.count, json=json)
            else:
                done = replay(
                    config,
                    arguments.topic,
                    chosen,
                    None if arguments.all else arguments.places,
                    dry_run=arguments.dry_run,
                    without_headers=arguments.without_headers,
                    present_time=arguments.present_time,
                )
    except (OSError, ValueError) as error:  # UnsafeConfigError is a ValueError
        return _complain(error, WRONG)
    except (NotRead, KafkaGuaranteesError, KafkaException) as error:
        return _complain(error, FAILED)
    return OK if done else FAILED


def _complain(error: Exception | str, status: int) -> int:
    if isinstance(error, BrokenPipeError):  # an OSError, and nobody is there to complain to: see main()
        raise error
    reason: Any = error.args[0] if isinstance(error, Exception) and error.args else None
    if hasattr(reason, "name") and hasattr(reason, "str"):  # a KafkaError, in a KafkaException
        error = f"the brokers refuse, or do not answer ({reason.name()}: {reason.str()})"
    print(f"kafka-guarantees: {error}", file=sys.stderr)  # noqa: T201 - a command prints
    return status


# -- ending ---------------------------------------------------------------------------------------------------------------


class _EndedBySignal(BaseException):
    """SIGTERM came: every `with` block on the way out ends its processes."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextmanager
def _signals_like_ctrl_c() -> Iterator[None]:
    """Let SIGTERM and SIGHUP unwind the stack, so that nothing is left behind; by default they end this process on the spot."""

    def unwind(number: int, _frame: object) -> NoReturn:
        if number == signal.SIGHUP:  # a terminal that closes may send two, and the second would come into the tidying up
            signal.signal(number, signal.SIG_IGN)
        raise _EndedBySignal(number)

    heeded = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) != signal.SIG_IGN]  # nohup
    before = {number: signal.signal(number, unwind) for number in heeded}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
