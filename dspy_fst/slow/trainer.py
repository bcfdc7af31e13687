"""The trainer: one weight update per call of `Trainer.step`, on exactly the tokens that were sampled.

The caller owns the loop and may do anything between two steps. Texts never change here.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from dspy_fst.engine.base import Checkpoint
from dspy_fst.engine.machine import several_fault
from dspy_fst.errors import TrainingError
from dspy_fst.recipe.lora_settings import SHARED
from dspy_fst.slow import head
from dspy_fst.slow.adamw import make_adamw, restore_moments
from dspy_fst.slow.batching import (
    NONE,
    MicroBatch,
    Scored,
    check_recorded,
    check_scorable,
    completions,
    micro_batches,
    part_of,
    read_by_start,
    tokens_of,
    with_reply_log_ratios,
)
from dspy_fst.slow.checkpoint import (
    CheckpointWriter,
    read_state,
    restore_generators,
    restore_weights,
    state_tensors,
    stored_shapes,
    write_state,
)
from dspy_fst.slow.head import exact_matmuls, learn
from dspy_fst.slow.heap import map_large_tensors
from dspy_fst.slow.losses.by_name import band_of, loss_of
from dspy_fst.slow.micro_batch_budget import MicroBatchBudget
from dspy_fst.slow.model import Policy
from dspy_fst.slow.ranks.ranks import ALONE, Ranks, on_all_ranks
from dspy_fst.slow.start import Start
from dspy_fst.slow.training_settings import TrainingSettings
from dspy_fst.slow.update_metrics import NO_UPDATE, UpdateMetrics
from dspy_fst.types import Batch, Call, Row, SeedKLCall, UpdateReport, WeightsVersion


class Trainer:
    """Owns the policy's weights, their optimizer, and the frozen reference of the KL term.

    Args:
        model: Weights to start from: a folder as `Checkpoint.at` reads it, or a hub name.
        settings: How the weights are trained; a run hands in its FSTConfig.
        device: ``"cpu"``, or ``"auto"`` for CUDA if available.
        reference: Weights of the KL term. None takes ``model``; with a LoRA adapter that needs no second model.
            Another folder is given when a run continues from trained weights and keeps the KL to older ones.
        adapters: Predictor -> the LoRA adapter of its calls, where ``settings.adapter`` is set and not all share one.
        share_prompts: Whether a prompt that several calls begin with is read once, where the model allows it. Speed
            only.
        seed: Seeds torch before the model is built, and a new adapter's numbers; the update itself draws nothing.
        ranks: The processes that train together. Each takes a share of the micro-batches of an update; see
            `slow.ranks.roles.make_trainer`.

    Raises:
        TrainingError: the model's logits are not those of a plain LM head, or the process was launched as one of
            several and ``ranks`` are not those.
    """

    @torch.inference_mode(False)
    def __init__(
        self,
        model: str | Path,
        settings: TrainingSettings,
        *,
        device: Literal["auto", "cpu"] = "auto",
        reference: str | Path | None = None,
        adapters: Mapping[str, str] = NONE,
        share_prompts: bool = True,
        seed: int = 0,
        ranks: Ranks = ALONE,
    ):
        self.settings, self._share_prompts = settings, share_prompts
        self._loss, self._band = loss_of(settings), band_of(settings)
        self.ranks = ranks
        if ranks.world == 1 and (fault := several_fault()):
            raise TrainingError(fault)
        self._device = torch.device("cpu") if device == "cpu" else ranks.device
        on_cuda = self._device.type == "cuda"
        low = settings.precision == "bfloat16" or (settings.precision == "auto" and on_cuda)
        self._dtype = torch.bfloat16 if low else torch.float32
        self._source = model
        torch.manual_seed(seed)
        self._files = Checkpoint.at("start", Path(model)).path
        self._tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(self._files, trust_remote_code=False)
        self._adapters = adapters
        names, quantized = tuple(dict.fromkeys(adapters.values())) or (SHARED,), settings.quantized_base
        self.policy = self._policy = Policy.load(
            model, dtype=self._dtype, adapter=settings.adapter, names=names, seed=seed, quantized=quantized
        ).to(self._device)
        if settings.gradient_checkpointing is True:  # a run's memory plan decides "auto"
            if not on_cuda:
                map_large_tensors()
            self._policy.recompute_layers()
        self._names = [name for name, p in self._policy.model.named_parameters() if p.requires_grad]
        self._optimizer = make_adamw(list(self.parameters.values()), settings)
        self._updates = 0
        self._budget = MicroBatchBudget(settings.micro_batch_tokens)
        self._start = Start(self._policy, reference or model, own=reference is None, cut=self._micro_batches)

    # ---- state ---------------------------------------------------------------------------------

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self._tokenizer

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The trained parameters by name; tied ones appear once."""
        named = dict(self._policy.model.named_parameters())
        return {name: named[name] for name in self._names}

    @property
    def num_parameters(self) -> int:
        """How many numbers training may change."""
        return sum(parameter.numel() for parameter in self.parameters.values())

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding; every token id is smaller."""
        return int(self._policy.model.get_input_embeddings().num_embeddings)

    @property
    def dtype(self) -> str:
        """``"float32"`` or ``"bfloat16"``: arithmetic of the body and type of published weights."""
        return str(self._dtype).removeprefix("torch.")

    @property
    def updates(self) -> int:
        """Optimizer steps so far; an empty batch makes none."""
        return self._updates

    # ---- one update ----------------------------------------------------------------------------

    @on_all_ranks
    @torch.inference_mode(False)  # a caller may be in torch.no_grad() or torch.inference_mode()
    @torch.enable_grad()
    @exact_matmuls()
    def step(self, batch: Batch, *, moved: bool = False) -> UpdateReport:
        """Make one optimizer step over all rows and seed-KL calls of the batch; an empty batch makes none.

        When memory runs out, the micro-batches are halved and the update is made again from the start.
        After any of these errors the weights are as before.

        Args:
            moved: Whether earlier mini-batches of the same rollouts moved the weights since these rows were sampled.
                Then the rows are off-policy as they should be, and ``min_effective_share`` does not stop them.

        Raises:
            NotFiniteError: the loss, the gradient or a recorded log-probability is not finite.
            MismatchError: the rows were sampled from another distribution than these weights give.
            TrainingError: a row cannot be scored, or memory runs out at micro-batches of a single sequence too.
        """
        if not batch.rows and not batch.seed_kl_calls:
            return NO_UPDATE
        sequences = self._checked(completions(batch.rows, self._adapters))
        check_recorded(batch.rows)
        tokens = self._budget.tokens
        while (metrics := self._gradient(batch, sequences)) is None:
            self._budget.halve(batch, self._updates + 1)
        grad_norm = self._checked_norm(metrics, on_policy=bool(batch.rows) and not moved)
        report = metrics.report(grad_norm, self._next_rate(), self._policy.adapter_norms())
        self._apply(report)
        return report if self._budget.tokens == tokens else replace(report, halved_to=self._budget.tokens)

    def _gradient(self, batch: Batch, sequences: list[Scored]) -> UpdateMetrics | None:
        """Leave the batch's gradient with the parameters; None, and no gradient, if memory ran out."""
        self._optimizer.zero_grad()
        metrics = UpdateMetrics(self._device)
        fits = True
        try:
            for micro in self._micro_batches(sequences, shared=True):
                self._learn(micro, batch.rows, metrics)
            self._learn_seed_kl(batch.seed_kl_calls, metrics)
        except torch.OutOfMemoryError:
            fits = False  # below, the error no longer holds the frames, and with them the memory
        if all(self.ranks.gathered(fits)):
            self.ranks.sum_gradients(list(self.parameters.values()))
            return metrics.summed(self.ranks)
        self._optimizer.zero_grad()
        torch.cuda.empty_cache()  # does nothing without CUDA
        return None

    def _learn(self, micro: MicroBatch, rows: Sequence[Row], metrics: UpdateMetrics) -> None:
        """Add the gradient of this micro-batch's share of the loss.

        The shares sum to the loss: the tokens' weights are those of the whole batch. No reply is cut in two.
        """
        tokens = tokens_of([rows[member] for member in micro.members], self._device)
        coefficient = self.settings.kl_coefficient
        # before the policy's activations take their memory
        start = self._start.reads(micro) if coefficient > 0 else None
        readout = self._policy.readout(micro)
        if self._loss.reads_replies:
            tokens = with_reply_log_ratios(tokens, head.logprobs(readout, micro), micro.tokens)

        def loss(logprobs: Tensor, kl: Tensor | None, part: slice) -> Tensor:
            own = part_of(tokens, part)
            value = self._loss.value(logprobs, own, self._band)
            return value if kl is None else value + coefficient * (own.weights * kl).sum()

        measured = learn(readout, micro, loss, start)
        clipped = None if self._loss.clipped is None else self._loss.clipped(measured.logprobs, tokens, self._band)
        metrics.add(measured, tokens, clipped, micro)

    def _learn_seed_kl(self, calls: Sequence[SeedKLCall], metrics: UpdateMetrics) -> None:
        """Add the gradient of KL(theta || start), averaged over the tokens of the seed-KL calls.

        The start may read another prompt before a completion than the policy does. Then the policy learns to answer its
        own prompt as the start answers that one (FST-distill).
        """
        coefficient = self.settings.seed_kl_coefficient
        if not calls or coefficient == 0:
            return
        policy_reads = self._checked(completions([seed_call.call for seed_call in calls], self._adapters))
        start_reads = self._checked(read_by_start(policy_reads, calls))
        tokens = sum(sequence.tokens for sequence in policy_reads)

        def loss(_: Tensor, kl: Tensor | None, part: slice) -> Tensor:
            assert kl is not None
            return coefficient * kl.sum() / tokens

        for micro in self._micro_batches(policy_reads, shared=True):
            other = None if policy_reads == start_reads else [start_reads[member] for member in micro.members]
            start = self._start.reads(micro, other)
            measured = learn(self._policy.readout(micro), micro, loss, start)
            assert measured.kl is not None
            metrics.add_seed_kl(measured, measured.kl.sum() / tokens, micro)

    def _checked_norm(self, metrics: UpdateMetrics, on_policy: bool) -> Tensor:
        """The gradient's norm; a gradient that must not be applied is dropped."""
        norm = nn.utils.get_total_norm([p.grad for p in self.parameters.values() if p.grad is not None])
        try:
            metrics.check_finite(norm, self._updates + 1)
            if on_policy:
                metrics.check_on_policy(self.settings.min_effective_share, self._updates + 1)
        except TrainingError:
            self._optimizer.zero_grad()
            raise
        return norm

    def _apply(self, report: UpdateReport) -> None:
        if self.settings.max_grad_norm is not None:
            norm = torch.tensor(report.grad_norm, device=self._device)
            nn.utils.clip_grads_with_norm_(self.parameters.values(), self.settings.max_grad_norm, norm)
        for group in self._optimizer.param_groups:
            group["lr"] = report.learning_rate
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._updates += 1

    def _next_rate(self) -> float:
        return self.settings.learning_rate * min(1.0, (self._updates + 1) / max(1, self.settings.warmup_steps))

    # ---- scoring -------------------------------------------------------------------------------

    def score(self, sequences: Sequence[Sequence[int]], adapter: str | None = None) -> list[list[float]]:
        """Log-probability of every token but the first of each sequence, at temperature 1; see `Engine.score`."""
        scored = [Scored(tuple(sequence), 1, adapter=adapter) for sequence in sequences]
        return self._per_token(scored, self._logprobs)

    def logprobs(self, calls: Sequence[Call]) -> list[list[float]]:
        """Log-probability of every completion token at the call's temperature, as an engine records it."""
        return self._per_token(completions(calls, self._adapters), self._logprobs)

    def kl_by_call(self, calls: Sequence[Call]) -> list[list[float]]:
        """Exact KL(theta || start) in nats at every completion token of each call, given the sampled tokens before."""
        return self._per_token(completions(calls, self._adapters), self._kl)

    def _logprobs(self, micro: MicroBatch) -> Tensor:
        return head.logprobs(self._policy.readout(micro), micro)

    def _kl(self, micro: MicroBatch) -> Tensor:
        return head.kl_to(self._start.reads(micro), self._policy.readout(micro), micro)

    @on_all_ranks
    def prepare(self) -> None:
        """Load the weights of the KL term, where the loss has one; else the first update loads them."""
        if self.settings.kl_coefficient > 0 or self.settings.seed_kl_coefficient > 0:
            _ = self._start.policy

    @torch.inference_mode(False)
    @torch.no_grad()
    @exact_matmuls()
    def _per_token(self, sequences: list[Scored], value: Callable[[MicroBatch], Tensor]) -> list[list[float]]:
        """One value for every scored token of every sequence, in the order given."""
        result: list[list[float]] = [[] for _ in sequences]
        scorable = [index for index, sequence in enumerate(sequences) if sequence.tokens > 0]
        checked = self._checked([sequences[index] for index in scorable])
        for micro in self._micro_batches(checked):
            for member, values in zip(micro.members, value(micro).split(micro.tokens), strict=True):
                result[scorable[member]] = values.tolist()
        return result

    def _micro_batches(self, sequences: list[Scored], *, shared: bool = False) -> Iterator[MicroBatch]:
        """
        Args:
            shared: Only this rank's share.
        """
        share = self._share_prompts and self._policy.shares_prompts
        cut = micro_batches(sequences, self._budget.tokens, share=share)
        return (micro.to(self._device) for micro in (self.ranks.share(cut) if shared else cut))

    def _checked(self, sequences: list[Scored]) -> list[Scored]:
        check_scorable(sequences, vocabulary=self.vocabulary, last_position=self._policy.last_position)
        return sequences

    # ---- disk ----------------------------------------------------------------------------------

    def publish(self, directory: Path, version: WeightsVersion) -> Checkpoint:
        """Write the weights as the new folder ``directory``, for an engine to serve: untied, and whole or absent.

        A LoRA adapter alone is written, and beside ``directory`` the base that all versions share, if it is not there.

        Raises:
            TrainingError: ``directory`` exists.
        """
        if not self._policy.adapters:
            return Checkpoint(version, Path(directory), self._checkpoints.write(Path(directory)))
        return self._checkpoints.write_adapters(Path(directory), version, self._policy.adapters, self._adapters)

    @cached_property
    def _checkpoints(self) -> CheckpointWriter:
        return CheckpointWriter(self._policy.model, self._tokenizer, self._dtype, self._files)

    def save_state(self, directory: Path) -> None:
        """Write weights, AdamW's moments, the number of updates and torch's generators; see `write_state`."""
        self.state_writer()(directory)

    def state_writer(self) -> Callable[[Path], None]:
        """:meth:`save_state` for another thread. Nothing may change before it has returned."""
        tensors = state_tensors(self.parameters, self._optimizer, self._device)
        return partial(write_state, tensors=tensors, facts={"updates": self._updates, **self._budget.facts})

    @on_all_ranks
    @torch.inference_mode(False)
    def load_state(self, directory: Path) -> None:
        """Restore what :meth:`save_state` wrote; the reference is unchanged.

        Training then continues bit for bit on a CPU, and on a GPU up to the order in which its kernels add up.

        Raises:
            TrainingError: the state is unreadable, or of a model with other parameters.
        """
        tensors, facts = read_state(Path(directory))
        if stored_shapes(tensors) != self._shapes:
            raise TrainingError(f"{directory} holds the state of another model; start from the model it was saved with")
        restore_weights(tensors, self.parameters)
        restore_moments(tensors, self.parameters, self._optimizer)
        restore_generators(tensors, self._device)
        self._updates = facts["updates"]
        self._budget.restore(facts)

    @on_all_ranks
    @torch.inference_mode(False)
    def load_optimizer(self, directory: Path) -> list[str]:
        """Load AdamW's moments and the number of updates from another run's :meth:`save_state`, but no weights.

        Returns:
            The parameters that the state does not hold, and that therefore start without moments. A head that was tied
            to the embedding in that run is one: it became a parameter of its own when it was published.

        Raises:
            TrainingError: the state is unreadable, or of a model with other parameters.
        """
        tensors, facts = read_state(Path(directory))
        stored = stored_shapes(tensors)
        if not stored.items() <= self._shapes.items():
            raise TrainingError(f"{directory} holds the state of another model than {self._source}")
        restore_moments(tensors, self.parameters, self._optimizer)
        self._updates = facts["updates"]
        return [name for name in self._names if name not in stored]

    @property
    def _shapes(self) -> dict[str, torch.Size]:
        return {name: parameter.shape for name, parameter in self.parameters.items()}
