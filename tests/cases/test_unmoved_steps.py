"""A step that moved nothing writes nothing, and states come at the interval that was asked for."""

import hashlib
import json
from pathlib import Path

import dspy
import pytest
from safetensors.torch import load_file

from dspy_fst.config import FSTConfig
from dspy_fst.engine.in_process import InProcessEngine
from dspy_fst.errors import RunDirectoryError
from dspy_fst.evaluation.run_reader import RunReader
from dspy_fst.policy_lm import policy_of
from dspy_fst.run.directory import RunDirectory, read_events
from dspy_fst.run.state import _checksum
from tests.relay import any_answer
from tests.test_compile import compile_relay, told

SMALL = {"method": "rl", "cycles": 2, "steps_per_cycle": 3, "problems_per_step": 2}


class Judge:
    """A metric under which the groups of the named steps are live and all others are flat."""

    def __init__(self, *moving: int):
        self.moving, self.step = moving, -1

    def see(self, event):
        phase = event.get("phase", "")
        if event["event"] == "phase" and phase.endswith(": rollouts"):
            self.step = int(phase.removeprefix("step ").removesuffix(": rollouts"))

    def __call__(self, gold, pred, trace=None, pred_name=None, pred_trace=None):
        return any_answer(gold, pred) if self.step in self.moving else dspy.Prediction(score=0.0, feedback="flat")


def compile_judged(run_dir: Path, *moving: int, listeners=(), **changes):
    judge = Judge(*moving)
    settings = {**SMALL, **changes}
    return compile_relay(run_dir, metric=judge, listeners=[judge.see, *listeners], **settings)


def steps_of(run_dir: Path) -> list[dict]:
    return [event["report"] for event in read_events(run_dir) if event["event"] == "step"]


def versions(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "weights").iterdir())


def state_files(run_dir: Path) -> set[int]:
    return {path.stat().st_ino for path in (run_dir / "states").rglob("state.safetensors")}


def test_weights_are_published_and_states_written_only_when_the_weights_moved(tmp_path, monkeypatch):
    loads = []
    load = InProcessEngine.load
    monkeypatch.setattr(
        InProcessEngine, "load", lambda engine, point: (loads.append(point.version), load(engine, point))
    )
    compiled = compile_judged(tmp_path / "run", 1, 4, keep_weights=9, keep_states=9)
    assert [report["update"]["rows"] > 0 for report in steps_of(tmp_path / "run")] == [
        *(False, True, False),
        *(False, True, False),
    ]
    assert versions(tmp_path / "run") == ["step-000000", "step-000002", "step-000005"]
    assert loads == ["step-000000", "step-000002", "step-000005"]
    assert len(list((tmp_path / "run" / "states").iterdir())) == 8  # the start, its validation, and one a step
    assert len(state_files(tmp_path / "run")) == 3  # but only as many trainer states as there were weights
    assert [report["weights"][-1] for report in steps_of(tmp_path / "run")] == ["0", "0", "2", "2", "2", "5"]
    assert [report["published"][-1] for report in steps_of(tmp_path / "run")] == ["0", "2", "2", "2", "5", "5"]
    assert policy_of(compiled).checkpoint.version == "step-000005"
    past = RunReader.of(tmp_path / "run")
    assert [past.version(cycle) for cycle in (0, 1, None)] == ["step-000002", "step-000005", "step-000005"]
    assert [past.version_after(steps) for steps in range(7)] == [
        f"step-00000{number}" for number in (0, 0, 2, 2, 2, 5, 5)
    ]
    assert all(past.checkpoint(past.version(cycle)).path.is_dir() for cycle in (0, 1, None))
    policy_of(compiled).release()


def test_a_run_that_never_moves_keeps_its_first_weights(tmp_path):
    compiled = compile_judged(tmp_path / "run", cycles=1)
    assert (versions(tmp_path / "run"), len(state_files(tmp_path / "run"))) == (["step-000000"], 1)
    assert policy_of(compiled).checkpoint.version == "step-000000"
    policy_of(compiled).release()


def test_the_best_weights_are_kept_under_the_name_that_sampled_the_best_step(tmp_path):
    """Step 3 is the best measured and was sampled by the weights of step 2, two newer ones follow."""

    class Best(Judge):
        def __call__(self, gold, pred, trace=None, pred_name=None, pred_trace=None):
            said = super().__call__(gold, pred)
            return dspy.Prediction(score=float(said.score) + 5.0 * (self.step == 3), feedback="x")

    judge = Best(1, 4, 5)
    compiled = compile_relay(tmp_path / "run", metric=judge, listeners=[judge.see], **{**SMALL, "keep_weights": 1})
    assert versions(tmp_path / "run") == ["step-000000", "step-000002", "step-000006"]
    policy_of(compiled).release()


class KilledError(Exception):
    pass


