"""Peak memory and time of one update, beside another commit's and beside trl's.

    python -m benchmarks.update_memory --before CHECKOUT --repeats 3     # SmolLM2-135M: 12 GiB and an hour of one core

The same rows on each side: 32 of 200 + 100 random tokens, no two with a prompt in common, KL on, at most 4,096 tokens
a micro-batch; trl reads as many rows in one pass. Each side is a process of its own. Peak: the most resident memory of
an update above that of the loaded weights; so the reference, AdamW's moments and the gradients count. A small update
comes first. All gradients are compared by their norm.
"""

import argparse
import gc
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "benchmarks" / "results" / "update_memory.json"
ROWS, PROMPT, REPLY, BUDGET, KL = 32, 200, 100, 4096, 0.001
SIDES: dict[str, dict[str, Any]] = {
    "before": {},
    "full": {"gradient_checkpointing": False},
    "full, checkpointed": {"gradient_checkpointing": True},
    "LoRA": {"gradient_checkpointing": False, "adapter": "lora"},
    "LoRA, checkpointed": {"gradient_checkpointing": True, "adapter": "lora"},
    "trl": {},
}
"""Side -> settings of its trainer. LoRA has rank 16."""


@dataclass(frozen=True)
class Texts:
    """Random texts: neither memory nor time depends on what they say."""

    prompts: list[list[int]]
    replies: list[list[int]]

    @classmethod
    def draw(cls, rows: int, prompt: int, reply: int) -> "Texts":
        import torch

        draws = torch.Generator().manual_seed(0)
        ids = torch.randint(5, 40_000, (rows, prompt + reply), generator=draws).tolist()
        return cls([row[:prompt] for row in ids], [row[prompt:] for row in ids])


# ---- in a process of its own --------------------------------------------------------------------


def measure(side: str, folder: Path, rows: int, repeats: int) -> dict[str, Any]:
    """Peaks in bytes, seconds and the gradient's norm of some updates."""
    load = _trl if side == "trl" else _ours
    step, loaded = load(side, folder)
    step(Texts.draw(2, 4, 4))
    texts, norm = Texts.draw(rows, PROMPT, REPLY), 0.0
    found: dict[str, list[float]] = {"peaks": [], "seconds": [], "processor_seconds": []}
    for _ in range(repeats):
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # the highest mark begins anew
        started, worked = time.perf_counter(), time.process_time()
        norm = step(texts)
        found["seconds"].append(time.perf_counter() - started)
        found["processor_seconds"].append(time.process_time() - worked)
        found["peaks"].append(_status("VmHWM") - loaded)
    return {**found, "grad_norm": norm}


def _ours(side: str, folder: Path) -> tuple[Callable[[Texts], float], int]:
    """An update by the `dspy_fst` on the path, which may be another commit's; and what the loaded weights take."""
    from dspy_fst.slow.trainer import Trainer
    from dspy_fst.types import Batch, Row

    try:
        settings = importlib.import_module("dspy_fst.slow.training_settings").TrainingSettings
    except ImportError:  # an older commit's
        settings = importlib.import_module("dspy_fst.slow.settings").TrainerSettings

    trainer = Trainer(
        folder,
        settings(
            learning_rate=1e-9, kl_coefficient=KL, micro_batch_tokens=BUDGET, min_effective_share=0.0, **SIDES[side]
        ),
        device="cpu",
    )
    gc.collect()
    loaded = _status("VmRSS")

    def step(texts: Texts) -> float:
        weight = 1 / sum(map(len, texts.replies))
        rows = [
            Row(tuple(p), tuple(r), (-10.0,) * len(r), (-1.0) ** i, weight, 1.0, "answer", i)
            for i, (p, r) in enumerate(zip(texts.prompts, texts.replies, strict=True))
        ]
        return float(trainer.step(Batch(tuple(rows), "step-000000")).grad_norm)

    return step, loaded


