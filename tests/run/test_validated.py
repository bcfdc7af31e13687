"""What follows from a run's validations, on numbers that can be checked by hand."""

import pytest
from scipy import stats

from dspy_fst.config import FSTConfig, make_config
from dspy_fst.report.metric_names import entry_of
from dspy_fst.report.verdict import difference_words, validation_line
from dspy_fst.run.paired import Difference, difference
from dspy_fst.run.validated import (
    Validated,
    best_of,
    best_validated,
    decline,
    early_stop,
    gain,
    starting_population,
    validated_in,
)
from dspy_fst.training.plan import Plan
from dspy_fst.training.validating import RISES, patience_warnings, valset_warnings
from dspy_fst.types import Candidate, Population

SEED, CHILD = Candidate({"solve": "Solve it."}), Candidate({"solve": "Solve it. <b>Be brief.</b>"})
TERMS = {"problems": "abc", "samples": 1, "metric": "m"}
NOISE = [0.9, 0.1, 0.5, 0.3, 0.7, 0.2, 0.8, 0.4]


def state(index, scores, **changes):
    fields = {
        "index": index,
        "when": "between" if index else "start",
        "step": index,
        "searched": 0 if index else -1,
        "weights": f"step-{index:06d}",
        "population": Population.of_seed(SEED, 2),
        "candidates": (SEED.digest,),
        "rewards": (tuple(scores),),
        "terms": TERMS,
        "counts": {"rollouts": len(scores)},
        "sampled_tokens": 10,
        "seconds": 1.0,
    }
    return Validated(**{**fields, **changes})


def shifted(by):
    return [reward + by * (0.9 + 0.2 * (place % 2)) for place, reward in enumerate(NOISE)]


# ---- the interval ----------------------------------------------------------------------------------


def test_the_interval_is_student_s_over_the_problems_own_differences():
    before, after = [0.0, 1.0, 0.0, 1.0, 0.0], [1.0, 1.0, 0.0, 1.0, 1.0]
    found = difference(before, after)
    expected = stats.ttest_rel(after, before).confidence_interval(0.95)
    assert found.mean == pytest.approx(0.4)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert not found.falls


def test_pairing_sees_a_shift_that_is_small_beside_the_problems_own_spread():
    found = difference(NOISE, [reward - 0.05 + 0.01 * (i % 2) for i, reward in enumerate(NOISE)])
    assert found.falls
    assert found.high < 0


def test_one_problem_has_no_interval_and_unmeasured_ones_are_left_out():
    assert difference([0.5, None, 0.25], [1.0, 1.0, None]) == Difference(0.5, None, None, 1)
    assert difference_words(Difference(0.5, None, None, 1)) == "+0.500 (one problem, so no interval)"
    assert not Difference(-0.5, None, None, 1).falls
    assert difference([None], [1.0]) is None


@pytest.mark.parametrize(("problems", "falls"), [(2, False), (5, False), (6, True), (20, True)], ids=str)
def test_the_same_difference_on_all_problems_has_no_interval_and_counts_by_the_sign_test(problems, falls):
    by = difference([1.0] * problems, [0.0] * problems)
    assert by == Difference(-1.0, None, None, problems)
    assert difference_words(by) == f"-1.000 (the same on all {problems} problems, so no interval)"
    assert by.falls is falls
    text = decline([state(0, [1.0] * problems), state(1, [0.0] * problems)])
    assert (f"by 1.000 (the same on all {problems} problems, so no interval)" in (text or "")) is falls
    assert not difference([0.0] * problems, [1.0] * problems).falls


def test_differences_that_are_the_same_but_for_rounding_have_no_interval():
    gaps = {0.3 - 0.6, 0.2 - 0.5, 0.9 - 1.2}
    assert len(gaps) > 1
    assert difference([0.6, 0.5, 1.2], [0.3, 0.2, 0.9]).low is None


def test_a_score_that_the_same_problems_chose_is_said_to_be_favoured_by_them():
    chosen = state(1, [], candidates=(SEED.digest, CHILD.digest), rewards=((0.0, 0.5), (0.5, 0.75)))
    line = validation_line([state(0, [0.25, 0.25]), chosen])
    assert line.endswith("; the best of 2 by these problems, so favoured)")
    assert "favoured" not in validation_line([state(0, [0.25, 0.25]), state(1, [0.5, 0.75])])


# ---- states ----------------------------------------------------------------------------------------


