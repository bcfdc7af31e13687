"""The simulation of a run's acts, on numbers that one can check by hand."""

import pytest

from dspy_fst.config import FSTConfig
from dspy_fst.errors import ConfigurationError
from dspy_fst.sizing import simulate as simulation
from dspy_fst.sizing.forecasting import Asked, forecast
from dspy_fst.sizing.rates import EngineRates, MachineRates
from dspy_fst.sizing.simulate import simulate
from dspy_fst.sizing.workload import Acts, Learn, Lengths, Play, Reflect, Texts

ENGINE = EngineRates(step_s=0.01, row_s=0.001)


def rollouts(count, tokens, calls=1, prompt=0.0):
    return Play("rollouts", ((float(tokens),) * calls,) * count, prompt)


def seconds(acts, in_flight=64, **rates):
    return simulate(acts, MachineRates(**{"engine": ENGINE, **rates}), in_flight).total


# ---- engines ---------------------------------------------------------------------------------------


def test_rows_advance_together_and_each_makes_a_step_longer():
    assert seconds([rollouts(10, 100)]) == pytest.approx(100 * (0.01 + 10 * 0.001))


def test_a_row_that_ends_makes_the_others_quicker():
    acts = [Play("rollouts", ((50.0,), (100.0,)), 0.0)]
    assert seconds(acts) == pytest.approx(50 * 0.012 + 50 * 0.011)


def test_throughput_saturates():
    per_s = [100 * rows / seconds([rollouts(rows, 100)], in_flight=rows) for rows in (1, 10, 100, 1000)]
    assert per_s == pytest.approx([ENGINE.tokens_per_s(rows) for rows in (1, 10, 100, 1000)])
    assert ENGINE.tokens_per_s(ENGINE.half_full) == pytest.approx(0.5 / ENGINE.row_s)


def test_no_more_are_in_flight_than_threads_and_rows_allow():
    assert seconds([rollouts(10, 100)], in_flight=5) == pytest.approx(2 * 100 * 0.015)
    narrow = EngineRates(0.01, 0.001, rows=5)
    assert seconds([rollouts(10, 100)], engine=narrow) == pytest.approx(2 * 100 * 0.015)


def test_calls_join_those_that_are_sampled_or_wait_for_a_batch_of_all():
    acts = [Play("rollouts", ((10.0,), (30.0,), (20.0,)), 0.0)]  # two in flight: the third begins after the first
    joining = 10 * 0.012 + 20 * 0.012  # the second and the third end together
    assert seconds(acts, in_flight=2) == pytest.approx(joining)
    waves = EngineRates(0.01, 0.001, joins=False)
    in_waves = 10 * 0.012 + 20 * 0.011 + 20 * 0.011  # the third is alone
    assert seconds(acts, in_flight=2, engine=waves) == pytest.approx(in_waves)


def test_a_batch_of_all_waits_for_the_last_caller_and_for_no_more_than_are_left():
    waves = EngineRates(0.01, 0.001, joins=False)
    both = seconds([rollouts(2, 10)], in_flight=2, engine=waves, program_s=0.05)  # calls come at 0.05 and 0.1
    assert both == pytest.approx(0.1 + 10 * 0.012)
    assert seconds([rollouts(3, 10)], in_flight=2, engine=waves) == pytest.approx(10 * 0.012 + 10 * 0.011)


def test_calls_of_a_rollout_come_one_after_the_other_and_prompts_are_read_first():
    engine = EngineRates(0.01, 0.001, prompt_s=1e-4)
    assert seconds([rollouts(1, 100, calls=3, prompt=500)], engine=engine) == pytest.approx(3 * (100 * 0.011 + 0.05))


def test_calls_go_to_the_least_loaded_engine():
    assert seconds([rollouts(10, 100)], engines=2) == pytest.approx(100 * (0.01 + 5 * 0.001))


def test_the_program_s_python_takes_one_call_at_a_time():
    one_at_a_time = seconds([rollouts(100, 1)], engines=100, in_flight=100, program_s=0.1)
    assert one_at_a_time == pytest.approx(100 * 0.1 + 0.011)


# ---- the loop --------------------------------------------------------------------------------------


def test_acts_follow_each_other_and_each_takes_what_its_rates_say():
    rates = MachineRates(
        ENGINE, reflection_s=7, update_s=1, update_token_s=0.01, publish_s=2, verify_s=3, rest_s=0.5, play_s=0.25
    )
    line = simulate([Reflect(4), rollouts(10, 100), Learn(200, state=False)], rates, 64)
    assert line.seconds == pytest.approx(
        {
            "reflections": 7,
            "rollouts": 2.25,
            "update": 3,
            "publish": 2,
            "verification": 3,
            "the rest of a step": 0.5,
        }
    )
    assert (line.rollouts, line.tokens) == (10, 1000)


@pytest.mark.parametrize(("state_s", "waited"), [(1.5, 0.0), (5.0, 3.0)])
def test_a_state_is_written_while_the_next_step_is_sampled_and_the_next_update_waits_for_it(state_s, waited):
    acts = [Learn(0, state=True), rollouts(10, 100), Learn(0, state=True)]
    line = simulate(acts, MachineRates(ENGINE, state_s=state_s), 64)
    assert line.seconds.get("waiting for the state", 0.0) == pytest.approx(waited)


