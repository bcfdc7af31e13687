"""Several proposals at a time (`proposals_at_once`): in flight together, and the same whoever answers first."""

import threading
import time
import warnings
from itertools import chain

import dspy
import pytest
from gepa.strategies.proposal_sampling import SingleMutationSampling

from dspy_fst import FSTConfig
from dspy_fst.errors import ConfigurationError, ReflectionError
from dspy_fst.fast import evolve as searching
from dspy_fst.fast import reflections
from dspy_fst.fast.search_settings import SearchSettings
from dspy_fst.rollout.components import read_texts
from dspy_fst.run.search_journal import Journal
from dspy_fst.training.plan import Plan
from dspy_fst.training.without_effect import settings_without_effect
from dspy_fst.types import Candidate, Population
from tests.fast.test_evolve import ANCHORS, Searcher
from tests.run.test_journal import Counting, KilledError, Killing, PureSearcher

TOGETHER = 3
RECIPE = {"proposals_at_once": TOGETHER, "reflection_minibatch": 3, "perfect_score": 2.0}


class Together(PureSearcher):
    """Asks for several proposals at a time; what it proposes depends on what it is shown alone."""

    def search(self, kept, **settings):
        seed = read_texts(self.program)
        carried = [Candidate({**seed.texts, "second": f"Answer {skill}."}) for skill in ("x", "y")]
        population = Population(tuple(carried), (None, None))
        return self.evolve(population, kept, budget=36, **{**RECIPE, **settings})


def in_turn(searcher, *, last_first):
    """The first iteration's answers come once all are asked for, and then in this order."""
    propose, asked = searcher.propose, iter(range(1000))
    met = threading.Barrier(TOGETHER, timeout=20)

    def held(**shown):
        if next(asked) < TOGETHER:
            place = met.wait()
            time.sleep(0.05 * (place if last_first else TOGETHER - place))
        return propose(**shown)

    searcher.propose = held
    return searcher


@pytest.mark.parametrize("last_first", [True, False], ids=["last-first", "first-first"])
def test_reflections_are_in_flight_together_and_the_order_of_their_answers_changes_nothing(last_first):
    one_after_another, held = Together(), in_turn(Together(), last_first=last_first)
    propose, lock = one_after_another.propose, threading.Lock()

    def alone(**shown):
        with lock:
            return propose(**shown)

    one_after_another.propose = alone
    wanted = one_after_another.search(None)
    assert wanted.counts["reflections"] == len(one_after_another.reflections) >= 2 * TOGETHER
    assert held.search(None) == wanted, "the barrier also fails unless all are asked at once"
    assert len(held.reflections) == len(one_after_another.reflections), "none failed and was asked again"


def test_calls_of_the_reflection_lm_are_in_flight_together():
    met = threading.Barrier(TOGETHER, timeout=20)

    class Meets(dspy.utils.DummyLM):
        def forward(self, prompt=None, messages=None, **kwargs):
            met.wait()
            return super().forward(prompt, messages, **kwargs)

    searcher = Searcher()
    searcher.propose = None
    lm = Meets([{"new_instruction": "Answer even."}] * 99, adapter=dspy.JSONAdapter())
    search = searching.evolve(
        Population.of_seed(read_texts(searcher.program), 2),
        ANCHORS,
        searcher.program,
        play=searcher.play,
        feedback=searcher.feedback,
        reflection_lm=lm,
        settings=SearchSettings(**RECIPE),
        size=2,
        budget=9,
    )
    assert search.counts["reflections"] >= TOGETHER
    assert search.counts["reflections_failed"] == 0


def test_one_at_a_time_is_gepa_s_own_search(monkeypatch):
    class OfGepa(SingleMutationSampling):
        """gepa's default, counting as ours does."""

        def __init__(self, wanted):
            self.drawn = 0

        def sample_tasks(self, *given):
            self.drawn += 1
            return super().sample_tasks(*given)

    ours = PureSearcher().evolve(budget=60, perfect_score=2.0)
    monkeypatch.setattr(searching, "SeveralAtOnce", OfGepa)
    assert PureSearcher().evolve(budget=60, perfect_score=2.0) == ours
    assert ours.counts["reflections"] > 4, "more than an epoch of minibatches"


def test_proposals_of_an_iteration_are_shown_different_minibatches_and_an_epoch_shows_all_problems():
    seen = []

    def proposer(candidate, reflective_dataset, components_to_update):
        [records] = reflective_dataset.values()
        seen.append(sorted(int(record["Inputs"]["question"]) for record in records))
        return dict.fromkeys(components_to_update, "nothing")

    searcher = Searcher(propose=proposer)
    searcher.evolve(budget=600, **{**RECIPE, "proposals_at_once": 4})
    for first in range(0, len(seen) - 3, 4):
        assert sorted(chain(*seen[first : first + 4])) == list(range(12))


@pytest.mark.parametrize(("budget", "at_once"), [(6, 3), (30, 3), (30, 4)], ids=["short", "long", "wide"])
def test_the_budget_is_overrun_by_one_pass_for_each_proposal_at_most(budget, at_once):
    texts, lock = (f"even odd {number}" for number in range(10_000)), threading.Lock()

    def new_every_time(candidate, reflective_dataset, components_to_update):
        with lock:
            return {name: next(texts) for name in components_to_update}

    searcher = Searcher(propose=new_every_time)
    search = searcher.evolve(budget=budget, **{**RECIPE, "proposals_at_once": at_once})
    assert 0 < search.rollouts - len(ANCHORS) <= budget + at_once * len(ANCHORS)
    assert search.counts["reflections"] <= budget // 3