def _trl(_: str, folder: Path) -> tuple[Callable[[Texts], float], int]:
    """An update by trl.GRPOTrainer with its CISPO loss; generation and rewards are left out."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    loaded = _status("VmRSS")
    together = BUDGET // (PROMPT + REPLY)
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=GRPOConfig(
            output_dir=tempfile.mkdtemp(),
            loss_type="cispo",
            epsilon_high=4.0,
            beta=KL,
            learning_rate=1e-9,
            per_device_train_batch_size=together,
            num_generations=together,
            use_cpu=True,
            report_to=[],
            gradient_checkpointing=False,
            bf16=False,
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_dict({"prompt": ["x"] * together}),
        processing_class=AutoTokenizer.from_pretrained(folder),
    )
    trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = 1  # what Trainer.train() would set
    trainer.model.train()

    def step(texts: Texts) -> float:
        for start in range(0, len(texts.prompts), together):
            inputs = _trl_inputs(texts, slice(start, start + together))
            with torch.no_grad():  # what trl does for every batch before its loss when beta > 0
                ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
                keep = inputs["completion_ids"].shape[1]
                found = trainer._get_per_token_logps_and_entropies(trainer.ref_model, ids, torch.ones_like(ids), keep)
            loss = trainer.compute_loss(trainer.model, {**inputs, "ref_per_token_logps": found[0]})
            trainer.accelerator.backward(loss)
        norm = torch.nn.utils.get_total_norm([p.grad for p in trainer.model.parameters() if p.grad is not None])
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        return float(norm)

    return step, loaded


def _trl_inputs(texts: Texts, part: slice) -> dict[str, Any]:
    import torch

    prompts, replies = torch.tensor(texts.prompts[part]), torch.tensor(texts.replies[part])
    return {
        "prompt_ids": prompts,
        "prompt_mask": torch.ones_like(prompts),
        "completion_ids": replies,
        "completion_mask": torch.ones_like(replies),
        "old_per_token_logps": torch.full(replies.shape, -10.0),
        "advantages": torch.tensor([(-1.0) ** i for i in range(len(replies))]),
        "num_items_in_batch": torch.tensor(sum(map(len, texts.replies))),
    }


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


# ---- the command --------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="a checkout of another commit")
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--sides", nargs="*", default=list(SIDES), choices=SIDES)
    parser.add_argument("--measure", nargs=2, metavar=("SIDE", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.measure:
        print(json.dumps(measure(options.measure[0], Path(options.measure[1]), options.rows, options.repeats)))
        return
    sys.path.insert(0, str(ROOT))
    from programs import smollm2

    found = json.loads(RESULT.read_text()) if RESULT.is_file() else {}
    for side in options.sides:
        if side != "before" or options.before:
            checkout = options.before.resolve() if side == "before" else ROOT
            found[side] = {"rows": options.rows, **_in_process(side, checkout, smollm2.folder(), options)}
            RESULT.write_text(json.dumps(found, indent=2) + "\n")
            print(told(found), flush=True)


def _in_process(side: str, checkout: Path, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    size = ["--rows", str(options.rows), "--repeats", str(options.repeats)]
    command = [sys.executable, __file__, "--measure", side, str(folder), *size]
    environment = {**os.environ, "PYTHONPATH": str(checkout)}  # a script's own folder holds no dspy_fst
    ended = subprocess.run(command, capture_output=True, text=True, timeout=7200, env=environment, cwd="/")
    if ended.returncode:
        sys.exit(f"{side}: {ended.stderr[-2000:]}")
    return dict(json.loads(ended.stdout.splitlines()[-1]))


def told(found: dict[str, Any]) -> str:
    """A line for each side: peak, seconds, and both over those of the commit before and of trl."""
    head = [
        "side",
        "peak",
        "of before",
        "of trl",
        "seconds",
        "processor seconds",
        "of before",
        "of trl",
        "gradient's norm",
    ]
    lines = [f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
    for side in filter(found.__contains__, SIDES):
        row = found[side]
        cells = [_spread([peak / 2**30 for peak in row["peaks"]], "{:.2f} GiB ± {:.2f}")]
        cells += [_over(found, other, side, "peaks") for other in ("before", "trl")]
        cells += [_spread(row[name], "{:.0f} ± {:.0f}") for name in ("seconds", "processor_seconds")]
        cells += [_over(found, other, side, "processor_seconds") for other in ("before", "trl")]
        lines.append(f"| {' | '.join([side, *cells, format(row['grad_norm'], '.6g')])} |")
    return "\n".join(lines)


def _spread(values: Sequence[float], form: str) -> str:
    """Median, and half of the range."""
    return form.format(statistics.median(values), (max(values) - min(values)) / 2)


def _over(found: dict[str, Any], other: str, side: str, what: str) -> str:
    if other not in found:
        return ""
    return f"{statistics.median(found[side][what]) / statistics.median(found[other][what]):.2f}"


if __name__ == "__main__":
    main()
