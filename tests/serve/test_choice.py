"""Who answers, and what the majority says."""

from collections import Counter
from enum import Enum
from typing import Any, Literal

import pytest
from pydantic import BaseModel, create_model

from dspy_fst.serve.choice import ballot, decided, speakers, vote_faults


class Colour(Enum):
    RED = "red"


class Node(BaseModel):
    value: int
    next: "Node | None" = None


class Named(BaseModel):
    name: str


def outputs(**fields: Any) -> type[BaseModel]:
    return create_model("Outputs", **{name: (annotation, ...) for name, annotation in fields.items()})


def test_the_best_answers_alone():
    assert speakers("best", 4, seed=9) == [0]


def test_all_members_vote():
    assert speakers("vote", 4, seed=9) == [0, 1, 2, 3]


def test_a_seed_draws_the_same_speaker_again_and_seeds_draw_all_of_them_evenly():
    drawn = [speakers("sampled", 4, seed) for seed in range(2000)]
    assert drawn == [speakers("sampled", 4, seed) for seed in range(2000)]
    counts = Counter(rank for (rank,) in drawn)
    assert set(counts) == {0, 1, 2, 3}
    assert min(counts.values()) > 400


@pytest.mark.parametrize(
    ("ballots", "winner", "agreement"),
    [
        (["a", "b", "b", "c"], 1, 0.5),
        (["a", "b", "b", "a"], 0, 0.5),
        (["a", "b", "c", "d"], 0, 0.25),
        ([None, "b", "a", "b"], 1, 0.5),
        ([None, "b", "a", None], 1, 0.25),
        (["x"], 0, 1.0),
    ],
)
def test_the_majority_wins_and_a_tie_goes_to_the_better_member(ballots, winner, agreement):
    assert decided(ballots) == (winner, agreement)


def test_equal_outputs_give_equal_ballots_whatever_their_order():
    model = outputs(scores=dict[str, int])
    assert ballot(model(scores={"a": 1, "b": 2}), None) == ballot(model(scores={"b": 2, "a": 1}), None)
    assert ballot(model(scores={"a": 1}), None) != ballot(model(scores={"a": 2}), None)


def test_a_ballot_on_one_field_leaves_the_others_out():
    model = outputs(reasoning=str, answer=int)
    assert ballot(model(reasoning="so", answer=4), "answer") == ballot(model(reasoning="thus", answer=4), "answer")


@pytest.mark.parametrize(
    "annotation",
    [
        int,
        bool,
        float,
        list[int],
        Literal["a", "b"],
        Colour,
        int | None,
        Node,
        dict[Literal["a"], int],
        tuple[int, bool],
    ],
)
def test_answers_that_can_be_told_equal_may_be_voted_on(annotation):
    assert vote_faults(outputs(answer=annotation), None) == []


@pytest.mark.parametrize(
    "annotation",
    [str, list[str], str | None, Named, list[Named], dict[str, int], tuple[int, str], int | list[str], Any, list[Any]],
)
def test_free_text_is_refused_by_name_unless_the_field_that_counts_is_named(annotation):
    model = outputs(number=int, words=annotation)
    (fault,) = vote_faults(model, None)
    assert "words can hold any text" in fault
    assert vote_faults(model, "number") == []
    assert vote_faults(model, "words") == []


def test_a_field_that_is_not_there_cannot_be_voted_on():
    assert "the outputs are answer" in vote_faults(outputs(answer=int), "other")[0]
