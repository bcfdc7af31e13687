"""The fast phase on a scripted policy: what it finds, what it reuses, what it stays within."""

import dspy
import pytest

from dspy_fst.fast.evolve import SearchSettings, evolve
from dspy_fst.rollout.player import Player, PlayerSettings, Task
from dspy_fst.rollout.reward import Reward
from dspy_fst.rollout.texts import read_texts
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


class Searcher:
    """Plays, counts, and proposes a text by turns."""

    def __init__(self, propose=None):
        self.program = Two()
        policy, engine = scripted_policy(speak)
        engine.version = "step-000000"
        self.program.set_lm(policy)
        self.player = Player(self.program, Reward(metric), PlayerSettings(threads=4))
        self.asked: list[tuple[str, int]] = []
        self.seen: list[dict] = []
        self.turn = 0
        self.propose = propose or self.by_turns

    def play(self, wanted):
        self.asked += [(candidate.digest, problem.index) for problem, candidate in wanted]
        return self.player.play([Task(problem, candidate) for problem, candidate in wanted], "search")

    def by_turns(self, candidate, reflective_dataset, components_to_update):
        self.seen.append(reflective_dataset)
        self.turn += 1
        return {name: f"{candidate[name]} {SKILLS[self.turn // 2 % 2]}" for name in components_to_update}

    def evolve(self, population=None, **settings):
        population = population or Population.of_seed(read_texts(self.program), 2)
        return evolve(
            population,
            ANCHORS,
            self.program,
            play=self.play,
            feedback=lambda e, p, t, n, pt: Reward(metric)(e, p, t, n, pt).feedback,
            propose=self.propose,
            settings=SearchSettings(**{"size": 2, "budget": 60, **settings}),
        )


def test_a_search_finds_what_the_feedback_leads_to():
    search = Searcher().evolve()
    assert search.population.scores[0] == 1.0
    assert "even" in search.population.best.texts["second"]
    assert "odd" in search.population.best.texts["second"]


def test_no_rollout_is_made_twice_and_every_one_is_counted():
    searcher = Searcher()
    search = searcher.evolve()
    assert len(searcher.asked) == len(set(searcher.asked)) == len(search.rollouts)
    assert search.reused > 0


def test_the_whole_population_is_carried_and_scored_once():
    searcher = Searcher()
    seed = read_texts(searcher.program)
    carried = [Candidate({**seed.texts, "second": f"Answer {skill}."}) for skill in SKILLS]
    search = searcher.evolve(Population(tuple(carried), (None, None)))
    assert search.candidates[:2] == tuple(carried)
    for candidate in carried:
        assert searcher.asked.count((candidate.digest, 0)) == 1


def test_complementary_candidates_both_stay():
    searcher = Searcher(propose=lambda candidate, data, names: dict.fromkeys(names, "nothing"))
    seed = read_texts(searcher.program)
    carried = [Candidate({**seed.texts, "second": f"Answer {skill}."}) for skill in SKILLS]
    search = searcher.evolve(Population((*carried, seed), (None,) * 3), size=2)
    assert {m.digest for m in search.population.members} == {c.digest for c in carried}


@pytest.mark.parametrize("budget", [6, 30])
def test_the_budget_is_overrun_by_one_accepted_candidate_at_most(budget):
    search = Searcher().evolve(budget=budget)
    fresh = len(search.rollouts) - len(ANCHORS)
    assert budget - 3 <= fresh <= budget + len(ANCHORS) + 3 or search.counts["reflections"] * 3 >= budget - 3


def test_a_search_with_nothing_left_to_learn_ends():
    searcher = Searcher()
    seed = read_texts(searcher.program)
    solved = Candidate({**seed.texts, "second": "Answer even and odd."})
    search = searcher.evolve(Population((solved,) * 2, (None,) * 2), budget=600)
    assert len(search.rollouts) == len(ANCHORS)
    assert search.population.best == solved


def test_every_predictor_s_feedback_reaches_the_proposer():
    searcher = Searcher()
    searcher.evolve()
    told = {name: record["Feedback"] for data in searcher.seen for name, records in data.items() for record in records}
    assert set(told) == {"first", "second"}
    assert told["first"].startswith("first on")


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
        return [Rollout(r.problem, r.candidate, (), None, mask="timeout") if r.problem == 0 else r for r in made]

    searcher.play = lossy
    search = searcher.evolve()
    assert search.counts["masked: timeout"] > 0
    seed = next(row for row, c in zip(search.scores, search.candidates, strict=True) if c.texts["second"] == "Answer.")
    assert set(seed) == {0.0}
