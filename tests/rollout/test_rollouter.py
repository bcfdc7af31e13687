"""Rollouts: what is recorded, what is scored, what is masked."""

import asyncio
import logging
import re
import signal
import threading
import time

import dspy
import pytest
from dspy.utils import parallelizer
from dspy.utils.exceptions import AdapterParseError

from dspy_fst.errors import EngineError
from dspy_fst.rollout.components import read_texts
from dspy_fst.rollout.reward import Reward, UnmeasuredError, metric_fault
from dspy_fst.rollout.rollout_settings import RolloutSettings
from dspy_fst.rollout.rollouter import Rollouter, Task
from dspy_fst.rollout.summaries import failed_reply_of, summarize
from dspy_fst.run.interrupts import Terminated
from dspy_fst.types import Candidate, Population, Problem
from tests.fakes import fields, scripted_policy

PROBLEMS = [Problem(i, dspy.Example(question=f"q{i}", answer=str(i)).with_inputs("question")) for i in range(4)]


class TwoStep(dspy.Module):
    """Calls ``draft`` as often as the question's number says, then ``answer`` once."""

    def __init__(self):
        super().__init__()
        self.draft = dspy.Predict("question -> draft")
        self.answer = dspy.Predict("question, drafts -> answer")

    def forward(self, question):
        drafts = [self.draft(question=question).draft for _ in range(int(question[1:]))]
        return self.answer(question=question, drafts=str(drafts))


def speak(messages, seed):
    """Answers both predictors of TwoStep; the number in the question is the answer."""
    number = re.search(r"^q(\d)", messages[-1]["content"], re.MULTILINE)[1]
    return fields(draft=f"d{seed % 10}") if "## draft ##" in messages[0]["content"] else fields(answer=number)


def exact(gold, pred, trace=None):
    return float(pred.answer == gold.answer)


def rollouter_of(program, speak=speak, metric=exact, **settings):
    policy, engine = scripted_policy(speak)
    program.set_lm(policy)
    engine.version = "step-000001"
    return Rollouter(program, Reward(metric), RolloutSettings(num_threads=8, **settings), engine.expect), engine


def play_one(program, **arguments):
    rollouter, _ = rollouter_of(program, **arguments)
    return rollouter.rollout([Task(PROBLEMS[1], read_texts(program))], "test")[0]


def test_every_call_carries_its_predictor_candidate_and_weights():
    program = TwoStep()
    rollouter, _ = rollouter_of(program)
    candidates = [Candidate({**read_texts(program).texts, "answer": f"Say it {i}."}) for i in range(2)]
    rollouts = rollouter.rollout([Task(p, c, s) for p in PROBLEMS for c in candidates for s in range(4)], "test")
    assert len(rollouts) == 32
    for rollout in rollouts:
        assert [call.predictor for call in rollout.calls] == ["draft"] * rollout.problem + ["answer"]
        assert {call.weights for call in rollout.calls} == {"step-000001"}
        assert rollout.reward == 1.0
        spoken = "".join(map(chr, rollout.calls[-1].prompt_ids))
        assert rollout.candidate.texts["answer"] in spoken


def test_a_group_holds_each_candidate_g_over_k_times():
    program = TwoStep()
    rollouter, _ = rollouter_of(program)
    seed = read_texts(program)
    population = Population(tuple(Candidate({**seed.texts, "draft": str(i)}) for i in range(4)), (None,) * 4)
    groups = rollouter.groups(PROBLEMS, population, 8, "step-0")
    for group, problem in zip(groups, PROBLEMS, strict=True):
        assert group.problem == problem.index
        assert [r.candidate.texts["draft"] for r in group.rollouts] == list("00112233")


def test_seeds_depend_on_the_draw_and_the_sample_but_not_on_threads():
    seen: list[set[int]] = []
    for threads in (1, 8):
        asked: set[int] = set()

        def listen(messages, seed, asked=asked):
            asked.add(seed)
            return speak(messages, seed)

        program = TwoStep()
        rollouter, _ = rollouter_of(program, listen)
        rollouter.settings = RolloutSettings(num_threads=threads)
        rollouter.rollout([Task(PROBLEMS[2], read_texts(program), sample) for sample in range(3)], "a")
        seen.append(asked)
    assert seen[0] == seen[1]
    assert len(seen[0]) == 9  # three samples of three calls, two of which ask the same prompt


