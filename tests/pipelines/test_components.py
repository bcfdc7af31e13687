"""A whole compile() in which a tool's description and a dspy.Flex source evolve, and the program that it leaves."""

import dspy
import pytest
from dspy.primitives.local_interpreter import LocalInterpreter

import dspy_fst
from dspy_fst.errors import RunDirectoryError
from dspy_fst.rollout.components import read_texts
from dspy_fst.run.directory import read_events
from programs.lab import BASE
from programs.lab.tokenizer import signature
from tests.pipelines.test_shapes import plain
from tests.pipelines.watched import lab_policy, run_watched, says, tokenizer

NEW = """class Short(dspy.Module):
    def __init__(self):
        super().__init__()

    def forward(self, **inputs):
        return dspy.Prediction(answer="")"""


def count(numbers: str) -> str:
    """Count them."""
    return str(len(numbers.split()))


class Uses(dspy.Module):
    """An agent that looks at its tools, then a dspy.Flex that has the last word."""

    def __init__(self):
        super().__init__()
        self.agent = dspy.ReAct(signature("Do it."), tools=[count], max_iters=1)
        tool = self.agent.tools["count"]
        self.agent.react.signature = signature(f"Do it. {tool}")  # DSPy's own words are too long for this model
        self.last = dspy.Flex("said -> answer", interpreter_factory=LocalInterpreter)
        self.say = says("Say it.")

    def forward(self, numbers):
        said = self.agent.react(numbers=numbers).answer
        return self.last(said=self.say(numbers=said).answer)


def fresh():
    program = Uses()
    program.set_lm(lab_policy())
    return program


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("components")

    def code_proposer(**given):
        return dict.fromkeys(given["components_to_update"], NEW)

    watched = run_watched(
        fresh(), folder / "run", method="gepa", tool_descriptions="evolved", code_proposer=code_proposer
    )
    return watched, folder


@pytest.mark.slow
def test_what_evolved_is_in_the_prompts_and_in_what_the_program_does(run):
    watched, _ = run
    best = watched.compiled.population.best.texts
    assert best["agent.tools['count'].desc"].startswith("Count them. Be brief.")
    assert best["last"] == NEW
    played = [r for _, r in watched.rollouts if r.candidate.texts == best and r.prediction is not None]
    assert played
    assert {rollout.prediction.answer for rollout in played} == {""}
    prompt = plain(tokenizer().decode(next(c for c in played[0].calls if c.predictor == "agent.react").prompt_ids))
    assert "count them. be brief." in prompt
    assert watched.compiled.agent.tools["count"].desc.startswith("Count them. Be brief.")
    assert watched.compiled.last.module_src == NEW


def test_the_run_directory_and_the_saved_program_keep_them(run):
    watched, folder = run
    candidates = [c for event in read_events(folder / "run") if event["event"] == "cycle" for c in event["candidates"]]
    assert dict(watched.compiled.population.best.texts) in [candidate["texts"] for candidate in candidates]
    saved = dspy_fst.save(watched.compiled, folder / "out")
    with pytest.raises(RunDirectoryError, match=r"another source for the dspy.Flex 'last'.*trust_code=True"):
        dspy_fst.load(saved, Uses())
    loaded = dspy_fst.load(saved, Uses(), trust_code=True)
    assert read_texts(loaded, tools=True) == read_texts(watched.compiled, tools=True)
    assert loaded.population == watched.compiled.population
    assert loaded.last.lm.checkpoint.path == saved / "weights"
    assert loaded.last(said="x").answer == ""
    assert str(BASE) != str(loaded.last.lm.checkpoint.path)
