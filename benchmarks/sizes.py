"""Holds the arithmetic of `dspy-fst sizes` against peaks measured here.

    python -m benchmarks.sizes && make pages        # minutes and 6 GiB of memory; writes docs/sizes.md
    python -m benchmarks.sizes --only 25M           # one model; what was measured of the others stays

Measured is the most resident memory of one weight update above that of the loaded weights, each in a process of its
own, on the CPU: AdamW's moments, the frozen start, gradients and whatever the update takes for a time. The moments and
the start come with a small update before; code that is loaded at first use comes with one of a toy model.
"""

import argparse
import gc
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from benchmarks.throughput import larger_model
from dspy_fst.config import FSTConfig
from dspy_fst.memory import DISK, MEMORY, Available, Workload, model_size, plan_for
from dspy_fst.memory.arithmetic import HEAP, MicroBatchShape, Update, update_bytes
from dspy_fst.memory.bytes_by_part import TRAINED
from dspy_fst.memory.shape import ModelSize
from dspy_fst.recipe.lora_settings import LoRA
from dspy_fst.run.files import write_json
from dspy_fst.slow.batching import MicroBatch, completions
from dspy_fst.slow.trainer import Trainer
from dspy_fst.slow.training_settings import TrainingSettings
from dspy_fst.types import Batch, Row
from programs import smollm2
from programs.lab import BASE

RESULT = Path(__file__).parent / "results" / "sizes.json"
TOLERANCE = 0.15
"""Largest gap between what is computed and what was measured."""


@dataclass(frozen=True)
class Case:
    """One update to measure."""

    model: str
    """``"1M"``, ``"25M"`` or ``"135M"``."""
    kl: bool
    micro_batch_tokens: int
    rows: int
    prompt: int
    completion: int
    share: int = 1
    """Rows that have a prompt in common."""
    precision: str = "float32"
    recompute: bool = False
    """Gradient checkpointing."""
    lora: bool = False


CASES = [
    *(Case("1M", kl, 4096, 64, 64, 64) for kl in (True, False)),
    Case("1M", True, 4096, 128, 64, 64, share=8),
    *(Case("25M", kl, 2048, 32, 64, 64) for kl in (True, False)),
    Case("25M", False, 2048, 64, 64, 64, share=8),
    Case("25M", False, 2048, 32, 124, 4, precision="bfloat16"),
    *(Case("135M", kl, 512, 8, 64, 64) for kl in (True, False)),
    *(Case("25M", True, 2048, 32, 64, 64, share, recompute=True) for share in (1, 8)),
    Case("25M", True, 2048, 32, 64, 64, lora=True),
    Case("25M", True, 2048, 32, 64, 64, recompute=True, lora=True),
]
"""Two micro-batches or more each: the gradients of the first are there when the second is read."""


# ---- in a process of its own ------------------------------------------------------------------------


def measure(case: Case, folder: Path) -> dict[str, Any]:
    """Bytes of one update above the loaded weights, and what its largest micro-batch was made of."""
    _warm(case)
    gc.collect()
    libraries = _status("VmRSS")
    trainer = Trainer(folder, _settings(case), device="cpu")
    gc.collect()
    loaded = _status("VmRSS")
    trainer.step(_batch(_rows(1, 4, 4, 1, trainer.vocabulary)))
    gc.collect()
    rows = _rows(case.rows, case.prompt, case.completion, case.share, trainer.vocabulary)
    readings = [_reading(micro) for micro in trainer._micro_batches(completions(rows))]
    Path("/proc/self/clear_refs").write_text("5")  # the highest mark begins anew
    trainer.step(_batch(rows))
    return {
        "libraries": libraries,
        "weights": loaded - libraries,
        "peak": _status("VmHWM") - loaded,
        "reading": asdict(max(readings, key=lambda batch: batch.read)),
    }


def _warm(case: Case) -> None:
    with tempfile.TemporaryDirectory() as folder:
        config = AutoConfig.from_pretrained(BASE)
        config.update({"hidden_size": 32, "num_hidden_layers": 2, "layer_types": ["full_attention"] * 2})
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        AutoTokenizer.from_pretrained(BASE).save_pretrained(folder)
        Trainer(folder, _settings(case), device="cpu").step(_batch(_rows(4, 32, 32, 2, config.vocab_size)))


def _settings(case: Case) -> TrainingSettings:
    return TrainingSettings(
        learning_rate=1e-6,
        kl_coefficient=0.1 if case.kl else 0.0,
        min_effective_share=0.0,  # the rows are made up
        micro_batch_tokens=case.micro_batch_tokens,
        precision=case.precision,  # type: ignore[arg-type]
        gradient_checkpointing=case.recompute,
        adapter=LoRA() if case.lora else None,
    )


