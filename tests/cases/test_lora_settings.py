"""Settings of LoRA adapters that fit no adapter, no predictor or no model are told together, before any work."""

import re

import dspy
import pytest

from dspy_fst import PolicyLM
from dspy_fst.errors import ConfigurationError
from dspy_fst.recipe.lora_settings import LoRA, adapter_of
from dspy_fst.training.request import Arguments, Proposers, check
from programs.lab import BASE, build
from tests import lora_program
from tests.lora_program import two_adapters
from tests.relay import Relay, any_answer
from tests.test_compile import propose

LORA = {"adapter": "lora"}


@pytest.fixture(scope="module")
def examples():
    return build(train=8, val=2, test=2).trainset


def checked(examples, tmp_path, program=None, **settings):
    student = program or Relay()
    if not hasattr(student, "population"):
        student.set_lm(PolicyLM(BASE, engine="in_process", max_tokens=12))
    given = {"cycles": 1, "steps_per_cycle": 1, "problems_per_step": 4, **settings}
    given |= {"population_size": 2, "group_size": 4}
    return check(
        Arguments(
            student,
            examples,
            any_answer,
            proposers=Proposers(propose=propose),
            run_dir=tmp_path / "run",
            settings=given,
        )
    )


@pytest.mark.parametrize(
    ("adapter", "complaint"),
    [
        ({"rank": 100_000}, r"rank=100000 is above \d+, the full rank of this model's largest layer"),
        ({"rank": 2**70}, "is above"),
        ({"alpha": 1e308}, "adapter.alpha=1e.308: Input should be less than or equal to 1000000"),
        ({"rslora": "yes"}, "adapter.rslora='yes': Input should be a valid boolean"),
        ({"r": 4}, "adapter.r: there is no such setting.*rank, alpha, target, rslora"),
        ({"target": ["all-linear", "q_proj"]}, "'all-linear' stands for all linear layers; give it alone"),
    ],
    ids=["rank", "large rank", "alpha", "rslora", "peft's name", "all-linear and others"],
)
def test_an_adapter_that_fits_nothing(examples, tmp_path, adapter, complaint):
    with pytest.raises(ConfigurationError, match=complaint):
        checked(examples, tmp_path, adapter=adapter)


@pytest.mark.parametrize(
    ("groups", "complaint"),
    [
        ({"base": ["first"], "x": ["last"]}, r"'base': a group's name .* is not 'base'"),
        ({"-a": ["first", "last"]}, "'-a': a group's name"),
        ({"a" * 65: ["first", "last"]}, "aaa': a group's name has 1 to 64 letters"),
        ({"keys": ["first"], "training": ["last"]}, "'keys', 'training' is a name of torch's own"),
        ({"__base__": ["first"], "x": ["last"]}, "'__base__' is peft's name for the base; name the group otherwise"),
        ({"a": ["first"], "A": ["last"]}, "'a', 'A' differ in case alone"),
        ({"a": ["first"]}, "last would be trained and is in no group"),
        ({"a": "first", "b": []}, "'a', 'b': list at least one predictor"),
        ({"a b": ["first"], "c": ["first"]}, "'a b': a group's name.*; 'first' in more than one group"),
        ({"a": ["first", "last"], "b": ["nope"]}, "'nope' is no trained predictor; there are first, last"),
    ],
    ids=["base", "dash", "long", "torch's", "peft's", "case", "left out", "members", "two faults", "unknown"],
)
def test_groups_that_cannot_be_trained(examples, tmp_path, groups, complaint):
    with pytest.raises(ConfigurationError, match=complaint):
        checked(examples, tmp_path, **LORA, adapters=groups)


def test_what_means_the_same_is_the_same(examples, tmp_path):
    assert LoRA(target=["all-linear"]) == LoRA()
    groups = checked(examples, tmp_path, **LORA, adapters={"a": {"last", "first"}}).config.adapters
    assert groups == checked(examples, tmp_path, **LORA, adapters={"a": ["first", "last", "first"]}).config.adapters
    assert groups == {"a": ("first", "last")}


