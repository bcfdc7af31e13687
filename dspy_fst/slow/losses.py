"""The loss of the slow step, and what an update measures of it. One entry of a tensor is one completion token.

Shapes: N is the number of completion tokens of all rows, in one flat axis; V is the size of the vocabulary.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
from torch import Tensor

from dspy_fst.errors import MismatchError, NotFiniteError
from dspy_fst.slow.batching import MicroBatch
from dspy_fst.types import AdapterReport, Row, UpdateReport

NO_UPDATE = UpdateReport(
    loss=0.0,
    grad_norm=0.0,
    kl_to_start=0.0,
    entropy=0.0,
    capped_share=0.0,
    mean_log_ratio=0.0,
    max_log_ratio=0.0,
    effective_sample_share=None,
    learning_rate=0.0,
    tokens=0,
    rows=0,
    optimizer_steps=0,
)
"""The report of an empty batch: nothing was measured, and the weights did not move."""
TokenLoss = Callable[[Tensor, Tensor | None, slice], Tensor]
"""Log-probabilities and KL of the tokens in a slice of a micro-batch, shapes (n,) -> their share of the loss, a scalar.

It must be a sum over tokens. The KL is None where there is no reference."""


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


@dataclass(frozen=True)
class Tokens:
    """The values of a micro-batch's rows, repeated for their N completion tokens; every tensor has shape (N,)."""

    behaviour: Tensor
    """Log-probabilities with which the tokens were sampled."""
    advantages: Tensor
    weights: Tensor
    """Shares in the loss; they sum to 1 over the batch."""

    @classmethod
    def of(cls, rows: Sequence[Row], device: torch.device) -> "Tokens":
        lengths = torch.tensor([len(row.completion_ids) for row in rows])
        advantages = torch.tensor([row.advantage for row in rows], dtype=torch.float32).repeat_interleave(lengths)
        weights = torch.tensor([row.token_weight for row in rows], dtype=torch.float32).repeat_interleave(lengths)
        behaviour = torch.tensor([logprob for row in rows for logprob in row.logprobs], dtype=torch.float32)
        return cls(behaviour.to(device), advantages.to(device), weights.to(device))

    def __getitem__(self, part: slice) -> "Tokens":
        return Tokens(self.behaviour[part], self.advantages[part], self.weights[part])


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


