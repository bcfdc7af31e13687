"""DSPy's own optimizers in GEPA's place: each is really run, and every rollout that it causes is the run's."""

import asyncio
import copy
import itertools
import logging
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import dspy
import pydantic
import pytest
from dspy.teleprompt import Teleprompter

from dspy_fst.errors import FastOptimizerError, MeasurementError
from dspy_fst.fast import requested_rollouts
from dspy_fst.fast.counted_program import different
from dspy_fst.fast.demos import DemoSource, tokens_of_demo
from dspy_fst.fast.search_warnings import search_warnings
from dspy_fst.fast.teleprompter_search import TeleprompterSearch
from dspy_fst.outcomes.outcome import Outcome
from dspy_fst.rollout.chat_adapters import keep
from dspy_fst.rollout.components import MADE_OF, demos_in, problem_mark, read_texts
from dspy_fst.run.search_journal import Journal
from dspy_fst.types import Candidate, Population, Problem
from tests.fakes import fields
from tests.fast.seats import ANCHORS, SKILLS, Asks, Seated


def unused(*_):
    raise AssertionError("the seat's metric stands in for this one")


ZERO_SHOT = {"max_bootstrapped_demos": 0, "max_labeled_demos": 0}
OPTIMIZERS = {
    "COPRO": TeleprompterSearch(dspy.COPRO, breadth=4, depth=2),
    "MIPROv2": TeleprompterSearch(
        dspy.MIPROv2, auto=None, num_candidates=4, num_trials=6, minibatch=False, **ZERO_SHOT
    ),
    "SIMBA": TeleprompterSearch(dspy.SIMBA(metric=unused, bsize=6, num_candidates=3, max_steps=3, max_demos=0)),
}


class Scripted:
    """A fast optimizer that tries these instructions, one after the other, each on the first ``on`` examples."""

    name = "Scripted"

    def __init__(self, *texts, on=12, returns=True):
        self.texts, self.on, self.returns, self.scores = texts, on, returns, []

    def search(self, seat):
        programs = []
        for text in self.texts:
            program = seat.program.deepcopy()
            program.answer.signature = program.answer.signature.with_instructions(text)
            for example in seat.examples[: self.on]:
                self.scores.append(float(seat.metric(example, program(**example.inputs()))))
            programs.append(program)
        return programs[::-1] if self.returns else []


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_improves_the_population_within_its_budget(name):
    seated = Seated()
    search = seated.search(OPTIMIZERS[name], budget=300)
    assert search.optimizer == name
    assert search.population.scores[0] > 0.5 > search.scores[0][0]
    assert search.rollouts == len(seated.made) == len(set(seated.made)) <= 300 + len(ANCHORS)
    assert search.counts["reflection_input_tokens"] == 10 * seated.writer.asked > 0
    assert not search.counts["searches_cut"]


def state(optimizer):
    """A copy of all that an optimizer holds, however deep, in writing; LMs stay the same objects."""
    plain = {name: value for name, value in vars(optimizer).items() if not isinstance(value, dspy.LM)}
    lms = {name: id(value) for name, value in vars(optimizer).items() if isinstance(value, dspy.LM)}
    return copy.deepcopy({name: value for name, value in plain.items() if not callable(value)}), lms


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_leaves_the_program_the_user_s_optimizer_and_dspy_s_settings_as_they_were(name):
    seated, optimizer = Seated(), OPTIMIZERS[name].teleprompter
    held = isinstance(optimizer, Teleprompter)
    before = held and state(optimizer), read_texts(seated.program), dict(dspy.settings.config)
    seated.search(OPTIMIZERS[name])
    assert (held and state(optimizer), read_texts(seated.program), dict(dspy.settings.config)) == before
    assert type(seated.program).__call__ is dspy.Module.__call__


def test_nested_state_of_the_user_s_optimizer_is_not_the_search_s():
    class Keeps(Teleprompter):
        def __init__(self, metric=None):
            self.seen = {"texts": []}

        def compile(self, student, *, trainset):
            self.seen["texts"].append(student.answer.signature.instructions)
            return student

    keeps = Keeps()
    Seated().search(TeleprompterSearch(keeps))
    assert keeps.seen == {"texts": []}


def test_the_same_seed_searches_the_same_and_another_one_otherwise():
    found = [Seated().search(OPTIMIZERS["SIMBA"], seed=seed) for seed in (1, 1, 2)]
    assert found[0].candidates == found[1].candidates
    assert found[0].scores == found[1].scores
    assert found[0].candidates != found[2].candidates


