"""What the package costs beside the work itself: ratios, measured side by side in one process.

    python -m benchmarks.throughput --repeats 5
    python -m benchmarks.throughput --only rollouts   # these alone, in some minutes; the other ratios are kept

1. program rollouts/s over the engine's own batch on the same prompts (both engines);
2. one CISPO update's tokens/s over ``trl.GRPOTrainer(loss_type="cispo")`` on the same rows and model;
3. publish and verify over writing the same bytes to disk;
4. the share of a run's wall time outside sampling and gradients.

Ratios only: absolute times on a shared machine mean nothing. 1 and 3 are measured on the laboratory's model of a
million parameters, where everything that is not the model weighs most, and on a random one of 25 million.
"""

import argparse
import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import httpx
import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from benchmarks.trl_side import TrlSide
from dspy_fst import FSTOptimizer, PolicyLM
from dspy_fst.engine.base import Engine
from dspy_fst.engine.generation import Pending, generate
from dspy_fst.engine.in_process import InProcessEngine
from dspy_fst.engine.verification import Expected, verify
from dspy_fst.policy_lm import policy_of
from dspy_fst.rollout.components import read_texts
from dspy_fst.rollout.reward import Reward
from dspy_fst.rollout.rollout_settings import RolloutSettings
from dspy_fst.rollout.rollouter import Rollouter
from dspy_fst.run.directory import read_events
from dspy_fst.run.files import write_json
from dspy_fst.slow.credit import credit
from dspy_fst.slow.trainer import Trainer
from dspy_fst.slow.training_settings import TrainingSettings
from dspy_fst.types import Batch, Group, Population, Problem
from programs.lab import BASE, FeedbackProposer, build

PROBLEMS, GROUP, MAX_TOKENS = 32, 8, 16
PARTS = ("rollouts", "update", "publish", "overhead")
RESULT = Path(__file__).parent / "results" / "throughput.json"


