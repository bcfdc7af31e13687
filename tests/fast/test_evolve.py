"""The fast phase on a scripted policy: what it finds, what it reuses, what it stays within."""

from dataclasses import replace

import dspy
import pytest

from dspy_fst.errors import MeasurementError, ReflectionError
from dspy_fst.fast.evolve import evolve
from dspy_fst.fast.journal_protocol import NoJournal
from dspy_fst.fast.rollout_bank import RolloutBank
from dspy_fst.fast.search_settings import SearchSettings
from dspy_fst.outcomes.outcome import Outcome
from dspy_fst.rollout.components import read_texts
from dspy_fst.rollout.reward import Reward
from dspy_fst.rollout.rollout_settings import RolloutSettings
from dspy_fst.rollout.rollouter import Rollouter, Task
from dspy_fst.run.search_journal import Journal
from dspy_fst.types import Candidate, Population, Problem, Rollout
from tests.fakes import fields, scripted_policy

ANCHORS = [Problem(i, dspy.Example(question=str(i), answer="yes").with_inputs("question")) for i in range(12)]
SKILLS = ("even", "odd")


class Two(dspy.Module):
    def __init__(self):
        super().__init__()
        self.first = dspy.Predict(dspy.Signature("question -> hint", "Hint."))
        self.second = dspy.Predict(dspy.Signature("question, hint -> answer", "Answer."))

    def forward(self, question):
        return self.second(question=question, hint=self.first(question=question).hint)


def speak(messages, seed):
    """Answers a question right exactly when the second instruction names its parity."""
    if "## hint ##" in messages[0]["content"].split("[[ ## completed")[0] and "answer" not in messages[0]["content"]:
        return fields(hint="h")
    question = int(messages[-1]["content"].split("## question ## ]]\n")[1].split("\n")[0])
    return fields(answer="yes" if SKILLS[question % 2] in messages[0]["content"] else "no")


def metric(gold, pred, trace=None, pred_name=None, pred_trace=None):
    return dspy.Prediction(score=float(pred.answer == gold.answer), feedback=f"{pred_name} on {gold.question}")


def constant(candidate, reflective_dataset, components_to_update):
    return dict.fromkeys(components_to_update, "nothing")


def lost(problem, candidate, reason):
    return Rollout(problem.index, candidate, (), None, Outcome("masked", reason))


class Searcher:
    """Plays, counts, and proposes a text by turns."""

    def __init__(self, propose=None):
        self.program = Two()
        policy, engine = scripted_policy(speak)
        engine.version = "step-000000"
        self.program.set_lm(policy)
        self.rollouter = Rollouter(self.program, Reward(metric), RolloutSettings(num_threads=4))
        self.asked: list[tuple[str, int]] = []
        self.seen: list[dict] = []
        self.turn = 0
        self.propose = propose or self.by_turns
        self.feedback = lambda e, p, t, n, pt: Reward(metric)(e, p, t, n, pt).feedback

    def play(self, wanted):
        self.asked += [(task.candidate.digest, task.problem.index) for task in wanted]
        return self.rollouter.rollout(wanted, "search")

    def by_turns(self, candidate, reflective_dataset, components_to_update):
        self.seen.append(reflective_dataset)
        self.turn += 1
        return {name: f"{candidate[name]} {SKILLS[self.turn // 2 % 2]}" for name in components_to_update}

    def evolve(self, population=None, journal=None, size=2, budget=60, **settings):
        population = population or Population.of_seed(read_texts(self.program), 2)
        return evolve(
            population,
            ANCHORS,
            self.program,
            play=self.play,
            feedback=self.feedback,
            propose=self.propose,
            journal=journal,
            settings=SearchSettings(**settings),
            size=size,
            budget=budget,
        )


def test_a_search_finds_what_the_feedback_leads_to():
    search = Searcher().evolve()
    assert search.population.scores[0] == 1.0
    assert "even" in search.population.best.texts["second"]
    assert "odd" in search.population.best.texts["second"]


