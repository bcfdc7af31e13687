"""A run that goes on from the result of another: which run that was, and what is taken over of its optimizer.

The weights and the population are the compiled student's own. AdamW's moments and the number of updates stand in the
newest state of the run that it came from, and only there: a program that was saved elsewhere has none.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import dspy

from dspy_fst.config import FSTConfig
from dspy_fst.engine.base import Checkpoint
from dspy_fst.policy_lm import PolicyLM
from dspy_fst.preflight.program_checks import policies_of
from dspy_fst.recipe.lora_settings import SHARED, adapter_of
from dspy_fst.run.directory import COMPILED, is_run
from dspy_fst.run.files import read_json, to_jsonable
from dspy_fst.run.state import RunState, newest_state, peek_state, version_in
from dspy_fst.types import Population

if TYPE_CHECKING:
    from dspy_fst.slow.trainer import Trainer  # imports torch, which a refusal does not need

ASKED = "continue_optimizer=True"


def run_of(checkpoint: Checkpoint) -> Path | None:
    """The directory of the run that wrote these weights: they lie in its weights/ or its compiled/. Else None."""
    folder = checkpoint.folder
    within = folder.parent.name in ("weights", COMPILED)
    run_dir = folder.parent.parent
    return run_dir if folder.is_dir() and within and is_run(run_dir) else None


def optimizer_faults(config: FSTConfig, student: dspy.Module, policy: PolicyLM, run_dir: Path) -> list[str]:
    """Why the student's optimizer cannot be taken over, where the recipe wants it; a run under way has taken it."""
    if not config.continue_optimizer or peek_state(run_dir / "states"):
        return []
    if not _carries(student):
        return [f"{ASKED}: the student was not compiled, so no optimizer is there to go on with; leave it out"]
    before = run_of(policy.checkpoint)
    state = peek_state(before / "states") if before else None
    if before is None or state is None:
        return [
            f"{ASKED}: the student's weights lie in {policy.checkpoint.folder}, and an optimizer's state is only kept "
            f"in a run's directory; load the program from RUN_DIR/{COMPILED}, or leave it out"
        ]
    if (found := version_in(state.fields)) != policy.checkpoint.version:
        return [
            f"{ASKED}: the student speaks with the weights {policy.checkpoint.version}, and the state in {before} is "
            f"of {found}: its optimizer saw later updates; leave it out"
        ]
    recipe = read_json(before / "recipe.json")
    if (moments := recipe.get("optimizer", "adamw")) != config.optimizer:
        return [
            f"{ASKED}: the run in {before} kept AdamW's moments as optimizer={moments!r} does, and this one uses "
            f"{config.optimizer!r}; set the same optimizer, or leave it out"
        ]
    wanted = to_jsonable(config.model_dump()["adapter"])
    if (trained := recipe.get("lora")) != wanted:
        before_and_now = f"{_in_words(trained)}, and this one trains {_in_words(wanted)}"
    elif (others := _other_names(config, student, policy)) is not None:
        before_and_now = others
    else:
        return []
    return [
        f"{ASKED}: the run in {before} trained {before_and_now}, so AdamW's moments belong to other numbers; leave it "
        "out, or set the same adapter and adapters"
    ]


def _other_names(config: FSTConfig, student: dspy.Module, policy: PolicyLM) -> str | None:
    """The names of the student's LoRA adapters and of those to train, in words; None where they are the same."""
    held = {adapter.name for adapter in policy.checkpoint.adapters}
    through = adapter_of(config.adapters, config.trained or policies_of(student))
    if not held or held == (names := {*through.values()} or {SHARED}):
        return None
    return f"the LoRA adapters {', '.join(sorted(held))}, and this one trains {', '.join(sorted(names))}"


def _in_words(adapter: object) -> str:
    return "all weights" if adapter is None else f"the LoRA adapter {adapter}"


def take_over(trainer: "Trainer", config: FSTConfig, student: dspy.Module, policy: PolicyLM) -> str | None:
    """Give the trainer what it takes over; the sentence that says what was. None for a student that starts anew.

    Raises:
        RunDirectoryError, TrainingError: the state of the run before is damaged, or of another model.
    """
    if not _carries(student):
        return None
    start = f"going on from the weights {policy.checkpoint.version} of {policy.checkpoint.folder} and the population"
    if not config.continue_optimizer:
        return (
            f"{start}; AdamW, its warm-up and the KL's reference start anew (continue_optimizer=True takes AdamW and "
            "the warm-up over)"
        )
    anew = trainer.load_optimizer(_state(policy.checkpoint).path / "trainer")
    apart = f" and the moments of {', '.join(anew)}" if anew else ""
    return (
        f"{start}, with AdamW's moments and its count of updates, {trainer.updates}; the KL's reference{apart} "
        f"start{'' if anew else 's'} anew"
    )


def _carries(student: dspy.Module) -> bool:
    return isinstance(getattr(student, "population", None), Population)


def _state(checkpoint: Checkpoint) -> RunState:
    run_dir = run_of(checkpoint)
    state = newest_state(run_dir / "states", tidy=False) if run_dir else None
    assert state is not None, "optimizer_faults looked"
    return state
