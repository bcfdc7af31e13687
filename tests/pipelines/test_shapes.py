"""Programs of many shapes through compile(), on the real base model: who is trained, on which tokens."""

import asyncio

import dspy
import pytest
from dspy.utils.exceptions import AdapterParseError

from dspy_fst.errors import ConfigurationError
from dspy_fst.rollout.call_recorder import OUTSIDE
from dspy_fst.rollout.components import read_texts
from programs.lab.tokenizer import signature
from tests.pipelines.watched import (
    STEP,
    assert_tokens_are_exact,
    lab_policy,
    odd,
    outcomes_in,
    run_watched,
    says,
    tokenizer,
)

WORK, SOLVE, FIND, LOOK = (
    "Work out the answer from the numbers.",
    "Solve the problem.",
    "Find what is asked for.",
    "Do the task with the numbers.",
)
"""Instructions that the base model answers with a guess, so that a group's replies differ."""


class Chain(dspy.Module):
    """Three predictors, one after another."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = says(WORK), says(SOLVE), says(FIND)

    def forward(self, numbers):
        return self.third(numbers=self.second(numbers=self.first(numbers=numbers).answer).answer)


class Loop(dspy.Module):
    """One module is called as often as the list is long, another now and then."""

    def __init__(self):
        super().__init__()
        self.again, self.perhaps = says(WORK), says(SOLVE)

    def forward(self, numbers):
        said = numbers
        for _ in range(len(numbers.split()) - 3):
            said = self.again(numbers=said).answer
        return self.perhaps(numbers=said) if odd(said) else dspy.Prediction(answer=said)


class Inner(dspy.Module):
    """A module to be nested."""

    def __init__(self, instruction):
        super().__init__()
        self.solve = says(instruction)

    def forward(self, numbers):
        return self.solve(numbers=numbers)


class Nested(dspy.Module):
    """A module, a list of modules, and a dict of modules."""

    def __init__(self):
        super().__init__()
        self.inner = Inner(WORK)
        self.steps = [Inner(SOLVE), says(FIND)]
        self.by_name = {"last": says(LOOK)}

    def forward(self, numbers):
        said = self.inner(numbers=numbers)
        for step in (*self.steps, self.by_name["last"]):
            said = step(numbers=said.answer)
        return said


class Twins(dspy.Module):
    """Two predictors of one signature."""

    def __init__(self):
        super().__init__()
        shared = signature(WORK)
        self.one, self.other = dspy.Predict(shared), dspy.Predict(shared)

    def forward(self, numbers):
        return self.other(numbers=self.one(numbers=numbers).answer)


class Now(dspy.Module):
    """A predictor whose answer decides whether another module is called."""

    def __init__(self, then):
        super().__init__()
        self.first, self.then = says(WORK), then

    def forward(self, numbers):
        said = self.first(numbers=numbers)
        return self.then(numbers=said.answer) if odd(said.answer) else said


class Agent(dspy.Module):
    """ReAct with a tool, with its loop or straight to its answer; short words, or its prompt exceeds the context."""

    def __init__(self):
        super().__init__()

        def count(numbers: str) -> str:
            """Count them."""
            return str(len(numbers.split()))

        self.react = dspy.ReAct(signature(SOLVE), tools=[count], max_iters=1)
        self.react.react.signature = self.react.react.signature.with_instructions(LOOK)

    def forward(self, numbers):
        return self.react(numbers=numbers, max_iters=len(numbers.split()) % 2)


class Best(dspy.Module):
    """A module that is asked twice, and the better answer counts."""

    def __init__(self, kind):
        super().__init__()
        self.best = kind(says(WORK), N=2, reward_fn=lambda inputs, pred: -len(pred.answer), threshold=0.0)

    def forward(self, numbers):
        return self.best(numbers=numbers)


class Together(dspy.Module):
    """Two predictors asked at once, by asyncio."""

    def __init__(self):
        super().__init__()
        self.one, self.other = says(WORK), says(SOLVE)

    async def aforward(self, numbers):
        one, other = await asyncio.gather(self.one.acall(numbers=numbers), self.other.acall(numbers=numbers))
        return dspy.Prediction(answer=f"{one.answer} {other.answer}")

    def forward(self, numbers):
        return asyncio.run(self.acall(numbers=numbers))


class Lenient(dspy.Module):
    """Takes a reply as it is when it does not parse."""

    def __init__(self):
        super().__init__()
        self.solve = says(WORK)

    def forward(self, numbers):
        try:
            return self.solve(numbers=numbers)
        except AdapterParseError as error:
            return dspy.Prediction(answer=error.lm_response)


def plain(text):
    """As the base model's tokenizer keeps it, lines joined."""
    return " ".join(text.lower().split())


