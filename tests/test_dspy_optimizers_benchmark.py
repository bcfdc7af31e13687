"""benchmarks/dspy_optimizers.py: what it writes."""

import sys

import dspy
import pytest

from benchmarks import dspy_optimizers


@pytest.mark.parametrize(("words", "written"), [([], True), (["--steps", "5"], False)])
def test_a_trial_of_fewer_updates_writes_no_results(tmp_path, monkeypatch, words, written):
    monkeypatch.setattr(dspy_optimizers, "RESULTS", tmp_path / "results.json")
    monkeypatch.setattr(dspy_optimizers, "arm", lambda options, name, seed: {"seed": seed})
    monkeypatch.setattr(dspy, "disable_logging", lambda: None)
    monkeypatch.setattr(sys, "argv", ["benchmark", "--run-dir", str(tmp_path), "--seeds", "0", *words])
    dspy_optimizers.main()
    assert (tmp_path / "results.json").exists() == written