def test_a_search_ends_at_its_budget_and_measures_the_best_of_what_it_tried():
    seated = Seated()
    endless = TeleprompterSearch(dspy.SIMBA(metric=unused, bsize=6, num_candidates=3, max_steps=500, max_demos=0))
    search = seated.search(endless, budget=80)
    assert search.counts["searches_cut"] == 1
    assert search.rollouts == len(seated.made) <= 80 + len(ANCHORS)
    assert search.population.scores[0] > 0.5
    assert all(len(row) == len(ANCHORS) for row in search.scores)


def test_what_was_tried_on_a_few_anchors_is_a_candidate_only_if_it_can_be_measured_on_all():
    even_first = sorted(ANCHORS, key=lambda problem: problem.index % 2)
    optimizer = Scripted("Nothing.", "Nil.", "The even ones.", on=6, returns=False)
    search = Seated().search(optimizer, budget=30, anchors=even_first)
    texts = [candidate.texts["answer"] for candidate in search.candidates]
    assert texts[:2] == ["Answer.", "The even ones."]
    assert len(texts) == 3
    assert search.counts["partly_measured"] == 1


def test_every_text_that_was_tried_on_all_anchors_is_a_candidate():
    texts = [f"Text {number}." for number in range(10)]
    search = Seated().search(Scripted(*texts, returns=False), budget=300, size=2)
    assert {candidate.texts["answer"] for candidate in search.candidates} == {"Answer.", *texts}
    assert search.counts["accepted"] == 10
    assert "partly_measured" not in search.counts
    assert search.rollouts == 11 * len(ANCHORS)


def test_few_of_the_texts_that_were_tried_on_some_anchors_are_measured_on_the_others():
    texts = [f"Text {number}." for number in range(10)]
    search = Seated().search(Scripted(*texts, on=6, returns=False), budget=300, size=2)
    assert search.counts["accepted"] == 4
    assert search.counts["partly_measured"] == 6
    assert search.rollouts == 5 * len(ANCHORS) + 6 * 6


def test_what_an_optimizer_tried_and_did_not_return_is_considered():
    search = Seated().search(Scripted("The even ones.", "The odd ones.", returns=False))
    assert {candidate.texts["answer"] for candidate in search.candidates} == {
        "Answer.",
        "The even ones.",
        "The odd ones.",
    }


def test_the_carried_population_stays_where_nothing_is_better():
    carried = tuple(Candidate({"answer": f"The {skill} ones."}) for skill in SKILLS)
    search = Seated().search(Scripted("Worse."), population=Population(carried, (None, None)))
    assert {member.digest for member in search.population.members} == {each.digest for each in carried}
    assert search.population.parents[search.candidates[2].digest] == (search.population.best.digest,)


def test_the_optimizer_starts_from_the_best_of_the_population():
    class Looks(Scripted):
        def search(self, seat):
            self.shown = [program.answer.signature.instructions for program in seat.incumbents]
            assert seat.program is seat.incumbents[0]
            return []

    looks = Looks()
    texts = ("Nothing.", "The even ones.", "The even and the odd ones.")
    Seated().search(looks, population=Population(tuple(Candidate({"answer": t}) for t in texts), (None,) * 3))
    assert looks.shown == [*reversed(texts)]


def test_a_killed_search_goes_on_without_paying_twice(tmp_path):
    whole, journal = Seated().search(OPTIMIZERS["SIMBA"]), tmp_path / "journal"
    killed = Seated()
    make = killed.play

    def play(wanted):
        if len(killed.made) > 60:
            raise KeyboardInterrupt
        return make(wanted)

    killed.play = play
    with pytest.raises(KeyboardInterrupt):
        killed.search(OPTIMIZERS["SIMBA"], journal=Journal(journal, {"cycle": 0}))
    resumed = Seated()
    search = resumed.search(OPTIMIZERS["SIMBA"], journal=Journal(journal, {"cycle": 0}))
    assert search.candidates == whole.candidates
    assert search.rollouts == whole.rollouts == len(killed.made) + len(resumed.made)
    assert not {*killed.made} & {*resumed.made}


class Twice(Asks):
    """Its second call reads what the first one said: one text in two calls."""

    def forward(self, question):
        return self.answer(question=self.answer(question=question).answer)


