"""Programs that hold what cannot be copied, or much: each rollout speaks its own candidate, and the student stays."""

import asyncio
import functools
import itertools
import logging
import sqlite3
import threading
import types
from dataclasses import dataclass
from typing import ClassVar

import dspy
import numpy as np
import pytest

import dspy_fst
from dspy_fst import FSTOptimizer
from dspy_fst.errors import ConfigurationError
from dspy_fst.rollout.components import read_texts, with_texts
from dspy_fst.rollout.copy_faults import copy_faults
from dspy_fst.types import PREDICTOR_TAG, Candidate, Population
from programs.lab import build
from tests.pipelines.watched import SHORT, append_words, lab_policy, run_watched, says, shorter, tokenizer

LEAVES = {
    "lock": threading.Lock,
    "connection": lambda: sqlite3.connect(":memory:", check_same_thread=False),
    "generator": lambda: (number for number in range(9)),
    "file": lambda: open(__file__, encoding="utf-8"),  # noqa: SIM115
}


class Step(dspy.Module):
    """One predictor beside something that cannot be copied."""

    def __init__(self, leaf=threading.Lock):
        super().__init__()
        self.ask = says("Reverse the list.")
        self.leaf = leaf()

    def forward(self, numbers):
        return self.ask(numbers=numbers)


class InList(dspy.Module):
    def __init__(self, leaf=threading.Lock):
        super().__init__()
        self.steps = [Step(leaf)]

    def forward(self, numbers):
        return self.steps[0](numbers=numbers)


class InDict(InList):
    def __init__(self, leaf=threading.Lock):
        super().__init__(leaf)
        self.steps = {0: Step(leaf)}


class InTuple(InList):
    def __init__(self, leaf=threading.Lock):
        super().__init__(leaf)
        self.steps = (Step(leaf), leaf())


class Beside(dspy.Module):
    """Two modules that share a predictor, each with a lock of its own."""

    def __init__(self):
        super().__init__()
        self.first, self.second = Step(), Step()
        self.second.ask = self.first.ask

    def forward(self, numbers):
        return self.second(numbers=self.first(numbers=numbers).answer)


@dataclass
class Helper:
    """A plain object around a predictor, and a lock that keeps it from being copied whole."""

    predictor: dspy.Module
    lock: object


class Hidden(dspy.Module):
    """DSPy names ``ask`` alone; the predictors in the dict of lists and in the object it does not see."""

    def __init__(self):
        super().__init__()
        self.ask = says("Reverse the list.")
        self.more = {"last": [says("Drop the last number.")]}
        self.helper = Helper(says("Sort the list."), threading.Lock())

    def forward(self, numbers):
        text = self.ask(numbers=numbers).answer
        return self.helper.predictor(numbers=self.more["last"][0](numbers=text).answer)


def carrying_two(program):
    """The program with a population of two: its own texts and others."""
    own = read_texts(program)
    other = Candidate({name: f"{text} Be brief." for name, text in own.texts.items()})
    program.population = Population((other, own), (None, None))
    return program


def predictors_of(program):
    return [predictor for _, predictor in program.named_predictors()]


def spoken_texts(rollout):
    """Each call's predictor, and its prompt as text."""
    return [(call.predictor, tokenizer().decode(call.prompt_ids)) for call in rollout.calls]


def assert_each_rollout_speaks_its_candidate(run):
    texts = {rollout.candidate.digest: rollout.candidate.texts for _, rollout in run.rollouts}
    assert len(texts) > 1
    rollouts = [*run.played("search"), *run.played("step")]
    assert sum(len(rollout.calls) for rollout in rollouts) >= 12
    for rollout in rollouts:
        for name, prompt in spoken_texts(rollout):
            said = [text for of in texts.values() if (text := of[name].lower()) in prompt]
            assert max(said, key=len) == rollout.candidate.texts[name].lower()


def assert_programs_speak_their_texts(compiled):
    members = compiled.population.unique()
    assert len(members) > 1
    assert [read_texts(entry["program"]) for entry in compiled.candidate_programs] == list(members)
    assert read_texts(compiled) == compiled.population.best


def assert_untouched(student, parts, lms, texts):
    assert predictors_of(student) == parts
    assert [part.lm for part in parts] == lms
    assert not any(hasattr(part, PREDICTOR_TAG) for part in parts)
    assert read_texts(student) == texts


