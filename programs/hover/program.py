"""The program, four predictors around a search engine, and the metric that tells each of them its part of the fault."""

from typing import Any, Literal

import dspy
from dspy.evaluate import normalize_text

from programs.common import judged, said
from programs.hover.retrieval import Retriever

HOPS = 3
"""Searches for a claim that needs three documents or more."""


class FirstQuery(dspy.Signature):
    """Write a search query for documents about the claim."""

    claim: str = dspy.InputField()
    query: str = dspy.OutputField()


class Summarize(dspy.Signature):
    """Write down what is known so far about the claim."""

    claim: str = dspy.InputField()
    notes: str = dspy.InputField(desc="what was known before")
    passages: list[str] = dspy.InputField(desc="what the last search found")
    new_notes: str = dspy.OutputField()


class NextQuery(dspy.Signature):
    """Write a search query for what is still missing to verify the claim."""

    claim: str = dspy.InputField()
    notes: str = dspy.InputField()
    query: str = dspy.OutputField()


class Judge(dspy.Signature):
    """Decide whether the notes support the claim."""

    claim: str = dspy.InputField()
    notes: str = dspy.InputField()
    verdict: Literal["supported", "not supported"] = dspy.OutputField()


class Verify(dspy.Module):
    """Query, search and summarize several times, then judge: claim -> verdict, with what was searched and found."""

    def __init__(self, retriever: Retriever, kept: int, hops: int = HOPS) -> None:
        """`kept`: documents that each search gives; `hops`: searches for one claim."""
        super().__init__()
        self.retriever, self.kept, self.hops = retriever, kept, hops
        self.first_query = dspy.Predict(FirstQuery)
        self.summarize = dspy.Predict(Summarize)
        self.next_query = dspy.Predict(NextQuery)
        self.judge = dspy.Predict(Judge)

    def forward(self, claim: str) -> dspy.Prediction:
        notes, queries, found = "", [], []
        for hop in range(self.hops):
            asked = self.first_query(claim=claim) if hop == 0 else self.next_query(claim=claim, notes=notes)
            documents = self.retriever.search(asked.query, self.kept)
            passages = [f"{document['title']} | {document['text']}" for document in documents]
            notes = self.summarize(claim=claim, notes=notes, passages=passages).new_notes
            queries.append(asked.query)
            found.append([document["title"] for document in documents])
        verdict = self.judge(claim=claim, notes=notes).verdict
        return dspy.Prediction(verdict=verdict, notes=notes, queries=queries, found=found)


def metric(
    gold: Any, pred: Any, trace: Any = None, pred_name: str | None = None, pred_trace: Any = None
) -> dspy.Prediction:
    """1 for the right verdict after every gold document was found, else 0.

    A bare verdict is right half of the time by chance. The feedback is for the predictor `pred_name`, or for all.
    """
    queries, found = list(getattr(pred, "queries", None) or []), list(getattr(pred, "found", None) or [])
    missed = missing(gold.titles, [title for titles in found for title in titles])
    right = said(pred, "verdict") == gold.label
    told = {
        "first_query": lambda: _of_queries(gold.titles, queries[:1], found[:1]),
        "next_query": lambda: _of_queries(gold.titles, queries[1:], found[1:]),
        "summarize": lambda: _of_notes(gold.titles, missed, said(pred, "notes")),
        "judge": lambda: _of_verdict(gold.label, said(pred, "verdict")),
    }
    if right and not missed:
        return judged(None)
    whole = f"No search found {_listed(missed)}." if missed else "Every gold document was found."
    names = [pred_name] if pred_name in told else list(told)
    return judged(" ".join([whole, *(told[name]() for name in names)]))


def missing(wanted: list[str], found: list[str]) -> list[str]:
    """The wanted titles that are not among those found."""
    have = {normalize_text(title) for title in found}
    return [title for title in wanted if normalize_text(title) not in have]


def _of_queries(titles: list[str], queries: list[str], found: list[list[str]]) -> str:
    sentences = []
    for query, got in zip(queries, found, strict=True):
        missed = missing(titles, got)
        hit = [title for title in titles if title not in missed]
        sentences.append(f"The query {query[:200]!r} found {_listed(hit)} and missed {_listed(missed)}.")
    return " ".join(sentences)


def _of_notes(titles: list[str], missed: list[str], notes: str) -> str:
    text = normalize_text(notes)
    left_out = [title for title in titles if title not in missed and normalize_text(title) not in text]
    if left_out:
        return f"The notes do not mention {_listed(left_out)}, which a search had found."
    return "The notes mention every gold document that was found."


def _of_verdict(label: str, verdict: str) -> str:
    return f"The verdict {verdict!r} is {'right' if verdict == label else f'wrong: the claim is {label}'}."


def _listed(titles: list[str]) -> str:
    return ", ".join(titles) or "nothing"