def test_a_search_that_goes_on_draws_the_same_demos_of_a_predictor_that_is_called_twice(tmp_path):
    def search():
        def speak(messages, seed):
            return fields(answer="then " + messages[-1]["content"].rsplit("## question ## ]]\n", 1)[1].split("\n")[0])

        seated = Seated(Twice(), speak, metric=lambda gold, pred, *_: 1.0)
        search = seated.search(dspy.BootstrapFewShot, demos=True, journal=Journal(tmp_path / "journal", {"cycle": 0}))
        return search.candidates, seated.made

    (whole, made), (candidates, again) = search(), search()
    assert candidates == whole
    assert made
    assert not again
    assert any("augmented" in candidate.texts["answer.demos[*]"] for candidate in whole)


def test_rollouts_that_the_repeated_search_does_not_ask_for_are_counted_all_the_same(tmp_path):
    first = Seated()
    first.search(Scripted("The even ones."), journal=Journal(tmp_path / "journal", {"cycle": 0}))
    again = Seated()
    search = again.search(Scripted("The odd ones."), journal=Journal(tmp_path / "journal", {"cycle": 0}))
    assert search.counts["rollouts_unused"] == len(ANCHORS)
    assert search.rollouts == len(first.made) + len(again.made) == 3 * len(ANCHORS)


def test_what_a_killed_search_paid_for_prompts_is_counted(tmp_path):
    seated, again = Seated(), Seated()
    seated.search(OPTIMIZERS["COPRO"], journal=Journal(tmp_path / "journal", {"cycle": 0}))
    search = again.search(OPTIMIZERS["COPRO"], journal=Journal(tmp_path / "journal", {"cycle": 0}))
    assert search.counts["reflection_input_tokens"] == 10 * (seated.writer.asked + again.writer.asked)


def test_an_optimizer_that_fails_is_named_with_its_error():
    class Fails(Scripted):
        def search(self, seat):
            raise LookupError("no such tip")

    with pytest.raises(FastOptimizerError, match=r"fast: Scripted failed with LookupError: no such tip.*run_dir"):
        Seated().search(Fails())


@pytest.mark.parametrize(
    "call",
    [
        lambda program: program.answer(question="0"),
        lambda program: program.forward(question="0"),
        lambda program: asyncio.run(program.answer.acall(question="0")),
    ],
    ids=["part", "forward", "acall"],
)
def test_a_call_of_a_part_of_the_program_is_refused_and_never_asks_the_policy(call):
    class CallsPart(Scripted):
        def search(self, seat):
            call(seat.program)

    asked = []

    def counted(messages, seed):
        asked.append(messages)
        return fields(answer="yes")

    with pytest.raises(FastOptimizerError, match="call the program itself"):
        Seated(speak=counted).search(CallsPart(), anchors=ANCHORS[:3])
    assert len(asked) == 3


class Other(dspy.Module):
    def __init__(self):
        super().__init__()
        self.think = dspy.Predict("question -> answer")


class Returns(Scripted):
    def search(self, seat):
        return self.texts[0]


class Compiles(dspy.teleprompt.Teleprompter):
    def __init__(self, returned):
        super().__init__()
        self.returned = returned

    def compile(self, student, *, trainset, **_):
        return self.returned


@pytest.mark.parametrize(
    ("optimizer", "told"),
    [
        (Returns([Other()]), "fast: Returns returned a program with the texts think, and the run's has answer"),
        (Returns([None]), "fast: Returns returned NoneType as a program"),
        (Returns(None), "fast: Returns returned NoneType, no list of programs"),
        (Returns(Asks()), "fast: Returns returned Asks, no list of programs"),
        (Compiles(Other()), "fast: Compiles returned a program with the texts think, and the run's has answer"),
        (Compiles(None), "fast: Compiles returned NoneType as a program"),
    ],
)
def test_an_optimizer_that_returns_no_programs_like_the_run_s_is_told_so(optimizer, told):
    optimizer.name = type(optimizer).__name__
    with pytest.raises(FastOptimizerError, match=told):
        Seated().search(optimizer, anchors=ANCHORS[:3])


