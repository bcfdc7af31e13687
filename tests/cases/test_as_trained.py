"""A compiled program asks and reads as its rollouts did: in Python, evaluated, saved, loaded and served."""

import asyncio
import logging
import re

import dspy
import pytest
from dspy.utils.exceptions import AdapterParseError
from typer.testing import CliRunner

import dspy_fst
from dspy_fst import ConfigurationError, FSTOptimizer, PolicyLM
from dspy_fst.cli import app
from dspy_fst.engine.base import Completion
from dspy_fst.engine.chat import chat_messages, text_response
from dspy_fst.engine.in_process import InProcessEngine
from dspy_fst.policy_lm import policy_of
from dspy_fst.rollout.chat_adapters import keep
from dspy_fst.rollout.components import carry, read_texts
from dspy_fst.rollout.reward import Reward
from dspy_fst.rollout.rollout_settings import RolloutSettings
from dspy_fst.rollout.rollouter import Rollouter, Task
from dspy_fst.run.directory import read_events
from dspy_fst.saving.reconfigure import how_it_asks
from dspy_fst.serve.app import create_app
from dspy_fst.serve.serving_settings import ServeSettings
from dspy_fst.types import Candidate, Population, Problem
from programs.lab import BASE
from tests.fakes import ScriptedEngine, fields
from tests.serve.makers import KEY, ask

EXAMPLES = [dspy.Example(question=str(n), answer=str(n + 1)).with_inputs("question") for n in range(8)]
RAMBLES = EXAMPLES[1]
"""One to which the model gives no ChatAdapter form."""
JSON_FORM, XML_FORM = "Respond with a JSON object", "wrapped in XML tags"
SMALL = {"progress": False, "parse_trial": 0, "problems_per_step": 2, "steps_per_cycle": 1}
SERVED = ServeSettings(api_key=KEY, signature="question: str -> answer: str")


class Next(dspy.Module):
    """question -> answer, with one call."""

    def __init__(self):
        super().__init__()
        self.tell = dspy.Predict("question -> answer")

    def forward(self, question):
        return self.tell(question=question)

    async def aforward(self, question):
        return await self.tell.acall(question=question)


class SetsItsOwn(Next):
    """Its code speaks XML whatever is set."""

    def forward(self, question):
        with dspy.context(adapter=dspy.XMLAdapter()):
            return super().forward(question)


class Mixed(Next):
    """A frozen LM checks what the policy says."""

    def __init__(self):
        super().__init__()
        self.check = dspy.Predict("answer -> verdict")

    def forward(self, question):
        return self.check(answer=super().forward(question).answer)


def says_in(messages, seed):
    """Right always in JSON; in ChatAdapter's form right to even numbers when told to count, and no form to odd ones."""
    text = "\n".join(message["content"] for message in messages)
    number = int(re.search(r"question(?: ## \]\]|>)\n(\d+)", messages[-1]["content"])[1])
    if JSON_FORM in text:
        return f'{{"answer": "{number + 1}"}}'
    if number % 2:
        return f"I think that it is {number + 1}."
    return fields(answer=number + 1 if "Count." in text else 0)


class Engine(ScriptedEngine):
    """Keeps what it was asked."""

    def __init__(self, speak=says_in):
        super().__init__(speak)
        self.requests, self.version = [], "step-000002"

    def complete(self, request, seed, prompt_ids=None):
        self.requests.append(request)
        return super().complete(request, seed, prompt_ids)

    @property
    def prompts(self):
        return ["\n".join(message["content"] for message in chat_messages(request)) for request in self.requests]


class Frozen:
    """The engine of an LM that nobody trains: it knows JSON alone."""

    def complete(self, request):
        text = '{"verdict": "fine"}' if JSON_FORM in str(request) else "It is fine."
        return text_response(request.model, text, "stop", 1, 1)


def right(gold, pred, trace=None, pred_name=None, pred_trace=None):
    return dspy.Prediction(score=float(pred.answer == gold.answer), feedback="")


def spoken_by(program, engine=None):
    """The program, its policy speaking through an engine that keeps what it is asked."""
    engine = engine or Engine()
    policy_of(program).handle._make = lambda: engine
    return program, engine


def compiled_like(program=None, adapter=None, **policy):
    """A program as FSTOptimizer gives it back: trained through an adapter, with a population of two."""
    program = program or Next()
    options = {"engine": "in_process", "max_tokens": 24, "temperature": 0.7, "version": "step-000002", **policy}
    program.tell.lm = PolicyLM(BASE, **options)
    keep(program, adapter or dspy.ChatAdapter())
    seed = read_texts(program).texts
    members = tuple(Candidate({**seed, "tell": text}) for text in ("Count.", "Say it."))
    carry(program, Population(members, (0.5, 0.0)))
    return spoken_by(program)


