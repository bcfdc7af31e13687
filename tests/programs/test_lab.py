"""The miniature laboratory: worlds, tokenizer, shipped base, proposer."""

import json
import os
import random
from dataclasses import replace
from pathlib import Path

import dspy
import pytest

from programs.lab import BASE, FeedbackProposer, build, load_world
from programs.lab.lessons import COMPOSITIONS, HELD_OUT, draw_lesson
from programs.lab.measure import accuracy, load, parse, world_tasks
from programs.lab.operations import OPERATIONS, apply
from programs.lab.pretrain import Recipe, pretrain
from programs.lab.proposer import guess_rule, states_rule
from programs.lab.tokenizer import fixed_pieces, messages, reply
from programs.lab.world import World, describe_fault, world_names

WORLDS = world_names()
RECIPE = json.loads((BASE / "recipe.json").read_text()) if (BASE / "recipe.json").exists() else {}


@pytest.fixture(scope="module")
def base():
    return load(BASE)


# Worlds


@pytest.mark.parametrize("name", WORLDS)
def test_only_the_right_answer_scores(name: str) -> None:
    lab = build(name, train=40, val=5, test=5)
    for gold in lab.trainset:
        right = lab.metric(gold, dspy.Prediction(answer=f" {gold.answer}\n"))
        assert right.score == 1.0
        assert right.feedback == "Correct."
        for wrong in (gold.answer + " 1", gold.answer[:-1], "", "nonsense"):
            judged = lab.metric(gold, dspy.Prediction(answer=wrong))
            assert judged.score == 0.0
            assert judged.feedback.startswith("Wrong.")


@pytest.mark.parametrize("name", WORLDS)
def test_feedback_never_names_an_operation(name: str) -> None:
    lab = build(name, train=100, val=5, test=5)
    for gold in lab.trainset:
        for answer in (gold.numbers, gold.answer[::-1], "1 2"):
            feedback = lab.metric(gold, dspy.Prediction(answer=answer)).feedback
            assert not states_rule(feedback)
            assert lab.world.told.lower() not in feedback.lower()


def test_half_of_the_feedback_hides_the_answer_and_always_the_same_half() -> None:
    lab = build("reverse", train=400, val=5, test=5)
    shown = ["Expected" in lab.metric(gold, dspy.Prediction(answer="x")).feedback for gold in lab.trainset]
    assert 0.4 < sum(shown) / len(shown) < 0.6
    assert shown == ["Expected" in lab.metric(gold, dspy.Prediction(answer="x")).feedback for gold in lab.trainset]
    open_metric = replace(lab.metric, vague=0.0)
    assert all("Expected" in open_metric(gold, dspy.Prediction(answer="x")).feedback for gold in lab.trainset)


def test_feedback_says_what_kind_of_fault_and_where() -> None:
    assert describe_fault("3 2", "3 2 1", False) == "Wrong. Too many values."
    assert describe_fault("3 2 1", "3 1 2", True) == (
        "Wrong. All values belong here, but not in these places; the first fault is at place 2. "
        "Expected: 3 2 1. Got: 3 1 2."
    )


@pytest.mark.parametrize("name", WORLDS)
def test_problem_sets_are_disjoint_and_follow_the_seed(name: str) -> None:
    lab, same, other = build(name, seed=3), build(name, seed=3), build(name, seed=4)
    sets = [lab.trainset, lab.valset, lab.testset]
    problems = [example.numbers for examples in sets for example in examples]
    assert [len(examples) for examples in sets] == [512, 64, 128]
    assert len(set(problems)) == len(problems)
    assert problems[:512] == [example.numbers for example in same.trainset]
    assert problems[:512] != [example.numbers for example in other.trainset]
    assert all(example.inputs().keys() == ["numbers"] for example in lab.trainset)


def test_a_world_from_outside_is_loaded_by_import_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_world.py").write_text(
        "from programs.lab.world import World\n"
        "WORLD = World(name='twice', answer=lambda text: f'{text} {text}', told='Write the list twice.')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    lab = build("my_world:WORLD", train=3, val=1, test=1)
    assert lab.trainset[0].answer == f"{lab.trainset[0].numbers} {lab.trainset[0].numbers}"
    assert lab.program.solve.signature.instructions == lab.world.seed_instruction


def test_an_unknown_world_and_a_too_small_one_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="reverse_drop"):
        load_world("no_such_world")
    tiny = World(name="tiny", answer=str, told="", draw=lambda rng: str(rng.randrange(10)))
    with pytest.raises(ValueError, match="only 10"):
        build(tiny)


def test_pretraining_never_states_the_harder_composition() -> None:
    assert not set(HELD_OUT) & set(COMPOSITIONS)
    told = load_world("ends_decrement")
    assert HELD_OUT[0] == ("ends", "decrement")
    assert told.answer("4 7 1 9") == "3 8"
    rng = random.Random(0)
    assert not any(told.told in draw_lesson(rng, 1).instruction for _ in range(2000))


# Tokenizer


def test_each_fixed_piece_and_each_digit_is_one_token(base) -> None:
    tokenizer = base[1]
    assert all(len(tokenizer(piece)["input_ids"]) == 1 for piece in (*fixed_pieces(), *"0123456789", " 7"))


def test_prompts_round_trip_and_replies_parse(base) -> None:
    tokenizer = base[1]
    prompt = tokenizer.apply_chat_template(messages("reverse the list.\nnow.", "4 7 1"), tokenize=False)
    ids = tokenizer(prompt)["input_ids"]
    assert tokenizer.decode(ids) == prompt
    assert len(ids) < 25
    ids = tokenizer(reply("1 7 4") + tokenizer.eos_token)["input_ids"]
    assert parse(tokenizer.decode(ids, skip_special_tokens=True)) == "1 7 4"


