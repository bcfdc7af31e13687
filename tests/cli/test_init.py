"""`dspy-fst init`: what it writes, what it never touches, and that the laboratory's example learns."""

import json
import shlex
import sys
from pathlib import Path

import dspy
import pytest
import yaml

import dspy_fst
from dspy_fst.project.project_file import load_project
from programs.lab import BASE
from tests.cli.conftest import invoke

TEMPLATES = Path(dspy_fst.__file__).parent / "templates"
EXAMPLES = ("own", "lab")


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def commands(readme):
    """The arguments of every command that a README shows."""
    shown = [line for line in readme.read_text().splitlines() if line.startswith("dspy-fst ")]
    return [shlex.split(line, comments=True)[1:] for line in shown]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The laboratory's example after init and run, and what the run came to."""
    folder = tmp_path_factory.mktemp("lab")
    written = json.loads(invoke("init", folder, "--example", "lab", "--json").stdout)
    return folder, json.loads(invoke("run", written["project"], "--json").stdout)


def test_the_laboratory_s_example_learns_its_task(trained):
    folder, outcome = trained
    assert outcome["steps"] == 6
    best = outcome["population"][0]
    assert best["texts"]["solve"] != "Work out the answer from the numbers.", "the search found another instruction"
    assert best["score"] > 0.3, "the seed instruction under the base weights scores below 0.05"
    assert Path(outcome["run_dir"]) == folder / "run"


@pytest.mark.parametrize("example", EXAMPLES)
def test_the_example_s_readme_names_commands_that_there_are(example, tmp_path):
    invoke("init", tmp_path, "--example", example)
    named = {command[0] for command in commands(tmp_path / "README.md")}
    assert {"check", "run", "report", "serve"} <= named
    for command in named:
        assert "Usage" in invoke(command, "--help").stdout


def test_the_own_example_s_readme_can_be_followed_line_by_line(tmp_path, monkeypatch):
    """All but serve, which does not end; smaller than the example, and on the laboratory's model."""
    invoke("init", tmp_path, "--model", BASE)
    project = yaml.safe_load((tmp_path / "project.yaml").read_text())
    project["policy"] |= {"engine": "in_process", "max_tokens": 12}
    project["recipe"] |= {"steps_per_cycle": 2, "problems_per_step": 4, "anchors": 4, "search_rollouts": 8}
    (tmp_path / "project.yaml").write_text(yaml.safe_dump(project))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "my_program", raising=False)
    said = {}
    for command in commands(Path("README.md")):
        if command[0] != "serve":
            said[command[0]] = invoke(*command).stdout
    assert {"doctor", "check", "run", "show", "report", "eval", "export"} == set(said)
    assert "write" in said["show"], "the instruction of the example's predictor"
    assert "<html" in Path("report.html").read_text()
    assert {"model.safetensors", "program.json"} <= {path.name for path in Path("exported").iterdir()}


def test_a_file_that_is_there_is_never_overwritten(tmp_path):
    (tmp_path / "project.yaml").write_text("mine")
    (tmp_path / "val.jsonl").symlink_to(tmp_path / "nowhere")
    result = invoke("init", tmp_path, code=2)
    assert "project.yaml, val.jsonl would be overwritten" in result.stderr
    assert (tmp_path / "project.yaml").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["project.yaml", "val.jsonl"], "nothing else was written"
    assert not (tmp_path / "nowhere").exists()


def test_a_file_in_the_place_of_the_folder_is_told(tmp_path):
    (tmp_path / "taken").write_text("")
    assert "nothing can be written there" in invoke("init", tmp_path / "taken", code=2).stderr


def test_the_model_and_the_reflection_lm_are_filled_in(tmp_path, monkeypatch):
    monkeypatch.chdir(BASE.parent)
    invoke("init", tmp_path, "--model", "base", "--reflection-lm", 'openai/a "b": #c')
    project = load_project(tmp_path / "project.yaml")
    assert project.model == str(BASE), "a folder is named from here, and the project lies elsewhere"
    assert project.reflection_lm.model == 'openai/a "b": #c'
    assert project.propose is None, "a proposer would be asked instead of the LM"


def test_without_them_a_hub_model_and_the_example_s_proposer_are_named(tmp_path):
    invoke("init", tmp_path)
    project = load_project(tmp_path / "project.yaml")
    assert (project.model, project.reflection_lm) == ("Qwen/Qwen3-0.6B", None)
    assert callable(project.open().optimizer.propose)


def test_the_laboratory_is_refused_where_there_is_no_clone(tmp_path, monkeypatch):
    monkeypatch.setattr(dspy_fst, "__file__", str(tmp_path / "site-packages" / "dspy_fst" / "__init__.py"))
    monkeypatch.chdir(tmp_path)
    assert "part of a clone" in invoke("init", tmp_path / "new", "--example", "lab", code=2).stderr
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("example", EXAMPLES)
def test_every_setting_is_explained(example):
    text = (TEMPLATES / example / "project.yaml").read_text().splitlines()
    settings = [place for place, line in enumerate(text) if ":" in line.split("#")[0]]
    assert len(settings) > 15
    for place in settings:
        assert "  # " in text[place] or text[place - 1].startswith("# "), text[place]


@pytest.mark.parametrize("example", EXAMPLES)
def test_the_examples_have_enough_data_and_validate_on_other_problems(example):
    train, val = (lines(TEMPLATES / example / f"{name}.jsonl") for name in ("train", "val"))
    assert len(train) >= 32
    assert len(val) >= 16
    assert len({json.dumps(row) for row in train + val}) == len(train) + len(val)


def test_the_own_example_s_metric_says_what_is_wrong_and_its_proposer_takes_it_up(tmp_path):
    invoke("init", tmp_path)
    opened = load_project(tmp_path / "project.yaml").open()
    metric, propose = opened.optimizer.metric, opened.optimizer.propose
    gold = dspy.Example(order="Two boxes of pears for Monday.", code="PEAR-2-MON")
    scores = {code: metric(gold, dspy.Prediction(code=code)) for code in ("PEAR-2-MON", "PEAR-two-MON", "pears")}
    assert [round(score.score, 3) for score in scores.values()] == [1.0, 0.667, 0.0]
    assert scores["PEAR-2-MON"].feedback == "Right."
    assert scores["PEAR-two-MON"].feedback == "The second part is the amount in digits.\nExpected PEAR-2-MON"
    records = {"write": [{"Feedback": score.feedback} for score in [*scores.values(), scores["PEAR-two-MON"]]]}
    once = propose({"write": "Write the code."}, records, ["write"])
    assert once == {"write": "Write the code. The second part is the amount in digits."}
    twice = propose(once, records, ["write"])
    assert twice == {"write": f"{once['write']} Write three parts with hyphens between them."}
    assert propose(twice, records, ["write"]) == twice, "nothing is left to be said"
