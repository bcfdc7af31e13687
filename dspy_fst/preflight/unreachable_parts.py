"""Parts of a program that a run cannot reach: predictors that DSPy does not name, holds frozen or cannot copy, LMs that
adapters call, and input fields that DSPy keeps from the prompt."""

from collections.abc import Iterable, Iterator, Mapping

import dspy

from dspy_fst.rollout.call_recorder import is_recorded
from dspy_fst.rollout.chat_adapters import adapter_in_force, adapters_held_by, kept_by
from dspy_fst.rollout.copy_faults import copy_faults, outside_predictors
from dspy_fst.rollout.program_graph import frozen_predictors, hidden_predictors

_SHOWN = 5
"""How many places a message names."""
_SETTINGS_OF_A_CALL = frozenset({"signature", "demos", "config", "lm", "new_signature"})
"""Arguments that ``dspy.Predict`` takes for itself (DSPy 3.4.1); "prediction" only in a form that no field has."""


def part_faults(student: object) -> list[str]:
    """Why rollouts would share predictors with the student, or the run would train another model than its own."""
    if not isinstance(student, dspy.Module):
        return []
    faults = copy_faults(student)
    named = [
        lm for _, p in student.named_predictors() if (lm := p.lm or dspy.settings.lm) is not None and is_recorded(lm)
    ]
    held = {place: p.lm for place, p in hidden_predictors(student).items()}
    hidden = {place: lm for place, lm in held.items() if lm is not None and is_recorded(lm)}
    foreign = [place for place, lm in hidden.items() if named and lm.handle is not named[0].handle]
    if foreign:
        faults.append(
            f"student: the predictors at {_listed(foreign)} hold another PolicyLM than the others; one model is "
            "trained, so share one PolicyLM and give the others a frozen dspy.LM"
        )
    return faults + list(_adapter_faults(student)) + list(_field_faults(student))


def _adapter_faults(student: dspy.Module) -> Iterator[str]:
    """A sentence for each PolicyLM that an adapter calls.

    Its engine would keep the old weights while the run trains, and its replies would be recorded as those of the
    predictor whose reply it reads.
    """
    places = {"adapter": kept_by(student) or adapter_in_force(), **adapters_held_by(student)}
    for place, outer in places.items():
        yield from (
            f"{place}: {kind} asks a PolicyLM (its {name}), which would keep its weights while the run trains "
            f"those of the student; give it a frozen LM: {name}=dspy.LM(...)"
            for kind, name in asked_policies(outer)
        )


def _field_faults(student: dspy.Module) -> Iterator[str]:
    """A sentence for each input field that DSPy would take for a setting of the call.

    For `demos` DSPy only logs that the field is missing, and the model answers without it.
    """
    for name, predictor in student.named_predictors():
        if taken := sorted(_SETTINGS_OF_A_CALL & predictor.signature.input_fields.keys()):
            yield (
                f"student: predictor {name!r} has input fields that DSPy takes for settings of a call "
                f"({', '.join(taken)}), so they would not reach the prompt; give them other names"
            )


def asked_policies(outer: dspy.Adapter) -> Iterator[tuple[str, str]]:
    """(class, attribute) of each PolicyLM that an adapter, or an adapter inside it, calls itself."""
    inner = [value for value in vars(outer).values() if isinstance(value, dspy.Adapter)]
    for adapter in (outer, *inner):
        for name, lm in vars(adapter).items():
            if is_recorded(lm):
                yield type(adapter).__name__, name


def no_predictors(student: dspy.Module) -> str:
    """Why a program without predictors that DSPy names cannot be trained, and what helps."""
    frozen, hidden = _frozen_places(student), _unnamed(student)
    if frozen:
        return (
            f"student: all its predictors are in {_listed(frozen)}, marked as compiled (_compiled), and DSPy holds "
            f"such a part frozen; {_freed(frozen)}"
        )
    if hidden:
        return f"student: DSPy names none of its predictors; they are at {_listed(hidden)}: {_HOLD}"
    return "student: the program has no predictors, so there is nothing to train"


def part_warnings(student: dspy.Module) -> list[str]:
    """Predictors that are called in rollouts and neither evolve nor learn, and parts that do less than their name."""
    frozen, hidden = _frozen_places(student), _unnamed(student)
    warnings = []
    if hidden:
        warnings.append(
            f"student: {_counted(len(hidden))} at {_listed(hidden)} cannot be seen by DSPy's named_predictors(): texts "
            f"there do not evolve, and calls from there train nothing (unnamed_calls counts them); {_HOLD}"
        )
    if frozen:
        warnings.append(
            f"student: {_counted(sum(frozen.values()))} in {_listed(frozen)}, marked as compiled (_compiled), are held "
            f"frozen by DSPy: they neither evolve nor learn; {_freed(frozen)}"
        )
    return warnings + _unadvised(student)


def _unadvised(student: dspy.Module) -> list[str]:
    """A warning where dspy.Refine has nobody to ask: it swallows that error and repeats its module as it is."""
    if dspy.settings.lm is not None:
        return []
    places = [name.removeprefix("self.") for name, part in student.named_sub_modules() if isinstance(part, dspy.Refine)]
    told = (
        f"student: dspy.Refine at {_listed(places)} takes its hints from the LM of dspy.configure(lm=...), and none "
        "is set: its tries get no hint, as with dspy.BestOfN; configure a frozen dspy.LM"
    )
    return [told] if places else []


_HOLD = "hold them as attributes, or in a list or dict that is an attribute itself"


def _unnamed(student: dspy.Module) -> dict[str, dspy.Predict]:
    """Place -> predictor that DSPy does not name. Predictors outside of the program count if they use the policy."""
    outside = {place: p for place, p in outside_predictors(student).items() if is_recorded(p.lm or dspy.settings.lm)}
    return {**hidden_predictors(student), **outside}


def _frozen_places(student: dspy.Module) -> dict[str, int]:
    """Place of a part that is marked as compiled -> number of predictors that are only there."""
    named = {id(p) for _, p in student.named_parameters()}
    places: dict[str, int] = {}
    for place, predictor in frozen_predictors(student):
        if id(predictor) not in named:
            places[place] = places.get(place, 0) + 1
    return places


def _freed(places: Mapping[str, int]) -> str:
    attributes = ", ".join(f"program.{place}._compiled = False" for place in list(places)[:_SHOWN])
    return f"to train it, set {attributes}"


def _counted(count: int) -> str:
    return "1 predictor" if count == 1 else f"{count} predictors"


def _listed(places: Iterable[str]) -> str:
    names = list(places)
    more = f" and {len(names) - _SHOWN} more places" if len(names) > _SHOWN else ""
    return ", ".join(map(repr, names[:_SHOWN])) + more