def test_copies_made_inside_the_program_keep_their_names():
    class Inside(dspy.Module):
        def __init__(self):
            super().__init__()
            self.best = dspy.BestOfN(dspy.Predict("question -> answer"), N=2, reward_fn=lambda a, p: 0.0, threshold=1.0)

        def forward(self, question):
            return self.best(question=question)

    rollout = play_one(Inside())
    assert [call.predictor for call in rollout.calls] == ["best.module"] * 2


def test_calls_are_recorded_from_inside_parallel_and_async_programs():
    class Spread(dspy.Module):
        def __init__(self):
            super().__init__()
            self.answer = dspy.Predict("question -> answer")

        def forward(self, question):
            example = dspy.Example(question=question).with_inputs("question")
            dspy.Parallel(num_threads=2, disable_progress_bar=True)([(self.answer, example)] * 3)

            async def two():
                return await asyncio.gather(*(self.answer.acall(question=question) for _ in range(2)))

            return asyncio.run(two())[0]

    rollout = play_one(Spread())
    assert rollout.reward == 1.0
    assert [call.predictor for call in rollout.calls] == ["answer"] * 5


def test_a_parallel_call_that_begins_does_not_disturb_another_that_is_just_beginning():
    rollouter_of(TwoStep())
    bars = parallelizer.tqdm.tqdm
    bar = bars.__new__(bars, total=2, disable=True)
    parallelizer.ParallelExecutor(num_threads=1, disable_progress_bar=True).execute(str, [1])
    bar.__init__(total=2, disable=True)


def test_rollouts_never_read_the_cache(monkeypatch, tmp_path):
    asked = []

    def listen(messages, seed):
        asked.append(seed)
        return fields(answer="1")

    monkeypatch.setattr(dspy, "cache", dspy.clients.cache.Cache(True, True, str(tmp_path), 10**6, 100))
    program = dspy.Predict("question -> answer", cache=True)
    rollouter, _ = rollouter_of(program, listen)
    for _ in range(3):  # one after another: calls made at once all miss, cached or not
        rollouter.rollout([Task(PROBLEMS[1], read_texts(program))], "same")
    assert len(asked) == 3


def test_a_value_that_is_not_allowed_is_told_with_what_is():
    program = dspy.Predict("question -> mood: Literal['good', 'bad']")
    rollout = play_one(program, speak=lambda m, s: fields(mood="so-so"))
    reason = "The reply could not be parsed: field 'mood': 'so-so' came, and it should be 'good' or 'bad'"
    assert (rollout.failure, rollout.feedback.splitlines()[0]) == ("parse", reason)
    told = failed_reply_of([rollout])
    assert told.startswith("A reply of 'self': ")
    assert f"{reason} Expected to find output fields in the LM response: [mood]" in told
    assert summarize(rollout)["feedback"].startswith(reason)


def test_a_reply_that_does_not_parse_is_scored_and_keeps_its_tokens():
    rollout = play_one(
        dspy.Predict("question -> a: int, b: int"), speak=lambda m, s: "nonsense", format_failure_score=-0.5
    )
    assert (rollout.reward, rollout.failure, rollout.mask) == (-0.5, "parse", None)
    assert len(rollout.calls) == 1, "ChatAdapter's silent second call must be off"
    assert "".join(map(chr, rollout.calls[0].completion_ids)) == "nonsense"
    assert len(rollout.trace) == 1


@pytest.mark.parametrize(
    ("error", "mask"),
    [(EngineError("gone"), "lm: EngineError"), (ConnectionError("down"), "outage: ConnectionError")],
)
def test_an_engine_or_tool_that_is_gone_masks(error, mask):
    class Tool(dspy.Module):
        def __init__(self):
            super().__init__()
            self.answer = dspy.Predict("question -> answer")

        def forward(self, question):
            reply = self.answer(question=question)
            if not isinstance(error, EngineError):
                raise error
            return reply

    def fail(messages, seed):
        if isinstance(error, EngineError):
            raise error
        return fields(answer="1")

    rollout = play_one(Tool(), speak=fail)
    assert (rollout.reward, rollout.mask) == (None, mask)


def test_a_frozen_lm_s_failure_is_not_the_policy_s():
    class Mixed(dspy.Module):
        def __init__(self):
            super().__init__()
            self.answer, self.judge = dspy.Predict("question -> answer"), dspy.Predict("answer -> a: int, b: int")

        def forward(self, question):
            return self.judge(answer=self.answer(question=question).answer)

    program = Mixed()
    rollouter, _ = rollouter_of(program)
    program.judge.lm = dspy.utils.DummyLM([{"nonsense": "x"}] * 9)
    rollout = rollouter.rollout([Task(PROBLEMS[1], read_texts(program))], "test")[0]
    assert rollout.mask == "frozen lm: AdapterParseError"
    assert [call.predictor for call in rollout.calls] == ["answer"]


