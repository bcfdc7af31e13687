"""What is tried where hardly any reply parses: how it is ranked, and that its advice runs and does what was tried."""

from types import SimpleNamespace

import dspy
import pytest

from dspy_fst.outcomes.outcome import Outcome
from dspy_fst.rollout.chat_adapters import describe, keep, kept_by
from dspy_fst.rollout.components import read_texts
from dspy_fst.rollout.rollout_settings import RolloutSettings
from dspy_fst.training.parse_trial import COOLER, DEMOS, Attempt, Setup, Trial, parse_share, trial
from dspy_fst.types import Candidate, Population, Rollout
from tests.fakes import fields, scripted_policy

SEED = Candidate({"solve": "Answer."})
SET = [dspy.Example(question=f"q{i}", answer=str(i)).with_inputs("question") for i in range(6)]
CHAT_FORM, XML_FORM = "[[ ## completed ## ]]", "<answer>"


class Twice(dspy.Module):
    """Two predictors."""

    def __init__(self, lm):
        super().__init__()
        self.draft, self.solve = dspy.Predict("question -> answer"), dspy.Predict("question -> answer")
        self.set_lm(lm)

    def forward(self, question):
        return self.solve(question=self.draft(question=question).answer)


class Best(dspy.Module):
    """Asks for the best of two; BestOfN refuses a module whose predictors hold several LMs."""

    def __init__(self, lm):
        super().__init__()
        self.best = dspy.BestOfN(Twice(lm), N=2, reward_fn=lambda inputs, pred: 1.0, threshold=1.0)

    def forward(self, question):
        return self.best(question=question)


def tried(program, policy, rollouts=2):
    """The trial of a program, with an engine in the place of the run's."""
    seed = read_texts(program)
    session = SimpleNamespace(
        program=program,
        trainset=SET,
        population=Population((seed,), (0.0,)),
        policy=policy,
        config=SimpleNamespace(parse_trial=rollouts),
        rollouter=SimpleNamespace(settings=RolloutSettings(num_threads=2), seed=0),
    )
    return trial(session, 0.0)


def xml_and_demos_only(messages, seed):
    """A model that follows XML, where it was shown how."""
    shown = len(messages) > 3 and XML_FORM in messages[-1]["content"] + messages[0]["content"]
    return "<answer>\n1\n</answer>" if shown else "nonsense"


def prompts_of(program, engine):
    asked = []

    def listens(messages, seed):
        asked.append("\n".join(message["content"] for message in messages))
        return "<answer>\n1\n</answer>"

    engine.speak = listens
    program(question="q")
    return asked


def masked(count):
    return tuple(Rollout(i, SEED, (), None, Outcome("masked", "timeout")) for i in range(count))


def ranked_trial(*attempts):
    return Trial(0.0, attempts, dspy.ChatAdapter(), False, ("solve",), ("solve",))


def test_what_helped_is_told_by_what_it_was_ranked_by():
    policy, _ = scripted_policy(lambda m, s: "nonsense")
    program = Twice(policy)
    failed = dspy.teleprompt.bootstrap_trace.FailedPrediction("nonsense")
    parsed = (program.solve, {}, dspy.Prediction(answer="1"))
    right = Rollout(0, SEED, (), 1.0, trace=((program.solve, {}, failed), parsed))
    wrong = Rollout(0, SEED, (), 0.0, trace=(parsed,))
    one, other = Attempt(Setup(dspy.JSONAdapter()), (right,) * 4), Attempt(Setup(dspy.XMLAdapter()), (wrong,) * 4)
    assert ranked_trial(one, other).record()["helped"] == "XMLAdapter (100% parsed)"
    by_reward = Trial(0.9, (one, other), dspy.ChatAdapter(), False, ("solve",), ("solve",), reward_before=0.0)
    assert by_reward.record()["helped"] == "JSONAdapter (mean reward 1.000, 50% parsed)"
    unread = Attempt(Setup(dspy.JSONAdapter()), (Rollout(0, SEED, (), 1.0),))
    by_reward = Trial(0.9, (unread,), dspy.ChatAdapter(), False, ("solve",), ("solve",), reward_before=0.0)
    assert by_reward.record()["helped"] == "JSONAdapter (mean reward 1.000, no reply read)"


