"""The journal of a search: what it gives back, what it refuses, and that a killed search pays only for the rest."""

import hashlib
import json

import dspy
import pydantic
import pytest

from dspy_fst.errors import RunDirectoryError
from dspy_fst.fast.evolve import evolve
from dspy_fst.fast.journal_protocol import NoJournal
from dspy_fst.fast.search_settings import SearchSettings
from dspy_fst.rollout.components import read_texts
from dspy_fst.rollout.reward import Reward
from dspy_fst.rollout.rollout_settings import RolloutSettings
from dspy_fst.rollout.rollouter import Rollouter
from dspy_fst.run.search_journal import Journal
from dspy_fst.types import Candidate, Population
from tests.fakes import fields, scripted_policy
from tests.fast.test_evolve import ANCHORS, SKILLS, Searcher, metric, speak

HEAD = {"cycle": 0}


def journal(tmp_path, head=HEAD, **options):
    return Journal(tmp_path / "search.jsonl", head, **options)


def written(tmp_path, *acts):
    """A journal of these (kind, key, gave), as a killed process left it."""
    kept = journal(tmp_path)
    for act in acts:
        kept.record(*act)
    return tmp_path / "search.jsonl"


def test_a_search_under_other_conditions_begins_anew_and_says_how_much_was_lost(tmp_path):
    kept = journal(tmp_path, conditions={"judged_by": "one"})
    kept.record("rollouts", "a", 1)
    same = journal(tmp_path, conditions={"judged_by": "one"})
    assert (same.replayed, same.replaced) == (1, 0)
    other = journal(tmp_path, conditions={"judged_by": "two"})
    assert (other.replayed, other.replaced) == (0, 1)
    other.record("rollouts", "a", 2)
    another_search = journal(tmp_path, {"cycle": 1}, conditions={"judged_by": "two"})
    assert (another_search.replayed, another_search.replaced) == (0, 0)


def test_a_journal_without_conditions_is_what_it_was(tmp_path):
    path = written(tmp_path, ("rollouts", "a", 1))
    assert path.read_text().splitlines()[0].endswith(' {"head": {"cycle": 0}}')
    assert journal(tmp_path, conditions={}).replayed == 1


def damage(path, line, change):
    """Rewrite one line of a file."""
    lines = path.read_bytes().splitlines(keepends=True)
    lines[line] = change(lines[line])
    path.write_bytes(b"".join(lines))


ACTS = [("rollouts", "a", {"tokens": 3}), ("reflection", "b", {"texts": {"x": "ü"}}), ("rollouts", "c", None)]

# ---- the file -------------------------------------------------------------------------------------


def test_acts_are_given_back_in_order_and_then_no_more(tmp_path):
    written(tmp_path, *ACTS[:2])
    again = journal(tmp_path)
    assert again.replayed == 2
    asked = [("rollouts", "a"), ("rollouts", "b"), ("reflection", "a")]
    assert [again.ahead(*act) for act in asked] == [[{"tokens": 3}], [], []]
    assert again.recall("rollouts", "a") == {"tokens": 3}
    assert again.recall("reflection", "b") == {"texts": {"x": "ü"}}
    assert again.recall("rollouts", "c") is None
    assert again.ahead("rollouts", "c") == []


def test_what_is_recorded_after_a_replay_follows_it(tmp_path):
    written(tmp_path, ACTS[0])
    journal(tmp_path).record(*ACTS[1])
    assert journal(tmp_path).replayed == 2


def test_another_act_than_the_recorded_one_is_refused_with_the_way_out(tmp_path):
    path = written(tmp_path, ACTS[0])
    with pytest.raises(RunDirectoryError, match=r"rollouts a where reflection b comes now.*Remove the file") as caught:
        journal(tmp_path).recall("reflection", "b")
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_a_torn_last_line_is_forgotten_and_written_anew(tmp_path, cut):
    path = written(tmp_path, *ACTS[:2])
    path.write_bytes(path.read_bytes()[:-cut])
    again = journal(tmp_path)
    assert again.replayed == 1
    again.record(*ACTS[2])
    assert [journal(tmp_path).replayed for _ in range(2)] == [2, 2]


