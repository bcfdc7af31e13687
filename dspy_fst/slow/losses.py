"""The loss of the slow step. Pure functions of tensors with one entry per completion token.

Shapes: N is the number of completion tokens of all rows, in one flat axis; V is the size of the vocabulary.
"""

import torch
from torch import Tensor


def importance_weights(logprobs: Tensor, behaviour_logprobs: Tensor, cap: float) -> Tensor:
    """``min(pi_theta / pi_behaviour, cap)`` per token, shape (N,), without a gradient.

    ``cap`` bounds the weight itself, and there is no lower bound. (Other libraries write the same number as
    ``epsilon_high``, ``1 + clip`` or a pair of bounds.)
    """
    return torch.exp(logprobs.detach() - behaviour_logprobs).clamp(max=cap)


def cispo(
    logprobs: Tensor, behaviour_logprobs: Tensor, advantages: Tensor, token_weights: Tensor, cap: float
) -> Tensor:
    """CISPO (MiniMax-M1, 2506.13585): ``-sum(token_weight * sg(min(rho, cap)) * A * log pi_theta)``.

    The importance weight is truncated, not the update: unlike PPO's clip, every token keeps its gradient.

    Args:
        logprobs: log pi_theta of the sampled tokens, shape (N,); carries the gradient.
        behaviour_logprobs: Log-probabilities of these tokens when they were sampled, shape (N,).
        advantages: Advantage of the rollout that each token belongs to, shape (N,).
        token_weights: Shape (N,); they sum to 1 over a batch, so the losses of its micro-batches add up.
        cap: Upper bound of the importance weight.

    Returns:
        The summed loss, a scalar.
    """
    weights = importance_weights(logprobs, behaviour_logprobs, cap)
    return -(token_weights * weights * advantages * logprobs).sum()


def kl_divergence(log_probs: Tensor, reference_log_probs: Tensor) -> Tensor:
    """Exact KL(theta || reference) at every position, in nats.

    The paper gives the coefficient of its KL term (App. D) but not its form. The sum over the whole vocabulary has no
    sampling noise, cannot be negative, and has the gradient of the KL itself. Of the one-sample estimators, k1 has an
    expected gradient of zero, and k3 has the gradient of the reverse KL.

    Args:
        log_probs: log pi_theta over the vocabulary, shape (N, V), normalised.
        reference_log_probs: Those of the starting weights, same shape.

    Returns:
        Shape (N,).
    """
    return (log_probs.exp() * (log_probs - reference_log_probs)).sum(-1)


def entropy(log_probs: Tensor) -> Tensor:
    """Shannon entropy in nats of normalised log-probabilities, shape (N, V) -> (N,)."""
    return -(log_probs.exp() * log_probs).sum(-1)
