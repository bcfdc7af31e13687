"""A warm start: what a run learns from labels before its first search; killed in it, the run ends bit for bit alike."""

import dspy
import pytest

from dspy_fst import FSTOptimizer, PolicyLM
from dspy_fst.policy_lm import policy_of
from dspy_fst.report.from_directory import read_record
from dspy_fst.run.directory import read_events
from programs.lab import BASE, build
from tests.test_compile import propose, same_weights

WARM = {
    "cycles": 1,
    "steps_per_cycle": 1,
    "problems_per_step": 4,
    "population_size": 1,
    "group_size": 4,
    "anchors": 2,
    "search_rollouts": 2,
    "warm_start": "labels",
    "warm_start_examples": 64,
    "warm_start_epochs": 6,
    "warm_start_learning_rate": 2e-3,
    "learning_rate": 1e-4,
    "progress": False,
}


class Killed(BaseException):
    """The process dies here."""


def compiled_in(run_dir, listeners=(), **changes):
    """A run whose model has never seen this form of reply."""
    lab = build("reverse", train=64, val=8, test=4)
    lab.program.set_lm(PolicyLM(BASE, engine="in_process", max_tokens=24, engine_options={"linger_s": 60.0}))
    optimizer = FSTOptimizer(
        metric=lab.metric, propose=propose, run_dir=run_dir, listeners=listeners, **{**WARM, **changes}
    )
    with dspy.context(adapter=dspy.XMLAdapter()):
        return optimizer.compile(lab.program, trainset=lab.trainset, valset=lab.valset)


def dies_at(words):
    def listener(event):
        if str(event.get("phase") or event.get("text") or "").startswith(words):
            raise Killed

    return listener


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("warm") / "run"
    program = compiled_in(path)
    yield path, program
    policy_of(program).release()


def test_replies_that_never_parsed_parse_after_it_and_earn_rewards(whole):
    path, _ = whole
    record = read_record(path)
    start, end = record.validations[0], record.validations[-1]
    print(start.score, end.score, record.warm_start, [e["text"] for e in read_events(path) if "text" in e])


def test_a_run_that_dies_in_its_warm_start_ends_alike(whole, tmp_path):
    for words in ("warm start: learning", "after the warm start"):
        with pytest.raises(Killed):
            compiled_in(tmp_path / "run", [dies_at(words)])
    program = compiled_in(tmp_path / "run")
    assert same_weights(program, whole[1])
    policy_of(program).release()
