"""From events to what a report shows."""

import json
from dataclasses import asdict

import pytest
from filelock import FileLock

from dspy_fst.errors import RunDirectoryError
from dspy_fst.report.costs import LABELS
from dspy_fst.report.evaluated import CELLS, Drift, TwoByTwo
from dspy_fst.report.from_directory import read_records
from dspy_fst.report.from_events import record_of
from dspy_fst.report.run_record import RunningTotal, RunWarning
from tests.report.happenings import (
    CHILD,
    LATE,
    SEED,
    cycle,
    digest,
    done,
    plan,
    step,
    texts,
    timed,
    trajectories,
    whole_run,
)


def test_every_beginning_of_a_run_gives_a_record():
    events = whole_run()
    for length in range(len(events) + 1):
        record = record_of(events[:length])
        assert record.state == ("finished" if length == len(events) else "stopped")
        assert len(record.steps) == len(record.spent) == sum(event["event"] == "step" for event in events[:length])
        assert len(record.trajectories) == sum(event["event"] == "trajectories" for event in events[:length])


def test_a_step_has_cost_every_rollout_and_token_before_it_searches_included():
    assert record_of(whole_run()).spent == (
        RunningTotal(52, 260),
        RunningTotal(84, 420),
        RunningTotal(136, 680),
        RunningTotal(168, 840),
    )


def test_costs_add_up_to_the_time_from_the_first_event_to_the_last():
    costs = record_of(whole_run()).costs
    assert (costs.search_rollouts, costs.training_rollouts, costs.rollouts) == (40, 128, 168)
    assert (costs.search_tokens, costs.training_tokens, costs.trained_tokens) == (200, 640, 270)
    assert (costs.updates, costs.reflections, costs.accepted) == (3, 10, 4)
    assert costs.seconds == {
        "sampling for searches": 4.0,
        "sampling for updates": 12.0,
        "weight updates": 4.0,
        "publishing weights": 2.0,
        "everything else (reflections, saving, pauses)": 130.0 - 22.0,
    }


def test_every_cost_that_is_counted_has_one_label_for_all_front_ends():
    costs = record_of(whole_run()).costs
    counts = {name for name, value in vars(costs).items() if isinstance(value, int)} | {"rollouts", "tokens"}
    assert LABELS.keys() == counts
    assert len(set(LABELS.values())) == len(LABELS)
    assert costs.count("tokens") == costs.search_tokens + costs.training_tokens == 840


def test_candidates_keep_their_birth_parents_scores_and_memberships():
    seed, child, other, late = record_of(whole_run()).nodes
    assert (seed.texts, seed.parents, seed.born, seed.populations) == (texts(SEED), (), None, ())
    assert (child.parents, child.born, child.scores) == ((digest(SEED),), 0, {0: 0.5, 1: 0.625})
    assert (child.populations, child.final, child.validation) == ((0, 1), 1, 0.75)
    assert (other.birth_score, other.populations, other.final) == (0.125, (), 0)
    assert (late.number, late.parents, late.born, late.last_score) == (3, (digest(CHILD),), 1, 0.75)


def test_a_text_that_is_proposed_again_does_not_become_its_own_ancestor():
    first = cycle(0, {SEED: 0.1, CHILD: 0.2}, {CHILD: [SEED], SEED: [CHILD]}, [CHILD])
    again = cycle(1, {CHILD: 0.3, SEED: 0.4}, {CHILD: [SEED], SEED: [CHILD]}, [SEED])
    seed, child = record_of([first, again]).nodes
    assert (seed.parents, seed.born) == ((), None)
    assert (child.parents, child.born) == ((digest(SEED),), 0)


