"""Bad input is told before any work, several faults at once, each with the setting and what to do."""

import shutil
import socket
from pathlib import Path

import dspy
import pytest
from transformers import AutoTokenizer

import dspy_fst
from dspy_fst import ConfigurationError, FSTOptimizer, PolicyLM
from programs.lab import BASE, build

LAB = build(train=64, val=4, test=4)


def propose(candidate, reflective_dataset, components_to_update):
    return {name: candidate[name] for name in components_to_update}


def program_with(lm):
    program = build(train=1, val=1, test=1).program
    if lm is not None:
        program.set_lm(lm)
    return program


def told(tmp_path, *, program=None, trainset=LAB.trainset, valset=None, teacher=None, **settings):
    """The message of the refusal; nothing may have been written."""
    settings = {"metric": LAB.metric, "propose": propose, "run_dir": tmp_path / "run", "progress": False, **settings}
    program = program or program_with(PolicyLM(BASE, max_tokens=16))
    with pytest.raises(ConfigurationError) as caught:
        FSTOptimizer(**settings).compile(program, trainset=trainset, valset=valset, teacher=teacher)
    return str(caught.value)


def copied_base(tmp_path) -> Path:
    return Path(shutil.copytree(BASE, tmp_path / "model"))


SETTINGS = [
    ({"group_size": 6}, "group_size=6 is not a multiple of population_size=4"),
    ({"trainset": []}, "trainset: 0 examples are fewer than problems_per_step=32"),
    ({"trainset": LAB.trainset[:5]}, "trainset: 5 examples are fewer than problems_per_step=32"),
    ({"trainset": [dspy.Example(numbers="1")] * 40}, "trainset: call .with_inputs"),
    ({"trainset": "data.json"}, "trainset: it must be a list of dspy.Example"),
    ({"metric": lambda gold: 1.0}, "metric: <lambda>(gold) has the wrong signature"),
    ({"metric": None}, "metric: None is not callable"),
    ({"propose": None}, "reflection_lm: GEPA needs someone who proposes"),
    ({"propose": "x"}, "propose: 'x' is not callable"),
    ({"propose": lambda candidate: {}}, "propose: it must take the arguments candidate, reflective_dataset"),
    ({"propose": None, "reflection_lm": "openai/gpt-5"}, "reflection_lm: str is not a dspy.LM"),
    ({"reflection_lm": PolicyLM(BASE)}, "reflection_lm: it is a PolicyLM"),
    ({"teacher": dspy.Predict("a -> b")}, "teacher: nothing is learnt from a teacher"),
    ({"auto": "huge"}, "auto='huge': use one of 'light', 'medium', 'heavy'"),
    ({"auto": "light", "cycles": 3}, "auto: it sets cycles"),
    ({"lr": 1e-4}, "lr: there is no such setting"),
    ({"adam_betas": (1.5, 0.9)}, "adam_betas.0=1.5"),
    ({"learning_rate": "fast"}, "learning_rate='fast'"),
    ({"method": "sft"}, "method='sft'"),
]


@pytest.mark.parametrize(("settings", "message"), SETTINGS)
def test_a_bad_setting_is_named_with_what_to_do(tmp_path, settings, message):
    assert message in told(tmp_path, **settings)
    assert not (tmp_path / "run").exists()


def test_several_faults_are_told_at_once(tmp_path):
    text = told(tmp_path, program=program_with(None), trainset=[], metric=3, propose=None, group_size=6)
    assert text.startswith("5 problems found")
    for part in ("has no LM", "trainset", "metric", "reflection_lm", "group_size=6"):
        assert part in text


def test_a_predictor_without_an_lm(tmp_path):
    assert "predictor 'solve' has no LM" in told(tmp_path, program=program_with(None))


def test_only_frozen_lms(tmp_path):
    program = program_with(dspy.LM("openai/gpt-5", temperature=1.0, max_tokens=16000))
    assert "no predictor speaks with a PolicyLM" in told(tmp_path, program=program)


