"""A search on a scripted policy: masked anchors, forms of adapters, texts that JSON spoilt."""

import dspy
import pytest
from dspy.adapters.baml_adapter import BAMLAdapter
from dspy.utils import DummyLM

from dspy_fst.fast.evolve import evolve
from dspy_fst.fast.latex_repair import repair_latex
from dspy_fst.fast.search_settings import SearchSettings
from dspy_fst.fast.search_warnings import search_warnings
from dspy_fst.outcomes.outcome import Outcome
from dspy_fst.rollout.components import read_texts
from dspy_fst.rollout.reward import Reward
from dspy_fst.rollout.rollout_settings import RolloutSettings
from dspy_fst.rollout.rollouter import Rollouter
from dspy_fst.types import Population, Problem, Rollout
from tests.fakes import fields, scripted_policy

ANCHORS = [Problem(i, dspy.Example(question=str(i), answer="yes").with_inputs("question")) for i in range(6)]


class Asks(dspy.Module):
    def __init__(self):
        super().__init__()
        self.solve = dspy.Predict(dspy.Signature("question -> answer", "Answer."))

    def forward(self, question):
        return self.solve(question=question)


def search(
    propose,
    *,
    speak=lambda m, s: fields(answer="no"),
    masked=lambda p, c, nth: False,
    size=2,
    budget=24,
    seed=1,
    **settings,
):
    """A search in which ``masked(problem, candidate, how often asked)`` says which rollouts measure nothing."""
    program = Asks()
    program.set_lm(scripted_policy(speak, version="step-000000")[0])
    metric = Reward(lambda gold, pred, trace=None: float(pred.answer == gold.answer))
    rollouter = Rollouter(program, metric, RolloutSettings(num_threads=2))
    asked = []

    def play(wanted):
        played = rollouter.rollout(wanted, "search")
        given = []
        for task, rollout in zip(wanted, played, strict=True):
            problem, candidate = task.problem, task.candidate
            nth = asked.count((problem.index, candidate.digest))
            asked.append((problem.index, candidate.digest))
            lost = masked(problem.index, candidate.texts["solve"], nth)
            given.append(Rollout(problem.index, candidate, (), None, Outcome("masked", "timeout")) if lost else rollout)
        return given

    return evolve(
        Population.of_seed(read_texts(program), 2),
        ANCHORS,
        program,
        play=play,
        feedback=lambda *_: "wrong",
        propose=propose,
        settings=SearchSettings(**settings),
        size=size,
        budget=budget,
        seed=seed,
    )


def better(candidate, reflective_dataset, components_to_update):
    return dict.fromkeys(components_to_update, "Say yes.")


def half_right(messages, seed):
    """Right under the proposal, but for the questions 0 to 2."""
    said = messages[-1]["content"].split("## question ## ]]\n")[1][0]
    return fields(answer="yes" if "Say yes." in messages[0]["content"] and said in "345" else "no")


def test_what_was_masked_in_a_minibatch_is_asked_again_and_measured():
    """Masked are the questions of the proposal's minibatch that it gets wrong: the others' mean is 1."""
    asked = []

    def masked(problem, text, nth):
        asked.append(text)
        return problem < 3 and text == "Say yes." and asked.count(text) <= 3

    found = search(better, speak=half_right, masked=masked, budget=3)
    assert (found.counts["accepted"], found.counts["unmeasured"]) == (1, 0)
    assert found.counts["masked: timeout"] > 0
    assert found.candidates[1].texts["solve"] == "Say yes."
    assert found.scores[1] == (0.0, 0.0, 0.0, 1.0, 1.0, 1.0)


def test_an_anchor_that_was_never_measured_wins_no_place_in_the_frontier():
    """Its parent was measured there and stays; with an invented score the proposal would be better everywhere."""

    def speak(messages, seed):
        said = messages[-1]["content"].split("## question ## ]]\n")[1][0]
        new = "Say yes." in messages[0]["content"]
        return fields(answer="yes" if said in ("35" if new else "5") else "no")

    found = search(better, speak=speak, masked=lambda p, text, nth: p in (0, 1, 2) and text == "Say yes.", budget=3)
    assert (found.counts["accepted"], found.counts["unmeasured"]) == (1, 3)
    assert found.scores[1] == pytest.approx(
        (2 / 3, 2 / 3, 2 / 3, 1.0, 0.0, 1.0)
    )  # its mean is shown, and not chosen by
    assert [member.texts["solve"] for member in found.population.members] == ["Say yes.", "Answer."]


def test_a_proposal_is_not_accepted_for_what_was_masked():
    found = search(better, masked=lambda p, text, nth: p > 0 and text == "Answer.")
    assert found.counts["accepted"] == 0


