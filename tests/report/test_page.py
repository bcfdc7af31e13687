"""The page: whole at every stage of a run, escaped, reachable without a mouse, and alone in the world."""

import json
from collections import Counter
from html.parser import HTMLParser
from itertools import pairwise

import pytest
from typer.testing import CliRunner

from dspy_fst.cli import app
from dspy_fst.formatting.numbers import duration
from dspy_fst.report.from_events import record_of
from dspy_fst.report.page import build_report, period, recipe_rows, render
from tests.report.happenings import (
    CHILD,
    LATE,
    SEED,
    cycle,
    digest,
    done,
    plan,
    step,
    timed,
    trajectories,
    whole_run,
)
from tests.report.test_record import written

VOID = {"meta", "link", "br", "img", "input", "hr"}


class Page(HTMLParser):
    """Elements of a page, their attributes and their texts; fails on a tag that is not closed."""

    def __init__(self, html):
        super().__init__()
        self.elements, self.open, self.texts = [], [], Counter()
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts[self.open[-1] if self.open else None, " ".join(data.split())] += 1

    def of(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    def said(self, tag):
        return [text for (name, text) in self.texts if name == tag]


def page_of(*records):
    return Page(render(records))


def sound(page):
    """What holds of every page."""
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in page.elements:
        for name in ("href", "aria-labelledby", "aria-describedby", "for"):
            if name in attributes:
                assert attributes[name].removeprefix("#") in ids, attributes
        assert not {"src", "srcset", "action", "data", "poster"} & attributes.keys()
        assert not [name for name in attributes if name.startswith("on")]
    levels = [int(tag[1]) for tag, _ in page.elements if tag in ("h1", "h2", "h3", "h4", "h5")]
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels)), levels
    assert all(attributes.get("scope") in ("row", "col") for attributes in page.of("th"))
    assert len(page.of("caption")) == len(page.of("table"))
    assert len(page.of("script")) == 1
    assert all(attributes.get("role") in ("img", "group") for attributes in page.of("svg"))
    for tag in ("header", "main", "nav", "footer"):
        assert len(page.of(tag)) == 1


@pytest.fixture(scope="module")
def whole():
    return page_of(record_of(whole_run(), name="demo"))


def test_every_beginning_of_a_run_has_a_page():
    events = whole_run()
    for length in range(len(events)):
        sound(page_of(record_of(events[:length], in_use=length % 2 == 0)))


def test_the_page_of_a_whole_run_shows_all_of_it(whole):
    sound(whole)
    assert whole.said("h1") == ["Run demo"]
    headings = whole.said("h2")
    assert headings[:4] == ["Summary", "What was learnt", "How sound the updates are", "What was masked or failed"]
    assert headings[4:6] == ["What each predictor earned", "Instructions"]
    assert headings[6:] == ["Population", "Sample trajectories", "Costs", "Recipe"]
    assert "finished" in whole.said("span")
    assert "0.250 → 0.750" in whole.said("b")
    assert len(whole.of("svg")) == len(whole.of("figure")) == 12 + 2 + 1
    assert ("ins", "Be brief.") in whole.texts
    assert ("th", "masked: timeout") in whole.texts
    assert ("dd", "I will not say.") in whole.texts


def test_what_differs_from_the_defaults_is_set_apart(whole):
    rows = recipe_rows([record_of(whole_run())])
    changed = {row.name: (row.default, row.values) for row in rows if row.changed}
    assert changed == {"cycles": (8, [2]), "learning_rate": (1e-6, [1e-5])}
    assert "learning_rate" in whole.said("code")


def test_candidates_open_by_themselves_and_lead_to_their_parents(whole):
    boxes = {attributes["id"] for attributes in whole.of("details") if "id" in attributes}
    assert boxes == {f"run-1-{digest(said)}" for said in (SEED, CHILD, "Answer it.", LATE)}
    assert {f"#{box}" for box in boxes} <= {a.get("href") for a in whole.of("a")}
    assert f"#run-1-{digest(SEED)}" in [a.get("href") for a in whole.of("a")]


def test_every_step_s_samples_are_there_to_choose(whole):
    options = whole.of("option")
    assert [option["value"] for option in options] == ["0", "1", "2", "3"]
    assert "selected" in options[-1]
    assert [article["data-step"] for article in whole.of("article")] == ["0", "1", "2", "3"]


