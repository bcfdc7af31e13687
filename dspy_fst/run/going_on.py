"""Advice for continuing a run that stopped or that left no program, in Python and on the command line."""

import shlex
from pathlib import Path

from dspy_fst.run.directory import COMPILED, read_events
from dspy_fst.run.ending import StopReason, stop_reason_in


def by_command_line(setting: str, run_dir: Path) -> str:
    """How to continue a run that a setting ended, on the command line; also for a run that Python made."""
    return (
        f"On the command line: raise {setting} in the recipe of the project file, or set it to null, then "
        f"dspy-fst run FILE, or dspy-fst resume {shlex.quote(str(run_dir))} --project FILE"
    )


def why_no_program(run_dir: Path) -> str:
    """Why a run's directory holds no compiled program, and what to do. No full stop at the end."""
    events = read_events(run_dir)
    ended = stop_reason_in(events)
    if ended is not None and ended.setting and not any(event.get("event") == "done" for event in events):
        return f"{run_dir} holds no {COMPILED}/: {_stopped(ended, run_dir)}"
    return (
        f"{run_dir} holds no {COMPILED}/: the run has not come to its end, or an earlier release made it. Going on, "
        f"with dspy-fst resume {shlex.quote(str(run_dir))} or by the same compile() in Python, ends it and saves the "
        "program there"
    )


def _stopped(ended: StopReason, run_dir: Path) -> str:
    return (
        f"{ended.setting} stopped the run after {ended.step} steps, and it returned no program. {ended.text}. To go on "
        f"in Python: the same compile() with {ended.setting} raised, or None. "
        f"{by_command_line(str(ended.setting), run_dir)}"
    )
