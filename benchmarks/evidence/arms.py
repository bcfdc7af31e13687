"""What is compared. An arm is a change of one recipe; whatever it does not name is the same for all."""

from collections.abc import Callable
from typing import Any

import dspy

from dspy_fst import TeleprompterSearch

RECIPE: dict[str, Any] = {
    "cycles": 4,
    "steps_per_cycle": 6,
    "problems_per_step": 32,
    "anchors": 32,
    "search_rollouts": 240,
    "reflection_minibatch": 4,
    "learning_rate": 5e-4,  # an arm's own is in benchmarks/results/evidence/tuned.json
    "validation_samples": 1,
}
"""Of every arm; the laboratory's sizes, and the paper's everything else."""

MAIN: dict[str, dict[str, Any]] = {
    "fst": {},
    "rl": {"method": "rl"},
    "gepa": {"method": "gepa"},
    "gepa_long": {"method": "gepa", "search_rollouts": 1850, "anchors": 128},
    "gepa_then_rl": {"method": "gepa_then_rl"},
    "rl_then_gepa": {"method": "rl_then_gepa"},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "one_prompt": {"population_size": 1},
    "own_baselines": {"baseline": "candidate"},
    "anchored": {"seed_kl_coefficient": 0.1},
    "front_loaded": {"first_search_share": 0.7},
    "restarting": {"first_search_share": 0.7, "search_when_flat": 0.5},
    "gepa_then_rl_faster": {"method": "gepa_then_rl"},
    "rl_slower": {"method": "rl"},
    "fst_slower": {},
    "anchored_slower": {"seed_kl_coefficient": 0.1},
    "one_prompt_slower": {"population_size": 1},
    "own_baselines_slower": {"baseline": "candidate"},
    "distill": {
        "method": "distill",
        "seed_kl_coefficient": 1.0,
        "seed_kl_teacher": "population",
        "seed_kl_rollouts": 8,
    },
    "fst_and_distill": {"seed_kl_coefficient": 0.1, "seed_kl_teacher": "population"},
}
SENSITIVITY: dict[str, dict[str, Any]] = {
    "T=3": {"steps_per_cycle": 3, "cycles": 8, "search_rollouts": 120},
    "T=12": {"steps_per_cycle": 12, "cycles": 2, "search_rollouts": 480},
    "K=2": {"population_size": 2},
    "K=8": {"population_size": 8},
    "G=4": {"group_size": 4},
    "G=16": {"group_size": 16},
    "16 anchors": {"anchors": 16},
    "64 anchors": {"anchors": 64},
    "half the search": {"search_rollouts": 120},
    "twice the search": {"search_rollouts": 480},
}
"""FST with one number changed. Other T keep the number of updates and the rollouts of all searches together."""

OPTIONS: dict[str, dict[str, Any]] = {
    "several_updates": {"updates_per_batch": 4},
    "resampled": {"resample_flat": 2},
    "overlong": {"overlong_penalty": 0.5},
    "retiring": {"retire_solved": 0.9},
    "reusing": {"reuse_rollouts": True},
}
"""FST with one option of a step."""

WARMUPS: dict[str, dict[str, Any]] = {
    "short_warmup_slower": {"warmup_steps": 2},
    "rl_short_warmup": {"method": "rl", "warmup_steps": 2},
}
"""A warm-up of 2 updates. The paper's 10 are for stages of 200 updates; of the 24 here they are nearly half."""

LORA: dict[str, dict[str, Any]] = {"lora": {"adapter": {"rank": 16, "alpha": 32.0}}}
"""A LoRA adapter is trained in place of all weights. Rank and scaling are the package's defaults. In this narrow model
(width 128) rank 16 trains 155,648 numbers beside its 939,904; in one of some billions it trains under 1 %."""

LOSSES: dict[str, dict[str, Any]] = {
    "grpo": {"loss": "grpo"},
    "dapo": {"loss": "dapo"},
    "dr_grpo": {"loss": "dr_grpo"},
    "gspo": {"loss": "gspo"},
    "rloo": {"loss": "rloo"},
    "rft": {"loss": "rft"},
}
"""FST with another loss than CISPO, all else alike. With one update a batch the clips hardly act, so what differs is
the advantage and the mean over tokens."""

FAST: dict[str, Callable[[], TeleprompterSearch]] = {
    "copro": lambda: TeleprompterSearch(dspy.COPRO, breadth=3, depth=2),
    "mipro": lambda: TeleprompterSearch(
        dspy.MIPROv2, auto=None, num_candidates=6, num_trials=10, minibatch=False, max_bootstrapped_demos=0,
        max_labeled_demos=0,
    ),
    "simba": lambda: TeleprompterSearch(dspy.SIMBA, bsize=8, num_candidates=3, max_steps=2, max_demos=0),
    "random_search": lambda: TeleprompterSearch(dspy.BootstrapFewShotWithRandomSearch, num_candidate_programs=3),
}  # fmt: skip
"""FST with another optimizer in GEPA's place, at the same rollouts: their sizes are such that each comes to its end
within the budget of one search. They ask `programs.lab.prompt_lm`, which reads as much as GEPA's proposer does."""

