"""What a report tells of single predictors, from events whose numbers can be checked by hand."""

import json

import pytest

from dspy_fst.report.from_events import record_of
from dspy_fst.report.measures import predictor_charts
from dspy_fst.report.metric_names import entry_of
from dspy_fst.report.page import build_report
from dspy_fst.types import Candidate
from tests.cli.conftest import invoke
from tests.report.happenings import plan, predictor, step, timed, whole_run
from tests.report.test_browser import browser, opened  # noqa: F401
from tests.report.test_page import page_of, sound
from tests.report.test_record import written

ANSWER, QUERY = "answer", "hops[0].query"


def texts(answer, query):
    return {ANSWER: answer, QUERY: query}


def searched(number, scores, parents):
    """A search's event: (answer, query) -> anchor score, and -> its parents' texts."""
    digests = {said: Candidate(texts(*said)).digest for said in scores}
    population = [digests[max(scores, key=scores.__getitem__)]]
    report = {
        **{"cycle": number, "scores": [max(scores.values())], "population": population, "rollouts": 20, "repeats": 3},
        **{"reflections": 5, "proposals_accepted": 2, "sampled_tokens": 100, "counts": {}, "seconds": 2.0},
    }
    candidates = [{"digest": digests[said], "texts": texts(*said), "score": score} for said, score in scores.items()]
    of = {digests[said]: [digests[parent] for parent in of] for said, of in parents.items()}
    return {"event": "cycle", "report": report, "candidates": candidates, "parents": of}


SEED, ASKED, SAID, BOTH = ("Answer.", "Ask."), ("Answer.", "Ask well."), ("Say it.", "Ask well."), ("Tell.", "Beg.")


def run():
    """Two cycles: the query's text was changed alone, then the answer's alone, then both; one score came twice."""
    return timed(
        [
            plan(),
            searched(0, {SEED: 0.25, ASKED: 0.5}, {ASKED: [SEED]}),
            step(
                0,
                0.25,
                predictors={
                    QUERY: predictor(truncated=2, unparsed=3, rows=30, positive_rows=6, advantage=-0.5, score=0.25),
                    ANSWER: predictor(calls=29, rows=10, positive_rows=5, advantage=0.25),
                },
            ),
            searched(1, {ASKED: 0.75, SAID: 0.5, BOTH: 1.0}, {SAID: [ASKED], BOTH: [ASKED]}),
            step(
                1,
                0.5,
                predictors={
                    QUERY: predictor(rows=10, positive_rows=4, advantage=0.5, score=0.75),
                    ANSWER: predictor(calls=32, flat_groups=4),
                },
            ),
        ]
    )


def test_calls_are_summed_and_advantages_averaged_over_the_rows_of_all_updates():
    answer, query = record_of(run()).predictors
    assert (answer.predictor, query.predictor) == (ANSWER, QUERY)
    assert (query.calls, query.tokens, query.truncated, query.unparsed) == (64, 128, 2, 3)
    assert (query.rows, query.positive_rows, query.advantage) == (40, 10, pytest.approx((-15 + 5) / 40))
    assert (answer.rows, answer.advantage, answer.flat_groups) == (10, 0.25, 4)
    assert (query.scores, answer.scores) == ((0.25, 0.75), ())


def test_a_change_of_text_is_told_by_the_candidates_in_which_it_alone_was_changed():
    answer, query = record_of(run()).predictors
    assert (query.changed, query.changed_alone, query.gain) == (2, 1, 0.25)
    assert (answer.changed, answer.changed_alone, answer.gain) == (2, 1, -0.25)


def test_a_run_whose_updates_tell_nothing_of_predictors_has_texts_alone():
    (solve,) = record_of(whole_run()).predictors
    assert (solve.calls, solve.rows, solve.advantage, solve.scores) == (None, None, None, ())
    # 0.5 and 0.125 from 0.25; 0.75 from 0.625
    assert (solve.changed, solve.gain) == (3, pytest.approx((0.25 - 0.125 + 0.125) / 3))


