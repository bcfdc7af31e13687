"""Demos that a search draws: from its own rollouts or from labels, within bounds, and the same after a kill."""

import itertools
from typing import Any

import dspy
import pytest

from dspy_fst.fast.demos import AUGMENTED, DemoDraws, DemoSource
from dspy_fst.fast.evolve import Search, evolve
from dspy_fst.fast.journal_protocol import SearchJournal
from dspy_fst.fast.reporting import cycle_report
from dspy_fst.fast.search_settings import SearchSettings, own_texts
from dspy_fst.fast.search_warnings import search_warnings
from dspy_fst.outcomes.outcome import Outcome
from dspy_fst.report.costs import costs_of
from dspy_fst.rollout.components import MADE_OF, demos_in, demos_of, is_demos, problem_mark, written_demos
from dspy_fst.rollout.reward import Reward
from dspy_fst.rollout.rollout_settings import RolloutSettings
from dspy_fst.rollout.rollouter import Rollouter
from dspy_fst.run.search_journal import Journal
from dspy_fst.types import PREDICTOR_TAG, Candidate, Population, Problem, Rollout
from tests.fakes import fields, scripted_policy
from tests.run.test_journal import Counting, KilledError, Killing

ANCHORS = [Problem(i, dspy.Example(question=str(i), answer="yes").with_inputs("question")) for i in range(12)]
TRAINSET = [dspy.Example(question=str(i), answer="yes").with_inputs("question") for i in range(12, 18)]
OWN = dspy.Example(question="100", answer="maybe")
SAY = demos_of("say")
LUCKY = (0, 1)
"""Questions that are answered right without a demo."""


class Says(dspy.Module):
    def __init__(self, own: bool = False) -> None:
        super().__init__()
        self.say = dspy.Predict(dspy.Signature("question -> answer", "Say it."))
        self.say.demos = [OWN] if own else []

    def forward(self, question: str) -> dspy.Prediction:
        return self.say(question=question)


def questions(messages: list[dict[str, Any]]) -> list[int]:
    users = [message["content"] for message in messages if message["role"] == "user"]
    return [int(text.partition("## question ## ]]\n")[2].split("\n")[0]) for text in users]


def speak(messages: list[dict[str, Any]], seed: int) -> str:
    """Answers right exactly when a demo shows another question of the same parity."""
    *shown, asked = questions(messages)
    return fields(answer="yes" if asked in LUCKY or asked % 2 in {q % 2 for q in shown if q < 100} else "no")


def right(gold: dspy.Example, pred: dspy.Prediction, trace: object = None) -> float:
    return float(pred.answer == gold.answer)


class Searcher:
    """One search over a scripted policy. The proposer's texts never help, and it says what it was shown."""

    def __init__(self, own: bool = False) -> None:
        self.program = Says(own)
        policy, _ = scripted_policy(speak, version="step-000000")
        self.program.set_lm(policy)
        self.rollouter = Rollouter(self.program, Reward(right), RolloutSettings(num_threads=2))
        self.asked: list[tuple[str, int]] = []
        self.proposed: list[str] = []

    def play(self, wanted: Any) -> list[Rollout]:
        self.asked += [(task.candidate.digest, task.problem.index) for task in wanted]
        return self.rollouter.rollout(wanted, "search")

    def propose(
        self, candidate: dict[str, str], reflective_dataset: dict[str, Any], components_to_update: list[str]
    ) -> dict[str, str]:
        self.proposed += [*components_to_update, *reflective_dataset]
        return {"say": f"{candidate['say']} Again.", SAY: "[1]"}  # what it is not asked for is not taken

    def search(self, journal: SearchJournal | None = None, **settings: Any) -> Search:
        recipe = SearchSettings(**{"reflection_minibatch": 4, "perfect_score": 1.0, **settings})
        return evolve(
            Population.of_seed(own_texts(self.program, recipe), 2),
            ANCHORS,
            self.program,
            play=self.play,
            feedback=lambda *shown: "",
            propose=self.propose,
            demo_source=DemoSource(TRAINSET),
            journal=journal,
            settings=recipe,
            size=2,
            budget=100,
            seed=3,
        )


