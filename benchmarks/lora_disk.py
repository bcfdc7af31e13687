"""What a step writes to disk with whole weights and with a LoRA adapter, beside an older version.

    python -m benchmarks.lora_disk --before OTHER_CHECKOUT --out benchmarks/results/lora_disk.json

Counted is every byte that the process hands to the system to write (Linux: ``wchar`` of /proc/self/io), so what is
pruned later counts. Each case is a process of its own. Two kinds of cases:

- A run on the laboratory's base (1M parameters), with weights, state, events and reports: the bytes of a run of ten
  steps less those of a run of two, a step.
- What a step writes of SmolLM2-135M: the version, and the state with AdamW's moments.
"""

import argparse
import json
import os
import tempfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

FEW, MANY = 2, 10
BEFORE, WHOLE = "whole weights before", "whole weights"
CASES: dict[str, dict[str, Any]] = {
    BEFORE: {},
    WHOLE: {},
    "LoRA rank 4": {"rank": 4},
    "LoRA rank 16": {"rank": 16},
    "LoRA rank 16, a state every 4 steps": {"rank": 16, "every": 4},
}


def written() -> int:
    """Bytes that this process has written so far."""
    lines = Path("/proc/self/io").read_text(encoding="utf-8").splitlines()
    return int(next(line for line in lines if line.startswith("wchar")).split()[1])


def settings(case: Mapping[str, Any]) -> dict[str, Any]:
    if "rank" not in case:
        return {}
    from dspy_fst.recipe.lora_settings import LoRA

    return {"adapter": LoRA(rank=case["rank"])}


def even(example: object, prediction: Any, *rest: object, **named: object) -> float:
    """A score that two replies seldom share, so that each step moves the weights."""
    return zlib.crc32(str(prediction.toDict()).encode()) % 8 / 7


def run_of(steps: int, case: Mapping[str, Any], folder: Path) -> int:
    """Bytes that a run of the laboratory writes."""
    from dspy_fst import FSTOptimizer, PolicyLM
    from programs.lab import BASE, build

    lab, before = build(train=16, val=4, test=4), written()
    lab.program.set_lm(PolicyLM(BASE, engine="in_process", max_tokens=24))
    optimizer = FSTOptimizer(
        metric=even,
        run_dir=folder / f"run-{steps}",
        method="rl",
        cycles=1,
        steps_per_cycle=steps,
        problems_per_step=6,
        group_size=4,
        learning_rate=1e-3,
        checkpoint_every=case.get("every", 1),
        progress=False,
        **settings(case),
    )
    optimizer.compile(lab.program, trainset=lab.trainset, valset=lab.valset)
    assert (folder / f"run-{steps}" / "weights" / f"step-{steps:06d}").is_dir(), "an update did not move the weights"
    return written() - before


def step_of(source: str, case: Mapping[str, Any], folder: Path) -> float:
    """Bytes that a step writes of a model, without the events."""
    from dspy_fst.slow.trainer import Trainer

    try:
        from dspy_fst.slow.training_settings import TrainingSettings
    except ImportError:  # before
        from dspy_fst.slow.settings import TrainerSettings as TrainingSettings  # type: ignore[import-not-found, no-redef]

    trainer: Any = Trainer(source, TrainingSettings(learning_rate=1e-6, **settings(case)), device="cpu")
    for parameter in trainer.parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    trainer._optimizer.step()  # makes the moments
    steps = case.get("every", 1)
    trainer.publish(folder / "weights" / "step-000000", "step-000000")  # the base is written once
    before = written()
    for step in range(1, steps + 1):
        trainer.publish(folder / "weights" / f"step-{step:06d}", f"step-{step:06d}")
    trainer.save_state(folder / "state")
    return (written() - before) / steps


def measure(case: Mapping[str, Any]) -> dict[str, float]:
    folder = Path(case["place"])
    of_runs = [run_of(steps, case, folder) for steps in (FEW, MANY)]
    return {
        "laboratory": round((of_runs[1] - of_runs[0]) / (MANY - FEW)),
        "SmolLM2-135M": round(step_of(case["source"], case, folder)),
    }


def in_a_process(case: Mapping[str, Any], checkout: Path) -> dict[str, float]:
    """A case by the package in ``checkout``."""
    from benchmarks.in_checkout import measured

    with tempfile.TemporaryDirectory() as place:
        return measured(__file__, {**case, "place": place}, checkout)[0]


def main() -> None:
    if case := os.environ.get("BENCHMARK_CASE"):
        print(json.dumps(measure(json.loads(case))))
        return
    from programs import smollm2

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, required=True, help="a checkout of the version to compare with")
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    here, source = Path(__file__).resolve().parent.parent, str(smollm2.folder())
    found = {
        name: in_a_process({**case, "source": source}, asked.before.resolve() if name == BEFORE else here)
        for name, case in CASES.items()
    }
    shares = {
        name: {model: round(size / found[BEFORE][model], 4) for model, size in sizes.items()}
        for name, sizes in found.items()
    }
    result = {"bytes a step": found, "share of a step before": shares}
    asked.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(asked.out.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
