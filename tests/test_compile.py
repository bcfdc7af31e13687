"""compile(), end to end, on the laboratory's base model. On a real vLLM server: tests/test_survival.py."""

import json
from contextlib import suppress

import dspy
import pytest
from dspy.utils.exceptions import AdapterParseError
from safetensors.torch import load_file

import dspy_fst
from dspy_fst import FSTOptimizer, PolicyLM
from dspy_fst.errors import MeasurementError, RunDirectoryError, SyncError
from dspy_fst.policy_lm import policy_of
from dspy_fst.rollout.components import read_texts
from dspy_fst.run.directory import read_events
from dspy_fst.slow.trainer import Trainer
from dspy_fst.slow.training_settings import TrainingSettings
from dspy_fst.training.result import start_of
from programs.lab import BASE, FeedbackProposer, build
from tests.relay import Relay, any_answer, relay

PROBE = [[5, 6, 7, 8, 9]]
SHORT = {
    "cycles": 2,
    "steps_per_cycle": 2,
    "problems_per_step": 6,
    "population_size": 2,
    "group_size": 4,
    "anchors": 4,
    "search_rollouts": 9,
    "learning_rate": 5e-4,
    "progress": False,
}


def propose(candidate, reflective_dataset, components_to_update):
    return {name: candidate[name] + " Be brief." for name in components_to_update}


def compile_relay(run_dir, engine="in_process", program=None, metric=any_answer, **changes):
    optimizer = FSTOptimizer(metric=metric, propose=propose, run_dir=run_dir, **{**SHORT, **changes})
    lab = build(train=32, val=4, test=4)
    return optimizer.compile(program or relay(engine), trainset=lab.trainset, valset=lab.valset)


def speaks(program):
    """Whether it gives an answer; at this temperature a reply may be empty, or not parse, so it is asked often."""
    for _ in range(20):
        with suppress(AdapterParseError):
            if program(numbers="1 2 3 4").answer:
                return True
    return False


def weights_of(program):
    return load_file(policy_of(program).checkpoint.path / "model.safetensors")


def same_weights(one, other):
    first, second = weights_of(one), weights_of(other)
    return all(first[name].equal(second[name]) for name in first)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nobody disturbed: the student, what came of it, and where. Nobody changes either."""
    student, run_dir = relay(), tmp_path_factory.mktemp("whole") / "run"
    compiled = compile_relay(run_dir, program=student)
    yield student, compiled, run_dir
    policy_of(compiled).release()


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """A compiled program of one cycle. Nobody changes it."""
    compiled = compile_relay(tmp_path_factory.mktemp("short") / "run", cycles=1)
    yield compiled
    policy_of(compiled).release()


def test_a_two_module_program_and_its_model_are_trained_together(whole):
    student, compiled, run_dir = whole
    assert read_texts(student) == read_texts(Relay())
    assert_trained_together(student, compiled, run_dir)
    steps = [event["report"] for event in read_events(run_dir) if event["event"] == "step"]
    assert all(0 < step["prompt_tokens_read"] < step["prompt_tokens"] for step in steps)
    assert [entry["score"] for entry in compiled.candidate_programs] == sorted(
        (entry["score"] for entry in compiled.candidate_programs), reverse=True
    )


def assert_trained_together(student, compiled, run_dir):
    """Texts and weights both changed, on tokens of the step's own weights, and the student's did not."""
    steps = [event["report"] for event in read_events(run_dir) if event["event"] == "step"]
    assert [step["step"] for step in steps] == [0, 1, 2, 3]
    for step in steps:
        assert step["update"]["rows"] > 0
        # Before the first gradient the two sides hold the same weights: any gap is the sampler's or ours.
        assert step["update"]["max_log_ratio"] < 1e-4
    assert compiled._compiled
    assert len(compiled.population.members) == 2
    assert any("brief" in text for member in compiled.population.members for text in member.texts.values())
    start = load_file(start_of(compiled).path / "model.safetensors")
    assert not all(start[name].equal(tensor) for name, tensor in weights_of(compiled).items())
    assert policy_of(student).checkpoint.path == BASE
    assert policy_of(student) is not policy_of(compiled)
    assert speaks(compiled)


def test_a_continued_run_equals_an_uninterrupted_one(tmp_path, whole):
    _, undisturbed, run_dir = whole

    class KilledError(Exception):
        pass

    def kill(event):
        if event["event"] == "step" and event["report"]["step"] == 2:
            raise KilledError  # after the event was written and before the state was committed

    with pytest.raises(KilledError):
        compile_relay(tmp_path / "killed", listeners=[kill])
    resumed = compile_relay(tmp_path / "killed")

    assert same_weights(undisturbed, resumed)
    assert undisturbed.population == resumed.population
    kept = [[told(event) for event in read_events(folder)] for folder in (run_dir, tmp_path / "killed")]
    assert kept[0] == kept[1]


def told(event):
    """What an event says, clocks and the directory's name left out."""
    event = json.loads(json.dumps(event))
    event.pop("time")
    for report in (event.get("report") or {},):
        report.pop("seconds", None)
    return event


