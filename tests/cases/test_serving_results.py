"""A served program that gives no prediction, or what cannot be sent, answers in the style of the other errors."""

from typing import Any

import dspy
import pytest

from tests.serve.makers import app_of, ask, question


class Gives(dspy.Module):
    def __init__(self, result):
        super().__init__()
        self.ask = dspy.Predict("question: str -> answer")
        self.ask.signature = self.ask.signature.with_updated_fields("answer", type_=Any)
        self.result = result

    def forward(self, question: str):
        return self.result


@pytest.mark.parametrize("result", [None, "just text", 42, [1, 2]], ids=str)
def test_no_prediction_is_a_bad_gateway_and_no_failure_of_the_server(result):
    reply = ask(app_of(program=Gives(result)), question("x"))
    assert reply.status_code == 502
    assert reply.json()["error"]["code"] == "no_prediction"
    assert "no prediction" in reply.json()["error"]["message"]


def test_outputs_without_a_json_form_are_told_as_outputs_that_do_not_fit():
    reply = ask(app_of(program=Gives(dspy.Prediction(answer=object()))), question("x"))
    assert reply.status_code == 502
    assert reply.json()["error"]["code"] == "outputs_invalid"


def test_a_prediction_is_given_as_ever():
    reply = ask(app_of(program=Gives(dspy.Prediction(answer={"a": 1}))), question("x"))
    assert reply.status_code == 200
    assert reply.json()["outputs"] == {"answer": {"a": 1}}