def test_a_setup_in_which_no_reply_was_read_has_no_share_and_stands_last_with_its_masks():
    policy, _ = scripted_policy(lambda m, s: "nonsense")
    program = Twice(policy)
    failed = dspy.teleprompt.bootstrap_trace.FailedPrediction("nonsense")
    wrong = Rollout(0, SEED, (), 0.0, Outcome("failed", "parse"), trace=((program.solve, {}, failed),))
    unread = Attempt(Setup(dspy.XMLAdapter()), masked(8))
    read = Attempt(Setup(dspy.JSONAdapter()), (wrong,) * 8)
    assert parse_share(masked(8)) is None
    told = ranked_trial(unread, read).told().splitlines()
    assert [line.split()[0] for line in told[1:3]] == ["0%", "none"]
    assert "XMLAdapter (8 of 8 rollouts masked: timeout)" in told[2]
    assert told[-1].startswith("Nothing of it helps")
    assert "Nothing of it helps" in ranked_trial(unread).told()


def test_programs_that_ask_for_one_lm_are_tried_cooler_too():
    policy, _ = scripted_policy(lambda m, s: fields(answer="1"))
    found = tried(Best(policy), policy)
    cooler = [attempt for attempt in found.attempts if attempt.setup.temperature == COOLER]
    assert [attempt.share for attempt in cooler if type(attempt.setup.adapter) is dspy.ChatAdapter] == [1.0]
    assert {rollout.mask for attempt in cooler for rollout in attempt.rollouts} == {None}


def test_the_lower_temperature_is_tried_with_the_best_of_the_others_while_that_leaves_something():
    policy, engine = scripted_policy(lambda m, s: "nonsense")
    engine.speak = lambda messages, seed: xml_and_demos_only(messages, seed) if seed % 2 else "nonsense"
    setups = [attempt.setup for attempt in tried(Twice(policy), policy, rollouts=8).attempts]
    assert str(setups[-1]) == f"XMLAdapter, {DEMOS} demos, temperature {COOLER:g}"
    engine.speak = xml_and_demos_only
    setups = [attempt.setup for attempt in tried(Twice(policy), policy).attempts]
    assert str(setups[-1]) == f"ChatAdapter, temperature {COOLER:g}"


@pytest.mark.parametrize("keeps", [False, True], ids=["an untrained program", "a program that keeps its adapter"])
def test_the_advice_runs_and_the_program_then_asks_as_it_was_tried(keeps):
    policy, engine = scripted_policy(xml_and_demos_only)
    program = Twice(policy)
    if keeps:
        keep(program, dspy.ChatAdapter())
    told = tried(program, policy).told()
    assert f"100%  XMLAdapter, {DEMOS} demos" in told
    code = "\n".join(line.strip() for line in told.partition("makes the program:\n")[2].splitlines())
    assert code
    namespace = {"dspy": dspy, "program": program, "trainset": list(SET)}
    with dspy.context(adapter=None):
        configured = dspy.configure
        dspy.configure = lambda **settings: namespace.update(configured=settings)
        try:
            exec(code, namespace)
        finally:
            dspy.configure = configured
    assert len(namespace["trainset"]) == len(SET) - DEMOS
    with dspy.context(**namespace.get("configured", {})):
        prompts = prompts_of(program, engine)
    assert prompts
    assert all(XML_FORM in prompt and CHAT_FORM not in prompt and "q5" in prompt for prompt in prompts)
    assert (kept_by(program) is not None) == keeps


def test_the_advice_on_a_temperature_gives_all_predictors_one_cooler_lm():
    policy, _ = scripted_policy(lambda m, s: fields(answer="1"))
    program = Twice(policy)
    current = dspy.ChatAdapter()
    found = Trial(0.0, (), current, False, ("draft", "solve"), ())
    code = list(found.code(Setup(current, temperature=COOLER)))
    exec("\n".join(code), {"dspy": dspy, "program": program, "trainset": SET})
    assert program.get_lm().sampling_temperature == COOLER
    alone = dspy.Predict("question -> answer")
    alone.set_lm(policy)
    found = Trial(0.0, (), current, False, ("self",), ("self",))
    exec("\n".join(found.code(Setup(current, True, COOLER))), {"dspy": dspy, "program": alone, "trainset": SET})
    assert (alone.lm.sampling_temperature, len(alone.demos)) == (COOLER, DEMOS)


def test_an_adapter_of_the_user_s_own_is_left_in_force_and_never_told_as_dspy_s():
    class Mine(dspy.ChatAdapter):
        pass

    policy, _ = scripted_policy(lambda m, s: fields(answer="1") if len(m) > 3 and CHAT_FORM in str(m) else "nonsense")
    with dspy.context(adapter=Mine()):
        found = tried(Twice(policy), policy)
    mine = next(attempt for attempt in found.attempts if type(attempt.setup.adapter) is Mine and attempt.setup.demos)
    assert mine.share == 1.0
    assert not any("adapter" in line for line in found.code(mine.setup))
    assert describe(found.current).name.endswith("Mine")
