"""Laws of the source itself: who imports whom, which calls of confluent-kafka never occur, and what a docstring must say."""

from __future__ import annotations

import ast
import inspect
import re
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import kafka_guarantees
from kafka_guarantees import AtLeastOnce, AtMostOnce, Delivery, ExactlyOnce, Transaction

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PACKAGE = Path(kafka_guarantees.__file__).parent
# They play the user, or another program: what they do with confluent-kafka is theirs.
APART = ("testing", "demo", "prove", "bench", "dead_letters")

# Modules of an extra, which nothing imports until a user asks for its store.
POSTGRES = {"psycopg", "psycopg_pool"}
EXTRAS = {
    f"kafka_guarantees.dedup.{module}": POSTGRES
    for module in ("postgres", "postgres_inbox", "_connecting", "_conninfo", "_pooler", "_silence")
}

# The rooms, lowest first. A room is a module or a folder; one may use only what is below it. A new room is placed here.
FLOORS: list[set[str]] = [
    {"errors", "_printable"},
    {"records", "_collector", "_threads"},
    {"_futile"},
    {"dedup", "_dead_letters"},
    {"_settings"},
    {
        "_lifecycle",
        "_enqueue",
        "_posted",
        "_client",
        "_offsets",
        "_transaction_state",
        "_pace",
        "_serialization",
        "_turns",
        "_awaited",
    },
    {"_places", "_assignment", "_batch", "_watch"},
    {"_group_client", "_offset_expiry", "_vanished"},
    {"_topics", "_positions"},
    {"_events"},
    {"_handler_thread", "_producer"},
    {"_transactional"},
    {"_in_flight"},
    {"_consumer"},
    {"_failures", "_trail"},
    {"_recognition", "_preflight"},
    {"_at_least_once_run", "transaction"},
    {"at_most_once", "at_least_once", "exactly_once"},
    {"__init__"},
    {"testing"},
    {"demo", "dead_letters"},
    {"prove"},
    {"bench"},
    {"cli"},
    {"__main__"},
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def library() -> list[Path]:
    """The modules that a user of the library runs."""
    return [path for path in sources() if path.relative_to(PACKAGE).parts[0] not in APART]


def name(path: Path) -> str:
    return ".".join(("kafka_guarantees", *path.relative_to(PACKAGE).with_suffix("").parts))


def room(module: str) -> str:
    return [*module.split("."), "__init__"][1]


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """Every module that a file imports, in full, with the line; those for the type checker too, and those inside functions."""
    here = name(path).split(".")
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = here[: -node.level] if node.level else []
            module = ".".join([*start, *([node.module] if node.module else [])])
            for alias in node.names:
                inside = module.startswith("kafka_guarantees") and is_module(f"{module}.{alias.name}")
                yield (f"{module}.{alias.name}" if inside else module), node.lineno


def is_module(full: str) -> bool:
    path = PACKAGE.parent.joinpath(*full.split("."))
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def ours(path: Path) -> Iterator[tuple[str, int]]:
    return ((module, line) for module, line in imports(path) if module.split(".")[0] == "kafka_guarantees")


# --- imports -----------------------------------------------------------------------------------------------------------


def test_every_room_has_its_floor() -> None:
    """DESIGN 5: a new module is placed in the table above, by decision; and a name in the table is a room."""
    assert {room(name(path)) for path in sources()} == set(FLOOR)


@pytest.mark.parametrize("path", sources(), ids=name)
def test_imports_point_downwards_only(path: Path) -> None:
    """DESIGN 5: also under TYPE_CHECKING and inside functions, so that a room is understood from those below it."""
    mine = room(name(path))
    for module, line in ours(path):
        theirs = room(module)
        assert theirs == mine or FLOOR[theirs] < FLOOR[mine], f"{path.name}:{line} imports {module}"


def test_no_module_imports_itself_by_a_detour() -> None:
    """STYLE: no import cycle, also inside a folder."""
    below = {name(path).removesuffix(".__init__"): {module for module, _ in ours(path)} for path in sources()}
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, " -> ".join((*way, module))
        if module not in done:
            for other in below.get(module, ()):
                visit(other, (*way, module))
            done.add(module)

    for module in below:
        visit(module, ())


def test_nothing_inside_imports_the_front_door() -> None:
    """``__init__`` is for users: inside, a name is imported from where it lives."""
    for path in library():
        if FLOOR[room(name(path))] <= FLOOR["__init__"]:
            assert "kafka_guarantees" not in {module for module, _ in ours(path)}, path


@pytest.mark.parametrize("path", library(), ids=name)
def test_nothing_is_imported_beyond_the_three_dependencies(path: Path) -> None:
    """The library needs confluent-kafka, tenacity and typing-extensions, and the rest is in Python."""
    allowed = {*sys.stdlib_module_names, "kafka_guarantees", "confluent_kafka", "tenacity", "typing_extensions"}
    allowed |= EXTRAS.get(name(path), set())
    for module, line in imports(path):
        assert module.split(".")[0] in allowed, f"{path.name}:{line} imports {module}"


def users_of(what: str) -> set[str]:
    """The modules of the library that name ``confluent_kafka.<what>``, however they import it."""
    found = set()
    for path in library():
        for node in ast.walk(tree(path)):
            imported = (
                isinstance(node, ast.ImportFrom)
                and (node.module or "").startswith("confluent_kafka")
                and what in {alias.name for alias in node.names}
            )
            reached = (
                isinstance(node, ast.Attribute)
                and node.attr == what
                and isinstance(node.value, ast.Name)
                and node.value.id in {"confluent_kafka", "cimpl"}
            )
            if imported or reached:
                found.add(name(path).removeprefix("kafka_guarantees."))
    return found


@pytest.mark.parametrize(
    ("what", "owners"), [("Producer", {"_enqueue", "_producer", "_transactional"}), ("Consumer", {"_group_client"})]
)
def test_each_c_client_has_few_users(what: str, owners: set[str]) -> None:
    """Who knows how librdkafka's client is to be treated; the check of a configuration makes one for a moment."""
    assert users_of(what) - {"_settings.librdkafka"} == owners


@pytest.mark.parametrize(
    "what", ["AIOProducer", "AIOConsumer", "SerializingProducer", "DeserializingConsumer", "ShareConsumer"]
)
def test_other_clients_are_not_used(what: str) -> None:
    """Y05, Y06, L10: they send twice, lose on cancel, or drop after five attempts."""
    assert users_of(what) == set()


# --- calls that never occur ----------------------------------------------------------------------------------------------


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            yield node.func.attr, node


def test_one_room_asks_where_partitions_begin_and_end() -> None:
    """M05: a position is what the group has committed, or a declared start."""
    asking = {"offsets_for_times", "get_watermark_offsets"}
    assert {room(name(path)) for path in library() if asking & {attribute for attribute, _ in calls(path)}} == {"_places"}


@pytest.mark.parametrize("path", library(), ids=name)
@pytest.mark.parametrize(
    ("method", "why"),
    [
        ("position", "C02: it means handed out, not finished"),
        ("produce_batch", "P11: it drops headers and ignores the partition"),
        ("store_offsets", "L04: a partial failure is swallowed"),
    ],
)
def test_a_call_that_means_something_else_never_occurs(path: Path, method: str, why: str) -> None:
    """Calls of confluent-kafka that look right and are not."""
    meant = method == "position" and room(name(path)) == "_vanished"  # whether anything was handed out
    assert meant or method not in {attribute for attribute, _ in calls(path)}, why


def test_a_subscription_ends_with_its_consumer() -> None:
    """A consumer lives for one run: unsubscribe() is a part of close(), and nothing else."""
    found = [
        name(path)
        for path in library()
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Attribute) and node.attr == "unsubscribe"
    ]
    assert found == ["kafka_guarantees._group_client"]