def test_the_best_is_the_highest_and_of_equals_the_first():
    states = [state(0, [0.5, 0.5]), state(1, [1.0, 0.5]), state(2, [0.5, 1.0]), state(3, [None, None])]
    assert best_of(states) is states[1]
    assert best_of([states[3]]) is None
    assert best_of([]) is None


def test_the_best_weights_of_all_and_of_the_committed_steps_are_kept():
    states = [state(0, [0.1]), state(1, [0.5]), state(2, [0.9])]
    assert best_validated(states, committed=1) == {"step-000001", "step-000002"}
    assert best_validated(states, committed=2) == {"step-000002"}
    assert best_validated([], committed=0) == set()


def test_a_state_is_worth_its_best_candidate_and_ranks_its_population_by_score():
    population = Population((SEED, CHILD, SEED), (None, None, None))
    mixed = state(
        1, [], population=population, candidates=(SEED.digest, CHILD.digest), rewards=((0.0, 0.5), (None, 1.0))
    )
    assert mixed.score == 1.0
    assert mixed.best_rewards == (None, 1.0)
    assert mixed.ranked.members == (CHILD, SEED, SEED)
    assert mixed.ranked.scores == (1.0, 0.25, 0.25)


def test_a_score_of_nought_beats_one_below_it():
    low = state(1, [], candidates=(SEED.digest, CHILD.digest), rewards=((-1.0, -1.0), (0.0, 0.0)))
    assert low.best_rewards == (0.0, 0.0)


def test_a_state_is_read_back_from_its_event_as_it_was():
    from dspy_fst.run.files import to_jsonable

    original = state(2, [0.5, None], when="end")
    written = {name: getattr(original, name) for name in Validated.__dataclass_fields__}
    event = {"event": "validation", "time": 1.0, "report": to_jsonable(written), "scores": {}, "score": 0.5}
    assert validated_in([{"event": "step"}, event]) == [original]


def test_a_program_that_carries_a_population_starts_with_its_own_texts():
    carried = Population((CHILD, SEED, CHILD), (0.5, 0.25, 0.5))
    assert starting_population(SEED, carried).members == (SEED, CHILD, CHILD)
    edited = Candidate({"solve": "By hand."})
    assert starting_population(edited, carried).members == (edited, CHILD, SEED)


# ---- warnings and early stopping -------------------------------------------------------------------


def test_noise_is_no_decline():
    states = [state(0, NOISE), state(1, [*NOISE[1:], NOISE[0] - 0.1])]
    assert states[1].score < states[0].score
    assert decline(states) is None


def test_a_decline_is_told_once_an_episode_and_again_after_a_recovery():
    shifts = [0.0, -0.1, -0.2, 0.0, -0.1]
    states = [state(index, shifted(by)) for index, by in enumerate(shifts)]
    texts = [decline(states[:length]) for length in range(1, len(states) + 1)]
    assert [bool(text) for text in texts] == [False, True, False, False, True]
    assert texts[1].startswith("validation after step 0: 0.38")
    assert "below the 0.487 at the start by 0.100 (95% interval 0.0" in texts[1]
    assert "8 problems" in texts[1]


def test_a_decline_against_the_best_so_far_is_told_although_the_start_was_lower():
    states = [state(0, shifted(0.0)), state(1, shifted(0.5)), state(2, shifted(0.1))]
    assert "below the 0.988 after step 0 by 0.400" in decline(states)


def test_states_on_other_terms_are_not_compared():
    other = state(1, shifted(-0.5), terms={**TERMS, "problems": "others"})
    assert gain(state(0, NOISE), other) is None
    assert decline([state(0, NOISE), other]) is None


def test_patience_counts_validations_without_a_new_best():
    scores = [0.5, 0.6, 0.6, None, 0.4]
    states = [state(index, [score]) for index, score in enumerate(scores)]
    ended = [early_stop(states[:length], patience=2) for length in range(1, len(states) + 1)]
    assert [bool(reason) for reason in ended] == [False, False, False, False, True]
    assert (ended[-1].kind, ended[-1].step) == ("early_stopping", 4)
    assert "the best is 0.600 after step 0" in ended[-1].text
    assert early_stop(states, None) is None
    assert early_stop(states[:3], patience=1).text.startswith("1 validation in a row brought no new best (patience=1)")


