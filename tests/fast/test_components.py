"""Texts beside instructions: sources of dspy.Flex modules and tools' descriptions, as components of a candidate."""

import json

import dspy
import pytest
from dspy.primitives.code_interpreter import CodeInterpreterError
from dspy.primitives.local_interpreter import LocalInterpreter

from dspy_fst.errors import EngineError
from dspy_fst.fast.evolve import evolve
from dspy_fst.fast.rollout_bank import OUTAGE
from dspy_fst.fast.search_settings import SearchSettings, own_texts
from dspy_fst.rollout.call_recorder import tag_predictors
from dspy_fst.rollout.components import UnboundError, read_texts, with_texts
from dspy_fst.rollout.jsonable import rollouts_from_json, rollouts_to_json
from dspy_fst.rollout.reward import Reward
from dspy_fst.rollout.rollout_settings import RolloutSettings
from dspy_fst.rollout.rollouter import Rollouter, Task
from dspy_fst.run.search_journal import Journal
from dspy_fst.training.opening import starting_population
from dspy_fst.training.request import _left_out
from dspy_fst.types import PREDICTOR_TAG, Candidate, Population, Problem
from tests.fakes import fields, scripted_policy

PROBLEMS = [Problem(i, dspy.Example(question=f"q{i}", answer="LOUD").with_inputs("question")) for i in range(4)]
SOURCE = """class Shout(dspy.Module):
    def __init__(self):
        super().__init__()

    def forward(self, **inputs):
        return dspy.Prediction(answer={})"""
LOUD, RAISES = SOURCE.format('inputs["said"].upper()'), SOURCE.format('{}["nothing"]')


def search(query: str) -> str:
    """Looks things up."""
    return f"found {query}"


class Shouts(dspy.Module):
    """A predictor whose answer goes through a dspy.Flex."""

    def __init__(self, interpreter=LocalInterpreter):
        super().__init__()
        self.say = dspy.Predict(dspy.Signature("question -> answer", "Say it."))
        self.last = dspy.Flex("said -> answer", interpreter_factory=interpreter)

    def forward(self, question):
        return self.last(said=self.say(question=question).answer)


class First(dspy.Module):
    """A dspy.Flex that is called before any predictor has spoken."""

    def __init__(self, interpreter=LocalInterpreter):
        super().__init__()
        self.last = dspy.Flex("question -> answer", interpreter_factory=interpreter)
        self.say = dspy.Predict("question -> said")

    def forward(self, question):
        return self.last(question=question)


class Agent(dspy.Module):
    """An agent with two tools, one argument of which is described."""

    def __init__(self):
        super().__init__()
        found = dspy.Tool(search, arg_desc={"query": "One word."})
        tools = [found, dspy.Tool(search, name="count", desc="Counts.", args={})]
        self.agent = dspy.ReAct("question -> answer", tools=tools, max_iters=2)

    def forward(self, question):
        return self.agent(question=question)


def loud(gold, pred, trace=None, pred_name=None, pred_trace=None):
    return dspy.Prediction(score=float(pred.answer == gold.answer), feedback=f"{pred_name}: {pred.answer}")


def kept(candidate, reflective_dataset, components_to_update):
    """A proposer that changes nothing."""
    return {name: candidate[name] for name in components_to_update}


def plain(messages, seed):
    """Says it quietly; an agent searches first, until it is told to search for words that matter."""
    if "next_tool_name" not in messages[0]["content"]:
        return fields(reasoning="r", answer="LOUD" if "found x" in messages[-1]["content"] else "loud")
    told = "what matters" in messages[0]["content"] and "found x" not in messages[-1]["content"]
    args = '{"query": "x"}' if told else "{}"
    return fields(next_thought="t", next_tool_name="search" if told else "finish", next_tool_args=args)


def rollouter_of(program, speak=plain):
    policy, engine = scripted_policy(speak)
    program.set_lm(policy)
    return Rollouter(program, Reward(loud), RolloutSettings(num_threads=2), engine.expect)


def evolved(program, *, tools=False, propose=None, budget=30, speak=plain, **arguments):
    rollouter = rollouter_of(program, speak)
    return evolve(
        Population.of_seed(read_texts(program, tools=tools), 2),
        PROBLEMS,
        program,
        play=lambda wanted: rollouter.rollout(wanted, "search"),
        feedback=lambda e, p, t, n, pt: Reward(loud)(e, p, t, n, pt).feedback,
        propose=propose,
        settings=SearchSettings(reflection_minibatch=2, **arguments.pop("settings", {})),
        size=2,
        budget=budget,
        **arguments,
    )


