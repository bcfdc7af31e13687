"""HoVer: the invented world and its claims, the search engine, the program's hops, the feedback for each predictor."""

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dspy
import pytest
from dspy.utils import DummyLM

from programs.common import Task
from programs.hover import build
from programs.hover.data import NOT_SUPPORTED, SUPPORTED, chains, public_example
from programs.hover.expert import EXPERT
from programs.hover.program import metric
from programs.hover.retrieval import Retriever, read_archive
from programs.hover.world import documents, spelled


@pytest.fixture(scope="module")
def task() -> Task:
    return build(train=192, val=48, test=64)


GOLD = dspy.Example(claim="c", titles=["The Red Door", "Ada Bern", "Tolm"], label=SUPPORTED)
RIGHT = {
    "verdict": SUPPORTED,
    "notes": "The Red Door is by Ada Bern, born in Tolm.",
    "queries": ["red door", "ada", "tolm"],
    "found": [["The Red Door", "Other"], ["Ada Bern"], ["Tolm"]],
}


def judged(pred_name: str | None = None, **changes: object) -> tuple[float, str]:
    verdict = metric(GOLD, dspy.Prediction(**{**RIGHT, **changes}), pred_name=pred_name)
    return verdict.score, verdict.feedback


# The world


def test_the_corpus_has_120_documents_with_titles_of_their_own() -> None:
    corpus = documents()
    assert len(corpus) == len({document["title"] for document in corpus}) == 120
    assert all(document["title"] in document["text"] for document in corpus)


def test_each_document_of_a_chain_names_the_next_and_only_the_first_is_in_the_claim() -> None:
    text = {document["title"]: document["text"] for document in documents()}
    for chain in chains():
        assert chain.titles[0] in chain.words
        assert all(title not in chain.words for title in chain.titles[1:])
        for title, following in zip(chain.titles, chain.titles[1:], strict=False):
            assert following in text[title]


def test_a_claim_is_supported_exactly_when_the_last_document_says_so(task: Task) -> None:
    text = {document["title"]: document["text"] for document in documents()}
    for gold in task.trainset:
        ending = gold.claim.removesuffix(".").rsplit(" ", 1)[1]
        words = text[gold.titles[-1]].replace(".", " ").split()
        assert (ending in words) == (gold.label == SUPPORTED)
    labels = [gold.label for gold in task.trainset]
    assert labels.count(SUPPORTED) == pytest.approx(labels.count(NOT_SUPPORTED), abs=40)


def test_the_hard_split_needs_three_documents_and_the_other_also_two() -> None:
    assert {len(gold.titles) for gold in build().trainset} == {3}
    assert {len(gold.titles) for gold in build(split="all").trainset} == {2, 3}


def test_no_claim_has_its_negation_in_another_set(task: Task) -> None:
    heads = [gold.claim.rsplit(" ", 1)[0] for gold in (*task.trainset, *task.valset, *task.testset)]
    assert len(set(heads)) == len(heads)


# The search


def test_a_search_by_title_finds_each_document_of_the_corpus() -> None:
    retriever = Retriever.over(documents())
    for document in documents():
        assert document["title"] in [found["title"] for found in retriever.search(document["title"], 3)]


def test_the_claim_itself_finds_its_first_document_and_not_its_last(task: Task) -> None:
    found = [[d["title"] for d in task.program.retriever.search(gold.claim, 3)] for gold in task.trainset]
    firsts = [gold.titles[0] in titles for gold, titles in zip(task.trainset, found, strict=True)]
    wholes = [set(gold.titles) <= set(titles) for gold, titles in zip(task.trainset, found, strict=True)]
    assert sum(firsts) > 0.9 * len(firsts)
    assert sum(wholes) < 0.1 * len(wholes)


def test_a_query_without_a_known_word_finds_nothing() -> None:
    retriever = Retriever.over(documents())
    assert retriever.search("zzz qqq", 3) == []
    assert retriever.search("", 3) == []


def test_copies_of_the_program_share_one_search_engine(task: Task) -> None:
    assert task.program.deepcopy().retriever is task.program.retriever


def test_a_saved_index_finds_the_same_and_lies_there_whole(tmp_path: Path) -> None:
    retriever = Retriever.over(documents())
    retriever.save(tmp_path / "index")
    loaded = Retriever.load(tmp_path / "index")
    assert [path.name for path in tmp_path.iterdir()] == ["index"]
    for query in ("The Hollow Mirror", "a town on the river"):
        assert loaded.search(query, 3) == retriever.search(query, 3)


def test_the_wikipedia_archive_is_read_by_its_format(tmp_path: Path) -> None:
    line = json.dumps({"title": "Osk", "text": ["A river.", "It is long."]}).encode() + b"\n"
    path = tmp_path / "wiki.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        member = tarfile.TarInfo("wiki.jsonl")
        member.size = len(line)
        archive.addfile(member, io.BytesIO(line))
    assert read_archive(path, "wiki.jsonl") == [{"title": "Osk", "text": "A river. It is long."}]


# The metric


def test_the_right_verdict_with_all_documents_scores_for_every_predictor() -> None:
    for name in (None, "first_query", "summarize", "next_query", "judge"):
        assert judged(name) == (1.0, "Correct.")