def asked_once(engine):
    """Whether the calls so far were one; forgets them."""
    calls = len(engine.requests)
    engine.requests.clear()
    return calls == 1


# ---- once for each reply -----------------------------------------------------------------------------


def in_parallel(program):
    (result,) = dspy.Parallel(num_threads=1, disable_progress_bar=True, max_errors=9)([(program, RAMBLES.inputs())])
    if result is None:
        raise AdapterParseError("?", program.tell.signature, "?")


@pytest.mark.parametrize(
    "call",
    [
        lambda program: program(question=RAMBLES.question),
        lambda program: asyncio.run(program.acall(question=RAMBLES.question)),
        lambda program: program.deepcopy()(question=RAMBLES.question),
        lambda program: program.candidate_programs[1]["program"](question=RAMBLES.question),
        lambda program: program.tell(question=RAMBLES.question),
        in_parallel,
    ],
    ids=["called", "acall", "a copy", "a candidate program", "its predictor alone", "dspy.Parallel"],
)
def test_a_reply_that_does_not_parse_is_not_asked_for_again_in_json(call):
    program, engine = compiled_like()
    with pytest.raises(AdapterParseError):
        call(program)
    assert asked_once(engine)


def test_an_untrained_student_is_read_in_the_same_way_so_that_before_and_after_compare():
    program = Next()
    program.set_lm(PolicyLM(BASE, engine="in_process", max_tokens=24))
    _, engine = spoken_by(program)
    with pytest.raises(AdapterParseError):
        program(question=RAMBLES.question)
    assert asked_once(engine)


def test_an_adapter_that_the_program_makes_in_forward_makes_no_second_call_either():
    program, engine = compiled_like(SetsItsOwn())
    with dspy.context(adapter=dspy.JSONAdapter()), pytest.raises(AdapterParseError):
        program(question="2")
    assert XML_FORM in engine.prompts[0]
    assert asked_once(engine)


def test_a_frozen_lm_of_the_program_is_asked_as_dspy_does():
    program, engine = compiled_like(Mixed())
    program.check.lm = dspy.LM("frozen", engine=Frozen(), cache=False)
    assert program(question="2").verdict == "fine"
    assert len(program.check.lm.history) == 2
    assert asked_once(engine)


def test_rollouts_never_ask_again_also_where_the_lm_may():
    program, engine = compiled_like(use_json_adapter_fallback=True)
    rollouter = Rollouter(program, Reward(right), RolloutSettings())
    (rollout,) = rollouter.rollout([Task(Problem(1, RAMBLES), read_texts(program))], "test")
    assert rollout.failure == "parse"
    assert asked_once(engine)
    assert program(question=RAMBLES.question).answer == "2"  # outside of rollouts it may
    assert len(engine.requests) == 2


@pytest.mark.parametrize("path", ["/v1/program", "/v1/program/stream"])
def test_a_served_program_asks_once(path):
    program, engine = compiled_like()
    reply = ask(create_app(program, SERVED), {"inputs": {"question": RAMBLES.question}}, path)
    assert "reply_not_parsed" in reply.text
    assert asked_once(engine)


def test_each_candidate_of_a_served_population_asks_once():
    program, engine = compiled_like()
    settings = ServeSettings(api_key=KEY, signature="question: str -> answer: str", choice="vote", vote_on="answer")
    ask(create_app(program, settings), {"inputs": {"question": RAMBLES.question}})
    assert len(engine.requests) == len({*engine.prompts}) == 2


# ---- scores agree ------------------------------------------------------------------------------------


def evaluated(program, examples=EXAMPLES):
    """The mean score by dspy.Evaluate."""
    evaluate = dspy.Evaluate(devset=examples, metric=right, num_threads=2, display_progress=False, max_errors=99)
    return evaluate(program).score / 100


def scripted_complete(self, request, seed, prompt_ids=None):
    text = says_in(chat_messages(request), seed)
    ids = tuple(range(2, 2 + len(text) % 5))
    response = text_response(request.model, text, "stop", 2, len(ids))
    return Completion(response, (2, 3), ids, (-1.0,) * len(ids), "stop", str(self.weights))


def counts(candidate, reflective_dataset, components_to_update):
    return {name: f"{candidate[name]} Count." for name in components_to_update}