@pytest.mark.parametrize("configured", [True, False], ids=["configure", "set_lm"])
@pytest.mark.parametrize("program", [InList, InDict, InTuple, Beside], ids=lambda kind: kind.__name__)
def test_a_lock_beside_predictors(tmp_path, program, configured):
    student, policy = carrying_two(program()), lab_policy()
    if not configured:
        student.set_lm(policy)
    parts, texts = predictors_of(student), read_texts(student)
    lms = [None if configured else policy for _ in parts]
    with dspy.context(lm=policy if configured else None):
        run = run_watched(student, tmp_path / "run", method="rl")
    assert_each_rollout_speaks_its_candidate(run)
    assert_programs_speak_their_texts(run.compiled)
    assert_untouched(student, parts, lms, texts)
    assert {call.predictor for call in run.calls} == {name for name, _ in student.named_predictors()}
    assert run.reports("step")[0]["counts"]["no_trained_calls"] == 0


@pytest.mark.parametrize("leaf", LEAVES.values(), ids=LEAVES)
def test_no_copy_shares_a_predictor_whatever_stands_beside_it(leaf, caplog):
    program = dspy.Module()
    program.steps, program.bare = {"a": [Step(leaf)], "b": (Step(leaf), leaf())}, leaf()
    program.helpers = [Helper(Step(leaf), leaf())]
    with caplog.at_level(logging.WARNING):
        copy = with_texts(program, Candidate({}))
    assert not caplog.records
    assert copy.bare is program.bare
    for old, new in zip(
        program.steps["a"] + [program.steps["b"][0]], copy.steps["a"] + [copy.steps["b"][0]], strict=True
    ):
        assert new is not old
        assert new.ask is not old.ask
        assert new.leaf is old.leaf
    assert copy.helpers[0].predictor.ask is not program.helpers[0].predictor.ask
    assert copy.steps["b"][1] is program.steps["b"][1]


def test_a_saved_program_is_loaded_beside_a_lock_and_the_given_one_stays(tmp_path):
    with dspy.context(lm=lab_policy()):
        run = run_watched(InList(), tmp_path / "run")
    best = run.compiled.population.members[-1]
    run.compiled.population = type(run.compiled.population)((best,), (1.0,))
    spoken = with_texts(run.compiled, best)
    dspy_fst.save(spoken, tmp_path / "out")
    fresh = InList()
    parts, texts = predictors_of(fresh), read_texts(fresh)
    loaded = dspy_fst.load(tmp_path / "out", fresh)
    assert read_texts(loaded) == best
    assert_untouched(fresh, parts, [None], texts)
    policy = loaded.get_lm()
    assert policy.checkpoint.path == tmp_path / "out" / "weights"
    assert loaded(numbers="1 2 3").answer is not None
    policy.release()


class Async(dspy.Module):
    def __init__(self):
        super().__init__()
        self.ask = says("Reverse the list.")

    async def aforward(self, numbers):
        await asyncio.sleep(0)
        return await self.ask.acall(numbers=numbers)


def by_method(program):
    program.forward = types.MethodType(lambda self, numbers: self.steps[0].ask(numbers=numbers), program)


def by_partial(program):
    program.forward = functools.partial(type(program).forward, program)


def by_closure(program):
    def forward(numbers):
        return program.steps[0](numbers=numbers)

    program.forward = forward


@pytest.mark.parametrize("bind", [by_method, by_partial, by_closure])
def test_a_forward_set_on_the_instance_is_the_copy_s_own(tmp_path, bind):
    student = InList()
    bind(student)
    run_of(student, tmp_path)


def test_an_asynchronous_program_made_synchronous_is_trained(tmp_path):
    run_of(dspy.syncify(Async()), tmp_path)


def run_of(student, tmp_path):
    parts, texts = predictors_of(student), read_texts(student)
    with dspy.context(lm=lab_policy()):
        run = run_watched(student, tmp_path / "run")
    assert {call.weights for rollout in run.played("step") for call in rollout.calls} == {"step-000000"}
    assert_each_rollout_speaks_its_candidate(run)
    assert_untouched(student, parts, [None], texts)


