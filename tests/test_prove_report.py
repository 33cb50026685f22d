"""Laws of the report: it says what the proof says, needs nothing beside itself, and what a proof holds never becomes markup."""

from __future__ import annotations

import io
import json
import random
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from typing import TYPE_CHECKING

import pytest

from kafka_guarantees._printable import printable
from kafka_guarantees.prove.evidence import Fault, Proof, Verdict

pytest.importorskip("rich", reason="the report needs the extra `prove`")
pytest.importorskip("jinja2", reason="the report needs the extra `prove`")
pytest.importorskip("matplotlib", reason="the report needs the extra `prove`")

from kafka_guarantees.prove.page import WIDTH
from kafka_guarantees.prove.report import as_html, as_json, as_text
from kafka_guarantees.prove.screen import PLAIN, Progress, Screen

if TYPE_CHECKING:
    from collections.abc import Sequence

NASTY = "<script>alert(1)</script>\"' &amp; {{ 7 * 7 }} $x^2$ [red]\x1b[31m\x00\u202e\ud800"
VOID = {"meta", "br", "hr", "img", "input", "link"}


def held(seconds: int = 60, faults: int = 60) -> Proof:
    """A run in which everything went well, and one check had nothing to do."""
    chance = random.Random(1)
    names = ("kill-worker", "pause-worker", "kill-broker", "cut")
    done = [Fault(chance.choice(names), f"transformer-{n % 3}", n * seconds / faults, 0.0, "detail") for n in range(faults)]
    return Proof(
        guarantee="exactly-once",
        version="kafka-guarantees 0.1.0, librdkafka 2.16.1",
        command="kafka-guarantees prove exactly-once --seed 17",
        began="2026-11-24T11:40:12+00:00",
        seconds=seconds + 4.5,
        setting={"brokers": "3", "seed": "17"},
        figures={"ids sent": 24_000, "handled": 24_100},
        verdicts=[
            Verdict("committed-once", "every message has its outputs once", 24_000),
            Verdict("zombie-fenced", "a life that was replaced commits nothing", 0),
        ],
        faults=[replace(fault, ended=fault.began + (2.5 if fault.name != "kill-worker" else 0)) for fault in done],
        rates=[(float(t), 400, chance.randrange(500), chance.randrange(900)) for t in range(seconds)],
        lag=[(float(t), chance.randrange(1000)) for t in range(seconds)],
        kept_in="/tmp/proof",
    )


def broken() -> Proof:
    """Two checks found something, and there is a trouble."""
    return replace(
        held(),
        verdicts=[
            Verdict("committed-once", "outputs once", 24_000, [f"id-{n} has output 0 twice" for n in range(50)]),
            Verdict("aborted-hidden", "nothing aborted is visible", 30, ["id-7/0 was aborted\n  and is visible"]),
            Verdict("nothing-hangs", "no open transaction", 12),
        ],
        troubles=["consumer-0 did not end"],
    )


def short() -> Proof:
    """Nothing was wrong, and hardly anything happened."""
    lacking = ("12 records are in the input topic: fewer than 100 prove nothing",)
    return replace(held(), verdicts=[*held().verdicts, Verdict("activity", "enough has happened", 12, lacking=lacking)])


def nasty() -> Proof:
    """Every text in it tries to be something else."""
    return Proof(
        guarantee=NASTY,
        version=NASTY,
        command=NASTY,
        began=NASTY,
        seconds=3.0,
        setting={NASTY: NASTY, "seed": NASTY},
        figures={NASTY: 1},
        verdicts=[
            Verdict(NASTY, NASTY, 1, [NASTY] * 30),
            Verdict(NASTY, NASTY, 1, [NASTY], lacking=[NASTY]),
            Verdict(NASTY, NASTY, 0),
        ],
        faults=[Fault(NASTY, NASTY, 0.5, 0.5, NASTY), Fault(NASTY, NASTY, 1, 2, NASTY)],
        rates=[(0.0, 1, 1, 1)],
        lag=[(0.0, 1)],
        troubles=[NASTY],
        kept_in=NASTY,
    )


def bare() -> Proof:
    """Nothing was done, nothing was measured."""
    return replace(held(), verdicts=[], faults=[], rates=[], lag=[], setting={}, figures={}, kept_in="", seconds=0.0)