def timed(action: Callable[[], Any]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def ratio(reference: Callable[[], Any], ours: Callable[[], Any], repeats: int) -> list[float]:
    """Reference time over our time, in turns, so that both meet the same machine; 1 is equal, more is faster."""
    reference(), ours()  # warm
    return [timed(reference) / timed(ours) for _ in range(repeats)]


def larger_model(folder: Path) -> Path:
    """A random model of 25M parameters with the laboratory's tokenizer; its replies do not parse, but cost the same."""
    config = AutoConfig.from_pretrained(BASE)
    config.update({"hidden_size": 512, "num_hidden_layers": 8, "intermediate_size": 1536, "num_attention_heads": 8})
    config.update({"head_dim": 64, "layer_types": ["full_attention"] * 8})
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(BASE).save_pretrained(folder)
    return folder


# ---- 1. rollouts --------------------------------------------------------------------------------


def rollouts(kind: str, repeats: int, model: Path) -> list[float]:
    """Engine's own batch of the recorded prompts, over the program played from scratch."""
    lab = build()
    policy = PolicyLM(model, engine=kind, max_tokens=MAX_TOKENS)  # type: ignore[arg-type]
    lab.program.set_lm(policy)
    engine = policy.handle.ready()
    rollouter = Rollouter(lab.program, Reward(lab.metric), RolloutSettings(), engine.expect)
    problems = [Problem(i, example) for i, example in enumerate(lab.trainset[:PROBLEMS])]
    population = Population.of_seed(read_texts(lab.program), 4)
    draws = iter(range(1_000_000))

    def play() -> list[Group]:
        return rollouter.groups(problems, population, GROUP, f"draw {next(draws)}")

    own = own_batch(engine, play())
    result = ratio(own, play, repeats)
    policy.release()
    return result


def own_batch(engine: Engine, groups: Sequence[Group]) -> Callable[[], Any]:
    """The engine's fastest way to sample the same prompts once more, without DSPy and without our recording."""
    prompts = [call.prompt_ids for group in groups for rollout in group.rollouts for call in rollout.calls]
    if isinstance(engine, InProcessEngine):
        return lambda: generate(
            engine._decoder, engine._eos(), [Pending(p, MAX_TOKENS, 1.0, seed) for seed, p in enumerate(prompts)]
        )
    return vllm_batch(engine, prompts)


def vllm_batch(engine: Any, prompts: Sequence[tuple[int, ...]]) -> Callable[[], Any]:
    """vLLM's batched completions: token prompts in one request, the ids and log-probabilities asked for too."""
    address = engine.address
    client = httpx.Client(
        base_url=address.url, headers={"Authorization": f"Bearer {address.api_key}"}, trust_env=False, timeout=600
    )

    def complete() -> None:
        reply = client.post(
            "/v1/completions",
            json={
                "model": "policy",
                "prompt": [list(prompt) for prompt in prompts],
                "max_tokens": MAX_TOKENS,
                "temperature": 1.0,
                "logprobs": 0,
                "return_token_ids": True,
            },
        )
        reply.raise_for_status()
        assert len(reply.json()["choices"]) == len(prompts)

    return complete


# ---- 2. the update ------------------------------------------------------------------------------


def a_batch() -> tuple[Batch, list[Group]]:
    """A real batch: groups of the base model under the instruction that states the rule."""
    lab = build()
    policy = PolicyLM(BASE, engine="in_process", max_tokens=MAX_TOKENS)
    lab.program.set_lm(policy)
    lab.program.solve.signature = lab.program.solve.signature.with_instructions(lab.world.told)
    rollouter = Rollouter(lab.program, Reward(lab.metric), RolloutSettings(), policy.handle.ready().expect)
    problems = [Problem(i, example) for i, example in enumerate(lab.trainset[:PROBLEMS])]
    groups = rollouter.groups(problems, Population.of_seed(read_texts(lab.program), 4), GROUP, "batch")
    policy.release()
    return credit(groups), groups


def update(repeats: int) -> list[float]:
    """trl's GRPOTrainer step over ours, on the same rows; each does its loss, KL term, gradient and AdamW step."""
    batch, _ = a_batch()
    trainer = Trainer(BASE, TrainingSettings(learning_rate=1e-6))
    side = TrlSide(BASE, trainer.settings.kl_coefficient, len(batch.rows))
    parts = side.inputs(batch.rows, len(batch.rows))
    return ratio(lambda: side.update(parts), lambda: trainer.step(batch), repeats)


# ---- 3. publishing ------------------------------------------------------------------------------


def publish(kind: str, repeats: int, model: Path) -> list[float]:
    """Publish, load and verify, over writing and flushing the same bytes (time over time: less is better)."""
    trainer = Trainer(model, TrainingSettings(learning_rate=1e-6))
    engine = PolicyLM(model, engine=kind).handle.engine  # type: ignore[arg-type]
    probes = [[index + 5 for index in range(24)] for _ in range(4)]
    with tempfile.TemporaryDirectory() as folder:
        versions = (Path(folder) / f"v{number}" for number in range(1_000_000))
        engine.load(trainer.publish(next(versions), "first"))
        size = sum(file.stat().st_size for file in (Path(folder) / "v0").iterdir())
        data = os.urandom(size)

        def sync() -> None:
            path = next(versions)
            checkpoint = trainer.publish(path, path.name)
            engine.load(checkpoint)
            verify(engine, Expected(checkpoint, probes, trainer.score(probes), trainer.dtype))

        def write() -> None:
            with (next(versions)).open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())

        sync()
        ratios = [timed(sync) / timed(write) for _ in range(repeats)]
    engine.close()
    return ratios


# ---- 4. overhead --------------------------------------------------------------------------------


def overhead(repeats: int) -> dict[str, list[float]]:
    """Shares of a run's wall time: outside rollouts and updates, and outside the model's own work in them.

    The second leaves to sampling only the time in which the engine's model runs, and to gradients `Trainer.step`:
    DSPy, parsing, the metric and the threads count as overhead there.
    """
    outer, inner = [], []
    for seed in range(repeats):
        wall, phases, model = one_run(seed)
        outer.append(1 - phases / wall)
        inner.append(1 - model / wall)
    return {"rollouts and updates": outer, "the model's own work": inner}


