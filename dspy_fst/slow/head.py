"""From a model's last hidden states to its logits, in float32, and to what an update needs of each token.

The head is a linear LM head, with constant scales and a cap. Log-probability, KL and entropy of each token and the
gradient of their loss are computed without N x V logits at once: the logits of N tokens over a vocabulary of V would be
the largest tensors of an update. They are computed for a few tokens at a time, used for everything that is needed of
them, and dropped. What remains is one number a token, and the gradient at the hidden states.

For one token let z be its logits (see `Head`), T its temperature, y the token that was sampled, and

    l = log softmax(z / T)        p = exp(l)        m = the same of the start's logits.

Its log-probability is l_y, its KL to the start ``sum p (l - m)``, its entropy ``-sum p l``. The loss is a sum over
tokens of a function of l_y and KL, so a chunk's share is known as soon as its logits are. Let a and b be the
derivatives of the loss by l_y and by KL (CISPO's importance weight carries no gradient, so its a is ``-token weight *
importance weight * advantage``), and e_y the unit vector of y. Then

    dL/dz = [ a (e_y - p) + b p (l - m - KL) ] / T.

Autograd computes this for a chunk, through a head's scale and cap too: dL/do, where o = W h + c is the output of the
linear head. The rest is linear in it, and summed over chunks in float32:

    dL/dh = W' dL/do        dL/dW = sum dL/do h'        dL/dc = sum dL/do

Then dL/dh of all tokens goes back through the layers, once. Each operation is the one that autograd would apply to
all logits at once, so a micro-batch of a single chunk has the same gradient bit for bit.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from dspy_fst.errors import TrainingError
from dspy_fst.slow.batching import MicroBatch
from dspy_fst.slow.sizes import BLOCK_ROWS, CHUNK_LOGITS

FORM_TOLERANCE = 1e-4
"""Largest relative gap between the measured logits and those of the fitted form; float32 differs by ~1e-6."""
_TINY, _HUGE = 1e-3, 1e6
"""Probe values. Caps are 15 or more: a cap leaves the first value unchanged and clamps the second one."""
TokenLoss = Callable[[Tensor, Tensor | None, slice], Tensor]
"""Log-probabilities and KL of the tokens in a slice of a micro-batch, shapes (n,) -> their share of the loss, a scalar.

