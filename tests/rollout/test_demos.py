"""Demos as a component of a candidate: read out, written in, and hidden from the problem that they were made of."""

import datetime
from typing import Any

import dspy
import pydantic
import pytest

import dspy_fst
from dspy_fst.errors import RunDirectoryError
from dspy_fst.rollout.components import (
    Demo,
    carried_by,
    carry,
    demo_marks,
    demos_in,
    demos_of,
    hide_demos,
    is_demos,
    marked,
    problem_mark,
    read_texts,
    texts_like,
    with_texts,
    written_demos,
)
from dspy_fst.rollout.reward import Reward
from dspy_fst.rollout.rollout_settings import RolloutSettings
from dspy_fst.rollout.rollouter import Rollouter, Task
from dspy_fst.types import Candidate, Population, Problem
from tests.fakes import fields, scripted_policy
from tests.pipelines.watched import lab_policy
from tests.test_untrusted import edit

SAY = demos_of("say")
PROBLEMS = [Problem(i, dspy.Example(question=f"q{i}", answer=f"a{i}").with_inputs("question")) for i in range(3)]
OWN = dspy.Example(question="mine", answer="kept")


class Says(dspy.Module):
    """One predictor with a demo that the user set, and one with none."""

    def __init__(self) -> None:
        super().__init__()
        self.say = dspy.Predict("question -> answer")
        self.say.demos = [OWN]
        self.check = dspy.Predict("answer -> verdict")

    def forward(self, question: str) -> dspy.Prediction:
        return self.say(question=question)


class Size(pydantic.BaseModel):
    width: int


def of(problem: Problem) -> Demo:
    return marked(dict(problem.example), problem.example)


def shown_for(problem: Problem, program: dspy.Module, candidate: Candidate) -> list[str]:
    """The questions of all demos in the prompt of a rollout."""
    asked: list[list[dict[str, Any]]] = []

    def speak(messages: list[dict[str, Any]], seed: int) -> str:
        asked.append(messages)
        return fields(answer="a")

    policy, engine = scripted_policy(speak)
    for _, predictor in program.named_sub_modules(dspy.Predict):  # of frozen parts, too
        predictor.lm = policy
    rollouter = Rollouter(program, Reward(lambda gold, pred: 1.0), RolloutSettings(num_threads=1), engine.expect)
    rollouter.rollout([Task(problem, candidate)], "test")
    told = [message["content"] for message in asked[0] if message["role"] == "user"][:-1]
    return [text.partition("## question ## ]]\n")[2].split("\n")[0] for text in told]


def test_demos_are_components_on_request_only() -> None:
    assert read_texts(Says()).texts.keys() == {"say", "check"}
    texts = read_texts(Says(), demos=True).texts
    assert texts.keys() == {"say", "check", SAY, demos_of("check")}
    assert texts[SAY] == '{"question": "mine", "answer": "kept"}'
    assert texts[demos_of("check")] == ""


def test_a_candidate_s_demos_replace_the_program_s_in_a_copy() -> None:
    program = Says()
    new = [{"question": "one\ntwo", "answer": "\u2028é"}, {"question": "3", "answer": ["x"]}]
    candidate = Candidate({SAY: written_demos([OWN, *new])})
    changed = with_texts(program, candidate)
    assert changed.say.demos == [OWN, *new]
    assert program.say.demos == [OWN]
    assert texts_like(candidate, changed).texts[SAY] == candidate.texts[SAY]
    assert with_texts(changed, Candidate({SAY: ""})).say.demos == []
    assert with_texts(changed, Candidate({"say": "Say it."})).say.demos == [OWN, *new]


def test_a_demo_that_the_program_shows_already_stays_the_object_that_it_is() -> None:
    program = Says()
    program.say.demos = [dspy.Example(question=Size(width=3), answer="wide")]
    candidate = read_texts(program, demos=True)
    assert candidate.texts[SAY] == '{"question": {"width": 3}, "answer": "wide"}'
    assert isinstance(with_texts(program, candidate).say.demos[0].question, Size)


