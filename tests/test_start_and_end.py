"""The start is measured like the end, what follows from it is told, and the best of the measured states can be had.

On a random model of some thousand parameters: what the validations score is set by the test, stage by stage.
"""

import copy
import json
import shutil
import time

import dspy
import pytest
from safetensors.torch import load_file

import dspy_fst
from dspy_fst import FSTOptimizer
from dspy_fst.errors import ConfigurationError
from dspy_fst.evaluation.run_reader import RunReader
from dspy_fst.policy_lm import policy_of
from dspy_fst.report.from_directory import read_records
from dspy_fst.report.listing import list_runs
from dspy_fst.report.summary import Summary, summary_of
from dspy_fst.report.verdict import verdict
from dspy_fst.rollout.components import read_texts
from dspy_fst.rollout.rollouter import Rollouter
from dspy_fst.run.directory import read_events
from dspy_fst.training.publisher import best_versions
from dspy_fst.training.result import CompiledResults
from tests.cli.conftest import invoke
from tests.fixtures.first_release import made
from tests.fixtures.first_release.made import TRAINSET, Taking, student

VALSET = [dspy.Example(numbers=f"{n} 4 5", kind="val").with_inputs("numbers") for n in range(5)]
RECIPE = {**made.RECIPE, "cycles": 4, "keep_weights": 1, "validate_every": 1, "patience": 2}
SCORES = [0.5, 0.9, 0.3, 0.2, 0.1]
"""Of the validation problems, after so many steps: the best state is the one after the first."""


class Staged:
    """A metric that follows the run: it hears how many steps are done. Training problems are scored by length."""

    def __init__(self, scores=SCORES):
        self.scores, self.done = scores, 0

    def __call__(self, gold, pred, trace=None, pred_name=None, pred_trace=None):
        if gold.get("kind") == "val":
            return self.scores[self.done] + 0.01 * self.done * (int(gold.numbers[0]) - 2)  # their mean is the score
        return made.metric(gold, pred)

    def hear(self, event):
        self.done += event["event"] == "step"


def compiled_in(run_dir, *, valset=VALSET, done=0, scores=SCORES, listeners=(), program=None, **changes):
    metric = Staged(scores)
    metric.done = done
    optimizer = FSTOptimizer(
        metric=metric,
        propose=made.propose,
        run_dir=run_dir,
        listeners=[metric.hear, *listeners],
        **{**RECIPE, **changes},
    )
    with dspy.context(adapter=Taking()):
        compiled = optimizer.compile(program or student(), trainset=TRAINSET, valset=valset)
    policy_of(compiled).release()
    return compiled


def of_kind(run_dir, kind):
    return [event for event in read_events(run_dir) if event["event"] == kind]


def validations(run_dir):
    """Reports of the validations, each with its score."""
    return [{**event["report"], "score": event["score"]} for event in of_kind(run_dir, "validation")]


def weights_of(program):
    return load_file(policy_of(program).checkpoint.path / "model.safetensors")


