"""What holds for any recipe, any groups, any scores and any state: the pure parts of the method, on drawn input.

The profile in conftest.py draws the same examples every time.
"""

import json
import math
import statistics
from collections import Counter
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from dspy_fst.config import FSTConfig
from dspy_fst.fast.pareto import frontier, top_k
from dspy_fst.run.files import population_from_json, population_to_json, write_json
from dspy_fst.slow.checkpoint import read_state, write_state
from dspy_fst.slow.credit import EPSILON, credit
from dspy_fst.training.plan import Plan
from dspy_fst.types import Candidate, Group, Population
from tests.slow.makers import make_call, make_rollout

# ---- the plan ----------------------------------------------------------------------------------

METHODS = ("fst", "rl", "gepa", "gepa_then_rl", "rl_then_gepa")


@st.composite
def plans(draw):
    population = draw(st.integers(1, 4))
    config = FSTConfig(
        cycles=draw(st.integers(1, 4)),
        steps_per_cycle=draw(st.integers(1, 4)),
        problems_per_step=draw(st.integers(1, 6)),
        population_size=population,
        group_size=population * draw(st.integers(2, 3)),
        anchors=draw(st.none() | st.integers(1, 30)),
        search_passes=draw(st.floats(0.1, 6.0)),
        search_rollouts=draw(st.none() | st.integers(1, 100)),
        seed=draw(st.integers(0, 2**32)),
    )
    return Plan(config, size=draw(st.integers(config.problems_per_step, 40)), origin=draw(st.sampled_from(["", "abc"])))


@given(plans(), st.integers(0, 20))
def test_an_epoch_is_the_beginning_of_a_shuffle_of_the_whole_trainset(plan, epoch):
    size = plan.config.problems_per_step
    batches = plan.size // size
    shown = [problem for step in range(batches) for problem in plan.problems(epoch * batches + step)]
    assert len(shown) == len(set(shown)) == batches * size
    assert set(shown) <= set(range(plan.size))


@given(plans(), st.integers(0, 200))
def test_a_batch_is_full_and_holds_no_problem_twice(plan, step):
    problems = plan.problems(step)
    assert len(problems) == len(set(problems)) == plan.config.problems_per_step


@given(plans(), st.integers(0, 10))
def test_the_anchors_are_some_of_the_problems_that_the_cycle_trains_on(plan, cycle):
    first = cycle * plan.config.steps_per_cycle
    trained = {p for step in range(first, first + plan.config.steps_per_cycle) for p in plan.problems(step)}
    lookahead, anchors = plan.lookahead(cycle), plan.anchors(cycle)
    assert set(lookahead) == trained
    assert len(lookahead) == len(trained)
    assert set(anchors) <= trained
    assert len(anchors) == len(set(anchors)) == min(plan.config.anchors or len(trained), len(trained))


@given(plans(), st.permutations(range(12)))
def test_the_same_seed_gives_the_same_plan_in_whatever_order_it_is_asked(plan, order):
    again = Plan(plan.config, plan.size, plan.origin)
    asked = {step: (again.problems(step), again.anchors(step)) for step in order}
    assert asked == {step: (plan.problems(step), plan.anchors(step)) for step in range(12)}


@given(plans(), st.integers(0, 9))
def test_the_budget_is_the_sum_of_the_cycles(plan, validation):
    config, budget = plan.config, plan.budget(validation)
    searches = [cycle.search_budget for cycle in plan.cycles]
    steps = [step for cycle in plan.cycles for step in cycle.steps]
    rollouts = sum(len(plan.problems(step)) * config.group_size for step in steps)
    assert (budget.searches, budget.search_rollouts) == (sum(map(bool, searches)), sum(searches))
    assert (budget.updates, budget.training_rollouts) == (len(steps), rollouts)
    assert budget.validation_rollouts == validation * config.validation_samples * (1 + config.population_size)
    assert steps == list(range(config.cycles * config.steps_per_cycle))


@given(plans())
def test_every_method_spends_what_the_others_do(plan):
    budgets = {m: Plan(plan.config.model_copy(update={"method": m}), plan.size).budget(0) for m in METHODS}
    searched = {method: budget.search_rollouts for method, budget in budgets.items()}
    updates = {method: budget.updates for method, budget in budgets.items()}
    assert {searched[method] for method in METHODS if method != "rl"} == {searched["fst"]}
    assert {updates[method] for method in METHODS if method != "gepa"} == {updates["fst"]}
    assert searched["rl"] == updates["gepa"] == 0


@given(plans())
def test_a_search_can_always_afford_one_minibatch(plan):
    budgets = [cycle.search_budget for cycle in plan.cycles]
    assert all(budget >= plan.config.reflection_minibatch for budget in budgets)


# ---- credit ------------------------------------------------------------------------------------

