"""How long a run takes on how many cards, and what saturates first: computed before any card is rented.

In: a recipe, what its texts are like, and a machine, described by a card's data sheet or by the events of a run that it
has made. Out: a `Forecast`: the layout of the cards, the seconds of a cycle by activity, and the bottleneck. Never:
anything that is loaded, started or timed; and never a promise, since each time is arithmetic on peaks and stated shares
of them (`machine`), or a simulation with rates that one run was measured at (`from_run`).

A run is a list of acts in their order (`workload`): rollouts that are played together, reflections, updates with their
publish. `simulate` plays them against rates (`rates`). Those come from a card (`from_card`, for a `layout` of cards)
or from a run. Nothing else knows a machine.
"""

from dspy_fst.sizing.forecasting import Asked, Forecast, best_forecast, forecast
from dspy_fst.sizing.from_run import MeasuredRun, measured_run
from dspy_fst.sizing.launching import command_for, sections_for
from dspy_fst.sizing.machine import CARDS, CardSheet, card_named
from dspy_fst.sizing.workload import Lengths, Texts

__all__ = [
    "CARDS",
    "Asked",
    "CardSheet",
    "Forecast",
    "Lengths",
    "MeasuredRun",
    "Texts",
    "best_forecast",
    "card_named",
    "command_for",
    "forecast",
    "measured_run",
    "sections_for",
]