class UpdateMetrics:
    """Sums over the tokens of a batch, measured before the weights move.

    They stay on the device, so that no micro-batch waits for them.
    """

    def __init__(self, device: torch.device):
        zero = torch.zeros((), device=device)
        self.loss = self._entropy = self._seed_entropy = self._capped = self._ratio = self._largest = zero
        self._weight = self._weight_squared = zero.double()
        self._share = zero
        self._kl: Tensor | None = None
        self._seed_kl: Tensor | None = None
        self._tokens = self._seed_tokens = self._seed_calls = self._sequences = self._rows = 0
        self._row_tokens = self._tokens_read = 0
        self._device = device
        self._adapters: dict[str, UpdateMetrics] = {}

    def check_finite(self, norm: Tensor, update: int) -> None:
        """
        Raises:
            NotFiniteError: the loss or the gradient's norm is not finite.
        """
        if not torch.isfinite(norm) or not torch.isfinite(self.loss):
            raise NotFiniteError(
                f"update {update}: loss {float(self.loss)}, gradient norm {float(norm)}; the weights were left as they "
                "are. Lower learning_rate or set max_grad_norm (in a new run_dir), or look for log-probabilities in "
                "the batch that are not finite"
            )

    def check_on_policy(self, least: float, update: int) -> None:
        """
        Raises:
            MismatchError: the effective sample share is below ``least``.
        """
        share = self.effective_sample_share
        if not share >= least:
            raise MismatchError(
                f"update {update}: the batch's effective sample share is {share:.3g}, below "
                f"min_effective_share={least:g}: the engine samples from another distribution than the trainer scores. "
                "Look for stale weights, another precision, or sampling settings of the server; nothing was learnt "
                "from this batch"
            )

    def add(self, measured: Measured, tokens: Tokens, cap: float, micro: MicroBatch) -> None:
        """Add one micro-batch.

        Args:
            tokens: Values of its N tokens.
            cap: Largest importance weight.
        """
        if micro.adapter is not None:
            own = self._adapters.setdefault(micro.adapter, UpdateMetrics(self._device))
            own.add(measured, tokens, cap, replace(micro, adapter=None))
        self.loss = self.loss + measured.loss
        if measured.kl is not None:
            kl = (tokens.weights * measured.kl).sum()
            self._kl = kl if self._kl is None else self._kl + kl
        log_ratios = measured.logprobs - tokens.behaviour
        self._entropy = self._entropy + measured.entropy.sum()
        self._capped = self._capped + (log_ratios.exp() >= cap).sum()
        self._ratio = self._ratio + log_ratios.sum()
        self._largest = torch.maximum(self._largest, log_ratios.abs().max())
        weights = log_ratios.double().exp()
        self._weight = self._weight + weights.sum()
        self._weight_squared = self._weight_squared + weights.square().sum()
        self._tokens += len(log_ratios)
        self._sequences += micro.chains
        self._rows += len(micro.members)
        self._row_tokens += micro.row_tokens
        self._tokens_read += micro.tokens_read
        self._share = self._share + tokens.weights.sum()

    def add_seed_kl(self, measured: Measured, kl: Tensor, micro: MicroBatch) -> None:
        """Add one micro-batch of seed-KL calls.

        Args:
            kl: Its share of their mean KL to the starting weights.
        """
        if micro.adapter is not None:
            own = self._adapters.setdefault(micro.adapter, UpdateMetrics(self._device))
            own.add_seed_kl(measured, kl, replace(micro, adapter=None))
        self.loss = self.loss + measured.loss
        self._seed_entropy = self._seed_entropy + measured.entropy.sum()
        self._seed_tokens += len(measured.entropy)
        self._seed_calls += len(micro.members)
        self._seed_kl = kl if self._seed_kl is None else self._seed_kl + kl

    @property
    def effective_sample_share(self) -> float:
        """See `types.UpdateReport`."""
        return float(self._weight**2 / (self._tokens * self._weight_squared))

    def report(
        self, grad_norm: Tensor, learning_rate: float, adapter_norms: Mapping[str, float] = MappingProxyType({})
    ) -> UpdateReport:
        """The measurements of the whole batch.

        Args:
            adapter_norms: Gradient norm of each LoRA adapter, where the policy has several.
        """
        adapters = {name: own._of_adapter(adapter_norms[name], self) for name, own in sorted(self._adapters.items())}
        if not self._tokens:  # the batch held seed-KL calls only
            return replace(
                NO_UPDATE,
                loss=float(self.loss),
                grad_norm=float(grad_norm),
                entropy=float(self._seed_entropy) / self._seed_tokens,
                kl_to_start=None,
                kl_under_seed=None if self._seed_kl is None else float(self._seed_kl),
                learning_rate=learning_rate,
                tokens=self._seed_tokens,
                rows=self._seed_calls,
                seed_tokens=self._seed_tokens,
                adapters=adapters,
                optimizer_steps=1,
            )
        return UpdateReport(
            loss=float(self.loss),
            grad_norm=float(grad_norm),
            kl_to_start=None if self._kl is None else float(self._kl),
            kl_under_seed=None if self._seed_kl is None else float(self._seed_kl),
            entropy=float(self._entropy) / self._tokens,
            capped_share=float(self._capped) / self._tokens,
            mean_log_ratio=float(self._ratio) / self._tokens,
            max_log_ratio=float(self._largest),
            effective_sample_share=self.effective_sample_share,
            learning_rate=learning_rate,
            tokens=self._tokens,
            rows=self._rows,
            sequences=self._sequences,
            row_tokens=self._row_tokens,
            tokens_read=self._tokens_read,
            seed_tokens=self._seed_tokens,
            adapters=adapters,
        )

    def _of_adapter(self, grad_norm: float, whole: "UpdateMetrics") -> AdapterReport:
        """What these sums, of one adapter's calls, say of it.

        Args:
            whole: The sums of all adapters. Their mean KL is taken over all seed-KL calls, and where the batch held
                learnt calls, its rows and tokens count those alone: the adapters' sum to them.
        """
        seed_only = not whole._tokens
        learnt = self._tokens > 0
        entropy = self._entropy / self._tokens if learnt else self._seed_entropy / self._seed_tokens
        under_seed = self._seed_kl
        return AdapterReport(
            rows=self._seed_calls if seed_only else self._rows,
            tokens=self._seed_tokens if seed_only else self._tokens,
            grad_norm=grad_norm,
            kl_to_start=None if self._kl is None else float(self._kl / self._share),
            entropy=float(entropy),
            kl_under_seed=None if under_seed is None else float(under_seed) * whole._seed_tokens / self._seed_tokens,
            seed_tokens=self._seed_tokens,
        )


