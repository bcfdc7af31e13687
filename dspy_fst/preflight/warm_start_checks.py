"""A warm start: which predictors and examples it can learn from, and what it cannot be asked for."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import dspy

from dspy_fst.config import FSTConfig, WarmStart
from dspy_fst.engine.machine import Launch
from dspy_fst.preflight.data_checks import input_faults
from dspy_fst.preflight.library_checks import trl_fault
from dspy_fst.preflight.program_checks import policies_of
from dspy_fst.run.state import peek_state

OTHERWISE = "pass teacher=program to compile(), or leave warm_start out"


def taught_predictors(student: dspy.Module, config: FSTConfig) -> dict[str, dspy.Predict]:
    """Those whose replies a warm start may teach: the trained ones."""
    trained = config.trained or policies_of(student)
    return {name: predictor for name, predictor in student.named_predictors() if name in trained}


def lacking(signature: type[dspy.Signature], known: Mapping[str, object]) -> list[str]:
    """Fields of a signature that an example does not hold, inputs first.

    >>> lacking(dspy.Signature("question -> reasoning, answer"), {"question": "6 * 7", "answer": "42"})
    ['reasoning']
    """
    return [name for name in signature.fields if known.get(name) is None]


def warm_start_faults(config: FSTConfig | None, student: object, trainset: object, teacher: object) -> Iterator[str]:
    """Why a run cannot begin with the warm start that was asked for."""
    if config is None or (config.warm_start is None and teacher is None):
        return
    asked = "teacher" if teacher is not None else f"warm_start={config.warm_start!r}"
    if teacher is not None and config.warm_start is not None:
        yield f"teacher: warm_start={config.warm_start!r} learns from the labels; give one of the two, not both"
    if config.method == "gepa":
        yield f"{asked}: method='gepa' never changes the weights, and a warm start does; leave it out"
    if config.continue_optimizer:
        yield (
            f"{asked}: continue_optimizer=True takes over AdamW's moments, which belong to the weights before the warm "
            "start; leave one of the two out"
        )
    if fault := trl_fault():
        yield f"{asked}: {fault}"
    if not isinstance(student, dspy.Module) or not isinstance(trainset, Sequence):
        return
    if teacher is not None:
        yield from _teacher_faults(config, student, trainset, teacher)
    elif not any(_teachable(student, config, trainset).values()):
        yield f"{asked}: {_why_none(student, config, trainset)}"


def warm_start_rank_faults(config: FSTConfig, teacher: object, run_dir: Path) -> list[str]:
    """A sentence where several processes would make a warm start that is still due: trl makes it, in one process."""
    world = max(Launch.of().world, config.ranks)
    if world == 1 or (config.warm_start is None and teacher is None):
        return []
    state = peek_state(run_dir / "states")
    if state is not None and (state.fields.get("warm_start") or state.fields.get("step")):
        return []
    asked = "teacher" if teacher is not None else "warm_start"
    return [
        f"{asked}: a warm start is made by one process, and this is one of {world} processes; begin the run without "
        "launcher and ranks, stop it (Ctrl-C) after the warm start, and go on with them and the same run_dir"
    ]


def warm_start_warnings(
    config: FSTConfig, student: dspy.Module, trainset: Sequence[dspy.Example], teacher: object
) -> Iterator[str]:
    """What a warm start leaves out, and settings of one that is not made."""
    yield from _without_warm_start(config, teacher)
    if config.warm_start is None or teacher is not None:
        return
    examples = learnt_from(config, trainset)
    predictors = taught_predictors(student, config)
    for name, count in _teachable(student, config, trainset).items():
        fields = sorted({field for e in examples for field in lacking(predictors[name].signature, e.toDict())})
        if not count:
            yield (
                f"warm_start='labels': {name!r} is taught nothing, as no example holds its {', '.join(fields)}; "
                "teacher=program teaches every predictor"
            )
        elif count < len(examples):
            yield (
                f"warm_start='labels': {len(examples) - count} of {len(examples)} examples teach {name!r} nothing, as "
                f"they do not hold its {', '.join(fields)}"
            )


def _without_warm_start(config: FSTConfig, teacher: object) -> Iterator[str]:
    """Settings of a warm start that nothing reads."""
    fields = {name: field for name, field in WarmStart.model_fields.items() if name != "warm_start"}
    given = [f"{n}={getattr(config, n)!r}" for n, field in fields.items() if getattr(config, n) != field.default]
    if given and config.warm_start is None and teacher is None:
        yield (
            f"{' and '.join(given)} {'does' if len(given) == 1 else 'do'} nothing without a warm start. Set "
            "warm_start='labels', pass teacher=program to compile(), or leave it out"
        )
    elif (
        config.warm_start == "labels" and config.warm_start_score != WarmStart.model_fields["warm_start_score"].default
    ):
        yield (
            f"warm_start_score={config.warm_start_score:g} does nothing under warm_start='labels': it chooses among a "
            "teacher's rollouts, and labels have no score. Leave it out"
        )


def warm_start_words(config: FSTConfig, trainset: Sequence[dspy.Example], teacher: object) -> str | None:
    """What the warm start of a run learns from, for its plan; None where it has none."""
    if config.warm_start is None and teacher is None:
        return None
    count = len(learnt_from(config, trainset))
    source = (
        f"the labels of {count} examples"
        if teacher is None
        else f"those of the teacher's {count} rollouts that score well"
    )
    passes = "pass" if config.warm_start_epochs == 1 else "passes"
    return f"warm start: supervised training on {source}, {config.warm_start_epochs} {passes}, before the first search"


def learnt_from(config: FSTConfig, trainset: Sequence[dspy.Example]) -> Sequence[dspy.Example]:
    """The examples of a warm start: the first ones."""
    return trainset[: config.warm_start_examples]


def _teachable(student: dspy.Module, config: FSTConfig, trainset: Sequence[object]) -> dict[str, int]:
    """Predictor -> how many of the examples hold all of its inputs and outputs."""
    known = [each.toDict() for each in trainset[: config.warm_start_examples] if isinstance(each, dspy.Example)]
    return {
        name: sum(not lacking(predictor.signature, fields) for fields in known)
        for name, predictor in taught_predictors(student, config).items()
    }


def _why_none(student: dspy.Module, config: FSTConfig, trainset: Sequence[object]) -> str:
    first: dict[str, object] = next((each.toDict() for each in trainset if isinstance(each, dspy.Example)), {})
    predictors = taught_predictors(student, config)
    needs = "; ".join(f"{name!r} lacks {', '.join(lacking(p.signature, first))}" for name, p in predictors.items())
    return (
        "no example of the trainset holds all inputs and outputs of a trained predictor "
        f"({needs or 'there is none'}; the first example holds {', '.join(first) or 'nothing'}); add these labels to "
        f"the examples, {OTHERWISE}"
    )


def _teacher_faults(
    config: FSTConfig, student: dspy.Module, trainset: Sequence[object], teacher: object
) -> Iterator[str]:
    if not isinstance(teacher, dspy.Module):
        yield f"teacher: {type(teacher).__name__} is not a dspy.Module; pass one program"
        return
    held, own = dict(teacher.named_predictors()), taught_predictors(student, config)
    if not any(n in held and not lacking(p.signature, dict(held[n].signature.fields)) for n, p in own.items()):
        yield (
            f"teacher: none of its predictors ({', '.join(held) or 'none'}) has the name, inputs and outputs of a "
            f"trained predictor ({', '.join(own)}); make it of the student's class"
        )
        return
    if without := [name for name, predictor in held.items() if (predictor.lm or dspy.settings.lm) is None]:
        yield f"teacher: {', '.join(without)} has no LM; call teacher.set_lm(...)"
    yield from (fault.replace("trainset", "teacher", 1) for fault in input_faults(teacher, trainset, None))
