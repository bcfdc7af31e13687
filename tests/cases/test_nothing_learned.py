"""A run that learns nothing stops, says why and what helped, and goes on with a higher limit; its last line is true."""

import io
import json

import dspy
import pytest
import yaml
from rich.console import Console

from dspy_fst import FSTOptimizer
from dspy_fst.errors import NothingLearnedError
from dspy_fst.monitoring.progress import ProgressView
from dspy_fst.policy_lm import policy_of
from dspy_fst.report.from_directory import read_records
from dspy_fst.run.directory import read_events
from programs.lab import build
from tests.cases.test_unmoved_steps import compile_judged, steps_of
from tests.cli.conftest import MODULE, SETTINGS, SOURCE, invoke
from tests.pipelines.watched import SHORT, append_words, lab_policy, says
from tests.relay import any_answer
from tests.test_compile import compile_relay, same_weights, told

RL = {"method": "rl", "cycles": 2, "steps_per_cycle": 3, "problems_per_step": 2}


def flat(reward):
    return lambda gold, pred, trace=None: reward


def test_a_run_flat_at_the_floor_stops_at_the_limit_says_so_and_is_saved(tmp_path):
    with pytest.raises(NothingLearnedError) as stop:
        compile_relay(tmp_path / "run", metric=flat(0.0), max_unmoved_steps=2, parse_trial=2, **RL)
    error = stop.value
    assert (error.run_dir, error.steps, error.cause) == (tmp_path / "run", 2, "floor")
    assert "steps 0 to 1: 2 steps in a row had no gradient: flat at the floor: mean reward 0" in str(error)
    assert "Tried on this model, with 2 rollouts each" in str(error)
    assert "max_unmoved_steps above 2" in str(error)
    assert [report["step"] for report in steps_of(tmp_path / "run")] == [0, 1]
    assert read_events(tmp_path / "run")[-1]["event"] == "ended"


def test_with_a_raised_limit_it_goes_on_and_equals_a_run_that_never_stopped(tmp_path):
    """Steps 1 to 3 move nothing: at a limit of 3 the run stops behind the fourth, in the middle of a cycle."""
    settings = {"parse_trial": 0, "checkpoint_every": 5}
    whole = compile_judged(tmp_path / "whole", 0, 4, 5, max_unmoved_steps=None, **settings)
    for _ in range(2):  # counted across the continuation
        compiled = compile_judged(tmp_path / "run", 0, 4, 5, max_unmoved_steps=3, **settings)
        assert compiled.detailed_results.ending.startswith("1 of 4 updates changed the weights; the last ones did not")
        policy_of(compiled).release()
    assert len(steps_of(tmp_path / "run")) == 4
    resumed = compile_judged(tmp_path / "run", 0, 4, 5, max_unmoved_steps=4, **settings)
    assert same_weights(whole, resumed)
    kept = [[told(event) for event in read_events(tmp_path / name)] for name in ("whole", "run")]
    for events in kept:
        events[0].pop("config")  # names the limit
    assert kept[0] == kept[1]


def test_a_run_that_learned_and_then_no_more_ends_early_and_returns_its_program(tmp_path, caplog):
    settings = {"max_unmoved_steps": 3, "parse_trial": 0, "progress": False}
    compiled = compile_judged(tmp_path / "run", 0, **settings)
    assert policy_of(compiled).checkpoint.version == "step-000001"
    policy_of(compiled).release()
    assert (tmp_path / "run" / "compiled").is_dir()
    assert [event["event"] for event in read_events(tmp_path / "run")[-3:]] == ["validation", "ended", "done"]
    (record,) = read_records([tmp_path / "run"])
    ended = record.ended
    assert (record.state, ended.kind, ended.step, ended.early) == ("finished", "nothing_learned", 4, True)
    assert ended.text.startswith("steps 1 to 3: 3 steps in a row had no gradient: flat at the floor")
    assert "\n" not in ended.text
    assert "raise max_unmoved_steps above 3, or set it to None" in ended.advice
    (warning,) = [text for text in texts_of(tmp_path / "run", "warning") if "The run ends here, after 4 of 6" in text]
    assert warning.endswith(ended.advice)
    assert "the run is finished early, after 4 steps: steps 1 to 3" in caplog.text
    assert "[demo] ended after step 4: steps 1 to 3" in lines_of(tmp_path / "run")