ADAPTERS = {
    "chat": (dspy.ChatAdapter, "[[ ## answer ## ]]"),
    "json": (dspy.JSONAdapter, '"answer": "{answer}"'),
    "baml": (BAMLAdapter, "Respond with a JSON object"),
    "xml": (dspy.XMLAdapter, "<answer>"),
    "two steps": (lambda: dspy.TwoStepAdapter(DummyLM([{"x": "y"}] * 999)), "understood by another agent"),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_reply_that_does_not_parse_is_reflected_on_with_the_form_of_the_adapter_in_force(name):
    make, form = ADAPTERS[name]
    told = []

    def proposes(candidate, reflective_dataset, components_to_update):
        told.extend(record["Feedback"] for record in reflective_dataset["solve"])
        return better(candidate, reflective_dataset, components_to_update)

    with dspy.context(adapter=make()):
        adapter = dspy.settings.adapter
        search(proposes, speak=lambda m, s: "nonsense", budget=6)
        asked_for = adapter.format(Asks().solve.signature, [], {})[0]["content"]
    assert told
    assert all(asked_for in feedback for feedback in told)
    assert form in told[0]
    assert ("Respond with the corresponding output fields, starting with the field" in told[0]) == (name == "chat")


class OwnAdapter(Asks):
    """Sets an adapter for its one call."""

    def forward(self, question):
        with dspy.context(adapter=dspy.XMLAdapter()):
            return self.solve(question=question)


def test_an_adapter_that_the_program_sets_itself_is_the_one_in_force(monkeypatch):
    monkeypatch.setattr("tests.cases.test_fast_search.Asks", OwnAdapter)
    told = []

    def proposes(candidate, reflective_dataset, components_to_update):
        told.extend(record["Feedback"] for record in reflective_dataset["solve"])
        return better(candidate, reflective_dataset, components_to_update)

    search(proposes, speak=lambda m, s: "nonsense", budget=6)
    assert "<answer>" in told[0]


SPOILT = "Give \x0crac{1}{2} in \x08oxed{}, never 3 \times 4."


def test_latex_that_json_spoilt_is_mended_and_counted():
    def spoils(candidate, reflective_dataset, components_to_update):
        return dict.fromkeys(components_to_update, f"Say yes. {SPOILT}")

    found = search(spoils, speak=half_right)
    texts = {candidate.texts["solve"] for candidate in found.candidates}
    assert texts == {"Answer.", r"Say yes. Give \frac{1}{2} in \boxed{}, never 3 \times 4."}
    assert found.counts["texts_mended"] > 0
    assert found.counts["texts_refused"] == 0


@pytest.mark.parametrize(
    "text",
    [
        "Answer:\tan integer",
        "first line\neg 5 apples",
        "top\tau",
        "name\ttext\tto",
        "It costs $5.\neg 6 apples are $7.",
        "Price: $5\tan apple\tcosts $6.",
        "Two lines:\n\tindented\r\nright",
    ],
)
def test_ordinary_tabs_and_line_ends_are_left_as_they_are(text):
    assert repair_latex(text) == text


@pytest.mark.parametrize(
    ("spoilt", "meant"),
    [
        ("Write $\times$ or $\tan x$.", r"Write $\times$ or $\tan x$."),
        ("It costs $5. Write $x \neq 0$.", r"It costs $5. Write $x \neq 0$."),
        ("\\(a \to b\\), $$\neg p$$", r"\(a \to b\), $$\neg p$$"),
        ("\\left(1\right)", r"\left(1\right)"),
        ("Use \textbf{one} word", r"Use \textbf{one} word"),
        ("the angle \x07lpha of \x0bec{v}", r"the angle \alpha of \vec{v}"),
    ],
)
def test_what_can_only_be_latex_is_mended(spoilt, meant):
    assert repair_latex(spoilt) == meant


def test_a_text_with_other_control_characters_is_refused_and_counted():
    def spoils(candidate, reflective_dataset, components_to_update):
        return dict.fromkeys(components_to_update, "Say yes. \x1b[31m")

    found = search(spoils, speak=half_right)
    assert {candidate.texts["solve"] for candidate in found.candidates} == {"Answer."}
    assert found.counts["texts_refused"] > 0


def test_what_a_search_changed_or_left_open_is_told():
    counts = {"reflections": 3, "texts_mended": 2, "texts_refused": 1, "unmeasured": 4}
    told = "\n".join(search_warnings(counts, 1))
    assert "cycle 1: 2 proposed texts held LaTeX that JSON had spoilt" in told
    assert "cycle 1: 1 proposed texts held control characters and were refused" in told
    assert "cycle 1: 4 scores of candidates on anchors are missing" in told
    assert search_warnings({"reflections": 1}, 0) == []
    assert "nothing was reflected on" in search_warnings({}, 0)[0]