@pytest.fixture(scope="module")
def bootstrapped() -> tuple[Searcher, Search]:
    searcher = Searcher(own=True)
    return searcher, searcher.search(max_bootstrapped_demos=3)


def test_a_search_finds_the_demos_that_help(bootstrapped: tuple[Searcher, Search]) -> None:
    _, search = bootstrapped
    assert search.scores[0] == tuple(float(i in LUCKY) for i in range(12))
    assert search.population.scores[0] == 1.0
    assert search.counts["demo_proposals"] > 1
    # No other instruction helps.
    assert search.counts["demos_accepted"] == search.counts["accepted"] > 0
    parities = {int(demo["question"]) % 2 for demo in demos_in(search.population.best.texts[SAY])[1:]}
    assert parities == {0, 1}


def test_demos_are_calls_of_rollouts_that_scored_and_name_their_problem(bootstrapped: tuple[Searcher, Search]) -> None:
    _, search = bootstrapped
    scored = {(r.problem, r.reward) for r in search.played}
    drawn = [demo for c in search.candidates for demo in demos_in(c.texts[SAY])[1:]]
    assert drawn
    for demo in drawn:
        assert demo[AUGMENTED] is True
        assert demo["answer"] == "yes"
        assert (int(demo["question"]), 1.0) in scored
        assert demo[MADE_OF] == problem_mark(ANCHORS[int(demo["question"])].example)


def test_the_proposer_is_never_asked_for_demos_and_its_own_are_not_taken(bootstrapped: tuple[Searcher, Search]) -> None:
    searcher, search = bootstrapped
    assert set(searcher.proposed) == {"say"}
    assert search.counts["reflections"] > 0  # the two kinds of text take turns
    assert not any(candidate.texts[SAY] == "[1]" for candidate in search.candidates)


def test_the_user_s_own_demos_stay_and_stay_first(bootstrapped: tuple[Searcher, Search]) -> None:
    _, search = bootstrapped
    assert {candidate.texts[SAY].split("\n")[0] for candidate in search.candidates} == {written_demos([OWN])}


def test_labeled_demos_are_the_trainset_s() -> None:
    search = Searcher().search(max_labeled_demos=2)
    demos = [demo for c in search.candidates for demo in demos_in(c.texts[SAY])]
    assert {demo["question"] for demo in demos} <= {example.question for example in TRAINSET}
    assert max(len(demos_in(c.texts[SAY])) for c in search.candidates) <= 2
    assert search.population.scores[0] == 1.0
    assert not any(AUGMENTED in demo for demo in demos)


def test_without_the_settings_no_candidate_holds_demos() -> None:
    search = Searcher(own=True).search()
    assert not any(is_demos(name) for c in search.candidates for name in c.texts)
    assert not any("demo" in name for name in search.counts)


@pytest.mark.parametrize("keep_last", [True, False], ids=["after", "before"])
def test_a_killed_search_goes_on_with_the_same_draws(tmp_path: Any, keep_last: bool) -> None:
    settings: dict[str, Any] = {"max_bootstrapped_demos": 2, "max_labeled_demos": 2, "proposals_at_once": 2}
    counting, whole = Counting(), Searcher()
    wanted = whole.search(counting, **settings)
    assert wanted.counts["demo_proposals"] > 2
    for acts in range(1, counting.acts, 5):
        path = tmp_path / f"{acts}.jsonl"
        first, then = Searcher(), Searcher()
        with pytest.raises(KilledError):
            first.search(Killing(path, acts, keep_last), **settings)
        found = then.search(Journal(path, {"cycle": 0}), **settings)
        assert (found.candidates, found.scores, found.counts) == (wanted.candidates, wanted.scores, wanted.counts)


# ---- the draws -------------------------------------------------------------------------------------


