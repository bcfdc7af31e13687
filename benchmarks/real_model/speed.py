"""What bfloat16 brings on this machine: rollouts and updates in both precisions, in turns."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from benchmarks.real_model.runs import MAX_TOKENS, OPTIONS, RECIPE, Engine, Precision
from benchmarks.real_model.shares import play
from benchmarks.throughput import ratio
from dspy_fst import PolicyLM
from dspy_fst.slow.credit import credit
from dspy_fst.slow.trainer import Trainer
from dspy_fst.slow.training_settings import TrainingSettings
from dspy_fst.types import Batch, Group, Rollout
from programs import smollm2

ROLLOUTS = 8
FEATURES = ("avx512_bf16", "amx_bf16", "avx512f")
"""Flags of /proc/cpuinfo that decide how a CPU multiplies bfloat16."""


def cpu_features() -> dict[str, bool]:
    """Which of FEATURES this CPU has; empty where there is no /proc/cpuinfo."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    flags = next((set(line.split()) for line in lines if line.startswith("flags")), None)
    return {} if flags is None else {feature: feature in flags for feature in FEATURES}


def policy(engine: Engine, precision: Precision) -> PolicyLM:
    """SmolLM2 on an engine that computes in this precision."""
    options = {**OPTIONS[engine], "dtype": precision}
    return PolicyLM(smollm2.folder(), engine=engine, max_tokens=MAX_TOKENS, engine_options=options)


def rollouts(engine: Engine, repeats: int) -> list[float]:
    """Rollouts a second in bfloat16 over those in float32, on the same prompts; one ratio a repeat."""
    with ExitStack() as stack:

        def rollouter(precision: Precision) -> Callable[[], list[Rollout]]:
            speaker = policy(engine, precision)
            stack.callback(speaker.release)
            speaker.handle.ready()
            return lambda: play(speaker, "JSONAdapter", 2, ROLLOUTS)

        return ratio(rollouter("float32"), rollouter("bfloat16"), repeats)


def updates(rollouts: Sequence[Rollout], repeats: int) -> list[float]:
    """Time of a float32 update over that of a bfloat16 one, on the same rows; one ratio a repeat."""
    batch = paid_in_turns(rollouts)

    def updater(precision: Precision) -> Callable[[], object]:
        settings = TrainingSettings(
            learning_rate=1e-7,
            kl_coefficient=0.0,  # two trainers with a reference each would not fit into 8 GB
            micro_batch_tokens=RECIPE["micro_batch_tokens"],
            min_effective_share=0.0,  # the same rows again and again
            precision=precision,
        )
        trainer = Trainer(smollm2.folder(), settings, device="cpu")
        return lambda: trainer.step(batch)

    return ratio(updater("float32"), updater("bfloat16"), repeats)


def paid_in_turns(rollouts: Sequence[Rollout]) -> Batch:
    """The rows of these rollouts as one group each four, in which every second one was right: all have a gradient."""
    fours = [rollouts[start : start + 4] for start in range(0, len(rollouts), 4)]
    groups = [
        Group(index, tuple(replace(r, reward=float(i % 2), problem=index) for i, r in enumerate(four)))
        for index, four in enumerate(fours)
    ]
    return credit(groups)