def test_a_search_stops_when_nothing_is_measured_any_more():
    seated = Seated()
    make = seated.play

    def play(wanted):
        rollouts = make(wanted)
        if len(seated.made) <= len(ANCHORS):
            return rollouts
        return [replace(rollout, reward=None, outcome=Outcome("masked", "timeout")) for rollout in rollouts]

    seated.play = play
    with pytest.raises(MeasurementError, match="timeout"):
        seated.search(OPTIMIZERS["COPRO"])


def test_a_rollout_that_measured_nothing_is_no_zero_among_the_candidate_s_scores():
    seated = Seated()
    make = seated.play

    def play(wanted):
        return [
            replace(rollout, reward=None, outcome=Outcome("masked", "timeout")) if rollout.problem == 3 else rollout
            for rollout in make(wanted)
        ]

    seated.play = play
    search = seated.search(OPTIMIZERS["COPRO"])
    assert search.counts["unmeasured"] == len(search.candidates) > 1
    assert search.population.scores[0] > 0.5


def test_another_rollout_id_is_another_sample_and_the_same_one_is_not_paid_for_again():
    class Samples(Scripted):
        def search(self, seat):
            example, lm = seat.examples[0], seat.program.answer.lm
            for number in (2, 0, 1, 2):
                program = seat.program.deepcopy()
                program.set_lm(lm.copy(rollout_id=number, temperature=1.0))
                program(**example.inputs())
            return []

    seated = Seated()
    search = seated.search(Samples())
    assert sorted(number for _, problem, number in seated.made if problem == 0) == [0, 1, 2]
    # What scored is handed over to the step after the search, and no other sample.
    assert len([rollout for rollout in search.played if rollout.problem == 0]) == 3
    assert len([rollout for rollout in search.scoring if rollout.problem == 0]) == 1


def test_protected_lines_come_back_before_a_text_is_tried():
    search = Seated().search(Scripted("The even ones."), protected={"answer": ("Answer.",)})
    assert search.candidates[1].texts["answer"] == "The even ones.\nAnswer."
    assert search.counts["lines_restored"] == 1


@pytest.mark.parametrize(("settings", "solved"), [({}, False), ({"metric_threshold": 0.5}, True)])
def test_a_reward_is_a_success_only_from_the_threshold_of_demos_on(settings, solved):
    def half(gold, pred, trace=None):
        return 0.5

    seen = []

    class Judges(Scripted):
        def search(self, seat):
            example = seat.examples[0]
            seen.append(seat.metric(example, seat.program(**example.inputs())))
            return []

    Seated(metric=half).search(Judges(), **settings)
    assert float(seen[0]) == 0.5
    assert bool(seen[0]) is solved


def test_problems_with_the_same_inputs_are_one_anchor():
    twins = [*ANCHORS, Problem(99, dspy.Example(question="0", answer="no").with_inputs("question"))]
    search = Seated().search(Scripted("The even ones."), anchors=twins)
    assert len(search.scores[0]) == len(ANCHORS)
    assert search.counts["anchors_repeated"] == 1
    assert "1 anchors were left out" in search_warnings(search.counts, 0, optimizer="Scripted")[0]


class Long:
    """An input that JSON cannot hold, that has no truth value compared, and that shows a part of itself alone."""

    def __init__(self, number):
        self.number = number

    def __eq__(self, other):
        raise ValueError("the truth value of an array is ambiguous")

    def __repr__(self):
        return "[0 ... 0]"

    def __str__(self):
        return str(self.number)

    def __hash__(self):
        return id(self)


def test_anchors_that_json_cannot_hold_stay_apart():
    problems = [Problem(i, dspy.Example(question=Long(i), answer="yes").with_inputs("question")) for i in range(12)]
    assert different(problems) == problems
    scripted = Scripted("The even ones.")
    search = Seated(metric=lambda gold, pred, trace=None: gold.question.number / 12).search(scripted, anchors=problems)
    assert search.scores[1] == tuple(i / 12 for i in range(12))
    assert scripted.scores == [i / 12 for i in range(12)]
    assert "anchors_repeated" not in +search.counts


def test_the_first_of_equal_problems_stays_in_its_place():
    first, second = ANCHORS[:2]
    assert different([first, second, replace(first, index=7)]) == [first, second]


class Noisy(Teleprompter):
    """Prints and logs while it tries texts, and goes on after the budget is spent until it is let go."""

    def __init__(self, metric=None, started=None, go=None):
        self.started, self.go = started or threading.Event(), go or threading.Event()

    def compile(self, student, *, trainset):
        self.started.set()
        print("noise")
        logging.getLogger("dspy").info("noise")
        try:
            for number in itertools.count():
                program = student.deepcopy()
                program.answer.signature = program.answer.signature.with_instructions(f"Text {number}.")
                program(**trainset[0].inputs())
        finally:
            self.go.wait(30)


