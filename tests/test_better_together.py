"""DSPy's own alternation of optimizers takes ours as its parts."""

import dspy

from dspy_fst import FSTOptimizer, PolicyLM
from dspy_fst.policy_lm import policy_of
from programs.lab import BASE, FeedbackProposer, build

SMALL = {
    "cycles": 1,
    "steps_per_cycle": 2,
    "problems_per_step": 12,  # of fewer all groups of a step may be flat, and it moves nothing
    "population_size": 2,
    "group_size": 4,
    "anchors": 6,
    "search_rollouts": 24,
    "learning_rate": 5e-4,
    "progress": False,
}


def test_better_together_searches_then_trains_under_what_was_found(tmp_path):
    lab = build("reverse", train=32, val=8, test=4)
    lab.program.set_lm(PolicyLM(BASE, engine="in_process", max_tokens=16, engine_options={"linger_s": 60.0}))
    parts = {
        name: FSTOptimizer(
            metric=lab.metric, propose=FeedbackProposer(seed=0), run_dir=tmp_path / name, method=method, **SMALL
        )
        for name, method in (("p", "gepa"), ("w", "rl"))
    }
    together = dspy.BetterTogether(metric=lab.metric, **parts)
    compiled = together.compile(lab.program, trainset=lab.trainset, valset=lab.valset, strategy="p -> w", num_threads=4)
    tried = {entry["strategy"]: entry for entry in compiled.candidate_programs}
    assert set(tried) == {"", "p", "p -> w"}
    searched, trained = tried["p"]["program"], tried["p -> w"]["program"]
    assert texts(searched) == texts(trained) != texts(lab.program)
    assert policy_of(searched).checkpoint.version == "step-000000"
    assert policy_of(trained).checkpoint.version == "step-000002"
    assert texts(lab.program) == [lab.world.seed_instruction]


def texts(program):
    return [predictor.signature.instructions for predictor in program.predictors()]
