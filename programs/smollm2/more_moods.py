"""More sentences for the moods task, where 36 are too few: 64 labels for a warm start, and others to measure on.

>>> task = build()
>>> len(task.trainset), len(task.testset)
(64, 16)
"""

import dspy

from programs.common import Task
from programs.smollm2.moods import HAPPY, SAD, Moods, metric

MORE_HAPPY = (
    "Our team got the prize and we sang all the way home.",
    "I held my grandson in my arms for the first time.",
    "The letter says that I may study in the city.",
    "We sat by the fire and told funny stories.",
    "My bread rose well and the whole house smells good.",
    "The snow has come and the children ride their sledges.",
    "She forgave me and we laughed about it together.",
    "My new shoes fit and I walk as on clouds.",
    "The choir sang for my birthday, what a surprise!",
    "We saw dolphins beside the boat this morning.",
    "My tooth does not hurt any more, what a relief.",
    "The old piano plays again and I cannot stop playing.",
    "They named the street after my father.",
    "The puppy sleeps on my feet and I would not move for anything.",
    "I finished my book and my publisher loves it.",
    "Our train was early and my wife waited with flowers.",
    "The rain came at last and saved our fields.",
    "I beat my brother at chess for the first time.",
    "The whole village came to our wedding.",
    "He learned to swim today and is so proud.",
    "The museum let us in for free and it was wonderful.",
    "My plants survived the winter, all of them.",
)
MORE_SAD = (
    "Our team came last and the captain wept.",
    "I never had the chance to say goodbye to my grandfather.",
    "The letter says that they do not want me.",
    "We sat in the dark and nobody had anything to say.",
    "My bread burned and the guests left hungry.",
    "The snow broke our roof and we have no home.",
    "She will not speak to me after what I did.",
    "My shoes are torn and my feet are always cold.",
    "Everybody forgot my birthday.",
    "We saw a whale lying dead on the beach.",
    "My back hurts so much that I cannot sleep.",
    "They sold my mother's piano and I cried.",
    "They are tearing down the house where I was born.",
    "The puppy was run over and I cannot forget it.",
    "Nobody bought my book and I have given up.",
    "I waited at the station all night and she did not come.",
    "There was no rain and all our corn is dead.",
    "My brother has not called me for two years.",
    "Nobody came to her funeral.",
    "He nearly drowned today and still shakes.",
    "The museum burned down with all the paintings.",
    "The frost killed my plants, all of them.",
)


def build(labels: int = 64, test: int = 16) -> Task:
    """The moods task with as many happy sentences as sad ones in each set, in turns.

    Args:
        labels: Size of the trainset.
        test: Size of the testset; 80 in all at most.
    """
    pairs = zip((*HAPPY, *MORE_HAPPY), (*SAD, *MORE_SAD), strict=True)
    examples = [
        dspy.Example(sentence=sentence, mood=mood).with_inputs("sentence")
        for pair in pairs
        for sentence, mood in zip(pair, ("happy", "sad"), strict=True)
    ]
    if labels + test > len(examples):
        raise ValueError(f"there are {len(examples)} sentences")
    return Task(Moods(), metric, examples[:labels], [], examples[labels : labels + test])