@pytest.mark.parametrize("line", [0, 1, 2])
def test_a_damaged_line_is_refused_and_the_file_left_as_it_is(tmp_path, line):
    path = written(tmp_path, *ACTS[:2])
    damage(path, line, lambda old: old[:-3] + b"?" + old[-2:])
    before = path.read_bytes()
    with pytest.raises(RunDirectoryError, match=rf"search.jsonl, line {line + 1}, is damaged; remove the file"):
        journal(tmp_path)
    assert path.read_bytes() == before


def test_a_line_that_is_missing_in_the_middle_is_noticed(tmp_path):
    path = written(tmp_path, *ACTS[:2])
    damage(path, 1, lambda old: b"")
    with pytest.raises(RunDirectoryError, match="of another search"):
        journal(tmp_path).recall("rollouts", "a")


def test_the_journal_of_another_search_is_replaced(tmp_path):
    written(tmp_path, *ACTS)
    other = journal(tmp_path, {"cycle": 1})
    assert other.replayed == 0
    other.record(*ACTS[0])
    assert journal(tmp_path, {"cycle": 1}).replayed == 1


def test_a_removed_journal_starts_anew(tmp_path):
    written(tmp_path, *ACTS)
    journal(tmp_path).remove()
    assert not (tmp_path / "search.jsonl").exists()
    assert journal(tmp_path).replayed == 0


def test_a_disk_that_refuses_is_told_as_such(tmp_path):
    kept = journal(tmp_path)
    (tmp_path / "search.jsonl").unlink()
    (tmp_path / "search.jsonl").mkdir()
    with pytest.raises(RunDirectoryError, match="cannot be written"):
        kept.record(*ACTS[0])


# ---- a search that is killed ----------------------------------------------------------------------


class KilledError(BaseException):
    """Ends a search as a signal does: nobody catches it."""


class Killing(Journal):
    """A journal that lives until the n-th record: the kill comes before it is written, or right after."""

    def __init__(self, path, acts, keep_last):
        super().__init__(path, HEAD)
        self.left, self.keep_last = acts, keep_last

    def record(self, kind, key, gave):
        self.left -= 1
        if self.left < 0 and not self.keep_last:
            raise KilledError
        gave = super().record(kind, key, gave)
        if self.left < 0:
            raise KilledError
        return gave


class Counting(NoJournal):
    """Counts the acts of a search that nobody kills."""

    def __init__(self):
        self.acts = 0

    def record(self, kind, key, gave):
        self.acts += 1
        return gave


class PureSearcher(Searcher):
    """Proposes by what it is shown alone, so that any difference in it leads to other texts."""

    def __init__(self, program=None, speak=speak):
        super().__init__(propose=self.by_records)
        if program is not None:
            self.program = program
            policy, _ = scripted_policy(speak, version="step-000000")
            self.program.set_lm(policy)
            self.rollouter = Rollouter(self.program, Reward(metric), RolloutSettings(num_threads=4))
        self.reflections = []

    def by_records(self, candidate, reflective_dataset, components_to_update):
        shown = json.dumps([candidate, reflective_dataset, components_to_update], default=str, sort_keys=True)
        self.reflections.append(hashlib.sha256(shown.encode()).hexdigest()[:4])
        number = int(self.reflections[-1], 16)
        return {name: f"{candidate[name]} {SKILLS[number % 2]} {number}" for name in components_to_update}

    def search(self, kept):
        seed = read_texts(self.program)
        carried = [Candidate({**seed.texts, list(seed.texts)[-1]: f"Answer {skill}."}) for skill in ("x", "y")]
        return evolve(
            Population(tuple(carried), (None, None)),
            ANCHORS,
            self.program,
            play=self.play,
            feedback=lambda e, p, t, n, pt: Reward(metric)(e, p, t, n, pt).feedback,
            propose=self.propose,
            settings=SearchSettings(),
            size=2,
            budget=24,
            journal=kept,
        )


class Sometimes(dspy.Module):
    """Calls its first module for few questions, so that a minibatch may hold nothing to reflect on for it."""

    def __init__(self):
        super().__init__()
        self.first = dspy.Predict(dspy.Signature("question -> hint", "Hint."))
        self.second = dspy.Predict(dspy.Signature("question, hint -> answer", "Answer."))

    def forward(self, question):
        hint = self.first(question=question).hint if question == "3" else "none"
        return self.second(question=question, hint=hint)


