"""The models of a program's inputs and outputs are what it really takes and gives."""

from typing import Literal

import dspy
import pytest
from pydantic import BaseModel, ValidationError

from dspy_fst import ConfigurationError
from dspy_fst.serve.schema import schema_of


class Person(BaseModel):
    name: str
    age: int


class Extract(dspy.Signature):
    """Instructions, which are nobody's business."""

    text: str = dspy.InputField(desc="where people are named")
    most: int = dspy.InputField(default=3, ge=1)
    kind: Literal["real", "made up"] = dspy.OutputField()
    people: list[Person] = dspy.OutputField(desc="in the order of the text")


class Annotated(dspy.Module):
    def __init__(self):
        super().__init__()
        self.first = dspy.Predict("text -> summary")
        self.last = dspy.ChainOfThought("summary -> year: int")

    def forward(self, text: str, languages: list[str] | None = None):
        return self.last(summary=self.first(text=text).summary)


class Bare(Annotated):
    def forward(self, text, *more: int):
        return self.last(summary=text)


def faults_of(*arguments):
    with pytest.raises(ConfigurationError) as refused:
        schema_of(*arguments)
    return refused.value.faults


def test_a_predictor_has_its_signature_s_models():
    schema = schema_of(dspy.Predict(Extract))
    inputs = schema.inputs.model_json_schema()
    assert inputs["properties"]["text"] == {"title": "Text", "type": "string", "description": "where people are named"}
    assert inputs["properties"]["most"] == {"title": "Most", "type": "integer", "default": 3, "minimum": 1}
    assert inputs["required"] == ["text"]
    outputs = schema.outputs.model_json_schema(mode="serialization")
    assert outputs["properties"]["kind"]["enum"] == ["real", "made up"]
    assert outputs["properties"]["people"]["items"] == {"$ref": "#/$defs/Person"}
    assert "Instructions" not in str(inputs) + str(outputs)
    assert "prefix" not in str(inputs) + str(outputs)


def test_inputs_are_checked_and_unknown_ones_refused():
    inputs = schema_of(dspy.Predict(Extract)).inputs
    for wrong in ({"text": 1}, {"text": "x", "most": 0}, {"text": "x", "other": 1}, {}):
        with pytest.raises(ValidationError):
            inputs.model_validate(wrong)


def test_a_chain_of_thought_has_its_predictor_s_models():
    schema = schema_of(dspy.ChainOfThought("question -> answer: int"))
    assert list(schema.inputs.model_fields) == ["question"]
    assert list(schema.outputs.model_fields) == ["reasoning", "answer"]


def test_an_agent_has_its_own_signature_s_models_and_not_its_inner_predictors():
    schema = schema_of(dspy.ReAct("question -> answer: int", tools=[]))
    assert list(schema.inputs.model_fields) == ["question"]
    assert list(schema.outputs.model_fields) == ["answer"]


def test_a_program_has_its_forward_s_inputs_and_its_last_predictor_s_outputs():
    schema = schema_of(Annotated())
    assert {name: field.annotation for name, field in schema.inputs.model_fields.items()} == {
        "text": str,
        "languages": list[str] | None,
    }
    assert not schema.inputs.model_fields["languages"].is_required()
    assert list(schema.outputs.model_fields) == ["reasoning", "year"]


def test_inputs_that_cannot_be_told_are_refused_by_name_with_what_to_do():
    faults = faults_of(Bare())
    assert len(faults) == 2
    assert "Bare.forward(text)" in faults[0]
    assert "*more" in faults[1]
    assert all("--signature" in fault for fault in faults)


@pytest.mark.parametrize("signature", ["text: str -> year: int", dspy.Signature("text: str -> year: int")])
def test_a_signature_that_is_given_counts(signature):
    schema = schema_of(Bare(), signature)
    assert list(schema.inputs.model_fields) == ["text"]
    assert list(schema.outputs.model_fields) == ["year"]


def test_a_signature_that_cannot_be_read_is_refused():
    assert "signature='text'" in faults_of(Bare(), "text")[0]


@pytest.mark.parametrize("annotation", [dspy.Image, list[dspy.Image], dspy.Image | None])
def test_inputs_through_which_a_caller_could_have_addresses_fetched_are_refused(annotation):
    signature = dspy.Signature({"picture": (annotation, dspy.InputField()), "answer": (str, dspy.OutputField())})
    assert "dspy.Image" in faults_of(dspy.Predict(signature))[0]


def test_types_without_a_json_form_are_refused_by_name():
    class Opaque:
        pass

    class Odd(Annotated):
        def forward(self, text: Opaque):
            return self.last(summary=str(text))

    assert "'text'" in faults_of(Odd())[0]
