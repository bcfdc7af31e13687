"""`dspy-fst show`: a run's tables, from its events alone."""

import json
import re

import pytest
from filelock import FileLock

from dspy_fst.cli import printer
from dspy_fst.run.directory import read_events
from tests.cli.conftest import invoke
from tests.report.happenings import CHILD, LATE, SEED, cycle, done, plan, step, timed, whole_run


def written(path, events):
    path.mkdir(parents=True, exist_ok=True)
    (path / "events.jsonl").write_text("".join(f"{json.dumps(event)}\n" for event in events))
    return path


def cells(text, first):
    """The cells of the row that begins with this word."""
    return next(line.split() for line in text.splitlines() if line.split()[:1] == [first])


def test_a_finished_run_is_shown_with_its_population_and_its_costs(finished):
    text = invoke("show", finished).stdout
    assert "finished; 6 of 6 steps are done, weights step-000006" in text
    done = read_events(finished)[-1]
    for member in done["population"]["members"]:
        for name, said in member.items():
            assert f"{name}: {said}" in text
    assert cells(text, "rollouts")[1].isdigit()
    rewards = [event["report"]["reward"] for event in read_events(finished) if event["event"] == "step"]
    assert [cells(text.split("Steps")[1], str(i))[2] for i in range(6)] == [f"{reward:.3f}" for reward in rewards]


def test_a_running_a_killed_and_an_empty_run_are_told_apart(tmp_path):
    path = written(tmp_path / "run", whole_run()[:5])
    with FileLock(path / ".lock"):
        assert "run: running; 1 of 4 steps are done" in invoke("show", path).stdout
    text = invoke("show", path).stdout
    assert f"stopped at step 1; 1 of 4 steps are done. To go on: dspy-fst resume {path}" in text
    empty = invoke("show", written(tmp_path / "empty", [])).stdout
    assert "stopped before it wrote anything" in empty
    assert "No search is over yet." in empty


def test_cycles_and_steps_show_what_was_measured_and_a_dash_for_what_was_not(tmp_path):
    text = invoke("show", written(tmp_path / "run", whole_run())).stdout
    cycles, steps = text.split("Steps")[0], text.split("Steps")[1]
    #                         cycle rollouts repeats reflections accepted carried found  population      reward
    assert cells(cycles, "1") == ["1", "20", "3", "5", "2", "0.625", "0.750", "0.750", "0.625", "0.750"]
    assert cells(steps, "1")[3:6] == ["–", "–", "–"]  # noqa: RUF001
    assert cells(steps, "2")[2:4] == ["–", "0.010"]  # noqa: RUF001
    assert cells(steps, "2")[7:10] == ["1/4", "3", "1"]


def test_what_was_masked_and_warned_of_is_told_with_its_reason(tmp_path):
    text = invoke("show", written(tmp_path / "run", whole_run())).stdout
    assert cells(text, "masked:") == ["masked:", "timeout", "3", "1.8%"]
    assert "after step 2: step 2: entropy is low" in text


def test_only_the_last_steps_are_shown_and_it_says_so(tmp_path):
    path = written(tmp_path / "run", timed([plan(), *(step(i, 0.5) for i in range(30))]))
    text = invoke("show", path, "--steps", "2").stdout
    assert "Steps, the last 2 of 30 (--steps 30 shows all)" in text
    shown = [
        line.split()[0] for line in text.split("shows all)")[1].split("Population")[0].splitlines() if line.strip()
    ]
    assert shown == ["step", "28", "29"]
    assert "Steps" not in invoke("show", path, "--steps", "0").stdout


@pytest.mark.parametrize(("coefficient", "told"), [(0.0, True), (0.001, False)], ids=["off", "on"])
def test_a_kl_that_is_not_measured_is_told_with_the_setting_that_leaves_it_out(tmp_path, coefficient, told):
    events = [plan(kl_coefficient=coefficient), step(0, 0.5, kl_to_start=0.1 if coefficient else None)]
    text = invoke("show", written(tmp_path / "run", timed(events))).stdout
    assert ("KL is not measured under kl_coefficient=0, which leaves the reference model out." in text) == told


def test_json_holds_the_same_as_one_object(tmp_path):
    path = written(tmp_path / "run", whole_run())
    shown = json.loads(invoke("show", path, "--json").stdout)
    assert (shown["state"], shown["steps_done"], shown["steps_planned"]) == ("finished", 4, 4)
    assert [member["texts"]["solve"] for member in shown["population"]] == [LATE, CHILD]
    assert [member["validation"] for member in shown["population"]] == [0.875, 0.75]
    assert shown["lost"] == {"failed: parse": 3, "masked: timeout": 3}
    assert shown["costs"]["rollouts"] == 168
    assert len(shown["steps"]) == 4
    assert len(json.loads(invoke("show", path, "--json", "--steps", "1").stdout)["steps"]) == 1


def test_evaluations_are_shown_with_what_they_measured(tmp_path):
    path = written(tmp_path / "run", whole_run())
    under = {"split": "train", "limit": 4, "problems_of_split": 4, "k": 2, "weights": "step-000000", "seed": 7}
    made = [
        {"kind": "eval", "mean": 0.5, "low": 0.25, "high": 0.75, "problems": 3, "candidate": "abc", **under},
        {"kind": "two_by_two", "cells": {"seed/base": [0.125, 0.01]}, **under},
    ]
    (path / "evaluations.jsonl").write_text("\n".join(map(json.dumps, made)))
    text = invoke("show", path).stdout.split("Evaluations")[1]
    assert "train: these problems were trained on" in text
    row = next(line for line in text.splitlines() if "abc" in line).split()
    assert row == ["train", "abc", "step-000000", "3/4", "4", "–", "7", "2", "0.500", "0.250", "to", "0.750"]  # noqa: RUF001
    assert "split train, the first 4 problems, k=2, weights step-000000, seed 7" in text
    assert cells(text, "seed") == ["seed", "0.125", "±", "0.010"]
    shown = json.loads(invoke("show", path, "--json").stdout)
    assert shown["evaluations"][0]["candidate"] == "abc"
    assert shown["two_by_two"]["cells"] == {"seed/base": [0.125, 0.01]}


def test_a_text_cannot_command_the_terminal_and_is_never_cut(tmp_path):
    hostile = "\x1b[31m\x1b]0;mine\x07 [bold]all[/bold] " + "long " * 200 + "end"
    events = [plan(), cycle(0, {SEED: 0.1, hostile: 0.2}, {hostile: [SEED]}, [hostile]), done([hostile], [0.2], {})]
    text = invoke("show", written(tmp_path / "run", timed(events))).stdout
    assert "\x1b" not in text
    assert "\x07" not in text
    assert "[bold]all[/bold] long" in text
    assert "long end\n" in text, "in a pipe a text is one line"


def test_a_narrow_terminal_wraps_and_loses_nothing(monkeypatch, capsys):
    monkeypatch.setattr("rich.console.Console.is_terminal", True)
    monkeypatch.setenv("COLUMNS", "20")
    printer.Printer().table(("step", "reward", "entropy"), [("123456", "0.123", "0.456789"), ("7", "8", "9")])
    shown = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    assert max(map(len, shown.splitlines())) <= 20
    assert sorted("".join(shown.split())) == sorted("step reward entropy 123456 0.123 0.456789 7 8 9".replace(" ", ""))


def test_what_is_no_run_is_refused(tmp_path):
    result = invoke("show", tmp_path, code=2)
    assert "is not the directory of a run" in result.stderr
    assert result.stdout == ""
