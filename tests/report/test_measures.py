"""What the charts show."""

from dspy_fst.report.from_events import record_of
from dspy_fst.report.measures import REASONS, Series, frontier, health_charts, learning_charts, lost_charts
from tests.report.happenings import cycle, plan, step, whole_run


def charts(*records):
    drawn = [*learning_charts(records), *health_charts(records), *lost_charts(records)]
    return {chart.name: chart for chart in drawn}


def points(chart, place=0):
    series = chart.series[place]
    return list(zip(series.x, series.y, strict=True))


def test_the_reward_is_drawn_against_updates_rollouts_and_tokens_where_it_was_measured():
    drawn = charts(record_of(whole_run()))
    assert points(drawn["reward-by-update"]) == [(0, 0.25), (1, 0.5), (3, 0.75)]
    assert points(drawn["reward-by-rollouts"]) == [(52, 0.25), (84, 0.5), (168, 0.75)]
    assert points(drawn["reward-by-tokens"]) == [(260, 0.25), (420, 0.5), (840, 0.75)]


def test_an_update_of_an_empty_batch_measured_nothing():
    drawn = charts(record_of(whole_run()))
    for name in ("gradient-norm", "entropy", "effective-share", "kl-by-update", "capped-share"):
        assert [x for x, _ in points(drawn[name])] == [0, 2, 3]
    assert [x for x, _ in points(drawn["log-ratio"])] == [0, 2]
    assert points(drawn["reward-by-kl"]) == [(0.0, 0.25), (0.02, 0.75)]


def test_a_search_shows_what_it_found_beside_what_it_was_given():
    chart = charts(record_of(whole_run()))["anchor-score"]
    assert [series.label for series in chart.series] == ["best found", "best carried in"]
    assert (points(chart), points(chart, 1)) == ([(0, 0.5), (1, 0.75)], [(0, 0.25), (1, 0.625)])


def test_groups_are_stacked_by_what_became_of_them():
    chart = charts(record_of(whole_run()))["groups"]
    assert [(series.label, series.y[0]) for series in chart.series] == [("live", 3), ("flat", 1), ("not measured", 0)]


def test_lost_rollouts_are_stacked_by_reason_and_the_rarest_reasons_are_one():
    lost = {f"failed: reason {i}": 20 - i for i in range(REASONS + 2)}
    chart = charts(record_of([step(0, 0.5, lost=lost), step(1, 0.5)]))["lost-in-updates"]
    assert [series.label for series in chart.series][-2:] == [f"failed: reason {REASONS - 1}", "other reasons"]
    assert chart.series[0].y == (20, 0)
    assert chart.series[-1].y == (20 - REASONS + 20 - REASONS - 1, 0)


def test_a_reason_has_the_same_place_in_the_charts_of_searches_and_of_updates():
    drawn = charts(record_of(whole_run()))
    for name, seen in {"lost-in-searches": [(0, 2), (0, 0)], "lost-in-updates": [(0, 0, 1, 0), (0, 0, 3, 0)]}.items():
        assert [series.label for series in drawn[name].series] == ["failed: parse", "masked: timeout"]
        assert [series.y for series in drawn[name].series] == seen


def test_searches_that_lost_nothing_have_no_chart_of_it():
    assert "lost-in-searches" not in charts(record_of([*whole_run()[:3], step(0, 0.5, lost={"masked: timeout": 1})]))


def test_nothing_lost_gives_no_chart_of_it_and_nothing_measured_no_chart_at_all():
    assert not [name for name in charts(record_of([plan(), step(0, 0.5)])) if name.startswith("lost")]
    assert "lost-in-updates" not in charts(record_of([step(0, 0.5)]), record_of([step(0, 0.5)]))
    assert charts(record_of([])) == {}
    assert charts(record_of([plan(), cycle(0, {"a": None}, {}, ["a"])])) == {}


def test_several_runs_are_drawn_over_one_another_by_name():
    one, other = record_of(whole_run(), name="one"), record_of(whole_run()[:4], name="other")
    drawn = charts(one, other)
    for chart in drawn.values():
        assert [series.label for series in chart.series] == ["one", "other"], chart.name
    assert points(drawn["reward-by-update"], 1) == [(0, 0.25)]
    assert points(drawn["live-groups"]) == [(0, 0.75), (1, 0.75), (2, 0.75), (3, 0.75)]
    assert points(drawn["lost-in-updates"]) == [(0, 0.0), (1, 0.0), (2, 0.125), (3, 0.0)]


def test_the_frontier_holds_what_nothing_beats_at_a_smaller_distance():
    series = Series("run", (0.3, 0.0, 0.1, 0.1, 0.2), (0.9, 0.2, 0.5, 0.6, 0.6))
    assert frontier(series) == Series("run", (0.0, 0.1, 0.3), (0.2, 0.6, 0.9))


def test_a_chart_says_in_words_what_it_shows():
    summary = charts(record_of(whole_run()))["reward-by-rollouts"].summary
    assert summary == (
        "mean training reward against rollouts in all. reward: from 0.25 at 52 to 0.75 at 168, highest 0.75 at 168."
    )