@pytest.mark.parametrize("way", ["fixed", "evolved"])
def test_a_run_starts_from_the_texts_that_its_search_may_change(way):
    texts = own_texts(Agent(), SearchSettings(tool_descriptions=way)).texts
    assert ("agent.tools['count'].desc" in texts) == (way == "evolved")
    assert texts == read_texts(Agent(), tools=way == "evolved").texts


def test_a_search_that_met_a_source_that_does_not_bind_is_taken_up_again(tmp_path):
    rollouter = rollouter_of(program := Shouts())
    batches = []

    def play(wanted):
        batches.append(wanted)
        if len(batches) == dies_at:
            raise KeyboardInterrupt
        return rollouter.rollout(wanted, "search")

    def search():
        return evolve(
            Population.of_seed(read_texts(program), 2),
            PROBLEMS,
            program,
            play=play,
            feedback=lambda *given: "",
            propose=lambda candidate, reflective_dataset, components_to_update: {
                name: candidate[name] + " Louder." for name in components_to_update
            },
            code_proposer=lambda **given: dict.fromkeys(given["components_to_update"], "def ("),
            settings=SearchSettings(reflection_minibatch=2, components="all"),
            size=2,
            budget=20,
            journal=Journal(tmp_path / "journal", {"cycle": 0}),
        )

    dies_at = 3
    with pytest.raises(KeyboardInterrupt):
        search()
    assert any("def (" in task.candidate.texts["last"] for batch in batches for task in batch)
    dies_at, paid = 0, len(batches)
    assert search().counts["failed: unbound source"] > 0
    assert len(batches) > paid


def test_components_are_named_and_read_as_dspy_s_gepa_does():
    from dspy.teleprompt.gepa.gepa import DspyGEPAResult

    for program in (Shouts(), Agent()):
        assert read_texts(program).texts == DspyGEPAResult._candidate_components(program)


def test_tools_are_read_out_of_the_agent_s_instruction_and_written_back_as_they_stood():
    program = Agent()
    seed = read_texts(program, tools=True)
    assert {name: text for name, text in seed.texts.items() if "tools" in name} == {
        "agent.tools['search'].desc": "Looks things up.",
        "agent.tools['search'].args['query']": "One word.",
        "agent.tools['count'].desc": "Counts.",
    }
    assert "(1) [the description of search]" in seed.texts["agent.react"]
    assert "Looks things up." not in seed.texts["agent.react"]
    again = with_texts(program, seed)
    assert again.agent.react.signature.instructions == program.agent.react.signature.instructions


def test_a_changed_tool_is_in_the_prompt_and_on_the_tool_and_reads_back():
    program = Agent()
    seed = read_texts(program, tools=True)
    new = {"agent.tools['search'].desc": "New.", "agent.tools['search'].args['query']": "Two."}
    changed = Candidate({**seed.texts, **new})
    spoken = with_texts(program, changed)
    instruction = spoken.agent.react.signature.instructions
    assert "search, whose description is <desc>New.</desc>" in instruction
    assert "'description': 'Two.'" in instruction
    assert "Looks things up." not in instruction
    assert (spoken.agent.tools["search"].desc, program.agent.tools["search"].desc) == ("New.", "Looks things up.")
    assert read_texts(spoken, tools=True) == changed
    assert with_texts(spoken, seed).agent.tools["search"].desc == "Looks things up."


def test_a_tool_whose_place_a_proposal_lost_is_described_at_its_end():
    program = Agent()
    seed = read_texts(program, tools=True)
    spoken = with_texts(program, Candidate({**seed.texts, "agent.react": "Just do it."}))
    first, *rest = spoken.agent.react.signature.instructions.splitlines()
    assert first == "Just do it."
    assert [line.split(",")[0] for line in rest] == ["search", "count"]


def test_a_tool_that_the_prompt_does_not_show_is_no_component():
    program = Agent()
    program.agent.react.signature = program.agent.react.signature.with_instructions("Short.")
    assert read_texts(program, tools=True) == read_texts(program)


def test_the_tools_of_react_v2_evolve_too():
    program = dspy.ReActV2("question -> answer", tools=[search])
    seed = read_texts(program, tools=True)
    spoken = with_texts(program, Candidate({**seed.texts, "tools['search'].desc": "New."}))
    assert [tool.desc for tool in spoken.tools.values()] == ["New.", "Submit the final outputs for the task."]


