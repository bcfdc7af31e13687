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
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import update_sides
from benchmarks.in_checkout import asked_case, measured_by
from benchmarks.update_sides import BUDGET, ROOT, random_ids, rows_of
from dspy_fst.run.files import write_json
from dspy_fst.types import Row

RESULT = ROOT / "benchmarks" / "results" / "update_speed.json"
PROBLEMS, CANDIDATES, REPLIES = 8, 4, 2
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


def rows(shape: Shape, problems: int, vocabulary: int) -> list[Row]:
    """The rows of a batch."""
    import torch

    draws = torch.Generator().manual_seed(0)
    systems = random_ids(CANDIDATES, shape.system, vocabulary, draws)
    asked = random_ids(problems, shape.problem, vocabulary, draws)
    prompts = [[*system, *problem] for problem in asked for system in systems for _ in range(REPLIES)]
    return rows_of(prompts, random_ids(len(prompts), shape.reply, vocabulary, draws))


def measure(side: str, name: str, folder: str, problems: int) -> dict[str, Any]:
    """Seconds of one update, the gradient's norm, and of ours the tokens read over those in the rows."""
    import torch
    from transformers import AutoConfig

    torch.set_num_threads(1)
    shape, vocabulary = SHAPES[name], AutoConfig.from_pretrained(folder).vocab_size
    at_once = BUDGET // (shape.system + shape.problem + shape.reply)
    path = Path(folder)
    update, _ = update_sides.trl(path, at_once) if side == "trl" else update_sides.ours(path)
    update(rows(Shape(shape.model, 4, 4, 4), 1, vocabulary))
    batch = rows(shape, problems, vocabulary)
    started, worked = time.perf_counter(), time.process_time()
    report = update(batch)
    took = {"seconds": time.process_time() - worked, "wall": time.perf_counter() - started}
    read = getattr(report, "tokens_read", None)
    share = read and read / report.row_tokens
    return {**took, "norm": float(getattr(report, "grad_norm", report)), "read": share}


def main(arguments: Sequence[str] | None = None) -> None:
    if case := asked_case():
        print(json.dumps(measure(*case)))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="a checkout of another commit")
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--problems", type=int, default=PROBLEMS)
    options = parser.parse_args(arguments)
    found = json.loads(RESULT.read_text()) if RESULT.is_file() else {}
    for shape in options.shapes:
        found[shape] = {"problems": options.problems, "runs": {side: [] for side in SIDES}}
        for _ in range(options.repeats):
            for side in SIDES if options.before else ("ours", "trl"):
                checkout = options.before if side == "before" else ROOT
                case = (side, shape, str(_folder(SHAPES[shape].model)), options.problems)
                run = measured_by("benchmarks.update_speed", case, checkout)
                found[shape]["runs"][side].append(run)
                print(shape, side, run, file=sys.stderr, flush=True)
            write_json(RESULT, found)
    print(told(found))


def _folder(model: str) -> Path:
    from programs import smollm2
    from programs.lab import BASE

    return BASE if model == "laboratory" else smollm2.folder()


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
    spread = f"{min(ratios):.2f} to {max(ratios):.2f}" if len(ratios) > 1 else "one repeat"
    return f"{median(ratios):.2f} ({spread}{aim})"


if __name__ == "__main__":
    main()
