"""The three tasks in English: what their sets share, what their metrics pay for, and what feedback gives away."""

import re
from collections import Counter
from typing import Any

import dspy
import pytest
from dspy.utils import DummyLM
from dspy.utils.exceptions import AdapterParseError

from dspy_fst.rollout.reward import metric_fault
from programs.common import Task
from programs.language import EXPERT, TASKS, almanac, desk, slips
from programs.language.feedback import LONGEST, FeedbackProposer, sentences, told
from programs.language.turns import TurnsAdapter

INPUT = {"desk": "message", "slips": "note", "almanac": "question"}
GOLD = {
    "desk": lambda gold: {"desk": gold.desk},
    "slips": lambda gold: {"who": gold.who, "count": gold["count"], "bin": gold.bin},
    "almanac": lambda gold: {"answer": gold.answer, "sign": gold.sign, "found": [gold.title]},
}
every = pytest.mark.parametrize("name", TASKS)


def sets(task: Task) -> list[list[dspy.Example]]:
    return [task.trainset, task.valset, task.testset]


def spoken(name: str, examples: list[dspy.Example]) -> set[str]:
    """The sentences of a set."""
    return {text for example in examples for text in re.split(r"(?<=[.?])\s+", example[INPUT[name]])}


@every
def test_sets_are_large_enough_and_share_no_sentence(name: str) -> None:
    task = TASKS[name]()
    assert [len(one) for one in sets(task)] == [64, 32, 96]
    train, val, test = (spoken(name, one) for one in sets(task))
    assert not train & val
    assert not (train | val) & test
    shown = {str(demo[INPUT[name]]) for p in task.program.predictors() for demo in p.demos}
    assert not shown & (train | val | test)


@every
def test_problems_follow_the_seed_alone(name: str) -> None:
    first, again, other = (TASKS[name](8, 4, 4, seed=seed) for seed in (3, 3, 4))
    assert sets(first) == sets(again)
    assert first.trainset != other.trainset


@every
def test_a_right_answer_scores_one_and_nothing_scores_zero(name: str) -> None:
    task = TASKS[name](16, 4, 4)
    assert metric_fault(task.metric) is None
    for gold in task.trainset:
        right = task.metric(gold, dspy.Prediction(**GOLD[name](gold)))
        assert (right.score, right.feedback) == (1.0, "Correct.")
        nothing = task.metric(gold, dspy.Prediction())
        assert nothing.score == 0.0
        assert nothing.feedback.startswith("Wrong.")


@every
def test_feedback_shows_what_was_wrong_and_no_sentence_of_the_rules(name: str) -> None:
    task = TASKS[name](64, 4, 4)
    rules = [rule for text in EXPERT[name].values() for rule in re.split(r"[.:]\s*", text) if rule]
    for gold in task.trainset:
        for predictor in EXPERT[name]:
            feedback = task.metric(gold, dspy.Prediction(), None, predictor).feedback
            assert sentences(feedback), "the stand-in proposer reads it"
            assert not [rule for rule in rules if rule in feedback]


@every
def test_the_rules_are_in_no_text_that_a_program_starts_with(name: str) -> None:
    program = TASKS[name](2, 2, 2).program
    assert {predictor: p.signature.instructions for predictor, p in program.named_predictors()}.keys() == EXPERT[
        name
    ].keys()
    for predictor, p in program.named_predictors():
        assert EXPERT[name][predictor] != p.signature.instructions
        assert len(p.signature.instructions.split()) < 9


def test_the_house_rules_decide_half_of_the_messages_and_no_desk_gets_more_than_its_quarter() -> None:
    for examples in sets(desk.build()):
        assert all(f" the {gold.thing} " in gold.message for gold in examples)
        assert sum(gold.thing in desk.RULES for gold in examples) == len(examples) / 2
        assert set(Counter(gold.desk for gold in examples).values()) == {len(examples) / 4}
    assert not set(desk.RULES) & {demo["thing"] for demo in desk.DEMOS}


@every
def test_an_answer_that_is_always_the_same_is_seldom_right(name: str) -> None:
    for examples in sets(TASKS[name]()):
        answers = Counter(str(GOLD[name](gold)) for gold in examples)
        assert max(answers.values()) <= 0.4 * len(examples)


def test_more_messages_than_the_sentences_last_for_are_refused() -> None:
    with pytest.raises(ValueError, match="9000 messages: the sentences do not last"):
        desk.build(train=9000, val=0, test=0)


