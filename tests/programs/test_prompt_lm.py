"""The laboratory's LM for the prompts of DSPy's optimizers tells what the prompt shows, and no more."""

import random

import dspy
from dspy.teleprompt.copro_optimizer import BasicGenerateInstruction

from programs.lab.prompt_lm import instruction_from, prompt_lm
from programs.lab.proposer import states_rule

SHOWN = "[{'numbers': '1 2 3', 'answer': '3 2 1'}, {'numbers': '4 7 5 5', 'answer': '5 5 7 4'}]"
LABELLED = (
    '[[ ## program_inputs ## ]]\n{"numbers": "4 7 5 1"}\n\n[[ ## oracle_metadata ## ]]\n{"answer": "1 5 7 4"}\n\n'
    '[[ ## worse_program_outputs ## ]]\n{"numbers": "4 7 5 1", "answer": "4 7"}'
)
REVERSED = ("reverse", "backwards", "right to left", "flip", "turn")


def told(text):
    return {instruction_from(text, random.Random(seed)) for seed in range(8)}


def test_it_infers_the_rule_that_the_shown_answers_follow():
    for text in (SHOWN, LABELLED):
        assert all(any(word in said.lower() for word in REVERSED) for said in told(text))


def test_it_guesses_where_no_answer_is_shown():
    guesses = told("Work out the answer from the numbers. 1 or 2 of them.")
    assert len(guesses) > 4
    assert all(map(states_rule, guesses))


def test_it_keeps_what_is_said_to_have_scored_best():
    attempts = "Instruction #1: Add.\nPrefix #1: A:\nResulting Score #1: 10.0\nInstruction #2: Sub.\nPrefix #2: B:\n"
    kept = [said for said in told(f"{attempts}Resulting Score #2: 40.5") if not states_rule(said)]
    assert kept
    assert all(said.endswith("Sub.") for said in kept)


def test_it_fills_every_field_that_a_prompt_asks_for():
    with dspy.context(lm=prompt_lm()):
        said = dspy.Predict(BasicGenerateInstruction, n=3, temperature=1.4)(basic_instruction="Work.")
    assert len({*said.completions.proposed_instruction}) > 1
