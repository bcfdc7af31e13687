"""Each loss on numbers that can be checked by hand: value, gradient, clipped tokens, token weights, advantages."""

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch

from dspy_fst.errors import ConfigurationError
from dspy_fst.slow.batching import with_reply_log_ratios
from dspy_fst.slow.credit import credit, mini_batches
from dspy_fst.slow.head import entropy, kl_divergence
from dspy_fst.slow.losses import cispo
from dspy_fst.slow.losses.by_name import band_of, loss_of
from dspy_fst.slow.losses.loss import Band, Tokens
from dspy_fst.slow.training_settings import CLIPPED, TrainingSettings
from dspy_fst.types import Group
from tests.slow.makers import make_call, make_group, make_rollout

NAMES = ("cispo", "grpo", "dapo", "dr_grpo", "gspo", "rloo", "rft")
RATIOS = (1.5, 0.5, 1.1, 0.9, 1.5, 0.5)
"""Of six tokens whose probability is 1/4 now; all weigh 1/8."""
ADVANTAGES = (2.0, 2.0, 2.0, -1.0, -1.0, -1.0)


def of(name: str, **settings):
    return loss_of(TrainingSettings(loss=name, **settings)), band_of(TrainingSettings(loss=name, **settings))


def worked(name: str, **settings) -> tuple[float, list[float], list[bool] | None]:
    """Value, gradient by log pi_theta, and clipped tokens of the six tokens above, in two replies of three."""
    loss, band = of(name, **settings)
    logprobs = torch.full((6,), 0.25, dtype=torch.float64).log().requires_grad_()
    behaviour = logprobs.detach() - torch.tensor(RATIOS, dtype=torch.float64).log()
    tokens = Tokens(behaviour, torch.tensor(ADVANTAGES, dtype=torch.float64), torch.full((6,), 1 / 8).double())
    if loss.reads_replies:
        tokens = with_reply_log_ratios(tokens, logprobs.detach(), (3, 3))
    value = loss.value(logprobs, tokens, band)
    (gradient,) = torch.autograd.grad(value, logprobs)
    clipped = None if loss.clipped is None else loss.clipped(logprobs.detach(), tokens, band).tolist()
    return float(value.detach()), (8 * gradient).tolist(), clipped


def test_cispo_caps_the_weight_and_every_token_keeps_its_gradient():
    # dL/dl = -min(rho, 1.2) A: -1.2 * 2, -.5 * 2, -1.1 * 2, .9, 1.2, .5;  the value is that times l = log(1/4)
    value, gradient, clipped = worked("cispo", importance_cap=1.2)
    assert gradient == pytest.approx([-2.4, -1.0, -2.2, 0.9, 1.2, 0.5])
    assert value == pytest.approx(-3.0 * math.log(0.25) / 8)
    assert clipped == [True, False, False, False, True, False]


def test_the_importance_weight_is_capped_from_above_only():
    tokens = Tokens(torch.log(torch.tensor([0.1, 0.25, 0.5])), torch.ones(3), torch.ones(3))
    weights = cispo.importance_weights(torch.log(torch.tensor([0.8, 0.5, 0.01])), tokens, Band(0.0, 4.0))
    assert weights.tolist() == pytest.approx([4.0, 2.0, 0.02])


@pytest.mark.parametrize(("name", "high"), [("grpo", 1.2), ("dapo", 1.28), ("dr_grpo", 1.2)])
def test_a_clipped_loss_takes_the_gradient_where_the_advantage_pushes_out_of_the_band(name, high):
    # Within: dL/dl = -rho A. Out of it upwards with A > 0 (the first) and downwards with A < 0 (the last): 0.
    # Out of it the other way (the second and the fifth), the unclipped term is the smaller one: -rho A again.
    # The value takes the smaller of rho A and clip(rho) A: 1.2 * 2, .5 * 2, 1.1 * 2, -.9, -1.5, -.8.
    value, gradient, clipped = worked(name)
    assert gradient == pytest.approx([0.0, -1.0, -2.2, 0.9, 1.5, 0.0])
    assert value == pytest.approx(-(high * 2 + 1.0 + 2.2 - 0.9 - 1.5 - 0.8) / 8)
    assert clipped == [True, False, False, False, False, True]


def test_a_clip_of_the_user_s_own_takes_the_place_of_the_paper_s():
    # Now 1.5 lies within the upper end, and .9 below the lower one.
    _, gradient, clipped = worked("grpo", clip=(0.05, 0.6))
    assert gradient == pytest.approx([-3.0, -1.0, -2.2, 0.0, 1.5, 0.0])
    assert clipped == [False, False, False, True, False, True]


