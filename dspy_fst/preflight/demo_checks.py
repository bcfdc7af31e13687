"""Whether demos can evolve: what they would be made of can be written down, and there is enough of it."""

from collections.abc import Iterator, Sequence

import dspy

from dspy_fst.config import FSTConfig
from dspy_fst.fast.demos import labeled_demo
from dspy_fst.rollout.components import marked, problem_mark, written_demos


def demo_faults(
    config: FSTConfig | None, student: object, trainset: object, anchors: int | None = None
) -> Iterator[str]:
    """Why no demos could be made of these examples for this program.

    Args:
        anchors: Of the search with the fewest; None: as many as the settings say.
    """
    if config is None or not config.demos_evolve or not isinstance(student, dspy.Module):
        return
    yield from _unwritable_demos(student)
    if not isinstance(trainset, Sequence) or not all(isinstance(each, dspy.Example) for each in trainset):
        return
    if any(example._input_keys is None for example in trainset):
        return
    yield from _unwritable_examples(config, trainset)
    of = config.anchor_count if anchors is None else anchors
    if config.max_bootstrapped_demos >= of:
        yield (
            f"max_bootstrapped_demos={config.max_bootstrapped_demos}: a search's own rollouts are of {of} anchors, and "
            f"a rollout shows no demo of its own problem; use at most {of - 1}, or {config.more_anchors(anchors)}"
        )
    if config.max_labeled_demos:
        yield from _too_few_labels(config, student, trainset)


def demo_warnings(config: FSTConfig, student: dspy.Module, trainset: Sequence[dspy.Example]) -> Iterator[str]:
    """Which predictors get no demos, and which settings do nothing."""
    if not config.demos_evolve:
        fields = FSTConfig.model_fields
        for name in ("metric_threshold", "max_demo_tokens"):
            if (value := getattr(config, name)) != fields[name].default:
                yield (
                    f"{name}={value:g} does nothing without demos; set max_bootstrapped_demos or max_labeled_demos, or "
                    "leave it out"
                )
        return
    if config.method == "rl":
        yield (
            "max_bootstrapped_demos and max_labeled_demos do nothing under method='rl', which never searches. Leave "
            "them out, or use method='fst'"
        )
    if config.max_labeled_demos and not config.max_bootstrapped_demos:
        without = [name for name, count in _labels(student, trainset).items() if not count]
        if without:
            yield (
                f"max_labeled_demos: no example holds the inputs and an output of {', '.join(map(repr, without))}, "
                "which get no demos; max_bootstrapped_demos=4 makes demos of every predictor's own calls"
            )


def _unwritable_demos(student: dspy.Module) -> Iterator[str]:
    for name, predictor in student.named_predictors():
        try:
            written_demos(predictor.demos)
        except TypeError as error:
            yield (
                f"student: {name} shows a demo that cannot be kept beside those that evolve ({error}); use values that "
                "JSON can hold, or leave max_bootstrapped_demos and max_labeled_demos out"
            )


def _unwritable_examples(config: FSTConfig, trainset: Sequence[dspy.Example]) -> Iterator[str]:
    for index, example in enumerate(trainset):
        try:
            marked({}, example)
            if config.max_labeled_demos:
                written_demos([example])
        except TypeError as error:
            yield (
                f"trainset: example {index} cannot be written as JSON ({error}), and a demo names the problem that it "
                "was made of by its inputs; use values that JSON can hold, or leave max_bootstrapped_demos and "
                "max_labeled_demos out"
            )
            return


def _too_few_labels(config: FSTConfig, student: dspy.Module, trainset: Sequence[dspy.Example]) -> Iterator[str]:
    found = _labels(student, trainset)
    most = max(found.values(), default=0)
    if most <= config.max_labeled_demos:
        held = ", ".join(trainset[0].keys()) if trainset else "nothing"
        needs = "; ".join(f"{n!r}: {', '.join(p.signature.fields)}" for n, p in student.named_predictors())
        yield (
            f"max_labeled_demos={config.max_labeled_demos}: {most} different examples of the trainset hold all inputs "
            f"and an output of a predictor, and more are needed than are shown ({needs}; the first example holds "
            f"{held}); " + ("lower it, add examples" if most else "name the labels as the predictor's outputs")
            + ", or use max_bootstrapped_demos, which needs no labels"
        )  # fmt: skip


def _labels(student: dspy.Module, trainset: Sequence[dspy.Example]) -> dict[str, int]:
    """Predictor -> how many different problems give a labeled demo of it."""
    return {
        name: len({problem_mark(each) for each in trainset if labeled_demo(predictor.signature, each) is not None})
        for name, predictor in student.named_predictors()
    }
