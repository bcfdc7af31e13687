"""A damaged run directory is refused in plain words and left as it is, or continued to the undisturbed run's end.

One small run is killed in its second search. Then every file and folder of it is damaged in every way, at places drawn
from a seed. Most damages are found when the directory is opened; what opens is compiled to its end.
"""

import os
import random
import shutil
from pathlib import Path

import pytest

from benchmarks.durability.outcome import newest, outcome
from benchmarks.durability.small_run import compile_small
from dspy_fst.errors import FSTError
from dspy_fst.policy_lm import policy_of
from dspy_fst.run.directory import RunDirectory
from dspy_fst.run.files import read_json
from dspy_fst.run.phase_reports import CycleReport, StepReport
from dspy_fst.slow.trainer import Trainer
from dspy_fst.slow.training_settings import TrainingSettings
from programs.lab import BASE, FeedbackProposer

TINY = {
    "steps_per_cycle": 1,
    "anchors": 2,
    "search_rollouts": 8,
    "reflection_minibatch": 2,
    "perfect_score": 2.0,  # nothing is ever learnt in full, so that both searches reflect
}
STATE, OLD_STATE = "states/000003", "states/000002"
FILES = [
    *("recipe.json", "events.jsonl", "search.jsonl", "populations/cycle-000.json"),
    *(f"{state}/{name}" for state in (STATE, OLD_STATE) for name in ("state.json", "trainer/state.json")),
    f"{STATE}/trainer/state.safetensors",
    *("weights/step-000000/config.json", "weights/step-000001/model.safetensors"),
]
FOLDERS = [
    *("populations", "weights", "states"),
    STATE,
    f"{STATE}/trainer",
    "weights/step-000000",
    "weights/step-000001",
]
ADVICE = ("restore it", "restore states", "remove th", "name a new", "mend the cause", "move it away")


# ---- damages --------------------------------------------------------------------------------------


def cut(path, rng, **_):
    content = path.read_bytes()
    rewrite(path, content[: rng.randrange(len(content))])


def flip(path, rng, **_):
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    rewrite(path, bytes(content))


def empty(path, **_):
    rewrite(path, b"")


def rewrite(path, content):
    path.unlink()  # the file may share its bytes with the original
    path.write_bytes(content)


def remove(path, **_):
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def make_folder(path, **_):
    path.unlink()
    path.mkdir()


def make_file(path, **_):
    shutil.rmtree(path)
    path.write_text("a file")


def add_foreign(path, **_):
    (path / "notes.txt").write_text("mine")
    (path / "999999").mkdir()


def swap(path, run_dir, other, **_):
    """The file that another run of the same recipe, but for its learning rate, holds there."""
    rewrite(path, (other / path.relative_to(run_dir)).read_bytes())


def link_out(path, run_dir, **_):
    outside = run_dir.with_name(f"{run_dir.name}-outside")
    path.rename(outside)
    path.symlink_to(outside)


CASES = [
    *((file, damage) for file in FILES for damage in (cut, flip, empty, remove, make_folder, swap, link_out)),
    *((folder, damage) for folder in FOLDERS for damage in (remove, make_file, add_foreign, link_out)),
]


# ---- the directory --------------------------------------------------------------------------------


class KilledError(BaseException):
    """Ends a run as a signal does: nobody catches it."""


def compiled(run_dir, **settings):
    """The outcome of a run, begun or continued here."""
    policy_of(compile_small(run_dir, **{**TINY, **settings})).release()
    return outcome(run_dir)


def killed(run_dir, **settings):
    """A run that died in its second search, after one reflection of it was recorded."""
    seen = []

    def propose(candidate, reflective_dataset, components_to_update):
        if (run_dir / "populations" / "cycle-000.json").exists():
            seen.append(candidate)
        if len(seen) == 2:
            raise KilledError
        return FeedbackProposer()(candidate, reflective_dataset, components_to_update)

    with pytest.raises(KilledError):
        compile_small(run_dir, **{**TINY, **settings}, propose=propose)
    state = newest(run_dir)["fields"]
    assert (state["searched"], state["step"]) == (0, 1)
    assert '"reflection"' in (run_dir / "search.jsonl").read_text()
    return run_dir


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return compiled(tmp_path_factory.mktemp("undisturbed") / "run")


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return killed(tmp_path_factory.mktemp("original") / "run")


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    return killed(tmp_path_factory.mktemp("other") / "run", learning_rate=5e-2, warmup_steps=0)


@pytest.fixture(scope="module")
def trainer():
    return Trainer(BASE, TrainingSettings(learning_rate=1e-3))


def copied(original, place):
    """The directory again; tensors, which nobody changes in place, are shared."""

    def copy(source, target):
        os.link(source, target) if source.endswith(".safetensors") else shutil.copyfile(source, target)

    return Path(shutil.copytree(original, place, copy_function=copy))


def tree(folder):
    """Every path below a folder with its content, the lock left out."""
    return {
        path.relative_to(folder): path.read_bytes() if path.is_file() else path.is_symlink()
        for path in folder.rglob("*")
        if path.name != ".lock"
    }


def open_parts(run_dir, recipe, trainer):
    """What compile() does to a directory before it goes on with the run."""
    run = RunDirectory(run_dir, recipe)
    try:
        if run.state:
            trainer.load_state(run.trainer_state)
        reports = {"cycle": CycleReport, "step": StepReport}
        for event in run.events():
            if kind := reports.get(event["event"]):
                kind.from_json(event["report"])
    finally:
        run._lock.release()


def told(action):
    """The refusal that an action ends with; None when it ends well."""
    try:
        action()
    except FSTError as error:
        return str(error)
    return None


def clear(refusal, run_dir):
    """Whether it says where, and what to do."""
    return str(run_dir) in refusal and any(words in refusal.lower() for words in ADVICE)


# ---- the tests ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_killed_run_as_it_is_goes_on_to_the_undisturbed_end(undisturbed, original, tmp_path):
    assert compiled(copied(original, tmp_path / "run")) == undisturbed


@pytest.mark.slow
@pytest.mark.parametrize(("place", "damage"), CASES, ids=[f"{damage.__name__} {place}" for place, damage in CASES])
def test_a_damage_is_refused_or_does_no_harm(undisturbed, original, other, trainer, tmp_path, place, damage):
    run_dir = copied(original, tmp_path / "run")
    damage(run_dir / place, rng=random.Random(f"{place} {damage.__name__}"), run_dir=run_dir, other=other)
    before, outside = tree(run_dir), tree(tmp_path / "run-outside")
    recipe = read_json(original / "recipe.json")
    if refusal := told(lambda: open_parts(run_dir, recipe, trainer)):
        assert clear(refusal, run_dir), refusal
        assert tree(run_dir) == before
        return
    if refusal := told(lambda: policy_of(compile_small(run_dir, **TINY)).release()):
        assert clear(refusal, run_dir), refusal
        committed = [path for path in before if path.parts[0] == "states" or path == Path(place)]
        after = tree(run_dir)
        assert {path: after[path] for path in committed} == {path: before[path] for path in committed}
        return
    found = outcome(run_dir)
    assert tree(tmp_path / "run-outside") == outside
    for part in ("events", "state", "weights", "trainer"):
        assert found[part] == undisturbed[part], part
    assert found["populations"].get("cycle-001.json") == undisturbed["populations"]["cycle-001.json"]
