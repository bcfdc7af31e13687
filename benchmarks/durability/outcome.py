"""What a run left, in the form in which two runs are compared."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dspy_fst.run.directory import read_events
from dspy_fst.run.files import read_json, sha256_of


def outcome(run_dir: Path) -> dict[str, Any]:
    """Everything that a finished run left, clocks and its own place left out."""
    state = newest(run_dir)
    fields = {name: value for name, value in state["fields"].items() if not name.startswith("events_")}
    last = sorted((run_dir / "weights").iterdir())[-1]
    return {
        "events": [told(event, run_dir) for event in read_events(run_dir)],
        "populations": {path.name: read_json(path) for path in sorted((run_dir / "populations").iterdir())},
        "weights": {f"{last.name}/{path.name}": sha256_of(path) for path in sorted(last.iterdir())},
        "state": fields,
        "trainer": state["files"],
        "names": sorted(str(path.relative_to(run_dir)) for path in run_dir.rglob("*")),
    }


def told(event: Mapping[str, Any], run_dir: Path) -> dict[str, Any]:
    """What an event says."""
    said = json.loads(json.dumps(event).replace(str(run_dir), "RUN_DIR"))
    said.pop("time")
    (said.get("report") or {}).pop("seconds", None)
    return dict(said)


def outline(left: Mapping[str, Any]) -> dict[str, Any]:
    """What is equal also when other text was sampled: the order of events, steps, versions and sizes."""
    return {
        "events": [
            [event["event"], *((event.get("report") or {}).get(name) for name in ("cycle", "step"))]
            for event in left["events"]
        ],
        "plan": next(event["budget"] for event in left["events"] if event["event"] == "plan"),
        "populations": {name: len(population["members"]) for name, population in left["populations"].items()},
        "weights": sorted(left["weights"]),
        "state": {name: left["state"][name] for name in ("cycle", "searched", "step")},
        "trainer": sorted(left["trainer"]),
    }


def newest(run_dir: Path) -> dict[str, Any]:
    """The document of the newest state; empty when there is none. Reads only: nothing is tidied up."""
    numbered = sorted(path for path in (run_dir / "states").glob("*") if path.name.isdigit())
    return (read_json(numbered[-1] / "state.json") if numbered else None) or {}


def where(run_dir: Path) -> str:
    """Where a killed run will go on."""
    if not (fields := newest(run_dir).get("fields")):
        return "the start"
    return f"{fields['searched'] + 1} searches, {fields['step']} updates"
