"""The laboratory as DSPy's own optimizers see it."""

import dspy

from dspy_fst import PolicyLM
from programs.lab import BASE, Lab, build

TOLD = "Reverse the list."


def lab_with(lm: PolicyLM, **sizes: int) -> Lab:
    lab = build("reverse", **{"train": 24, "val": 8, "test": 32, **sizes})
    lab.program.set_lm(lm)
    return lab


def policy(**options: object) -> PolicyLM:
    return PolicyLM(BASE, **{"engine": "in_process", "max_tokens": 16, **options})


def is_right(gold: dspy.Example, pred: dspy.Prediction, trace: object = None) -> float:
    return float(" ".join(str(pred.answer).split()) == gold.answer)


def accuracy(program: dspy.Module, lab: Lab) -> float:
    evaluate = dspy.Evaluate(devset=lab.testset, metric=is_right, num_threads=16, max_errors=1000, failure_score=0.0)
    return float(evaluate(program).score) / 100


def labels(lab: Lab) -> list[dict[str, object]]:
    """What the trainset says, as chat messages."""
    signature = lab.program.solve.signature
    return [
        dspy.ChatAdapter().format_finetune_data(signature, [], example.inputs().toDict(), example.labels().toDict())
        for example in lab.trainset
    ]