def assert_calls_hold_their_instruction(run):
    for _, rollout in run.rollouts:
        for call in rollout.calls:
            if call.predictor != OUTSIDE:
                prompt = plain(tokenizer().decode(call.prompt_ids))
                assert plain(rollout.candidate.texts[call.predictor]) in prompt, call.predictor


def assert_trained(run, program, names):
    """These predictors, and no others, were called and learn; the texts of all of them were changed and tried."""
    seed = read_texts(program).texts
    tried = {
        name for _, rollout in run.rollouts for name, text in rollout.candidate.texts.items() if text != seed[name]
    }
    assert {call.predictor for call in run.calls if call.temperature > 0} == names
    assert {row.predictor for row in run.rows} == names
    assert tried >= names
    assert_tokens_are_exact(run)
    assert_calls_hold_their_instruction(run)


SHAPES = {
    "several predictors": (Chain, {"first", "second", "third"}),
    "a variable number of calls": (Loop, {"again", "perhaps"}),
    "nested modules, a list and a dict": (Nested, {"inner.solve", "steps[0].solve", "steps[1]", "by_name['last']"}),
    "chain of thought": (
        lambda: Now(dspy.ChainOfThought(signature(SOLVE))),
        {"first", "then.predict"},
    ),
    "react with a tool": (
        lambda: Now(Agent()),
        {"first", "then.react.react", "then.react.extract.predict"},
    ),
    "best of n": (lambda: Best(dspy.BestOfN), {"best.module"}),
    "an asynchronous program": (Together, {"one", "other"}),
}


@pytest.mark.parametrize(
    "shape", [pytest.param(shape, marks=pytest.mark.slow) if "react" in shape else shape for shape in SHAPES]
)
def test_every_predictor_that_is_called_learns_from_the_tokens_it_sampled(shape, tmp_path):
    make, names = SHAPES[shape]
    program = make()
    program.set_lm(lab_policy())
    # Enough problems that what is called now and then is met by a search.
    recipe = {"problems_per_step": 6, "search_rollouts": 40} if "react" in shape else {"search_rollouts": 24}
    assert_trained(run_watched(program, tmp_path / "run", **recipe), program, names)


def test_predictors_of_one_signature_are_told_apart(tmp_path):
    program = Twins()
    program.set_lm(lab_policy())
    run = run_watched(program, tmp_path / "run", components="round_robin")
    texts = [rollout.candidate.texts for rollout in run.played("search")]
    assert any(text["one"] != text["other"] for text in texts)
    assert_trained(run, program, {"one", "other"})
    for rollout in run.played("step"):
        one, other = rollout.calls
        said = plain(tokenizer().decode(one.completion_ids).split("]]")[1].split("[[")[0].replace("<|end|>", ""))
        assert said in plain(tokenizer().decode(other.prompt_ids))


def test_refine_s_second_try_is_recorded_with_its_hint_and_its_adviser_is_not_trained(tmp_path):
    adviser = dspy.utils.DummyLM([{"discussion": "Too long.", "advice": '{"self": "Shorter."}'}] * 100)
    program = Best(dspy.Refine)
    program.set_lm(lab_policy())
    with dspy.context(lm=adviser):
        run = run_watched(program, tmp_path / "run")
    assert_trained(run, program, {"best.module"})
    prompts = [plain(tokenizer().decode(row.prompt_ids)) for row in run.rows]
    assert 0 < sum("shorter." in prompt for prompt in prompts) < len(prompts)


def test_a_predictor_with_a_frozen_lm_has_no_rows(tmp_path):
    program = Chain()
    program.set_lm(lab_policy())
    program.second.lm = dspy.utils.DummyLM([{"answer": "3 4 5"}] * 100)
    run = run_watched(program, tmp_path / "run")
    assert_trained(run, program, {"first", "third"})
    assert run.compiled.second.lm.model == "dummy"
    assert any("3 4 5" in tokenizer().decode(row.prompt_ids) for row in run.rows if row.predictor == "third")


def test_a_greedy_predictor_is_recorded_and_does_not_learn(tmp_path):
    program = Chain()
    program.second = says(SOLVE, temperature=0)
    program.set_lm(lab_policy())
    run = run_watched(program, tmp_path / "run")
    assert_trained(run, program, {"first", "third"})
    assert run.reports("step")[0]["counts"]["greedy_calls"] == STEP
    assert "12 calls were greedy" in run.told()