def test_no_rollout_is_made_twice_and_every_one_is_counted():
    searcher = Searcher()
    search = searcher.evolve()
    assert len(searcher.asked) == len(set(searcher.asked)) == search.rollouts
    assert search.repeats > 0


def test_the_whole_population_is_carried_and_scored_once():
    searcher = Searcher()
    seed = read_texts(searcher.program)
    carried = [Candidate({**seed.texts, "second": f"Answer {skill}."}) for skill in SKILLS]
    search = searcher.evolve(Population(tuple(carried), (None, None)))
    assert search.candidates[:2] == tuple(carried)
    for candidate in carried:
        assert searcher.asked.count((candidate.digest, 0)) == 1


def test_complementary_candidates_both_stay():
    searcher = Searcher(propose=constant)
    seed = read_texts(searcher.program)
    carried = [Candidate({**seed.texts, "second": f"Answer {skill}."}) for skill in SKILLS]
    search = searcher.evolve(Population((*carried, seed), (None,) * 3), size=2)
    assert {m.digest for m in search.population.members} == {c.digest for c in carried}


@pytest.mark.parametrize("budget", [6, 30])
def test_the_budget_is_overrun_by_one_accepted_candidate_at_most(budget):
    texts = (f"text {number}" for number in range(10_000))

    def new_every_time(candidate, reflective_dataset, components_to_update):
        return {name: f"even odd {next(texts)}" for name in components_to_update}

    searcher = Searcher(propose=new_every_time)
    search = searcher.evolve(budget=budget, perfect_score=2.0)
    fresh = search.rollouts - len(ANCHORS)
    assert 0 < fresh <= budget + len(ANCHORS) + 3


def test_a_search_with_nothing_left_to_learn_ends():
    searcher = Searcher()
    seed = read_texts(searcher.program)
    solved = Candidate({**seed.texts, "second": "Answer even and odd."})
    search = searcher.evolve(Population((solved,) * 2, (None,) * 2), budget=600)
    assert search.rollouts == len(ANCHORS)
    assert search.population.best == solved


def test_every_predictor_s_feedback_reaches_the_proposer():
    searcher = Searcher()
    searcher.evolve()
    told = {name: record["Feedback"] for data in searcher.seen for name, records in data.items() for record in records}
    assert set(told) == {"first", "second"}
    assert told["first"].startswith("first on")


def test_a_reflection_that_always_fails_stops_the_run_and_says_why():
    def broken(candidate, reflective_dataset, components_to_update):
        raise PermissionError("401 bad api key")

    with pytest.raises(ReflectionError, match="401 bad api key"):
        Searcher(propose=broken).evolve()


def test_a_reflection_that_fails_now_and_then_is_counted():
    searcher = Searcher()
    by_turns = searcher.propose

    def flaky(candidate, reflective_dataset, components_to_update):
        if len(searcher.seen) == 1:
            searcher.seen.append({})
            raise TimeoutError
        return by_turns(candidate, reflective_dataset, components_to_update)

    searcher.propose = flaky
    counts = searcher.evolve().counts
    assert counts["reflections_failed"] == 1
    assert counts["reflections"] > 1


def test_an_outage_on_all_anchors_is_no_result():
    searcher = Searcher()
    searcher.play = lambda wanted: [lost(task.problem, task.candidate, "lm: EngineError") for task in wanted]
    with pytest.raises(MeasurementError, match="lm: EngineError"):
        searcher.evolve()


def test_a_masked_rollout_is_tried_again_when_asked_for_again():
    masks = iter(["timeout", None])

    def play(wanted):
        (task,), mask = wanted, next(masks)
        problem, candidate = task.problem, task.candidate
        return [lost(problem, candidate, mask) if mask else Rollout(problem.index, candidate, (), 1.0)]

    bank, wanted = RolloutBank(play, Two(), NoJournal()), [Task(ANCHORS[0], Candidate({"a": "b"}))]
    assert [bank.get(wanted)[0].reward for _ in range(3)] == [None, 1.0, 1.0]
    assert (len(bank.fresh), bank.repeats) == (2, 1)