def test_a_failed_parse_is_traced_with_the_predictor_s_own_inputs():
    class Inner(dspy.Module):
        def __init__(self):
            super().__init__()
            self.draft, self.answer = dspy.Predict("question -> draft"), dspy.Predict("draft -> a: int, b: int")

        def forward(self, question):
            return self.answer(draft=self.draft(question=question).draft)

    rollout = play_one(Inner(), speak=lambda m, s: fields(draft="mine"))
    assert rollout.failure == "parse"
    predictor, inputs, _ = rollout.trace[-1]
    assert inputs == {"draft": "mine"}
    assert list(predictor.signature.output_fields) == ["a", "b"]


class Retries(dspy.Module):
    """Asks ``draft`` again when its reply does not parse, under an adapter of its own."""

    def __init__(self):
        super().__init__()
        self.draft, self.answer = dspy.Predict("question -> draft"), dspy.Predict("draft -> answer")

    def forward(self, question):
        with dspy.context(adapter=dspy.ChatAdapter(use_json_adapter_fallback=True)):
            try:
                draft = self.draft(question=question, config={"temperature": 0.5}).draft
            except AdapterParseError:
                draft = "none"
        return self.answer(draft=draft)


def half_spoken(messages, seed):
    return "nonsense" if "question" in messages[0]["content"] else fields(answer="1")


def test_a_failed_parse_that_the_program_handles_is_traced_in_its_place_and_hidden_from_the_metric():
    seen = []

    def listens(gold, pred, trace=None):
        seen.append([predictor._fst_predictor_name for predictor, _, _ in trace])
        return 1.0

    rollout = play_one(Retries(), speak=half_spoken, metric=listens)
    assert (rollout.reward, rollout.failure, len(rollout.calls)) == (1.0, None, 2)
    (draft, inputs, failed), (answer, _, _) = rollout.trace
    assert (draft._fst_predictor_name, inputs, failed.completion_text) == ("draft", {"question": "q1"}, "nonsense")
    assert answer._fst_predictor_name == "answer"
    assert seen == [["answer"]]


def test_a_try_of_best_of_n_that_does_not_parse_is_traced_before_the_one_that_counts():
    replies = iter(["nonsense", fields(answer="1")])
    best = dspy.BestOfN(dspy.Predict("question -> answer"), N=2, reward_fn=lambda a, p: 1.0, threshold=1.0)
    rollout = play_one(best, speak=lambda messages, seed: next(replies))
    assert rollout.reward == 1.0
    assert [type(output).__name__ for _, _, output in rollout.trace] == ["FailedPrediction", "Prediction"]


def test_a_frozen_lm_s_failed_parse_that_the_program_handles_is_not_traced():
    program = Retries()
    rollouter, _ = rollouter_of(program, speak=half_spoken)
    program.draft.lm = dspy.utils.DummyLM([{"nonsense": "x"}] * 9)
    rollout = rollouter.rollout([Task(PROBLEMS[1], read_texts(program))], "test")[0]
    assert [predictor._fst_predictor_name for predictor, _, _ in rollout.trace] == ["answer"]


def test_a_program_that_trips_over_the_policy_s_output_is_scored():
    class Trips(dspy.Module):
        def __init__(self):
            super().__init__()
            self.answer = dspy.Predict("question -> answer")

        def forward(self, question):
            return {}[self.answer(question=question).answer]

    rollout = play_one(Trips())
    assert (rollout.reward, rollout.failure) == (0.0, "KeyError")


@pytest.mark.parametrize(
    ("returned", "mask"),
    [(None, "metric returned NoneType"), (float("nan"), "metric returned nan"), ("x", "metric returned str")],
)
def test_a_metric_without_a_number_masks(returned, mask):
    rollout = play_one(TwoStep(), metric=lambda gold, pred, trace=None: returned)
    assert (rollout.reward, rollout.mask) == (None, mask)


def test_a_metric_that_raises_masks():
    rollout = play_one(TwoStep(), metric=lambda gold, pred, trace=None: 1 / 0)
    assert (rollout.reward, rollout.mask) == (None, "metric raised ZeroDivisionError")


