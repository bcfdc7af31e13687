"""A whole run whose searches are another optimizer's: its reports, its costs, and how it goes on after a kill."""

import pytest

from dspy_fst import FSTOptimizer
from dspy_fst.errors import ConfigurationError
from dspy_fst.report.from_directory import read_record
from dspy_fst.run.directory import read_events
from programs.lab import build
from tests.pipelines.watched import SHORT, lab_policy

SIZES = {**SHORT, "problems_per_step": 4, "search_rollouts": 24, "components": "round_robin", "reflection_minibatch": 3}
ANCHORS = 4


class Words:
    """Tries two openings on all anchors."""

    name = "Words"

    def search(self, seat):
        programs = []
        for words in ("Please.", "Now."):
            program = seat.program.deepcopy()
            [predictor] = program.predictors()
            predictor.signature = predictor.signature.with_instructions(f"{predictor.signature.instructions} {words}")
            for example in seat.examples:
                seat.metric(example, program(**example.inputs()))
            programs.append(program)
        return programs


class Others(Words):
    name = "Others"


def compiled(tmp_path, fast, **settings):
    lab = build(train=16, val=2, test=2)
    lab.program.set_lm(lab_policy())
    settings = {**SIZES, "metric": lab.metric, "fast": fast, "run_dir": tmp_path / "run", **settings}
    program = FSTOptimizer(**settings).compile(lab.program, trainset=lab.trainset)
    program.get_lm().release()
    return program


def reports(tmp_path):
    return [event for event in read_events(tmp_path / "run") if event["event"] == "cycle"]


def dies_after(count):
    """A listener that stops the run at its ``count``-th rollout."""
    seen = []

    def listen(event):
        seen.append(event["event"] == "rollout")
        if sum(seen) == count:
            raise KeyboardInterrupt

    return listen


def test_a_run_that_dies_in_a_search_goes_on_with_the_same_optimizer_and_pays_for_each_rollout_once(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        compiled(tmp_path, Words(), listeners=[dies_after(ANCHORS + 6)])
    with pytest.raises(ConfigurationError, match=r"fast \(there .*Words.*, now .*Others"):
        compiled(tmp_path, Others())
    program = compiled(tmp_path, Words())
    [report] = reports(tmp_path)
    assert len(report["candidates"]) == 3
    assert report["report"]["rollouts"] == 3 * ANCHORS
    assert report["report"]["reflections"] == 0
    assert read_record(tmp_path / "run", "run").costs.search_rollouts == 3 * ANCHORS
    assert {each["digest"] for each in report["candidates"]} >= {each.digest for each in program.population.members}