DEMOS: dict[str, dict[str, Any]] = {
    "demos": {"max_bootstrapped_demos": 4, "max_demo_tokens": 300},
    "labeled_demos": {"max_labeled_demos": 4, "max_demo_tokens": 300},
}
"""FST whose candidates hold demos beside the instruction, at the same rollouts."""

SEATED: dict[str, dict[str, Any]] = {
    **{name: {} for name in FAST},
    "random_search": {"max_bootstrapped_demos": 4, "max_labeled_demos": 4, "max_demo_tokens": 300},
}
"""Settings of the run beside such an optimizer."""

ARMS = {**MAIN, **VARIANTS, **SENSITIVITY, **OPTIONS, **WARMUPS, **LORA, **LOSSES, **DEMOS, **SEATED}

TUNED = (
    *("fst", "rl", "gepa_then_rl"),
    *("one_prompt", "own_baselines", "anchored", "distill", "fst_and_distill"),
    *LORA,
)
"""Arms whose learning rate is chosen by `benchmarks.evidence.tune`."""
RATE_OF = {
    "rl_then_gepa": "rl",  # its weights are RL's
    "rl_slower": "gepa_then_rl",
    "fst_slower": "gepa_then_rl",
    "anchored_slower": "gepa_then_rl",
    "short_warmup_slower": "gepa_then_rl",
    "rl_short_warmup": "rl",
    "one_prompt": "fst",  # one thing changed; at the rate tuned for it below
    "own_baselines": "fst",
    "one_prompt_slower": "one_prompt",
    "own_baselines_slower": "own_baselines",
}
"""Arms that take the rate of one of them. Those in neither take FST's: they search otherwise, or one number differs."""


def used_under(arm: str) -> str:
    """Which instruction an arm's weights are made for, "seed" or "evolved"."""
    return "seed" if ARMS[arm].get("method") == "distill" else "evolved"


def tuned_as(arm: str) -> str:
    """The tuned arm whose learning rate an arm takes."""
    return RATE_OF.get(arm, arm if arm in TUNED else "fst")


ABOUT = {
    "fst": "Fast-Slow Training",
    "rl": "CISPO under the seed instruction",
    "gepa": "one search with the budget of FST's four, no weight update",
    "gepa_long": "GEPA with as many rollouts as FST's searches and updates, and four times its anchors",
    "gepa_then_rl": "all searching first, then RL over the population",
    "rl_then_gepa": "RL, then all searching under the final weights",
    "one_prompt": "FST with one instruction instead of four",
    "own_baselines": "FST whose baseline is the candidate's own, not pooled",
    "anchored": "FST held to its start under the seed instruction (ours)",
    "front_loaded": "FST with 70 % of the search rollouts in the first cycle",
    "restarting": "front-loaded, later searches only when most groups are flat",
    "gepa_then_rl_faster": "all searching first, then RL, at the learning rate of FST",
    "rl_slower": "RL at the learning rate of gepa_then_rl",
    "fst_slower": "FST at the learning rate of gepa_then_rl",
    "anchored_slower": "the anchored FST at the learning rate of gepa_then_rl",
    "one_prompt_slower": "one instruction instead of four, at the learning rate tuned for that",
    "own_baselines_slower": "a baseline of each candidate's own, at the learning rate tuned for that",
    "distill": "no reward: what the base says under the population is taught under the seed",
    "fst_and_distill": "FST, and that with a tenth of the weight",
    "several_updates": "FST with four optimizer steps for each batch",
    "resampled": "FST that replaces flat groups, twice a step at most (DAPO)",
    "overlong": "FST that takes up to half a point from rollouts with replies near the limit (DAPO)",
    "retiring": "FST that leaves out problems with a pass rate of 0.9 (ScaleRL)",
    "short_warmup_slower": "FST with a warm-up of 2 updates, at the learning rate of gepa_then_rl",
    "rl_short_warmup": "RL with a warm-up of 2 updates instead of 10",
    "lora": "FST that trains a LoRA adapter of rank 16 instead of all weights",
    "reusing": "FST whose updates reuse the rollouts that scored the population",
    "grpo": "FST with GRPO's loss: each rollout weighs the same",
    "dapo": "FST with DAPO's loss: each token weighs the same",
    "dr_grpo": "FST with Dr. GRPO's loss: no division by a length or a standard deviation",
    "gspo": "FST with GSPO's loss: importance weights of whole replies",
    "rloo": "FST with RLOO: REINFORCE against the mean of the other rollouts",
    "copro": "FST whose searches are COPRO's",
    "mipro": "FST whose searches are MIPROv2's, without demos",
    "simba": "FST whose searches are SIMBA's, without demos",
    "random_search": "FST whose searches are BootstrapFewShotWithRandomSearch's: demos, and no new instruction",
    "rft": "FST that learns from the best rollouts of each problem alone (rejection sampling)",
    "demos": "FST whose candidates hold bootstrapped demos, too",
    "labeled_demos": "FST whose candidates hold demos from the labels, too",
    **dict.fromkeys(SENSITIVITY, "FST with this number changed"),
}