def test_predictors_that_share_a_signature_reflect_on_their_own_calls():
    class Twins(dspy.Module):
        def __init__(self):
            super().__init__()
            self.one = dspy.Predict(dspy.Signature("question -> answer", "Answer."))
            self.two = dspy.Predict(dspy.Signature("question -> answer", "Answer."))

        def forward(self, question):
            self.one(question="0")
            return self.two(question=question)

    searcher = Searcher()
    searcher.program = Twins()
    policy, _ = scripted_policy(speak, version="v")
    searcher.program.set_lm(policy)
    searcher.rollouter = Rollouter(searcher.program, Reward(metric), RolloutSettings(num_threads=4))
    searcher.evolve(perfect_score=2.0)
    asked = {name: {r["Inputs"]["question"] for r in data[name]} for data in searcher.seen for name in data}
    assert asked["one"] == {"0"}
    assert asked["two"] != {"0"}


def test_the_reflection_is_told_why_a_run_failed():
    class Trips(Two):
        def forward(self, question):
            return {}[super().forward(question).answer]

    searcher = Searcher()
    searcher.program = Trips()
    policy, _ = scripted_policy(speak, version="v")
    searcher.program.set_lm(policy)
    searcher.rollouter = Rollouter(searcher.program, Reward(metric), RolloutSettings(num_threads=4))
    searcher.evolve()
    told = {record["Feedback"] for data in searcher.seen for records in data.values() for record in records}
    assert told == {"The program failed: 'no'"}


def test_lineage_names_the_parents():
    search = Searcher().evolve()
    digests = {candidate.digest for candidate in search.candidates}
    assert set(search.population.parents) == digests
    assert search.population.parents[search.candidates[0].digest] == ()
    assert all(set(of) <= digests for of in search.population.parents.values())


def test_masked_rollouts_are_counted_and_do_not_move_a_mean():
    searcher = Searcher()
    play = searcher.play

    def lossy(wanted):
        made = play(wanted)
        return [replace(r, reward=None, outcome=Outcome("masked", "timeout")) if r.problem == 0 else r for r in made]

    searcher.play = lossy
    search = searcher.evolve()
    assert search.counts["masked: timeout"] > 0
    seed = next(row for row, c in zip(search.scores, search.candidates, strict=True) if c.texts["second"] == "Answer.")
    assert set(seed) == {0.0}


def test_an_outage_in_the_middle_of_a_search_stops_it_and_only_the_lost_batch_is_played_again(tmp_path):
    def dying(searcher, lives):
        play, batches = searcher.play, iter(range(1000))

        def played(wanted):
            if next(batches) < lives:
                return play(wanted)
            return [lost(task.problem, task.candidate, "lm: EngineError") for task in wanted]

        searcher.play = played
        return searcher

    path = tmp_path / "search.jsonl"
    with pytest.raises(
        MeasurementError, match=r"the last 12 rollouts of the search measured nothing \(lm: EngineError\)"
    ):
        dying(Searcher(constant), 1).evolve(journal=Journal(path, {}))
    assert path.exists()
    mended = Searcher(constant)
    mended.evolve(journal=Journal(path, {}))
    seeds = {(read_texts(mended.program).digest, problem.index) for problem in ANCHORS}
    assert not seeds & set(mended.asked)  # what was measured before the outage is not paid for again


def test_a_proposer_that_gives_no_text_is_a_failed_reflection():
    def numbers(candidate, reflective_dataset, components_to_update):
        return dict.fromkeys(components_to_update, b"bytes")

    with pytest.raises(ReflectionError, match="gave no text for"):
        Searcher(numbers).evolve()
