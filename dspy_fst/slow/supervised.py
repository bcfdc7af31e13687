"""Supervised training on exact token ids by trl's SFTTrainer: what a warm start is made of.

The prompt's ids are those that the policy reads in a rollout, and the reply's ids are given. Nothing is rendered or
tokenized here, and only the reply is learnt. With LoRA adapters each learns from its own predictors' replies.
trl is given `labels` that are -100 on the prompt, and is told to prepare nothing (`skip_prepare_dataset`, trl 1.16).
"""

import copy
import gc
import importlib
import math
import random
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dspy_fst.engine.lora import using
from dspy_fst.errors import TrainingError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from dspy_fst.slow.model import Policy
    from dspy_fst.slow.trainer import Trainer

BATCH = 8
"""Pairs of one optimizer step (ours; trl's default on one device)."""
RATE, LORA_RATE = 2e-5, 2e-4
"""AdamW's peak learning rate for all weights (trl's SFTConfig) and for a LoRA adapter (trl's guide: ten times that)."""
LONGEST_ROWS = 4096
"""Tokens of one forward pass where the trainer's micro-batches are not fixed (ours)."""
IGNORED = -100
"""Label of a token that is not learnt (transformers)."""
MISSING = "supervised training needs trl, which is not installed: pip install 'dspy-fst[warm-start]'"

CANCELLED = "supervised training was cancelled; the weights that it began with stand"


@dataclass(frozen=True)
class Pair:
    """A prompt and the reply that is to be learnt.

    >>> Pair("solve", (1, 15), (9, 2)).labels
    [-100, -100, 9, 2]
    """

    predictor: str
    """Name in ``program.named_predictors()``; it chooses the LoRA adapter."""
    prompt_ids: tuple[int, ...]
    reply_ids: tuple[int, ...]
    """With the token that ends a reply."""

    @property
    def ids(self) -> list[int]:
        return [*self.prompt_ids, *self.reply_ids]

    @property
    def labels(self) -> list[int]:
        return [*[IGNORED] * len(self.prompt_ids), *self.reply_ids]


@dataclass(frozen=True)
class Supervision:
    """How often and how fast pairs are learnt."""

    epochs: int = 3
    """Passes over the pairs (transformers' default)."""
    learning_rate: float | None = None
    """Peak rate, which falls to 0 in a line; None: `RATE`, or `LORA_RATE` with a LoRA adapter."""
    seed: int = 0
    """Of the order of the pairs."""


@dataclass(frozen=True)
class Learnt:
    """What supervised training did."""

    pairs: int
    tokens: int
    """Reply tokens, counted in each pass."""
    updates: int
    first_loss: float
    """Mean negative log-likelihood in nats a token of the first optimizer step's replies."""
    last_loss: float


def library_fault() -> str | None:
    """A sentence if trl is missing."""
    return None if find_spec("trl") else MISSING