def streams():
    return sys.stdout, sys.stderr, logging.getLogger("dspy").level


def test_a_search_that_was_given_up_on_leaves_the_streams_and_the_log_as_they_were(monkeypatch, capsys):
    monkeypatch.setattr(requested_rollouts, "UNWIND_S", 0.1)
    monkeypatch.setattr(requested_rollouts, "LET_GO_S", 0.1)
    before, noisy = streams(), Noisy()
    search = Seated().search(TeleprompterSearch(noisy), budget=20)
    assert search.counts["searches_cut"] == 1
    assert streams() == before
    noisy.go.set()
    assert capsys.readouterr() == ("", "")


def test_overlapping_searches_leave_the_streams_and_the_log_as_they_were(capsys):
    before = streams()
    first, second = Noisy(), Noisy()
    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(Seated().search, TeleprompterSearch(first), budget=20)
        assert first.started.wait(30)
        two = pool.submit(Seated().search, TeleprompterSearch(second), budget=20)
        assert second.started.wait(30)
        print("heard")
        first.go.set()
        one.result()
        second.go.set()
        two.result()
    assert streams() == before
    assert capsys.readouterr() == ("heard\n", "")


def test_demos_are_kept_with_the_mark_of_their_problem_where_candidates_hold_any():
    optimizer = TeleprompterSearch(dspy.BootstrapFewShotWithRandomSearch, num_candidate_programs=2)
    search = Seated().search(optimizer, demos=True)
    demos = [demo for each in search.candidates for demo in demos_in(each.texts["answer.demos[*]"])]
    marks = {problem.example.question: problem_mark(problem.example) for problem in ANCHORS}
    assert {demo.get("augmented", False) for demo in demos} == {True, False}
    assert all(demo[MADE_OF] == marks[demo["question"]] for demo in demos)
    assert all(demo["answer"] == "yes" for demo in demos)
    assert search.rollouts <= 200 + len(ANCHORS)


class Shows(Scripted):
    """Returns the program with the labels of these anchors as demos."""

    def search(self, seat):
        program = seat.program.deepcopy()
        program.answer.demos = [*program.answer.demos, *seat.examples[: self.on]]
        for example in seat.examples:
            program(**example.inputs())
        return [program]