def test_a_slip_pays_only_where_every_scored_field_is_right_and_each_fault_is_told() -> None:
    gold = slips.build(2, 2, 2).trainset[0]
    right = {"who": gold.who, "count": gold["count"], "bin": gold.bin}
    assert slips.metric(gold, dspy.Prediction(**right, item="anything")).score == 1.0
    verdict = slips.metric(gold, dspy.Prediction(**{**right, "who": f"Anna {gold.who}", "bin": "pink"}))
    assert verdict.score == 0.0
    assert verdict.feedback == (
        f"Wrong. who: expected '{gold.who}', got 'Anna {gold.who}'. "
        f"bin: expected '{gold.bin}', got 'pink'; the words that mattered: '{gold['item']}'."
    )


def test_a_note_has_one_reading_under_the_shops_rules() -> None:
    for gold in slips.build().trainset:
        assert re.findall(r"\d+", gold.note) == [str(gold["count"])]
        assert [item for item in slips.BINS if item in gold.note] == [gold["item"]]
        assert re.search(rf"[A-Z]\w+ {gold.who}\b", gold.note)


def test_no_bin_and_no_sign_is_right_for_more_than_two_fifths() -> None:
    for name, field in (("slips", "bin"), ("almanac", "sign")):
        for examples in sets(TASKS[name]()):
            assert max(Counter(gold[field] for gold in examples).values()) <= 0.4 * len(examples)


def test_the_towns_own_word_finds_the_note_and_the_strangers_does_not() -> None:
    task = almanac.build()
    search = task.program.retriever.search  # type: ignore[attr-defined]

    def found(word: str) -> float:
        titles = [search(f"{word or gold.sign} {gold.question}", almanac.KEPT)[0]["title"] for gold in task.trainset]
        return sum(title == gold.title for title, gold in zip(titles, task.trainset, strict=True)) / len(titles)

    assert found("") == 1.0
    assert found("house") < 0.5
    assert max(found(sign) for sign in almanac.SIGNS.values()) <= 0.4


def test_a_note_holds_the_answer_and_the_program_reads_it() -> None:
    task = almanac.build(4, 2, 2)
    texts = {note["title"]: note["text"] for note in almanac.corpus()}
    gold = task.trainset[0]
    assert len(texts) == 96
    assert gold.answer in texts[gold.title]
    with dspy.context(lm=DummyLM([{"house": gold.house, "sign": gold.sign}, {"answer": gold.answer}])):
        assert task.metric(gold, task.program(question=gold.question)).score == 1.0


def test_each_predictor_of_the_almanac_is_told_its_own_part() -> None:
    gold = almanac.build(2, 2, 2).trainset[0]
    wrong: Any = dspy.Prediction(answer=gold.answer, sign="it's here", found=[])
    assert almanac.metric(gold, wrong, pred_name="ask").feedback == (
        f"Wrong. sign: expected '{gold.sign}', got 'its here'; the words that mattered: '{gold.house}'."
    )
    assert almanac.metric(gold, wrong, pred_name="read").feedback == "Correct."
    assert almanac.metric(gold, wrong).score == 0.5


def test_the_stand_in_proposer_says_what_feedback_showed_and_keeps_the_text_short() -> None:
    propose, text = FeedbackProposer(), "Say it."
    faults = [told("desk", "office", f"g{i}", f"w{i}") for i in range(9)]
    for _ in range(9):
        records = {"route": [{"Feedback": f"Wrong. {fault}"} for fault in faults]}
        assert propose({"route": text}, records, ["route"]) == propose({"route": text}, records, ["route"])
        text = propose({"route": text}, records, ["route"])["route"]
    said = text.split(". ")
    assert said[0] == "Say it"
    assert len(said) == LONGEST
    assert all(re.match(r"When it says w\d, the desk is office", sentence) for sentence in said[1:])


def test_where_feedback_says_nothing_the_text_stays() -> None:
    assert FeedbackProposer()({"fill": "Fill."}, {"fill": [{"Feedback": "Correct."}]}, ["fill"]) == {"fill": "Fill."}


def test_the_adapter_puts_the_instruction_before_every_input_and_reads_lines() -> None:
    sign, adapter = slips.Slip, TurnsAdapter()
    note = "Send 8 nails to Madam Ode on Sunday."
    messages = adapter.format(sign, [dspy.Example(**demo) for demo in slips.DEMOS], {"note": note})
    asked = [message["content"] for message in messages if message["role"] == "user"]
    assert asked[-1] == f"Fill in the slip.\nnote: {note}"
    assert all(text.startswith("Fill in the slip.\nnote: ") for text in asked)
    assert messages[2]["content"] == "who: Dahl\ncount: 7\nitem: lamps\nbin: red"
    filled = {"who": "Dahl", "count": 7, "item": "lamps", "bin": "red"}
    assert adapter.parse(sign, f"Here it is:\n{messages[2]['content']}\nwho: Kern") == filled
    for bad in ("who: Dahl\ncount: 7\nitem: lamps", "who: Dahl\ncount: some\nitem: lamps\nbin: red"):
        with pytest.raises(AdapterParseError):
            adapter.parse(sign, bad)