def test_a_module_that_is_frozen_in_dspy_s_way_speaks_with_the_run_s_weights_and_does_not_learn(tmp_path):
    program = Nested()
    program.set_lm(lab_policy())
    program.inner._compiled = True
    run = run_watched(program, tmp_path / "run", method="rl")
    assert {row.predictor for row in run.rows} == {"steps[0].solve", "steps[1]", "by_name['last']"}
    assert all(set(rollout.candidate.texts) == set(read_texts(program).texts) for _, rollout in run.rollouts)


def test_a_predictor_made_while_the_program_runs_speaks_with_the_run_s_weights_and_does_not_learn(tmp_path):
    class Makes(dspy.Module):
        def __init__(self):
            super().__init__()
            self.first = says(WORK)

        def forward(self, numbers):
            return says(SOLVE)(numbers=self.first(numbers=numbers).answer)

    with dspy.context(lm=lab_policy()):
        run = run_watched(Makes(), tmp_path / "run", method="rl")
    assert {row.predictor for row in run.rows} == {"first"}


def test_a_program_that_can_only_be_awaited_is_refused(tmp_path):
    class OnlyAsync(dspy.Module):
        def __init__(self):
            super().__init__()
            self.solve = says(WORK)

        async def aforward(self, numbers):
            return await self.solve.acall(numbers=numbers)

    program = OnlyAsync()
    program.set_lm(lab_policy())
    with pytest.raises(ConfigurationError, match=r"cannot be measured \(program: AttributeError\).*'forward'"):
        run_watched(program, tmp_path / "run")


ADAPTERS = {"chat": dspy.ChatAdapter, "json": dspy.JSONAdapter, "xml": dspy.XMLAdapter}


@pytest.mark.parametrize("name", ADAPTERS)
def test_tokens_are_exact_under_every_adapter(name, tmp_path):
    program = Lenient()
    program.set_lm(lab_policy())
    with dspy.context(adapter=ADAPTERS[name]()):
        run = run_watched(program, tmp_path / "run", method="rl")
    assert {row.predictor for row in run.rows} == {"solve"}
    assert {len(rollout.calls) for _, rollout in run.rollouts} == {1}, "an adapter asked a second time"
    assert_tokens_are_exact(run)
    assert_calls_hold_their_instruction(run)


@pytest.mark.parametrize(
    ("make", "adapter"),
    [
        pytest.param(lambda: dspy.ChainOfThought(signature(WORK)), None, id="chain of thought"),
        pytest.param(Agent, None, id="react", marks=pytest.mark.slow),
        pytest.param(lambda: Inner(WORK), dspy.XMLAdapter(), id="xml"),
    ],
)
def test_a_program_that_the_model_cannot_follow_fails_is_counted_and_goes_on(make, adapter, tmp_path):
    program = make()
    program.set_lm(lab_policy())
    with dspy.context(adapter=adapter or dspy.ChatAdapter()):
        run = run_watched(program, tmp_path / "run", method="rl")
    (step,) = run.reports("step")
    assert run.outcomes("step") == {"failed: parse": STEP}
    assert outcomes_in(step["counts"]) == {"failed: parse": STEP}
    assert (step["counts"]["flat_groups"], step["update"]["rows"]) == (3, 0)
    assert "every reply to the first examples failed (parse)" in run.told()
    assert_tokens_are_exact(run)
    assert_calls_hold_their_instruction(run)


def test_an_adapter_that_the_program_sets_itself_asks_once(tmp_path):
    class Xml(Inner):
        def forward(self, numbers):
            with dspy.context(adapter=dspy.XMLAdapter()):
                return self.solve(numbers=numbers)

    program = Xml(WORK)
    program.set_lm(lab_policy())
    run = run_watched(program, tmp_path / "run", method="rl")
    assert {len(rollout.calls) for rollout in run.played("step")} == {1}


def test_a_reply_whose_failed_parse_the_program_handles_is_reflected_on(tmp_path):
    program = Lenient()
    program.set_lm(lab_policy())
    with dspy.context(adapter=dspy.XMLAdapter()):
        run = run_watched(program, tmp_path / "run")
    assert run.reports("cycle")[0]["reflections"] > 0


def test_demonstrations_are_in_the_prompts_that_are_learnt_from(tmp_path):
    program = Inner(WORK)
    program.solve.demos = [dspy.Example(numbers="8 0 8 0", answer="0 8 0 8 0 8")]
    program.set_lm(lab_policy())
    run = run_watched(program, tmp_path / "run")
    assert_trained(run, program, {"solve"})
    for row in run.rows:
        prompt = tokenizer().decode(row.prompt_ids)
        assert "8 0 8 0" in prompt
        assert "0 8 0 8 0 8" in prompt