def test_a_rollout_over_its_time_is_masked_and_its_late_calls_are_refused():
    late: list[str] = []
    release = threading.Event()

    class Hangs(dspy.Module):
        def __init__(self):
            super().__init__()
            self.answer = dspy.Predict("question -> answer")

        def forward(self, question):
            reply = self.answer(question=question)
            if question == "q1":
                release.wait(20)
                try:
                    self.answer(question=question)
                except Exception as error:
                    late.append(str(error))
            return reply

    program = Hangs()
    rollouter, engine = rollouter_of(program, rollout_timeout_s=3)
    started = time.monotonic()
    rollouts = rollouter.rollout([Task(p, read_texts(program)) for p in PROBLEMS], "test")
    assert time.monotonic() - started < 15
    assert [r.mask for r in rollouts] == [None, "timeout", None, None]
    assert engine.expected[-1] == 0
    release.set()
    for _ in range(100):
        if late:
            break
        time.sleep(0.05)
    assert "given up" in late[0]


def test_feedback_and_predictor_signatures_of_metrics():
    def gepa_style(gold, pred, trace, pred_name, pred_trace):
        return dspy.Prediction(score=0.25, feedback=f"for {pred_name}")

    score = Reward(gepa_style)(PROBLEMS[0].example, dspy.Prediction(answer="0"), None, "draft", None)
    assert (score.value, score.feedback) == (0.25, "for draft")
    assert Reward(exact)(PROBLEMS[0].example, dspy.Prediction(answer="0")).value == 1.0
    assert metric_fault(gepa_style) is None
    assert metric_fault(exact) is None
    assert metric_fault(dspy.evaluate.answer_exact_match) is None
    assert metric_fault(dspy.evaluate.SemanticF1()) is None
    gold = dspy.Example(question="q", answer="Paris").with_inputs("question")
    assert Reward(dspy.evaluate.answer_exact_match)(gold, dspy.Prediction(answer="paris")).value == 1.0

    def with_option(gold, pred, trace=None, strict=True):
        return 1.0 if strict else 0.5

    assert Reward(with_option)(gold, dspy.Prediction(answer="x"), None, "draft", None).value == 1.0
    assert Reward(lambda *all_of_it: float(len(all_of_it)))(gold, dspy.Prediction()).value == 2.0
    assert "wrong signature" in str(metric_fault(lambda gold: 1.0))
    assert "wrong signature" in str(metric_fault(lambda gold, pred, trace, name, ptrace, more: 1.0))
    assert "not callable" in str(metric_fault(3))


def test_a_signal_that_arrives_in_a_metric_ends_the_run_and_an_exit_does_not():
    def ended(*_):
        raise Terminated(signal.SIGTERM)

    def leaves(*_):
        raise SystemExit(3)

    with pytest.raises(Terminated):
        Reward(ended)(dspy.Example(), dspy.Prediction())
    with pytest.raises(UnmeasuredError, match="SystemExit"):
        Reward(leaves)(dspy.Example(), dspy.Prediction())


class Panic(BaseException):
    """As the panics of Rust libraries are (pyo3)."""


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (Panic, "failed: Panic"),
        (GeneratorExit, "failed: GeneratorExit"),
        (asyncio.CancelledError, "masked: outage: CancelledError"),
    ],
)
def test_what_is_no_exception_and_no_signal_is_the_outcome_of_its_rollout(error, outcome):
    class Raises(TwoStep):
        def forward(self, **inputs):
            super().forward(**inputs)
            raise error

    def raises(gold, pred, trace=None):
        raise error

    assert play_one(Raises()).outcome.label == outcome
    assert play_one(TwoStep(), metric=raises).outcome.label == f"masked: metric raised {error.__name__}"


def test_ctrl_c_in_a_program_ends_the_run():
    class Stopped(TwoStep):
        def forward(self, **inputs):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        play_one(Stopped())


def test_warnings_of_dspy_s_lm_are_silent_while_rollouts_are_made_and_errors_are_not(caplog, monkeypatch):
    logger = logging.getLogger("dspy.clients.lm")
    monkeypatch.setattr(logger, "handlers", [caplog.handler])
    program = TwoStep()

    def warns(messages, seed):
        logger.warning("a reply was cut off")
        logger.error("a call failed")
        return speak(messages, seed)

    rollouter, *_ = rollouter_of(program, warns)
    rollouter.rollout([Task(PROBLEMS[0], read_texts(program))], "test")
    assert {record.message for record in caplog.records if record.name == logger.name} == {"a call failed"}
    logger.warning("after the rollouts")
    assert "after the rollouts" in caplog.text