class Holding(dspy.Module):
    """Data beside a predictor, and notes; each run tells which array it saw, and what the notes held."""

    seen: ClassVar[list[tuple[int, int, list[str]]]] = []

    def __init__(self):
        super().__init__()
        self.ask = says("Reverse the list.")
        self.index = np.ones((500, 100), "float32")
        self.rows = [{"text": str(number)} for number in range(2_000)]
        self.notes: list[str] = []
        self.tell = self.notes.append

    def forward(self, numbers):
        self.tell(numbers)
        Holding.seen.append((id(self.index), id(self.rows), list(self.notes)))
        return self.ask(numbers=numbers)


def test_rollouts_share_the_data_and_not_the_notes(tmp_path):
    student, Holding.seen = Holding(), []
    with dspy.context(lm=lab_policy()):
        run_watched(student, tmp_path / "run", method="rl")
    assert len(Holding.seen) >= 12
    assert {array for array, _, _ in Holding.seen} == {id(student.index)}
    assert {rows for _, rows, _ in Holding.seen} == {id(student.rows)}
    assert all(len(notes) == 1 for _, _, notes in Holding.seen)
    assert student.notes == []


def test_predictors_that_dspy_does_not_name_are_told_and_counted(tmp_path):
    student, policy, told = Hidden(), lab_policy(), []
    with dspy.context(lm=policy):
        run = run_watched(student, tmp_path / "run", method="rl", listeners=[lambda e: told.append(e.get("text", ""))])
    places = "student: 2 predictors at \"more['last'][0]\", 'helper.predictor'"
    assert any(places in line for line in told)
    counts = run.reports("step")[0]["counts"]
    outside = sum(call.predictor == "" for rollout in run.played("step") for call in rollout.calls)
    assert counts["unnamed_calls"] == outside > 0
    weights = {call.weights for rollout in run.played("step") for call in rollout.calls}
    assert weights == {"step-000000"}
    assert student.more["last"][0].lm is None
    assert run.compiled.helper.predictor is not student.helper.predictor


class Looping(Step):
    """A thread that would go on with the student's predictor."""

    def __init__(self):
        super().__init__()
        self.thread = threading.Thread(target=self.work)
        self.words = self.work()

    def work(self):
        yield self.ask(numbers="1")


class Reading(Step):
    def forward(self, numbers):
        return self.read(numbers)


READING = Reading()
READING.read = lambda numbers: READING.ask(numbers=numbers)


@pytest.mark.parametrize(
    ("student", "message"),
    [
        (Looping(), "student: thread is a Thread that holds the program itself, and it cannot be copied"),
        (Looping(), "student: words is a generator that holds the program itself, and it cannot be copied"),
        (READING, "student: the function at read reads the global variable 'READING', which is a module of this"),
    ],
)
def test_a_predictor_that_copies_would_share_is_refused_before_any_work(tmp_path, student, message):
    with dspy.context(lm=lab_policy()), pytest.raises(ConfigurationError) as refused:
        compile_short(student, tmp_path)
    assert message in str(refused.value)
    assert not (tmp_path / "run").exists()


def test_a_generator_is_told_once_and_not_again_for_what_stands_in_it():
    class Turning(Step):
        def __init__(self):
            super().__init__()
            self.turns = (self.ask(numbers=numbers) for numbers in "12")

    (told,) = copy_faults(Turning())
    assert told.startswith("student: turns is a generator that holds the program itself, and it cannot be copied")


def compile_short(student, tmp_path, **recipe):
    optimizer = FSTOptimizer(metric=shorter, propose=append_words, run_dir=tmp_path / "run", **{**SHORT, **recipe})
    return optimizer.compile(student, trainset=build(train=8, val=1, test=1).trainset)


def test_iterators_and_caches_over_predictors_are_copied_too():
    program = dspy.Module()
    program.asks = [says("a"), says("b")]
    program.turns = itertools.cycle(program.asks)
    program.cached = functools.lru_cache(program.asks[0].get_config)
    copy = with_texts(program, Candidate({}))
    assert [next(copy.turns) for _ in range(3)] == [copy.asks[0], copy.asks[1], copy.asks[0]]
    assert copy.cached.__wrapped__.__self__ is copy.asks[0] is not program.asks[0]