def test_the_plan_counts_a_pass_for_each_proposal():
    one, several = (
        Plan(FSTConfig(cycles=2, anchors=30, proposals_at_once=n, reflection_minibatch=5), 400) for n in (1, 4)
    )
    assert (one.budget(0).overshoot_rollouts, several.budget(0).overshoot_rollouts) == (60, 240)


def test_more_proposals_than_minibatches_are_refused_with_what_would_do():
    with pytest.raises(ConfigurationError, match=r"a search has 12 anchors; use proposals_at_once=3, or more anchors"):
        FSTConfig.checked({"anchors": 12, "reflection_minibatch": 4, "proposals_at_once": 4})
    FSTConfig.checked({"anchors": 12, "reflection_minibatch": 4, "proposals_at_once": 3})


def test_a_run_that_never_searches_is_told_that_the_setting_does_nothing():
    several = {"proposals_at_once": 4}
    [warning] = settings_without_effect(FSTConfig(method="rl", **several))
    assert warning.startswith("proposals_at_once=4 does nothing under method='rl'")
    assert settings_without_effect(FSTConfig(**several)) == settings_without_effect(FSTConfig(method="rl")) == []


@pytest.mark.parametrize("keep_last", [True, False], ids=["after-it-is-kept", "before-it-is-kept"])
def test_a_search_killed_after_any_act_finds_the_same_and_asks_again_only_what_was_not_kept(tmp_path, keep_last):
    undisturbed, counting = Together(), Counting()
    wanted = undisturbed.search(counting)
    assert counting.acts > 8
    for acts in range(counting.acts):
        path = tmp_path / str(acts)
        path.mkdir()
        first, second = Together(), Together()
        with pytest.raises(KilledError):
            first.search(Killing(path / "search.jsonl", acts, keep_last))
        assert second.search(Journal(path / "search.jsonl", {"cycle": 0})) == wanted, f"killed after {acts} acts"
        assert sorted({*first.reflections, *second.reflections}) == sorted(undisturbed.reflections)
        twice = len(first.reflections) + len(second.reflections) - len(undisturbed.reflections)
        assert twice <= TOGETHER


@pytest.mark.parametrize("at_once", [1, TOGETHER])
def test_a_reflection_that_failed_once_before_the_kill_is_shown_its_records_again(tmp_path, at_once):
    def flaky(searcher):
        propose, shown, lock = searcher.propose, [], threading.Lock()

        def fails_first(candidate, reflective_dataset, components_to_update):
            with lock:
                shown.append(reflective_dataset)
                if len(shown) <= at_once:
                    raise TimeoutError
                return propose(candidate, reflective_dataset, components_to_update)

        searcher.propose = fails_first
        return searcher, shown

    first, shown_before = flaky(Together())
    with pytest.raises(KilledError):  # the first act scores the population; then so many reflections fail
        first.search(Killing(tmp_path / "search.jsonl", at_once, keep_last=True), proposals_at_once=at_once)
    second = Together()
    shown_after = []
    propose = second.propose
    second.propose = lambda **given: (shown_after.append(given["reflective_dataset"]), propose(**given))[1]
    found = second.search(Journal(tmp_path / "search.jsonl", {"cycle": 0}), proposals_at_once=at_once)
    assert found.counts["reflections_failed"] == at_once
    assert all(records for data in shown_after for records in data.values()), "none is asked with nothing to read"
    assert str(shown_after[0]) in map(str, shown_before)


def test_a_reflection_that_does_not_answer_counts_as_failed_and_the_others_go_on(monkeypatch):
    monkeypatch.setattr(reflections, "REFLECTION_S", 0.2)
    searcher, first, lock, ends = Together(), [True], threading.Lock(), threading.Event()
    propose = searcher.propose

    def hangs_once(**shown):
        with lock:
            hangs = first.pop() if first else False
        if hangs:
            ends.wait(20)
        return propose(**shown)

    searcher.propose = hangs_once
    counts = searcher.search(None).counts
    ends.set()
    assert counts["reflections_failed"] == 1
    assert counts["reflections"] >= TOGETHER


def test_reflections_that_all_fail_end_the_search_with_their_reason():
    def broken(candidate, reflective_dataset, components_to_update):
        raise PermissionError("401 bad api key")

    with pytest.raises(ReflectionError, match=r"all 6 reflections failed, the last with PermissionError\('401"):
        Searcher(propose=broken).evolve(**RECIPE)


def test_warnings_of_proposers_in_threads_are_the_search_s():
    searcher = Together()
    propose, lock = searcher.propose, threading.Lock()

    def warns(candidate, reflective_dataset, components_to_update):
        with lock:
            texts = propose(candidate, reflective_dataset, components_to_update)
            warnings.warn(f"cannot read {components_to_update[0]}", stacklevel=1)
        return texts

    searcher.propose = warns
    assert searcher.search(None).warned == ("cannot read first", "cannot read second")
