"""FST-distill: what the start says under the population's texts is taught to the policy under the program's own."""

import dspy
import pytest
from transformers import AutoTokenizer

from dspy_fst import FSTOptimizer, PolicyLM
from dspy_fst.evaluation.two_by_two_table import play
from dspy_fst.policy_lm import policy_of
from dspy_fst.rollout.components import read_texts
from dspy_fst.rollout.rendering import prompts_under
from dspy_fst.rollout.reward import Reward
from dspy_fst.rollout.rollout_settings import RolloutSettings
from dspy_fst.rollout.rollouter import Rollouter, Task
from dspy_fst.run.directory import read_events
from dspy_fst.types import Candidate, Problem
from programs.lab import BASE, build
from tests.relay import any_answer, relay

TOLD = "Reverse the list."


def tells_the_rule(candidate, reflective_dataset, components_to_update):
    return dict.fromkeys(components_to_update, TOLD)


def test_a_call_s_prompt_under_other_texts_is_the_one_that_those_texts_are_asked_with():
    program = relay()
    rollouter = Rollouter(program, Reward(any_answer), RolloutSettings())
    problem = Problem(0, dspy.Example(numbers="1 2 3 4 5").with_inputs("numbers"))
    seed = read_texts(program)
    other = Candidate({"first": "Sort the list.", "last": "Do not explain."})
    (rollout,) = rollouter.rollout([Task(problem, seed)], "test", anew=True)
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    assert prompts_under(seed, rollout, tokenizer) == tuple(call.prompt_ids for call in rollout.calls)
    (spoken,) = rollouter.rollout([Task(problem, other)], "test")
    # Only the first call of both has the same inputs.
    assert prompts_under(other, rollout, tokenizer)[0] == spoken.calls[0].prompt_ids
    assert None not in prompts_under(other, rollout, tokenizer)
    # A call that no traced module call gives is not guessed at.
    assert prompts_under(other, type(rollout)(0, seed, rollout.calls, 1.0), tokenizer) == (None,) * len(rollout.calls)
    policy_of(program).release()


@pytest.fixture(scope="module")
def distilled(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("distilled") / "run"
    lab = build("reverse", train=64, val=4, test=64)
    lab.program.set_lm(PolicyLM(BASE, engine="in_process", max_tokens=16, engine_options={"linger_s": 60.0}))
    optimizer = FSTOptimizer(
        metric=lab.metric,
        propose=tells_the_rule,
        run_dir=run_dir,
        progress=False,
        method="distill",
        seed_kl_coefficient=1.0,
        seed_kl_teacher="population",
        seed_kl_rollouts=4,
        cycles=1,
        steps_per_cycle=8,
        problems_per_step=16,
        anchors=8,
        search_rollouts=24,
        learning_rate=3e-3,
        warmup_steps=2,
        kl_coefficient=0.0,
    )
    yield lab, optimizer.compile(lab.program, trainset=lab.trainset, valset=lab.valset), run_dir
    policy_of(lab.program).release()


@pytest.mark.slow
def test_no_reward_is_asked_for_and_the_kl_to_what_the_texts_teach_falls(distilled):
    _, _, run_dir = distilled
    steps = [event["report"] for event in read_events(run_dir) if event["event"] == "step"]
    assert [step["counts"]["held_rollouts"] for step in steps] == [64] * 8
    assert all(step["counts"]["rollouts"] == step["counts"]["rows"] == 0 for step in steps)
    assert all(step["counts"]["held_calls_unread"] == 0 for step in steps)
    assert all(step["update"]["tokens"] == step["sampled_tokens"] for step in steps)
    kls = [step["update"]["kl_under_seed"] for step in steps]
    assert kls[-1] < 0.5 * kls[0]


@pytest.mark.slow
def test_what_the_text_taught_is_in_the_weights_without_the_text(distilled):
    lab, compiled, _ = distilled
    policy = policy_of(compiled)
    rollouter = Rollouter(compiled, Reward(lab.metric), RolloutSettings(), policy.handle.engine.expect)
    seed = read_texts(lab.program)
    right = {
        name: sum(r.reward or 0 for r in play(rollouter, policy, checkpoint, seed, lab.testset, 2))
        / (2 * len(lab.testset))
        for name, checkpoint in (("base", policy_of(lab.program).checkpoint), ("trained", policy.checkpoint))
    }
    assert right["trained"] > right["base"] + 0.2


@pytest.mark.parametrize(
    ("recipe", "told"),
    [
        ({"method": "distill"}, "set seed_kl_coefficient=1.0 and seed_kl_teacher='population'"),
        ({"seed_kl_teacher": "population"}, "does nothing at seed_kl_coefficient=0"),
        (
            {"seed_kl_teacher": "population", "seed_kl_coefficient": 0.1, "tool_descriptions": "evolved"},
            "use tool_descriptions='fixed'",
        ),
    ],
)
def test_distilling_without_a_teacher_is_refused(recipe, told):
    from dspy_fst.config import make_config

    config, faults = make_config(recipe)
    assert config is None
    assert told in faults[0]