def searched(student, run_dir, valset=None, **recipe):
    """The student after one search in process, nothing of its weights trained."""
    student.set_lm(PolicyLM(BASE, engine="in_process", max_tokens=24))
    one_search = {"method": "gepa", "cycles": 1, "group_size": 2}
    optimizer = FSTOptimizer(metric=right, propose=counts, run_dir=run_dir, **SMALL, **one_search, **recipe)
    return optimizer.compile(student, trainset=EXAMPLES, valset=valset)


@pytest.mark.slow
def test_the_population_s_scores_are_those_of_dspy_s_evaluation_on_the_same_examples(tmp_path, monkeypatch):
    """Replies follow from prompts alone here, so nothing differs by chance."""
    monkeypatch.setattr(InProcessEngine, "complete", scripted_complete)
    compiled = searched(Next(), tmp_path / "run", valset=EXAMPLES, population_size=2, anchors=4, search_rollouts=12)
    saved = dspy_fst.save(compiled, tmp_path / "saved")
    loaded = dspy_fst.load(saved, Next())
    assert compiled.population.scores[0] == 0.5  # the even numbers; with a second call it would be 1
    for program in (compiled, loaded):
        scored = [(of["score"], evaluated(of["program"])) for of in program.candidate_programs]
        assert [score for score, _ in scored] == [score for _, score in scored]
        assert evaluated(program) == compiled.population.scores[0]
        policy_of(program).release()


def test_an_adapter_that_the_program_sets_is_told_before_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(InProcessEngine, "complete", scripted_complete)
    policy_of(searched(SetsItsOwn(), tmp_path / "run", population_size=1, anchors=2, search_rollouts=3)).release()
    notes = [event["text"] for event in read_events(tmp_path / "run") if event["event"] == "note"]
    (told,) = [text for text in notes if "the program sets itself" in text]
    assert told.startswith("predictor 'tell' speaks through XMLAdapter(")
    assert "ChatAdapter(" in told


# ---- said otherwise, by name ---------------------------------------------------------------------------


def test_what_is_said_of_the_program_by_name_counts_before_the_training_and_that_before_dspy_s_settings(caplog):
    program, engine = compiled_like()
    other = dspy_fst.reconfigured(program, adapter=dspy.XMLAdapter())
    with dspy.context(adapter=dspy.JSONAdapter()):
        for one in (program, other, other.candidate_programs[1]["program"]):
            with pytest.raises(AdapterParseError):
                one(question=RAMBLES.question)
    as_trained, *changed = engine.prompts
    assert JSON_FORM not in as_trained
    assert XML_FORM not in as_trained
    assert all(XML_FORM in prompt for prompt in changed)
    assert len(changed) == 2
    assert "was trained through ChatAdapter" in caplog.text


@pytest.mark.usefixtures("dspy_may_be_configured")
def test_an_adapter_that_is_set_for_the_process_changes_nothing():
    program, engine = compiled_like()
    dspy.configure(adapter=dspy.JSONAdapter())
    with pytest.raises(AdapterParseError):
        program(question=RAMBLES.question)
    assert JSON_FORM not in engine.prompts[0]
    assert asked_once(engine)


def test_the_second_call_is_made_where_the_user_wants_it():
    program, engine = compiled_like()
    freer = dspy_fst.reconfigured(program, use_json_adapter_fallback=True)
    for one in (freer, freer.candidate_programs[0]["program"]):
        assert one(question=RAMBLES.question).answer == "2"
        assert [JSON_FORM in prompt for prompt in engine.prompts] == [False, True]
        engine.requests.clear()
    assert evaluated(freer.candidate_programs[0]["program"]) == 1.0
    engine.requests.clear()
    reply = ask(create_app(freer, SERVED), {"inputs": {"question": RAMBLES.question}})
    assert reply.json()["outputs"] == {"answer": "2"}
    assert len(engine.requests) == 2


def test_sampling_is_said_in_every_request_and_changed_by_name():
    program, engine = compiled_like()
    other = dspy_fst.reconfigured(program, temperature=0.0, max_tokens=8)
    for one in (program, other, other.candidate_programs[0]["program"]):
        one(question="2")
    said = [(request.config.temperature, request.config.max_tokens) for request in engine.requests]
    assert said == [(0.7, 24), (0.0, 8), (0.0, 8)]
    assert policy_of(other).handle is policy_of(program).handle
    assert how_it_asks(program) == (
        "through ChatAdapter, temperature 0.7, at most 24 tokens a reply, each reply asked for once"
    )
    unlimited, _ = compiled_like(max_tokens=None)
    assert how_it_asks(unlimited) == (
        "through ChatAdapter, temperature 0.7, replies as long as the context allows, each reply asked for once"
    )