def test_gspo_weighs_and_clips_whole_replies_by_their_geometric_mean():
    # s of the first reply: (1.5 * .5 * 1.1) ** (1/3) = .9379..., below the band and A > 0: each token has -s A.
    # s of the second: (.9 * 1.5 * .5) ** (1/3) = .8772..., below the band and A < 0: clipped, no gradient.
    first = (1.5 * 0.5 * 1.1) ** (1 / 3)
    value, gradient, clipped = worked("gspo")
    assert gradient == pytest.approx([-2 * first] * 3 + [0.0] * 3)
    assert value == pytest.approx((-2 * first + (1 - 3e-4)) * 3 / 8)
    assert clipped == [False] * 3 + [True] * 3
    _, within, _ = worked("gspo", clip=(0.2, 0.2))
    assert within == pytest.approx([-2 * first] * 3 + [(0.9 * 1.5 * 0.5) ** (1 / 3)] * 3)


def test_gspo_s_gradient_is_that_of_the_ratio_of_whole_replies():
    """GSPO as it is defined, with the gradient through the mean: dL/dl_t = -A s / |y| for each token of a mean."""
    logprobs = torch.tensor([-1.0, -2.0, -0.5, -3.0], dtype=torch.float64).requires_grad_()
    behaviour, advantages = torch.tensor([-1.1, -1.9, -0.7, -2.8]).double(), torch.tensor([1.0, 1.0, -2.0, -2.0])
    loss, band = of("gspo", clip=(0.5, 0.5))
    ratios = [(part - old).mean().exp() for part, old in zip(logprobs.split(2), behaviour.split(2), strict=True)]
    (wanted,) = torch.autograd.grad(-(ratios[0] * 1.0 + ratios[1] * -2.0) / 2, logprobs)
    tokens = Tokens(behaviour, advantages.double(), torch.full((4,), 1 / 4).double())
    tokens = with_reply_log_ratios(tokens, logprobs.detach(), (2, 2))
    (gradient,) = torch.autograd.grad(loss.value(logprobs, tokens, band), logprobs)
    assert gradient.tolist() == pytest.approx(wanted.tolist())


def test_rloo_has_no_importance_weight_and_rft_no_advantage():
    # RLOO: dL/dl = -A. RFT: dL/dl = -1, whatever stands in the advantage. The value is that times log(1/4).
    value, gradient, clipped = worked("rloo")
    assert gradient == pytest.approx([-2.0] * 3 + [1.0] * 3)
    assert (value, clipped) == (pytest.approx(-3.0 * math.log(0.25) / 8), None)
    value, gradient, clipped = worked("rft")
    assert gradient == pytest.approx([-1.0] * 6)
    assert (value, clipped) == (pytest.approx(-6.0 * math.log(0.25) / 8), None)


# ---- advantages and token weights ------------------------------------------------------------------


def rollout(reward: float, *lengths: int, problem: int = 0):
    return make_rollout(reward, *(make_call([7] * length, [problem, 1]) for length in lengths), problem=problem)


GROUPS = [
    Group(0, (rollout(1.0, 2, 4), rollout(0.0, 3), rollout(0.5, 1))),
    Group(1, (rollout(0.0, 5, problem=1), rollout(1.0, 5, problem=1))),
    Group(2, (rollout(1.0, 9, problem=2), rollout(1.0, 9, problem=2))),  # flat: absent from every mean
]
"""Ten tokens each of two live problems: 6 (two replies), 3 and 1 of the first, 5 and 5 of the second."""


def by_row(name: str, groups=GROUPS, **settings) -> tuple[list[float], list[float]]:
    loss = loss_of(TrainingSettings(loss=name), longest_reply=8)
    rows = credit(groups, loss=loss, **settings).rows
    return [row.advantage for row in rows], [1 / row.token_weight for row in rows]


STD = math.sqrt(1 / 6)
"""Of 1, 0 and 1/2."""


@pytest.mark.parametrize(
    ("name", "advantages", "divisors"),
    [
        # 2 problems, 10 tokens each
        ("cispo", [0.5 / STD, 0.5 / STD, -0.5 / STD, 0.0, -1.0, 1.0], [20] * 6),
        # 2 problems, 3 and 2 rollouts, tokens of the rollout
        ("grpo", [0.5 / STD, 0.5 / STD, -0.5 / STD, 0.0, -1.0, 1.0], [36, 36, 18, 6, 20, 20]),
        # 20 tokens in all
        ("dapo", [0.5 / STD, 0.5 / STD, -0.5 / STD, 0.0, -1.0, 1.0], [20] * 6),
        # 2 problems, 3 and 2 rollouts, 8 tokens at most
        ("dr_grpo", [0.5, 0.5, -0.5, 0.0, -0.5, 0.5], [48, 48, 48, 48, 32, 32]),
        # 2 problems, 3 and 2 rollouts, replies of the rollout, tokens of the reply
        ("gspo", [0.5 / STD, 0.5 / STD, -0.5 / STD, 0.0, -1.0, 1.0], [24, 48, 18, 6, 20, 20]),
        # 1 - .25, 0 - .75, .5 - .5; 2 problems, 3 and 2 rollouts
        ("rloo", [0.75, 0.75, -0.75, 0.0, -1.0, 1.0], [6, 6, 6, 6, 4, 4]),
        # the best of each problem, 11 tokens in all
        ("rft", [1.0, 1.0, 1.0], [11] * 3),
    ],
)
def test_scores_become_advantages_and_tokens_are_averaged_as_the_loss_says(name, advantages, divisors):
    found, weights = by_row(name)
    assert found == pytest.approx(advantages, abs=1e-5)
    assert weights == pytest.approx(divisors)