def test_a_module_named_demos_is_no_component_of_demos() -> None:
    class Named(dspy.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = Says()
            self.part.demos = dspy.Predict("question -> answer")

    texts = read_texts(Named(), demos=True).texts
    assert not is_demos("part.demos")
    assert sum(map(is_demos, texts)) == 3


def test_a_rollout_does_not_show_the_demo_that_was_made_of_its_problem() -> None:
    program = Says()
    candidate = Candidate({SAY: written_demos([OWN, of(PROBLEMS[0]), of(PROBLEMS[1])])})
    assert shown_for(PROBLEMS[0], program, candidate) == ["mine", "q1"]
    assert shown_for(PROBLEMS[1], program, candidate) == ["mine", "q0"]
    assert shown_for(PROBLEMS[2], program, candidate) == ["mine", "q0", "q1"]


def test_nor_where_the_program_itself_holds_it_and_nobody_evolves_demos() -> None:
    program = with_texts(Says(), Candidate({SAY: written_demos([of(PROBLEMS[0])])}))
    assert shown_for(PROBLEMS[0], program, read_texts(program)) == []
    assert shown_for(PROBLEMS[1], program, read_texts(program)) == ["q0"]


def test_nor_where_a_frozen_part_of_the_program_holds_it() -> None:
    class Outer(dspy.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = with_texts(Says(), Candidate({SAY: written_demos([of(PROBLEMS[0]), of(PROBLEMS[1])])}))
            self.inner._compiled = True

        def forward(self, question: str) -> dspy.Prediction:
            return self.inner(question=question)

    outer = Outer()
    assert shown_for(PROBLEMS[0], outer, read_texts(outer)) == ["q1"]
    assert shown_for(PROBLEMS[2], outer, read_texts(outer)) == ["q0", "q1"]
    assert len(outer.inner.say.demos) == 2


def test_text_that_no_tokenizer_reads_is_no_demo() -> None:
    with pytest.raises(TypeError, match="no Unicode"):
        written_demos([{"question": "\ud83d", "answer": "a"}])


def test_a_problem_is_known_by_its_inputs_alone() -> None:
    example = PROBLEMS[0].example
    assert problem_mark(example) == problem_mark(example.copy(answer="another"))
    assert problem_mark(example) != problem_mark(PROBLEMS[1].example)


def test_a_problem_that_json_cannot_hold_has_no_mark_and_shows_all_demos() -> None:
    example = dspy.Example(question=datetime.date(2026, 1, 1)).with_inputs("question")
    program = with_texts(Says(), Candidate({SAY: written_demos([of(PROBLEMS[0])])}))
    assert problem_mark(example) is None
    hide_demos(program, example, demo_marks(program))
    assert len(program.say.demos) == 1
    with pytest.raises(TypeError, match="JSON"):
        marked({}, example)


def test_lines_that_are_no_demos_are_refused() -> None:
    with pytest.raises(ValueError, match="JSON object"):
        demos_in("[1, 2]")
    with pytest.raises(ValueError, match="Expecting"):
        demos_in("say it")


def compiled(demos: list[Demo]) -> dspy.Module:
    """A compiled program whose population differs in its demos."""
    program = Says()
    program.set_lm(lab_policy())
    seed = read_texts(program, demos=True)
    other = Candidate({**seed.texts, SAY: written_demos([OWN, *demos])})
    changed = with_texts(program, other)
    carry(changed, Population((other, seed), (1.0, 0.5)))
    return changed


def test_a_saved_program_keeps_the_demos_of_its_whole_population(tmp_path) -> None:
    demos = [of(PROBLEMS[0])]
    program = compiled(demos)
    loaded = dspy_fst.load(dspy_fst.save(program, tmp_path / "out"), Says())
    assert loaded.population == program.population
    assert written_demos(loaded.say.demos) == written_demos([OWN, *demos])
    assert [each["program"].say.demos[1:] for each in loaded.candidate_programs] == [demos, []]


def test_a_folder_whose_demos_cannot_be_read_is_refused(tmp_path) -> None:
    saved = dspy_fst.save(compiled([of(PROBLEMS[0])]), tmp_path / "out")

    def spoil(document: dict[str, Any]) -> None:
        document["members"][0][SAY] = "no JSON"

    edit(saved, "population.json", spoil)
    with pytest.raises(RunDirectoryError, match=r"say.demos\[\*\]: Expecting value"):
        dspy_fst.load(saved, Says())


def test_a_carried_population_goes_on_where_demos_evolve_and_only_its_shown_member_where_they_do_not() -> None:
    program = compiled([of(PROBLEMS[0])])
    evolving, fixed = read_texts(program, demos=True), read_texts(program)
    assert carried_by(program, evolving) == program.population.members
    assert carried_by(program, fixed) == (fixed,)


def test_a_carried_population_without_demos_gets_the_program_s_own() -> None:
    program = Says()
    carry(program, Population((read_texts(program),), (1.0,)))
    assert carried_by(program, read_texts(program, demos=True)) == (read_texts(program, demos=True),)
