"""Log-probability, KL and entropy of each scored token, and the gradient of their loss, without N x V logits at once.

The logits of N tokens over a vocabulary of V would be the largest tensors of an update. They are computed for a few
tokens at a time, used for everything that is needed of them, and dropped. What remains is one number a token, and the
gradient at the hidden states.

For one token let z be its logits (see `Head`), T its temperature, y the token that was sampled, and

    l = log softmax(z / T)        p = exp(l)        m = the same of the start's logits.

Its log-probability is l_y, its KL to the start ``sum p (l - m)``, its entropy ``-sum p l``. The loss is a sum over
tokens of a function of l_y and KL, so a chunk's share is known as soon as its logits are. Let a and b be the
derivatives of the loss by l_y and by KL (CISPO's importance weight carries no gradient, so a is ``-token weight *
importance weight * advantage``), and e_y the unit vector of y. Then

    dL/dz = [ a (e_y - p) + b p (l - m - KL) ] / T.

Autograd computes this for a chunk, through a head's scale and cap too: dL/do, where o = W h + c is the output of the
linear head. The rest is linear in it, and summed over chunks in float32:

    dL/dh = W' dL/do        dL/dW = sum dL/do h'        dL/dc = sum dL/do

Then dL/dh of all tokens goes back through the layers, once. Each operation is the one that autograd would apply to
all logits at once, so a micro-batch of a single chunk has the same gradient bit for bit.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dspy_fst.slow import losses
from dspy_fst.slow.batching import MicroBatch
from dspy_fst.slow.head import Head, add_gradient, add_outer, linear, times_weight
from dspy_fst.slow.losses import Measured, TokenLoss
from dspy_fst.slow.sizes import CHUNK_LOGITS


@dataclass(frozen=True)
class Readout:
    """A model's head, and the last hidden states that predict the N scored tokens of a micro-batch."""

    head: Head
    linear: nn.Linear
    hidden: Tensor
    """Shape (N, d)."""

    def log_probs(self, micro: MicroBatch, part: slice) -> Tensor:
        """Log-probabilities over the vocabulary of some tokens at their temperatures, shape (n, V), float32."""
        return self.normalised(self.output(part), micro, part)

    def output(self, part: slice) -> Tensor:
        """Output of the linear head for some tokens, shape (n, V)."""
        return linear(self.head.scaled(self.hidden[part]), self.linear)

    def normalised(self, output: Tensor, micro: MicroBatch, part: slice) -> Tensor:
        """Log-probabilities, from the output of the linear head."""
        return torch.log_softmax(self.head.bounded(output) / micro.temperatures[part, None], dim=-1)

    def backward(self, gradient: Tensor, part: slice) -> Tensor:
        """Add the gradients of weight and bias to theirs.

        Args:
            gradient: dL/do of some tokens, shape (n, V).

        Returns:
            dL/dh, shape (n, d), float32.
        """
        weight, bias = self.linear.weight, self.linear.bias
        if weight.requires_grad:
            add_outer(weight, gradient, self.head.scaled(self.hidden[part]))
        if bias is not None and bias.requires_grad:
            add_gradient(bias, gradient.sum(0))
        return times_weight(gradient, weight).mul_(self.head.before)


@torch.no_grad()
def logprobs(policy: Readout, micro: MicroBatch) -> Tensor:
    """Log-probability of every scored token, shape (N,)."""
    return torch.cat([_chosen(policy.log_probs(micro, part), micro, part) for part in _parts(policy)])


@torch.no_grad()
def kl_to(reference: Readout, policy: Readout, micro: MicroBatch) -> Tensor:
    """Exact KL(policy || reference) in nats at every scored token, shape (N,)."""
    return torch.cat(
        [
            losses.kl_divergence(policy.log_probs(micro, part), reference.log_probs(micro, part))
            for part in _parts(policy)
        ]
    )


@torch.no_grad()
def learn(policy: Readout, micro: MicroBatch, loss: TokenLoss, reference: Readout | None = None) -> Measured:
    """Add the gradient of the loss to every parameter that was used to compute the hidden states, and to the head's.

    Args:
        policy: Its hidden states carry the graph that the gradient goes back through.
        reference: Of the start, whose KL the loss may use. Nothing of it gets a gradient.
    """
    at_hidden = torch.empty_like(policy.hidden)
    chunks = [_learn_chunk(policy, micro, part, loss, reference, at_hidden) for part in _parts(policy)]
    if policy.hidden.requires_grad:
        policy.hidden.backward(at_hidden)
    value, chosen, entropy, kl = zip(*chunks, strict=True)
    return Measured(
        torch.stack(value).sum(), torch.cat(chosen), torch.cat(entropy), None if reference is None else torch.cat(kl)
    )


def _learn_chunk(
    policy: Readout,
    micro: MicroBatch,
    part: slice,
    loss: TokenLoss,
    reference: Readout | None,
    at_hidden: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, log-probabilities, entropies and KL of some tokens; their gradient at the hidden states is written."""
    other = None if reference is None else reference.log_probs(micro, part)
    output = policy.output(part).requires_grad_()
    with torch.enable_grad():
        own = policy.normalised(output, micro, part)
        chosen = _chosen(own, micro, part)
        kl = None if other is None else losses.kl_divergence(own, other)
        value = loss(chosen, kl, part)
    entropy = losses.entropy(own)
    (gradient,) = torch.autograd.grad(value, output)
    at_hidden[part] = policy.backward(gradient, part)
    return value.detach(), chosen.detach(), entropy, entropy if kl is None else kl.detach()


def _chosen(log_probs: Tensor, micro: MicroBatch, part: slice) -> Tensor:
    """Those of the sampled tokens, shape (n,)."""
    return log_probs.gather(-1, micro.targets[part, None])[:, 0]


def _parts(policy: Readout) -> Iterator[slice]:
    """The scored tokens, a chunk at a time."""
    size = max(1, CHUNK_LOGITS[policy.hidden.device.type] // policy.linear.out_features)
    return (slice(start, start + size) for start in range(0, len(policy.hidden), size))
