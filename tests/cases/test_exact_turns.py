"""A conversation that goes on: the next prompt holds the earlier replies in the very ids that were sampled."""

import dspy
import pytest
from transformers import AutoTokenizer

from dspy_fst import PolicyLM
from dspy_fst.engine.chat import continued
from dspy_fst.rollout.components import read_texts
from dspy_fst.rollout.reward import Reward
from dspy_fst.rollout.rollout_settings import RolloutSettings
from dspy_fst.rollout.rollouter import Rollouter, Task
from dspy_fst.slow.batching import Scored, chains
from dspy_fst.slow.credit import credit
from dspy_fst.types import Call, Group, Problem, Rollout
from tests.cases.real_tokenizer import CHATML, NO_SYSTEM, STRIPS_THOUGHTS, save_model

TURNS, ROLLOUTS = 3, 8


class Chat(dspy.Module):
    """Asks its LM in messages, three times; each prompt holds what was said so far."""

    def __init__(self, lm, system="Be brief.", said=lambda text: text):
        super().__init__()
        self.ask = dspy.Predict("question -> answer")
        self.ask.lm = lm
        self.system, self.said = system, said

    def forward(self, question):
        messages = [{"role": "system", "content": self.system}, {"role": "user", "content": question}]
        for turn in range(TURNS):
            (reply,) = self.ask.lm(messages=messages)
            text = reply if isinstance(reply, str) else reply["text"]
            messages = [
                *messages,
                {"role": "assistant", "content": self.said(text)},
                {"role": "user", "content": f"Go on, {turn}."},
            ]
        return dspy.Prediction(answer=text)


def played(policy: PolicyLM, threads: int = ROLLOUTS, **options) -> list[Rollout]:
    program = Chat(policy, **options)
    rollouter = Rollouter(program, Reward(lambda gold, pred, trace=None: 1.0), RolloutSettings(num_threads=threads))
    example = dspy.Example(question="Tell me more.").with_inputs("question")
    tasks = [Task(Problem(0, example), read_texts(program), sample) for sample in range(ROLLOUTS)]
    rollouts = rollouter.rollout(tasks, "turns")
    assert [(r.mask, len(r.calls)) for r in rollouts] == [(None, TURNS)] * ROLLOUTS
    return rollouts


@pytest.fixture(scope="module")
def policy_of(tmp_path_factory):
    """Makes a policy whose random model writes a few tokens of any kind; one for each template."""
    made = {}

    def make(template: str) -> PolicyLM:
        if template not in made:
            folder = save_model(tmp_path_factory.mktemp("turns") / "model", template)
            made[template] = PolicyLM(folder, engine="in_process", max_tokens=6)
        return made[template]

    yield make
    for policy in made.values():
        policy.release()


def continues(rollout: Rollout) -> list[bool]:
    """For each turn but the first: whether its prompt begins with the ids of the turn before."""
    pairs = zip(rollout.calls, rollout.calls[1:], strict=False)
    return [
        later.prompt_ids[: len(call.prompt_ids + call.completion_ids)] == call.prompt_ids + call.completion_ids
        for call, later in pairs
    ]


def sequences(rollout: Rollout) -> int:
    """What the trainer reads the rollout's calls as."""
    scored = [Scored((*call.prompt_ids, *call.completion_ids), len(call.prompt_ids)) for call in rollout.calls]
    return len(chains(scored))


