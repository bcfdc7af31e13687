"""Processor time of one update over a DSPy-shaped batch, beside another commit's and beside trl's.

    python -m benchmarks.update_speed --before CHECKOUT --repeats 3          # an hour of one core; 12 GiB for SmolLM2
    python -m benchmarks.update_speed --before CHECKOUT --shapes laboratory  # minutes

The batch: 8 problems with 8 rows each, 2 of each of 4 candidates. A row is a candidate's system message, the problem,
and a reply of its own, all of random tokens. Every side updates the same rows at a KL coefficient above 0, with at most
4,096 tokens a micro-batch; trl reads as many rows in one pass. Each measurement is a process of its own with one
thread, the sides in turns. A small update comes first. Time is the process's own, so that what else runs here counts
less. The gradient's norm shows that all sides learn the same.
"""

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "benchmarks" / "results" / "update_speed.json"
PROBLEMS, CANDIDATES, REPLIES = 8, 4, 2
BUDGET, KL = 4096, 0.001
SIDES = ("ours", "before", "trl")


@dataclass(frozen=True)
class Shape:
    """A row of the table: a model, and tokens of each part of a text."""

    model: str
    """``"laboratory"`` or ``"SmolLM2-135M"``."""
    system: int
    problem: int
    reply: int


SHAPES = {
    "laboratory": Shape("laboratory", 170, 80, 48),
    "SmolLM2": Shape("SmolLM2-135M", 170, 80, 48),
    "SmolLM2, demos": Shape("SmolLM2-135M", 650, 80, 48),
}
TARGETS = {"laboratory": {"trl": 4.0}, "SmolLM2": {"trl": 4.5, "before": 1.7}, "SmolLM2, demos": {"trl": 8.0}}


@dataclass(frozen=True)
class Texts:
    """Prompts and replies of a batch."""

    prompts: list[list[int]]
    replies: list[list[int]]

    @classmethod
    def draw(cls, shape: Shape, problems: int, vocabulary: int) -> "Texts":
        """Random ones: time does not depend on what they say."""
        import torch

        draws = torch.Generator().manual_seed(0)

        def ids(count: int, length: int) -> list[list[int]]:
            drawn: list[list[int]] = torch.randint(5, vocabulary, (count, length), generator=draws).tolist()
            return drawn

        systems, asked = ids(CANDIDATES, shape.system), ids(problems, shape.problem)
        prompts = [[*system, *problem] for problem in asked for system in systems for _ in range(REPLIES)]
        return cls(prompts, ids(len(prompts), shape.reply))


# ---- in a process of its own --------------------------------------------------------------------


def measure(side: str, shape: Shape, folder: Path, problems: int) -> dict[str, Any]:
    """Seconds of one update, the gradient's norm, and of ours the tokens read over those in the rows."""
    import torch
    from transformers import AutoConfig

    torch.set_num_threads(1)
    vocabulary = AutoConfig.from_pretrained(folder).vocab_size
    step = (_trl if side == "trl" else _ours)(folder, shape)
    step(Texts.draw(Shape(shape.model, 4, 4, 4), 1, vocabulary))
    texts = Texts.draw(shape, problems, vocabulary)
    started, worked = time.perf_counter(), time.process_time()
    found = step(texts)
    return {"seconds": time.process_time() - worked, "wall": time.perf_counter() - started, **found}


def _ours(folder: Path, _: Shape) -> Callable[[Texts], dict[str, Any]]:
    """An update by the `dspy_fst` on the path, which may be another commit's."""
    from dspy_fst.slow.trainer import Trainer
    from dspy_fst.types import Batch, Row

    try:
        settings = importlib.import_module("dspy_fst.slow.training_settings").TrainingSettings
    except ImportError:  # an older commit's
        settings = importlib.import_module("dspy_fst.slow.settings").TrainerSettings
    given = {"learning_rate": 1e-9, "kl_coefficient": KL, "micro_batch_tokens": BUDGET, "min_effective_share": 0.0}
    trainer = Trainer(folder, settings(**given), device="cpu")

    def step(texts: Texts) -> dict[str, Any]:
        weight = 1 / sum(map(len, texts.replies))
        rows = [
            Row(tuple(p), tuple(r), (-10.0,) * len(r), (-1.0) ** i, weight, 1.0, "answer", i)
            for i, (p, r) in enumerate(zip(texts.prompts, texts.replies, strict=True))
        ]
        report = trainer.step(Batch(tuple(rows), "step-000000"))
        read = getattr(report, "tokens_read", None)
        return {"norm": float(report.grad_norm), "read": read and read / report.row_tokens}

    return step