def test_machines_that_differ_in_their_trainer_alone_have_their_rollouts_simulated_once():
    acts = [rollouts(5, 7), Learn(1, state=True), rollouts(5, 8)]
    simulation._played.cache_clear()
    first, second = (simulate(acts, MachineRates(ENGINE, update_s=seconds), 4) for seconds in (1, 2))
    assert simulation._played.cache_info().misses == 2
    assert second.total == pytest.approx(first.total + 1)
    simulate(acts, MachineRates(ENGINE, engines=2), 4)
    assert simulation._played.cache_info().misses == 4


# ---- bottlenecks -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rates", "count", "cause"),
    [
        ({}, 64, "decoding"),
        ({}, 3, "the length of replies"),
        ({"program_s": 1.0, "engines": 64}, 64, "the program's Python"),
        ({"engine": EngineRates(0.01, 0.001, rows=4)}, 64, "keys and values"),
        ({"update_s": 100}, 64, "update"),
        ({"publish_s": 100}, 64, "publish"),
        ({"verify_s": 100}, 64, "verification"),
        ({"reflection_s": 100}, 64, "reflections"),
        ({"state_s": 100}, 64, "waiting for the state"),
    ],
)
def test_what_saturates_first_is_named(rates, count, cause):
    acts = [Reflect(1), rollouts(count, 100), Learn(10, state=True), rollouts(count, 100), Learn(10, state=True)]
    line = simulate(acts, MachineRates(**{"engine": ENGINE, **rates}), 64)
    assert line.bottleneck(rates.get("engine", ENGINE)).startswith(cause)


# ---- a recipe's acts -------------------------------------------------------------------------------

SMALL = FSTConfig(cycles=3, steps_per_cycle=2, problems_per_step=4, population_size=2, group_size=4, search_rollouts=20)
TEXTS = Texts(Lengths.around(10), prompt=30, accepted=0.5, live=0.5)


def test_a_search_spends_its_budget_on_minibatches_and_on_accepted_candidates():
    acts = Acts(SMALL, TEXTS)
    first, later, _ = acts.plan.cycles
    searched = [*acts.search(first)]
    sizes = [len(act.rollouts) for act in searched if isinstance(act, Play)]
    # 8 anchors under one text; minibatches of 3, and after every second one the 5 other anchors
    assert sizes == [8, 3, 3, 5, 3, 3, 5]
    assert sum(isinstance(act, Reflect) for act in searched) == 4
    assert len(next(acts.search(later)).rollouts) == 16  # the population is carried


def test_a_step_reads_the_prompts_of_live_groups_once_for_each_candidate():
    acts = Acts(SMALL, TEXTS)
    assert acts.update_tokens == pytest.approx(4 * 0.5 * (2 * 30 + 4 * 10))
    assert acts.step().prompt == 30 / 2


def test_validations_stand_where_the_recipe_has_them():
    def sizes(**settings):
        acts = Acts(SMALL.model_copy(update=settings), TEXTS, valset=5)
        inside = [act for act in acts.cycle(acts.plan.cycles[0]) if isinstance(act, Play) and act.phase == "validation"]
        return [len(act.rollouts) for part in (acts.start(), inside, acts.end()) for act in part]

    assert sizes() == [5, 10]
    assert sizes(validate_every="cycle") == [5, 10]  # the last cycle's is the end's
    assert sizes(validate_every=1) == [5, 10, 10]


def test_lengths_lie_between_their_deciles():
    acts = Acts(SMALL, Texts(Lengths((1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 50)), prompt=1))
    drawn = sorted(tokens for _ in range(100) for tokens in acts.step().totals)
    assert drawn[0] >= 1
    assert 50 >= drawn[-1] > 10
    assert drawn[len(drawn) // 2] == pytest.approx(6, abs=0.5)


def test_equal_seeds_give_equal_times_and_others_give_others():
    times = [forecast(Asked(SMALL, TEXTS, valset=4, seed=seed), MachineRates(ENGINE)).run_s for seed in (0, 0, 1)]
    assert times[0] == times[1] != times[2]


def test_the_whole_run_is_all_of_its_cycles():
    asked = Asked(SMALL, Texts(Lengths((10.0,) * 11), prompt=30), valset=5)
    rates = MachineRates(ENGINE, update_s=1)
    acts = asked.script
    at_once = simulate(
        [*acts.outside, *(a for kind, count in acts.kinds for _ in range(count) for a in kind)], rates, 64
    )
    assert forecast(asked, rates).run_s == pytest.approx(at_once.total)


def test_the_lower_bound_lies_below_and_near_for_a_full_engine():
    asked = Asked(SMALL.model_copy(update={"problems_per_step": 64, "num_threads": 512}), TEXTS)
    for engines in (1, 3, 64):
        rates = MachineRates(ENGINE, engines, program_s=1e-4, update_s=0.1)
        bound = asked.script.seconds_at_least(rates, 512)
        assert 0.5 * forecast(asked, rates).run_s < bound <= forecast(asked, rates).run_s


def test_without_simpy_the_command_that_installs_it_is_named(monkeypatch):
    monkeypatch.setattr(simulation, "find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match=r"pip install 'dspy-fst\[sizing\]'"):
        simulate([], MachineRates(ENGINE), 1)