@torch.inference_mode(False)
@torch.enable_grad()
def fine_tune(
    trainer: "Trainer",
    pairs: Sequence[Pair],
    how: Supervision,
    adapters: Mapping[str, str] | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> Learnt:
    """Move the trainer's weights towards these replies; `Trainer.publish` writes them then.

    The trainer is of no other use afterwards: trl has wrapped its model's forward. Training goes on with a new Trainer
    of the published folder.

    Args:
        trainer: Of the weights to move; its settings say the precision and the memory of a forward.
        pairs: What to learn, at least one.
        how: Passes, rate and seed.
        adapters: Predictor -> its LoRA adapter, as the trainer has it; None: all share what is trained.
        stopped: Is asked after each optimizer step whether to stop there.

    Raises:
        TrainingError: it was stopped, trl is missing, a pair is too long for the model, memory runs out, or a loss is
            not finite.
    """
    if fault := library_fault():
        raise TrainingError(fault)
    policy, only = trainer.policy, trainer.policy.adapters[:1]
    by_adapter: dict[str | None, list[Pair]] = {}
    for pair in pairs:
        by_adapter.setdefault((adapters or {}).get(pair.predictor, *only or (None,)), []).append(pair)
    losses: list[float] = []
    with _own_generators(), _own_config(policy.model):
        for adapter, own in by_adapter.items():
            with using(policy.model, adapter):
                losses += _run(trainer, own, how, stopped)
    policy.model.eval()
    gc.collect()  # transformers' Trainer holds AdamW's moments in a cycle
    tokens = how.epochs * sum(len(pair.reply_ids) for pair in pairs)
    return Learnt(len(pairs), tokens, len(losses), losses[0], losses[-1])


def _run(trainer: "Trainer", pairs: Sequence[Pair], how: Supervision, stopped: Callable[[], bool]) -> list[float]:
    """Train the adapter in use, or all weights; the loss of each optimizer step."""
    # trl imports most of transformers and datasets, which no other run needs. By name, as it ships no types.
    datasets, trl, transformers = map(importlib.import_module, ("datasets", "trl", "transformers"))
    _check(trainer.policy, pairs)
    rows = [{"input_ids": pair.ids, "labels": pair.labels} for pair in pairs]
    with tempfile.TemporaryDirectory() as scratch:
        arguments = _arguments(trl, trainer, pairs, how, scratch)
        try:
            sft = trl.SFTTrainer(
                model=trainer.policy.model,
                args=arguments,
                train_dataset=datasets.Dataset.from_list(rows),
                processing_class=copy.deepcopy(trainer.tokenizer),  # it is given a token for padding
            )
            sft.remove_callback(transformers.PrinterCallback)
            sft.add_callback(_stopper(transformers, stopped))
            sft.train()
        except torch.OutOfMemoryError as error:
            raise TrainingError(
                "memory ran out in supervised training; lower micro_batch_tokens or train a LoRA adapter"
            ) from error
    if stopped():
        raise TrainingError(CANCELLED)
    losses = [entry["loss"] for entry in sft.state.log_history if "loss" in entry]
    if not losses or not all(map(math.isfinite, losses)):
        raise TrainingError(
            f"the loss of supervised training is not finite ({losses[-1:]} after {len(losses)} updates); lower its "
            "learning rate (warm_start_learning_rate in a run, learning_rate in train_kwargs)"
        )
    return losses


def _stopper(transformers: Any, stopped: Callable[[], bool]) -> Any:
    """A callback of transformers' Trainer that ends it after the optimizer step in which it was stopped."""

    def on_step_end(self: object, args: object, state: object, control: Any, **kwargs: object) -> None:
        control.should_training_stop = control.should_training_stop or stopped()

    return type("Stopper", (transformers.TrainerCallback,), {"on_step_end": on_step_end})()


def _arguments(trl: Any, trainer: "Trainer", pairs: Sequence[Pair], how: Supervision, scratch: str) -> Any:
    """trl's SFTConfig: on the run's device, in its precision, and without output of its own."""
    tokens = trainer.settings.micro_batch_tokens
    together = _rows(LONGEST_ROWS if tokens == "auto" else tokens, max(len(pair.ids) for pair in pairs))
    arguments = trl.SFTConfig(
        output_dir=scratch,
        num_train_epochs=how.epochs,
        learning_rate=how.learning_rate or (LORA_RATE if trainer.policy.adapters else RATE),
        per_device_train_batch_size=together,
        gradient_accumulation_steps=BATCH // together,
        optim="adamw_bnb_8bit" if trainer.settings.optimizer == "adamw_8bit" else "adamw_torch",
        bf16=trainer.dtype == "bfloat16",  # its default is True, on a CPU too
        use_cpu=trainer.policy.model.device.type == "cpu",
        gradient_checkpointing=False,  # where the run has it, its own is on
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
        save_strategy="no",
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        seed=how.seed,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # several visible GPUs are not used by a run, and trl refuses them
    return arguments


def _rows(tokens: int, longest: int) -> int:
    """How many rows of this length one forward takes: a power of two that divides `BATCH`.

    >>> _rows(4096, 900), _rows(100, 900), _rows(10**6, 900)
    (4, 1, 8)
    """
    together = BATCH
    while together > 1 and together * longest > tokens:
        together //= 2
    return together


def _check(policy: "Policy", pairs: Sequence[Pair]) -> None:
    """
    Raises:
        TrainingError: a pair is longer than the model's positions.
    """
    last = policy.last_position
    longest = max(len(pair.ids) for pair in pairs)
    if last is not None and longest - 1 > last:
        raise TrainingError(
            f"a prompt and its reply have {longest} tokens in all, and the model has {last + 1} positions; leave such "
            "examples out"
        )


@contextmanager
def _own_config(model: "PreTrainedModel") -> Iterator[None]:
    """A block after which the model's config is as before: trl writes its token for padding into it."""
    config, generation = copy.deepcopy(model.config), copy.deepcopy(model.generation_config)
    try:
        yield
    finally:
        model.config, model.generation_config = config, generation


@contextmanager
def _own_generators() -> Iterator[None]:
    """A block after which the process's random generators are as before: trl seeds them all."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