def function_around(path: Path, call: ast.Call) -> str:
    """The innermost function that a call is in."""
    around = [
        node
        for node in ast.walk(tree(path))
        if isinstance(node, ast.FunctionDef) and node.lineno <= call.lineno <= (node.end_lineno or node.lineno)
    ]
    return max(around, key=lambda node: node.lineno).name


@pytest.mark.parametrize("path", library(), ids=name)
def test_a_consumer_commits_only_offsets_that_are_named_and_waits(path: Path) -> None:
    for method, call in calls(path):
        on_raw = isinstance(call.func, ast.Attribute) and ast.unparse(call.func.value).split(".")[-1] == "raw"
        if method == "commit" and on_raw:
            given = {keyword.arg: keyword.value for keyword in call.keywords}
            assert "offsets" in given, f"{path.name}:{call.lineno}"
            waits = given.get("asynchronous")
            assert isinstance(waits, ast.Constant), f"{path.name}:{call.lineno}"
            assert waits.value is (function_around(path, call) == "send_commit"), f"{path.name}:{call.lineno}"


def flat(test: ast.expr) -> Iterator[ast.expr]:
    if isinstance(test, ast.BoolOp):
        for value in test.values:
            yield from flat(value)
    else:
        yield test


def truth_tests(path: Path) -> Iterator[ast.expr]:
    for node in ast.walk(tree(path)):
        if isinstance(node, (ast.If, ast.While, ast.IfExp, ast.Assert)):
            yield from flat(node.test)
        elif isinstance(node, ast.BoolOp):
            yield from node.values[:-1]  # the last one is only handed on
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            yield node.operand
        elif isinstance(node, ast.comprehension):
            yield from node.ifs
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "bool":
            yield from node.args


