"""What to do where replies do not parse, without what the program does already. Pure."""

from dataclasses import dataclass

COOL = 0.5
"""Temperature up to which a lower one is not advised (ours; the parse trial tries this one)."""


@dataclass(frozen=True)
class Form:
    """How a program asks now, and what is known of other ways."""

    adapter: str = "ChatAdapter"
    """Name of the adapter's class."""
    demos: bool = False
    """Whether a predictor shows examples."""
    temperature: float | None = None
    """None where it is not known."""
    helped: str = ""
    """The form that did best when others were tried, with what it did, e.g. ``"JSONAdapter, 2 demos (75% parsed)"``;
    empty where none was tried, or none was better."""
    tried: bool = False
    """Whether other forms were tried on this model and task."""


def form_advice(form: Form) -> str:
    """A sentence without a full stop.

    >>> form_advice(Form())[:75]
    'Raise max_tokens if they are cut off; else try dspy.configure(adapter=dspy.'
    >>> form_advice(Form("JSONAdapter", demos=True, temperature=0.3))
    'Raise max_tokens if they are cut off; else try simpler output fields, or an instruct model'
    """
    first = "Raise max_tokens if they are cut off; else try "
    if form.helped:
        return f"{first}what did best when it was tried on this model: {form.helped}"
    ways = []
    if not form.tried:
        ways += ["dspy.configure(adapter=dspy.JSONAdapter())"] if form.adapter != "JSONAdapter" else []
        ways += ["two demos"] if not form.demos else []
        ways += ["a lower temperature"] if form.temperature is None or form.temperature > COOL else []
    return first + ", ".join([*ways, "simpler output fields", "or an instruct model"])