It must be a sum over tokens. The KL is None where there is no reference."""
_LOCK = threading.Lock()
_inside = 0
_before = "highest"


def decoder_of(model: PreTrainedModel) -> nn.Module:
    """The part that turns token ids into hidden states: no LM head, no vision or audio tower.

    Raises:
        TrainingError: the model has no such part of its own.
    """
    kind = model.config.model_type
    decoder: nn.Module = model.get_decoder()
    if decoder is model:  # transformers' own search does not find Llama 4's
        decoder = getattr(model, "model", model)
    if decoder is model:
        raise TrainingError(
            f"model type {kind!r} cannot be trained: its layers cannot be told from its LM head; "
            "choose a causal language model of another type"
        )
    return decoder


@dataclass(frozen=True)
class Head:
    """``logits = bounded(scale * head(before * hidden))``; ``bounded(x) = cap * tanh(x / cap)`` when there is a cap.

    Granite divides its logits by ``logits_scaling``, Cohere multiplies them by ``logit_scale``, Falcon-H1 by
    ``lm_head_multiplier``; Gemma 2, 3n and 4 cap them. The constants are measured rather than looked up: a hook
    replaces the output of the head by known numbers, and the model's own forward shows what it does to them.
    """

    before: float = 1.0
    """Factor on the hidden states, before the head."""
    scale: float = 1.0
    """Factor on the head's output."""
    cap: float | None = None
    """Bound of the logits, e.g. 30.0 in Gemma 2; None: no bound."""

    @classmethod
    @torch.no_grad()
    def of(cls, model: PreTrainedModel) -> "Head":
        """Measure the constants of a model's head.

        Raises:
            TrainingError: the model has no linear LM head, or its logits do not have this form.
        """
        kind = f"model type {model.config.model_type!r} cannot be trained"
        head = model.get_output_embeddings()
        if not isinstance(head, nn.Linear):
            raise TrainingError(f"{kind}: it has no linear LM head; choose a causal language model that has one")
        numbers = [_TINY, _HUGE, *(sign * 2.0**power for power in range(-8, 11) for sign in (-1, 1))]
        values = torch.tensor(numbers, dtype=torch.float32)
        values = values[torch.arange(head.out_features) % len(values)]
        seen: dict[str, Tensor] = {}

        def replace_output(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            seen["input"] = inputs[0]
            return values.to(output).expand_as(output)

        def record_hidden(_: nn.Module, __: object, output: Sequence[Tensor]) -> None:
            seen["hidden"] = output[0]

        hooks = [head.register_forward_hook(replace_output), decoder_of(model).register_forward_hook(record_hidden)]
        try:
            logits = model(torch.tensor([[1, 2, 3]], device=head.weight.device), use_cache=False).logits[0, -1].float()
        finally:
            for hook in hooks:
                hook.remove()
        if set(seen) != {"input", "hidden"} or logits.shape != values.shape:
            raise TrainingError(f"{kind}: its logits are not those of its LM head; choose a model with a plain LM head")
        measured = cls(_ratio(seen["input"][0, -1], seen["hidden"][0, -1]), *_scale_and_cap(logits))
        gap = (measured.bounded(values) - logits).abs() / logits.abs().clamp(min=_TINY)
        if not float(gap.max()) <= FORM_TOLERANCE:
            raise TrainingError(
                f"{kind}: it changes its logits after the head by more than a constant factor and a tanh cap; "
                "choose a model with a plain LM head"
            )
        return measured

    def __call__(self, head: nn.Linear, hidden: Tensor) -> Tensor:
        """Float32 logits, shape (N, V), from hidden states of shape (N, d)."""
        return self.bounded(linear(self.scaled(hidden), head))

    def scaled(self, hidden: Tensor) -> Tensor:
        """What the linear head is given, float32."""
        return hidden.float() if self.before == 1.0 else hidden.float() * self.before

    def bounded(self, logits: Tensor) -> Tensor:
        """The model's logits, from the output of its linear head."""
        scaled = logits if self.scale == 1.0 else logits * self.scale
        return scaled if self.cap is None else torch.tanh(scaled / self.cap) * self.cap


def linear(hidden: Tensor, head: nn.Linear) -> Tensor:
    """The head's output in float32. A weight in another type is converted a block at a time, never whole."""
    bias = None if head.bias is None else head.bias.float()
    if head.weight.dtype == torch.float32:
        return F.linear(hidden, head.weight, bias)
    blocks = [F.linear(hidden, block.float()) for block in head.weight.split(BLOCK_ROWS)]
    output = torch.cat(blocks, dim=-1)
    return output if bias is None else output.add_(bias)


def times_weight(gradient: Tensor, weight: Tensor) -> Tensor:
    """``gradient @ weight`` in float32, shapes (N, V) and (V, d) -> (N, d), with the same care."""
    if weight.dtype == torch.float32:
        return gradient @ weight
    total = gradient.new_zeros(len(gradient), weight.shape[1])
    for columns, block in zip(gradient.split(BLOCK_ROWS, dim=-1), weight.split(BLOCK_ROWS), strict=True):
        total.addmm_(columns, block.float())
    return total


def add_outer(weight: Tensor, gradient: Tensor, inputs: Tensor) -> None:
    """Add ``gradient.T @ inputs`` to the weight's gradient, shapes (N, V) and (N, d).

    The sum is rounded as autograd rounds it, product first. Only a block of the product exists at a time.
    """
    if weight.grad is None:
        weight.grad = gradient.T @ inputs
        return
    for into, columns in zip(weight.grad.split(BLOCK_ROWS), gradient.split(BLOCK_ROWS, dim=-1), strict=True):
        into.add_(columns.T @ inputs)


def add_gradient(parameter: Tensor, gradient: Tensor) -> None:
    """Add to the parameter's gradient, which may be None."""
    parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)