EIGHTHS = st.integers(-16, 16).map(lambda n: n / 8)
"""Sums of these are exact, so that only the method's own rounding is left."""


@st.composite
def group_lists(draw):
    """Up to five groups of rollouts, of which any may be masked, with calls of various lengths."""
    groups = []
    for problem in range(draw(st.integers(1, 5))):
        rollouts = []
        for index in range(draw(st.integers(1, 6))):
            reward = draw(st.none() | EIGHTHS)
            lengths = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
            calls = [make_call([5] * length, prompt=(problem, index, call)) for call, length in enumerate(lengths)]
            mask = "timeout" if reward is None else None
            rollouts.append(make_rollout(reward, *calls, problem=problem, mask=mask))
        groups.append(Group(problem, tuple(rollouts)))
    return groups


def by_call(batch):
    """(problem, rollout, call) -> (advantage, token weight)."""
    return {row.prompt_ids: (row.advantage, row.token_weight) for row in batch.rows}


def about(batch):
    return {key: pytest.approx(values, rel=1e-9, abs=1e-12) for key, values in by_call(batch).items()}


def by_rollout(batch):
    """(problem, rollout) -> advantage; every call of a rollout has the same."""
    found = {}
    for row in batch.rows:
        assert found.setdefault(row.prompt_ids[:2], row.advantage) == row.advantage
    return found


def measured(group):
    return [rollout.reward for rollout in group.rollouts if rollout.reward is not None]


def live(groups):
    return [group for group in groups if len(set(measured(group))) > 1]


@pytest.mark.slow
@given(group_lists())
def test_the_advantages_of_a_group_have_mean_zero_and_the_spread_of_one(groups):
    advantages = by_rollout(credit(groups))
    for group in live(groups):
        own = [value for (problem, _), value in advantages.items() if problem == group.problem]
        std = statistics.pstdev(measured(group))
        assert len(own) == len(measured(group))
        assert sum(own) == pytest.approx(0, abs=1e-9)
        assert statistics.pstdev(own) == pytest.approx(std / (std + EPSILON))


@given(group_lists())
def test_over_a_batch_all_advantages_together_have_the_spread_of_one(groups):
    assume(live(groups))
    advantages = by_rollout(credit(groups, normalize="batch"))
    centred = [r - statistics.fmean(measured(group)) for group in live(groups) for r in measured(group)]
    std = statistics.pstdev(centred)
    assert sorted(advantages.values()) == pytest.approx(sorted(c / (std + EPSILON) for c in centred), abs=1e-12)


@given(group_lists(), st.sampled_from(["group", "batch"]))
def test_masked_rollouts_change_nothing(groups, normalize):
    without = [replace(g, rollouts=tuple(r for r in g.rollouts if r.mask is None)) for g in groups]
    assert credit(groups, normalize=normalize).rows == credit(without, normalize=normalize).rows


@given(group_lists())
def test_token_weights_sum_to_one_and_each_live_problem_has_its_share(groups):
    shares = Counter()
    for row in credit(groups).rows:
        shares[row.problem] += row.token_weight * len(row.completion_ids)
    assert shares.keys() == {group.problem for group in live(groups)}
    assert all(share == pytest.approx(1 / len(shares)) for share in shares.values())


@pytest.mark.slow
@given(group_lists(), st.randoms(use_true_random=False), st.sampled_from(["group", "batch"]))
def test_the_order_of_the_groups_does_not_matter(groups, random, normalize):
    shuffled = random.sample(groups, len(groups))
    assert by_call(credit(shuffled, normalize=normalize)) == about(credit(groups, normalize=normalize))


@given(group_lists(), EIGHTHS, st.sampled_from(["group", "batch"]))
def test_a_constant_added_to_every_reward_changes_nothing(groups, constant, normalize):
    def raised(rollout):
        return rollout if rollout.reward is None else replace(rollout, reward=rollout.reward + constant)

    higher = [replace(group, rollouts=tuple(map(raised, group.rollouts))) for group in groups]
    assert by_call(credit(higher, normalize=normalize)) == about(credit(groups, normalize=normalize))


@given(group_lists())
def test_every_group_is_live_flat_or_unmeasured_and_only_live_ones_train(groups):
    batch = credit(groups)
    unmeasured = sum(len(measured(group)) < 2 for group in groups)
    assert batch.counts["live_groups"] == len(live(groups))
    assert batch.counts["unmeasured_groups"] == unmeasured
    assert batch.counts["flat_groups"] == len(groups) - len(live(groups)) - unmeasured
    assert {row.problem for row in batch.rows} == {group.problem for group in live(groups)}


# ---- the frontier and its top K ----------------------------------------------------------------

tables = st.integers(1, 5).flatmap(
    lambda anchors: st.lists(
        st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=anchors, max_size=anchors), min_size=1, max_size=7
    )
)
"""scores[candidate][anchor], in quarters, whose sums are exact."""


