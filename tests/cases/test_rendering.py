"""A call's prompt under other texts, through whatever adapter the call was made; and a refusal where there is none."""

import random

import dspy
import pytest
from transformers import AutoTokenizer

from dspy_fst import FSTOptimizer, PolicyLM
from dspy_fst.engine.chat import TemplateTraits
from dspy_fst.errors import ConfigurationError, TrainingError
from dspy_fst.policy_lm import policy_of
from dspy_fst.rollout.components import read_texts
from dspy_fst.rollout.rendering import prompts_under, seed_kl_rollouts
from dspy_fst.rollout.reward import Reward
from dspy_fst.rollout.rollout_settings import RolloutSettings
from dspy_fst.rollout.rollouter import Rollouter, Task
from dspy_fst.types import Candidate, Problem
from programs.lab import BASE, build
from tests.pipelines.watched import lab_policy, run_watched, says
from tests.relay import Relay, any_answer, relay

PROBLEM = Problem(0, dspy.Example(numbers="1 2 3 4 5").with_inputs("numbers"))
OTHER = Candidate({"first": "Sort the list.", "last": "Do not explain."})


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(BASE)


def played(program, candidate):
    (rollout,) = Rollouter(program, Reward(any_answer), RolloutSettings()).rollout(
        [Task(PROBLEM, candidate)], "test", anew=True
    )
    return rollout


class OwnAdapter(Relay):
    """Sets an adapter itself, as DSPy's documentation shows, and hands a demonstration on at the call."""

    def forward(self, numbers):
        with dspy.context(adapter=dspy.XMLAdapter()):
            self.first(numbers=numbers, demos=[dspy.Example(numbers="1 2", answer="2 1")])
        return self.last(numbers=numbers)


class InBlocks(dspy.ChatAdapter):
    """Writes its messages in OpenAI's content blocks, not as plain texts."""

    def format(self, signature, demos, inputs):
        messages = super().format(signature, demos, inputs)
        return [{**of, "content": [{"type": "text", "text": of["content"]}]} for of in messages]


def own_adapter():
    program = OwnAdapter()
    program.set_lm(PolicyLM(BASE, engine="in_process", max_tokens=12))
    return program


@pytest.mark.parametrize(
    ("make", "adapter"),
    [
        (relay, dspy.JSONAdapter()),
        (relay, dspy.XMLAdapter()),
        (relay, InBlocks()),
        (own_adapter, None),
        (own_adapter, dspy.JSONAdapter()),
    ],
    ids=["json", "xml", "content blocks", "its own", "its own inside another"],
)
def test_a_prompt_under_other_texts_is_the_one_that_those_texts_are_asked_with(make, adapter, tokenizer):
    program = make()
    with dspy.context(adapter=adapter):
        seed = read_texts(program)
        rollout, spoken = played(program, seed), played(program, OTHER)
    assert rollout.calls
    # Outside of that context: the adapter is that of the call.
    assert prompts_under(seed, rollout, tokenizer) == tuple(call.prompt_ids for call in rollout.calls)
    assert prompts_under(OTHER, rollout, tokenizer)[0] == spoken.calls[0].prompt_ids
    assert None not in prompts_under(OTHER, rollout, tokenizer)
    policy_of(program).release()


class Restless(dspy.ChatAdapter):
    """Every prompt is another one, so that none can be made again."""

    def format(self, signature, demos, inputs):
        first, *rest = super().format(signature, demos, inputs)
        return [{**first, "content": f"{random.random()} {first['content']}"}, *rest]


def test_where_no_call_can_be_found_again_the_predictor_and_its_adapter_are_named(tokenizer):
    program = relay()
    with dspy.context(adapter=Restless()):
        rollout = played(program, read_texts(program))
    assert rollout.calls
    with pytest.raises(TrainingError, match="Restless") as told:
        seed_kl_rollouts([OTHER], [rollout], tokenizer)
    assert "'first'" in str(told.value)
    policy_of(program).release()


def propose(candidate, reflective_dataset, components_to_update):
    return dict.fromkeys(components_to_update, "Do.")


def test_distilling_through_such_an_adapter_is_refused_before_the_first_update(tmp_path):
    lab = build(train=8, val=2, test=2)
    optimizer = FSTOptimizer(
        metric=any_answer,
        propose=propose,
        run_dir=tmp_path / "run",
        progress=False,
        method="distill",
        seed_kl_coefficient=1.0,
        seed_kl_teacher="population",
        cycles=1,
        steps_per_cycle=1,
        problems_per_step=2,
        anchors=2,
        search_rollouts=3,
    )
    with dspy.context(adapter=Restless()), pytest.raises(ConfigurationError, match="Restless") as told:
        optimizer.compile(relay(), trainset=lab.trainset)
    assert "seed_kl_teacher" in str(told.value)


def test_calls_are_taken_down_only_for_who_renders_them_anew():
    program = relay()
    rollouter = Rollouter(program, Reward(any_answer), RolloutSettings())
    for anew in (False, True):
        (rollout,) = rollouter.rollout([Task(PROBLEM, read_texts(program))], "test", anew=anew)
        assert rollout.calls
        assert bool(rollout.asked) is anew
    policy_of(program).release()


def distilled_rollouts(run_dir, **recipe):
    run = run_watched(says("Reverse the list."), run_dir, seed_kl_coefficient=1.0, **recipe)
    return {draw.partition("-")[0]: bool(rollout.asked) for draw, rollout in run.rollouts if rollout.calls}


@pytest.mark.slow
def test_a_run_takes_calls_down_for_its_first_look_and_its_teacher_only(tmp_path):
    with dspy.context(lm=lab_policy()):
        held = distilled_rollouts(tmp_path / "held")
        taught = distilled_rollouts(tmp_path / "taught", seed_kl_teacher="population")
    assert {draw for draw, asked in held.items() if asked} == {"preflight"}  # whose adapters are told
    assert held["seed"] is held["search"] is held["step"] is False
    assert {draw for draw, asked in taught.items() if asked} == {"seed", "preflight"}
    assert taught["search"] is taught["step"] is False


def test_the_template_is_tried_once_for_all_rollouts(tokenizer, monkeypatch):
    program, made = relay(), []
    seed = read_texts(program)
    rollouts = [played(program, seed) for _ in range(3)]
    of = TemplateTraits.of
    monkeypatch.setattr(TemplateTraits, "of", lambda tried: made.append(tried) or of(tried))
    held = seed_kl_rollouts([seed], rollouts, tokenizer)
    assert [of.start_prompts for of in held] == [tuple(c.prompt_ids for c in r.calls) for r in rollouts]
    assert [tried is tokenizer for tried in made].count(True) == 1  # others belong to engines
    policy_of(program).release()
