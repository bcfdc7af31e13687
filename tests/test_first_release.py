"""What the package's first form wrote (commit 845e963) is continued, loaded, shown and exported by today's."""

import json
import shutil
from pathlib import Path

import dspy
import pytest

import dspy_fst
from dspy_fst.policy_lm import policy_of
from dspy_fst.report.from_events import record_of
from dspy_fst.rollout.components import read_texts
from dspy_fst.run.directory import read_events
from dspy_fst.saving.export import export
from tests.cli.conftest import invoke
from tests.fixtures.first_release import made
from tests.fixtures.first_release.made import TRAINSET, Taking, Two, compile_it

FOLDER = Path(made.__file__).parent


@pytest.fixture
def there(tmp_path, monkeypatch):
    """A copy of what was written, as the working directory; the run's recipe names the model where it is now."""
    for name in ("run", "saved"):
        shutil.copytree(FOLDER / name, tmp_path / name)
    shutil.copytree(FOLDER / "run" / "weights" / "step-000000", tmp_path / "base")
    recipe = tmp_path / "run" / "recipe.json"
    recipe.write_text(recipe.read_text().replace("/first_release/base", str(tmp_path / "base")))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_a_run_that_died_is_continued_to_its_end(there):
    before = read_events(there / "run")
    assert [event["event"] for event in before].count("step") == 1
    compiled = compile_it("run")
    policy_of(compiled).release()
    events = read_events(there / "run")
    assert events[: len(before)] == before
    assert [event["report"]["step"] for event in events if event["event"] == "step"] == [0, 1]
    assert [event["report"]["cycle"] for event in events if event["event"] == "cycle"] == [0, 1]
    assert events[-1]["event"] == "done"
    weights = [(there / "run" / "weights" / f"step-00000{n}" / "model.safetensors").read_bytes() for n in range(3)]
    assert len(set(weights)) == 3
    assert weights[:2] == [
        (FOLDER / "run" / "weights" / f"step-00000{n}" / "model.safetensors").read_bytes() for n in range(2)
    ]
    assert policy_of(compiled).checkpoint.version == "step-000002"
    assert "2 of 2 steps are done, weights step-000002" in invoke("show", "run").stdout
    assert "validation: not validated" in invoke("show", "run").stdout
    assert str(compiled.summary()).count("not validated") == 2
    assert invoke("report", "run", "--out", "report.html").exit_code == 0
    assert "step-000002" in (there / "report.html").read_text()


def test_a_run_that_died_is_shown_as_it_is(there):
    shown = invoke("show", "run").stdout
    assert "stopped at step 1; 1 of 2 steps are done" in shown
    assert record_of(read_events(there / "run")).costs.repeats == 8 + 10  # that release called them reused


def test_a_saved_program_is_loaded_answers_and_is_exported(there):
    loaded = dspy_fst.load(there / "saved", Two())
    said = json.loads((there / "saved" / "program.json").read_text())
    texts = {name: said[name]["signature"]["instructions"] for name in ("first", "last")}
    assert read_texts(loaded).texts == texts
    assert len(loaded.population.members) == 2
    assert policy_of(loaded).checkpoint.path == there / "saved" / "weights"
    assert policy_of(loaded).checkpoint.version == "step-000002"
    assert {p.lm.kwargs["temperature"] for p in (loaded.first, loaded.last)} == {1.5}
    with dspy.context(adapter=Taking()):  # that release recorded no adapter
        assert loaded(**TRAINSET[0].inputs()).answer
    policy_of(loaded).release()
    export(there / "saved", there / "exported")
    again = dspy_fst.load(there / "exported", Two())
    assert read_texts(again).texts == texts
    with dspy.context(adapter=Taking()):
        assert again(**TRAINSET[0].inputs()).answer
    policy_of(again).release()
    # Weights that the first release wrote, bit by bit.
    assert (there / "exported" / "model.safetensors").read_bytes() == (
        FOLDER / "saved" / "weights" / "model.safetensors"
    ).read_bytes()