def same_tensors(one, other):
    return all(one[name].equal(other[name]) for name in one)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder that holds the model, as the working directory."""
    folder = tmp_path_factory.mktemp("start-and-end")
    made.make_base(folder / "base")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder


@pytest.fixture(scope="module")
def stopped(workplace):
    """(directory, program) of a run that was best after its first step, and was ended early after its third."""
    return workplace / "stopped", compiled_in(workplace / "stopped")


@pytest.fixture
def again(stopped, tmp_path):
    """A copy of its directory, to be continued."""
    return shutil.copytree(stopped[0], tmp_path / "again")


# ---- what is measured ------------------------------------------------------------------------------


def test_the_start_is_measured_before_the_first_search_on_the_terms_of_all(stopped):
    events = read_events(stopped[0])
    kinds = [event["event"] for event in events]
    assert kinds.index("validation") < kinds.index("cycle")
    measured = validations(stopped[0])
    assert [(of["when"], of["step"], of["weights"]) for of in measured] == [
        ("start", 0, "step-000000"),
        ("between", 1, "step-000001"),
        ("between", 2, "step-000002"),
        ("between", 3, "step-000003"),
        ("end", 3, "step-000003"),
    ]
    assert measured[0]["candidates"] == [read_texts(student()).digest]
    assert [of["score"] for of in measured] == pytest.approx([0.5, 0.9, 0.3, 0.2, 0.2])
    assert all(of["terms"] == measured[0]["terms"] for of in measured)
    assert measured[0]["counts"] == {"rollouts": 5}


def test_what_was_just_measured_is_not_played_again_at_the_end(stopped):
    *_, between, end = validations(stopped[0])
    assert between["counts"]["rollouts"] == 5 * len(between["candidates"])
    assert end["counts"] == {"rollouts": 0, "repeats": 5 * len(end["candidates"])}


def test_validation_is_counted_outside_of_what_the_run_spends(stopped):
    (record,) = read_records([stopped[0]])
    made_ = sum(of["counts"]["rollouts"] for of in validations(stopped[0]))
    assert record.costs.validation_rollouts == made_ > 5
    assert record.costs.validation_rollouts <= record.budget["validation_rollouts"] == 5 * (1 + 4 * 2)
    assert record.costs.rollouts == record.costs.search_rollouts + record.costs.training_rollouts
    assert record.costs.validation_tokens > 0
    assert "validation" in record.costs.seconds


def test_training_draws_the_same_whether_there_is_a_valset_or_not(stopped, workplace):
    compiled_in(workplace / "alone", valset=None, cycles=2, validate_every=None, patience=None)
    keys = ("reward", "sampled_tokens", "update", "counts")
    reports = [
        [{k: of["report"][k] for k in keys} for of in of_kind(run, "step")][:2]
        for run in (workplace / "alone", stopped[0])
    ]
    assert reports[0] == reports[1]
    populations = [(workplace / run / "populations" / "cycle-001.json").read_text() for run in ("alone", "stopped")]
    assert populations[0] == populations[1]


def test_replies_of_a_search_are_kept_with_what_they_earned_and_as_many_as_of_a_step(stopped):
    kept, searches = of_kind(stopped[0], "search_samples"), of_kind(stopped[0], "cycle")
    assert [of["cycle"] for of in kept] == [of["report"]["cycle"] for of in searches]
    tried = {candidate["digest"] for of in searches for candidate in of["candidates"]}
    for of in kept:
        assert len(of["rollouts"]) == min(4, searches[of["cycle"]]["report"]["rollouts"]) > 1
        for rollout in of["rollouts"]:
            *_, last = rollout["modules"]
            assert last["name"] == "last"
            assert rollout["reward"] == pytest.approx(1 / (1 + len(last["outputs"]["answer"])))
    assert {rollout["candidate"] for of in kept for rollout in of["rollouts"]} & tried


# ---- what is told ----------------------------------------------------------------------------------


def test_a_decline_is_told_while_it_happens_and_once(stopped):
    events = [event for event in read_events(stopped[0]) if event["event"] in ("step", "validation", "warning")]
    told = [(place, of) for place, of in enumerate(events) if "validation after" in of.get("text", "")]
    ((place, warning),) = told
    assert (events[place - 1]["event"], events[place - 1]["report"]["step"]) == ("validation", 2)
    assert warning["step"] == 1
    assert "validation after step 1: 0.300, below the 0.500 at the start by 0.200" in warning["text"]
    assert "return_best=True" in warning["text"]


def test_the_end_tells_start_end_interval_and_the_best(stopped):
    (record,) = read_records([stopped[0]])
    assert verdict(record) == (
        "start 0.500, end 0.200, -0.300 (95% interval -0.359 to -0.241, 5 problems; the best of 2 by these problems, "
        "so favoured), best 0.900 after step 0 (chosen by them too)"
    )
    shown = invoke("show", str(stopped[0])).stdout
    assert f"validation: {verdict(record)}" in shown
    assert "at the end (returned)" in shown
    told = json.loads(invoke("show", str(stopped[0]), "--json").stdout)
    assert [of["score"] for of in told["validations"]] == pytest.approx([0.5, 0.9, 0.3, 0.2, 0.2])
    assert told["validations"][-1]["gain"]["mean"] == pytest.approx(-0.3)


def test_without_a_valset_it_is_said_that_nothing_was_compared(workplace, tmp_path):
    told = []
    program = student()
    program.summary = "the program's own"
    compiled = compiled_in(
        tmp_path / "run",
        valset=[],
        cycles=1,
        validate_every=None,
        patience=None,
        program=program,
        listeners=[lambda event: told.append(event.get("text", ""))],
    )
    assert any(text.startswith("no valset: the start is not compared with the end") for text in told)
    assert of_kind(tmp_path / "run", "validation") == []
    summary = compiled.detailed_results.summary
    assert dict(summary.facts)["start and end"] == "not validated"
    assert compiled.summary == "the program's own"
    assert any("the program has a `summary` of its own" in text for text in told)


# ---- early stopping --------------------------------------------------------------------------------


def test_a_run_that_gets_no_better_is_ended_with_its_reason(stopped):
    assert len(of_kind(stopped[0], "step")) == 3
    (record,) = read_records([stopped[0]])
    assert (record.ended.kind, record.ended.step, record.state) == ("early_stopping", 3, "finished")
    assert (
        "2 validations in a row brought no new best (patience=2): the best is 0.900 after step 0" in record.ended.text
    )
    assert record.ended.advice.startswith("To go on, raise patience or leave it out")
    assert "finished early; 3 of 4 steps are done" in invoke("show", str(stopped[0])).stdout
    assert "dspy-fst resume" in invoke("resume", str(stopped[0])).stderr


def test_it_stays_ended_and_goes_on_when_its_patience_is_raised(again, workplace):
    compiled_in(again, done=3)
    assert len(of_kind(again, "step")) == 3
    compiled_in(again, done=3, patience=None)
    assert [event["report"]["step"] for event in of_kind(again, "step")] == [0, 1, 2, 3]
    assert [of["when"] for of in validations(again)] == ["start", *["between"] * 4, "end"]
    (record,) = read_records([again])
    assert record.ended.kind == "complete"


def test_a_killed_run_measures_what_an_uninterrupted_one_does(stopped, workplace, tmp_path):
    class KilledError(Exception):
        pass

    def kill(event):
        if event["event"] == "validation" and event["report"]["step"] == 2:
            raise KilledError  # after the event was written and before the state was committed

    with pytest.raises(KilledError):
        compiled_in(tmp_path / "killed", listeners=[kill])
    assert len(of_kind(tmp_path / "killed", "validation")) == 3
    resumed = compiled_in(tmp_path / "killed", done=1)

    assert told(tmp_path / "killed") == told(stopped[0])
    assert same_tensors(weights_of(resumed), weights_of(stopped[1]))


def told(run_dir):
    """Its events, clocks left out."""
    events = json.loads(json.dumps(read_events(run_dir)))
    for event in events:
        del event["time"]
        event.get("report", {}).pop("seconds", None)
    return events


def test_a_run_that_dies_before_its_first_search_loses_one_batch_at_most(stopped, workplace, tmp_path, monkeypatch):
    """What the first look brought is committed before the start is validated."""
    played, play = [], Rollouter.rollout

    def noted(self, tasks, draw, *rest, **options):
        played.append(draw)
        if deaths and draw == deaths[0]:
            raise deaths.pop() and ConnectionError("the machine goes down")
        return play(self, tasks, draw, *rest, **options)

    monkeypatch.setattr(Rollouter, "rollout", noted)
    deaths = ["validation"]
    with pytest.raises(ConnectionError):
        compiled_in(tmp_path / "died")
    assert played == ["preflight", "validation"]
    (run,) = list_runs(tmp_path / "died").runs
    assert run.resumable
    played.clear()
    resumed = compiled_in(tmp_path / "died")
    assert played[0] == "validation"
    assert "preflight" not in played
    assert [of["when"] for of in validations(tmp_path / "died")].count("start") == 1
    assert told(tmp_path / "died") == told(stopped[0])
    assert same_tensors(weights_of(resumed), weights_of(stopped[1]))


def test_a_finished_run_that_is_compiled_again_took_no_longer(again, workplace, monkeypatch):
    (before,) = read_records([again])
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + 10_000)
    compiled = compiled_in(again, done=3)
    (after,) = read_records([again])
    assert (after.started, after.last) == (before.started, before.last)
    facts = [dict(of.facts)["time"] for of in (summary_of(before), compiled.detailed_results.summary)]
    assert facts[0] == facts[1]
    assert [run.hours for run in list_runs(again).runs] == [(before.last - before.started) / 3600]
    compiled_in(again, done=3, patience=None)
    (longer,) = read_records([again])
    assert longer.last > before.last + 9_000, "it went on"


# ---- the best of them ------------------------------------------------------------------------------


def test_the_best_state_s_weights_and_population_are_returned_also_after_the_end(again, workplace):
    (before,) = read_records([again])
    assert best_versions(before.steps, 3) == {"step-000002"}  # so that reward, keep_weights=1 and age keep another
    assert (again / "weights" / "step-000001").is_dir()
    steps = of_kind(again, "step")
    compiled = compiled_in(again, done=3, return_best=True)
    assert of_kind(again, "step") == steps, "nothing is trained anew"
    assert policy_of(compiled).checkpoint.version == "step-000001"
    assert policy_of(compiled).checkpoint.path == again / "weights" / "step-000001"
    found = json.loads((again / "populations" / "cycle-000.json").read_text())
    assert sorted(map(str, found["members"])) == sorted(str(member.texts) for member in compiled.population.members)
    assert compiled.population.scores[0] == pytest.approx(0.9)
    assert read_texts(compiled) == compiled.population.best
    assert any("return_best: the state after step 0 (validation 0.900) is returned" in e["text"] for e in notes(again))
    (record,) = read_records([again])
    assert record.weights == "step-000001"
    assert "returned: the state after step 0" in verdict(record)
    (run,) = list_runs(again).runs
    assert (run.measured, run.start, run.end) == ("validation", pytest.approx(0.5), pytest.approx(0.9))
    past = RunReader.of(again)
    assert (past.version(), past.returned_cycle) == ("step-000001", None)
    assert past.population() == compiled.population
    loaded = dspy_fst.load(again / "compiled", made.Two(), adapter=Taking())
    assert loaded.population == compiled.population
    assert same_tensors(weights_of(loaded), weights_of(compiled))


def notes(run_dir):
    return [event for event in read_events(run_dir) if event["event"] == "note"]


def test_the_engine_serves_the_weights_that_are_returned(again, workplace):
    compiled = compiled_in(again, done=3, return_best=True)
    served = policy_of(compiled).handle.ready()
    assert served.weights == "step-000001"
    assert served.held(policy_of(compiled).checkpoint).wrong == {}
    policy_of(compiled).release()


def test_the_start_may_be_the_best(workplace, tmp_path):
    compiled = compiled_in(
        tmp_path / "run", scores=[0.8, 0.1], cycles=1, return_best=True, validate_every=None, patience=None
    )
    assert policy_of(compiled).checkpoint.version == "step-000000"
    assert compiled.population.members == (read_texts(student()),) * 2
    assert compiled.population.scores == pytest.approx((0.8, 0.8))
    assert read_texts(compiled) == read_texts(student())
    shown = str(compiled.summary())
    assert "returned: the state at the start" in shown
    exported = invoke("export", str(tmp_path / "run"), str(tmp_path / "out"))
    assert exported.exit_code == 0, exported.stderr
    card = (tmp_path / "out" / "README.md").read_text()
    assert "start 0.800, end 0.100, -0.700" in card
    assert "at the start (returned)" in card
    page = invoke("report", str(tmp_path / "run"), "--out", str(tmp_path / "report.html"))
    assert page.exit_code == 0
    assert "start 0.800, end 0.100, -0.700" in (tmp_path / "report.html").read_text()


def test_a_loaded_program_tells_of_its_run_where_it_lies_in_it_and_else_says_why_not(stopped, tmp_path, capsys):
    run_dir, compiled = stopped
    loaded = dspy_fst.load(run_dir / "compiled", made.Two(), adapter=Taking())
    assert loaded.detailed_results == compiled.detailed_results
    assert str(loaded.summary()) == str(compiled.summary())
    assert isinstance(loaded.deepcopy().summary(), Summary)
    shutil.copytree(run_dir / "compiled", tmp_path / "elsewhere")
    other = dspy_fst.load(tmp_path / "elsewhere", made.Two(), adapter=Taking())
    why = f"{tmp_path / 'elsewhere'} is not inside a run's directory, where a run keeps what it measured"
    capsys.readouterr()
    assert str(other.deepcopy().summary()).startswith(why)
    assert capsys.readouterr().out.startswith(why)
    with pytest.raises(AttributeError, match=r"steps: .* is not inside a run's directory"):
        other.detailed_results.steps  # noqa: B018


# ---- what does not belong together -----------------------------------------------------------------


def test_validations_on_other_problems_are_not_compared(again, workplace):
    told = []
    compiled_in(
        again,
        done=3,
        valset=VALSET[:3],
        patience=None,
        cycles=4,
        listeners=[lambda event: told.append(event.get("text", ""))],
    )
    assert any("its 4 validations from before are not compared with what comes now" in text for text in told)
    assert any(
        "warning: valset: of its 3 problems 4 must turn from wrong to right" in text
        and text.endswith("which is more than this valset has; 32 problems would tell a gain of 0.125")
        for text in told
    )
    (record,) = read_records([again])
    assert verdict(record) == "start not validated, end 0.060"
    (run,) = list_runs(again).runs
    assert (run.measured, run.start, run.end) == ("validation", None, pytest.approx(0.06))


def test_settings_that_need_a_valset_are_refused_without_one(workplace, tmp_path):
    with pytest.raises(ConfigurationError) as error:
        compiled_in(tmp_path / "run", valset=None, return_best=True)
    assert len(error.value.faults) == 2
    assert "return_best=True: there is no valset to choose by; pass valset=[...]" in str(error.value)
    assert "validate_every=1: there is no valset to measure on" in str(error.value)


# ---- seen by people --------------------------------------------------------------------------------


def test_summary_prints_and_returns_the_whole(stopped, capsys):
    compiled = stopped[1]
    summary = compiled.summary()
    printed = capsys.readouterr().out
    assert isinstance(summary, Summary)
    assert printed == f"{summary}\n"
    for part in (
        "start 0.500, end 0.200, -0.300 (95% interval",
        "best 0.900 after step 0",
        "3 of 3 updates changed the weights",
        "outside the budget",
        "2 validations in a row brought no new best",
        "at the end (returned)",
        "Warnings",
        compiled.population.best.digest,
    ):
        assert part in printed
    assert copy.deepcopy(compiled.summary)().title == summary.title
    assert isinstance(compiled.deepcopy().summary(), Summary)


def test_results_and_population_are_readable_and_are_tables_in_a_notebook(stopped):
    compiled = stopped[1]
    results = compiled.detailed_results
    assert isinstance(results, CompiledResults)
    assert "Searches" in repr(results)
    assert "start 0.500, end 0.200" in repr(results)
    assert len(results.validations) == 5
    assert compiled.population.best.digest in repr(compiled.population)
    assert results._repr_html_().count("<table>") == 5
    assert compiled.population._repr_html_().count("<table>") == 1
