"""The texts of a program that evolution may change: read them out as a candidate, write a candidate in."""

from typing import Any

import dspy

from dspy_fst.types import Candidate, Population


def read_texts(program: dspy.Module) -> Candidate:
    """The program's own texts: predictor name -> instruction."""
    return Candidate({name: predictor.signature.instructions for name, predictor in program.named_predictors()})


def with_texts(program: dspy.Module, candidate: Candidate) -> dspy.Module:
    """A copy of the program that speaks the candidate's texts; the program itself is left as it is."""
    copy = program.deepcopy()
    for name, predictor in copy.named_predictors():
        if name in candidate.texts:
            predictor.signature = predictor.signature.with_instructions(candidate.texts[name])
    return copy


def carry(program: dspy.Module, population: Population) -> None:
    """Mark a program as compiled; what it says itself is left as it is.

    Set on it are ``population``, ``candidate_programs`` (``[{"score", "program"}]``, best first, without repetition)
    and ``_compiled``.
    """
    score_of = {m.digest: score for m, score in zip(population.members, population.scores, strict=True)}
    programs: list[dict[str, Any]] = [
        {"score": score_of[member.digest], "program": with_texts(program, member)} for member in population.unique()
    ]
    program.population, program.candidate_programs, program._compiled = population, programs, True