def test_several_faults_are_told_at_once(examples, tmp_path):
    with pytest.raises(ConfigurationError) as caught:
        checked(examples, tmp_path, adapter={"rank": 500_000, "target": ["q_proj", "nope"]}, adapters={"keys": ["x"]})
    text = "\n".join(caught.value.faults)
    for part in ("target='nope'", "rank=500000 is above", "'x' is no trained predictor", "'keys' is a name of torch's"):
        assert part in text
    assert not (tmp_path / "run").exists()


def test_a_predictor_s_name_of_any_characters_gives_its_adapter_a_name_of_its_own():
    names = ["d['a/b']", "d['a b']", "d['a.b']", "d['ü']", "x" * 300, "y.z", "hops[0].query"]
    given = adapter_of("per_predictor", names)
    assert len({*given.values()}) == len(names)
    assert all(len(name) < 100 and not set(name) & set("/. '\"") and name.isascii() for name in given.values())
    assert (given["y.z"], given["hops[0].query"]) == ("for-y-z", "for-hops[0]-query")


def test_predictors_in_a_dict_have_adapters_of_their_own(examples, tmp_path):
    class Keyed(dspy.Module):
        def __init__(self):
            super().__init__()
            self.steps = {"a/b": dspy.Predict("numbers -> answer"), "c d": dspy.Predict("numbers -> answer")}

        def forward(self, numbers):
            return self.steps["c d"](numbers=self.steps["a/b"](numbers=numbers).answer)

    assert checked(examples, tmp_path, Keyed(), **LORA, adapters="per_predictor").config.adapters == "per_predictor"


@pytest.mark.parametrize(
    "adapter",
    [{"rank": 8}, {"rank": 4, "alpha": 8.0}, {"rank": 4, "target": "q_proj"}, {"rank": 4, "rslora": True}],
    ids=["rank", "alpha", "target", "rslora"],
)
def test_several_adapters_do_not_go_on_with_other_settings(examples, tmp_path, adapter):
    program = drawn(two_adapters(tmp_path / "weights"))
    assert checked(examples, tmp_path, program, adapter=LoRA(rank=4), adapters="per_predictor")
    with pytest.raises(
        ConfigurationError, match=r"several LoRA adapters of rank=4, alpha=32, scaling alpha / rank and 28"
    ):
        checked(examples, tmp_path, program, adapter=adapter, adapters="per_predictor")
    assert not (tmp_path / "run").exists()


def drawn(program):
    for _, predictor in program.named_predictors():
        predictor.config["temperature"] = 1.0
    return program


RANK = {"adapter": LoRA(rank=4)}
APART = {"adapters": "per_predictor"}
GROUPS = {"adapters": {"one": ("first",), "two": ("last",)}}


@pytest.mark.parametrize(
    ("settings", "says", "remedy"),
    [
        (RANK, "adapters: .*; go on with the same: set adapters='per_predictor'", APART),
        ({**RANK, **GROUPS}, "adapters: .*; go on with the same: set adapters='per_predictor'", APART),
        (
            {**RANK, **APART, "trained": ("first",)},
            "adapters: .*: set trained=.'first', 'last'. and adapters='per_predictor'",
            {"trained": ["first", "last"]},
        ),
        ({}, r"adapters: .*: set adapter=LoRA\(...\) as it was trained and adapters='per_predictor'", RANK | APART),
        ({"adapter": LoRA(rank=8), **APART}, "adapter: .*go on with the same rank, alpha, rslora and target", RANK),
    ],
    ids=["shared", "other groups", "one alone", "all weights", "rank"],
)
def test_one_mistake_about_several_adapters_is_one_fault_and_its_remedy_helps(
    examples, tmp_path, settings, says, remedy
):
    program = drawn(two_adapters(tmp_path / "weights"))
    with pytest.raises(ConfigurationError) as refused:
        checked(examples, tmp_path, program, **settings, continue_optimizer=True)
    (fault,) = refused.value.faults
    assert re.fullmatch(says, fault)
    assert checked(examples, tmp_path, program, **{**settings, **remedy})


def test_adapters_that_have_names_of_groups_are_told_as_groups(examples, tmp_path, monkeypatch):
    monkeypatch.setattr(lora_program, "OF", {"first": "one", "last": "two"})
    program = drawn(two_adapters(tmp_path / "weights"))
    with pytest.raises(ConfigurationError, match=r"set adapters=\{'one': \['first'\], 'two': \['last'\]\}$"):
        checked(examples, tmp_path, program, **RANK)