def test_the_final_population_is_known_by_its_texts_because_secrets_are_taken_out_of_them():
    events = whole_run()
    for event in events:
        for candidate in event.get("candidates", []):
            candidate["texts"] = {"solve": candidate["texts"]["solve"].replace("brief", "[secret]")}
        for member in event.get("population", {}).get("members", []):
            member["solve"] = member["solve"].replace("brief", "[secret]")
    record = record_of(events)
    assert record.population == (digest(LATE), digest(CHILD))
    assert record.by_digest[digest(LATE)].validation == 0.875


def test_a_run_without_searches_ends_with_what_it_started_with():
    record = record_of(timed([plan(method="rl"), step(0, 0.5), done([SEED, SEED], [None, None], {})]))
    (seed,) = record.nodes
    assert (seed.born, seed.final, seed.birth_score) == (None, 2, None)
    assert record.population == (digest(SEED), digest(SEED))


def test_each_search_tells_the_best_it_found_and_the_best_it_was_given():
    record = record_of(whole_run())
    assert record.found == [0.5, 0.75]
    assert record.carried == [0.25, 0.625]


def test_scores_that_were_not_measured_stay_none():
    record = record_of([cycle(0, {SEED: None, CHILD: None}, {CHILD: [SEED]}, [CHILD])])
    assert record.found == record.carried == [None]
    assert record.rewards == []


def test_lost_rollouts_are_counted_by_reason_over_searches_and_steps():
    assert list(record_of(whole_run()).lost.items()) == [("failed: parse", 3), ("masked: timeout", 3)]


def test_warnings_are_the_watch_s_and_the_notes_that_call_themselves_one():
    note = {"event": "note", "text": "going on"}
    assert record_of([*whole_run(), note]).warnings == (
        RunWarning(None, "the 4 updates all lie in the warm-up"),
        RunWarning(2, "step 2: entropy is low"),
    )


def test_samples_keep_what_did_not_parse_and_what_was_not_measured():
    record = record_of([trajectories(0, SEED), trajectories(1, SEED, reward=None, mask="timeout", modules=[])])
    best, worst = record.trajectories[0]
    assert (best.reward, best.modules[0].outputs) == (1.0, {"answer": "3 2 1"})
    assert (worst.failure, worst.modules[0].reply) == ("parse", "I will not say.")
    assert (record.trajectories[1][1].reward, record.trajectories[1][1].mask) == (None, "timeout")


def test_fields_that_an_older_release_did_not_write_are_none_and_newer_ones_are_left():
    old = step(0, 0.5)
    del old["report"]["update"]["effective_sample_share"]
    old["report"]["update"]["invented_later"] = 1
    update = record_of([old]).steps[0].update
    assert update.effective_sample_share is None
    assert update.grad_norm == 0.5


def test_of_the_evaluations_what_is_understood_is_read():
    lines = [
        json.dumps({"kind": "two_by_two", "cells": {"seed/base": [0.1, 0.01], "evolved/trained": [0.9, None]}}),
        json.dumps({"kind": "eval", "split": "test", "cycle": 1, "mean": 0.5, "low": 0.4, "high": 0.6, "k": 4}),
        json.dumps({"kind": "two_by_two", "cells": {"seed/base": "much"}}),
        json.dumps({"kind": "eval", "mean": None}),
        json.dumps({"kind": "something", "mean": 0.5}),
        "[]",
        '{"kind": "eval", "mean": 0.',
    ]
    record = record_of([], evaluations=lines)
    assert record.two_by_two.written == {"seed/base": (0.1, 0.01), "evolved/trained": (0.9, None)}
    assert record.two_by_two.rows == ["seed", "evolved"]
    (evaluated,) = record.evaluations
    assert (evaluated.split, evaluated.k, evaluated.mean, evaluated.low) == ("test", 4, 0.5, 0.4)


