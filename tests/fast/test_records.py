"""What a reflection is shown of one run: the call, the feedback and the rest of the run, within a budget."""

import dspy
import pytest
from dspy.teleprompt.bootstrap_trace import FailedPrediction

from dspy_fst.fast.reflective_dataset import CHARACTERS, REST, bounded, cut, fair_share
from dspy_fst.types import PREDICTOR_TAG

RECORD = {"Inputs": {"question": "q", "passages": ["p"]}, "Generated Outputs": {"answer": "a"}, "Feedback": "No."}


def call(name, inputs, said):
    predictor = dspy.Predict("question -> answer")
    setattr(predictor, PREDICTOR_TAG, name)
    return predictor, inputs, said


def size(record):
    own = [*record["Inputs"].values(), *record["Generated Outputs"].values(), record["Feedback"], record.get(REST, "")]
    return sum(len(str(value)) for value in own)


def test_a_record_that_fits_is_shown_as_it_is():
    assert bounded(RECORD, [], 100) == RECORD


def test_the_rest_of_the_run_is_told_in_order_a_reply_that_did_not_parse_too():
    others = [
        call("draft", {"question": "q"}, dspy.Prediction(answer="d")),
        call("check", {"draft": "d"}, FailedPrediction("nonsense")),
    ]
    told = bounded(RECORD, others, 100)[REST]
    assert told == ("draft: question='q' -> answer='d'\n\ncheck: draft='d' -> a reply that did not parse='nonsense'")


@pytest.mark.parametrize("tokens", [100, 500, 3000])
def test_nothing_exceeds_the_budget_and_every_part_keeps_a_share(tokens):
    long = {
        "Inputs": {"question": "q" * 9_000, "passages": ["p" * 500] * 40},
        "Generated Outputs": {"answer": "a" * 50},
        "Feedback": "f" * 20_000,
    }
    others = [call(f"m{i}", {"question": "x" * 5_000}, dspy.Prediction(answer="y")) for i in range(30)]
    shown = bounded(long, others, tokens)
    budget = tokens * CHARACTERS
    assert 0.9 * budget < size(shown) <= budget
    assert len(shown["Feedback"]) >= 0.49 * budget
    assert len(shown[REST]) >= 0.24 * budget
    assert "characters left out" in shown["Inputs"]["question"]
    if tokens > 100:
        assert shown["Generated Outputs"]["answer"] == "a" * 50


def test_feedback_is_not_cut_while_anything_else_can_be():
    long = {**RECORD, "Inputs": {"question": "q" * 9_000}, "Feedback": "f" * 1_000}
    others = [call("m", {"question": "x" * 9_000}, dspy.Prediction(answer="y"))]
    shown = bounded(long, others, 500)
    assert shown["Feedback"] == long["Feedback"]
    assert size(shown) <= 2_000


def test_a_reply_that_did_not_parse_and_an_image_keep_their_form():
    image = dspy.Image("data:image/png;base64," + "A" * 9_000)
    record = {"Inputs": {"image": image}, "Generated Outputs": "r" * 9_000, "Feedback": "No."}
    shown = bounded(record, [], 100)
    assert shown["Inputs"]["image"] is image
    assert isinstance(shown["Generated Outputs"], str)
    assert len(shown["Generated Outputs"]) <= 400


def test_shares_are_fair_and_the_mark_says_how_much_is_missing():
    assert fair_share([10, 100, 300], 210) == 100
    assert fair_share([10, 20], 1_000) == 20
    assert fair_share([], 10) == 0
    text = "".join(map(str, range(1_000)))
    short = cut(text, 200)
    head, tail = short.split(" [... ")[0], short.split(" ...] ")[1]
    assert text.startswith(head)
    assert text.endswith(tail)
    assert f" {len(text) - len(head) - len(tail)} characters" in short.replace("[...", "")
    assert len(short) <= 200
