"""The numbers of a run's events under names, for trackers and for the progress view. Pure.

A name is ``train/``, ``search/`` or ``validation/`` before the event's own field (see StepReport, UpdateReport and
CycleReport in `dspy_fst.types`) or count: ``train/reward``, ``train/kl_to_start``, ``train/flat_groups``,
``train/masked/timeout``, ``train/seconds/update``, ``train/adapters/for-answer/kl_to_start``, ``search/best_score``.
What was not measured has no number.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from dspy_fst.report.run_record import best
from dspy_fst.run.directory import Event

NOTHING_TRAINED = {"tokens": 0, "rows": 0}
VALIDATION_FIELDS = ("counts", "sampled_tokens", "seconds")
PLACES = ("step", "cycle")
"""Fields that number an event. They measure nothing."""


@dataclass(frozen=True)
class Entry:
    """The measurements of one event."""

    group: str
    """``"train"``, ``"search"`` or ``"validation"``."""
    index: int
    """Number of the step or the cycle. For a validation it grows with the steps that were done. It never falls."""
    values: Mapping[str, float]


def entry_of(event: Event) -> Entry | None:
    """The measurements of the event; None for kinds that measure nothing."""
    match event["event"]:
        case "step":
            return Entry("train", event["report"]["step"], _numbers("train", _step_fields(event["report"])))
        case "cycle":
            report = event["report"]
            fields = {**report, "best_score": best(report["scores"]), "dollars": event.get("dollars")}
            return Entry("search", report["cycle"], _numbers("search", fields))
        case "validation":
            report = event["report"]
            fields = {"best_score": event["score"], **{name: report[name] for name in VALIDATION_FIELDS}}
            # A finished run may go on. Trackers must get its later validations after the one of its end.
            index = 2 * report["step"] + (report["when"] == "end")
            return Entry("validation", index, _numbers("validation", fields))
        case "done" if event.get("validation") and "returned" not in event:  # releases without an event of validation
            fields = {"best_score": best(list(event["validation"].values()))}
            return Entry("validation", 0, _numbers("validation", fields))
    return None


def _step_fields(report: Event) -> dict[str, object]:
    update = report["update"]
    # An update of an empty batch measured nothing, whatever numbers it holds. Tokens and rows come from the update and
    # not from the batch's counts, because the update may have been skipped.
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