def _scale_and_cap(logits: Tensor) -> tuple[float, float | None]:
    """Scale and cap, from the logits of the first two probe values, `_TINY` and `_HUGE`."""
    tiny, huge = logits[:2].tolist()
    scale = _exact(tiny / _TINY)
    return scale, None if abs(huge) > abs(scale) * _HUGE / 2 else huge


def _ratio(head_input: Tensor, hidden: Tensor) -> float:
    """The factor between the hidden states and what the head is given."""
    head_input, hidden = head_input.flatten().double(), hidden.flatten().double()
    return _exact(float(head_input @ hidden / (hidden @ hidden)))


def _exact(value: float) -> float:
    """Exactly 1.0 for a value near 1, so that a head without a factor is not rounded by one."""
    return 1.0 if abs(value - 1.0) < 1e-5 else value


@contextmanager
def exact_matmuls() -> Iterator[None]:
    """A block in which float32 products keep all 24 bits. The process's own setting is restored at its end.

    A caller's autocast is off inside.

    ``TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1`` (set in NVIDIA's containers) and `torch.set_float32_matmul_precision` allow
    rounding to TF32 or bfloat16. The float32 LM head would then be float32 in name only. The setting belongs to the
    whole process, so it is restored when the last of several concurrent blocks ends.
    """
    global _inside, _before
    with _LOCK:
        if not _inside:
            _before = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision("highest")
        _inside += 1
    try:
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            yield
    finally:
        with _LOCK:
            _inside -= 1
            if not _inside:
                torch.set_float32_matmul_precision(_before)


# ---- a chunk of tokens at a time -----------------------------------------------------------------


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


@dataclass(frozen=True)
class Measured:
    """What was measured of a micro-batch while its gradient was computed. No tensor carries a gradient."""

    loss: Tensor
    """A scalar."""
    logprobs: Tensor
    """Of the sampled tokens, shape (N,)."""
    entropy: Tensor
    """In nats, shape (N,)."""
    kl: Tensor | None
    """To the start in nats, shape (N,); None without a reference."""


@torch.no_grad()
def logprobs(policy: Readout, micro: MicroBatch) -> Tensor:
    """Log-probability of every scored token, shape (N,)."""
    return torch.cat([_chosen(policy.log_probs(micro, part), micro, part) for part in _parts(policy)])


@torch.no_grad()
def kl_to(reference: Readout, policy: Readout, micro: MicroBatch) -> Tensor:
    """Exact KL(policy || reference) in nats at every scored token, shape (N,)."""
    return torch.cat(
        [kl_divergence(policy.log_probs(micro, part), reference.log_probs(micro, part)) for part in _parts(policy)]
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
    value, chosen, spread, kl = zip(*chunks, strict=True)
    return Measured(
        torch.stack(value).sum(), torch.cat(chosen), torch.cat(spread), None if reference is None else torch.cat(kl)
    )


@torch.no_grad()
def learn_nothing(policy: Readout) -> None:
    """Go through the backward pass with a gradient of zero, beside other ranks that learn."""
    policy.hidden.backward(torch.zeros_like(policy.hidden))


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
        kl = None if other is None else kl_divergence(own, other)
        value = loss(chosen, kl, part)
    spread = entropy(own)
    (gradient,) = torch.autograd.grad(value, output)
    at_hidden[part] = policy.backward(gradient, part)
    return value.detach(), chosen.detach(), spread, spread if kl is None else kl.detach()


def _chosen(log_probs: Tensor, micro: MicroBatch, part: slice) -> Tensor:
    """Those of the sampled tokens, shape (n,)."""
    return log_probs.gather(-1, micro.targets[part, None])[:, 0]


def _parts(policy: Readout) -> Iterator[slice]:
    """The scored tokens, a chunk at a time."""
    size = max(1, CHUNK_LOGITS[policy.hidden.device.type] // policy.linear.out_features)
    return (slice(start, start + size) for start in range(0, len(policy.hidden), size))
