"""A run that is killed at any moment, and again while it goes on, ends as if nobody had touched it.

The machinery and the drawn moments are benchmarks/durability's; here each kind of moment has its turn.
"""

import random

import pytest

from benchmarks.durability.moments import Clock, Moment, draw_moments
from benchmarks.durability.outcome import outline
from benchmarks.durability.passages import Passages
from benchmarks.durability.trials import Comparison, Trial

DEATHS = {
    "before the first search": [
        ("preflight rollout", "after"),
        ("validation rollout", "after"),
        ("validation rollout", "before"),
    ],
    "in the search": [("search rollout", "after"), ("reflection", "after"), ("write journal", "half")],
    "at the search's end": [("write population", "half"), ("write event", "half"), ("remove journal", "before")],
    "in the slow step": [("step rollout", "before"), ("update", "after"), ("step rollout", "after")],
    "while publishing": [("write weights tensors", "half"), ("rename weights", "before"), ("load", "before")],
    "while committing": [("write trainer state tensors", "half"), ("write state", "half"), ("rename state", "after")],
    "while pruning": [
        ("rename old state", "after"),
        ("remove old trainer state", "after"),
        ("remove old state", "before"),
    ],
}
"""Where a run dies, one death after the other."""


@pytest.fixture(scope="module")
def killer(tmp_path_factory):
    return Comparison(tmp_path_factory.mktemp("durability"), settings={"steps_per_cycle": 2})


def moments(killer, name):
    """The first death anywhere in the run's first half, the others soon after it went on."""
    rng = random.Random(name)
    (place, edge), *others = DEATHS[name]
    first = Moment(place, rng.randint(1, max(1, killer.counts[place] // 2)), edge)
    return first, *(Moment(place, rng.choice((1, 2)), edge) for place, edge in others)


@pytest.mark.slow
@pytest.mark.parametrize("name", DEATHS)
def test_a_killed_and_continued_run_equals_an_undisturbed_one(killer, name):
    trial = killer.trial(name.replace(" ", "-"), *moments(killer, name))
    assert not [death for death in trial.deaths if death.startswith("(")]
    assert trial.unequal == []
    assert trial.acts_twice <= len(trial.deaths)  # each costs the act in hand at most


@pytest.mark.slow
def test_a_kill_from_outside_at_any_time_does_no_harm(killer):
    trial = killer.trial("outside", Clock(random.Random(3).uniform(0.2, 0.8)))
    assert trial.unequal == []
    assert trial.acts_twice <= 2  # the rollouts in hand, and those of a step whose state was still being written


@pytest.mark.slow
def test_a_kill_in_the_search_costs_the_act_in_hand_and_no_other(killer):
    last = killer.counts["reflection"] // 2  # of the first search
    trial = killer.trial("reflecting", Moment("reflection", last, "after"))
    assert (trial.acts_twice, trial.reflections_twice, trial.rollouts_twice) == (1, 1, 0)


@pytest.mark.slow
def test_an_undisturbed_run_pays_for_nothing_twice_and_is_repeatable(killer):
    assert killer.trial("again") == Trial([], [], 0, 0, 0, [])


def test_drawn_moments_cover_every_place_and_are_drawn_alike_again():
    counts = {"write journal": 5, "update": 3, "load": 1}
    drawn = draw_moments(counts, 7, random.Random(0))
    assert {moment.place for moment in drawn[:3]} == set(counts)
    assert all(1 <= moment.passage <= counts[moment.place] for moment in drawn)
    assert {moment.edge for moment in drawn if moment.place != "write journal"} <= {"before", "after"}
    assert drawn == draw_moments(counts, 7, random.Random(0))


@pytest.mark.parametrize(
    ("path", "place"),
    [
        ("events.jsonl", "event"),
        ("populations/cycle-000.json.new", "population"),
        ("weights/.step-000003.x1/model.safetensors", "weights tensors"),
        ("weights/.step-000003.old/config.json", "old weights"),
        ("states/.000004.new/.trainer.x2/state.safetensors", "trainer state tensors"),
        ("states/.000001.old/state.json", "old state"),
        (".lock", None),
        ("../elsewhere", None),
    ],
)
def test_a_file_is_known_by_its_path(tmp_path, path, place):
    assert Passages(tmp_path, None)._place((tmp_path / path).resolve()) == place


def test_a_difference_in_what_was_sampled_is_left_out_of_an_outline_and_a_gap_is_not():
    left = {
        "events": [
            {"event": "plan", "budget": {"updates": 2}},
            {"event": "step", "report": {"step": 0, "reward": 0.5}},
            {"event": "step", "report": {"step": 1, "reward": 0.5}},
        ],
        "populations": {},
        "weights": {},
        "state": {"cycle": 0, "searched": -1, "step": 2, "population": {}},
        "trainer": {},
    }
    other = {**left, "events": [*left["events"][:2], {"event": "step", "report": {"step": 1, "reward": 0.1}}]}
    assert outline(left) == outline(other)
    assert outline(left) != outline({**left, "events": [left["events"][0], left["events"][2]]})
