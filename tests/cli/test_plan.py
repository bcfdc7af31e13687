"""`dspy-fst plan`: cards, time and bottleneck; what it refuses; and the events of a run that it reads."""

import json

import pytest

from dspy_fst.sizing import measured_run
from tests.cli.conftest import invoke
from tests.report import happenings as h

SMALL = "Qwen/Qwen3-0.6B"


def told(*options):
    return json.loads(invoke("plan", *options, "--json").stdout)


@pytest.fixture
def run_dir(tmp_path):
    """A run with hand-made events, ten seconds from one to the next."""
    events = [
        {**h.plan(learning_rate=1e-5), "model": SMALL, "engine": "in_process"},
        h.cycle(0, {h.SEED: 0.25, h.CHILD: 0.5}, {h.CHILD: [h.SEED]}, [h.CHILD, h.CHILD], rollouts=402, reflections=4),
        h.step(0, 0.25),
        h.step(1, 0.5),
        h.done([h.CHILD], [0.5], {}),
    ]
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in h.timed(events)))
    return tmp_path


@pytest.mark.slow
def test_cards_time_and_bottleneck_of_the_default_recipe_are_told():
    said = told("--model", SMALL, "--card", "h100", "--cards", "8")
    assert (said["model"], said["card"], said["cards"]) == (SMALL, "h100", 8)
    assert said["cards_used"] <= 8
    assert set(said["cycle_s"]) >= {"search", "reflections", "rollouts", "update", "publish", "verification"}
    assert said["published"] == 2 * 751_632_384
    assert said["run_s"] == pytest.approx(8 * sum(said["cycle_s"].values()), rel=0.2)  # the first search is smaller
    shown = invoke("plan", "--model", SMALL, "--card", "h100", "--cards", "8").stdout
    assert f"bottleneck: {said['bottleneck']}" in shown
    assert "arithmetic, not a promise" in shown
    assert f"and: {said['command']}" in shown
    assert "left over: 1 card; no layout" in invoke("plan", "--model", SMALL, "--card", "h100", "--cards", "9").stdout


def test_a_project_s_model_recipe_and_data_are_planned():
    said = told("programs/lab/project.yaml", "--card", "rtx4090")
    assert said["model"].endswith("programs/lab/base")
    assert said["layout"]["shared"]
    assert said["run_s"] > sum(said["cycle_s"].values())  # one cycle, and the validations of start and end


def test_a_run_s_own_rates_foretell_it(run_dir):
    said = told("--like", run_dir)
    assert (said["card"], said["layout"]) == (None, None)
    texts = said["texts"]
    assert texts["replies"]["deciles"] == [1, 1, 2, 2, 2, 2, 2, 2, 3, 3, 4]
    assert texts["live"] == 0.75
    assert texts["prompt"] == 900 / 30 - 160 / 32
    assert texts["accepted"] == 2 / 4
    rates = said["rates"]
    assert rates["reflection_s"] == (10 - 2.0) / 4
    assert rates["publish_s"] == 0.5
    assert rates["rest_s"] == 10 - (3 + 1 + 0.5)
    assert rates["update_s"] + 300 * rates["update_token_s"] == pytest.approx(1.0)
    assert rates["engine"]["joins"] is False
    assert "simulated with the rates of" in said["source"]


def test_a_run_s_texts_may_be_put_on_cards(run_dir):
    said = told("--like", run_dir, "--card", "rtx4090")
    assert said["texts"]["live"] == 0.75
    assert said["card"] == "rtx4090"
    longer = told("--like", run_dir, "--card", "rtx4090", "--reply-tokens", "900", "--prompt-tokens", "100")
    assert longer["texts"]["prompt"] == 100
    assert longer["run_s"] > said["run_s"]


def test_what_was_measured_comes_back_from_the_simulation(run_dir):
    """Two kinds of sets, two rates: the fit explains both."""
    run = measured_run(run_dir)
    for (counts, seconds), expected in zip(run._sampled(), (3.0, 3.0, 2.0), strict=True):
        assert seconds == expected
        assert all(count > 0 for count in counts)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), "name a machine: --card h100 --cards 8, or a run of its own: --like RUN_DIR"),
        (("--like", ".", "--cards", "8"), "--like alone tells of the run's own machine"),
        (("--card", "h1000", "--model", SMALL), "'h1000' is not known; known cards: l4, rtx4090"),
        (("--card", "h100"), "name a project FILE, --model MODEL or --like RUN_DIR"),
        (("--card", "h100", "--model", "no/such-model-here"), "no/such-model-here"),
        (("--card", "l4", "--cards", "2", "--model", "Qwen/Qwen3-8B"), "fit on no layout of 2 x l4"),
        (("--card", "l4", "no-such.yaml"), "no-such.yaml cannot be read: No such file or directory"),
    ],
)
def test_what_cannot_be_planned_is_refused_in_words(options, words, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    result = invoke("plan", *options, code=2)
    assert words in " ".join(result.output.replace("│", " ").split())


def test_a_directory_without_a_run_or_without_a_step_is_refused(tmp_path):
    assert "there is no run with events" in invoke("plan", "--like", tmp_path, code=2).output
    (tmp_path / "events.jsonl").write_text(json.dumps({**h.plan(), "time": 1.0}) + "\n")
    assert "has made no step with replies" in invoke("plan", "--like", tmp_path, code=2).output