def _trl(folder: Path, shape: Shape) -> Callable[[Texts], dict[str, Any]]:
    """An update by trl.GRPOTrainer with its CISPO loss; generation and rewards are left out."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    together = BUDGET // (shape.system + shape.problem + shape.reply)
    settings = {
        **{"loss_type": "cispo", "epsilon_high": 4.0, "beta": KL, "learning_rate": 1e-9, "use_cpu": True},
        **{"gradient_checkpointing": False, "bf16": False, "disable_tqdm": True, "report_to": []},
    }
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=GRPOConfig(
            output_dir=tempfile.mkdtemp(),
            per_device_train_batch_size=together,
            num_generations=together,
            **settings,
        ),
        train_dataset=Dataset.from_dict({"prompt": ["x"] * together}),
        processing_class=AutoTokenizer.from_pretrained(folder),
    )
    trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = 1  # what Trainer.train() would set
    trainer.model.train()

    def step(texts: Texts) -> dict[str, Any]:
        for start in range(0, len(texts.prompts), together):
            inputs = _trl_inputs(texts, slice(start, start + together))
            with torch.no_grad():  # what trl does for every batch before its loss when beta > 0
                ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
                keep = inputs["completion_ids"].shape[1]
                found = trainer._get_per_token_logps_and_entropies(trainer.ref_model, ids, torch.ones_like(ids), keep)
            trainer.accelerator.backward(
                trainer.compute_loss(trainer.model, {**inputs, "ref_per_token_logps": found[0]})
            )
        norm = torch.nn.utils.get_total_norm([p.grad for p in trainer.model.parameters() if p.grad is not None])
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        return {"norm": float(norm), "read": None}

    return step


def _trl_inputs(texts: Texts, part: slice) -> dict[str, Any]:
    import torch

    prompts, replies = torch.tensor(texts.prompts[part]), torch.tensor(texts.replies[part])
    return {
        "prompt_ids": prompts,
        "prompt_mask": torch.ones_like(prompts),
        "completion_ids": replies,
        "completion_mask": torch.ones_like(replies),
        "old_per_token_logps": torch.full(replies.shape, -10.0),
        "advantages": torch.tensor([(-1.0) ** (part.start + i) for i in range(len(replies))]),
        "num_items_in_batch": torch.tensor(sum(map(len, texts.replies))),
    }


# ---- the command --------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="a checkout of another commit")
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--problems", type=int, default=PROBLEMS)
    parser.add_argument("--measure", nargs=3, metavar=("SIDE", "SHAPE", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.measure:
        side, shape, folder = options.measure
        print(json.dumps(measure(side, SHAPES[shape], Path(folder), options.problems)))
        return
    found = json.loads(RESULT.read_text()) if RESULT.is_file() else {}
    for shape in options.shapes:
        found[shape] = {"problems": options.problems, "runs": {side: [] for side in SIDES}}
        for _ in range(options.repeats):
            for side in SIDES if options.before else ("ours", "trl"):
                run = _in_process(side, shape, options.before if side == "before" else ROOT, options.problems)
                found[shape]["runs"][side].append(run)
                print(shape, side, run, file=sys.stderr, flush=True)
            RESULT.write_text(json.dumps(found, indent=1) + "\n")
    print(told(found))


def _in_process(side: str, shape: str, checkout: Path, problems: int) -> dict[str, Any]:
    sys.path.insert(0, str(ROOT))
    from programs import smollm2
    from programs.lab import BASE

    folder = BASE if SHAPES[shape].model == "laboratory" else smollm2.folder()
    command = [sys.executable, __file__, "--problems", str(problems), "--measure", side, shape, str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(checkout.resolve()), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, capture_output=True, text=True, timeout=3600, env=environment, cwd="/")
    if ended.returncode:
        sys.exit(f"{shape}, {side}: {ended.stderr[-2000:]}")
    return dict(json.loads(ended.stdout.splitlines()[-1]))


def told(found: dict[str, Any]) -> str:
    """A line for each shape: seconds of ours, the others' over ours with their spread, and what is aimed at."""
    head = ["model", "system + problem + reply", "ours", "before / ours", "trl / ours", "tokens read / tokens in rows"]
    lines = [f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
    for name in filter(found.__contains__, SHAPES):
        shape, runs = SHAPES[name], found[name]["runs"]
        seconds = [run["seconds"] for run in runs["ours"]]
        cells = [shape.model, f"{shape.system} + {shape.problem} + {shape.reply}", f"{median(seconds):.3g} s"]
        cells += [_over(runs, side, TARGETS[name].get(side)) for side in ("before", "trl")]
        lines.append(f"| {' | '.join([*cells, format(runs['ours'][0]['read'], '.3f')])} |")
    return "\n".join(lines)


def _over(runs: dict[str, Any], side: str, target: float | None) -> str:
    """Median and spread of a side's seconds over ours in the same repeat."""
    ratios = [run["seconds"] / own["seconds"] for run, own in zip(runs[side], runs["ours"], strict=False)]
    if not ratios:
        return ""
    aim = f"; aim {target:g}" if target else ""
    return f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}{aim})"


if __name__ == "__main__":
    main()
