"""An update of ``trl.GRPOTrainer`` on rows that are given: neither generation nor rewards are needed."""

import contextlib
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.throughput import trl_inputs
from dspy_fst.types import Row


def trl_step(
    rows: Sequence[Row], folder: Path, kl: float, budget: int, lora: tuple[int, int] | None
) -> Callable[[], Any]:
    """One optimizer step of trl on these rows, in micro-batches of about ``budget`` tokens; bfloat16 autocast.

    Args:
        rows: All of one length, so that padding takes nothing.
        folder: The model. Full weights are float32; the base under a LoRA is bfloat16.
        kl: ``beta``.
        budget: Prompt and completion tokens of a micro-batch; at least one row.
        lora: Rank and alpha; None trains all weights.
    """
    trainer = _trainer(len(rows), folder, kl, lora)
    width = len(rows[0].prompt_ids) + len(rows[0].completion_ids)
    size = max(1, budget // width)
    parts = [_inputs(rows[start : start + size], rows, trainer) for start in range(0, len(rows), size)]

    def step() -> None:
        for inputs in parts:
            loss = trainer.compute_loss(trainer.model, {**inputs, **_reference(trainer, inputs, kl)})
            trainer.accelerator.backward(loss)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()

    trainer.model.train()
    return step


def _trainer(batch: int, folder: Path, kl: float, lora: tuple[int, int] | None) -> Any:
    from datasets import Dataset
    from datasets.table import InMemoryTable
    from peft import LoraConfig
    from trl import GRPOConfig, GRPOTrainer

    adapter = None
    if lora is not None:
        adapter = LoraConfig(r=lora[0], lora_alpha=lora[1], target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32 if lora is None else torch.bfloat16),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=GRPOConfig(
            output_dir=tempfile.mkdtemp(prefix="trl-"),
            loss_type="cispo",
            epsilon_high=4.0,
            beta=kl,
            learning_rate=1e-6,
            per_device_train_batch_size=batch,
            num_generations=batch,
            use_cpu=not torch.cuda.is_available(),
            report_to=[],
            gradient_checkpointing=False,
            bf16=True,
            disable_tqdm=True,
        ),
        # With a fingerprint: computing one pickles the table, which fails where pyarrow is linked into place.
        train_dataset=Dataset(InMemoryTable.from_pydict({"prompt": ["x"] * batch}), fingerprint="given"),
        processing_class=AutoTokenizer.from_pretrained(folder),
        peft_config=adapter,
    )
    trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = 1  # what Trainer.train() would set
    return trainer


def _inputs(part: Sequence[Row], rows: Sequence[Row], trainer: Any) -> dict[str, Any]:
    """A micro-batch; the loss is divided by the tokens of all rows, so the micro-batches add up."""
    whole = torch.tensor(sum(len(row.completion_ids) for row in rows))
    inputs = {**trl_inputs(part, 0), "num_items_in_batch": whole}
    return {name: value.to(trainer.accelerator.device) for name, value in inputs.items()}


def _reference(trainer: Any, inputs: dict[str, Any], kl: float) -> dict[str, Any]:
    """What trl computes for every batch before its loss when beta is above 0."""
    if kl == 0:
        return {}
    model = trainer.model if trainer.ref_model is None else trainer.ref_model
    off = model.disable_adapter() if trainer.ref_model is None else contextlib.nullcontext()
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    with torch.no_grad(), off:
        logps, *_ = trainer._get_per_token_logps_and_entropies(model, ids, mask, inputs["completion_ids"].shape[1])
    return {"ref_per_token_logps": logps}