class Cool(Next):
    """Its predictor was made with a temperature and a limit, which DSPy has count before the LM's."""

    def __init__(self):
        super().__init__()
        self.tell = dspy.Predict("question -> answer", temperature=0.3, max_tokens=16)


def sampled(program, engine):
    engine.requests.clear()
    program(question="2")
    ((config,),) = [[request.config for request in engine.requests]]
    return config.temperature, config.max_tokens


def test_what_a_predictor_was_made_with_is_told_and_changed_by_name():
    program, engine = compiled_like(Cool())
    assert sampled(program, engine) == (0.3, 16)
    assert "temperature 0.3, at most 16 tokens" in how_it_asks(program)
    other = dspy_fst.reconfigured(program, temperature=0.0)
    for one in (other, other.candidate_programs[0]["program"]):
        assert sampled(one, engine) == (0.0, 16)
    assert "temperature 0, at most 16 tokens" in how_it_asks(other)
    assert sampled(program, engine) == (0.3, 16)


def test_what_a_predictor_was_made_with_is_saved_and_load_changes_it_by_name(tmp_path):
    program, _ = compiled_like(Cool())
    kept = dspy_fst.save(program, tmp_path / "kept")
    assert sampled(*spoken_by(dspy_fst.load(kept, Cool()))) == (0.3, 16)
    assert sampled(*spoken_by(dspy_fst.load(kept, Cool(), temperature=0.0))) == (0.0, 16)
    assert sampled(*spoken_by(dspy_fst.load(kept, Cool(), temperature=0.0, max_tokens=8))) == (0.0, 8)
    changed = dspy_fst.save(dspy_fst.reconfigured(program, temperature=0.0), tmp_path / "changed")
    loaded = dspy_fst.load(changed, Cool())
    assert sampled(*spoken_by(loaded)) == (0.0, 16)
    assert "temperature 0, at most 16 tokens" in how_it_asks(loaded)


def test_a_program_without_a_policy_is_refused():
    with pytest.raises(ValueError, match="PolicyLM"):
        dspy_fst.reconfigured(Next())


BAD = {
    "no adapter": ({"adapter": "xml"}, ["adapter='xml': pass an adapter, e.g. dspy.XMLAdapter()"]),
    "a number": ({"adapter": 5}, ["adapter=5: pass an adapter"]),
    "an object": ({"adapter": object()}, ["adapter=<object object at"]),
    "a class": (
        {"adapter": dspy.XMLAdapter},
        ["adapter: XMLAdapter is a class; pass an adapter made of it, XMLAdapter(...)"],
    ),
    "below 0": ({"temperature": -1}, ["temperature=-1: it must be a number above 0"]),
    "what vLLM raises": ({"temperature": 0.005}, ["temperature=0.005: vLLM samples at 0.01 instead"]),
    "a text": ({"temperature": "1"}, ["temperature='1': it must be"]),
    "nan": ({"temperature": float("nan")}, ["temperature=nan: it must be"]),
    "no tokens": ({"max_tokens": 0}, ["max_tokens=0: it must be a whole number above 0"]),
    "tokens as text": ({"max_tokens": "5"}, ["max_tokens='5': it must be"]),
    "tokens as truth": ({"max_tokens": True}, ["max_tokens=True: it must be"]),
    "several": (
        {"adapter": "xml", "temperature": -1, "max_tokens": 0, "use_json_adapter_fallback": "no"},
        ["adapter='xml'", "temperature=-1", "max_tokens=0", "use_json_adapter_fallback='no': use True or False"],
    ),
}


@pytest.mark.parametrize("said", BAD)
def test_what_cannot_be_asked_with_is_refused_all_at_once_and_before_a_copy_is_made(said, folder):
    words, wanted = BAD[said]
    program, _ = compiled_like()
    for refusing in (
        lambda: dspy_fst.reconfigured(program, **words),
        lambda: dspy_fst.load(folder, Next(), **words),
    ):
        with pytest.raises(ConfigurationError) as caught:
            refusing()
        assert len(caught.value.faults) == len(wanted)
        assert all(told.startswith(start) for told, start in zip(caught.value.faults, wanted, strict=True))


def test_an_adapter_that_asks_a_policy_is_refused_after_the_training_too(folder):
    program, _ = compiled_like()
    adapter = dspy.TwoStepAdapter(policy_of(program))
    for refusing in (dspy_fst.reconfigured, lambda program, adapter: dspy_fst.load(folder, program, adapter=adapter)):
        with pytest.raises(ConfigurationError, match=r"adapter: TwoStepAdapter asks a PolicyLM \(its extraction_model"):
            refusing(program, adapter=adapter)