def test_a_rollout_that_measured_nothing_is_not_called_the_worst(whole):
    said = [text for (tag, text), times in whole.texts.items() for _ in range(times) if tag == "b"]
    assert (said.count("Best of its group"), said.count("Worst of its group"), said.count("Not measured")) == (4, 3, 1)


HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)> {{ 'a' * 9 }} \"'&"


def test_what_a_model_or_a_metric_says_is_never_markup():
    population = [HOSTILE, CHILD]
    events = [
        plan(),
        {"event": "warning", "step": 0, "text": HOSTILE},
        cycle(0, {HOSTILE: 0.5, CHILD: 0.6}, {CHILD: [HOSTILE]}, population, counts={f"failed: {HOSTILE}": 1}),
        step(0, 0.5, lost={f"masked: {HOSTILE}": 2}),
        trajectories(
            0,
            HOSTILE,
            feedback=HOSTILE,
            failure=HOSTILE,
            modules=[{"name": HOSTILE, "inputs": {HOSTILE: HOSTILE}, "outputs": {HOSTILE: HOSTILE}, "reply": HOSTILE}],
        ),
        done(population, [0.5, 0.6], {HOSTILE: 0.5}) | {"weights": HOSTILE},
    ]
    evaluations = [json.dumps({"kind": "eval", "split": HOSTILE, "mean": 0.5})]
    page = page_of(record_of(timed(events), name=HOSTILE, evaluations=evaluations))
    sound(page)
    assert page.of("img") == []
    assert "a" * 9 not in "".join(text for _, text in page.texts)
    assert sum(times for (_, text), times in page.texts.items() if text.startswith("</script><script>")) > 8


def test_a_policy_forbids_the_page_all_but_its_own_script(whole):
    policy = next(meta["content"] for meta in whole.of("meta") if "http-equiv" in meta)
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-")
    assert "unsafe-eval" not in policy


def test_the_same_events_give_the_same_page():
    records = [record_of(whole_run()), record_of(whole_run()[:6], name="other")]
    assert render(records) == render(records)


def test_runs_are_compared_chart_by_chart_and_listed_one_by_one():
    events = whole_run()
    page = page_of(record_of(events, name="one"), record_of(events[:8], name="other"), record_of([], name="empty"))
    sound(page)
    assert page.said("h1") == ["3 runs compared"]
    assert [text for text in page.said("h3") if text in ("one", "other", "empty")] == ["one", "other", "empty"]
    assert len(page.of("figure")) == 12 + 1 + 2
    assert page.said("caption")[0] == "Finals"
    assert [attributes["id"] for attributes in page.of("select")] == ["run-1-step", "run-2-step"]


def test_unmeasured_numbers_are_dashes():
    events = [cycle(0, {SEED: None}, {}, [SEED]), step(0, None, grad_norm=None, entropy=None, kl_to_start=None)]
    page = page_of(record_of(events))
    sound(page)
    assert "None" not in "".join(text for _, text in page.texts)


def test_evaluations_are_shown_when_there_are_some():
    lines = [
        json.dumps({"kind": "two_by_two", "cells": {"seed/base": [0.1, 0.01], "evolved/trained": [0.9, None]}}),
        json.dumps({"kind": "eval", "split": "test", "cycle": 1, "mean": 0.5, "low": 0.4, "high": 0.6, "k": 4}),
    ]
    page = page_of(record_of([], evaluations=lines))
    sound(page)
    assert "Evaluations" in page.said("h2")
    assert {"0.100 ± 0.010", "0.900", "0.400 to 0.600"} <= set(page.said("td"))


def test_evaluations_show_what_they_measured_and_which_problems_the_run_has_seen():
    under = {"split": "val", "limit": 4, "problems_of_split": 4, "k": 2, "weights": "step-000000", "seed": 7}
    lines = [
        json.dumps({"kind": "two_by_two", "cells": {"seed/base": [0.1, 0.01]}, **under, "split": "train"}),
        json.dumps({"kind": "eval", "mean": 0.5, "problems": 3, "candidate": digest(CHILD), **under}),
        json.dumps({"kind": "eval", "mean": 0.5, "problems": 3, "candidate": "5eed", **under}),
    ]
    page = page_of(record_of(whole_run(), evaluations=lines))
    sound(page)
    (caption,) = (text for text in page.said("caption") if text.startswith("Instructions by weights"))
    assert caption.endswith("; split train, the first 4 problems, k=2, weights step-000000, seed 7")
    assert {"3/4", "4", "step-000000", "7"} <= set(page.said("td"))
    assert "5eed" in page.said("code")
    notes = [text for text in page.said("p") if "no test on problems that the run never saw" in text]
    assert [note.partition(";")[0] for note in notes] == [
        "val: these problems chose the best candidate",
        "train: these problems were trained on",
    ]


