"""Bad input is told before any work, several faults at once, each with the setting and what to do."""

import importlib.util
import json
import shutil
import socket
from pathlib import Path

import dspy
import pytest
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

import dspy_fst
from dspy_fst import ConfigurationError, FSTOptimizer, PolicyLM
from programs.lab import BASE, build

LAB = build(train=64, val=4, test=4)
NAN = float("nan")


def propose(candidate, reflective_dataset, components_to_update):
    return {name: candidate[name] for name in components_to_update}


def program_with(lm):
    program = build(train=1, val=1, test=1).program
    if lm is not None:
        program.set_lm(lm)
    return program


def policy(**settings):
    return PolicyLM(settings.pop("model", BASE), **{"max_tokens": 16, **settings})


def told(tmp_path, *, program=None, trainset=LAB.trainset, valset=None, teacher=None, **settings):
    """The message of the refusal; nothing may have been left behind."""
    settings = {"metric": LAB.metric, "propose": propose, "run_dir": tmp_path / "run", "progress": False, **settings}
    before = everything(tmp_path)
    with pytest.raises(ConfigurationError) as caught:
        FSTOptimizer(**settings).compile(
            program or program_with(policy()), trainset=trainset, valset=valset, teacher=teacher
        )
    assert everything(tmp_path) - before <= {tmp_path / "run", tmp_path / "run" / ".lock"}
    return str(caught.value)


def everything(folder):
    return set(folder.rglob("*"))


# ---- programs, models and places that are wrong ----------------------------------------------------


