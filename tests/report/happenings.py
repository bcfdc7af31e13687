"""Events made by hand: what a run writes, with numbers that can be checked by hand."""

from typing import Any

from dspy_fst.config import FSTConfig
from dspy_fst.types import Candidate

UPDATE: dict[str, Any] = {
    "seed_tokens": 0,
    "loss": -0.1,
    "grad_norm": 0.5,
    "kl_to_start": 0.0,
    "entropy": 0.3,
    "capped_share": 0.0,
    "mean_log_ratio": 0.0,
    "max_log_ratio": 1e-5,
    "effective_sample_share": 1.0,
    "learning_rate": 1e-6,
    "tokens": 90,
    "rows": 30,
    "sequences": 20,
    "row_tokens": 900,
    "tokens_read": 300,
    "optimizer_steps": 1,
    "later_log_ratio": None,
    "skipped": None,
}
COUNTS = {"groups": 4, "live_groups": 3, "flat_groups": 1, "unmeasured_groups": 0, "rollouts": 32}


def texts(said: str) -> dict[str, str]:
    return {"solve": said}


def digest(said: str) -> str:
    return Candidate(texts(said)).digest


def plan(**changes: Any) -> dict[str, Any]:
    budget = {"searches": 2, "search_rollouts": 40, "scoring_rollouts": 8, "training_rollouts": 128, "updates": 4}
    config = FSTConfig(cycles=2, **changes).model_dump(mode="json")
    return {"event": "plan", "config": config, "budget": budget, "tokens_per_rollout": 5.0}


def cycle(
    number: int, scores: dict[str, float | None], parents: dict[str, list[str]], population: list[str], **changes: Any
) -> dict[str, Any]:
    """A search: instruction -> anchor score, instruction -> its parents' instructions, and who was chosen."""
    report = {
        "cycle": number,
        "scores": [scores[said] for said in population],
        "population": [digest(said) for said in population],
        "rollouts": 20,
        "repeats": 3,
        "reflections": 5,
        "proposals_accepted": 2,
        "sampled_tokens": 100,
        "counts": {},
        "seconds": 2.0,
    }
    return {
        "event": "cycle",
        "report": report | changes,
        "candidates": [{"digest": digest(s), "texts": texts(s), "score": score} for s, score in scores.items()],
        "parents": {digest(said): [digest(parent) for parent in of] for said, of in parents.items()},
    }


def predictor(**changes: Any) -> dict[str, Any]:
    """What a step's report tells of one predictor."""
    counts = {"calls": 32, "tokens": 64, "truncated": 0, "unparsed": 0, "rows": 0, "positive_rows": 0, "flat_groups": 0}
    return {**counts, "advantage": None, "score": None, **changes}


def step(
    number: int,
    reward: float | None,
    *,
    lost: dict[str, int] | None = None,
    predictors: dict[str, dict[str, Any]] | None = None,
    **update: Any,
) -> dict[str, Any]:
    report = {
        "step": number,
        "cycle": number // 2,
        "reward": reward,
        "counts": COUNTS | (lost or {}),
        "update": UPDATE | update,
        "sampled_tokens": 160,
        "prompt_tokens": 640,
        "prompt_tokens_read": 200,
        "reply_deciles": [1.0, 1.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 3.0, 3.0, 4.0],
        "seconds": {"sampling": 3.0, "update": 1.0, "publish": 0.5},
    }
    return {"event": "step", "report": report | ({} if predictors is None else {"predictors": predictors})}


def trajectories(number: int, said: str, *, best: dict[str, Any] | None = None, **worst: Any) -> dict[str, Any]:
    module = {"name": "solve", "inputs": {"numbers": "1 2 3"}, "outputs": {"answer": "3 2 1"}}
    rollout = {
        "problem": 7,
        "candidate": digest(said),
        "reward": 1.0,
        "feedback": "Right.",
        "mask": None,
        "failure": None,
        "tokens": 5,
        "modules": [module],
    }
    fails = {
        "reward": 0.0,
        "feedback": "Expected 3 2 1.",
        "failure": "parse",
        "modules": [{"name": "solve", "inputs": {"numbers": "1 2 3"}, "reply": "I will not say."}],
    }
    return {
        "event": "trajectories",
        "step": number,
        "rollouts": [rollout | (best or {}), rollout | fails | worst],
    }


def done(population: list[str], scores: list[float | None], validation: dict[str, float]) -> dict[str, Any]:
    return {
        "event": "done",
        "population": {"members": [texts(said) for said in population], "scores": scores, "parents": {}},
        "validation": {digest(said): score for said, score in validation.items()},
        "weights": "step-000004",
    }


SEED, CHILD, OTHER, LATE = "Solve it.", "Solve it step by step.", "Answer it.", "Solve it step by step. Be brief."


def timed(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The events, ten seconds apart."""
    return [{**event, "time": 1_800_000_000.0 + 10 * place} for place, event in enumerate(events)]


def whole_run() -> list[dict[str, Any]]:
    """Two cycles of two updates; the second step's batch was empty, the third lost rollouts."""
    return timed(
        [
            plan(learning_rate=1e-5),
            {"event": "note", "text": "warning: the 4 updates all lie in the warm-up"},
            cycle(0, {SEED: 0.25, CHILD: 0.5, OTHER: 0.125}, {CHILD: [SEED], OTHER: [SEED]}, [CHILD, CHILD]),
            step(0, 0.25),
            trajectories(0, CHILD),
            step(1, 0.5, tokens=0, rows=0, sequences=None, grad_norm=0.0, entropy=0.0, effective_sample_share=None),
            trajectories(1, CHILD),
            cycle(1, {CHILD: 0.625, LATE: 0.75}, {LATE: [CHILD]}, [LATE, CHILD], counts={"failed: parse": 2}),
            step(2, None, lost={"masked: timeout": 3, "failed: parse": 1}, kl_to_start=0.01),
            {"event": "warning", "step": 2, "text": "step 2: entropy is low"},
            trajectories(2, LATE, reward=None, mask="timeout", failure=None, modules=[]),
            step(3, 0.75, kl_to_start=0.02, mean_log_ratio=None),
            trajectories(3, LATE),
            done([LATE, CHILD], [0.875, 0.75], {LATE: 0.875, CHILD: 0.75}),
        ]
    )
