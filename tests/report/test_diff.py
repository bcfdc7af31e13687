"""Word-level differences."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from dspy_fst.report.diff import Piece, word_diff


def kinds(before, after):
    return [(piece.kind, piece.text) for piece in word_diff(before, after)]


def test_added_and_replaced_words_are_told_apart_from_those_that_stay():
    assert kinds("Sort the list.", "Sort the long list. Be brief.") == [
        ("same", "Sort the "),
        ("new", "long "),
        ("same", "list. "),
        ("new", "Be brief."),
    ]
    assert kinds("Sort the list.", "Sort the words.") == [("same", "Sort the "), ("gone", "list."), ("new", "words.")]


def test_a_word_that_two_longer_changes_share_by_chance_is_part_of_the_change():
    assert kinds("Cut off the number at the start, then stop.", "Flip the order, then stop.") == [
        ("gone", "Cut off the number at the start, "),
        ("new", "Flip the order, "),
        ("same", "then stop."),
    ]


def test_a_word_between_two_changes_of_one_word_stays():
    assert [kind for kind, _ in kinds("one two three", "eins two drei")] == ["gone", "new", "same", "gone", "new"]


def test_equal_texts_differ_in_nothing_and_empty_ones_are_wholly_new():
    assert word_diff("As it was.", "As  it was.\n") == [Piece("same", "As  it was.\n")]
    assert word_diff("", "All new.") == [Piece("new", "All new.")]
    assert word_diff("All gone.", "") == [Piece("gone", "All gone.")]
    assert word_diff("", "") == []


TEXTS = st.lists(st.sampled_from(["a", "b", "the", "list.", "\n", "x y"]), max_size=12).map(" ".join)


@given(TEXTS, TEXTS)
def test_the_pieces_give_back_both_texts(before, after):
    pieces = word_diff(before, after)
    assert "".join(piece.text for piece in pieces if piece.kind != "gone").split() == after.split()
    assert "".join(piece.text for piece in pieces if piece.kind != "new").split() == before.split()
    assert all(one.kind != other.kind for one, other in pairwise(pieces))