@pytest.mark.parametrize("text", ["", "Zürich 漢字 😀\x00\ufffd", "[[ ## answer ## ]]", "<|end|> ``` {a}\t\n\n# 12,5%"])
def test_any_text_can_be_an_instruction(base, text: str) -> None:
    model, tokenizer = base
    ids = tokenizer(tokenizer.apply_chat_template(messages(text or "x", text), tokenize=False))["input_ids"]
    assert ids
    assert max(ids) < model.config.vocab_size
    if "<|" not in text:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text.lower()


# The shipped base


@pytest.mark.parametrize("name", WORLDS)
def test_the_shipped_base_does_as_its_recipe_says(base, name: str) -> None:
    world, rng = load_world(name), random.Random(11)
    measured = RECIPE["measured"]
    told, parsed = accuracy(*base, world_tasks(rng, world, world.told, 192))
    untold, _ = accuracy(*base, world_tasks(rng, world, world.seed_instruction, 192))
    assert abs(told - measured["told"][name]) < 0.13
    assert abs(untold - measured["seed"][name]) < 0.07
    assert parsed >= 0.95


def test_the_shipped_base_is_small_and_untied(base) -> None:
    assert base[0].config.tie_word_embeddings is False
    assert sum(file.stat().st_size for file in BASE.iterdir()) < 6e6


# The proposer


def records(world: World, shows_answer: bool, count: int = 4) -> list[dict[str, object]]:
    rng = random.Random(5)
    problems = [world.draw(rng) for _ in range(count)]
    return [
        {
            "Inputs": {"numbers": numbers},
            "Generated Outputs": {"answer": numbers},
            "Feedback": world.feedback(world.answer(numbers), numbers, shows_answer),
        }
        for numbers in problems
    ]


@pytest.mark.parametrize("name", WORLDS)
def test_the_proposer_finds_the_rule_when_shown_answers(name: str) -> None:
    world = load_world(name)
    chain = guess_rule(records(world, shows_answer=True), random.Random(0))
    assert chain is not None
    assert " ".join(map(str, apply(chain, [9, 4, 7, 1]))) == world.answer("9 4 7 1")


def test_the_proposer_errs_on_vague_feedback() -> None:
    world = load_world("reverse_drop")
    guesses = {guess_rule(records(world, shows_answer=False), random.Random(seed)) for seed in range(20)}
    assert len(guesses) > 1
    assert any(apply(chain, [9, 4, 7]) != [7, 4] for chain in guesses if chain)


def test_the_proposer_is_a_function_of_its_inputs_and_seed() -> None:
    world = load_world("reverse_drop")
    data = {"solve": records(world, shows_answer=True)}
    candidate = {"solve": world.seed_instruction, "other": "Leave me."}
    texts = [FeedbackProposer(seed)(candidate, data, ["solve"]) for seed in range(12)]
    assert texts == [FeedbackProposer(seed)(candidate, data, ["solve"]) for seed in range(12)]
    assert all(set(text) == {"solve"} for text in texts)
    assert len({text["solve"] for text in texts}) > 4


def test_the_proposer_survives_records_it_cannot_read() -> None:
    odd = [{"Inputs": {}, "Generated Outputs": "```", "Feedback": "Your output failed to parse."}]
    assert FeedbackProposer()({"solve": "Do it."}, {"solve": odd}, ["solve"])["solve"]
    assert FeedbackProposer()({"solve": "Do it."}, {}, ["solve"])["solve"]


def test_proposals_from_shown_answers_beat_the_seed_instruction(base) -> None:
    world, rng = load_world("reverse_drop"), random.Random(2)
    candidate = {"solve": world.seed_instruction}
    data = {"solve": records(world, shows_answer=True)}
    tasks = []
    for seed in range(6):
        text = FeedbackProposer(seed)(candidate, data, ["solve"])["solve"]
        tasks += world_tasks(rng, world, text, 32)
    before, _ = accuracy(*base, world_tasks(rng, world, world.seed_instruction, 192))
    after, _ = accuracy(*base, tasks)
    assert after > before + 0.1


# Pretraining


def test_the_pretraining_script_begins_as_the_shipped_base_did(tmp_path: Path) -> None:
    pretrain(Recipe(max_steps=2), tmp_path)
    made = json.loads((tmp_path / "recipe.json").read_text())
    assert made["recipe"] == {**RECIPE["recipe"], "max_steps": 2}
    assert made["made"]["parameters"] == RECIPE["made"]["parameters"]
    assert made["made"]["steps"] == 2
    assert (tmp_path / "tokenizer.json").read_text() == (BASE / "tokenizer.json").read_text()


@pytest.mark.skipif("REMAKE_BASES" not in os.environ, reason="minutes: REMAKE_BASES=1 pytest tests/programs")
@pytest.mark.timeout(900)
def test_the_pretraining_script_remakes_the_shipped_base(tmp_path: Path) -> None:
    report = pretrain(Recipe(), tmp_path)
    made = json.loads((tmp_path / "recipe.json").read_text())
    assert made["recipe"] == RECIPE["recipe"]
    assert report.parsed >= 0.95
    for name in WORLDS:
        assert abs(report.told[name] - RECIPE["measured"]["told"][name]) < 0.2
        assert report.seed[name] < 0.15


def test_all_operations_have_their_own_words() -> None:
    phrases = [phrase for op in OPERATIONS for phrase in (*op.wordings, op.unheard)]
    assert len(set(phrases)) == len(phrases)