class Two(dspy.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = dspy.Predict("numbers -> y"), dspy.Predict("numbers -> y")
        self.a.lm, self.b.lm = policy(), policy()


class NoPredictor(dspy.Module):
    def forward(self, numbers):
        return dspy.Prediction(answer=numbers)


def base_without(tmp_path, *names):
    folder = Path(shutil.copytree(BASE, tmp_path / "model"))
    for name in names:
        (folder / name).unlink()
    return program_with(policy(model=folder))


def base_with_template(tmp_path, template):
    folder = Path(shutil.copytree(BASE, tmp_path / "model"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return program_with(policy(model=folder))


def base_cut_short(tmp_path):
    folder = Path(shutil.copytree(BASE, tmp_path / "model"))
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    return program_with(policy(model=folder))


def classifier(tmp_path):
    small = BertConfig(vocab_size=64, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    BertForSequenceClassification(small).save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(BASE).save_pretrained(tmp_path / "model")
    return program_with(policy(model=tmp_path / "model"))


def fst_dir(tmp_path, **recipe):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.json").write_text(json.dumps(recipe))
    return tmp_path / "run"


def garbage_dir(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "letter.txt").write_text("mine")
    return tmp_path / "run"


def file_in_the_way(tmp_path):
    (tmp_path / "file").write_text("mine")
    return tmp_path / "file"


def vllm_with(**options):
    return program_with(policy(engine="vllm", engine_options=options))


def of(value):
    """A metric that returns this."""
    return lambda gold, pred, trace=None: value


def asks_for_a_field(gold, pred, trace=None):
    return pred.no_such_field


def fussy(gold, pred, trace=None):
    return 1.0 / (gold.numbers != LAB.trainset[0].numbers)


UNLABELLED = [dspy.Example(numbers="1")] * 40
WITHOUT_FIELD = [dspy.Example(number="1").with_inputs("number")] * 40
FROZEN = dspy.LM("openai/gpt-5", temperature=1.0, max_tokens=16000)

BAD = {
    # settings of the recipe
    "a group that K does not divide": ({"group_size": 6}, "group_size=6 is not a multiple of population_size=4"),
    "no candidates": ({"population_size": 0}, "population_size=0"),
    "no cycles": ({"cycles": 0}, "cycles=0"),
    "a number as text": ({"learning_rate": "fast"}, "learning_rate='fast'"),
    "a rate that is no number": ({"learning_rate": NAN}, "learning_rate=nan"),
    "an infinite rate": ({"learning_rate": float("inf")}, "learning_rate=inf"),
    "a negative coefficient": ({"kl_coefficient": -1}, "kl_coefficient=-1"),
    "a share above one": ({"max_masked_share": 2}, "max_masked_share=2"),
    "decay rates out of range": ({"adam_betas": (1.5, 0.9)}, "adam_betas.0=1.5"),
    "an unknown setting": ({"lr": 1e-4}, "lr: there is no such setting"),
    "an unknown method": ({"method": "sft"}, "method='sft'"),
    "unknown components": ({"components": "some"}, "components='some'"),
    "an unknown budget": ({"auto": "huge"}, "auto='huge': use one of 'light', 'medium', 'heavy'"),
    "a budget and cycles": ({"auto": "light", "cycles": 3}, "auto: it sets cycles"),
    "a failure score that is no number": ({"failure_score": NAN}, "failure_score=nan"),
    # examples
    "no examples": ({"trainset": []}, "trainset: 0 examples are fewer than problems_per_step=32"),
    "too few examples": ({"trainset": LAB.trainset[:5]}, "trainset: 5 examples are fewer than problems_per_step=32"),
    "examples without inputs": ({"trainset": UNLABELLED}, "trainset: call .with_inputs"),
    "examples that are a path": ({"trainset": "data.json"}, "trainset: it must be a list of dspy.Example"),
    "validation examples that are rows": ({"valset": [{"numbers": "1"}]}, "valset: it must be a list of dspy.Example"),
    "examples of another program": ({"trainset": WITHOUT_FIELD}, "4 of the first 4 examples cannot be measured"),
    # metric, proposer, reflection, teacher
    "a metric of one argument": ({"metric": lambda gold: 1.0}, "metric: <lambda>(gold) has the wrong signature"),
    "no metric": ({"metric": None}, "metric: None is not callable"),
    "a metric that returns nothing": ({"metric": of(None)}, "metric returned NoneType"),
    "a metric that returns text": ({"metric": of("good")}, "metric returned str"),
    "a metric that returns NaN": ({"metric": of(NAN)}, "metric returned nan"),
    "a metric that raises": ({"metric": asks_for_a_field}, "metric raised AttributeError"),
    "a metric that raises once": ({"metric": fussy}, "1 of the first 4 examples cannot be measured"),
    "nobody who reflects": ({"propose": None}, "reflection_lm: GEPA needs someone who proposes"),
    "a proposer that is text": ({"propose": "x"}, "propose: 'x' is not callable"),
    "a proposer of one argument": ({"propose": lambda c: {}}, "propose: it must take the arguments candidate"),
    "a reflection LM by name": ({"propose": None, "reflection_lm": "gpt-5"}, "reflection_lm: str is not a dspy.LM"),
    "a reflection LM that is trained": ({"reflection_lm": policy()}, "reflection_lm: it is a PolicyLM"),
    "a teacher": ({"teacher": dspy.Predict("a -> b")}, "teacher: nothing is learnt from a teacher"),
    # programs
    "a function for a program": ({"program": lambda x: x}, "function is not a dspy.Module"),
    "a class for a program": ({"program": Two}, "it is the class Two; pass an instance, Two()"),
    "a program without predictors": ({"program": NoPredictor()}, "the program has no predictors"),
    "a predictor without an LM": ({"program": program_with(None)}, "predictor 'solve' has no LM"),
    "frozen LMs only": ({"program": program_with(FROZEN)}, "no predictor speaks with a PolicyLM"),
    "two trained LMs": ({"program": Two()}, "2 different PolicyLMs"),
    # models
    "no such model folder": (
        lambda tmp: {"program": program_with(policy(model=tmp / "no"))},
        "there is no such folder",
    ),
    "a model without config": (lambda tmp: {"program": base_without(tmp, "config.json")}, "not a model that"),
    "a model without weights": (lambda tmp: {"program": base_without(tmp, "model.safetensors")}, "no weights"),
    "weights cut short": (lambda tmp: {"program": base_cut_short(tmp)}, "model.safetensors"),
    "a classifier": (lambda tmp: {"program": classifier(tmp)}, "not a causal language model"),
    "a template that does not prompt": (
        lambda tmp: {"program": base_with_template(tmp, "{% for m in messages %}{{ m['content'] }}{% endfor %}")},
        "adds no generation prompt",
    ),
    "a template that fails": (
        lambda tmp: {"program": base_with_template(tmp, "{{ nothing.at.all }}")},
        "template fails",
    ),
    "a greedy policy": ({"program": program_with(policy(temperature=0.0))}, "temperature=0: greedy replies"),
    "a reply as long as the context": ({"program": program_with(policy(max_tokens=4096))}, "leaves no room"),
    "a prompt too long with its reply": (
        {"program": program_with(policy(max_tokens=1015))},
        "does not fit the context",
    ),
    # engines
    "a server open to the world": ({"program": vllm_with(host="0.0.0.0")}, "serve on a loopback address"),
    "more memory than there is": ({"program": vllm_with(gpu_memory_utilization=2)}, "must be in (0, 1]"),
    "arguments that are set already": ({"program": vllm_with(extra_args=("--port", "1"))}, "extra_args sets --port"),
    "a cache larger than memory": ({"program": vllm_with(cpu_kv_cache_gib=10_000)}, "are free; use a smaller model"),
    # run directories
    "a run directory that is a file": (lambda tmp: {"run_dir": file_in_the_way(tmp)}, "is a file; name a directory"),
    "a run directory under a file": (lambda tmp: {"run_dir": file_in_the_way(tmp) / "run"}, "is a file; name another"),
    "a place that cannot be written": ({"run_dir": Path("/proc/run")}, "cannot be written"),
    "somebody's letters": (lambda tmp: {"run_dir": garbage_dir(tmp)}, "holds no readable recipe.json"),
    "another run": (lambda tmp: {"run_dir": fst_dir(tmp, seed=7)}, "seed (there 7, now 0)"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_told_with_what_to_do(tmp_path, case):
    arguments, message = BAD[case]
    text = told(tmp_path, **(arguments(tmp_path) if callable(arguments) else arguments))
    assert message in text
    assert "found before starting:\n  - " in text


def test_several_faults_are_told_at_once(tmp_path):
    text = told(tmp_path, program=program_with(None), trainset=[], metric=3, propose=None, group_size=6)
    assert text.startswith("5 problems found")
    for part in ("has no LM", "trainset", "metric", "reflection_lm", "group_size=6"):
        assert part in text


def test_after_the_advice_was_followed_the_same_directory_will_do(tmp_path):
    told(tmp_path, metric=lambda gold, pred, trace=None: pred.nothing)
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]


def test_a_program_that_was_not_compiled_is_not_saved(tmp_path):
    with pytest.raises(ValueError, match="compile it with FSTOptimizer first"):
        dspy_fst.save(program_with(PolicyLM(BASE)), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_port_that_is_taken(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"port {port} is in use" in told(tmp_path, program=vllm_with(port=port))


def test_vllm_that_is_missing(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "vllm" else find(name, *a))
    assert "pip install 'dspy-fst[vllm]'" in told(tmp_path, program=vllm_with())


def test_an_unknown_argument_of_the_policy():
    with pytest.raises(TypeError, match="temprature"):
        PolicyLM(BASE, temprature=0.1)


def test_an_unknown_engine_or_option():
    with pytest.raises(ConfigurationError, match="engine='tgi' is unknown"):
        PolicyLM(BASE, engine="tgi")
    with pytest.raises(ConfigurationError, match=r"engine_options of engine='in_process'.*colour"):
        PolicyLM(BASE, engine="in_process", engine_options={"colour": 1})
