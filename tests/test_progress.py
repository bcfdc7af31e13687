"""What a person sees: plain lines without a terminal, a live view with one."""

import io
import re

from rich.console import Console

from dspy_fst.report.progress import ProgressView

UPDATE = {"kl_to_start": None, "entropy": 0.5, "tokens": 100}
EVENTS = [
    {"event": "plan", "budget": {"updates": 2}},
    {"event": "note", "text": "slow: 2 updates"},
    {"event": "phase", "phase": "cycle 0: evolving instructions"},
    {"event": "rollout", "reward": 1.0},
    {"event": "candidate", "texts": {"solve": "Reverse\nthe [[ ## list ## ]]. " + "x" * 100}, "score": 0.5},
    {
        "event": "cycle",
        "report": {
            "cycle": 0,
            "scores": [0.5, None],
            "rollouts": 9,
            "reused": 3,
            "reflections": 2,
            "proposals_accepted": 1,
        },
    },
    {
        "event": "step",
        "report": {"step": 0, "reward": 0.25, "counts": {"groups": 8, "flat_groups": 3}, "update": UPDATE},
    },
    {"event": "done"},
]


def shown(terminal: bool) -> str:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=120)
    with ProgressView("demo", console) as view:
        for event in EVENTS:
            view(event)
    return console.file.getvalue()


def test_without_a_terminal_each_event_is_one_plain_line():
    text = shown(terminal=False)
    assert "\x1b" not in text
    assert all(line.startswith("[demo] ") for line in text.splitlines())
    assert "slow: 2 updates" in text
    assert "cycle 0: best candidate 0.500 on the anchors, 9 rollouts (3 reused)" in text
    assert "step 0: reward 0.250" in text
    assert "3/8 groups flat" in text


def test_in_a_terminal_the_view_shows_phase_figures_and_the_newest_instruction():
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown(terminal=True))
    assert "cycle 0: evolving instructions, 1 rollouts" in text
    assert "1/2" in text
    assert "Reverse the [[ ## list ## ]]." in text
    assert "3 of 8" in text
