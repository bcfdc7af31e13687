"""The texts of a program that evolution may change: read them out as a candidate, write a candidate in."""

import dspy

from dspy_fst.types import Candidate


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
