"""The adapter of the three tasks: short prompts, with the instruction at the head of every turn.

Under DSPy's own adapters an instruction stands in the system message, before the demos, in a prompt of some 300 tokens.
On an earlier form of `desk` SmolLM2-135M gave a right reply the same probability under the seed's and the expert's
instruction then. Here the instruction stands right before each input, and a prompt takes some 100 tokens.
"""

import re
from collections.abc import Mapping
from typing import Any

import dspy
from dspy.adapters.utils import format_field_value, parse_value
from dspy.utils.exceptions import AdapterParseError
from pydantic import ValidationError
from pydantic.fields import FieldInfo

SYSTEM = "You are a helpful clerk."


class TurnsAdapter(dspy.ChatAdapter):
    """Inputs and outputs as lines ``name: value``; the signature's instructions before the inputs of each turn."""

    def format_system_message(self, signature: type[dspy.Signature]) -> str:
        return SYSTEM

    def format_user_message_content(
        self,
        signature: type[dspy.Signature],
        inputs: dict[str, Any],
        prefix: str = "",
        suffix: str = "",
        main_request: bool = False,
    ) -> str:
        given = {name: field for name, field in signature.input_fields.items() if name in inputs}
        lines = _lines(given, inputs)
        return "\n".join(part for part in (prefix, signature.instructions, lines, suffix) if part)

    def format_assistant_message_content(
        self, signature: type[dspy.Signature], outputs: dict[str, Any], missing_field_message: str | None = None
    ) -> str:
        fields = signature.output_fields
        return _lines(fields, {name: outputs.get(name, missing_field_message) for name in fields})

    def parse(self, signature: type[dspy.Signature], completion: str) -> dict[str, Any]:
        """Raises:
        AdapterParseError: a field has no line of its own, or its value is not of its type.
        """
        lines = re.findall(r"^(\w+): *(.*?) *$", completion, re.MULTILINE)
        found = dict(reversed(lines))  # the first line of a name counts
        try:
            return {name: parse_value(found[name], field.annotation) for name, field in signature.output_fields.items()}
        except (KeyError, ValidationError, ValueError) as error:
            fault = f"a field has no line `name: value`, or a value is not of its type: {error}"
            raise AdapterParseError("TurnsAdapter", signature, completion, message=fault) from error


def _lines(fields: Mapping[str, FieldInfo], values: Mapping[str, object]) -> str:
    """Those fields, a line each; a list takes several."""
    return "\n".join(f"{name}: {format_field_value(field, values[name])}" for name, field in fields.items())