# ---- the settings ----------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0, -1, True, False, "step", 1.5])
def test_an_interval_that_is_none_is_refused_in_one_sentence(value):
    (fault,) = make_config({"validate_every": value})[1]
    assert "use 'cycle', a whole number of steps, or None" in fault


def test_patience_without_validations_is_refused():
    (fault,) = make_config({"patience": 3})[1]
    assert "set validate_every='cycle' or a number of steps" in fault


@pytest.mark.parametrize(
    ("recipe", "between"),
    [
        ({"validate_every": 1000, "patience": 1, "cycles": 1, "steps_per_cycle": 2}, 0),
        ({"validate_every": "cycle", "patience": 1, "method": "gepa"}, 0),
        ({"validate_every": "cycle", "patience": 1, "cycles": 1}, 0),
        ({"validate_every": "cycle", "patience": 3, "cycles": 3}, 2),
        ({"validate_every": "cycle", "patience": 2, "cycles": 3}, None),
        ({"validate_every": "cycle", "patience": 3, "cycles": 3, "method": "rl_then_gepa"}, None),
        ({"cycles": 1}, None),
    ],
    ids=["too far apart", "no steps", "one cycle", "too patient", "enough", "a search follows", "no patience"],
)
def test_a_patience_that_cannot_end_the_run_is_warned_of(recipe, between):
    warnings = list(patience_warnings(FSTConfig(**recipe)))
    assert len(warnings) == (between is not None)
    assert all(f"measures after {between} that something follows" in warning for warning in warnings)


@pytest.mark.parametrize(
    ("every", "steps"), [(None, []), ("cycle", [2, 5]), (1, [0, 1, 2, 3, 4, 5]), (4, [3])], ids=str
)
def test_validations_are_planned_and_counted(every, steps):
    plan = Plan(FSTConfig(cycles=2, steps_per_cycle=3, population_size=2, validate_every=every), 100)
    assert [step for step in range(6) if plan.validates_after(step)] == steps
    states = len({*steps, 5})  # the end is one of them where its state was just measured
    assert plan.budget(10).validation_rollouts == 10 * (1 + 2 * states)


def test_the_end_of_a_last_search_is_measured_on_top():
    plan = Plan(FSTConfig(method="rl_then_gepa", cycles=2, population_size=2, validate_every="cycle"), 100)
    assert plan.budget(10).validation_rollouts == 10 * (1 + 2 * 3)


# ---- shown -----------------------------------------------------------------------------------------


def test_a_notebook_s_table_escapes_what_a_model_wrote():
    population = Population((CHILD, SEED), (0.5, None))
    html = population._repr_html_()
    assert "&lt;b&gt;Be brief.&lt;/b&gt;" in html
    assert "<b>" not in html
    assert "not scored" in html
    text = repr(population)
    assert text.splitlines()[0] == "Population of 2 candidates, 2 different, best first"
    assert f"{CHILD.digest}       0.500       1  solve: Solve it. <b>Be brief.</b>" in text


def test_trackers_get_every_validation_and_its_index_never_falls():
    def event(when, step):
        report = {"when": when, "step": step, "counts": {"rollouts": 4}, "sampled_tokens": 9, "seconds": 1.0}
        return {"event": "validation", "report": report, "score": 0.5}

    entries = [entry_of(event(*of)) for of in [("start", 0), ("between", 2), ("end", 2), ("between", 3), ("end", 3)]]
    indices = [entry.index for entry in entries]
    assert indices == sorted(set(indices))
    assert entries[0].values["validation/best_score"] == 0.5
    assert entries[0].values["validation/rollouts"] == 4


@pytest.mark.parametrize("size", [8, 31, 32, 200])
def test_four_problems_that_rise_and_not_three_make_an_interval_above_zero(size):
    """The rule by which a valset is called too small for a verdict."""
    for rising in range(1, 6):
        by = difference([0.0] * size, [1.0] * rising + [0.0] * (size - rising))
        assert (by.low > 0) == (rising >= RISES)


def test_a_valset_that_is_too_small_for_a_verdict_is_told_with_the_number_that_would_do():
    (told,) = valset_warnings(range(16))
    assert told == (
        "valset: of its 16 problems 4 must turn from wrong to right, and none the other way, before the interval "
        "between start and end excludes 0, which is a gain of 0.250; 32 problems would tell a gain of 0.125"
    )
    assert [list(valset_warnings(valset)) for valset in (None, [], range(32))] == [[], [], []]
