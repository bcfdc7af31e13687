"""The task for a small language model."""

from collections import Counter

import dspy
import pytest

from dspy_fst.rollout.reward import metric_fault
from programs.smollm2.moods import DEMOS, HAPPY, MOODS, SAD, build


def test_every_set_is_balanced_and_shares_no_sentence_with_another():
    task = build(train=20, val=8, test=8)
    sets = [task.trainset, task.valset, task.testset]
    assert [Counter(example.mood for example in one) for one in sets] == [
        dict.fromkeys(MOODS, half) for half in (10, 4, 4)
    ]
    sentences = [example.sentence for one in sets for example in one] + [sentence for sentence, _ in DEMOS]
    assert len(set(sentences)) == len(HAPPY) + len(SAD) + len(DEMOS)


def test_the_metric_pays_for_the_label_alone():
    task = build()
    happy = task.trainset[0]
    assert metric_fault(task.metric) is None
    assert [task.metric(happy, dspy.Prediction(mood=mood)).score for mood in ("happy", "sad", "", None)] == [1, 0, 0, 0]
    assert task.metric(happy, dspy.Prediction(mood="sad")).feedback == (
        "Wrong. The writer is happy, and the answer was 'sad'."
    )


def test_more_than_there_are_is_refused():
    with pytest.raises(ValueError, match="there are 36 sentences and 2 demos"):
        build(train=30)
    with pytest.raises(ValueError, match="there are 36 sentences and 2 demos"):
        build(demos=3)