PROGRAMS = {"every module speaks": lambda: None, "one module speaks seldom": Sometimes}


def killed_and_repeated(tmp_path, acts, keep_last, program):
    """The search's outcome, and what both processes paid together."""
    first, second = PureSearcher(program()), PureSearcher(program())
    with pytest.raises(KilledError):
        first.search(Killing(tmp_path / "search.jsonl", acts, keep_last))
    found = second.search(journal(tmp_path))
    return found, first.asked + second.asked, first.reflections + second.reflections


@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)
@pytest.mark.parametrize("keep_last", [True, False])
def test_a_search_killed_after_any_act_pays_only_for_the_rest_and_finds_the_same(tmp_path, keep_last, program):
    undisturbed, counting = PureSearcher(program()), Counting()
    wanted = undisturbed.search(counting)
    assert counting.acts > 8
    for acts in range(counting.acts):
        (tmp_path / str(acts)).mkdir()
        found, asked, reflections = killed_and_repeated(tmp_path / str(acts), acts, keep_last, program)
        assert found == wanted, f"killed after {acts} acts"
        if keep_last:
            assert asked == undisturbed.asked
            assert reflections == undisturbed.reflections
        else:  # the act in hand is paid twice
            assert (len(reflections) - len(undisturbed.reflections), asked == undisturbed.asked) in [
                (1, True),
                (0, False),
            ]


class Answer(pydantic.BaseModel):
    text: str


class Typed(dspy.Module):
    """Its answers are objects, which a journal cannot hold."""

    def __init__(self):
        super().__init__()
        self.second = dspy.Predict(
            dspy.Signature({"question": (str, dspy.InputField()), "answer": (Answer, dspy.OutputField())})
        )

    def forward(self, question):
        return dspy.Prediction(answer=self.second(question=question).answer.text)


def speak_typed(messages, seed):
    question = int(messages[-1]["content"].split("## question ## ]]\n")[1].split("\n")[0])
    text = "yes" if SKILLS[question % 2] in messages[0]["content"] else "no"
    return fields(answer=json.dumps({"text": text}))


def test_a_search_over_objects_plays_them_again_but_reflects_only_once(tmp_path):
    undisturbed = PureSearcher(Typed(), speak_typed)
    wanted = undisturbed.search(NoJournal())
    first, second = PureSearcher(Typed(), speak_typed), PureSearcher(Typed(), speak_typed)
    with pytest.raises(KilledError):
        first.search(Killing(tmp_path / "search.jsonl", 6, keep_last=True))
    assert '"rollouts": null' in (tmp_path / "search.jsonl").read_text()
    assert second.search(journal(tmp_path)) == wanted
    assert second.asked == undisturbed.asked
    assert first.reflections + second.reflections == undisturbed.reflections


# ---- what gepa would swallow ----------------------------------------------------------------------


class Full(NoJournal):
    """A disk that is full from the n-th act on."""

    def __init__(self, acts):
        self.left = acts

    def record(self, kind, key, gave):
        self.left -= 1
        if self.left < 0:
            raise RunDirectoryError("the disk is full")
        return gave


def test_a_journal_that_cannot_be_written_stops_the_search_at_any_act():
    counting = Counting()
    PureSearcher().search(counting)
    for acts in range(counting.acts):
        searcher = PureSearcher()
        with pytest.raises(RunDirectoryError, match="the disk is full"):
            searcher.search(Full(acts))


def test_a_journal_of_another_search_stops_the_search_at_any_act(tmp_path):
    counting = Counting()
    PureSearcher().search(counting)
    for acts in range(1, counting.acts + 1):
        (tmp_path / str(acts)).mkdir()
        with pytest.raises(KilledError):
            PureSearcher().search(Killing(tmp_path / str(acts) / "search.jsonl", acts - 1, keep_last=True))
        kept = journal(tmp_path / str(acts))
        kept._ahead[-1]["key"] = "another"
        with pytest.raises(RunDirectoryError, match="of another search"):
            PureSearcher().search(kept)
