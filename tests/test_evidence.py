"""The evidence: what is compared is stated, tuned apart from what is reported; every table follows from raw lines."""

import pytest

from benchmarks.evidence import arms, grid, tables, tune
from benchmarks.evidence.run import Run
from dspy_fst.config import FSTConfig


@pytest.mark.parametrize("arm", arms.ARMS)
def test_every_arm_is_a_recipe_and_says_what_it_is(arm):
    FSTConfig(**Run(arm, "reverse_drop", 0).recipe)
    assert arms.ABOUT[arm]


def test_nothing_is_tuned_on_what_is_reported():
    for form in grid.FORMS.values():
        assert tune.WORLD not in form.worlds
        assert tune.WORLD != grid.SECOND_TASK
        assert not set(tune.SEEDS) & set(form.seeds)


def test_every_arm_that_trains_has_a_tuned_rate():
    trained = {arm for arm in arms.ARMS if arms.ARMS[arm].get("method") != "gepa"}
    assert trained == {*tune.ARMS, *tune.AS}


def result(arm, seed, accuracies, *, interval=3, search=100, world="w"):
    lines = [
        {
            "step": step * interval,
            "evolved accuracy": accuracy,
            "training rollouts": 256 * step * interval,
            "search rollouts": search,
        }
        for step, accuracy in enumerate(accuracies)
    ]
    return {"arm": arm, "seed": seed, "world": world, "base": "base", "lines": lines}


def test_the_first_time_at_a_level_lies_between_two_checkpoints():
    points = [(0, 0.1), (3, 0.4), (6, 0.4), (9, 0.7)]
    assert tables.first_at(points, 0.1) == 0
    assert tables.first_at(points, 0.25) == pytest.approx(1.5)
    assert tables.first_at(points, 0.55) == pytest.approx(7.5)
    assert tables.first_at(points, 0.8) is None


def test_an_arm_is_held_against_rl_on_its_own_seed_with_searches_counted():
    results = [
        result("rl", 0, [0.0, 0.2, 0.4, 0.8], search=0),
        result("rl", 1, [0.0, 0.3, 0.6, 0.3], search=0),
        result("fst", 0, [0.2, 0.8, 0.9, 0.9], search=256),
        result("fst", 1, [0.1, 0.2, 0.2, 0.5], search=256),
    ]
    found = tables.by_arm(results, "w")
    steps = tables.ratios(found, "fst", lambda run, level: tables.first_at(tables.curve(run), level))
    assert steps == [pytest.approx(9 / 3), None]  # on seed 1 it never comes to RL's .6
    rollouts = tables.ratios(found, "fst", lambda run, level: tables.first_at(tables.spent(run), level))
    assert rollouts[0] == pytest.approx(9 * 256 / (256 + 3 * 256))
    assert tables.shown(steps, ".1f") == "3.0 (3.0 to 3.0), never in 1 of 2"


def test_the_published_tables_are_those_of_the_raw_lines():
    page = tables.PAGE.read_text()
    assert tables.rendered(page) == page