def test_two_trainable_lms(tmp_path):
    class Two(dspy.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = dspy.Predict("x -> y"), dspy.Predict("x -> y")
            self.a.lm, self.b.lm = PolicyLM(BASE), PolicyLM(BASE)

    assert "2 different PolicyLMs" in told(tmp_path, program=Two())


def test_a_program_that_is_none(tmp_path):
    assert "is not a dspy.Module" in told(tmp_path, program=lambda x: x)


def test_a_metric_that_raises_on_the_first_examples(tmp_path):
    def wrong(gold, pred, trace=None):
        return pred.no_such_field

    text = told(tmp_path, metric=wrong)
    assert "4 of the first 4 examples cannot be measured (metric raised AttributeError)" in text
    assert "no_such_field" in text
    assert "mend the metric" in text


def test_a_metric_that_raises_on_one_of_the_first_examples(tmp_path):
    def fussy(gold, pred, trace=None):
        return 1.0 / (gold.numbers != LAB.trainset[0].numbers)

    assert "1 of the first 4 examples cannot be measured" in told(tmp_path, metric=fussy)


def test_after_the_advice_was_followed_the_same_directory_will_do(tmp_path):
    told(tmp_path, metric=lambda gold, pred, trace=None: pred.nothing)
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]


def test_a_path_with_no_model(tmp_path):
    missing = program_with(PolicyLM(tmp_path / "nowhere"))
    assert "there is no such folder" in told(tmp_path, program=missing)
    (tmp_path / "empty").mkdir()
    assert "not a model that transformers can read" in told(
        tmp_path, program=program_with(PolicyLM(tmp_path / "empty"))
    )


def test_a_context_shorter_than_the_reply(tmp_path):
    program = program_with(PolicyLM(BASE, max_tokens=4096))
    assert "max_tokens=4096: the context of 1024 tokens leaves no room" in told(tmp_path, program=program)


def test_a_context_shorter_than_prompt_and_reply(tmp_path):
    program = program_with(PolicyLM(BASE, max_tokens=1015))
    assert "does not fit the context of 1024" in told(tmp_path, program=program)


def test_a_greedy_policy(tmp_path):
    program = program_with(PolicyLM(BASE, max_tokens=16, temperature=0.0))
    assert "temperature=0: greedy replies have no gradient" in told(tmp_path, program=program)


def test_a_program_that_was_not_compiled_is_not_saved(tmp_path):
    with pytest.raises(ValueError, match="compile it with FSTOptimizer first"):
        dspy_fst.save(program_with(PolicyLM(BASE)), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_chat_template_without_generation_prompt(tmp_path):
    model = copied_base(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(model)
    assert "adds no generation prompt" in told(tmp_path, program=program_with(PolicyLM(model, max_tokens=16)))


def test_a_run_directory_of_another_configuration(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.json").write_text('{"seed": 7}')
    text = told(tmp_path)
    assert "holds a run of another configuration" in text
    assert "seed (there 7, now 0)" in text
    assert [path.name for path in run.iterdir()] == ["recipe.json"]


def test_a_port_that_is_taken(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        policy = PolicyLM(BASE, engine="vllm", max_tokens=16, engine_options={"port": port})
        assert f"port {port} is in use" in told(tmp_path, program=program_with(policy))


def test_vllm_that_is_missing(tmp_path, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "vllm" else find(name, *a))
    program = program_with(PolicyLM(BASE, engine="vllm", max_tokens=16))
    assert "pip install 'dspy-fst[vllm]'" in told(tmp_path, program=program)


def test_an_unknown_argument_of_the_policy():
    with pytest.raises(TypeError, match="temprature"):
        PolicyLM(BASE, temprature=0.1)


def test_an_unknown_engine_or_option():
    with pytest.raises(ConfigurationError, match="engine='tgi' is unknown"):
        PolicyLM(BASE, engine="tgi")
    with pytest.raises(ConfigurationError, match=r"engine_options of engine='in_process'.*colour"):
        PolicyLM(BASE, engine="in_process", engine_options={"colour": 1})