@pytest.mark.parametrize("moving", [(), (0, 1, 2)], ids=["none", "three"])
def test_a_run_that_did_all_of_its_plan_returns_its_program_however_it_ended(tmp_path, moving):
    """At the limit in its very last step, as auto="light" may be."""
    limit = 6 - len(moving)
    compiled = compile_judged(tmp_path / "run", *moving, max_unmoved_steps=limit, parse_trial=0)
    policy_of(compiled).release()
    (record,) = read_records([tmp_path / "run"])
    assert (record.state, record.ended.kind, len(record.steps)) == ("finished", "complete", 6)
    assert record.validations[-1].when == "end"
    assert record.ended.advice is None
    assert (tmp_path / "run" / "compiled").is_dir()


def test_no_run_is_ended_before_its_only_search(tmp_path):
    compiled = compile_relay(
        tmp_path / "run", metric=flat(0.5), max_unmoved_steps=1, parse_trial=0, **{**RL, "method": "rl_then_gepa"}
    )
    policy_of(compiled).release()
    kinds = [event["event"] for event in read_events(tmp_path / "run")]
    assert (kinds.count("step"), kinds.count("cycle")) == (6, 1)


def test_a_run_that_only_searches_warns_of_no_weights(tmp_path, caplog):
    compiled = compile_relay(tmp_path / "run", method="gepa", cycles=1, steps_per_cycle=1, progress=False)
    policy_of(compiled).release()
    assert compiled.detailed_results.ending == "no update of the weights was made"
    assert "changed the weights" not in caplog.text


def test_the_count_goes_on_across_a_kill(tmp_path):
    class KilledError(Exception):
        pass

    def kill(event):
        if event["event"] == "step" and event["report"]["step"] == 2:
            raise KilledError

    with pytest.raises(KilledError):
        compile_relay(tmp_path / "run", metric=flat(0.5), max_unmoved_steps=4, listeners=[kill], **RL)
    with pytest.raises(NothingLearnedError, match=r"steps 0 to 3: 4 steps in a row .* flat at mean reward 0.5") as stop:
        compile_relay(tmp_path / "run", metric=flat(0.5), max_unmoved_steps=4, **RL)
    assert (stop.value.cause, len(steps_of(tmp_path / "run"))) == ("alike", 4)


def test_a_run_that_solves_everything_ends_early_as_finished(tmp_path):
    compiled = compile_relay(tmp_path / "run", metric=flat(1.0), max_unmoved_steps=2, **RL)
    assert compiled.detailed_results.ending.startswith("no update changed the weights: flat at the top: mean reward 1")
    assert len(steps_of(tmp_path / "run")) == 2
    assert read_events(tmp_path / "run")[-1]["event"] == "done"
    policy_of(compiled).release()


class Asks(dspy.Module):
    """One predictor of the laboratory's, asked through an adapter that its model does not follow."""

    def __init__(self):
        super().__init__()
        self.solve = says("Work out the answer from the numbers.")
        self.set_lm(lab_policy(linger_s=0.2))

    def forward(self, numbers):
        return self.solve(numbers=numbers)


def compile_unparsed(run_dir, **changes):
    """A run in which no reply parses."""
    settings = {**SHORT, "method": "rl", "group_size": 2, "population_size": 1, "parse_trial": 2, **changes}
    optimizer = FSTOptimizer(metric=any_answer, propose=append_words, run_dir=run_dir, **settings)
    with dspy.context(adapter=dspy.JSONAdapter()):
        return optimizer.compile(Asks(), trainset=build(train=8, val=1, test=1).trainset)


