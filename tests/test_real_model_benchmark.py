"""What benchmarks/real_model says of a run, and its tables; the model itself is in tests/real."""

import json
import random

import pytest

from benchmarks.real_model.__main__ import faults, main
from benchmarks.real_model.runs import PLACES, RECIPE, draw_moment, gaps
from benchmarks.real_model.speed import cpu_features, paid_in_turns
from benchmarks.real_model.tables import TABLES
from dspy_fst.run.files import write_json
from dspy_fst.types import Call, Candidate, Rollout

STEPS = [{"event": "step", "report": {"step": step}} for step in range(RECIPE["steps_per_cycle"])]
WHOLE = [{"event": "plan"}, {"event": "cycle", "report": {"cycle": 0}}, *STEPS]


def left_behind(folder, events, step=2):
    """A run directory with these events whose newest state is of this step."""
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    (folder / "states" / "000001").mkdir(parents=True)
    write_json(folder / "states" / "000001" / "state.json", {"fields": {"step": step}})
    return folder


@pytest.mark.parametrize(
    ("events", "step", "found"),
    [
        (WHOLE, 2, []),
        (WHOLE[:-1], 2, ["steps [0]"]),
        ([*WHOLE, WHOLE[-1]], 2, ["steps [0, 1, 1]"]),
        ([WHOLE[0], *WHOLE], 2, ["2 plans"]),
        ([WHOLE[0], *WHOLE[1:2] * 2, *STEPS], 2, ["cycles [0, 0]"]),
        (WHOLE, 1, ["the newest state is of step 1"]),
    ],
)
def test_a_gap_and_a_double_are_found(tmp_path, events, step, found):
    assert gaps(left_behind(tmp_path, events, step)) == found


def test_a_moment_is_one_that_the_run_passes_and_drawn_alike_again():
    counts = {"update": 2, "step rollout": 16, "reflection": 0, "write journal": 9}
    drawn = [draw_moment(counts, random.Random(seed)) for seed in range(40)]
    assert drawn == [draw_moment(counts, random.Random(seed)) for seed in range(40)]
    assert {moment.place for moment in drawn} == {"update", "step rollout"} < set(PLACES)
    assert all(1 <= moment.passage <= counts[moment.place] for moment in drawn)


def test_every_row_of_the_timed_update_has_a_gradient():
    call = Call("tell", (1, 2), (3, 4), (-1.0, -1.0), "stop", "v0")
    batch = paid_in_turns([Rollout(0, Candidate({"tell": "x"}), (call,), 0.0) for _ in range(8)])
    assert len(batch.rows) == 8
    assert {row.problem for row in batch.rows} == {0, 1}
    assert all(row.advantage for row in batch.rows)


def test_a_run_that_lost_something_is_a_fault():
    sound = {"gaps": [], "unequal": None, "rewards": [0.5, 0.0], "died": "before update 2"}
    assert list(faults({"runs": {"a": sound}})) == []
    assert list(faults({"runs": {"a": {**sound, "gaps": ["2 plans"]}}})) == ["a: ['2 plans'], unequal None"]
    assert list(faults({"runs": {"a": {**sound, "unequal": ["weights"]}}})) == ["a: [], unequal ['weights']"]
    assert list(faults({"runs": {"a": {**sound, "died": "(ended before update 9)"}}})) == [
        "a: it was not killed: (ended before update 9)"
    ]
    assert list(faults({"runs": {"a": {**sound, "rewards": [0.0, 0.5]}}})) == ["a: no reward at the start"]


def test_an_unknown_part_is_refused_before_anything_is_measured(capsys):
    with pytest.raises(SystemExit):
        main(["speeds"])
    assert "there is no part speeds" in capsys.readouterr().err


def test_the_cpu_s_features_are_told_or_unknown():
    assert set(cpu_features()) in (set(), {"avx512_bf16", "amx_bf16", "avx512f"})


def test_a_table_shows_what_was_measured():
    run = {
        **{"died": "before update 2", "resumed_from": "1 searches, 1 updates", "gaps": [], "rewards": [0.5, 0.25]},
        **{"parsed": [1.0, 0.75], "peak_gib": 6.04},
    }
    rows = TABLES["runs"]({"runs": {"a": {**run, "unequal": []}, "b": {**run, "unequal": None, "gaps": ["2 plans"]}}})[
        1
    ]
    assert rows[0][3:] == ["none", "yes", "0.50, 0.25", "1.00, 0.75", "6.0 GiB"]
    assert rows[1][3:5] == ["2 plans", "not compared"]
    ratios = {"updates/s": {"median": 1.5, "values": [1.4, 1.5, 1.7]}}
    assert TABLES["speed"]({"speed": {"bfloat16 over float32": ratios}})[1] == [["updates/s", "1.50", "1.40 to 1.70"]]