@pytest.mark.parametrize("tools", [False, True])
def test_a_carried_population_goes_on_where_tool_descriptions_is_set_otherwise(tools):
    program = Agent()
    before, now = read_texts(program, tools=not tools), read_texts(program, tools=tools)
    evolved = Candidate({**before.texts, "agent.react": before.texts["agent.react"] + "\nBe quick."})
    program.population = Population((evolved, before), (1.0, 0.5))
    start = starting_population(program, now, 2, {})
    assert start.members == (Candidate({**now.texts, "agent.react": now.texts["agent.react"] + "\nBe quick."}), now)
    spoken = [with_texts(program, member).agent.react.signature.instructions for member in (evolved, start.best)]
    assert spoken[0] == spoken[1]


def test_a_carried_candidate_of_other_components_is_told_and_left_out():
    program = Shouts()
    seed = read_texts(program)
    program.population = Population((Candidate({**seed.texts, "third": "Go."}), seed), (1.0, 0.5))
    assert starting_population(program, seed, 2, {}).members == (seed, seed)
    (told,) = _left_out(program, seed)
    assert "1 of the 2 candidates that it carries have other components than the program (third)" in told
    program.population = Population.of_seed(seed, 2)
    assert _left_out(program, seed) == []


def test_a_tool_s_description_evolves_on_the_steps_of_its_agent():
    seen = {}

    def propose(candidate, reflective_dataset, components_to_update):
        seen.update(reflective_dataset)
        return {name: candidate[name] + " Say what matters." * ("tools" in name) for name in components_to_update}

    search = evolved(Agent(), tools=True, propose=propose, settings={"perfect_score": 2.0})
    assert "what matters" in " ".join(search.population.best.texts.values())
    assert search.population.scores[0] == 1.0
    record = seen["agent.tools['search'].desc"][0]
    assert set(record["Inputs"]) == {"question", "trajectory"}
    assert record["Feedback"].startswith("agent.react: ")


def test_a_reflection_lm_is_asked_for_a_tool_s_description_in_words_of_its_own():
    told = dspy.utils.DummyLM([{"new_instruction": "Finds what matters."}] * 30, adapter=dspy.JSONAdapter())
    search = evolved(Agent(), tools=True, reflection_lm=told, settings={"components": "all"})
    assert any(c.texts["agent.tools['search'].desc"] == "Finds what matters." for c in search.candidates)
    asked = {entry["messages"][0]["content"].count("I gave an agent a tool") for entry in told.history}
    assert asked == {0, 1}


def test_a_source_evolves_and_the_proposer_is_told_what_dspy_tells_it():
    asked = []

    def code_proposer(**given):
        asked.append(given)
        return dict.fromkeys(given["components_to_update"], LOUD)

    def propose(candidate, reflective_dataset, components_to_update):
        return {name: candidate[name] for name in components_to_update}

    search = evolved(Shouts(), propose=propose, code_proposer=code_proposer)
    assert search.population.best.texts["last"] == LOUD
    assert search.population.scores[0] == 1.0
    assert "Signature" in asked[0]["task_descriptions"]["last"]
    record = asked[0]["reflective_dataset"]["last"][0]
    assert (record["Generated Outputs"], record["Feedback"]) == ({"answer": "loud"}, "None: loud")


def test_a_reflection_lm_writes_sources_through_dspy_s_own_proposer():
    writer = dspy.utils.DummyLM([{"new_instruction": "Say it.", "revised_source": f"```python\n{LOUD}\n```"}] * 30)
    search = evolved(Shouts(), reflection_lm=writer, propose=None)
    assert LOUD in {candidate.texts["last"] for candidate in search.candidates}


@pytest.mark.parametrize(
    ("source", "failure"),
    [("def (", "unbound source"), ("x = 1", "unbound source"), ("\0", "unbound source"), (RAISES, "source")],
)
def test_a_source_that_does_not_bind_or_that_raises_is_a_failed_rollout(source, failure):
    program = Shouts()
    rollouter = rollouter_of(program)
    broken = Candidate({**read_texts(program).texts, "last": source})
    (rollout,) = rollouter.rollout([Task(PROBLEMS[0], broken)], "test")
    assert (rollout.reward, rollout.failure, rollout.mask) == (0.0, failure, None)
    assert rollout.feedback