def test_the_student_s_engine_is_not_the_trained_one(tmp_path):
    student = relay()
    assert speaks(student)
    compiled = compile_relay(tmp_path / "run", program=student, cycles=1, learning_rate=5e-2, warmup_steps=0)
    base = Trainer(BASE, TrainingSettings(learning_rate=1.0)).score(PROBE)[0]
    assert policy_of(student).handle.ready().score(PROBE)[0] == pytest.approx(base, abs=1e-4)
    assert policy_of(compiled).handle.engine.score(PROBE)[0] != pytest.approx(base, abs=1e-2)


def test_saved_and_loaded_it_is_the_same_program(tmp_path, monkeypatch, short):
    monkeypatch.chdir(tmp_path)
    dspy_fst.save(short, "out")
    loaded = dspy_fst.load("out", Relay())
    monkeypatch.chdir("/")
    assert read_texts(loaded) == read_texts(short)
    assert loaded.population == short.population
    spoken = [read_texts(entry["program"]).digest for entry in loaded.candidate_programs]
    assert spoken == [member.digest for member in short.population.unique()]
    assert same_weights(loaded, short)
    assert speaks(loaded)
    with pytest.raises(FileExistsError):
        dspy_fst.save(short, tmp_path / "out")
    with pytest.raises(RunDirectoryError, match="another program"):
        dspy_fst.load(tmp_path / "out", dspy.Predict("numbers -> answer"))


def test_a_text_that_was_edited_after_training_is_kept(tmp_path, short, monkeypatch):
    (_, predictor), *_ = short.named_predictors()
    monkeypatch.setattr(predictor, "signature", predictor.signature.with_instructions("Edited by hand."))
    loaded = dspy_fst.load(dspy_fst.save(short, tmp_path / "out"), Relay())
    assert "Edited by hand." in read_texts(loaded).texts.values()


def test_it_also_goes_through_dspy_s_own_save_and_load(tmp_path, short):
    short.save(str(tmp_path / "program.json"))
    loaded = Relay()
    loaded.load(str(tmp_path / "program.json"), allow_unsafe_lm_state=True)
    assert policy_of(loaded).checkpoint == policy_of(short).checkpoint
    assert speaks(loaded)


def test_a_compiled_program_goes_on_from_its_weights_and_population(tmp_path, short):
    second = compile_relay(tmp_path / "second", program=short, cycles=1)
    start = load_file(start_of(second).path / "model.safetensors")
    assert all(start[name].equal(tensor) for name, tensor in weights_of(short).items())
    lineage = set(second.population.parents)
    assert {member.digest for member in short.population.members} <= lineage


def test_a_predictor_keeps_its_own_temperature_and_limit(tmp_path):
    program = relay()
    program.last.lm = program.first.lm.copy(temperature=0.5, max_tokens=9)
    compiled = compile_relay(tmp_path / "run", program=program, cycles=1)
    kwargs = {name: predictor.lm.kwargs for name, predictor in compiled.named_predictors()}
    assert (kwargs["first"]["temperature"], kwargs["first"]["max_tokens"]) == (1.5, 12)
    assert (kwargs["last"]["temperature"], kwargs["last"]["max_tokens"]) == (0.5, 9)
    steps = [event["report"]["update"] for event in read_events(tmp_path / "run") if event["event"] == "step"]
    assert all(step["max_log_ratio"] < 1e-4 for step in steps)