def coverage(scores, members):
    """Sum over the anchors of the best score that a member has there."""
    return sum(max(scores[member][anchor] for member in members) for anchor in range(len(scores[0])))


def mean(row):
    return sum(row) / len(row)


@given(tables, st.integers(1, 6))
def test_no_candidate_is_as_good_as_a_member_everywhere_and_better_somewhere(scores, k):
    for member in top_k(scores, k):
        for other in scores:
            nowhere_worse = all(theirs >= ours for theirs, ours in zip(other, scores[member], strict=True))
            assert not (nowhere_worse and other != scores[member])


@given(tables, st.integers(1, 6))
def test_a_population_is_k_long_best_mean_first_and_repeats_only_its_best(scores, k):
    members = top_k(scores, k)
    different = list(dict.fromkeys(members))
    means = [mean(scores[member]) for member in different]
    assert len(members) == k
    assert len(different) == min(k, len(frontier(scores)))
    assert means == sorted(means, reverse=True)
    assert members == different + [members[0]] * (k - len(different))


@example([[1, 1, 0, 0], [0, 0, 0, 1], [0.5, 0, 1, 0]], 2)  # the second adds as much as the third, whose mean is higher
@example([[1, 1, 1, 0, 0], [1, 1, 0.5, 0, 0.25], [0, 0, 0, 1, 0]], 2)  # the last adds most, with the lowest mean
@given(tables, st.integers(1, 6))
def test_members_are_added_by_what_they_add_then_by_mean_then_by_age(scores, k):
    left, added = frontier(scores), []
    while left and len(added) < k:
        left.sort(key=lambda c: (-coverage(scores, [*added, c]), -mean(scores[c]), c))
        added.append(left.pop(0))
    assert set(top_k(scores, k)) == set(added)


@given(tables)
def test_the_frontier_covers_what_all_candidates_together_do(scores):
    assert coverage(scores, frontier(scores)) == coverage(scores, range(len(scores)))


@given(tables, st.integers(1, 6), st.lists(st.integers(0, 6), max_size=4))
def test_copies_of_candidates_change_nothing(scores, k, copied):
    copies = [scores[index % len(scores)] for index in copied]
    assert top_k(scores + copies, k) == top_k(scores, k)


# ---- what is written and read again ------------------------------------------------------------

candidates = st.dictionaries(st.text(max_size=20), st.text(max_size=60), min_size=1, max_size=3).map(Candidate)
finite = st.floats(allow_nan=False, allow_infinity=False)


@st.composite
def populations(draw):
    members = draw(st.lists(candidates, min_size=1, max_size=4))
    scores = draw(st.lists(st.none() | finite, min_size=len(members), max_size=len(members)))
    digests = st.sampled_from([member.digest for member in members])
    parents = draw(st.dictionaries(digests, st.lists(digests, max_size=2).map(tuple)))
    return Population(tuple(members), tuple(scores), parents)


@settings(max_examples=40)
@given(populations())
def test_a_population_of_any_texts_is_the_same_after_json(population):
    with TemporaryDirectory() as folder:
        path = Path(folder) / "population.json"
        write_json(path, population_to_json(population))
        again = population_from_json(json.loads(path.read_bytes()))
    assert again == population
    assert [member.digest for member in again.members] == [member.digest for member in population.members]


DTYPES = {torch.float32: 4, torch.bfloat16: 2, torch.int64: 8, torch.uint8: 1}


@st.composite
def tensors(draw):
    """Any bits at all, NaNs with a payload among them, in any small shape."""
    dtype, size = draw(st.sampled_from(sorted(DTYPES.items(), key=str)))
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    count = math.prod(shape)
    bits = draw(st.binary(min_size=count * size, max_size=count * size))
    return torch.frombuffer(bytearray(bits), dtype=dtype).reshape(shape) if count else torch.empty(shape, dtype=dtype)


names = st.text("abcxyz_./0123", min_size=1, max_size=12)
facts = st.dictionaries(names.filter(lambda name: name != "format"), st.integers() | finite | st.text(max_size=5))


@example({"x": torch.tensor([-0.0, math.nan, math.inf, 1e-42])}, {})
@settings(max_examples=40)
@given(st.dictionaries(names, tensors(), min_size=1, max_size=4), facts)
def test_a_training_state_is_the_same_bit_for_bit_after_the_disk(state, told):
    with TemporaryDirectory() as folder:
        write_state(Path(folder) / "state", state, told)
        tensors_again, told_again = read_state(Path(folder) / "state", {})
    assert {name: value for name, value in told_again.items() if name != "format"} == told
    assert tensors_again.keys() == state.keys()
    for name, tensor in state.items():
        again = tensors_again[name]
        assert (again.dtype, again.shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(again.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))
