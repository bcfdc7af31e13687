"""The losses of a weight update (``loss``): one file each, with its paper's equation and constants.

In: log-probabilities of sampled tokens under the policy, and when they were sampled; advantages and weights of their
rows. Out: a scalar, the sum over those tokens. A file says three things that the loss's name decides:

- how a token's log-probabilities and advantage become its loss, and which tokens are clipped,
- how a score becomes an advantage (`Advantage`),
- how tokens are averaged: the weight of each row's tokens, which is known before any forward pass. The losses of
  micro-batches therefore add up to that of the batch, however it is cut.

The same for all: who is compared with whom (``baseline``), which groups and calls are left out, the exact KL to the
start with the same token weights (``kl_coefficient``), and the guard against a foreign sampler
(``min_effective_share``).
"""
