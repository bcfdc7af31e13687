"""Which candidates answer a request, and what their majority says. Pure functions."""

import json
import random
from collections import Counter
from collections.abc import Sequence

from pydantic import BaseModel

from dspy_fst.serve.serving_settings import ChoiceName


def speakers(choice: ChoiceName, members: int, seed: int) -> list[int]:
    """Ranks of the members that answer; 0 is the best. Copies that fill a short population count as members."""
    if choice == "vote":
        return list(range(members))
    return [0] if choice == "best" else [random.Random(f"speaker of {seed}").randrange(members)]


def ballot(outputs: BaseModel, field: str | None) -> str:
    """What an answer votes for: equal outputs give equal ballots."""
    values = outputs.model_dump(mode="json")
    return json.dumps(values if field is None else values[field], sort_keys=True)


def decided(ballots: Sequence[str | None]) -> tuple[int, float]:
    """Rank of the best member of the majority, and the share of all members that agree with it.

    Args:
        ballots: By rank, the best member's first; None abstains. At least one is not None.

    >>> decided(["9", "7", "7", None])
    (1, 0.5)
    """
    votes = Counter(vote for vote in ballots if vote is not None)
    # Counter keeps the order of the ballots, so the better member wins a tie.
    winner, count = votes.most_common(1)[0]
    return list(ballots).index(winner), count / len(ballots)


def vote_faults(outputs: type[BaseModel], field: str | None) -> list[str]:
    """Why answers cannot be compared, one sentence each."""
    if field is not None:
        known = ", ".join(outputs.model_fields)
        return [] if field in outputs.model_fields else [f"vote_on is {field!r}: the outputs are {known}"]
    schema = outputs.model_json_schema(mode="serialization")
    definitions = schema.get("$defs", {})
    free = [name for name, part in schema["properties"].items() if _holds_free_text(part, definitions, ())]
    if not free:
        return []
    return [
        f"choice is 'vote', but {', '.join(free)} can hold any text, and no two free texts need be equal; name the "
        "field to vote on with vote_on"
    ]


_COMPOSED = ("anyOf", "oneOf", "allOf", "items", "prefixItems", "additionalProperties", "propertyNames")
_BOUND = {"enum", "const", "format", "pattern"}


def _holds_free_text(schema: object, definitions: dict[str, object], within: tuple[str, ...]) -> bool:
    """Whether a JSON schema accepts any string, at any depth; ``True`` and ``{}`` accept everything."""
    if isinstance(schema, list):
        return any(_holds_free_text(part, definitions, within) for part in schema)
    if not isinstance(schema, dict):
        return schema is True
    if (reference := schema.get("$ref")) is not None:
        name = reference.rpartition("/")[2]
        return name not in within and _holds_free_text(definitions[name], definitions, (*within, name))
    if schema.keys() & _BOUND:
        return False
    if schema.get("type") == "object" and schema.get("additionalProperties") and "propertyNames" not in schema:
        return True  # its keys are any text
    parts = [schema[key] for key in _COMPOSED if key in schema]
    if schema.get("type") == "string" or not (parts or "type" in schema):
        return True
    return _holds_free_text([*parts, *schema.get("properties", {}).values()], definitions, within)
