"""What an update measures: KL, entropy, clipped tokens, effective sample share. One entry of a tensor is one token."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

import torch
from torch import Tensor

from dspy_fst.errors import MismatchError, NotFiniteError
from dspy_fst.slow.batching import MicroBatch
from dspy_fst.slow.head import Measured
from dspy_fst.slow.losses.loss import Tokens
from dspy_fst.slow.ranks.ranks import Ranks
from dspy_fst.types import AdapterReport, UpdateReport

CPU = torch.device("cpu")
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


class UpdateMetrics:
    """Sums over the tokens of a batch, measured before the weights move.

    They stay on the device, so that no micro-batch waits for them.
    """

    def __init__(self, device: torch.device):
        zero = torch.zeros((), device=device)
        self.loss = self._entropy = self._seed_entropy = self._ratio = self._largest = zero
        self._capped: Tensor | None = None
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

    def add(self, measured: Measured, tokens: Tokens, clipped: Tensor | None, micro: MicroBatch) -> None:
        """Add one micro-batch.

        Args:
            tokens: Values of its N tokens.
            clipped: Those whose importance weight the loss clipped, shape (N,); None: it has none.
        """
        if micro.adapter is not None:
            own = self._adapters.setdefault(micro.adapter, UpdateMetrics(self._device))
            own.add(measured, tokens, clipped, replace(micro, adapter=None))
        self.loss = self.loss + measured.loss
        if measured.kl is not None:
            kl = (tokens.weights * measured.kl).sum()
            self._kl = kl if self._kl is None else self._kl + kl
        log_ratios = measured.logprobs - tokens.behaviour
        self._entropy = self._entropy + measured.entropy.sum()
        if clipped is not None:
            self._capped = clipped.sum() if self._capped is None else self._capped + clipped.sum()
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

    def summed(self, ranks: Ranks) -> "UpdateMetrics":
        """The sums over all ranks' micro-batches, the same on each."""
        if ranks.world == 1:
            return self
        total = UpdateMetrics(CPU)
        for found in ranks.gathered(self._at(CPU)):
            total._take_in(found)
        return total._at(self._device)

    def _at(self, device: torch.device) -> "UpdateMetrics":
        moved = UpdateMetrics(device)
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(moved, name, value.detach().to(device))
            elif isinstance(value, int):
                setattr(moved, name, value)
        moved._adapters = {name: own._at(device) for name, own in self._adapters.items()}
        return moved

    def _take_in(self, other: "UpdateMetrics") -> None:
        for name, value in vars(other).items():
            own = getattr(self, name)
            if name == "_largest":
                self._largest = torch.maximum(own, value)
            elif isinstance(value, Tensor | int):
                setattr(self, name, value if own is None else own + value)
        for adapter, sums in other._adapters.items():
            self._adapters.setdefault(adapter, UpdateMetrics(self._device))._take_in(sums)

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
            kl_to_start=None if self._kl is None else float(self._kl / self._share),
            kl_under_seed=None if self._seed_kl is None else float(self._seed_kl),
            entropy=float(self._entropy) / self._tokens,
            capped_share=None if self._capped is None else float(self._capped) / self._tokens,
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
    effective sample share) are the first one's: the weights that sampled the batch had not moved yet. How far they
    moved is ``later_log_ratio``.
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
        capped_share=_mean([(report.capped_share, report.tokens) for report in reports]),
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
        later_log_ratio=max(report.max_log_ratio for report in reports[1:]),
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
