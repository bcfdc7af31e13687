"""Whether the check after a publish passes sound weights and catches others, on SmolLM2-135M-Instruct.

    python -m benchmarks.sync --precisions bfloat16 float32

On each engine and in each precision the trainer makes a real update at 1e-6 and publishes. Sound weights are checked
on texts that the seed draws. Then the engine loads a folder with a fault while the published weights are expected: the
version before (stale), its head alone, one layer of it (the seed's), or one tensor times 1.001 (the seed's; scaled in
float32, as every bfloat16 number times 1.001 rounds back to itself). Caught means refused with the tensor's name.

Beside it stands the former check (commit 845e963) on the same weights: the largest gap on four sequences of 24 random
ids, limits 2e-3 (float32) and 0.3 (bfloat16) nats.
"""

import argparse
import gc
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import dspy
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor

from dspy_fst.engine.base import Checkpoint, Engine, Holding
from dspy_fst.engine.in_process import InProcessEngine
from dspy_fst.engine.options import InProcessSettings
from dspy_fst.engine.verification import MEAN_GAP_LIMITS, verify_identity, verify_numbers
from dspy_fst.engine.vllm.server_settings import VLLMSettings
from dspy_fst.engine.vllm.supervisor import Supervisor
from dspy_fst.errors import SyncError
from dspy_fst.run.files import read_json, write_json
from dspy_fst.slow.trainer import Trainer
from dspy_fst.slow.training_settings import TrainingSettings
from dspy_fst.types import Batch, Row
from programs import smollm2
from programs.smollm2.moods import HAPPY, SAD, Mood

RESULT = Path(__file__).parent / "results" / "sync.json"
MOODS = ("happy", "sad")
FORMER_LIMITS = {"float32": 2e-3, "bfloat16": 0.3}
POOL, DRAWN = 16, 8
"""Texts of natural language, and how many of them a seed draws."""
Scores = list[list[float]]
Fault = Callable[[dict[str, Tensor], Mapping[str, Tensor]], list[str]]
"""(published tensors, those before) -> names of what it changed in the first."""


