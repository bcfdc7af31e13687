"""What a user meets first: names that are misspelt, help in Python, and two settings that do not fit each other."""

import inspect
import pydoc

import pytest

import dspy_fst
from dspy_fst import ConfigurationError, FSTOptimizer, PolicyLM
from dspy_fst.preflight.precision import precision_warnings
from programs.lab import BASE


def metric(gold, pred, trace=None):
    return 1.0


def test_misspelt_settings_are_told_by_the_constructor_all_at_once_with_the_name_that_was_meant():
    with pytest.raises(ConfigurationError) as caught:
        FSTOptimizer(metric=metric, learning_rte=1e-5, steps_per_cyle=2, rn_dir="runs/x", colour=1, progress="yes")
    assert caught.value.faults == (
        "learning_rte: there is no such setting; did you mean 'learning_rate' or 'warm_start_learning_rate'?",
        "steps_per_cyle: there is no such setting; did you mean 'steps_per_cycle'?",
        "rn_dir: there is no such setting; did you mean 'run_dir'?",
        "colour: there is no such setting; see dspy_fst.FSTConfig for all of them",
        "progress='yes': use True or False",
    )


@pytest.mark.parametrize("name", dspy_fst.FSTConfig.model_fields)
def test_every_setting_is_an_argument_of_the_constructor(name):
    value = dspy_fst.FSTConfig.model_fields[name].default
    assert FSTOptimizer(metric=metric, **{name: value}).recipe[name] == value


@pytest.mark.parametrize(
    ("engine", "options", "faults"),
    [
        (
            "vllm",
            {"max_model_length": 8, "gpu_memory_utilisation": 0.5},
            ["max_model_length: there is no such option; did you mean 'max_model_len'?", "'gpu_memory_utilization'?"],
        ),
        (
            "in_process",
            {"dype": "float32", "colour": 1},
            [
                "dype: there is no such option; did you mean 'dtype'?",
                "colour: there is no such option; it has device, ",
            ],
        ),
    ],
    ids=["vllm", "in_process"],
)
def test_misspelt_options_of_an_engine_are_told_all_at_once_too(engine, options, faults):
    with pytest.raises(ConfigurationError) as caught:
        PolicyLM(BASE, engine=engine, engine_options=options)
    assert len(caught.value.faults) == len(faults)
    for told, wanted in zip(caught.value.faults, faults, strict=True):
        assert told.startswith(f"engine_options of engine={engine!r}: ")
        assert wanted in told


@pytest.mark.parametrize("kind", [FSTOptimizer, PolicyLM])
def test_help_shows_what_each_argument_means_and_not_the_base_class_s_words(kind):
    (base,) = [parent for parent in kind.__mro__[1:] if "__init__" in vars(parent)][:1]
    for shown in (pydoc.plain(pydoc.render_doc(kind)), pydoc.plain(pydoc.render_doc(kind.__init__))):
        for name in list(inspect.signature(kind.__init__).parameters)[1:]:
            assert f"{name}: " in shown, name
        assert (inspect.getdoc(base.__init__) or "DSPy's").splitlines()[0] not in shown


@pytest.mark.parametrize("name", dspy_fst.__all__)
def test_what_the_package_offers_says_itself_what_it_is(name):
    offered = getattr(dspy_fst, name)
    assert vars(offered).get("__doc__") if isinstance(offered, type) else offered.__doc__
    for method, made in vars(offered).items() if isinstance(offered, type) else ():
        if inspect.isfunction(made) and not method.startswith("_") and made.__module__.startswith("dspy_fst"):
            assert made.__doc__, f"{name}.{method}"


CASES = {
    "both by default": ("auto", "in_process", {}, []),
    "both bfloat16": ("bfloat16", "vllm", {"dtype": "bfloat16"}, []),
    "vLLM's other name": ("float32", "vllm", {"dtype": "float"}, []),
    "trainer alone": ("bfloat16", "in_process", {"dtype": "float32"}, ["bfloat16", "float32"]),
    "engine left as it is": ("bfloat16", "vllm", {}, ["bfloat16", "float32"]),
    "engine alone": ("auto", "vllm", {"dtype": "bfloat16"}, ["float32", "bfloat16"]),
    "half": ("auto", "vllm", {"dtype": "half"}, ["float32", "float16"]),
    "attached": ("bfloat16", "vllm", {"attach_url": "http://127.0.0.1:1", "dtype": "float32"}, []),
}


@pytest.mark.parametrize(("precision", "kind", "options", "computed"), CASES.values(), ids=CASES)
def test_trainer_and_engine_in_two_precisions_are_told(precision, kind, options, computed, monkeypatch):
    monkeypatch.setattr("dspy_fst.preflight.precision.has_gpu", lambda: False)
    told = precision_warnings(precision, kind, options)
    assert len(told) == bool(computed)
    for warning in told:
        trainer, engine = computed
        assert f"the trainer computes in {trainer} (precision" in warning
        assert f"and the engine in {engine} (engine_options" in warning
        assert f"engine_options={{'dtype': {trainer!r}}}" in warning
        assert ("or precision=" in warning) == (engine != "float16")


def test_on_a_gpu_auto_is_bfloat16_for_both_and_a_cpu_engine_beside_it_is_told(monkeypatch):
    monkeypatch.setattr("dspy_fst.preflight.precision.has_gpu", lambda: True)
    assert precision_warnings("auto", "vllm", {}) == []
    assert precision_warnings("auto", "in_process", {"device": "cuda:1"}) == []
    assert len(precision_warnings("auto", "in_process", {"device": "cpu"})) == 1
    assert len(precision_warnings("auto", "vllm", {"dtype": "float32"})) == 1


def test_misspelt_settings_of_the_lm_are_told_all_at_once_with_the_name_that_was_meant_or_where_it_belongs():
    with pytest.raises(ConfigurationError) as caught:
        PolicyLM(
            BASE, temprature=1, max_token=3, engin="vllm", top_p=0.9, max_model_len=8, engine_options={"colour": 1}
        )
    *told, option = caught.value.faults
    assert told == [
        "temprature: there is no such setting; did you mean 'temperature'?",
        "max_token: there is no such setting; did you mean 'max_tokens'?",
        "engin: there is no such setting; did you mean 'engine'?",
        "top_p: there is no such setting: training scores plain temperature sampling; remove it",
        "max_model_len: there is no such setting of the LM itself; it is the engine's: "
        "engine_options={'max_model_len': ...}",
    ]
    assert "colour: there is no such option" in option
    with pytest.raises(ConfigurationError, match="colour: there is no such setting; it has model, engine, temperature"):
        PolicyLM(BASE, colour=1)