def lines_of(run_dir, samples=True, terminal=False):
    """What the view shows of a run's events."""
    console = Console(file=io.StringIO(), force_terminal=terminal, width=300)
    with ProgressView("demo", console, samples=samples) as view:
        for event in read_events(run_dir):
            view(event)
    return console.file.getvalue()


@pytest.fixture(scope="module")
def unparsed(tmp_path_factory):
    """The directory of a short run in which nothing parsed, which ended before any limit."""
    run_dir = tmp_path_factory.mktemp("unparsed") / "run"
    compiled = compile_unparsed(run_dir)
    policy_of(compiled).release()
    return run_dir, compiled


def texts_of(run_dir, kind):
    return [event["text"] for event in read_events(run_dir) if event["event"] == kind]


NOTHING_PARSED = (
    "no update changed the weights: nothing parsed: 100% of the rollouts ended in a reply that does not parse"
)


def test_the_end_of_a_run_that_trained_nothing_is_told_everywhere(unparsed):
    run_dir, compiled = unparsed
    assert compiled.detailed_results.ending == NOTHING_PARSED
    assert lines_of(run_dir).splitlines()[-1] == f"[demo] finished: {NOTHING_PARSED}"
    (warning,) = [text for text in texts_of(run_dir, "warning") if text.startswith("no update")]
    assert "For the first of them write, before compile()" in warning
    assert "ChatAdapter" in warning


def test_the_fault_is_told_once_before_the_start_with_what_helps(unparsed):
    run_dir, _ = unparsed
    told = [text for text in texts_of(run_dir, "note") if "parse" in text]
    assert len(told) == 1
    assert "every reply to the first examples failed (parse)" in told[0]
    assert "Tried on this model" in told[0]


def test_the_warning_of_a_step_holds_a_reply_its_reason_and_what_helped(unparsed):
    run_dir, _ = unparsed
    (warning,) = [text for text in texts_of(run_dir, "warning") if "does not parse (" in text]
    assert "A reply of 'solve': '" in warning
    assert "Expected to find output fields" in warning
    assert "what did best when it was tried on this model: ChatAdapter" in warning
    assert "dspy.JSONAdapter()" not in warning, "it is in use"


def test_one_sampled_reply_a_step_is_shown_where_it_is_wanted(unparsed):
    run_dir, _ = unparsed
    assert "sample:" not in lines_of(run_dir, samples=False)
    (line,) = [line for line in lines_of(run_dir).splitlines() if "sample: " in line]
    assert "sample: solve under " in line
    assert "failed: parse" in line
    assert len(line) < 600
    assert "sample" in lines_of(run_dir, terminal=True)


def test_a_run_stopped_because_nothing_parses_names_the_cause_and_what_was_tried(tmp_path):
    with pytest.raises(NothingLearnedError) as stop:
        compile_unparsed(tmp_path / "run", cycles=2, max_unmoved_steps=1)
    assert stop.value.cause == "unparsed"
    assert "step 0: 1 step had no gradient: nothing parsed: 100%" in str(stop.value)
    assert "For the first of them write, before compile()" in str(stop.value)
    assert "[demo] ended after step 1: step 0: 1 step" in lines_of(tmp_path / "run")


