"""The benchmark of text and weights on programs of several modules: equal budgets, and a table of what was measured."""

import pytest

from benchmarks.evidence.experiments import RATES
from benchmarks.programs import ARMS, TASKS, WITH_LORA, Run
from benchmarks.readme import program_table, spent
from dspy_fst.config import FSTConfig
from dspy_fst.run.files import read_json
from dspy_fst.training.plan import Plan


@pytest.mark.parametrize("program", TASKS)
@pytest.mark.parametrize("arm", [arm for arm in ARMS if arm != "fst"])
def test_a_baseline_is_planned_at_no_fewer_rollouts_and_less_than_a_step_more(program: str, arm: str) -> None:
    recipe = FSTConfig(**Run(program, arm, 0, rollouts=3700).recipe)
    budget = Plan(recipe, 384).budget(32)
    planned = budget.search_rollouts + budget.scoring_rollouts + budget.training_rollouts
    assert 3700 <= planned < 3700 + recipe.problems_per_step * recipe.group_size
    assert (budget.training_rollouts == 0) == (arm == "gepa")
    assert (budget.search_rollouts == 0) == (arm == "rl")


def test_arms_differ_in_method_and_budget_alone() -> None:
    fst, rl, gepa = (Run("relay", arm, 0, None if arm == "fst" else 3700).recipe for arm in ("fst", "rl", "gepa"))
    budgets = {"method", "cycles", "steps_per_cycle", "search_rollouts"}
    for other in (rl, gepa):
        assert {name for name in fst if fst[name] != other[name]} <= budgets
        assert set(fst) == set(other)


@pytest.mark.parametrize("arm", WITH_LORA)
def test_lora_adapters_get_the_steps_and_rollouts_of_all_weights_and_a_rate_that_was_tuned_for_them(arm: str) -> None:
    full, lora = (FSTConfig(**Run("relay", name, 0).recipe) for name in ("fst", arm))
    assert Plan(lora, 384).budget(32) == Plan(full, 384).budget(32)
    differ = {name for name, value in lora if value != getattr(full, name)}
    assert differ - {"adapters"} == {"adapter", "learning_rate"}
    assert lora.learning_rate == read_json(RATES)["lora"]["learning_rate"]
    assert lora.adapters == ("per_predictor" if arm.endswith("per_predictor") else "shared")


def test_the_table_shows_every_arm_with_its_spread_and_its_rollouts() -> None:
    results = [
        {
            "program": "relay",
            "arm": arm,
            "accuracy of the seed program": 0.01,
            "accuracy": accuracy + 0.1 * seed,
            "search rollouts": 800 * (arm != "rl"),
            "training rollouts": 2880 * (arm != "gepa"),
        }
        for arm, accuracy in (("fst", 0.7), ("gepa", 0.3), ("rl", 0.0))
        for seed in range(3)
    ]
    rows = program_table(results).splitlines()[2:]
    assert rows[0] == "| relay | as it was | 0.01 (0.01 to 0.01) | 0 |"
    assert rows[1] == "| relay | fst | 0.80 (0.70 to 0.90) | 3,680 |"
    assert len(rows) == 1 + len(ARMS)
    assert spent(results[0]) == 3680
