"""The loss on numbers that can be checked by hand."""

import math

import pytest
import torch

from dspy_fst.slow import losses


def test_the_importance_weight_is_capped_from_above_only():
    logprobs = torch.log(torch.tensor([0.8, 0.5, 0.01]))
    behaviour = torch.log(torch.tensor([0.1, 0.25, 0.5]))
    weights = losses.importance_weights(logprobs, behaviour, cap=4.0)
    assert weights.tolist() == pytest.approx([4.0, 2.0, 0.02])


def test_the_loss_weighs_each_token_by_share_ratio_and_advantage():
    logprobs = torch.log(torch.tensor([0.8, 0.5]))
    behaviour = torch.log(torch.tensor([0.1, 0.25]))
    loss = losses.cispo(logprobs, behaviour, torch.tensor([1.0, -1.0]), torch.tensor([0.25, 0.75]), cap=4.0)
    assert float(loss) == pytest.approx(-(0.25 * 4 * math.log(0.8) - 0.75 * 2 * math.log(0.5)))


def test_a_capped_token_keeps_its_gradient_and_the_weight_carries_none():
    logprobs = torch.log(torch.tensor([0.8, 0.5])).requires_grad_()
    behaviour = torch.log(torch.tensor([0.1, 0.25]))
    losses.cispo(logprobs, behaviour, torch.tensor([1.0, -1.0]), torch.tensor([0.5, 0.5]), cap=4.0).backward()
    assert logprobs.grad.tolist() == pytest.approx([-0.5 * 4, 0.5 * 2])


def test_kl_is_the_sum_over_the_vocabulary_from_theta_to_the_reference():
    theta, start = torch.tensor([[0.5, 0.5], [0.9, 0.1]]), torch.tensor([[0.5, 0.5], [0.5, 0.5]])
    kl = losses.kl_divergence(theta.log(), start.log())
    assert kl.tolist() == pytest.approx([0.0, 0.9 * math.log(1.8) + 0.1 * math.log(0.2)])


def test_entropy_of_a_fair_coin_is_log_two():
    assert losses.entropy(torch.tensor([[0.5, 0.5]]).log()).tolist() == pytest.approx([math.log(2)])
