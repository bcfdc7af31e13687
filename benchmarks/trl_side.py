"""Updates by ``trl.GRPOTrainer`` with its CISPO loss on given rows: neither generation nor rewards are needed."""

import contextlib
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dspy_fst.types import Row

Inputs = dict[str, torch.Tensor]


class TrlSide:
    """trl's trainer of one model; an update is the loss, the KL term, the gradient, its norm and AdamW's step.

    Args:
        folder: The model. Full weights are float32; the base under a LoRA adapter is bfloat16 where ``bf16``.
        kl: ``beta``.
        batch: Rows of a micro-batch, at most.
        lora: Rank and alpha; None trains all weights.
        bf16: Compute under bfloat16 autocast.
    """

    def __init__(self, folder: Path, kl: float, batch: int, *, lora: tuple[int, int] | None = None, bf16: bool = False):
        from datasets import Dataset
        from datasets.table import InMemoryTable
        from trl import GRPOConfig, GRPOTrainer

        dtype = torch.bfloat16 if bf16 and lora is not None else torch.float32
        self.kl = kl
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        self.loaded = psutil.Process().memory_info().rss
        """Resident bytes once the model was read; trl copies it for its reference afterwards."""
        self.trainer = GRPOTrainer(
            model=model,
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            args=GRPOConfig(
                output_dir=tempfile.mkdtemp(prefix="trl-"),
                loss_type="cispo",
                epsilon_high=4.0,
                beta=kl,
                learning_rate=1e-9,
                per_device_train_batch_size=batch,
                num_generations=batch,
                use_cpu=not torch.cuda.is_available(),
                report_to=[],
                gradient_checkpointing=False,
                bf16=bf16,
                disable_tqdm=True,
            ),
            # With a fingerprint: computing one pickles the table, which fails where pyarrow is linked into place.
            train_dataset=Dataset(InMemoryTable.from_pydict({"prompt": ["x"] * batch}), fingerprint="given"),
            processing_class=AutoTokenizer.from_pretrained(folder),
            peft_config=None if lora is None else _lora(*lora),
        )
        self.trainer.create_optimizer()
        self.trainer.current_gradient_accumulation_steps = 1  # what Trainer.train() would set
        self.trainer.model.train()

    def inputs(self, rows: Sequence[Row], at_once: int) -> list[Inputs]:
        """Micro-batches; the loss is divided by the tokens of all rows, so they add up."""
        whole = torch.tensor(sum(len(row.completion_ids) for row in rows))
        parts = [_padded(rows[start : start + at_once]) for start in range(0, len(rows), at_once)]
        device = self.trainer.accelerator.device
        counted = [{**part, "num_items_in_batch": whole} for part in parts]
        return [{name: value.to(device) for name, value in part.items()} for part in counted]

    def update(self, parts: Sequence[Inputs]) -> float:
        """One optimizer step; the norm of its gradient."""
        for inputs in parts:
            loss = self.trainer.compute_loss(self.trainer.model, {**inputs, **self._reference(inputs)})
            self.trainer.accelerator.backward(loss)
        grads = [p.grad for p in self.trainer.model.parameters() if p.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(grads))
        self.trainer.optimizer.step()
        self.trainer.optimizer.zero_grad()
        return norm

    def _reference(self, inputs: Inputs) -> Inputs:
        """What trl computes for every batch before its loss when beta is above 0."""
        if self.kl == 0:
            return {}
        trainer = self.trainer
        model = trainer.model if trainer.ref_model is None else trainer.ref_model
        off = model.disable_adapter() if trainer.ref_model is None else contextlib.nullcontext()
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        with torch.no_grad(), off:
            keep = inputs["completion_ids"].shape[1]
            logps, *_ = trainer._get_per_token_logps_and_entropies(model, ids, mask, keep)
        return {"ref_per_token_logps": logps}


def _lora(rank: int, alpha: int) -> Any:
    from peft import LoraConfig

    return LoraConfig(r=rank, lora_alpha=alpha, target_modules="all-linear", task_type="CAUSAL_LM")


def _padded(rows: Sequence[Row], pad: int = 0) -> Inputs:
    """The rows as trl pads them: prompts on the left, completions on the right, to the longest of all."""
    prompts, replies = [list(row.prompt_ids) for row in rows], [list(row.completion_ids) for row in rows]
    wide, long = max(map(len, prompts)), max(map(len, replies))
    return {
        "prompt_ids": torch.tensor([[pad] * (wide - len(p)) + p for p in prompts]),
        "prompt_mask": torch.tensor([[0] * (wide - len(p)) + [1] * len(p) for p in prompts]),
        "completion_ids": torch.tensor([r + [pad] * (long - len(r)) for r in replies]),
        "completion_mask": torch.tensor([[1] * len(r) + [0] * (long - len(r)) for r in replies]),
        "old_per_token_logps": torch.tensor([[*row.logprobs, *[0.0] * (long - len(row.logprobs))] for row in rows]),
        "advantages": torch.tensor([row.advantage for row in rows]),
    }