def _rows(count: int, prompt: int, completion: int, share: int, vocabulary: int) -> list[Row]:
    """Random texts: memory does not depend on what they say."""
    draws = torch.Generator().manual_seed(0)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(2, vocabulary, (length,), generator=draws).tolist())

    prompts = [ids(prompt) for _ in range(0, count, share)]
    weight, scores = 1 / (count * completion), (-6.0,) * completion
    return [Row(prompts[i // share], ids(completion), scores, 1.0, weight, 1.0, "answer", i) for i in range(count)]


def _batch(rows: Sequence[Row]) -> Batch:
    return Batch(tuple(rows), "step-000000")


def _reading(micro: MicroBatch) -> MicroBatchShape:
    blocks = micro.tree.blocks if micro.tree else ()
    kept = max((block.keys.numel() for block in blocks if block.mask is not None), default=0)
    masked = max((block.mask.numel() for block in blocks if block.mask is not None), default=0)
    return MicroBatchShape(micro.tokens_read, sum(micro.tokens), kept, masked)


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


# ---- against the arithmetic ---------------------------------------------------------------------------


def computed(size: ModelSize, case: Case, batch: MicroBatchShape) -> int:
    """What `sizes` says of the same update, the weights left out."""
    recipe = FSTConfig.model_validate(
        {
            "kl_coefficient": 0.1 if case.kl else 0.0,
            "precision": case.precision,
            "adapter": "lora" if case.lora else None,
        }
    )
    plan = plan_for(Workload(case.model, size, "in_process"), recipe, Available({MEMORY: 0, DISK: 0}))
    held = next(
        sum(size for name, size in allocation.made_of if name not in ("frozen base", TRAINED))
        for requirement in plan.requirements
        for allocation in requirement.allocations
        if allocation.part == "the trainer"
    )
    update = Update(case.kl, case.precision == "bfloat16", recompute=case.recompute, frozen=case.lora)
    return held + round(HEAP * update_bytes(size, batch, update))


def measured_table(results: Sequence[dict[str, Any]]) -> str:
    """Markdown: measured beside computed."""
    head = ["model", "trained", "precision", "KL", "checkpointing", "tokens read", "scored", "replies to a prompt"]
    head += ["measured", "computed", "gap"]
    lines = [head, ["---"] * len(head), *map(_line, results)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _line(row: dict[str, Any]) -> list[str]:
    case, batch = Case(**row["case"]), MicroBatchShape(**row["reading"])
    told = computed(ModelSize(**row["size"]), case, batch)
    return [
        case.model,
        "LoRA" if case.lora else "all",
        case.precision,
        "on" if case.kl else "off",
        "on" if case.recompute else "off",
        f"{batch.read:,}",
        f"{batch.scored:,}",
        str(case.share),
        f"{row['peak'] / 2**20:,.0f} MiB",
        f"{told / 2**20:,.0f} MiB",
        f"{told / row['peak'] - 1:+.0%}",
    ]


# ---- the command ----------------------------------------------------------------------------------------


def folders(scratch: Path) -> Iterator[tuple[str, Path]]:
    yield "1M", BASE
    yield "25M", larger_model(scratch / "25M")
    if smollm2.available():
        yield "135M", smollm2.folder()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="a model to measure, the others' results stay")
    parser.add_argument("--case", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.case:
        print(json.dumps(measure(Case(**json.loads(options.case[0])), Path(options.case[1]))))
        return
    _measure_all(options.only)


def _measure_all(only: str) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        found = dict(folders(Path(scratch)))
        results = [row for row in _earlier() if only and row["case"]["model"] != only]
        for case in CASES:
            if case.model in found and only in ("", case.model):
                results.append(_measured(case, found[case.model]))
                write_json(RESULT, sorted(results, key=lambda row: CASES.index(Case(**row["case"]))))


def _earlier() -> list[dict[str, Any]]:
    return json.loads(RESULT.read_text()) if RESULT.is_file() else []


def _measured(case: Case, folder: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.sizes", "--case", json.dumps(asdict(case)), str(folder)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=900, check=True)
    size = model_size(folder)
    assert size is not None
    row = {"case": asdict(case), "size": asdict(size), **json.loads(ended.stdout.splitlines()[-1])}
    print(" ".join(_line(row)), file=sys.stderr)
    return row


if __name__ == "__main__":
    main()