def test_the_right_verdict_by_chance_does_not_score() -> None:
    score, feedback = judged(found=[["The Red Door"], ["Other"], ["Tolm"]])
    assert score == 0.0
    assert "No search found Ada Bern." in feedback


def test_a_title_counts_however_its_letters_are_written() -> None:
    assert judged(found=[["the red door"], ["ADA BERN"], ["Tolm"]])[0] == 1.0


@pytest.mark.parametrize(
    ("pred_name", "said", "not_said"),
    [
        ("first_query", "The query 'red door' found The Red Door and missed Ada Bern, Tolm.", "'ada'"),
        ("next_query", "The query 'tolm' found nothing and missed The Red Door, Ada Bern, Tolm.", "'red door'"),
        ("summarize", "The notes do not mention Ada Bern, which a search had found.", "query"),
        ("judge", "The verdict 'not supported' is wrong: the claim is supported.", "query"),
    ],
)
def test_each_predictor_is_told_its_own_part(pred_name: str, said: str, not_said: str) -> None:
    faults = {
        "verdict": NOT_SUPPORTED,
        "notes": "The Red Door.",
        "found": [["The Red Door", "Other"], ["Ada Bern"], ["Other"]],
    }
    score, feedback = judged(pred_name, **faults)
    assert score == 0.0
    assert "No search found Tolm." in feedback
    assert said in feedback
    assert not_said not in feedback
    assert said in judged(None, **faults)[1]


# The program


def oracle(gold: dspy.Example) -> DummyLM:
    """Asks for one gold document after the other."""
    notes = [", ".join(gold.titles[: hop + 1]) for hop in range(3)]
    calls = [({"query": title}, {"new_notes": text}) for title, text in zip(gold.titles, notes, strict=True)]
    return DummyLM([*(reply for call in calls for reply in call), {"verdict": gold.label}])


def test_an_oracle_solves_the_offline_set_through_the_program(task: Task) -> None:
    for gold in task.testset[:12]:
        with dspy.context(lm=oracle(gold)):
            pred = task.program(**gold.inputs())
        assert metric(gold, pred).score == 1.0
        assert pred.queries == gold.titles
        assert all(1 <= len(titles) <= 3 for titles in pred.found)


def test_the_program_has_four_predictors_and_hands_notes_and_passages_on(task: Task) -> None:
    gold = task.testset[0]
    lm = oracle(gold)
    with dspy.context(lm=lm, trace=[]):
        task.program(**gold.inputs())
        trace = dspy.settings.trace
    names = {id(predictor): name for name, predictor in task.program.named_predictors()}
    assert [names[id(predictor)] for predictor, _, _ in trace] == [
        "first_query", "summarize", "next_query", "summarize", "next_query", "summarize", "judge"
    ]  # fmt: skip
    inputs = [given for _, given, _ in trace]
    assert any(passage.startswith(f"{gold.titles[1]} | ") for passage in inputs[3]["passages"])
    assert inputs[-1]["notes"] == ", ".join(gold.titles)


def test_the_scripted_expert_solves_claims_of_two_documents() -> None:
    task = build(train=60, val=1, test=1, split="short", kept=2)
    program = task.program
    assert program.hops == 2
    for name, answer in EXPERT.items():
        output = next(iter(getattr(program, name).signature.output_fields))
        setattr(program, name, Answers(output, answer))
    assert {metric(gold, program(**gold.inputs())).score for gold in task.trainset} == {1.0}


class Answers(dspy.Module):
    """A predictor's place, taken by a function of its inputs."""

    def __init__(self, output: str, answer: Callable[[Any], str]):
        super().__init__()
        self.output, self.answer = output, answer

    def forward(self, **inputs: Any) -> dspy.Prediction:
        return dspy.Prediction(**{self.output: self.answer(inputs)})


def test_another_world_has_the_same_names_and_other_facts() -> None:
    texts, others = ({d["title"]: d["text"] for d in documents(number)} for number in (None, 3))
    people = [title for title in texts if "was born" in texts[title]]
    assert set(people) <= set(others)
    assert sum(texts[title] == others[title] for title in people) < 3
    assert documents() == documents(None) != documents(4)


def test_invented_names_are_spelled_in_syllables_and_nothing_else_is() -> None:
    assert spelled("The Brenaliv is a river past Albrendor.") == "The Bren al iv is a river past Al bren dor."
    assert spelled("was born in 1137, alive") == "was born in 1137, alive"


def test_the_short_split_is_offline_only() -> None:
    assert {len(gold.titles) for gold in build(train=100, val=1, test=1, split="short").trainset} == {2}
    with pytest.raises(ValueError, match="offline claims only"):
        build(source="public", split="short")


def test_the_public_hard_split_takes_three_hops_and_more() -> None:
    row = {
        "claim": "c",
        "supporting_facts": [{"key": "A", "value": 0}, {"key": "B", "value": 1}, {"key": "A", "value": 2}],
        "label": 1,
        "num_hops": 3,
    }
    example = public_example(row, least=3)
    assert example is not None
    assert (example.titles, example.label) == (["A", "B"], SUPPORTED)
    assert public_example({**row, "label": 0}, least=3).label == NOT_SUPPORTED
    assert public_example({**row, "num_hops": 2}, least=3) is None
