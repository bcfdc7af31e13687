"""Whole runs of models of other kinds than the laboratory's: nothing on the way may know one architecture only."""

import dspy
import pytest

from benchmarks.families import FAMILIES
from dspy_fst import FSTOptimizer, PolicyLM
from dspy_fst.memory import model_size
from dspy_fst.model_files.architectures import load_model
from dspy_fst.run.directory import read_events

BY_NAME = {family.name: family for family in FAMILIES}


class TakesAnything(dspy.ChatAdapter):
    """A random model writes no form: whatever it says is the answer."""

    def parse(self, signature, completion):
        return dict.fromkeys(signature.output_fields, completion)


def of_even_length(gold, pred, trace=None):
    return float(len(pred.answer) % 2 == 0)


def first_proposal(candidate, reflective_dataset, components_to_update):
    return {name: f"{candidate[name]} Be brief." for name in components_to_update}


COMPILED = (
    *("Gemma 3 (multimodal)", "Mistral 3 (multimodal)", "Gemma 4 (text)", "Gemma 3n (text)", "Qwen3-MoE", "Mamba"),
    *("GPT-NeoX, Pythia", "LFM2", "Qwen3.5", "Bloom", "Granite"),
)


@pytest.mark.parametrize("name", COMPILED)
def test_a_run_of_one_step(name, tmp_path):
    program = dspy.Predict("question -> answer")
    program.set_lm(PolicyLM(BY_NAME[name].save(tmp_path / "model"), engine="in_process", max_tokens=6))
    examples = [dspy.Example(question=f"{i} {i + 1}", answer="").with_inputs("question") for i in range(6)]
    optimizer = FSTOptimizer(
        metric=of_even_length,
        propose=first_proposal,
        run_dir=tmp_path / "run",
        cycles=1,
        steps_per_cycle=1,
        problems_per_step=3,
        population_size=1,
        group_size=4,
        anchors=3,
        search_rollouts=6,
        learning_rate=1e-2,
        warmup_steps=0,
        progress=False,
    )
    with dspy.context(adapter=TakesAnything()):
        compiled = optimizer.compile(program, trainset=examples, valset=examples[:2])
        assert isinstance(compiled(question="1 2").answer, str)
    (step,) = [event for event in read_events(tmp_path / "run") if event["event"] == "step"]
    assert step["report"]["update"]["grad_norm"] > 0


@pytest.mark.parametrize("name", BY_NAME)
def test_the_size_of_every_family_is_known(name, tmp_path):
    """What is said of memory and disk before a run reads the config of any family."""
    size = model_size(BY_NAME[name].save(tmp_path / "model"))
    assert size is not None
    assert size.parameters >= sum(p.numel() for p in BY_NAME[name].make().parameters()), "buffers may come on top"
    assert size.vocabulary == 594
    assert isinstance(size.inner_width, int)


@pytest.mark.parametrize("name", BY_NAME)
def test_a_family_s_config_alone_counts_its_parameters_exactly(name, tmp_path):
    folder = BY_NAME[name].save(tmp_path / "model")
    trained = sum(parameter.numel() for parameter in load_model(folder, dtype="float32").parameters())
    for weights in folder.glob("*.safetensors*"):
        weights.unlink()
    assert model_size(folder).parameters == trained