def test_the_page_is_one_file_that_is_replaced_whole(tmp_path):
    run = written(tmp_path / "run", whole_run()[:-1])
    out = build_report([run], tmp_path / "reports" / "run.html")
    assert "stopped" in out.read_text()
    written(tmp_path / "whole" / "run", whole_run())
    assert build_report([tmp_path / "whole" / "run"], out) == out
    assert "finished" in out.read_text()
    assert [path.name for path in out.parent.iterdir()] == ["run.html"]


def test_demos_are_listed_as_people_read_them_wherever_a_candidate_is_shown():
    event = cycle(0, {SEED: 0.5}, {}, [SEED])
    demo = '{"question": "Which town?", "answer": "Ulm", "augmented": true, "_fst_problem": "0123456789ab"}'
    event["candidates"][0]["texts"]["solve.demos[*]"] = demo
    html = render([record_of([event], name="demos")])
    assert html.count("Ulm") == 2  # in the lineage, and in the population
    assert "_fst_problem" not in html


def test_a_model_s_broken_letters_do_not_break_the_page(tmp_path):
    events = [cycle(0, {"half \ud800 a letter": 0.5}, {}, ["half \ud800 a letter"])]
    out = build_report([written(tmp_path / "run", events)], tmp_path / "run.html")
    assert "half ? a letter" in out.read_text()


def test_times_are_told_in_utc_and_durations_in_words():
    assert period(0.0, 90.0) == "1970-01-01, 00:00 to 00:01 UTC"
    assert period(0.0, 90_000.0) == "1970-01-01, 00:00 to 1970-01-02, 01:00 UTC"
    assert [duration(seconds, 1) for seconds in (3.21, 59.97, 75, 7322)] == [
        "3.2 s",
        "1 min 0 s",
        "1 min 15 s",
        "2 h 2 min",
    ]


def test_the_command_line_writes_the_page(tmp_path):
    run = written(tmp_path / "run", whole_run())
    outcome = CliRunner().invoke(app, ["report", str(run), "--out", str(tmp_path / "page.html")])
    assert (outcome.exit_code, outcome.output) == (0, f"the report is {tmp_path / 'page.html'}\n")
    Page((tmp_path / "page.html").read_text())


def test_the_command_line_tells_machines_where_things_are(tmp_path):
    run, page, plots = written(tmp_path / "run", whole_run()), tmp_path / "page.html", tmp_path / "plots"
    words = ["report", str(run), "--out", str(page), "--plots", str(plots), "--json"]
    outcome = CliRunner().invoke(app, words, catch_exceptions=False)
    assert json.loads(outcome.stdout) == {"report": str(page), "plots": str(plots)}
    assert page.is_file()
    assert any(plots.iterdir())


def test_the_command_line_says_that_there_is_no_run(tmp_path):
    outcome = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert outcome.exit_code == 2
    assert str(tmp_path) in outcome.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "taken"], "taken cannot be written: [Errno 21] Is a directory"),
        (["--out", "file/page.html"], "File exists: 'file'"),
        (["--out", "."], "Device or resource busy"),
        (["--out", "long" * 100], "File name too long"),
        (["--plots", "file"], "file is a file; name a folder that can be written"),
        (["--plots", "file/plots"], "Not a directory: 'file/plots'; name a folder that can be written"),
    ],
)
def test_a_place_that_cannot_be_written_is_told_and_nothing_is_left_behind(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    run = written(tmp_path / "run", whole_run())
    (tmp_path / "taken").mkdir()
    (tmp_path / "file").write_text("mine")
    outcome = CliRunner().invoke(app, ["report", str(run), *arguments], catch_exceptions=False)
    assert outcome.exit_code == 2
    assert message in outcome.output
    assert "that can be written" in outcome.output
    assert {path.name for path in tmp_path.iterdir()} - {"report.html"} == {"run", "taken", "file"}
    assert (tmp_path / "file").read_text() == "mine"
