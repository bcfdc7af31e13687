"""The run directory: refusals, and a state that is never half there."""

import json

import pytest

from dspy_fst.errors import RunDirectoryError
from dspy_fst.run.directory import RunDirectory, read_events
from dspy_fst.run.files import population_from_json
from dspy_fst.types import Candidate, Population


def save_nothing(path):
    path.mkdir()


def test_events_after_the_last_commit_are_forgotten(tmp_path):
    run = RunDirectory(tmp_path / "run", {"seed": 1})
    run.emit("step", step=0)
    run.commit(save_nothing, step=1)
    run.emit("step", step=1)
    run.close()
    again = RunDirectory(tmp_path / "run", {"seed": 1})
    assert again.state["step"] == 1
    assert [event["step"] for event in again.events()] == [0]


def test_a_run_of_another_recipe_is_refused_with_the_difference(tmp_path):
    RunDirectory(tmp_path / "run", {"seed": 1, "cycles": 2}).close()
    with pytest.raises(RunDirectoryError, match=r"cycles \(there 2, now 3\)"):
        RunDirectory(tmp_path / "run", {"seed": 1, "cycles": 3})


def test_a_refusal_calls_an_adapter_by_the_name_of_its_setting(tmp_path):
    chat = {"name": "ChatAdapter", "settings": {"use_native_function_calling": False}}
    lora = {"rank": 4, "alpha": 32.0}
    RunDirectory(tmp_path / "run", {"lora": lora, "adapter": chat}).close()
    with pytest.raises(RunDirectoryError) as refusal:
        RunDirectory(tmp_path / "run", {"lora": None, "adapter": {"name": "JSONAdapter", "settings": {}}})
    assert "; adapter (there LoRA(rank=4, alpha=32.0), now None)" in str(refusal.value)
    assert "chat adapter (there ChatAdapter(use_native_function_calling=False), now JSONAdapter())" in str(
        refusal.value
    )


def test_a_setting_that_is_no_part_of_a_run_any_more_may_have_had_any_value(tmp_path):
    """`sync_tolerance` meant another gap in earlier releases; what remains of it says nothing of the run."""
    RunDirectory(tmp_path / "run", {"seed": 1, "sync_tolerance": 0.3}).close()
    RunDirectory(tmp_path / "run", {"seed": 1}).close()


def test_a_foreign_directory_is_left_alone(tmp_path):
    (tmp_path / "letter.txt").write_text("mine")
    with pytest.raises(RunDirectoryError, match="not empty"):
        RunDirectory(tmp_path, {"seed": 1})
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


def test_a_torn_last_line_is_left_out(tmp_path):
    (tmp_path / "events.jsonl").write_text(json.dumps({"event": "step"}) + '\n{"event": "st')
    assert len(read_events(tmp_path)) == 1


def test_the_first_and_the_newest_weights_are_kept(tmp_path):
    run = RunDirectory(tmp_path / "run", {"seed": 1})
    for step in range(5):
        run.weights_path(f"step-{step:06d}").mkdir()
    run.weights_path(".step-000005.torn").mkdir()  # what a kill in the middle of a publish leaves
    run.prune_weights(2)
    assert sorted(path.name[-1] for path in (tmp_path / "run" / "weights").glob("step-*")) == ["0", "3", "4"]
    run.drop_weights_from("step-000004")
    assert sorted(path.name[-1] for path in (tmp_path / "run" / "weights").iterdir()) == ["0", "3"]


def test_a_directory_in_use_is_refused(tmp_path):
    run = RunDirectory(tmp_path / "run", {"seed": 1})
    with pytest.raises(RunDirectoryError, match="in use by another run"):
        RunDirectory(tmp_path / "run", {"seed": 1})
    run.close()
    RunDirectory(tmp_path / "run", {"seed": 1}).close()


def test_a_run_that_committed_nothing_leaves_the_directory_free(tmp_path):
    RunDirectory(tmp_path / "run", {"seed": 1}).abandon()
    RunDirectory(tmp_path / "run", {"seed": 2}).close()


def test_a_population_survives_the_disk(tmp_path):
    candidate = Candidate({"answer": "Größe — 数"})
    run = RunDirectory(tmp_path / "run", {"seed": 1})
    run.commit(save_nothing, step=0, population=Population((candidate,), (0.5,), {candidate.digest: ()}))
    run.close()
    again = RunDirectory(tmp_path / "run", {"seed": 1})
    assert population_from_json(again.state["population"]).best == candidate
