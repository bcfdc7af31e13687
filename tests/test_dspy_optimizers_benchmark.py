"""benchmarks/dspy_optimizers.py: what it writes."""

import sys
from types import SimpleNamespace

import dspy
import pytest
from dspy.teleprompt import Teleprompter

from benchmarks import dspy_optimizers
from dspy_fst.run.files import write_json
from programs.lab import build
from tests.fakes import fields, scripted_policy


@pytest.mark.parametrize(("words", "written"), [([], True), (["--steps", "5"], False)])
def test_a_trial_of_fewer_updates_writes_no_results(tmp_path, monkeypatch, words, written):
    monkeypatch.setattr(dspy_optimizers, "RESULTS", tmp_path / "results.json")
    monkeypatch.setattr(dspy_optimizers, "arm", lambda options, name, seed: {"seed": seed})
    monkeypatch.setattr(dspy, "disable_logging", lambda: None)
    monkeypatch.setattr(sys, "argv", ["benchmark", "--run-dir", str(tmp_path), "--seeds", "0", *words])
    dspy_optimizers.main()
    assert (tmp_path / "results.json").exists() == written


class Step(Teleprompter):
    """A step that learns nothing."""

    def compile(self, student, *, trainset, valset=None, teacher=None, **_):
        return student.deepcopy()


def test_the_evaluations_of_better_together_are_in_its_rollouts(tmp_path, monkeypatch):
    """dspy.BetterTogether is real: it evaluates the student and the program after each step."""
    lab = build("reverse", train=4, val=3, test=1)
    lm, _ = scripted_policy(lambda messages, seed: fields(answer="1"))
    lab.program.set_lm(lm)
    at, scored = dspy_optimizers.Setting(lab, lm, 0, tmp_path), []
    spent = {"rollouts": 1000, "updates": 5}
    steps = {"bootstrap": lambda self: Step(), "fst": lambda self, updates: Step(), "spent_by_fst": lambda self: spent}
    steps["score"] = lambda self, gold, pred, trace=None: scored.append(gold) or 1.0
    for name, step in steps.items():
        monkeypatch.setattr(dspy_optimizers.Setting, name, step)
    (tmp_path / "w" / "sft-000001").mkdir(parents=True)
    write_json(tmp_path / "w" / "sft-000001" / "job.json", {"updates": 2})
    with dspy.context(lm=lm):
        _, told = dspy_optimizers.better_together(at)
    assert len(scored) == 3 * len(lab.valset)
    assert told == {"rollouts": 1000 + dspy_optimizers.TRAIN + len(scored), "updates": 7}


def test_validations_of_a_run_are_in_its_rollouts(tmp_path, monkeypatch):
    costs = SimpleNamespace(rollouts=20, validation_rollouts=6, updates=3)
    monkeypatch.setattr(dspy_optimizers, "read_record", lambda folder, name: SimpleNamespace(costs=costs))
    at = dspy_optimizers.Setting(None, None, 0, tmp_path)
    assert at.spent_by_fst() == {"rollouts": 26, "updates": 3}