def test_the_command_line_ends_with_an_error_goes_on_with_a_higher_limit_and_its_last_line_is_true(tmp_path):
    recipe = {**SETTINGS["recipe"], **RL, "cycles": 1, "parse_trial": 0, "max_unmoved_steps": 2}
    settings = {**SETTINGS, "metric": "flatly:metric", "recipe": recipe}
    project = tmp_path / "project.yaml"
    (tmp_path / f"{MODULE}.py").write_text(SOURCE)
    (tmp_path / "flatly.py").write_text("def metric(gold, pred, trace=None):\n    return 0.0\n")
    project.write_text(yaml.safe_dump(settings))
    text = invoke("run", project, "--samples", code=1).stderr
    assert "steps 0 to 1: 2 steps in a row had no gradient: flat at the floor" in text
    by_command = "raise max_unmoved_steps in the recipe of the project file, or set it to null, then dspy-fst run FILE"
    assert f"{by_command}, or dspy-fst resume {tmp_path / 'run'} --project FILE" in text
    assert "sample: last under " in text
    first = invoke("show", tmp_path / "run").stdout.splitlines()[0]
    assert first.startswith("run: stopped at step 2; 2 of 3 steps are done. steps 0 to 1: 2 steps in a row")
    listed = invoke("runs", tmp_path).stdout
    assert "raise max_unmoved_steps to go on" in " ".join(listed.split())
    assert "No update changed the weights in these steps" not in listed, "the advice stands in show"
    for command in (("serve", tmp_path / "run"), ("export", tmp_path / "run", tmp_path / "out")):
        said = invoke(*command, code=2).stderr
        assert f"{tmp_path / 'run'} holds no compiled/: max_unmoved_steps stopped the run after 2 steps" in said
        assert "steps 0 to 1: 2 steps in a row had no gradient: flat at the floor" in said
        assert "To go on in Python: the same compile() with max_unmoved_steps raised, or None." in said
        assert by_command in said
        assert "ends it" not in said
    recipe["max_unmoved_steps"] = None
    project.write_text(yaml.safe_dump(settings))
    said = invoke("run", project).stdout.splitlines()
    assert said[0].startswith("0 weight updates in 3 steps")
    assert said[-1].startswith("no update changed the weights: flat at the floor: mean reward 0")


def test_resume_of_a_run_that_ended_early_names_the_setting_and_goes_on_when_it_is_raised(tmp_path):
    recipe = {**SETTINGS["recipe"], **RL, "cycles": 1, "parse_trial": 0, "max_unmoved_steps": 2}
    settings = {**SETTINGS, "metric": "topped:metric", "recipe": recipe}
    project, run_dir = tmp_path / "project.yaml", tmp_path / "run"
    (tmp_path / f"{MODULE}.py").write_text(SOURCE)
    (tmp_path / "topped.py").write_text("def metric(gold, pred, trace=None):\n    return 1.0\n")
    project.write_text(yaml.safe_dump(settings))
    assert "ended early, after step 2: steps 0 to 1: 2 steps" in invoke("run", project).stdout
    same = (("resume", run_dir), ("resume", run_dir, "--project", project), ("run", project))
    for command in same:
        said = invoke(*command).stderr
        assert "is finished: it ended early, after step 2. steps 0 to 1" in said
        assert (
            f"raise max_unmoved_steps in the recipe of the project file, or set it to null, then dspy-fst run FILE, or "
            f"dspy-fst resume {run_dir} --project FILE" in said
        )
    shown = invoke("show", run_dir).stdout
    assert shown.startswith("run: finished early; 2 of 3 steps are done, weights step-000000; steps 0 to 1: 2 steps")
    assert f"dspy-fst resume {run_dir} --project FILE" in " ".join(shown.split())
    (listed,) = json.loads(invoke("runs", tmp_path, "--json").stdout)["runs"]
    assert (listed["state"], listed["setting"], listed["resumable"]) == ("finished", "max_unmoved_steps", True)
    text = " ".join(invoke("runs", tmp_path).stdout.split())
    assert "dspy-fst resume RUN --project FILE" in text
    assert "to go on with one that can be resumed" not in text
    recipe["max_unmoved_steps"] = 9
    project.write_text(yaml.safe_dump(settings))
    assert "in 3 steps" in invoke("resume", run_dir, "--project", project).stdout
    assert "is finished; to train anew" in invoke("resume", run_dir, "--project", project).stderr


def test_where_nothing_was_tried_a_stop_advises_what_is_not_done_yet(tmp_path):
    with pytest.raises(NothingLearnedError) as stop:
        compile_unparsed(tmp_path / "run", cycles=2, max_unmoved_steps=1, parse_trial=0)
    assert "two demos, a lower temperature, simpler output fields" in stop.value.advice
    assert "JSONAdapter" not in stop.value.advice, "it is in use"