def test_a_step_that_measured_too_little_stops_the_run_which_can_go_on(tmp_path):
    calls = []

    def fails_later(gold, pred, trace=None, pred_name=None, pred_trace=None):
        calls.append(gold)
        if len(calls) > 40:
            raise OSError("the judge is down")
        return any_answer(gold, pred)

    optimizer = FSTOptimizer(metric=fails_later, propose=propose, run_dir=tmp_path / "run", **{**SHORT, "method": "rl"})
    with pytest.raises(MeasurementError, match=r"measured nothing \(metric raised OSError: \d+\)"):
        optimizer.compile(relay(), trainset=build(train=32, val=1, test=1).trainset)
    resumed = compile_relay(tmp_path / "run", method="rl")
    assert len([e for e in read_events(tmp_path / "run") if e["event"] == "step"]) == 4
    assert resumed._compiled


def test_an_engine_that_serves_stale_weights_stops_the_run(tmp_path):
    from dspy_fst.engine.in_process import InProcessEngine

    class Stale(InProcessEngine):
        def load(self, checkpoint):
            if self.weights is None:
                return super().load(checkpoint)
            self._version = checkpoint.version  # says so, and keeps the old weights

    program = relay()
    policy = policy_of(program)
    original, policy.fork = policy.fork, lambda: stale_fork()

    def stale_fork():
        fork = original()
        fork.handle._make = Stale
        return fork

    with pytest.raises(SyncError, match=r"step-000001.*uses other weights.*numbers, by up to"):
        compile_relay(tmp_path / "run", program=program, learning_rate=5e-2, warmup_steps=0)


def test_baselines_are_settings_of_the_same_loop(tmp_path):
    rl = compile_relay(tmp_path / "rl", method="rl", cycles=1)
    assert {member.digest for member in rl.population.members} == {read_texts(Relay()).digest}
    assert rl.detailed_results.cycles == ()
    gepa = compile_relay(tmp_path / "gepa", method="gepa", cycles=1)
    assert gepa.detailed_results.steps == ()
    assert same_weights(gepa, relay_at_start(gepa))
    assert policy_of(gepa).checkpoint.version == "step-000000"


def relay_at_start(compiled):
    program = Relay()
    program.set_lm(PolicyLM(start_of(compiled).path))
    return program


def test_the_laboratory_s_proposer_improves_the_anchors_score(tmp_path):
    lab = build("reverse", seed=1, train=64, val=8, test=8)
    lab.program.set_lm(PolicyLM(BASE, max_tokens=16))
    optimizer = FSTOptimizer(
        metric=lab.metric,
        propose=FeedbackProposer(seed=1),
        run_dir=tmp_path / "run",
        progress=False,
        method="gepa",
        cycles=1,
        problems_per_step=16,
        anchors=32,
        search_rollouts=400,
        seed=1,
    )
    compiled = optimizer.compile(lab.program, trainset=lab.trainset)
    cycle = compiled.detailed_results.cycles[0]
    assert cycle.repeats > 0
    assert cycle.scores[0] > 0.25


def test_the_policy_is_held_to_its_start_under_the_seed_on_rollouts_that_are_counted(tmp_path):
    free = events_of(tmp_path / "free", "step", learning_rate=5e-3, warmup_steps=0)
    held = events_of(tmp_path / "held", "step", learning_rate=5e-3, warmup_steps=0, seed_kl_coefficient=10.0)
    assert all(step["update"]["kl_under_seed"] is None for step in free)
    assert [step["counts"]["held_rollouts"] for step in held] == [6] * 4
    assert held[0]["update"]["kl_under_seed"] == pytest.approx(0, abs=1e-5)
    assert held[-1]["update"]["kl_under_seed"] > 1e-4
    assert held[0]["sampled_tokens"] > free[0]["sampled_tokens"]


def test_later_cycles_search_only_when_groups_are_flat_and_unsolved(tmp_path):
    def searched(name, metric, threshold):
        cycles = events_of(tmp_path / name, "cycle", metric=metric, search_when_flat=threshold)
        return [cycle["cycle"] for cycle in cycles]

    assert searched("stuck", lambda *_: 0.0, 1.0) == [0, 1]
    assert searched("solved", lambda *_: 1.0, 1.0) == [0]
    assert searched("mixed", any_answer, 1.0) == [0]


def events_of(run_dir, kind, **changes):
    policy_of(compile_relay(run_dir, **changes)).release()
    return [event["report"] for event in read_events(run_dir) if event["event"] == kind]