@pytest.mark.parametrize("path", sources(), ids=name)
def test_a_message_is_never_tested_for_truth(path: Path) -> None:
    """L02: bool(message) is False for a tombstone and for an empty payload; an error is always True (Y14)."""
    names = re.compile(r"(message|msg|m|first|event|record|error|err|exc)")
    for test in truth_tests(path):
        test = test.value if isinstance(test, ast.NamedExpr) else test  # noqa: PLW2901 - its value is what is tested
        is_value = (
            isinstance(test, ast.Call) and isinstance(test.func, ast.Attribute) and test.func.attr in {"error", "value", "poll"}
        )
        assert not is_value, f"{path.name}:{test.lineno}"
        assert not (isinstance(test, ast.Name) and names.fullmatch(test.id)), f"{path.name}:{test.lineno} {test.id}"


@pytest.mark.parametrize("path", library(), ids=name)
def test_flags_of_errors_are_read_in_one_place(path: Path) -> None:
    """E01: librdkafka sets retriable() and txn_requires_abort() on transactional errors only; one table reads them."""
    if name(path) != "kafka_guarantees._transaction_state":
        assert not {"retriable", "txn_requires_abort"} & {method for method, _ in calls(path)}


# --- the front door ------------------------------------------------------------------------------------------------------


def test_public_names_are_few_sorted_and_there() -> None:
    """DESIGN 2: under 25 names, in the order of a dictionary, each of them in the package."""
    names = kafka_guarantees.__all__
    assert names == sorted(names)
    assert len(names) == len(set(names)) < 25
    assert all(hasattr(kafka_guarantees, one) for one in names)


def test_what_init_imports_is_what_it_exports() -> None:
    """No public name by accident, none that is forgotten."""
    (front,) = [path for path in sources() if name(path) == "kafka_guarantees.__init__"]
    imported = {
        alias.asname or alias.name for node in tree(front).body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert imported == set(kafka_guarantees.__all__)


@pytest.mark.parametrize("path", sources(), ids=name)
def test_every_file_opens_with_what_lives_there(path: Path) -> None:
    """STYLE: a module docstring, so that a reader knows whether to read on."""
    assert ast.get_docstring(tree(path)) or not path.read_text(encoding="utf-8").strip()


def public_functions() -> list[tuple[str, Callable[..., object], str]]:
    """What a user can call: name, function, docstring. A constructor is described by its class."""
    found: list[tuple[str, Callable[..., object], str]] = []
    for one in kafka_guarantees.__all__:
        public = getattr(kafka_guarantees, one)
        if isinstance(public, type) and not issubclass(public, BaseException):
            found.append((one, public.__init__, inspect.getdoc(public) or ""))
            for attribute, value in vars(public).items():
                function = value.__func__ if isinstance(value, (classmethod, staticmethod)) else value
                if not attribute.startswith("_") and inspect.isfunction(function):
                    found.append((f"{one}.{attribute}", function, inspect.getdoc(function) or ""))
    return found


def test_every_public_class_has_a_docstring_of_its_own() -> None:
    """Also the errors: what to think of it, and what to do."""
    for one in set(kafka_guarantees.__all__) - {"attempt"}:  # which is a ContextVar
        assert vars(getattr(kafka_guarantees, one)).get("__doc__"), one


@pytest.mark.parametrize(("function", "docstring"), [pytest.param(f, d, id=n) for n, f, d in public_functions()])
def test_a_docstring_names_what_its_function_raises(function: Callable[..., object], docstring: str) -> None:
    """STYLE: every ``raise`` in the body of something public is announced by its class."""
    assert docstring
    try:
        body = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError):
        return  # written by dataclass, or in C
    for node in ast.walk(body):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            raised = ast.unparse(node.exc.func)
            assert raised in docstring or not raised[0].isupper(), raised


TALKERS = [
    (kind.__name__, method)
    for kind in (AtMostOnce, AtLeastOnce, ExactlyOnce)
    for method in vars(kind)
    if not method.startswith("_") and method not in {"stop", "close", "explain", "dedup_counts"}
]


@pytest.mark.parametrize(("kind", "method"), TALKERS)
def test_what_talks_to_brokers_says_what_it_raises(kind: str, method: str) -> None:
    """Errors of the brokers come from deep inside: the docstring is the only place where a user meets them beforehand."""
    docstring = inspect.getdoc(getattr(getattr(kafka_guarantees, kind), method)) or ""
    assert "Raises:" in docstring or docstring.startswith("Like ``run``")


def test_what_a_user_gets_from_a_call_is_public() -> None:
    """Delivery and Transaction are returned to users, so that they can name their types."""
    assert {Delivery.__name__, Transaction.__name__} <= set(kafka_guarantees.__all__)
