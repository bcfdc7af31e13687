"""A start at which hardly any reply of a small real model parses says what would help on that very model."""

import re

import dspy
import pytest

from benchmarks.real_model.runs import OPTIONS
from dspy_fst import FSTOptimizer, PolicyLM
from dspy_fst.run.directory import read_events
from programs import smollm2
from programs.smollm2 import moods

TRIED = 12
"""Rollouts of each setup."""


@pytest.fixture(scope="module")
def told(on_disk):
    """The note of a start under ChatAdapter; behind it the smallest run there is."""
    run_dir = on_disk / "tried"
    task = moods.build(test=0)
    task.program.set_lm(
        PolicyLM(smollm2.folder(), engine="in_process", max_tokens=24, engine_options=OPTIONS["in_process"])
    )
    optimizer = FSTOptimizer(
        metric=task.metric,
        propose=moods.hint,
        run_dir=run_dir,
        method="gepa",
        cycles=1,
        steps_per_cycle=1,
        problems_per_step=1,
        population_size=1,
        group_size=2,
        anchors=1,
        search_rollouts=1,
        parse_trial=TRIED,
        progress=False,
    )
    with dspy.context(adapter=dspy.ChatAdapter()):
        optimizer.compile(task.program, trainset=task.trainset).get_lm().release()
    notes = [event["text"] for event in read_events(run_dir) if event["event"] == "note"]
    return next(note for note in notes if "Tried on this model" in note)


def test_json_with_two_demos_brings_most(told):
    tried = re.findall(r"^ +(\d+)%  (.+)$", told, re.MULTILINE)
    shares = {setup: int(share) for share, setup in tried}
    assert tried[0][1] in ("JSONAdapter, 2 demos", "JSONAdapter, 2 demos, temperature 0.5")
    assert shares["JSONAdapter, 2 demos"] >= 40
    assert shares["ChatAdapter, temperature 0.5"] <= 20
    assert {"JSONAdapter", "XMLAdapter", "ChatAdapter, 2 demos", "XMLAdapter, 2 demos"} < shares.keys()


def test_it_says_what_to_write(told):
    assert "adapter = dspy.JSONAdapter(" in told
    assert "dspy.configure(adapter=adapter)" in told
    assert "program.tell.demos = [*program.tell.demos, *demos]" in told