def test_the_charts_have_a_line_for_each_predictor_that_was_measured():
    positive, own = predictor_charts([record_of(run())])
    assert {s.label: list(zip(s.x, s.y, strict=True)) for s in positive.series} == {
        ANSWER: [(0, 0.5)],
        QUERY: [(0, 0.2), (1, 0.4)],
    }
    assert [(s.label, s.y) for s in own.series] == [(QUERY, (0.25, 0.75))]
    assert predictor_charts([record_of(whole_run())]) == []
    assert predictor_charts([record_of(run())] * 2) == []


@pytest.mark.slow
def test_the_page_shows_every_predictor():
    page = page_of(record_of(run(), name="demo"))
    sound(page)
    assert {ANSWER, QUERY} <= set(page.said("th"))
    assert {"-0.250", "0.250 → 0.750", "1/2", "+0.250"} <= set(page.said("td"))
    sound(page_of(record_of(run(), name="one"), record_of(whole_run(), name="other")))


def test_show_has_a_row_for_every_predictor_and_json_the_same(tmp_path):
    path = written(tmp_path / "run", run())
    table = invoke("show", path).stdout.split("Predictors, over all steps")[1]
    (row,) = (line.split() for line in table.splitlines() if line.startswith(QUERY))
    assert row[1:7] == ["64", "128", "2", "3", "40", "10"]
    assert row[7:] == ["-0.250", "0", "0.250", "0.750", "1/2", "+0.250"]
    shown = json.loads(invoke("show", path, "--json").stdout)
    assert [of["predictor"] for of in shown["predictors"]] == [ANSWER, QUERY]
    assert shown["predictors"][1]["scores"] == [0.25, 0.75]


def test_a_tracker_gets_the_figures_under_names_that_it_takes():
    values = entry_of(run()[2]).values
    assert values["train/predictors/answer/rows"] == 10
    assert values["train/predictors/hops_0_.query/score"] == 0.25
    assert "train/predictors/answer/score" not in values


def adapter(rows, kl, norm):
    return {"rows": rows, "tokens": 3 * rows, "grad_norm": norm, "kl_to_start": kl, "entropy": 0.25}


def run_with_adapters():
    """The same with a LoRA adapter for each predictor; the answer's calls were all lost in the second update."""
    ours, first, second = run(), adapter(30, 0.0, 0.5), adapter(10, 0.125, 1.5)
    ours[2]["report"]["update"] = {**ours[2]["report"]["update"], "adapters": {"ask": first, "say": second}}
    ours[4]["report"]["update"] = {**ours[4]["report"]["update"], "adapters": {"ask": second}}
    return ours


def test_the_report_has_the_figures_of_each_adapter(tmp_path):
    record = record_of(run_with_adapters())
    assert record.adapters == ("ask", "say")
    assert record.steps[1].update.adapters["ask"].kl_to_start == 0.125
    distance, norm = predictor_charts([record])[2:]
    assert [(s.label, s.x, s.y) for s in distance.series] == [("ask", (0, 1), (0.0, 0.125)), ("say", (0,), (0.125,))]
    assert [(s.label, s.y) for s in norm.series] == [("ask", (0.5, 1.5)), ("say", (1.5,))]
    table = invoke("show", written(tmp_path / "run", run_with_adapters())).stdout.split("LoRA adapters")[1]
    rows = [line.split() for line in table.splitlines() if line.startswith(("ask", "say"))]
    assert rows == [["ask", "40", "120", "1.000", "0.125"], ["say", "10", "30", "1.500", "0.125"]]
    values = entry_of(run_with_adapters()[2]).values
    assert (values["train/adapters/ask/grad_norm"], values["train/adapters/say/rows"]) == (0.5, 10)


def test_a_run_whose_updates_tell_nothing_of_adapters_shows_none(tmp_path):
    record = record_of(run())
    assert (record.adapters, record.steps[0].update.adapters) == ((), {})
    assert len(predictor_charts([record])) == 2
    assert "LoRA" not in invoke("show", written(tmp_path / "run", run())).stdout


@pytest.mark.slow
@pytest.mark.parametrize("width", [360, 1200])
def test_the_table_of_predictors_fits_the_screen(browser, tmp_path, width):  # noqa: F811
    page, told = opened(browser, build_report([written(tmp_path / "run", run())], tmp_path / "page.html"))
    page.set_viewport_size({"width": width, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.locator("#predictors").is_visible()
    page.close()
    assert told == []
