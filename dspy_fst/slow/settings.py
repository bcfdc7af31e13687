"""How weights are trained. Every number cites the paper or says that it is not in it."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from dspy_fst.errors import ConfigurationError
from dspy_fst.lora import LoRA


@dataclass(frozen=True)
class TrainerSettings:
    """How weights are trained. FST is arXiv 2605.12484."""

    learning_rate: float
    """Peak rate. The paper publishes none; about 1e-6 for billions of parameters, 5e-4 for a million."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's decay rates (FST, App. D)."""
    eps: float = 1e-8
    """AdamW's epsilon; unstated in the paper."""
    weight_decay: float = 0.0
    """FST, App. D."""
    warmup_steps: int = 10
    """Linear warm-up (FST, App. D): update n of the first ten runs at n/10 of the rate, so none runs at zero."""
    max_grad_norm: float | None = None
    """Clip the gradient to this norm; None, as the paper states no clipping."""
    importance_cap: float = 4.0
    """Largest CISPO importance weight (FST, App. D; ScaleRL finds 4, 5 and 8 alike)."""
    kl_coefficient: float = 0.001
    """Weight of KL(theta || start) in the loss (FST, App. D); 0 leaves the term, and the reference model, out."""
    seed_kl_coefficient: float = 0.0
    """Weight of KL(theta || start) on the batch's held calls (ours)."""
    min_effective_share: float = 0.0
    """An update whose effective sample share (see UpdateReport) is lower is refused; 0 refuses none."""
    micro_batch_tokens: int = 4096
    """Tokens in one forward, padding included. Memory and speed only; a CPU is fastest about here."""
    share_prompts: bool = True
    """Read a prompt that several calls begin with once, where the model allows it. Speed only, like the budget."""
    gradient_checkpointing: bool = False
    """Keep the inputs of each layer alone for the backward pass and compute the rest again. Memory and speed only."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic of the model's body and type of published weights; ``"auto"`` is bfloat16 on CUDA, else float32."""
    adapter: LoRA | None = None
    """A LoRA adapter that is trained in place of the whole weights."""
    seed: int = 0
    """Seeds torch before the model is built, and a new adapter's numbers; the update itself draws nothing."""

    def __post_init__(self) -> None:
        faults = [f"{name}={getattr(self, name)!r} must be {wanted}" for name, wanted, ok in self._rules() if not ok]
        if faults:
            raise ConfigurationError(faults)

    def _rules(self) -> Iterator[tuple[str, str, bool]]:
        for name in ("learning_rate", "eps", "importance_cap"):
            yield name, "a finite number above 0", 0 < getattr(self, name) < math.inf
        for name in ("weight_decay", "kl_coefficient", "seed_kl_coefficient", "warmup_steps"):
            yield name, "a finite number, at least 0", 0 <= getattr(self, name) < math.inf
        yield "betas", "two numbers in [0, 1)", len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas)
        yield "max_grad_norm", "above 0, or None", self.max_grad_norm is None or self.max_grad_norm > 0
        yield "min_effective_share", "in [0, 1]", 0 <= self.min_effective_share <= 1
        yield "micro_batch_tokens", "at least 1", self.micro_batch_tokens >= 1
        yield "precision", "auto, float32 or bfloat16", self.precision in ("auto", "float32", "bfloat16")
