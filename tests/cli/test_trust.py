"""Sources of a dspy.Flex that a folder holds are run by a command only when it is told to trust them."""

import json
import sys

import pytest
import yaml

import dspy_fst
from dspy_fst import PolicyLM
from dspy_fst.rollout.components import read_texts, with_texts
from dspy_fst.run.files import write_json
from dspy_fst.saving.card import model_card
from dspy_fst.saving.export import export
from dspy_fst.saving.facts import facts_of
from dspy_fst.types import Candidate, Population
from programs.lab import BASE
from tests.cli.conftest import MODULE, SETTINGS, SOURCE, invoke

FLEXED = f"""{SOURCE}
import dspy


class Flexed(Relay):
    def __init__(self):
        super().__init__()
        self.tool = dspy.Flex("question -> answer")
"""
NAME = "flexed"
FOREIGN = "class X:\n    def forward(self, **inputs):\n        import os"
FAST = ("--k", "1", "--limit", "1", "--json")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The user's own: a project whose program has a dspy.Flex."""
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    (tmp_path / f"{NAME}.py").write_text(FLEXED)
    project = {key: of.replace(MODULE, NAME) if isinstance(of, str) else of for key, of in SETTINGS.items()}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({**project, "program": f"{NAME}:Flexed"}))
    yield tmp_path
    sys.modules.pop(NAME, None)
    sys.modules.pop(MODULE, None)


@pytest.fixture
def texts(folder):
    """The program's own, and the same with a source of somebody's."""
    import flexed

    own = read_texts(flexed.Flexed())
    return own, Candidate({**own.texts, "tool": FOREIGN})


def hold(run_dir, *candidates):
    """Let the run's populations, from cycle 0 on, be these candidates."""
    for cycle, candidate in enumerate(candidates):
        document = {"members": [dict(candidate.texts)], "scores": [None], "parents": {}}
        write_json(run_dir / "populations" / f"cycle-{cycle:03d}.json", document)


def saved(folder, candidate):
    import flexed

    program = with_texts(flexed.Flexed(), candidate)
    program.set_lm(PolicyLM(BASE, engine="in_process", max_tokens=12))
    program.population = Population.of_seed(candidate, 2)
    return dspy_fst.save(program, folder)


def test_eval_runs_a_run_s_foreign_sources_only_when_they_are_trusted(folder, run_dir, texts):
    _, foreign = texts
    command = ("eval", run_dir, "--project", folder / "mine.yaml")
    hold(run_dir, foreign, foreign)
    refused = invoke(*command, code=2).stderr
    assert "another source for the dspy.Flex 'tool'" in refused
    assert "--trust-code" in refused
    trusted = json.loads(invoke(*command, "--trust-code", *FAST).stdout)
    assert trusted["results"][0]["candidate"] == foreign.digest


def test_a_candidate_that_is_named_is_held_to_the_same(folder, run_dir, texts):
    own, foreign = texts
    command = ("eval", run_dir, "--project", folder / "mine.yaml", *FAST)
    hold(run_dir, foreign, own)
    assert json.loads(invoke(*command).stdout)["results"][0]["candidate"] == own.digest
    assert "--trust-code" in invoke(*command, "--candidate", foreign.digest, code=2).stderr
    named = json.loads(invoke(*command, "--candidate", foreign.digest, "--trust-code").stdout)
    assert named["results"][0]["candidate"] == foreign.digest


def test_eval_and_serve_take_up_a_saved_program_s_sources_when_they_are_trusted(folder, tmp_path, texts, monkeypatch):
    served = []
    monkeypatch.setattr("dspy_fst.serve.listening.serve", lambda app, settings: served.append(app))
    out = saved(tmp_path / "out", texts[1])
    evaluate, serve = ((command, out, "--project", folder / "mine.yaml") for command in ("eval", "serve"))
    for command in (evaluate, serve):
        assert "--trust-code" in invoke(*command, code=2).stderr
    results = json.loads(invoke(*evaluate, "--trust-code", *FAST).stdout)["results"]
    assert results[0]["candidate"] == texts[1].digest
    assert served == []
    invoke(*serve, "--signature", "numbers: str -> answer: str", "--trust-code")
    assert len(served) == 1


def test_resume_runs_what_a_directory_holds_only_when_it_is_trusted(folder, run_dir):
    mine = yaml.safe_load((folder / "mine.yaml").read_text())
    (run_dir / "project.yaml").write_text(yaml.safe_dump({**mine, "folder": str(folder)}))
    (run_dir / "compiled").rename(run_dir.parent / "compiled")  # as if the run were not finished
    assert "going on runs the sources that the directory holds" in invoke("resume", run_dir, code=2).stderr
    trusted = invoke("resume", run_dir, "--trust-code", code=2).stderr
    assert "code_proposer: the program's dspy.Flex modules (tool) evolve" in trusted, "it went on to the next check"
    assert "--trust-code" not in trusted


def test_the_card_says_how_to_load_a_program_of_evolved_sources(folder, tmp_path, texts, finished):
    out = export(saved(tmp_path / "saved", texts[1]), tmp_path / "out")
    assert 'dspy_fst.load("FOLDER", program, trust_code=True)' in (out / "README.md").read_text()
    assert 'dspy_fst.load("FOLDER", program)' in model_card(facts_of(finished / "compiled"))