def kill_at(step: int):
    def kill(event):
        if event["event"] == "step" and event["report"]["step"] == step:
            raise KilledError

    return kill


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The directory of an undisturbed run."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    policy_of(compile_judged(run_dir, 1, 4)).release()
    return run_dir


@pytest.mark.parametrize(("every", "killed_at", "state"), [(1, 2, 2), (4, 3, 0), (4, 4, 4), (9, 4, 0)])
def test_a_killed_run_plays_the_steps_since_its_last_state_again_and_counts_them_once(
    tmp_path, whole, every, killed_at, state
):
    """Killed after a step that moved nothing, and after one that moved; the states may end within a cycle."""
    with pytest.raises(KilledError):
        compile_judged(tmp_path / "run", 1, 4, checkpoint_every=every, listeners=[kill_at(killed_at)])
    assert committed_steps(tmp_path / "run")[-1] == state
    policy_of(compile_judged(tmp_path / "run", 1, 4, checkpoint_every=every)).release()
    kept = [[told(event) for event in read_events(run_dir)] for run_dir in (whole, tmp_path / "run")]
    for events in kept:
        events[0].pop("config", None)  # names checkpoint_every
    assert kept[0] == kept[1]
    assert versions(whole) == versions(tmp_path / "run")
    for version in versions(whole):
        ours, theirs = (
            load_file(run_dir / "weights" / version / "model.safetensors") for run_dir in (whole, tmp_path / "run")
        )
        assert all(ours[name].equal(theirs[name]) for name in theirs)


def committed_steps(run_dir: Path) -> list[int]:
    return [state_of(path)["fields"]["step"] for path in sorted((run_dir / "states").iterdir())]


def state_of(path: Path) -> dict:
    return json.loads((path / "state.json").read_text())


@pytest.mark.parametrize(
    ("every", "method", "steps"), [(4, "rl", [0, 0, 4, 6]), (9, "rl", [0, 0, 6]), (9, "fst", [0, 0, 0, 3, 3, 6])]
)
def test_states_come_at_the_interval_at_the_end_and_before_a_search(tmp_path, every, method, steps):
    """In the middle of a cycle, too; a search goes on from a state, so one lies before it and one after it. The start
    has two, as its validation comes between them."""
    policy_of(
        compile_judged(tmp_path / "run", 0, 1, 2, 3, 4, 5, checkpoint_every=every, method=method, keep_states=99)
    ).release()
    assert committed_steps(tmp_path / "run") == steps


def test_a_directory_of_a_release_that_published_after_every_step_goes_on(tmp_path):
    """Its states hold no ``moved_at``, its events no versions, its recipe fewer settings."""
    with pytest.raises(KilledError):
        compile_judged(tmp_path / "run", 1, 4, listeners=[kill_at(3)])
    as_an_older_release(tmp_path / "run")
    resumed = compile_judged(tmp_path / "run", 1, 4)
    assert [report["step"] for report in steps_of(tmp_path / "run")] == list(range(6))
    assert policy_of(resumed).checkpoint.version == "step-000005"
    assert RunReader.of(tmp_path / "run").version(0) == "step-000003"  # as that release named it
    policy_of(resumed).release()


def as_an_older_release(run_dir: Path) -> None:
    """Write the newest state, the events, the weights' names and the recipe as that release did."""
    log = run_dir / "events.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    committed = max((run_dir / "states").iterdir())
    document = state_of(committed)
    lines = [line for line in lines if line["event"] != "step" or line["report"]["step"] < document["fields"]["step"]]
    for line in lines:
        if line["event"] == "step":
            del line["report"]["weights"], line["report"]["published"]
    content = "".join(json.dumps(line) + "\n" for line in lines).encode()
    log.write_bytes(content)
    del document["sha256"], document["fields"]["moved_at"]
    document["fields"] |= {"events_bytes": len(content), "events_sha256": hashlib.sha256(content).hexdigest()}
    (committed / "state.json").write_text(json.dumps({**document, "sha256": _checksum(document)}))
    (run_dir / "weights" / "step-000002").rename(run_dir / "weights" / f"step-{document['fields']['step']:06d}")
    recipe = json.loads((run_dir / "recipe.json").read_text())
    recipe.pop("precision", None)
    (run_dir / "recipe.json").write_text(json.dumps(recipe))


def test_a_setting_that_an_older_release_did_not_know_had_its_default(tmp_path):
    RunDirectory(tmp_path / "run", {"seed": 1}).close()
    defaults = FSTConfig().model_dump()
    RunDirectory(tmp_path / "run", {"seed": 1, "weight_decay": 0.0}, defaults=defaults).close()
    (tmp_path / "run" / "recipe.json").write_text('{"seed": 1}')
    with pytest.raises(RunDirectoryError, match=r"weight_decay \(there 0.0, now 0.1\)"):
        RunDirectory(tmp_path / "run", {"seed": 1, "weight_decay": 0.1}, defaults=defaults)
