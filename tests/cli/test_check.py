"""`dspy-fst check`: the faults that a run would tell, the recipe with its sources, the plan, the room and the time."""

import json
import os

import dspy
import pytest
import yaml

from dspy_fst.config import FSTConfig, source_of
from dspy_fst.policy_lm import EngineHandle
from dspy_fst.project.project_file import load_project
from programs.lab import BASE
from tests.cli.conftest import invoke


@pytest.fixture
def project(tmp_path):
    """The laboratory's example."""
    invoke("init", tmp_path, "--example", "lab")
    return tmp_path / "project.yaml"


@pytest.fixture
def own(tmp_path):
    """The example that is to become the user's own."""
    invoke("init", tmp_path, "--model", BASE)
    return tmp_path / "project.yaml"


def change(path, **settings):
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **settings}))
    return path


def told(path, *options):
    return json.loads(invoke("check", path, "--json", *options).stdout)


def test_nothing_is_started_and_nothing_is_left_behind(project, monkeypatch):
    def started(handle):
        raise AssertionError("an engine was started")

    monkeypatch.setattr(EngineHandle, "ready", started)
    before = sorted(project.parent.iterdir())
    assert told(project)["ok"]
    assert [path for path in sorted(project.parent.iterdir()) if path.name != "__pycache__"] == before


def test_every_setting_is_told_with_its_value_who_set_it_and_the_source_of_its_default(project):
    rows = {row["name"]: row for row in told(project)["settings"]}
    assert set(rows) == set(FSTConfig.model_fields)
    assert (rows["cycles"]["value"], rows["cycles"]["set_by"], rows["cycles"]["default"]) == (2, "file", 8)
    assert (rows["warmup_steps"]["value"], rows["warmup_steps"]["default_source"]) == (2, "paper, App. D")
    assert not any("``" in row["what"] + row["default_source"] for row in rows.values()), "a terminal shows them"
    assert (rows["weight_decay"]["value"], rows["weight_decay"]["set_by"]) == (0.0, "default")
    rows = {row["name"]: row for row in told(change(project, recipe={"auto": "light"}))["settings"]}
    assert (rows["cycles"]["value"], rows["cycles"]["set_by"]) == (2, "auto: light")


def test_the_adapter_that_would_be_trained_is_told(project):
    assert told(project)["project"]["adapter"] == "ChatAdapter"
    with dspy.context(adapter=dspy.JSONAdapter()):
        assert told(project)["project"]["adapter"] == "JSONAdapter"


@pytest.mark.parametrize("name", FSTConfig.model_fields)
def test_every_default_names_its_source(name):
    assert source_of(name).split()[0].strip(",;:") in ("paper", "ours", "GEPA", "GEPA's", "DSPy's"), name
    assert FSTConfig.model_fields[name].description


def test_the_plan_is_what_a_run_may_spend_at_most(project):
    plan = told(project)["plan"]
    assert plan["anchors"] == 20
    # Two searches of 90, one then two carried candidates on 20 anchors, a last pass over them in each.
    assert plan["phases"]["fast"] == {"searches": 2, "updates": 0, "rollouts": 280, "tokens": 280 * 16}
    assert plan["phases"]["slow"] == {"searches": 0, "updates": 6, "rollouts": 6 * 16 * 8, "tokens": 6 * 16 * 8 * 16}
    assert plan["phases"]["validation"]["rollouts"] == (1 + 2) * 32  # the student, and two candidates
    assert [cycle["steps"] for cycle in plan["cycles"]] == [3, 3]


def test_memory_and_disk_are_told_with_what_is_free(project):
    needs = {need["place"]: need for need in told(project)["needs"]}
    assert {"memory", "disk"} <= set(needs)
    for need in needs.values():
        assert 0 < need["certain"] <= need["at_most"] < need["free"]
        assert sum(need["parts"].values()) == need["certain"]


def test_the_text_says_the_same_without_colours(project):
    text = invoke("check", project).stdout
    for heading in ("Project", "Recipe", "Plan, at most", "Room", "Time"):
        assert f"\n{heading}\n" in text
    assert "--measure starts the engine" in text
    assert "\x1b" not in text


def test_all_faults_are_told_at_once_in_the_words_of_a_run(project):
    change(
        project,
        trainset="val.jsonl",
        policy={"temperature": 0, "max_tokens": 16},
        recipe={"auto": "light", "problems_per_step": 40},
    )
    result = invoke("check", project, "--json", code=2)
    faults = json.loads(result.stdout)
    assert not faults["ok"]
    assert len(faults["faults"]) == 2
    assert "temperature=0" in faults["faults"][0]
    assert "32 examples are fewer than problems_per_step=40" in faults["faults"][1]
    assert invoke("run", project, code=2).stderr == result.stderr
    assert invoke("check", project.parent / "none.yaml", code=2).stdout == ""


