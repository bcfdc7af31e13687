"""What DSPy offers on programs and LMs, trained, saved, loaded and served: one LM for two predictors, a bare predictor,
fields that were renamed, parts that are frozen, models whose names DSPy knows."""

import json
import shutil

import dspy
import pytest

import dspy_fst
from dspy_fst import FSTOptimizer, PolicyLM
from dspy_fst.engine.base import Checkpoint
from dspy_fst.errors import ConfigurationError, RunDirectoryError
from dspy_fst.policy_lm import policy_of
from dspy_fst.rollout.components import read_texts
from dspy_fst.saving.export import export
from dspy_fst.saving.format import POLICY, PROGRAM
from dspy_fst.saving.manifest import MANIFEST, seal
from dspy_fst.serve.app import create_app
from dspy_fst.serve.serving_settings import ServeSettings
from dspy_fst.types import Population
from programs.lab import BASE, build
from tests.pipelines.watched import SHORT, append_words, lab_policy, run_watched, says, shorter
from tests.serve.makers import AUTH, KEY, ask


class Two(dspy.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = says("Reverse the list."), says("Drop the last number.")

    def forward(self, numbers: str):
        return self.last(numbers=self.first(numbers=numbers).answer)


def best_of(module):
    return dspy.BestOfN(module=module, N=2, reward_fn=lambda inputs, pred: float(len(pred.answer) < 9), threshold=1.0)


def refined(module):
    return dspy.Refine(module=module, N=2, reward_fn=lambda inputs, pred: float(len(pred.answer) < 9), threshold=-1.0)


def served(program):
    """The answer of a server of the program to one request."""
    policy_of(program).handle.ready()
    return ask(create_app(program, ServeSettings(api_key=KEY)), {"inputs": {"numbers": "1 2 3"}}, headers=AUTH)


def saved_and_loaded(run, fresh, tmp_path):
    dspy_fst.save(run.compiled, tmp_path / "out")
    return dspy_fst.load(tmp_path / "out", fresh)


@pytest.mark.parametrize("around", [best_of, refined])
@pytest.mark.parametrize("configured", [True, False], ids=["configure", "set_lm"])
def test_a_module_of_two_predictors_is_tried_several_times(tmp_path, around, configured):
    student, policy = around(Two()), lab_policy()
    if not configured:
        student.set_lm(policy)
    with dspy.context(lm=policy if configured else None):
        run = run_watched(student, tmp_path / "run", method="rl")
    assert {call.predictor for call in run.calls} == {"module.first", "module.last"}
    assert run.outcomes("step")["scored"] > 0
    assert run.compiled.get_lm() is policy_of(run.compiled)
    assert student.get_lm() is (None if configured else policy)
    loaded = saved_and_loaded(run, around(Two()), tmp_path)
    lm = loaded.get_lm()
    assert lm.checkpoint.path == tmp_path / "out" / "weights"
    assert any(loaded(numbers="1 2 3") for _ in range(5))
    lm.release()


def test_predictors_of_two_lms_keep_two(tmp_path):
    student, policy = Two(), lab_policy()
    student.first.lm, student.last.lm = policy, policy.copy(temperature=0.7)
    run = run_watched(student, tmp_path / "run", method="rl")
    loaded = saved_and_loaded(run, Two(), tmp_path)
    for program in (run.compiled, loaded):
        assert [program.first.lm.kwargs["temperature"], program.last.lm.kwargs["temperature"]] == [1.2, 0.7]
        assert program.first.lm.handle is program.last.lm.handle
        with pytest.raises(ValueError, match="Multiple LMs"):
            program.get_lm()


@pytest.mark.parametrize("bare", [dspy.Predict, dspy.ChainOfThought])
def test_a_bare_predictor_is_trained_saved_loaded_and_served(tmp_path, bare):
    student = bare("numbers -> answer")
    with dspy.context(lm=lab_policy()):
        run = run_watched(student, tmp_path / "run", method="rl")
    best = read_texts(run.compiled)
    loaded = saved_and_loaded(run, bare("numbers -> answer"), tmp_path)
    assert read_texts(loaded) == best
    assert loaded.get_lm().checkpoint.path == tmp_path / "out" / "weights"
    dspys_own = bare("numbers -> answer")
    dspys_own.load(tmp_path / "out" / PROGRAM)
    assert read_texts(dspys_own) == best
    export(tmp_path / "out", tmp_path / "exported")
    assert read_texts(dspy_fst.load(tmp_path / "exported", bare("numbers -> answer"))) == best
    assert served(loaded).status_code in (200, 502)  # 502: the reply could not be read
    loaded.get_lm().release()


def test_what_a_bare_predictor_learnt_is_in_the_file(tmp_path):
    student = says("Reverse the list.")
    with dspy.context(lm=lab_policy()):
        run = run_watched(student, tmp_path / "run", method="rl")
    run.compiled.demos = [dspy.Example(numbers="1 2", answer="2 1")]
    run.compiled.signature = run.compiled.signature.with_instructions("Turn it round.")
    loaded = saved_and_loaded(run, says("Reverse the list."), tmp_path)
    assert loaded.signature.instructions == "Turn it round."
    assert [dict(demo) for demo in loaded.demos] == [{"numbers": "1 2", "answer": "2 1"}]


def fields_of(order, descriptions):
    fields = {
        "numbers": (str, dspy.InputField(desc=descriptions.get("numbers"))),
        "rule": (str, dspy.InputField(desc=descriptions.get("rule"))),
        "answer": (str, dspy.OutputField(desc=descriptions.get("answer"))),
        "verdict": (str, dspy.OutputField(desc=descriptions.get("verdict"))),
        "digits": (str, dspy.InputField(desc=descriptions.get("digits"))),
    }
    return dspy.Predict(dspy.Signature({name: fields[name] for name in order.split()}, "Judge."))


LEARNT = {"numbers": "what to turn", "rule": "how", "answer": "what comes out", "verdict": "yes or no"}


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    """A saved program of one predictor with four described fields."""
    folder = tmp_path_factory.mktemp("judged")
    program = dspy.Module()
    program.judge = fields_of("numbers rule answer verdict", LEARNT)
    program.forward = lambda **inputs: None
    with dspy.context(lm=lab_policy()):
        run = run_watched(two_inputs(program), folder / "run", method="rl", trainset=examples())
    return dspy_fst.save(run.compiled, folder / "out")


def examples():
    return [dspy.Example(numbers=f"{n} {n}", rule="r", answer="a").with_inputs("numbers", "rule") for n in range(8)]


def two_inputs(program):
    del program.forward
    program.forward = lambda numbers, rule: program.judge(numbers=numbers, rule=rule)
    return program


def judging(order):
    program = dspy.Module()
    program.judge = fields_of(order, {})
    return program


def without_field_names(folder):
    document = json.loads((folder / PROGRAM).read_text())
    for field in document["judge"]["signature"]["fields"]:
        field.pop("name", None)
    (folder / PROGRAM).write_text(json.dumps(document))
    (folder / MANIFEST).unlink()
    seal(folder, "test")


@pytest.mark.parametrize("named", [True, False], ids=["names", "a folder of an earlier version"])
def test_descriptions_go_to_the_fields_of_their_names(judged, tmp_path, named):
    shutil.copytree(judged, tmp_path / "out")
    if not named:
        without_field_names(tmp_path / "out")
    loaded = dspy_fst.load(tmp_path / "out", judging("rule numbers verdict answer"))
    fields = loaded.judge.signature.fields
    assert list(fields) == ["rule", "numbers", "verdict", "answer"]
    assert {name: field.json_schema_extra["desc"] for name, field in fields.items()} == LEARNT
    assert fields["rule"].json_schema_extra["prefix"] == "Rule:"


@pytest.mark.parametrize(
    "order", ["digits rule answer verdict", "numbers rule answer", "numbers digits answer verdict"]
)
@pytest.mark.parametrize("named", [True, False], ids=["names", "a folder of an earlier version"])
def test_a_program_with_other_fields_is_refused(judged, tmp_path, order, named):
    shutil.copytree(judged, tmp_path / "out")
    if not named:
        without_field_names(tmp_path / "out")
    with pytest.raises(RunDirectoryError, match="the fields of judge differ"):
        dspy_fst.load(tmp_path / "out", judging(order))


class Judge(dspy.Module):
    """The same as a class, with a ``forward`` that every copy has."""

    def __init__(self, order, descriptions=LEARNT):
        super().__init__()
        self.judge = fields_of(order, descriptions)

    def forward(self, **inputs):
        return self.judge(**inputs)


@pytest.fixture
def judge_saved(tmp_path):
    program = Judge("numbers rule answer verdict")
    program.set_lm(lab_policy())
    program.population = Population.of_seed(read_texts(program), 2)
    return dspy_fst.save(program, tmp_path / "out")


@pytest.mark.parametrize("order", ["rule numbers verdict answer", "numbers rule verdict answer"])
def test_a_class_s_descriptions_go_to_the_fields_of_their_names(judge_saved, order):
    fields = dspy_fst.load(judge_saved, Judge(order, {})).judge.signature.fields
    assert " ".join(fields) == order
    assert {name: field.json_schema_extra["desc"] for name, field in fields.items()} == LEARNT


@pytest.mark.parametrize("order", ["digits rule answer verdict", "numbers digits answer verdict"])
def test_a_class_of_other_fields_is_refused(judge_saved, order):
    with pytest.raises(RunDirectoryError, match="the fields of judge differ"):
        dspy_fst.load(judge_saved, Judge(order))


# ---- models and limits ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["o3-mini", "o1", "gpt-5", "gpt-5.2-mini"])
def test_a_folder_that_is_named_like_a_model_of_openai(tmp_path, name):
    shutil.copytree(BASE, tmp_path / name)
    policy = PolicyLM(tmp_path / name, engine="in_process", max_tokens=8, temperature=0.7)
    assert (policy.kwargs["max_tokens"], policy.kwargs["temperature"]) == (8, 0.7)
    assert "max_completion_tokens" not in policy.kwargs
    fork = policy.fork(Checkpoint("x", tmp_path / name))
    again = PolicyLM.load_state(policy.dump_state())
    for other in (fork, again, policy.copy(), policy.copy(rollout_id=3, temperature=1.0), policy.on(fork.handle)):
        assert other.kwargs["max_tokens"] == 8
        assert "max_completion_tokens" not in other.kwargs
    assert len(policy("1 2 3")) == 1
    policy.release()


def test_a_program_whose_model_is_named_like_openai_s_is_trained_saved_and_loaded(tmp_path):
    shutil.copytree(BASE, tmp_path / "o3-mini")
    student = says("Reverse the list.")
    student.set_lm(lab_policy(tmp_path / "o3-mini"))
    run = run_watched(student, tmp_path / "run", method="rl")
    loaded = saved_and_loaded(run, says("Reverse the list."), tmp_path)
    assert (loaded.lm.kwargs["max_tokens"], loaded.lm.kwargs["temperature"]) == (16, 1.2)


def test_no_limit_is_saved_loaded_served_and_forked(tmp_path):
    student = Two()
    student.set_lm(PolicyLM(BASE, engine="in_process", max_tokens=None, engine_options={"linger_s": 60.0}))
    run = run_watched(student, tmp_path / "run", method="rl")
    assert policy_of(run.compiled).fork().kwargs["max_tokens"] is None
    loaded = saved_and_loaded(run, Two(), tmp_path)
    document = json.loads((tmp_path / "out" / POLICY).read_text())
    assert document["policy"]["max_tokens"] is None
    assert document["predictors"]["first"]["max_tokens"] is None
    assert loaded.get_lm().kwargs.get("max_tokens") is None
    assert len(loaded.get_lm()("1 2 3")) == 1
    assert served(loaded).status_code in (200, 502)
    again = dspy_fst.load(tmp_path / "out", Two(), max_tokens=8)
    assert again.get_lm().kwargs["max_tokens"] == 8
    loaded.get_lm().release()


# ---- parts that DSPy holds frozen, or calls otherwise --------------------------------------------


class Outer(dspy.Module):
    def __init__(self, inner, more=False):
        super().__init__()
        self.inner = inner
        if more:
            self.last = says("Drop the last number.")

    def forward(self, numbers):
        said = self.inner(numbers=numbers)
        return self.last(numbers=said.answer) if hasattr(self, "last") else said


def bootstrapped():
    return dspy.BootstrapFewShot(metric=None, max_bootstrapped_demos=0, max_labeled_demos=0).compile(
        Two(), trainset=build(train=8, val=1, test=1).trainset
    )


def refusal_of(student, tmp_path):
    optimizer = FSTOptimizer(metric=shorter, propose=append_words, run_dir=tmp_path / "run", **SHORT)
    with dspy.context(lm=lab_policy()), pytest.raises(ConfigurationError) as refused:
        optimizer.compile(student, trainset=build(train=8, val=1, test=1).trainset)
    return str(refused.value)


def test_a_program_whose_only_part_is_frozen_is_told_how_to_free_it(tmp_path):
    message = refusal_of(Outer(bootstrapped()), tmp_path)
    assert "all its predictors are in 'inner', marked as compiled" in message
    assert "set program.inner._compiled = False" in message


def test_a_freed_part_is_trained(tmp_path):
    student = Outer(bootstrapped())
    student.inner._compiled = False
    with dspy.context(lm=lab_policy()):
        run = run_watched(student, tmp_path / "run", method="rl")
    assert {call.predictor for call in run.calls} == {"inner.first", "inner.last"}


def test_a_frozen_part_beside_others_is_told(tmp_path):
    told = []
    with dspy.context(lm=lab_policy()):
        run_watched(
            Outer(bootstrapped(), more=True),
            tmp_path / "run",
            method="rl",
            listeners=[lambda event: told.append(event.get("text", ""))],
        )
    assert any("2 predictors in 'inner', marked as compiled" in line for line in told)


def test_a_program_of_hidden_predictors_only_is_told_so(tmp_path):
    student = Outer(None)
    student.inner = {"steps": [says("Reverse the list.")]}
    message = refusal_of(student, tmp_path)
    assert "DSPy names none of its predictors; they are at \"inner['steps'][0]\"" in message


def length_of(texts):
    return [[float(len(text)), 1.0] for text in texts]


def test_knn_few_shot_is_not_refused_for_its_inputs(tmp_path):
    trainset = build(train=8, val=1, test=1).trainset
    embedder = dspy.Embedder(length_of)
    student = dspy.KNNFewShot(k=2, trainset=trainset, vectorizer=embedder, max_bootstrapped_demos=0).compile(Two())
    told = []
    with dspy.context(lm=lab_policy()):
        run = run_watched(student, tmp_path / "run", method="rl", listeners=[lambda e: told.append(e.get("text", ""))])
    assert run.outcomes("step").keys() & {"scored", "failed: parse"}
    assert any('2 predictors at "forward.__func__\'s student.first"' in line for line in told)
