"""The examples: their form, their number, and whether the program can be called with them."""

import inspect
from collections.abc import Callable, Sequence
from typing import TypeGuard, get_args

import dspy

from dspy_fst.config import FSTConfig
from dspy_fst.rollout.dspy_release import AGENTS


def data_faults(trainset: object, valset: object, config: FSTConfig | None) -> list[str]:
    """Faults of the examples, without regard to the program."""
    faults = []
    for name, examples in (("trainset", trainset), ("valset", valset)):
        if examples is None and name == "valset":
            continue
        if not _are_examples(examples):
            faults.append(f"{name}: it must be a list of dspy.Example")
        elif any(example._input_keys is None for example in examples):
            faults.append(f"{name}: call .with_inputs(...) on every example, so that inputs and labels are told apart")
    wanted = config.problems_per_step if config is not None else 1
    if _are_examples(trainset) and (different := _different(trainset, wanted)) < wanted:
        copies = "" if different == len(trainset) else f", {different} of them different,"
        faults.append(
            f"trainset: {len(trainset)} examples{copies} are fewer than problems_per_step={wanted}, so one batch would "
            "repeat a problem; add examples or lower problems_per_step"
        )
    return faults


def input_faults(student: object, trainset: object, valset: object) -> list[str]:
    """Examples that the program cannot be called with; the first of each set is named."""
    faults = []
    call = _call_of(student) if isinstance(student, dspy.Module) else None
    for name, examples in (("trainset", trainset), ("valset", valset)):
        if call is None or not _are_examples(examples):
            continue
        for index, example in enumerate(examples):
            if example._input_keys is not None and (reason := call(dict(example.inputs()))):
                faults.append(
                    f"{name}: example {index} has the inputs {sorted(example.inputs().keys())}, and the program cannot "
                    f"be called with them ({reason}); look at .with_inputs(...) and the program's input fields"
                )
                break
    return faults


def _call_of(student: dspy.Module) -> Callable[[dict[str, object]], str | None]:
    """A function that returns why the program would not accept these inputs, or None."""
    try:
        forward = object.__getattribute__(student, "forward")  # plain getattr makes DSPy log a warning
    except AttributeError:
        forward = None
    signature, required = inspect.signature(forward) if forward else None, _required_fields(student)

    def refused(inputs: dict[str, object]) -> str | None:
        try:
            if signature is not None:
                signature.bind(**inputs)
        except TypeError as error:
            return str(error)
        missing = [name for name in required if name not in inputs]
        return f"missing {', '.join(missing)}" if missing else None

    return refused


def _required_fields(student: dspy.Module) -> list[str]:
    """Required input fields of DSPy's own modules, which accept anything and only log what is missing."""
    if type(student) not in (dspy.Predict, dspy.ChainOfThought, *AGENTS):
        return []
    signature = student.predict.signature if isinstance(student, dspy.ChainOfThought) else student.signature
    return [
        name
        for name, field in signature.input_fields.items()
        if field.is_required() and type(None) not in get_args(field.annotation)
    ]


def _are_examples(examples: object) -> TypeGuard[Sequence[dspy.Example]]:
    return isinstance(examples, Sequence) and all(isinstance(item, dspy.Example) for item in examples)


def _different(examples: Sequence[dspy.Example], enough: int) -> int:
    """How many different examples there are, counted up to ``enough``."""
    seen: set[str] = set()
    for example in examples:
        seen.add(repr(example))
        if len(seen) == enough:
            break
    return len(seen)