@pytest.mark.slow
def test_every_turn_begins_with_the_ids_of_the_turn_before_and_says_the_same_text(policy_of):
    policy = policy_of(CHATML)
    rollouts = played(policy)
    tokenizer = AutoTokenizer.from_pretrained(policy.checkpoint.path)
    broken = [
        call
        for rollout in rollouts
        for call in rollout.calls
        if tokenizer(tokenizer.decode(call.completion_ids), add_special_tokens=False)["input_ids"]
        != list(call.completion_ids)
    ]
    assert broken  # else the test shows nothing: replies whose text has another spelling
    assert [continues(rollout) for rollout in rollouts] == [[True] * (TURNS - 1)] * ROLLOUTS
    assert [sequences(rollout) for rollout in rollouts] == [1] * ROLLOUTS
    for rollout in rollouts:
        text = tokenizer.decode(rollout.calls[-1].prompt_ids)
        assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nTell me more.<|im_end|>\n")
        assert text.endswith("<|im_end|>\n<|im_start|>user\nGo on, 1.<|im_end|>\n<|im_start|>assistant\n")
        assert text.count("<|im_start|>assistant\n") == TURNS
    counts = credit([Group(0, tuple(rollouts))]).counts
    assert (counts["continued_calls"], counts["rerendered_calls"]) == (ROLLOUTS * (TURNS - 1), 0)


def test_a_reply_that_the_program_altered_is_rendered_and_counted(policy_of):
    rollouts = played(policy_of(CHATML), said=lambda text: f"(noted) {text}")
    counts = credit([Group(0, tuple(rollouts))]).counts
    assert (counts["continued_calls"], counts["rerendered_calls"]) == (0, ROLLOUTS * (TURNS - 1))
    assert [call.turn for call in rollouts[0].calls] == ["first", "rerendered", "rerendered"]


def test_a_turn_whose_last_reply_alone_was_altered_goes_on_from_the_turn_before_it_and_counts_as_rendered(policy_of):
    altered = []

    def said(text):
        altered.append(text)
        return text if len(altered) % TURNS == 1 else f"(noted) {text}"

    rollouts = played(policy_of(CHATML), threads=1, said=said)
    for rollout in rollouts:
        first, _, third = rollout.calls
        assert [call.turn for call in rollout.calls] == ["first", "continued", "rerendered"]
        whole = first.prompt_ids + first.completion_ids
        assert third.prompt_ids[: len(whole)] == whole
        assert sequences(rollout) == 2


@pytest.mark.slow
def test_a_template_that_leaves_thoughts_out_is_not_continued(policy_of):
    rollouts = played(policy_of(STRIPS_THOUGHTS), said=lambda text: "Yes.")
    assert {call.turn for rollout in rollouts for call in rollout.calls[1:]} == {"rerendered"}


@pytest.mark.slow
def test_where_the_system_text_goes_into_the_first_turn_conversations_continue_all_the_same(policy_of):
    rollouts = played(policy_of(NO_SYSTEM))
    assert [continues(rollout) for rollout in rollouts] == [[True] * (TURNS - 1)] * ROLLOUTS


def test_a_reply_of_broken_bytes_goes_on_as_it_was_sampled():
    """Its text has the sign for what cannot be read, which the next prompt spells in three bytes of its own."""
    sign = "\N{REPLACEMENT CHARACTER}".encode()

    def text_of(ids):
        return bytes(ids).decode(errors="replace")

    said = (*b"hi", 0xF0)  # the first byte of four
    rendered = (*b"hi", *sign, *b"|go on")
    assert text_of(said) == "hi\N{REPLACEMENT CHARACTER}"
    assert continued(rendered, [said], text_of) == (*said, *b"|go on")
    assert continued((*b"ho", *sign, *b"|go on"), [said], text_of) is None


def test_only_a_request_that_repeats_all_messages_and_a_reply_goes_on_from_a_call():
    from dspy.lm15 import Message, Request

    from dspy_fst.rollout.call_recorder import Recording

    recording = Recording(0)
    asked = (Message.user("x"),)
    call = Call("ask", (1, 2), (3, 4), (-1.0, -1.0), "stop", "v0")
    recording.add(call, Request("m", asked, system="s"))
    goes_on = (*asked, Message.assistant("y"), Message.user("z"))
    assert recording.continued_by(Request("m", goes_on, system="s")) == [(2, (1, 2, 3, 4))]
    for other in (asked, (*asked, Message.user("z")), (Message.user("w"), *goes_on[1:])):
        assert recording.continued_by(Request("m", other, system="s")) == []
    assert recording.continued_by(Request("m", goes_on, system="t")) == []