def in_one_report(reports: Sequence[UpdateReport]) -> UpdateReport:
    """What the optimizer steps of one batch measured, as one report.

    Means are over the tokens of all mini-batches. The measures of the sampler against the trainer (log-ratios and
    effective sample share) are the first one's: the weights that sampled the batch had not moved yet.
    """
    if len(reports) == 1:
        return reports[0]
    tokens = sum(report.tokens for report in reports)

    def mean(name: str) -> float:
        return sum(report.tokens * getattr(report, name) for report in reports) / tokens

    names = {name: None for report in reports for name in report.adapters}
    return replace(
        reports[0],
        loss=mean("loss"),
        grad_norm=mean("grad_norm"),
        kl_to_start=_mean([(report.kl_to_start, report.tokens) for report in reports]),
        entropy=mean("entropy"),
        capped_share=mean("capped_share"),
        learning_rate=reports[-1].learning_rate,
        tokens=tokens,
        rows=sum(report.rows for report in reports),
        kl_under_seed=_mean([(report.kl_under_seed, report.seed_tokens) for report in reports]),
        sequences=sum(report.sequences or 0 for report in reports),
        row_tokens=sum(report.row_tokens or 0 for report in reports),
        tokens_read=sum(report.tokens_read or 0 for report in reports),
        seed_tokens=sum(report.seed_tokens for report in reports),
        halved_to=next((report.halved_to for report in reversed(reports) if report.halved_to), None),
        adapters={
            name: _of_all([report.adapters[name] for report in reports if name in report.adapters])
            for name in sorted(names)
        },
        optimizer_steps=sum(report.optimizer_steps for report in reports),
    )


def _of_all(reports: Sequence[AdapterReport]) -> AdapterReport:
    """The steps of one adapter. A step may have read it with seed-KL calls alone: that has no learnt tokens."""

    def mean(name: str, of: Sequence[AdapterReport]) -> float:
        read = [report.tokens or report.seed_tokens for report in of]
        return sum(n * getattr(report, name) for n, report in zip(read, of, strict=True)) / sum(read)

    return AdapterReport(
        rows=sum(report.rows for report in reports),
        tokens=sum(report.tokens for report in reports),
        grad_norm=mean("grad_norm", reports),
        kl_to_start=_mean([(report.kl_to_start, report.tokens) for report in reports]),
        entropy=mean("entropy", [report for report in reports if report.tokens] or reports),
        kl_under_seed=_mean([(report.kl_under_seed, report.seed_tokens) for report in reports]),
        seed_tokens=sum(report.seed_tokens for report in reports),
    )


def _mean(measured: Sequence[tuple[float | None, int]]) -> float | None:
    """The mean of what was measured, by tokens; None where nothing was."""
    known = [(value, tokens) for value, tokens in measured if value is not None]
    return sum(value * tokens for value, tokens in known) / sum(tokens for _, tokens in known) if known else None
