"""Names of dspy.GEPA's options that are no arguments here, with what to use instead."""

from collections.abc import Iterable, Mapping

_NO_TRACKER = "name the tracker, track='wandb' or track='mlflow', and make it with settings of its own where it has any"
_ITSELF = "give it to FSTOptimizer itself"
_OF_THE_RUN = "leave it out: a search has the run's program, policy and anchors"
INSTEAD = {
    "max_metric_calls": "use search_rollouts=..., the fresh rollouts of each search",
    "max_full_evals": "use search_passes=..., passes over the anchors of each search",
    "reflection_minibatch_size": "use reflection_minibatch=...",
    "log_dir": "use run_dir=...; the same directory goes on with the run",
    "add_format_failure_as_feedback": "leave it out: a reply that did not parse is always reflected on",
    "warn_on_score_mismatch": "leave it out: a rollout is scored once, and what the metric says of one predictor is "
    "read for its feedback alone",
    "track_best_outputs": "use recorded_samples=..., which keeps the best and the worst replies of each search and "
    "step: the weights change, so there is no best output of the whole run",
    "skip_perfect_score": "use perfect_score=...: rollouts that reach it are not reflected on, so one above every "
    "reward reflects on all",
    "candidate_selection_strategy": "leave it out: parents are drawn from the Pareto frontier",
    "use_merge": "use population_size=...: complementary candidates stay side by side. gepa's merge ends a search "
    "with an error where a common ancestor scores 0",
    "max_merge_invocations": "leave it out: nothing is merged, see use_merge",
    "use_wandb": _NO_TRACKER,
    "wandb_api_key": "set WANDB_API_KEY in the environment: a run keeps no keys",
    "wandb_init_kwargs": _NO_TRACKER,
    "use_mlflow": _NO_TRACKER,
}
"""Option of dspy.GEPA -> what to use."""
KWARGS = ("callbacks", "stop_callbacks")
"""Of ``gepa_kwargs``: what a search takes."""
OTHER_KWARGS = {
    "batch_sampler": "use reflection_minibatch=...; several proposals at a time need minibatches of their own",
    "val_evaluation_policy": "leave it out: a candidate is chosen by its scores on all anchors",
    "sampling_strategy": "use proposals_at_once=...",
    "acceptance_criterion": "leave it out: a proposal is accepted where it is better on what both measured",
    "use_cloudpickle": "leave it out: no state of gepa is kept",
    "max_reflection_cost": "use search_rollouts=...; what reflections cost is in the run's costs",
    **dict.fromkeys(("mlflow_tracking_uri", "mlflow_experiment_name", "mlflow_attach_existing"), _NO_TRACKER),
    **dict.fromkeys(("wandb_attach_existing", "tracking_key_prefix"), _NO_TRACKER),
    **dict.fromkeys(("seed", "perfect_score", "reflection_lm", "run_dir"), _ITSELF),
    **dict.fromkeys(("seed_candidate", "trainset", "valset", "adapter", "task_lm", "evaluator"), _OF_THE_RUN),
    "module_selector": "use component_selector=..., or components=...",
    "frontier_type": "leave it out: the frontier is over single anchors",
    "selection_strategy": "leave it out: parents are drawn from the Pareto frontier",
    "reflection_prompt_template": "use instruction_proposer=InstructionProposer(base_instructions=...), DSPy's",
    "custom_candidate_proposer": "use propose=..., or instruction_proposer=...",
    "reflection_strategy": "use propose=..., or instruction_proposer=...",
    "reflection_lm_kwargs": "set them on the LM, reflection_lm=dspy.LM(..., ...)",
    "merge_val_overlap_floor": "leave it out: nothing is merged",
    "raise_on_exception": "leave it out: what fails ends the search, and the same run_dir goes on from it",
    "cache_evaluation": "leave it out: a candidate has one rollout on each anchor",
    "display_progress_bar": "use progress=True",
    "logger": "leave it out: what gepa says is logged at debug level",
}
"""Other options of ``gepa.optimize`` -> what to use."""


def gepa_faults(names: Iterable[str]) -> dict[str, str]:
    """Name -> the sentence on it, for each that is an option of dspy.GEPA and none here."""
    return {name: f"{name}: it is an option of dspy.GEPA; here {INSTEAD[name]}" for name in names if name in INSTEAD}


def gepa_kwargs_faults(given: object) -> list[str]:
    """Faults of ``gepa_kwargs``."""
    if given is None:
        return []
    if not isinstance(given, Mapping):
        return [f"gepa_kwargs={given!r}: pass a dict with {' and '.join(KWARGS)}"]
    instead = {**INSTEAD, **OTHER_KWARGS}
    faults = [
        f"gepa_kwargs: {name} is not taken; {instead.get(name, 'it may hold callbacks and stop_callbacks')}"
        for name in given
        if name not in KWARGS
    ]
    faults += [
        f"gepa_kwargs: {name} must be a list, even of one"
        for name in KWARGS
        if name in given and not isinstance(given[name], list | tuple)
    ]
    return faults


def selector_fault(selector: object) -> str | None:
    """What is wrong with a ``component_selector``."""
    if selector in ("round_robin", "all"):
        return f"component_selector={selector!r}: the built-in ones are a setting here, components={selector!r}"
    if selector is not None and not callable(selector):
        return (
            f"component_selector={selector!r}: pass a function (state, trajectories, subsample_scores, candidate_idx, "
            "candidate) -> names of components, or components='round_robin' or 'all'"
        )
    return None