def test_demos_are_cut_to_the_run_s_tokens_before_they_are_tried():
    [one] = [
        demos_in(each.texts["answer.demos[*]"])
        for each in Seated().search(Shows(on=1), demos=True).candidates
        if each.texts["answer.demos[*]"]
    ]
    tokens = tokens_of_demo(one[0], Asks().answer.signature, DemoSource().count_tokens)
    search = Seated().search(Shows(on=5), demos=True, max_demo_tokens=3 * tokens + tokens // 2)
    assert [demo["question"] for demo in demos_in(search.candidates[1].texts["answer.demos[*]"])] == ["0", "1", "2"]
    assert search.counts["demos_cut"] == 2
    assert search.counts["demos_accepted"] == search.counts["accepted"] == 1
    assert search.rollouts == 2 * len(ANCHORS)


def test_demos_that_no_candidate_can_hold_are_told():
    program = Asks()
    program.answer.demos = [dspy.Example(question="7", answer="yes")]
    search = Seated(program).search(Shows(on=2))
    assert search.counts["demos_lost"] == 2  # the user's own is not lost
    [told] = [told for told in search_warnings(search.counts, 0, optimizer="Shows") if "demos" in told]
    assert told.startswith("cycle 0: 2 demos that Shows put into programs were left out")
    assert not search.counts["demos_accepted"]


@pytest.mark.parametrize("fast", [Shows(on=2), dspy.BootstrapFewShot])
def test_a_program_that_was_trained_before_is_counted_too(fast):
    """It keeps its adapter, and its copies must not lose what counts them."""
    program = Asks()
    keep(program, dspy.ChatAdapter())
    search = Seated(program).search(fast, demos=True)
    assert search.counts["demos_accepted"]
    assert search.rollouts > len(ANCHORS)


def test_demos_of_the_user_are_not_cut():
    program = Asks()
    program.answer.demos = [dspy.Example(question="What is long? " * 50, answer="This.")]
    search = Seated(program).search(Shows(on=1), demos=True, max_demo_tokens=1)
    assert len(search.candidates) == 1  # the label is cut, and the user's demo stays
    assert search.counts["demos_cut"] == 1


class ChecksWords(dspy.Module):
    """Between its predictors goes a value that JSON cannot hold."""

    def __init__(self):
        super().__init__()
        self.answer = dspy.Predict(dspy.Signature("question -> answer", "Answer."))
        checks = {"words": (set[str], dspy.InputField()), "answer": (str, dspy.OutputField())}
        self.check = dspy.Predict(dspy.Signature(checks, "Check."))

    def forward(self, question):
        return self.check(words={self.answer(question=question).answer})


class ShowsWords(Scripted):
    """Writes such a demo itself."""

    def search(self, seat):
        program = seat.program.deepcopy()
        program.check.demos = [dspy.Example(words={"yes"}, answer="yes")]
        program(**seat.examples[0].inputs())
        return [program]


def always_yes(messages, seed):
    return fields(answer="yes")


def test_a_call_that_json_cannot_hold_gives_no_demo_and_is_counted():
    bootstrap = TeleprompterSearch(dspy.BootstrapFewShot, max_bootstrapped_demos=2, max_labeled_demos=0)
    search = Seated(ChecksWords(), always_yes).search(bootstrap, demos=True, anchors=ANCHORS[:4])
    texts = search.candidates[1].texts
    assert len(demos_in(texts["answer.demos[*]"])) == 2
    assert texts["check.demos[*]"] == ""
    assert search.counts["demos_not_written"] == 1  # each run's second predictor was called with the same words
    search = Seated(ChecksWords(), always_yes).search(ShowsWords(), demos=True, anchors=ANCHORS[:4])
    assert search.counts["demos_not_written"] == 1
    assert len(search.candidates) == 1


def test_texts_that_json_has_spoilt_are_mended_or_refused_as_gepa_s():
    search = Seated().search(Scripted("Use \frac{1}{2} for even ones.", "Use \x00."), anchors=ANCHORS[:4])
    assert [each.texts["answer"] for each in search.candidates] == ["Answer.", "Use \\frac{1}{2} for even ones."]
    assert search.counts["texts_mended"] == search.counts["texts_refused"] == 1
    assert search.rollouts == 8


def test_the_user_s_own_demos_come_back_first_once_and_without_a_mark():
    program = Asks()
    own = [{"question": "100", "answer": "maybe"}, {"question": "1", "answer": "yes"}]
    program.answer.demos = [dspy.Example(**demo) for demo in own]
    optimizer = TeleprompterSearch(dspy.BootstrapFewShotWithRandomSearch, num_candidate_programs=2)
    search = Seated(program).search(optimizer, demos=True)
    shown = [demos_in(each.texts["answer.demos[*]"]) for each in search.candidates]
    assert all(demos[:2] == own for demos in shown)
    assert all(MADE_OF in demo for demos in shown for demo in demos[2:])
    assert max(map(len, shown)) > 2


class Pair(pydantic.BaseModel):
    one: int


INPUTS = {"tuple": lambda i: (i, i), "list": lambda i: [i, i], "model": lambda i: Pair(one=i)}


@pytest.mark.parametrize("made", INPUTS.values(), ids=INPUTS)
def test_no_rollout_is_shown_a_label_of_its_own_problem_whatever_its_inputs_are(made):
    asks = {"question": (type(made(0)), dspy.InputField()), "answer": (str, dspy.OutputField())}

    class AsksOf(dspy.Module):
        def __init__(self):
            super().__init__()
            self.answer = dspy.Predict(dspy.Signature(asks))

        def forward(self, question):
            return self.answer(question=question)

    def asked(messages, seed):
        shown.append(sum(message["role"] == "user" for message in messages) - 1)
        return fields(answer="yes")

    shown = []
    anchors = [Problem(i, dspy.Example(question=made(i), answer="yes").with_inputs("question")) for i in range(6)]
    search = Seated(AsksOf(), asked).search(TeleprompterSearch(dspy.LabeledFewShot, k=3), demos=True, anchors=anchors)
    assert len(demos_in(search.candidates[1].texts["answer.demos[*]"])) == 3
    assert sorted(shown) == [0] * 6 + [2] * 3 + [3] * 3