class Page(HTMLParser):
    """What a browser would find: tags, attributes, and text outside of <style>."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag, self.getpos()

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data


ALL = [held(), broken(), short(), nasty(), bare(), held(3600, 1000), replace(held(), faults=[]), replace(held(), rates=[])]
IDS = ["held", "broken", "short", "nasty", "bare", "long", "no faults", "no rates"]
each_proof = pytest.mark.parametrize("proof", ALL, ids=IDS)


# --- JSON ----------------------------------------------------------------------------------------------------------------


@each_proof
def test_the_json_has_all_of_the_proof(proof: Proof) -> None:
    """A program gets back what was in it, and the conclusions besides."""
    told = json.loads(as_json(proof))
    again = Proof(
        **{key: told[key] for key in ("guarantee", "version", "command", "began", "seconds", "kept_in", "setting", "figures")},
        verdicts=[Verdict(**{key: value for key, value in each.items() if key != "result"}) for each in told["verdicts"]],
        faults=[Fault(**fault) for fault in told["faults"]],
        rates=[(row["at"], row["sent"], row["handled"], row["visible"]) for row in told["rates"]],
        lag=[(row["at"], row["lag"]) for row in told["lag"]],
        troubles=told["troubles"],
    )
    assert again == replace(proof, troubles=list(proof.troubles), verdicts=[lists(each) for each in proof.verdicts])
    assert told["held"] is (proof.outcome == "held")
    assert told["outcome"] == proof.outcome


def lists(verdict: Verdict) -> Verdict:
    return replace(verdict, anomalies=list(verdict.anomalies), lacking=list(verdict.lacking))


def test_the_keys_of_the_json_stay() -> None:
    """Programs read them: a key that goes or changes its meaning counts ``format`` up."""
    told = json.loads(as_json(broken()))
    assert told["format"] == 1
    assert set(told) == {
        *("format", "guarantee", "held", "outcome", "version", "command", "began", "seconds", "kept_in", "setting", "figures"),
        *("verdicts", "troubles", "faults", "rates", "lag"),
    }
    assert [verdict["result"] for verdict in told["verdicts"]] == ["broken", "broken", "kept"]
    assert set(told["verdicts"][0]) == {"check", "result", "meaning", "examined", "anomalies", "more", "lacking"}


@pytest.mark.parametrize(
    ("proof", "expected"),
    [
        (held(), "held"),
        (broken(), "broken"),
        (bare(), "inconclusive"),
        (replace(held(), verdicts=held().verdicts[1:]), "inconclusive"),
        (short(), "inconclusive"),
        (replace(short(), verdicts=[*short().verdicts, *broken().verdicts]), "broken"),
        (replace(held(), troubles=["x"]), "broken"),
    ],
    ids=["held", "broken", "no checks", "no check exercised", "too little", "too little, and broken", "only a trouble"],
)
def test_a_run_that_examined_too_little_is_shown_neither_as_held_nor_as_broken(proof: Proof, expected: str) -> None:
    """Silence is no evidence, of anything; a trouble alone breaks the proof."""
    assert proof.outcome == expected
    assert ("✓ held" in as_html(proof)) is (expected == "held")
    assert ("✗ BROKEN" in as_html(proof)) is (expected == "broken")
    first = {"held": "kept", "broken": "BROKEN", "inconclusive": "INCONCLUSIVE"}[expected]
    assert as_text(proof).splitlines()[-1].split()[0] == first


def test_what_there_was_too_little_of_is_said_everywhere() -> None:
    """Whoever sees it knows what to do: a longer run."""
    proof, why = short(), "12 records are in the input topic"
    text, html = as_text(proof), as_html(proof)
    assert why in text.splitlines()[-1]
    assert why in "".join(text.splitlines()[:-1])
    assert why in Page(html).text
    assert "too little" in text
    assert "too little</span>" in html
    assert json.loads(as_json(proof))["verdicts"][-1]["result"] == "too little"
    assert json.loads(as_json(proof))["verdicts"][-1]["lacking"] == list(proof.verdicts[-1].lacking)


# --- the page ------------------------------------------------------------------------------------------------------------


@each_proof
def test_every_tag_is_closed(proof: Proof) -> None:
    """The page is well formed, the plot in it too, and no id is given twice."""
    page = Page(as_html(proof))
    assert page.open == []
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))


@each_proof
def test_the_page_needs_nothing_beside_itself(proof: Proof) -> None:
    """It may be mailed, and opens without a network: no script, and every reference points into the page."""
    html = as_html(proof)
    assert not re.search(r"https?://|@import|<script|<link|<img|<metadata|<!DOCTYPE svg|src=", html.replace("&#34;", '"'))
    page = Page(html)
    ids = {value for name, value in page.attributes if name == "id"}
    for name, value in page.attributes:
        assert not name.startswith("on"), name
        if name.endswith("href"):
            assert value.startswith("#"), value
            assert value[1:] in ids
    for target in re.findall(r"url\(([^)]*)\)", html):
        assert target.startswith("#"), target
        assert target[1:] in ids


def test_text_stays_text() -> None:
    """Ids, names and errors come from anywhere: they are shown, and are neither markup, template, mathematics nor controls."""
    html = as_html(nasty())
    page = Page(html)
    assert "script" not in page.tags
    assert page.text.count("<script>alert(1)</script>") > 30
    assert "{{ 7 * 7 }} $x^2$ [red]" in page.text
    html.encode()
    assert printable(html, but="\n") == html


def test_a_broken_proof_names_every_broken_check_and_shows_what_was_found() -> None:
    """At the top which check, in full what it found; line ends in it stay."""
    page = Page(as_html(broken()))
    top = page.text[: page.text.index("To repeat the run")]
    assert "BROKEN" in top
    assert "committed-once (50 anomalies)" in top
    assert "aborted-hidden (1 anomaly)" in top
    assert "1 trouble that no fault explains" in top
    assert "nothing-hangs" not in top
    for n in range(50):
        assert f"id-{n} has output 0 twice" in page.text
    assert "id-7/0 was aborted\n  and is visible" in page.text
    assert "consumer-0 did not end" in page.text


def test_a_check_without_anything_to_examine_is_not_kept() -> None:
    """Nor broken: its row is of neither colour."""
    html = as_html(held())
    assert html.count("not exercised") == 1
    row = next(part for part in html.split("<tr") if "zombie-fenced" in part)
    assert row.startswith(' class="idle"')
    assert "not exercised" in row
    assert "kept" not in row


def test_the_head_says_how_to_repeat_it() -> None:
    """Seed, command, cluster, versions, date, duration, and where the histories are."""
    text = Page(as_html(held())).text
    for part in ("17", held().command, "brokers", held().version, held().began, "1 min 4 s", "/tmp/proof", "ids sent"):
        assert part in text


def test_what_was_not_measured_is_said() -> None:
    """Empty rates, lag and faults give a shorter plot, or none, and a sentence."""
    page = Page(as_html(bare()))
    assert "svg" not in page.tags
    assert "No fault was done." in page.text
    assert "Not measured in this run: rates, lag." in page.text
    assert "No check was run." in page.text
    assert "svg" in Page(as_html(replace(bare(), lag=held().lag))).tags


def test_the_same_proof_gives_the_same_page() -> None:
    """So that two reports can be compared."""
    assert as_html(held()) == as_html(held())


def test_an_hour_with_a_thousand_faults_is_still_a_page() -> None:
    """Below 2 MB, with every fault in the list, and a plot that has no more points than one can see."""
    html = as_html(held(3600, 1000))
    assert len(html.encode()) < 2_000_000
    assert html.count("<tr><td") == 1000
    assert "mean of 13 s" in html


def test_more_anomalies_than_anyone_reads_are_cut_and_that_is_said() -> None:
    """The JSON has all of them."""
    verdict = Verdict("committed-once", "outputs once", 9_000, [f"id-{n}." for n in range(9_000)])
    proof = replace(held(), verdicts=[verdict])
    html = as_html(proof)
    assert "id-1999." in html
    assert "id-2000." not in html
    assert "The first 2,000 are shown; the JSON has all." in html
    assert "id-8999." in as_json(proof)


def test_no_colour_is_fixed_in_the_plot() -> None:
    """Light and dark have their own: everything visible is drawn in a variable of the page."""
    html = as_html(held())
    plot = html[html.index("<svg") : html.index("</svg>")]
    assert re.findall(r"#[0-9a-f]{6}\b", plot) == []
    for variable in set(re.findall(r"var\((--\w+)\)", plot)):
        assert html.count(f"{variable}: #") == 3, "light, dark, print"


# --- the terminal ----------------------------------------------------------------------------------------------------------


@each_proof
def test_the_text_fits_the_terminal(proof: Proof) -> None:
    """Not wider than 120 columns, nothing but ASCII of its own, no control characters."""
    text = as_text(proof)
    assert max(map(len, text.splitlines())) <= WIDTH
    assert printable(text, but="\n") == text
    assert text.isascii()


def test_the_last_line_is_the_verdict() -> None:
    """CI shows the end of a log."""
    assert as_text(held()).splitlines()[-1] == "kept  exactly-once: 24,000 ids sent, 24,100 handled"
    assert as_text(broken()).splitlines()[-1] == (
        "BROKEN  exactly-once: committed-once: 50 anomalies, and 1 more check (id-0 has output 0 twice)"
    )
    assert as_text(replace(held(), troubles=["it hangs"])).splitlines()[-1] == "BROKEN  exactly-once: 1 trouble (it hangs)"


def test_the_table_has_every_check() -> None:
    """With what it says: kept, broken, or nothing."""
    rows = {line.split()[0]: line for line in as_text(broken()).splitlines() if line}
    assert "BROKEN" in rows["committed-once"]
    assert "BROKEN" in rows["aborted-hidden"]
    assert "kept" in rows["nothing-hangs"]
    assert "not exercised" in as_text(held())
    assert "... and 45 more" in as_text(broken())


def test_the_table_ignores_what_the_environment_says_of_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    """The text is the same everywhere: whoever prints it may colour it."""
    plain = as_text(broken())
    for name, value in {"FORCE_COLOR": "1", "COLUMNS": "20", "TTY_COMPATIBLE": "1"}.items():
        monkeypatch.setenv(name, value)
    assert as_text(broken()) == plain


# --- while it runs ---------------------------------------------------------------------------------------------------------

NOW = Progress("exactly-once", 1.0, 60.0, "faults", 1200, 1100, 2200, 7, 2, ("kill-broker kafka-2",))
KILL = Fault("kill-worker", "transformer-1", 1.5, 1.5, "SIGKILL")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(out: io.StringIO, clock: Sequence[float], monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("FORCE_COLOR", "1")  # as some CI does: it is a pipe all the same
    times = iter([0.0, *clock])
    with Screen(out, clock=lambda: next(times)) as screen:
        for _ in clock:
            screen.update(NOW)
        screen.fault(KILL)
        screen.fault(replace(KILL, target=NASTY, detail=NASTY))
    return out.getvalue()


def test_a_pipe_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """A line every few seconds and one for every fault; no control characters, whatever a fault is called."""
    lines = shown(io.StringIO(), [0.0, 0.1, PLAIN - 0.1, PLAIN, PLAIN + 1], monkeypatch).splitlines()
    assert [line.split()[0] for line in lines] == ["1.0", "1.0", "1.5", "1.5"]
    assert "now: kill-broker kafka-2" in lines[0]
    assert lines[2].split() == ["1.5", "s", "kill-worker", "transformer-1", "SIGKILL"]
    assert all(line.isprintable() for line in lines)


def test_a_new_phase_is_said_at_once() -> None:
    """Whoever reads a log wants to know when the faults ended."""
    out = io.StringIO()
    with Screen(out, clock=lambda: 0.0) as screen:
        for phase in ("starting", "starting", "faults", "reading"):
            screen.update(replace(NOW, phase=phase))
    assert [line.split()[5] for line in out.getvalue().splitlines()] == ["starting", "faults", "reading"]


def test_a_terminal_gets_a_picture_that_goes_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines of faults stay above it; what is shown is text."""
    monkeypatch.setenv("TERM", "xterm")
    out = Terminal()
    text = shown(out, [0.0], monkeypatch)
    assert "\x1b[?25l" in text, "the cursor is hidden"
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l"), "and comes back"
    assert "kill-worker" in text
    assert "[red]\\x1b[31m" in text
    assert "\x1b[31m" not in text.replace("\\x1b[31m", "")


@pytest.mark.parametrize("term", ["dumb", ""])
def test_a_terminal_that_can_do_nothing_gets_plain_lines(term: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Emacs, and some consoles of CI."""
    monkeypatch.setenv("TERM", term)
    assert "\x1b" not in shown(Terminal(), [0.0], monkeypatch)


def test_stdout_is_left_alone(capsys: pytest.CaptureFixture[str]) -> None:
    """It is for the verdict."""
    with Screen() as screen:
        screen.update(NOW)
        print("verdict")  # noqa: T201 - that is the test
    told = capsys.readouterr()
    assert told.out == "verdict\n"
    assert "faults" in told.err


def test_an_error_in_the_block_ends_the_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """The terminal is given back, and the error goes on."""
    monkeypatch.setenv("TERM", "xterm")
    out = Terminal()
    stderr = sys.stderr

    def fails() -> None:
        with Screen(out) as screen:
            screen.update(NOW)
            raise RuntimeError("gone")

    with pytest.raises(RuntimeError, match="gone"):
        fails()
    assert out.getvalue().rindex("\x1b[?25h") > 0
    assert sys.stderr is stderr
