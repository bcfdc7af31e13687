"""The trainer: one weight update per call of `Trainer.step`, on exactly the tokens that were sampled.

The caller owns the loop and may do anything between two steps. Texts never change here.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from dspy_fst.engine.base import Checkpoint
from dspy_fst.engine.machine import several_fault
from dspy_fst.errors import RankError, TrainingError
from dspy_fst.model_files.reading import read_tokenizer
from dspy_fst.recipe.lora_settings import SHARED
from dspy_fst.slow import head
from dspy_fst.slow.adamw import make_adamw
from dspy_fst.slow.batching import (
    NONE,
    MicroBatch,
    Scored,
    check_recorded,
    check_scorable,
    completions,
    in_rounds,
    micro_batches,
    part_of,
    read_by_start,
    tokens_of,
    with_reply_log_ratios,
)
from dspy_fst.slow.head import exact_matmuls, learn, learn_nothing
from dspy_fst.slow.heap import map_large_tensors
from dspy_fst.slow.losses.by_name import band_of, loss_of
from dspy_fst.slow.micro_batch_budget import MicroBatchBudget
from dspy_fst.slow.model import Policy
from dspy_fst.slow.ranks.ranks import ALONE, Ranks, on_all_holders, on_all_ranks, whole
from dspy_fst.slow.ranks.sharding import let_go, shard
from dspy_fst.slow.start import Start
from dspy_fst.slow.trainer_files import TrainerFiles
from dspy_fst.slow.training_settings import TrainingSettings
from dspy_fst.slow.update_metrics import NO_UPDATE, UpdateMetrics
from dspy_fst.types import Batch, Call, Row, SeedKLCall, UpdateReport

UNEVEN = (
    "an update ran out of memory on rank {rank} with micro-batches of {tokens} tokens. With sharding='fsdp' it cannot "
    "be made again with smaller ones, as the other ranks wait for this one in its midst; lower micro_batch_tokens"
)


class Trainer(TrainerFiles):
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
            several and ``ranks`` are not those; or the ranks read different weights.
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
        self.ranks, self.sharded = ranks, ranks.world > 1 and settings.sharding is not None
        if ranks.world == 1 and (fault := several_fault()):
            raise TrainingError(fault)
        self._device = torch.device("cpu") if device == "cpu" else ranks.device
        on_cuda = self._device.type == "cuda"
        low = settings.precision == "bfloat16" or (settings.precision == "auto" and on_cuda)
        self._dtype = torch.bfloat16 if low else torch.float32
        self._source = model
        torch.manual_seed(seed)
        self._files = Checkpoint.at("start", Path(model)).path
        self._tokenizer = read_tokenizer(self._files)
        self._adapters = adapters
        names, quantized = tuple(dict.fromkeys(adapters.values())) or (SHARED,), settings.quantized_base
        self.policy = self._policy = Policy.load(
            model, dtype=self._dtype, adapter=settings.adapter, names=names, seed=seed, quantized=quantized
        )
        ranks.check_same(self._policy.parameters(), model)
        self._place(self._policy)
        if settings.gradient_checkpointing is True:  # a run's memory plan decides "auto"
            if not on_cuda:
                map_large_tensors()
            self._policy.recompute_layers()
        self._optimizer = make_adamw(list(self.parameters.values()), settings)
        self._updates = 0
        self._budget = MicroBatchBudget(settings.micro_batch_tokens)
        if reference is not None:
            ranks.check_same_folder(Path(reference))
        own = reference is None
        self._start = Start(self._policy, reference or model, own=own, cut=self._as_many, place=self._place)

    def _place(self, policy: Policy) -> None:
        """Put a policy on the device, or this rank's part of it."""
        if self.sharded:
            shard(policy, self._device, self.ranks.world)
        else:
            policy.to(self._device)

    # ---- state ---------------------------------------------------------------------------------

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self._tokenizer

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The trained parameters by name; tied ones appear once."""
        return self._policy.trained

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
        except torch.OutOfMemoryError as error:
            if self.sharded:
                raise RankError(UNEVEN.format(rank=self.ranks.rank, tokens=self._budget.tokens)) from error
            fits = False  # below, the error no longer holds the frames, and with them the memory
        if all(self.ranks.gathered(fits)):
            self._sum_gradients(batch, sequences)
            return metrics.summed(self.ranks)
        self._optimizer.zero_grad()
        torch.cuda.empty_cache()  # does nothing without CUDA
        return None

    def _sum_gradients(self, batch: Batch, sequences: list[Scored]) -> None:
        """Over the ranks; where these share the weights, each backward has done so."""
        if not self.sharded:
            self.ranks.sum_gradients(list(self.parameters.values()))
            return
        self._start.let_go()
        held = batch.seed_kl_calls if self.settings.seed_kl_coefficient > 0 else ()
        calls = completions([seed_call.call for seed_call in held], self._adapters)
        self._policy.drop_gradients({sequence.adapter for sequence in (*sequences, *calls)})

    def _learn(self, micro: MicroBatch, rows: Sequence[Row], metrics: UpdateMetrics) -> None:
        """Add the gradient of this micro-batch's share of the loss.

        The shares sum to the loss: the tokens' weights are those of the whole batch. No reply is cut in two.
        """
        tokens = tokens_of([rows[member] for member in micro.members], self._device)
        coefficient = self.settings.kl_coefficient
        # before the policy's activations take their memory
        start = self._start.reads(micro) if coefficient > 0 else None
        readout = self._policy.readout(micro)
        if micro.padding:
            return learn_nothing(readout)
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
            readout = self._policy.readout(micro)
            if micro.padding:
                learn_nothing(readout)
                continue
            measured = learn(readout, micro, loss, start)
            assert measured.kl is not None
            metrics.add_seed_kl(measured, measured.kl.sum() / tokens, micro)

    def _checked_norm(self, metrics: UpdateMetrics, on_policy: bool) -> Tensor:
        """The gradient's norm; a gradient that must not be applied is dropped."""
        norm = whole(nn.utils.get_total_norm([p.grad for p in self.parameters.values() if p.grad is not None]))
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

    @on_all_holders
    def score(self, sequences: Sequence[Sequence[int]], adapter: str | None = None) -> list[list[float]]:
        """Log-probability of every token but the first of each sequence, at temperature 1; see `Engine.score`."""
        scored = [Scored(tuple(sequence), 1, adapter=adapter) for sequence in sequences]
        return self._per_token(scored, self._logprobs)

    @on_all_holders
    def logprobs(self, calls: Sequence[Call]) -> list[list[float]]:
        """Log-probability of every completion token at the call's temperature, as an engine records it."""
        return self._per_token(completions(calls, self._adapters), self._logprobs)

    @on_all_holders
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
        let_go(self._policy)
        self._start.let_go()
        return result

    def _micro_batches(self, sequences: list[Scored], *, shared: bool = False) -> Iterator[MicroBatch]:
        """
        Args:
            shared: Only this rank's share.
        """
        share = self._share_prompts and self._policy.shares_prompts
        cut: Iterable[MicroBatch] = micro_batches(sequences, self._budget.tokens, share=share)
        if shared:
            cut = in_rounds(cut, self.ranks.rank, self.ranks.world) if self.sharded else self.ranks.share(cut)
        return (micro.to(self._device) for micro in cut)

    def _as_many(self, sequences: list[Scored]) -> list[MicroBatch]:
        """Micro-batches of sequences of this rank's own; the last one again where another rank has more."""
        cut = list(self._micro_batches(sequences))
        most = max(self.ranks.gathered(len(cut))) if self.sharded else len(cut)
        return [*cut, *cut[-1:] * (most - len(cut))]

    def _checked(self, sequences: list[Scored]) -> list[Scored]:
        check_scorable(sequences, vocabulary=self.vocabulary, last_position=self._policy.last_position)
        return sequences