def scored(problem: Problem, reward: float | None, predictor: dspy.Predict, answer: Any = "yes") -> Rollout:
    said = dspy.Prediction(answer=answer, extra="not a field")
    trace = ((predictor, {"question": problem.example.question}, said),)
    outcome = Outcome("masked", "timeout") if reward is None else Outcome("scored")
    return Rollout(problem.index, Candidate({"say": ""}), (), reward, outcome, trace=trace)


def draws_of(rollouts: list[Rollout], trainset: list[dspy.Example] = TRAINSET, **settings: Any) -> DemoDraws:
    return DemoDraws(Says(), ANCHORS, rollouts, SearchSettings(**settings), DemoSource(trainset), seed=0)


def tagged() -> dspy.Predict:
    predictor = Says().say
    setattr(predictor, PREDICTOR_TAG, "say")
    return predictor


def walked(draws: DemoDraws, steps: int = 60, text: str = "") -> list[list[dict[str, Any]]]:
    """The demos after each draw of a walk."""
    found = []
    for step in range(steps):
        new = draws.drawn(SAY, text, f"key {step}")
        text = text if new is None else new
        found.append(demos_in(text))
    return found


def test_each_kind_keeps_to_its_number_and_no_problem_is_shown_twice() -> None:
    rollouts = [scored(problem, 1.0, tagged()) for problem in ANCHORS[:6]]
    walk = walked(draws_of(rollouts, max_bootstrapped_demos=2, max_labeled_demos=3))
    kinds = [[demo.get(AUGMENTED, False) for demo in demos] for demos in walk]
    assert max(sum(kind) for kind in kinds) == 2
    assert max(len(kind) - sum(kind) for kind in kinds) == 3
    assert all(len({demo[MADE_OF] for demo in demos}) == len(demos) for demos in walk)
    lengths = [len(demos) for demos in walk]
    changes = {b - a for a, b in itertools.pairwise(lengths)}
    assert {-1, 0, 1} <= changes  # dropped, swapped, added


def test_one_draw_adds_no_two_demos_of_a_problem() -> None:
    """Each problem was answered right in two ways."""
    rollouts = [scored(problem, 1.0, tagged(), answer) for problem in ANCHORS[:3] for answer in ("yes", "yes, indeed")]
    draws = draws_of(rollouts, max_bootstrapped_demos=6)
    drawn = [demos_in(draws.drawn(SAY, "", f"key {i}") or "") for i in range(60)]
    assert {len(demos) for demos in drawn} == {1, 2, 3}
    assert all(len({demo[MADE_OF] for demo in demos}) == len(demos) for demos in drawn)


def test_the_tokens_of_a_demo_are_counted_once_in_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[str] = []
    count_tokens = DemoSource.count_tokens

    def watched(self: DemoSource, text: str) -> int:
        counted.append(text)
        return count_tokens(self, text)

    monkeypatch.setattr(DemoSource, "count_tokens", watched)
    source, rollouts = DemoSource(TRAINSET), [scored(problem, 1.0, tagged()) for problem in ANCHORS]
    settings = SearchSettings(max_bootstrapped_demos=3, max_labeled_demos=3)
    walks = [walked(DemoDraws(Says(), ANCHORS, rollouts, settings, source, seed=0)) for _ in range(2)]
    assert walks[0] == walks[1]
    assert len(counted) == len(TRAINSET) + len(ANCHORS)


def test_no_draw_takes_out_a_demo_of_the_user() -> None:
    rollouts = [scored(problem, 1.0, tagged()) for problem in ANCHORS[:6]]
    draws = draws_of(rollouts, max_bootstrapped_demos=3, max_demo_tokens=60)
    walk = walked(draws, text=written_demos([OWN, OWN]))
    assert all(demos[:2] == [dict(OWN)] * 2 for demos in walk)
    assert len({len(demos) for demos in walk}) > 1
    assert max(map(len, walk)) < 2 + 3  # the budget leaves no room for three


