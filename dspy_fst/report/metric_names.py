"""The named numbers of a run's events, for trackers and for whoever watches.

A name is ``train/``, ``search/`` or ``validation/`` before the event's own field (see StepReport, UpdateReport and
CycleReport in `dspy_fst.types`) or count: ``train/reward``, ``train/kl_to_start``, ``train/flat_groups``,
``train/masked/timeout``, ``train/seconds/update``, ``search/best_score``. What was not measured has no number.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from dspy_fst.report.run_record import best
from dspy_fst.run.directory import Event

NOTHING_TRAINED = {"tokens": 0, "rows": 0}
VALIDATION_FIELDS = ("counts", "sampled_tokens", "seconds")
PLACES = ("step", "cycle")
"""Fields that say where an event stands; they measure nothing."""


@dataclass(frozen=True)
class Entry:
    """What one event measured."""

    group: str
    """``"train"``, ``"search"`` or ``"validation"``."""
    index: int
    """Of the step or the cycle; of a validation it follows the steps that were done. It never falls."""
    values: Mapping[str, float]


def entry_of(event: Event) -> Entry | None:
    """What the event measured; None when it is of a kind that measures nothing."""
    match event["event"]:
        case "step":
            return Entry("train", event["report"]["step"], _numbers("train", _step_fields(event["report"])))
        case "cycle":
            report = event["report"]
            fields = {**report, "best_score": best(report["scores"])}
            return Entry("search", report["cycle"], _numbers("search", fields))
        case "validation":
            report = event["report"]
            fields = {"best_score": event["score"], **{name: report[name] for name in VALIDATION_FIELDS}}
            # A run that was finished may go on: what it measures then must come after its end, for trackers.
            index = 2 * report["step"] + (report["when"] == "end")
            return Entry("validation", index, _numbers("validation", fields))
        case "done" if event.get("validation") and "returned" not in event:  # of releases without such an event
            fields = {"best_score": best(list(event["validation"].values()))}
            return Entry("validation", 0, _numbers("validation", fields))
    return None


def _step_fields(report: Event) -> dict[str, object]:
    update = report["update"]
    # An update of an empty batch measured nothing, whatever numbers it holds. Tokens and rows are the update's own:
    # those that the batch counts may have been skipped.
    learnt = update if update["tokens"] else NOTHING_TRAINED
    return {**report, "update": None, "counts": {**report["counts"], **learnt}}


def _numbers(group: str, fields: Mapping[str, object]) -> dict[str, float]:
    return {f"{group}/{name}": value for name, value in _flat(fields)}


def _flat(fields: Mapping[str, object]) -> Iterator[tuple[str, float]]:
    for name, value in fields.items():
        if isinstance(value, Mapping):
            prefix = "" if name == "counts" else f"{_name(name)}/"
            yield from ((f"{prefix}{inner}", number) for inner, number in _flat(value))
        elif isinstance(value, int | float) and not isinstance(value, bool) and name not in PLACES:
            yield _name(name), value


def _name(count: str) -> str:
    """``masked: timeout`` -> ``masked/timeout``. Trackers take letters, digits, ``_``, ``-``, ``.`` and ``/``."""
    return re.sub(r"[^\w./-]+", "_", count.replace(": ", "/"), flags=re.ASCII)