@dataclass
class Bench:
    """One precision: the versions before and after a real update on disk, and the trainer's scores after it."""

    precision: str
    folder: Path
    seeds: int
    trainer: Trainer = field(init=False)
    pool: list[list[int]] = field(init=False)
    before: Checkpoint = field(init=False)
    after: Checkpoint = field(init=False)
    scores: Scores = field(init=False)
    former: Scores = field(init=False)
    """Of each seed's four sequences of random ids in turn."""
    scaled: dict[str, Tensor] = field(default_factory=dict)
    """Each seed's tensor times 1.001 in float32."""

    def __post_init__(self) -> None:
        settings = TrainingSettings(
            learning_rate=1e-6,
            warmup_steps=0,
            kl_coefficient=0.0,
            min_effective_share=0.0,  # its rows are texts that it did not sample
            precision=self.precision,  # type: ignore[arg-type]
        )
        self.trainer = Trainer(smollm2.folder(), settings, device="cpu")
        self.pool = texts(self.trainer.tokenizer)
        self.before = self.trainer.publish(self.folder / "step-0", "step-0")
        self.trainer.step(batch(self.trainer, self.pool))
        self.after = self.trainer.publish(self.folder / "step-1", "step-1")
        self.scores = self.trainer.score(self.pool)
        self.former = self.trainer.score([ids for seed in range(self.seeds) for ids in self.random_ids(seed)])
        for seed in range(self.seeds):
            name = self.tensor_of(seed)
            self.scaled[name] = self.trainer.parameters[name].detach() * 1.001

    def random_ids(self, seed: int) -> list[list[int]]:
        draw = random.Random(f"{seed} probes")
        return [[draw.randrange(self.trainer.vocabulary) for _ in range(24)] for _ in range(4)]

    def tensor_of(self, seed: int) -> str:
        names = [name for name in self.trainer.parameters if "embed" not in name]
        return names[seed * len(names) // self.seeds]

    def layer_of(self, seed: int) -> str:
        layers = self.trainer._policy.model.config.num_hidden_layers
        return f"model.layers.{seed * layers // self.seeds}."


def texts(tokenizer: Any) -> list[list[int]]:
    """Prompts of a program, with the reply that it wants."""
    pool = []
    labelled = [
        (sentence, mood) for pair in zip(HAPPY, SAD, strict=True) for sentence, mood in zip(pair, MOODS, strict=True)
    ]
    for sentence, mood in labelled[:POOL]:
        messages = dspy.ChatAdapter().format(Mood, [], {"sentence": sentence})
        reply = f"[[ ## mood ## ]]\n{mood}\n\n[[ ## completed ## ]]"
        said = [messages[-1], {"role": "assistant", "content": reply}]  # the system prompt is the same for all
        pool.append(list(tokenizer.apply_chat_template(said, return_dict=True)["input_ids"]))
    return pool


def batch(trainer: Trainer, pool: Sequence[Sequence[int]]) -> Batch:
    """Some replies, half of them better than the other half."""
    chosen = list(pool)[::3]
    scores = trainer.score(chosen)
    rows = [
        Row(tuple(ids[:-20]), tuple(ids[-20:]), tuple(score[-20:]), 1.0 if index % 2 else -1.0, 1 / (20 * len(chosen)))
        for index, (ids, score) in enumerate(zip(chosen, scores, strict=True))
    ]
    return Batch(tuple(rows), "step-0")


# ---- faults -------------------------------------------------------------------------------------


FAULTS = {
    "stale by one update at 1e-6": False,
    "the head left behind": False,
    "one layer left behind": True,
    "one tensor times 1.001": True,
}
"""What is served -> whether the seed chooses where."""


def faults(bench: Bench, seed: int) -> dict[str, Fault]:
    def stale(tensors: dict[str, Tensor], before: Mapping[str, Tensor]) -> list[str]:
        changed = [name for name in tensors if not tensors[name].equal(before[name])]
        tensors.update(before)
        return changed

    def part(prefix: str) -> Fault:
        def left_behind(tensors: dict[str, Tensor], before: Mapping[str, Tensor]) -> list[str]:
            names = [name for name in tensors if name.startswith(prefix) and not tensors[name].equal(before[name])]
            tensors.update({name: before[name] for name in names})
            return names

        return left_behind

    def scaled(tensors: dict[str, Tensor], before: Mapping[str, Tensor]) -> list[str]:
        name = bench.tensor_of(seed)
        tensors[name] = bench.scaled[name].to(tensors[name].dtype)
        return [name]

    made = (stale, part("lm_head"), part(bench.layer_of(seed)), scaled)
    return dict(zip(FAULTS, made, strict=True))


def faulty(bench: Bench, fault: Fault, place: Path) -> tuple[Checkpoint, list[str]]:
    """A folder with the fault, and the tensors in which it is not the published one."""
    tensors = load_file(bench.after.path / "model.safetensors")
    names = fault(tensors, load_file(bench.before.path / "model.safetensors"))
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(bench.after.path, place, ignore=shutil.ignore_patterns("*.safetensors"))
    save_file({name: t.contiguous() for name, t in tensors.items()}, place / "model.safetensors", {"format": "pt"})
    return replace(bench.after, path=place), names


# ---- one engine ---------------------------------------------------------------------------------


def measure(bench: Bench, engine: Engine) -> dict[str, Any]:
    """Rows: what is served -> of how many seeds each check judged it rightly."""
    seeds = range(bench.seeds)
    engine.load(bench.before)
    engine.load(bench.after)
    sound = held(engine, bench.after)
    scored = engine.score(bench.pool)
    gaps = [mean_gap(bench, scored, seed) for seed in seeds]
    limit = MEAN_GAP_LIMITS[bench.precision]
    identical = refused(sound, bench.after) is None
    rows: dict[str, Any] = {
        "sound": {
            "right": sum(identical and gap <= limit for gap in gaps),
            "former": sum(not refused_formerly(bench, engine, seed) for seed in seeds),
            "gaps": gaps,
        }
    }
    seconds = []
    for what, varies in FAULTS.items():
        row = rows[what] = {"right": 0, "former": 0, "tensors": []}
        for seed in seeds:
            if seed == 0 or varies:  # else the same fault for all: only the texts of the former check differ
                served, names = faulty(bench, faults(bench, seed)[what], bench.folder / "faulty")
                engine.load(served)
                began = time.perf_counter()
                found = held(engine, bench.after)
                seconds.append(time.perf_counter() - began)
            row["right"] += caught(found, bench.after, names)
            row["former"] += refused_formerly(bench, engine, seed)
            row["tensors"].append(len(names))
    return {"rows": rows, "seconds": statistics.median(seconds), "seeds": bench.seeds}


def held(engine: Engine, checkpoint: Checkpoint) -> Holding:
    holding = engine.held(checkpoint)
    assert holding is not None
    return holding


def refused(found: Holding, right: Checkpoint) -> str | None:
    """The check's error; None when it passes the weights."""
    try:
        verify_identity(found, right)
    except SyncError as error:
        return str(error)
    return None


def caught(found: Holding, right: Checkpoint, names: Sequence[str]) -> bool:
    """Whether the weights are refused, by name, and for exactly the tensors that differ."""
    error = refused(found, right)
    return error is not None and set(found.wrong) == set(names) and min(names) in error


def mean_gap(bench: Bench, scored: Scores, seed: int) -> float:
    chosen = random.Random(f"{seed} texts").sample(range(len(bench.pool)), DRAWN)
    mine, trained = [scored[i] for i in chosen], [bench.scores[i] for i in chosen]
    return verify_numbers(mine, trained, tolerance=float("inf"), version="")


def refused_formerly(bench: Bench, engine: Engine, seed: int) -> bool:
    scored, trained = engine.score(bench.random_ids(seed)), bench.former[4 * seed : 4 * seed + 4]
    gaps = [abs(a - b) for x, y in zip(scored, trained, strict=True) for a, b in zip(x, y, strict=True)]
    return not max(gaps) <= FORMER_LIMITS[bench.precision]


def engines(precision: str, only: Sequence[str], log: Path) -> Iterator[tuple[str, Engine]]:
    if "in_process" in only:
        yield "in_process", InProcessEngine(InProcessSettings(dtype=precision, device="cpu"))
    if "vllm" in only:
        yield "vllm", Supervisor(VLLMSettings(dtype=precision, cpu_kv_cache_gib=1, max_model_len=512, log_path=log))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precisions", nargs="+", default=["bfloat16", "float32"], choices=list(MEAN_GAP_LIMITS))
    parser.add_argument("--engines", nargs="+", default=["in_process", "vllm"])
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args(arguments)
    results: dict[str, Any] = read_json(options.out) if options.out.exists() else {}
    for precision in options.precisions:
        with tempfile.TemporaryDirectory() as folder:
            bench = Bench(precision, Path(folder), options.seeds)
            for name, engine in engines(precision, options.engines, Path(folder) / "vllm.log"):
                try:
                    results[f"{name}, {precision}"] = measure(bench, engine)
                finally:
                    engine.close()
                write_json(options.out, results)
                show(results)
            del bench
            gc.collect()


def show(results: Mapping[str, Any]) -> None:
    table = Table(title="judged rightly, of the seeds")
    for column in ("engine, precision", "what is served", "this check", "the former one"):
        table.add_column(column)
    for name, result in results.items():
        for what, row in result["rows"].items():
            table.add_row(name, what, f"{row['right']} of {result['seeds']}", f"{row['former']} of {result['seeds']}")
    Console().print(table)


if __name__ == "__main__":
    main()