def test_only_rollouts_from_the_threshold_on_give_demos() -> None:
    rollouts = [scored(ANCHORS[i], reward, tagged()) for i, reward in enumerate((0.2, 0.5, 1.0, None))]
    assert _questions(walked(draws_of(rollouts, max_bootstrapped_demos=4))) == {"2"}
    assert _questions(walked(draws_of(rollouts, max_bootstrapped_demos=4, metric_threshold=0.5))) == {"1", "2"}


def _questions(walk: list[list[dict[str, Any]]]) -> set[str]:
    return {demo["question"] for demos in walk for demo in demos}


def test_demos_are_drawn_within_the_budget_of_tokens() -> None:
    """Every second demo is long."""
    rollouts = [scored(problem, 1.0, tagged(), "yes" * (1 + problem.index % 2 * 100)) for problem in ANCHORS]
    measure = draws_of([], max_bootstrapped_demos=6)
    short, long = (measure._tokens("say", {"question": "1", "answer": "yes" * times}) for times in (1, 101))
    assert long > 2 * short
    draws = draws_of(rollouts, max_bootstrapped_demos=6, max_demo_tokens=long + short + short // 2)
    walk = walked(draws, steps=200)
    totals = [sum(draws._tokens("say", demo) for demo in demos) for demos in walk]
    assert max(totals) <= long + short + short // 2
    assert {len(demo["answer"]) for demos in walk for demo in demos} == {3, 303}
    assert max(map(len, walk)) > 2  # short ones alone
    assert draws.counts["demo_proposals"] == 200  # each draw changes something
    assert not draws.counts["demos_cut"]


def test_demos_above_the_budget_are_counted_once_and_never_drawn() -> None:
    rollouts = [scored(problem, 1.0, tagged()) for problem in ANCHORS[:5]]
    draws = draws_of(rollouts, max_bootstrapped_demos=6, max_labeled_demos=6, max_demo_tokens=1)
    for key in ("a", "b"):
        assert not draws.can_change(SAY, "")
        assert draws.drawn(SAY, "", key) is None
    assert draws.counts == {"demos_cut": 5 + len(TRAINSET)}
    shown = draws_of(rollouts, max_bootstrapped_demos=6).drawn(SAY, "", "a") or ""
    assert draws.can_change(SAY, shown)  # one that is shown can be dropped
    assert len(demos_in(draws.drawn(SAY, shown, "a") or "")) == len(demos_in(shown)) - 1


def test_demos_that_cannot_fit_take_no_turn() -> None:
    without, search = Searcher().search(), Searcher().search(max_bootstrapped_demos=3, max_demo_tokens=1)
    assert search.counts["demos_cut"] > 0
    assert search.counts["reflections"] == without.counts["reflections"] > 10
    silent = [search_warnings(counts, 0) for counts in (without.counts, {**search.counts, "demo_proposals": 1})]
    assert silent == [[], []]
    (told,) = search_warnings(search.counts, 0)
    assert f"no proposal changed demos: {search.counts['demos_cut']} are longer than all of max_demo_tokens" in told


def test_a_call_that_json_cannot_hold_gives_no_demo_and_is_counted() -> None:
    draws = draws_of([scored(ANCHORS[0], 1.0, tagged(), answer=object())], max_bootstrapped_demos=4)
    assert not draws.can_change(SAY, "")
    assert draws.counts["demos_not_written"] == 1


def test_a_draw_is_named_by_seed_key_and_component_alone() -> None:
    rollouts = [scored(problem, 1.0, tagged()) for problem in ANCHORS]
    first = draws_of(rollouts, max_bootstrapped_demos=6)
    second = draws_of(rollouts, max_bootstrapped_demos=6)
    second.drawn(SAY, "", "another")
    assert first.drawn(SAY, "", "key") == second.drawn(SAY, "", "key")


def test_proposals_accepted_for_other_demos_are_counted_in_a_run_s_costs(bootstrapped: tuple[Searcher, Search]) -> None:
    _, search = bootstrapped
    costs = costs_of([cycle_report(0, search, {}, 1.0)], [], [], 1.0)
    assert costs.demos_accepted == search.counts["demos_accepted"] > 0