def test_without_anybody_who_proposes_it_says_what_to_write_in_the_file(own):
    text = invoke("check", change(own, propose=None), code=2).stderr
    assert "reflection_lm: GEPA needs an LM that proposes instructions" in text
    assert f"In {own}: name a strong LM, reflection_lm: openai/gpt-5" in text
    assert told(change(own, recipe={"method": "rl", "problems_per_step": 8}))["project"]["proposes"] == "nobody"


def test_two_who_propose_are_refused(own):
    assert "only propose would be asked" in invoke("check", change(own, reflection_lm="openai/gpt-5"), code=2).stderr


def test_what_would_go_unnoticed_about_the_proposer_is_warned_of(own, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert "instructions come from my_program:propose alone" in told(own)["warnings"][0]
    change(own, propose=None, reflection_lm="openai/gpt-5")
    assert "OPENAI_API_KEY is not set in the environment" in told(own)["warnings"][0]
    monkeypatch.setenv("OPENAI_API_KEY", "sk-hidden")
    result = invoke("check", own, "--json")
    assert json.loads(result.stdout)["warnings"] == []
    assert "sk-hidden" not in result.output
    monkeypatch.delenv("OPENAI_API_KEY")
    local = {"model": "openai/mine", "api_base": "http://127.0.0.1:9/v1"}
    assert told(change(own, reflection_lm=local))["warnings"] == [], "a server of one's own needs no key"


def test_measuring_tells_a_range_from_rollouts_that_were_played(project):
    time = told(project, "--measure")["time"]
    low, high = time["sampling_s"]
    assert 0 < low <= high
    assert time["planned_rollouts"] == 280 + 768 + 96
    assert {low, high} == {
        time["planned_rollouts"] * s for s in (time["together_s"] / time["rollouts"], time["alone_s"])
    }
    assert time["calls_per_rollout"] == 1
    assert 0 < time["tokens_per_rollout"] <= 16
    assert not (project.parent / "run").exists()
    assert f"the rates of one alone and of {time['rollouts']} together" in invoke("check", project, "--measure").stdout


def test_measuring_finds_a_metric_that_raises(project):
    module = project.parent / "broken_metric.py"
    module.write_text("def metric(gold, pred):\n    raise OSError('the judge is down')\n")
    change(project, metric="broken_metric:metric")
    assert told(project)["ok"], "it shows only when the metric is called"
    text = invoke("check", project, "--measure", code=2).stderr
    assert "of 8 rollouts cannot be measured" in text
    assert "the judge is down" in text


def test_the_example_s_project_opens_in_another_directory(project, monkeypatch):
    monkeypatch.chdir(os.sep)
    assert len(load_project(project).open().trainset) == 64


def test_a_metric_above_the_perfect_score_is_told_where_it_may_be_called(project):
    module = project.parent / "percent.py"
    called = project.parent / "called"
    body = f"    open({str(called)!r}, 'a').close()\n    return 100.0 * (gold.answer == pred.answer)\n"
    module.write_text("def metric(gold, pred):\n" + body)
    change(project, metric="percent:metric")
    assert not any("perfect_score" in warning for warning in told(project)["warnings"])
    assert not called.exists(), "a metric may pay for a judge through a client of its own"
    warnings = told(project, "--measure")["warnings"]
    assert called.exists()
    assert any("the metric gives up to 100" in warning and "perfect_score=1" in warning for warning in warnings)


def test_a_trainer_and_an_engine_in_two_precisions_are_told(project):
    def warned():
        return [warning for warning in told(project)["warnings"] if "precision" in warning]

    assert warned() == []
    recipe = {**yaml.safe_load(project.read_text())["recipe"], "precision": "bfloat16"}
    change(project, recipe=recipe)
    assert "the importance weights would measure rounding" in warned()[0]


def test_where_hardly_any_reply_parses_measuring_names_what_helps(project):
    change(project, recipe={**yaml.safe_load(project.read_text())["recipe"], "parse_trial": 2})
    with dspy.context(adapter=dspy.JSONAdapter()):
        result = invoke("check", project, "--measure", "--json")
    (warning,) = [text for text in json.loads(result.stdout)["warnings"] if "parse" in text]
    assert warning.startswith("A reply of 'solve': ")
    assert "of the replies to the first examples 0% parse. Tried on this model, with 2 rollouts each" in warning
    assert "For the first of them write, before compile()" in warning
    assert "adapter = dspy.ChatAdapter(" in warning
    assert "trying up to 7 forms of prompt on this model, 2 rollouts each" in result.stderr
