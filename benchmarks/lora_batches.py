"""What it saves to sample calls of two LoRA adapters in one batch in process, beside one batch for each adapter.

    python -m benchmarks.lora_batches --repeats 5 --out benchmarks/results/lora_batches.json

Eight calls go through each adapter. Both ways sample the same tokens. The seconds are those of the CPU, one thread,
both ways in turn. Prompts have 120 tokens and replies 32 on SmolLM2-135M, and 40 and 32 on the laboratory's base.
"""

import argparse
import json
import statistics
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.lora_publish import move
from dspy_fst.engine.generation import Pending, Reply, generate
from dspy_fst.engine.in_process import InProcessEngine
from dspy_fst.engine.options import InProcessSettings
from dspy_fst.recipe.lora_settings import LoRA
from dspy_fst.slow.trainer import Trainer
from dspy_fst.slow.training_settings import TrainingSettings
from programs import smollm2
from programs.lab import BASE

ADAPTERS, ROWS, REPLY_TOKENS = ("one", "two"), 8, 32


def calls(prompt_tokens: int, vocabulary: int) -> list[Pending]:
    draw = torch.Generator().manual_seed(0)
    shape = (len(ADAPTERS) * ROWS, prompt_tokens)
    prompts = torch.randint(5, vocabulary, shape, generator=draw).tolist()
    return [
        Pending(tuple(prompt), REPLY_TOKENS, 1.0, seed, ADAPTERS[seed % len(ADAPTERS)])
        for seed, prompt in enumerate(prompts)
    ]


def sampled(engine: InProcessEngine, waiting: list[Pending], *, mixed: bool) -> tuple[float, dict[int, Reply]]:
    """Seconds of the CPU, and the replies by seed. No token ends a reply, so all have one length."""
    began, replies = time.process_time(), dict[int, Reply]()
    batches = [waiting] if mixed else [[call for call in waiting if call.adapter == adapter] for adapter in ADAPTERS]
    for batch in batches:
        with engine._using_those_of(batch):
            made = generate(engine._decoder, frozenset(), batch)
        replies |= {call.seed: reply for call, reply in zip(batch, made, strict=True)}
    return time.process_time() - began, replies


def measure(source: Path, prompt_tokens: int, repeats: int) -> dict[str, Any]:
    groups = {name: name for name in ADAPTERS}
    trainer = Trainer(source, TrainingSettings(adapter=LoRA(rank=16)), device="cpu", adapters=groups)
    move(trainer, 0)
    waiting = calls(prompt_tokens, trainer.vocabulary)
    engine = InProcessEngine(InProcessSettings(device="cpu", dtype="float32"))
    with tempfile.TemporaryDirectory() as place:
        engine.load(trainer.publish(Path(place) / "weights" / "step-000000", "step-000000"))
    assert engine._mixes
    seconds: dict[bool, list[float]] = {False: [], True: []}
    gap = 0.0
    for repeat in range(repeats + 1):
        made = {}
        for mixed in seconds:
            spent, made[mixed] = sampled(engine, waiting, mixed=mixed)
            if repeat:  # the first is a warm-up
                seconds[mixed].append(round(spent, 3))
        for one, other in zip(made[True].values(), (made[False][seed] for seed in made[True]), strict=True):
            assert one.ids == other.ids
            gap = max(gap, *(abs(a - b) for a, b in zip(one.logprobs, other.logprobs, strict=True)))
    engine.close()
    share = statistics.median(one / other for one, other in zip(seconds[True], seconds[False], strict=True))
    return {
        "one batch, seconds": seconds[True],
        "two batches, seconds": seconds[False],
        "share": round(share, 3),
        "largest gap of a log-probability": gap,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, Any] = {name: version(name) for name in ("torch", "transformers", "peft")}
    result["SmolLM2-135M-Instruct"] = measure(smollm2.folder(), 120, asked.repeats)
    result["laboratory's base, 1M"] = measure(BASE, 40, asked.repeats)
    asked.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(asked.out.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