FAULTS = {
    "break": "SyntaxError",
    "return None": "TypeError",
    "return 'loud'": "ValueError",
    "return dspy.Prediction(other=1)": "missing required output",
    "raise KeyError('x')": "KeyError",
    "raise SystemExit": "SystemExit",
    "import os; os._exit(1)": "exited unexpectedly",
    "import time; time.sleep(60)": "exceeded execution timeout",
}


@pytest.mark.parametrize("program", [Shouts, First])
@pytest.mark.parametrize("body", FAULTS)
def test_a_source_s_own_fault_is_scored_whether_or_not_a_predictor_has_spoken(program, body):
    limit = 1.0 if "sleep" in body else None
    program = program(lambda: LocalInterpreter(execution_timeout=limit))
    source = f"class X(dspy.Module):\n    def forward(self, **inputs):\n        {body}"
    faulty = Candidate({**read_texts(program).texts, "last": source})
    (rollout,) = rollouter_of(program).rollout([Task(PROBLEMS[0], faulty)], "test")
    assert (rollout.reward, rollout.failure, rollout.mask) == (0.0, "source", None)
    assert FAULTS[body] in rollout.feedback


@pytest.mark.slow
def test_faulty_sources_do_not_stop_a_search():
    broken = "class X(dspy.Module):\n    def forward(self, **inputs):\n        break\n        # {}"
    asked = []

    def code_proposer(**given):
        asked.append(given)
        return dict.fromkeys(given["components_to_update"], broken.format(len(asked)))

    program = First()
    program.last._bind_code(broken.format("seed"))
    search = evolved(program, propose=kept, code_proposer=code_proposer, settings={"components": "all"})
    assert search.counts["failed: source"] > OUTAGE


def test_calls_inside_a_source_come_back_from_a_journal_in_their_places():
    program = Shouts()
    (rollout,) = rollouter_of(program).rollout([Task(PROBLEMS[0], read_texts(program))], "test")
    assert len(rollout.trace) == 2
    tag_predictors(program)
    data = json.loads(json.dumps(rollouts_to_json([rollout])))
    (again,) = rollouts_from_json(data, [rollout.candidate], program)
    assert [getattr(predictor, PREDICTOR_TAG, None) for predictor, _, _ in again.trace] == ["say", None]
    assert [entry[1:] for entry in again.trace] == [entry[1:] for entry in rollout.trace]


class Gone(LocalInterpreter):
    def start(self):
        raise CodeInterpreterError("no worker")


def missing():
    raise CodeInterpreterError("deno is missing")


@pytest.mark.parametrize("interpreter", [missing, Gone])
@pytest.mark.parametrize("program", [Shouts, First])
def test_an_interpreter_that_cannot_start_masks(program, interpreter):
    program = program(interpreter)
    (rollout,) = rollouter_of(program).rollout([Task(PROBLEMS[0], read_texts(program))], "test")
    assert (rollout.reward, rollout.mask) == (None, "interpreter: CodeInterpreterError")


def test_an_engine_s_outage_inside_a_source_masks():
    def fails(messages, seed):
        raise EngineError("the server is gone")

    program = First()
    (rollout,) = rollouter_of(program, fails).rollout([Task(PROBLEMS[0], read_texts(program))], "test")
    assert rollout.reward is None
    assert rollout.mask.startswith("lm: ")
    assert "the server is gone" in rollout.feedback


def test_a_broken_source_never_gets_into_a_population_although_failing_scores_best():
    program = Shouts()
    rollouter = rollouter_of(program)
    rollouter.settings = RolloutSettings(num_threads=2, failure_score=1.0)
    search = evolve(
        Population.of_seed(read_texts(program), 2),
        PROBLEMS,
        program,
        play=lambda wanted: rollouter.rollout(wanted, "search"),
        feedback=lambda *given: "",
        propose=lambda candidate, reflective_dataset, components_to_update: {},
        code_proposer=lambda **given: dict.fromkeys(given["components_to_update"], "def ("),
        settings=SearchSettings(reflection_minibatch=2, components="all"),
        size=2,
        budget=20,
    )
    assert search.counts["failed: unbound source"] > 0
    assert len(search.candidates) > 1
    with pytest.raises(UnboundError, match="last: SyntaxError"):
        with_texts(program, search.candidates[-1])
    assert {member.texts["last"] for member in search.population.members} == {read_texts(program).texts["last"]}
