"""Advice for replies that do not parse. It leaves out what the program does already. Pure."""

from dataclasses import dataclass

COOL = 0.5
"""Up to this temperature a lower one is not advised (ours; the parse trial uses this temperature)."""


@dataclass(frozen=True)
class Form:
    """The form of a program's prompts now, and what is known of other forms."""

    adapter: str = "ChatAdapter"
    """Class name of the adapter."""
    demos: bool = False
    """Whether any predictor shows demos."""
    temperature: float | None = None
    """Of sampling; None where it is not known."""
    helped: str = ""
    """The best form in a trial and its result, e.g. ``"JSONAdapter, 2 demos (75% parsed)"``.

    Empty when no trial was made, or when no other form was better.
    """
    tried: bool = False
    """Whether a trial of other forms was made on this model and task."""


def form_advice(form: Form) -> str:
    """What to change, as a sentence without a full stop.

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