def test_load_names_what_is_no_setting_of_the_weights_with_everything_else(folder):
    with pytest.raises(ConfigurationError) as caught:
        dspy_fst.load(folder, Next(), temprature=0, engine="vlm", engine_options=5)
    assert caught.value.faults == (
        "temprature: there is no such setting; did you mean 'temperature'?",
        "engine='vlm' is unknown; use 'auto', 'vllm' or 'in_process'",
        "engine_options=5: pass a dict of the engine's settings",
    )


# ---- saved and loaded ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return dspy_fst.save(compiled_like()[0], tmp_path_factory.mktemp("saved") / "out")


def test_a_loaded_program_asks_as_it_was_trained(folder):
    loaded, engine = spoken_by(dspy_fst.load(folder, Next()))
    with pytest.raises(AdapterParseError):
        loaded(question=RAMBLES.question)
    (request,) = engine.requests
    assert (request.config.temperature, request.config.max_tokens) == (0.7, 24)


def test_load_takes_the_same_words(folder):
    loaded = dspy_fst.load(folder, Next(), temperature=0.0, max_tokens=8, use_json_adapter_fallback=True)
    loaded, engine = spoken_by(loaded)
    assert loaded(question=RAMBLES.question).answer == "2"
    said = [(request.config.temperature, request.config.max_tokens) for request in engine.requests]
    assert said == [(0.0, 8), (0.0, 8)]


def test_what_was_changed_on_purpose_is_saved(folder, tmp_path):
    freer = dspy_fst.reconfigured(dspy_fst.load(folder, Next()), use_json_adapter_fallback=True, temperature=0.0)
    loaded, engine = spoken_by(dspy_fst.load(dspy_fst.save(freer, tmp_path / "freer"), Next()))
    assert loaded(question=RAMBLES.question).answer == "2"
    assert [request.config.temperature for request in engine.requests] == [0.0, 0.0]


def test_dspy_s_own_save_and_load_ask_once_too(tmp_path):
    program, _ = compiled_like()
    program.save(tmp_path / "program.json")
    fresh = Next()
    fresh.load(tmp_path / "program.json", allow_unsafe_lm_state=True)
    _, engine = spoken_by(fresh)
    with pytest.raises(AdapterParseError):
        fresh(question=RAMBLES.question)
    assert asked_once(engine)


# ---- the command ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "line", "calls"),
    [
        ([], "through ChatAdapter, temperature 0.7, at most 24 tokens a reply, each reply asked for once", 1),
        (
            ["--temperature", "0", "--max-tokens", "8", "--json-fallback"],
            "through ChatAdapter, temperature 0, at most 8 tokens a reply, again in JSON where a reply does not parse",
            2,
        ),
    ],
    ids=["as trained", "otherwise"],
)
def test_serve_says_how_it_asks_and_takes_other_words(folder, monkeypatch, options, line, calls):
    served = []
    monkeypatch.setattr("dspy_fst.serve.listening.serve", lambda app, settings: served.append(app))
    named = ["--program", "tests.cases.test_as_trained:Next", "--signature", "question: str -> answer: str"]
    result = CliRunner().invoke(
        app, ["serve", str(folder), *named, "--engine", "in_process", *options], catch_exceptions=False
    )
    assert result.exit_code == 0, result.output
    assert f"asking the model {line}" in result.stderr
    service, engine = served[0].state.service, Engine()
    service.engine = service.policy.handle._engine = engine
    key = service.settings.api_key
    reply = ask(served[0], {"inputs": {"question": RAMBLES.question}}, headers={"Authorization": f"Bearer {key}"})
    assert len(engine.requests) == calls, reply.text


def test_serve_refuses_what_cannot_be_asked_with_all_at_once(folder):
    named = ["--program", "tests.cases.test_as_trained:Next", "--signature", "question: str -> answer: str"]
    result = CliRunner().invoke(
        app, ["serve", str(folder), *named, "--temperature", "0.005", "--max-tokens", "0"], catch_exceptions=False
    )
    assert result.exit_code == 2, result.output
    told = " ".join(result.stderr.split())
    assert "temperature=0.005: vLLM samples at 0.01 instead" in told
    assert "max_tokens=0: it must be a whole number above 0" in told


def test_a_warning_of_the_change_names_both_adapters(caplog):
    program, _ = compiled_like()
    with caplog.at_level(logging.WARNING):
        dspy_fst.reconfigured(program, adapter=dspy.ChatAdapter())
        assert "speaks through" not in caplog.text
        dspy_fst.reconfigured(program, adapter=dspy.JSONAdapter())
    assert "trained through ChatAdapter" in caplog.text
    assert "speaks through JSONAdapter" in caplog.text