@pytest.mark.parametrize("name", NAMES)
def test_a_mini_batch_is_what_credit_makes_of_its_problems_alone(name):
    import random

    loss, groups = loss_of(TrainingSettings(loss=name), longest_reply=8), GROUPS[:2]
    parts = mini_batches(credit(groups, loss=loss), 2, random.Random(0), loss)
    assert len(parts) == 2
    for part in parts:
        assert part.rows == credit([groups[part.rows[0].problem]], loss=loss).rows


@pytest.mark.parametrize("name", NAMES)
def test_each_candidate_s_rollouts_are_averaged_by_themselves_where_they_are_compared_so(name):
    """One problem under two candidates weighs as two problems, each compared in itself."""
    apart = [Group(0, GROUPS[0].rollouts), Group(1, tuple(replace(r, problem=1) for r in GROUPS[0].rollouts))]
    other = replace(GROUPS[0].rollouts[0].candidate, texts={"answer": "Think."})
    mixed = [*GROUPS[0].rollouts, *(replace(r, candidate=other) for r in GROUPS[0].rollouts)]
    assert by_row(name, [Group(0, tuple(mixed))], baseline="candidate") == by_row(name, apart)


@pytest.mark.parametrize("name", NAMES)
def test_flat_groups_alone_make_a_batch_without_a_row(name):
    assert credit([make_group(1.0, 1.0)], loss=loss_of(TrainingSettings(loss=name), longest_reply=8)).rows == ()


def test_what_rejection_sampling_leaves_out_is_counted_and_equals_of_the_best_stay():
    loss = loss_of(TrainingSettings(loss="rft"))
    batch = credit([make_group(0.5, 1.0, 1.0, None, 0.0), make_group(0.0, 0.0, problem=1)], loss=loss)
    assert [row.advantage for row in batch.rows] == [1.0, 1.0]
    assert batch.counts["rejected_calls"] == 2  # neither the masked rollout nor the flat group
    assert "rejected_calls" not in credit([make_group(0.5, 1.0)]).counts


def test_predictors_with_scores_of_their_own_are_credited_by_the_loss_s_rule_too():
    calls = [make_call([7], predictor="plan"), make_call([8, 8], predictor="answer")]
    group = Group(0, tuple(replace(make_rollout(r, *calls), predictor_scores={"plan": s}) for r, s in ((0, 1), (1, 0))))
    rows = credit([group], loss=loss_of(TrainingSettings(loss="rft"))).rows
    assert Counter(row.predictor for row in rows) == {"plan": 1, "answer": 1}
    assert [(row.predictor, row.rollout) for row in rows] == [("plan", 0), ("answer", 1)]


# ---- settings --------------------------------------------------------------------------------------


def test_the_settings_know_which_losses_clip():
    assert [name for name in NAMES if of(name)[0].clip is not None] == list(CLIPPED)
    assert band_of(TrainingSettings()) == (0.0, 4.0)
    assert band_of(TrainingSettings(loss="gspo")) == (1 - 3e-4, 1 + 4e-4)
    assert band_of(TrainingSettings(loss="rloo")) == (0.0, math.inf)


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"loss": "ppo"}, "loss='ppo'"),
        ({"clip": (0.2, 0.2)}, "clip=(0.2, 0.2) does nothing under loss='cispo': importance_cap bounds"),
        ({"loss": "rloo", "clip": (0.2, 0.2)}, "does nothing under loss='rloo': it clips nothing"),
        ({"loss": "grpo", "clip": (1.5, 0.2)}, "clip"),
        ({"loss": "grpo", "clip": 0.2}, "clip=0.2"),
    ],
    ids=["unknown", "cispo", "rloo", "below zero", "one number"],
)
def test_a_loss_that_is_none_and_a_clip_that_does_nothing_are_refused(settings, fault):
    with pytest.raises(ConfigurationError) as error:
        TrainingSettings.checked(settings)
    assert fault in str(error.value)


# ---- KL and entropy --------------------------------------------------------------------------------


def test_kl_is_the_sum_over_the_vocabulary_from_theta_to_the_reference():
    theta, start = torch.tensor([[0.5, 0.5], [0.9, 0.1]]), torch.tensor([[0.5, 0.5], [0.5, 0.5]])
    kl = kl_divergence(theta.log(), start.log())
    assert kl.tolist() == pytest.approx([0.0, 0.9 * math.log(1.8) + 0.1 * math.log(0.2)])


def test_entropy_of_a_fair_coin_is_log_two():
    assert entropy(torch.tensor([[0.5, 0.5]]).log()).tolist() == pytest.approx([math.log(2)])
