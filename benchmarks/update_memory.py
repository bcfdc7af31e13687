"""Peak memory and time of one update, beside another commit's and beside trl's.

    python -m benchmarks.update_memory --before CHECKOUT --repeats 3     # SmolLM2-135M: 12 GiB and an hour of one core

The same rows on each side: 32 of 200 + 100 random tokens, no two with a prompt in common, KL on, at most 4,096 tokens
a micro-batch; trl reads as many rows in one pass. Each side is a process of its own. Peak: the most resident memory of
an update above that of the loaded weights; so the reference, AdamW's moments and the gradients count. A small update
comes first. All gradients are compared by their norm.
"""

import argparse
import gc
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import update_sides
from benchmarks.in_checkout import asked_case, measured_by
from benchmarks.update_sides import BUDGET, ROOT, random_ids, rows_of
from dspy_fst.run.files import write_json
from dspy_fst.types import Row

RESULT = ROOT / "benchmarks" / "results" / "update_memory.json"
ROWS, PROMPT, REPLY = 32, 200, 100
SIDES: dict[str, dict[str, Any]] = {
    "before": {},
    "full": {"gradient_checkpointing": False},
    "full, checkpointed": {"gradient_checkpointing": True},
    "LoRA": {"gradient_checkpointing": False, "adapter": "lora"},
    "LoRA, checkpointed": {"gradient_checkpointing": True, "adapter": "lora"},
    "trl": {},
}
"""Side -> settings of its trainer. LoRA has rank 16."""


def rows(count: int, prompt: int, reply: int) -> list[Row]:
    """Rows without a common prompt."""
    import torch

    ids = random_ids(count, prompt + reply, 40_000, torch.Generator().manual_seed(0))
    return rows_of([row[:prompt] for row in ids], [row[prompt:] for row in ids])


def measure(side: str, folder: str, count: int, repeats: int) -> dict[str, Any]:
    """Peaks in bytes above the loaded weights, seconds and the gradient's norm of some updates."""
    path, at_once = Path(folder), BUDGET // (PROMPT + REPLY)
    update, loaded = update_sides.trl(path, at_once) if side == "trl" else update_sides.ours(path, **SIDES[side])
    update(rows(2, 4, 4))
    batch, norm = rows(count, PROMPT, REPLY), 0.0
    found: dict[str, list[float]] = {"peaks": [], "seconds": [], "processor_seconds": []}
    for _ in range(repeats):
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # the highest mark begins anew
        started, worked = time.perf_counter(), time.process_time()
        report = update(batch)
        norm = float(getattr(report, "grad_norm", report))
        found["seconds"].append(time.perf_counter() - started)
        found["processor_seconds"].append(time.process_time() - worked)
        found["peaks"].append(_status("VmHWM") - loaded)
    return {**found, "grad_norm": norm}


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def main(arguments: Sequence[str] | None = None) -> None:
    if case := asked_case():
        print(json.dumps(measure(*case)))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="a checkout of another commit")
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--sides", nargs="*", default=list(SIDES), choices=SIDES)
    options = parser.parse_args(arguments)
    from programs import smollm2

    folder = str(smollm2.folder())
    found = json.loads(RESULT.read_text()) if RESULT.is_file() else {}
    for side in options.sides:
        if side != "before" or options.before:
            checkout = options.before if side == "before" else ROOT
            case = (side, folder, options.rows, options.repeats)
            figures = measured_by("benchmarks.update_memory", case, checkout)
            found[side] = {"rows": options.rows, **figures}
            write_json(RESULT, found)
            print(told(found), flush=True)


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
