"""The same trajectories as dspy.GRPO hands them to its trainer, and as we train on them: which tokens are which."""

from collections import Counter
from dataclasses import dataclass
from difflib import SequenceMatcher

import dspy
import pytest
from dspy.teleprompt import grpo
from dspy.teleprompt.bootstrap_trace import FailedPrediction

from dspy_fst.engine.generation import SideBySide
from dspy_fst.rollout.components import read_texts
from dspy_fst.rollout.reward import Reward
from dspy_fst.rollout.rollout_settings import RolloutSettings
from dspy_fst.rollout.rollouter import Rollouter
from dspy_fst.slow.credit import credit
from dspy_fst.types import PREDICTOR_TAG, Group, Population, Problem
from programs.lab import build
from tests.pipelines.watched import lab_policy, tokenizer
from tests.relay import relay

PROBLEMS, GROUP = 6, 8


@dataclass(frozen=True)
class Played:
    """Groups of rollouts of a two-module program, and every reply as it left the model, by its log-probabilities."""

    groups: list[Group]
    problems: list[Problem]
    sampled: dict[tuple[float, ...], tuple[int, ...]]

    @property
    def rollouts(self):
        return [rollout for group in self.groups for rollout in group.rollouts]


def short(gold, pred, trace=None):
    return 1.0 / (1 + len(pred.answer))


@pytest.fixture(scope="module")
def played():
    program, policy = relay(), lab_policy(temperature=1.8)
    program.set_lm(policy)
    engine = policy.handle.ready()
    problems = [Problem(i, example) for i, example in enumerate(build(train=PROBLEMS, val=1, test=1).trainset)]
    rollouter = Rollouter(program, Reward(short), RolloutSettings(), engine.expect)
    sampled, step = {}, SideBySide.step

    def watched(batch):
        ended = step(batch)
        sampled.update({tuple(reply.logprobs): tuple(reply.ids) for _, reply in ended})
        return ended

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SideBySide, "step", watched)
        groups = rollouter.groups(problems, Population.of_seed(read_texts(program), 1), GROUP, "step-0")
    policy.release()
    return Played(groups, problems, sampled)


def differing(trained, sampled):
    """Tokens in which two sequences differ once they are aligned: replaced, added or lost."""
    edits = SequenceMatcher(None, trained, sampled, autojunk=False).get_opcodes()
    return sum(max(i2 - i1, j2 - j1) for tag, i1, i2, j1, j2 in edits if tag != "equal")


class Job:
    """In the trainer's place: takes what it is given."""

    def __init__(self):
        self.groups = {}

    def get_status(self):
        return {"pending_batch_ids": list(range(100))}

    def step(self, train_data, train_data_format):
        self.groups.update({id(item["group"]): item["group"] for item in train_data})  # GRPO repeats groups

    def terminate(self):
        pass


class Trainable(dspy.utils.DummyLM):
    """An LM that dspy.GRPO takes for trainable."""

    def __init__(self):
        super().__init__([])
        self.job = Job()

    def reinforce(self, train_kwargs):
        return self.job


def name_tag(problem, sample):
    """A reward that is a rollout's own, so that what comes back can be told apart."""
    return float(1 + problem * GROUP + sample)


def grpo_data(played, monkeypatch):
    """What dspy.GRPO would train on: (rollout's name tag, messages, completion), made by its own code."""
    student, lm = relay(), Trainable()
    student.set_lm(lm)
    predictors = dict(student.named_predictors())

    def traced(problem, sample, rollout):
        tag = name_tag(problem, sample)
        trace = []
        for predictor, inputs, output in rollout.trace:
            if isinstance(output, FailedPrediction):
                output = FailedPrediction(output.completion_text, format_reward=tag)
            trace.append((predictors[getattr(predictor, PREDICTOR_TAG)], inputs, output))
        example = played.problems[problem].example
        return {
            "example": example,
            "prediction": rollout.prediction,
            "trace": trace,
            "example_ind": problem,
            "score": tag,
        }

    def bootstrapped(program, dataset, **settings):
        number = {id(problem.example): problem.index for problem in played.problems}
        order = [number[id(example)] for example in dataset[:PROBLEMS]]
        return [
            {**traced(problem, sample, rollout), "example_ind": order.index(problem)}
            for problem, group in enumerate(played.groups)
            for sample, rollout in enumerate(group.rollouts)
        ]

    monkeypatch.setattr(grpo, "bootstrap_trace_data", bootstrapped)
    optimizer = grpo.GRPO(
        metric=short,
        adapter=dspy.ChatAdapter(),
        exclude_demos=True,
        num_train_steps=1,
        num_dspy_examples_per_grpo_step=PROBLEMS,
        num_rollouts_per_grpo_step=GROUP,
    )
    optimizer.compile(student, trainset=[problem.example for problem in played.problems])
    return [
        (item["reward"], item["messages"], item["completion"]) for group in lm.job.groups.values() for item in group
    ]


def rendered(messages, completion):
    """Prompt and completion ids as trainers on chat data make them: text from the template, tokenized again."""
    prompt = tokenizer().apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    whole = tokenizer().apply_chat_template([*messages, completion], tokenize=False)
    assert whole.startswith(prompt)
    return tuple(
        tuple(tokenizer()(text, add_special_tokens=False)["input_ids"]) for text in (prompt, whole[len(prompt) :])
    )


def kind_of(call, failed):
    if call.finish_reason == "length":
        return "was cut off"
    return "does not parse" if failed else "parses"


def test_rendered_anew_tokens_differ_from_the_sampled_ones_and_ours_do_not(played, monkeypatch, capsys):
    rows = credit(played.groups).rows
    ours = sum(differing(row.completion_ids, played.sampled[row.logprobs]) for row in rows)

    theirs, tokens, replies, changed, seen = Counter(), Counter(), Counter(), Counter(), set()
    rollout_of = {
        name_tag(problem, sample): rollout
        for problem, group in enumerate(played.groups)
        for sample, rollout in enumerate(group.rollouts)
    }
    for reward, messages, completion in grpo_data(played, monkeypatch):
        rollout = rollout_of[reward]
        prompt, reply = rendered(messages, completion)
        place = next(i for i, call in enumerate(rollout.calls) if call.prompt_ids == prompt and (reward, i) not in seen)
        seen.add((reward, place))
        call = rollout.calls[place]
        kind = kind_of(call, failed=rollout.failure == "parse" and place == len(rollout.calls) - 1)
        replies[kind] += 1
        tokens[kind] += len(call.completion_ids)
        theirs[kind] += (difference := differing(reply, played.sampled[call.logprobs]))
        changed[kind] += difference > 0

    calls = sum(len(rollout.calls) for rollout in played.rollouts)
    with capsys.disabled():
        print(f"\ntokens that differ from the sampled ones: ours {ours} of {sum(len(r.completion_ids) for r in rows)}")
        for kind in replies:
            print(
                f"  dspy.GRPO, a reply that {kind}: {theirs[kind]} of {tokens[kind]}, "
                f"in {changed[kind]} of {replies[kind]} replies"
            )
        print(f"  dspy.GRPO: {calls - len(seen)} of {calls} calls left out")
    assert rows
    assert set(replies) == {"parses", "does not parse", "was cut off"}
    assert ours == 0
    assert theirs.total() > 0
    assert all(theirs[kind] > 0 for kind in replies)
    assert len(seen) < calls
