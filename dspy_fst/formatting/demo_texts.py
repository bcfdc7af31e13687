"""Demos as a component's text, for readers: a line of JSON for each demo."""

import json

SUFFIX = ".demos[*]"
"""What follows the predictor's name in the name of its demos' component. No predictor can have such a name."""
MADE_OF = "_fst_problem"
"""Key in a demo: the mark of the problem that it was made of. Adapters show no field of this name."""
AUGMENTED = "augmented"
"""DSPy's key in a demo that was bootstrapped."""


def is_demos(component: str) -> bool:
    """Whether a component is the demos of a predictor.

    >>> is_demos("qa.predict.demos[*]"), is_demos("qa.predict")
    (True, False)
    """
    return component.endswith(SUFFIX)


def readable(component: str, text: str) -> str:
    """A component's text for reading: of demos, one a line, with where it comes from; any other text as it is.

    >>> readable("qa.predict.demos[*]", '{"augmented": true, "question": "6 * 7", "answer": 42, "_fst_problem": "1f"}')
    'bootstrapped: question=6 * 7, answer=42'
    """
    if not is_demos(component):
        return text
    return "\n".join(map(_line, filter(None, text.split("\n")))) or "(no demos)"


def _line(text: str) -> str:
    try:
        demo = json.loads(text)
    except ValueError:
        demo = None
    if not isinstance(demo, dict):
        return text
    source = "bootstrapped" if demo.pop(AUGMENTED, False) else "labeled" if MADE_OF in demo else "the user's"
    return f"{source}: " + ", ".join(f"{name}={_value(value)}" for name, value in demo.items() if name != MADE_OF)


def _value(value: object) -> str:
    return " / ".join(value.splitlines()) if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