def one_run(seed: int) -> tuple[float, float, float]:
    """Seconds of a short run from its plan to its end: all, in rollouts and updates, in the model."""
    busy = [0.0]

    def clocked(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            started = time.perf_counter()
            try:
                return method(*arguments, **named)
            finally:
                busy[0] += time.perf_counter() - started

        return call

    lab = build(seed=seed)
    lab.program.set_lm(PolicyLM(BASE, engine="in_process", max_tokens=MAX_TOKENS))
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(InProcessEngine, "_answer", clocked(InProcessEngine._answer)),
        mock.patch.object(Trainer, "step", clocked(Trainer.step)),
    ):
        optimizer = FSTOptimizer(
            metric=lab.metric,
            propose=FeedbackProposer(seed=seed),
            run_dir=Path(folder) / "run",
            cycles=2,
            anchors=32,
            search_rollouts=240,
            learning_rate=5e-4,
            seed=seed,
            progress=False,
        )
        compiled = optimizer.compile(lab.program, trainset=lab.trainset)
        events = read_events(Path(folder) / "run")
        policy_of(compiled).release()
    # From the plan on: loading models is paid once, whatever the length of the run.
    wall = events[-1]["time"] - next(event["time"] for event in events if event["event"] == "plan")
    phases = sum(event["report"]["seconds"] for event in events if event["event"] == "cycle")
    steps = [event["report"]["seconds"] for event in events if event["event"] == "step"]
    return wall, phases + sum(seconds["sampling"] + seconds["update"] for seconds in steps), busy[0]


# ---- the table ----------------------------------------------------------------------------------


def measured(parts: Sequence[str], engines: Sequence[str], repeats: int) -> Iterator[tuple[str, str, list[float]]]:
    """Each ratio of these parts: its name, its aim and its values."""
    with tempfile.TemporaryDirectory() as folder:
        models = {"1M": BASE, "25M": larger_model(Path(folder) / "larger")}
        sized = [*itertools.product(models.items(), engines)]
        for (size, model), engine in sized if "rollouts" in parts else ():
            name = f"program rollouts/s over the engine's own batch, {engine}, {size}"
            yield name, ">= 0.9", rollouts(engine, repeats, model)
        if "update" in parts:
            yield "CISPO update, tokens/s over trl's", ">= 2", update(repeats)
        for (size, model), engine in sized if "publish" in parts else ():
            name = f"publish + verify over writing the bytes, {engine}, {size}"
            yield name, "<= 3", publish(engine, repeats, model)
    if "overhead" in parts:
        for inside, shares in overhead(min(3, repeats)).items():
            yield f"share of wall time outside {inside}", "<= 0.05", shares


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", choices=PARTS, nargs="+", default=PARTS)
    parser.add_argument("--skip-vllm", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args(arguments)
    engines = ["in_process"] if options.skip_vllm else ["in_process", "vllm"]
    kept = options.only != PARTS and options.out.exists()
    rows: dict[str, dict[str, Any]] = json.loads(options.out.read_text()) if kept else {}
    for name, aim, values in measured(options.only, engines, options.repeats):
        rows[name] = {"aim": aim, "median": statistics.median(values), "values": values}
        Console(stderr=True).print(f"{name}: {statistics.median(values):.3g}")
    table = Table(title="ratios, measured side by side")
    for column in ("what", "aim", "median", "spread"):
        table.add_column(column)
    for name, row in rows.items():
        table.add_row(name, row["aim"], f"{row['median']:.3g}", f"{min(row['values']):.3g} - {max(row['values']):.3g}")
    Console().print(table)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(options.out, rows)
    print(json.dumps({name: round(row["median"], 3) for name, row in rows.items()}))


if __name__ == "__main__":
    main()