def test_a_two_by_two_that_was_measured_and_one_that_was_read_are_the_same_table():
    conditions = {"k": 2, "weights": "step-000003", "candidate": "abc", "seed": 7, "problems_of_split": 3}
    scores = dict(zip(CELLS, [(0.1, 0.01), (0.2, None), (0.3, 0.0), (0.9, 0.02)], strict=True))
    measured = TwoByTwo(scores, {"evolved instructions": Drift(0.01, 0.5)}, **conditions)
    assert measured.at("evolved", "trained") == (0.9, 0.02)
    assert list(measured.written) == ["seed/base", "seed/trained", "evolved/base", "evolved/trained"]
    drift = {name: asdict(moved) for name, moved in measured.drift.items()} | {"seed instructions": {"per_token": "x"}}
    line = {"kind": "two_by_two", "cells": measured.written, "drift": drift, **conditions}
    assert record_of([], evaluations=[json.dumps(line)]).two_by_two == measured


def test_an_evaluation_says_on_what_it_was_made_and_what_is_no_name_or_number_is_left_out():
    under = {"split": "val", "limit": 4, "problems_of_split": 4, "k": 2, "cycle": None, "weights": "step-000000"}
    told = {**under, "candidate": "abc", "seed": 7}
    lines = [
        json.dumps({"kind": "two_by_two", "cells": {"seed/base": [0.1, 0.01]}, **told, "split": "train"}),
        json.dumps({"kind": "eval", "mean": 0.5, "problems": 3, **told}),
        json.dumps({"kind": "eval", "mean": 0.5, "split": ["val"], "k": "many", "weights": 3, "limit": True}),
    ]
    record = record_of([], evaluations=lines)
    assert record.two_by_two.words == (
        "split train, the first 4 problems, k=2, weights step-000000, candidate abc, seed 7"
    )
    assert (record.evaluations[0].problems, record.evaluations[0].cycle) == (3, None)
    assert record.evaluations[1].words == ""
    assert record.seen == ["val: these problems chose the best candidate", "train: these problems were trained on"]


# ---- directories -------------------------------------------------------------------------------


def written(path, events):
    path.mkdir(parents=True)
    (path / "events.jsonl").write_text("".join(f"{json.dumps(event)}\n" for event in events))
    return path


def test_a_run_is_running_while_a_process_holds_its_directory(tmp_path):
    path = written(tmp_path / "run", whole_run()[:5])
    with FileLock(path / ".lock"):
        (running,) = read_records([path])
    (stopped,) = read_records([path])
    assert (running.state, stopped.state) == ("running", "stopped")


def test_reading_does_not_keep_a_run_from_its_directory(tmp_path):
    path = written(tmp_path / "run", whole_run())
    (path / ".lock").touch()
    read_records([path])
    with FileLock(path / ".lock", timeout=0):
        pass


def test_runs_are_named_by_the_shortest_ends_of_their_paths_that_differ(tmp_path):
    paths = [written(tmp_path / name, []) for name in ("a/seed-0", "b/seed-0", "b/seed-1")]
    assert [record.name for record in read_records(paths)] == ["a/seed-0", "b/seed-0", "b/seed-1"]
    assert [record.name for record in read_records(paths[1:])] == ["seed-0", "seed-1"]
    assert [record.name for record in read_records(paths[:1] * 2)] == ["seed-0 (1)", "seed-0 (2)"]


def test_what_is_not_a_run_s_directory_is_refused(tmp_path):
    with pytest.raises(RunDirectoryError, match=r"neither events\.jsonl nor recipe.json"):
        read_records([tmp_path])
    with pytest.raises(ValueError, match="run_dirs is empty"):
        read_records([])


def test_a_run_that_has_written_only_its_recipe_has_a_record(tmp_path):
    (tmp_path / "recipe.json").write_text("{}")
    (record,) = read_records([tmp_path])
    assert (record.state, record.started, record.steps) == ("stopped", None, ())


def test_evaluations_are_read_beside_the_events(tmp_path):
    path = written(tmp_path / "run", whole_run())
    (path / "evaluations.jsonl").write_text('{"kind": "two_by_two", "cells": {"seed/base": [0.5, 0.1]}}\n')
    assert read_records([path])[0].two_by_two.columns == ["base"]
