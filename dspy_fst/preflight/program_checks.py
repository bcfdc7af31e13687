"""The program: its predictors, the LMs that they speak with, and how those are sampled."""

from collections.abc import Iterator, Mapping

import dspy

from dspy_fst.config import FSTConfig
from dspy_fst.engine.base import temperature_fault
from dspy_fst.engine.options import RESHAPING
from dspy_fst.policy_lm import PolicyLM
from dspy_fst.preflight.sampling_settings import bad_numbers
from dspy_fst.preflight.unreachable_parts import no_predictors
from dspy_fst.recipe.lora_settings import adapter_of
from dspy_fst.rollout.components import flexes


def policies_of(program: dspy.Module) -> dict[str, PolicyLM]:
    """Predictor name -> the PolicyLM that it speaks with, its own or DSPy's configured one."""
    using_policy = {}
    for name, predictor in program.named_predictors():
        lm = predictor.lm or dspy.settings.lm
        if isinstance(lm, PolicyLM):
            using_policy[name] = lm
    return using_policy


def program_faults(student: object) -> list[str]:
    """Faults of the program, of its LMs and of their sampling settings."""
    if isinstance(student, type):
        return [f"student: {student.__name__} is a class; pass a program made of it, {student.__name__}(...)"]
    if not isinstance(student, dspy.Module):
        return [f"student: {type(student).__name__} is not a dspy.Module"]
    predictors = student.named_predictors()
    if not predictors:
        return [no_predictors(student)]
    faults = [
        f"student: predictor {name!r} has no LM; call program.set_lm(PolicyLM(...)) or dspy.configure(lm=...)"
        for name, predictor in predictors
        if (predictor.lm or dspy.settings.lm) is None
    ]
    policies = policies_of(student)
    of_flexes: list[object] = [flex.lm for flex in flexes(student).values()]
    policy_lms = [*policies.values(), *(lm for lm in of_flexes if isinstance(lm, PolicyLM))]
    models = sorted({f"{policy.model} (engine {policy.handle.kind!r})" for policy in policy_lms})
    if len({id(policy.handle) for policy in policy_lms}) > 1:
        faults.append(
            f"student: its predictors hold {len({id(policy.handle) for policy in policy_lms})} different PolicyLMs "
            f"({'; '.join(models)}); one model is trained, so share one PolicyLM and give the others a frozen dspy.LM"
        )
    if not policies and not faults:
        faults.append("student: no predictor speaks with a PolicyLM; call program.set_lm(PolicyLM('model or path'))")
    return faults + _sampling_faults(student)


def trained_faults(student: object, config: FSTConfig | None) -> list[str]:
    """Faults of the setting ``trained``, which names the predictors to train."""
    if config is None or config.trained is None or not isinstance(student, dspy.Module):
        return []
    policies = policies_of(student)
    there_are = ", ".join(policies) or "none"
    faults = [
        f"trained: {name!r} is not a predictor that calls the PolicyLM; those that do: {there_are}"
        for name in config.trained
        if name not in policies
    ]
    configs = {name: predictor.config for name, predictor in student.named_predictors() if name in policies}
    drawn = [configs[n].get("temperature", policies[n].sampling_temperature) for n in config.trained if n in configs]
    if drawn and all(temperature == 0 for temperature in drawn):
        faults.append(
            f"trained: {', '.join(config.trained)} have temperature=0, and greedy replies have no gradient; give one "
            "a temperature above 0"
        )
    return faults


def adapters_faults(student: object, config: FSTConfig | None) -> list[str]:
    """Faults of the setting ``adapters``, which shares LoRA adapters out among predictors."""
    if config is None or not isinstance(student, dspy.Module):
        return []
    if config.adapters == "shared":
        return _lost_adapters(student, config, {})
    trained = list(config.trained or policies_of(student))
    through = adapter_of(config.adapters, trained)
    faults = [
        f"adapters: {name!r} is no trained predictor; there are {', '.join(trained) or 'none'}"
        for name in through
        if name not in trained
    ]
    if left_out := [name for name in trained if name not in through]:
        faults.append(
            f"adapters: {', '.join(left_out)} would be trained and is in no group; add it to one, or name the "
            "predictors to train in trained"
        )
    names = {id(predictor): name for name, predictor in student.named_predictors()}
    for path, part in student.named_sub_modules(dspy.Module):
        if isinstance(part, dspy.BestOfN | dspy.Refine):
            inside = [names[id(p)] for _, p in part.named_predictors() if id(p) in names]
            if len({through.get(name) for name in inside}) > 1:
                faults.append(
                    f"adapters: {type(part).__name__} at {path} asks a module of one LM, and {', '.join(inside)} would "
                    "speak through different LoRA adapters; put them into one group"
                )
    return faults + _lost_adapters(student, config, through)


def _lost_adapters(student: dspy.Module, config: FSTConfig, wanted: Mapping[str, str]) -> list[str]:
    """A fault if predictors of the student speak through several LoRA adapters, and would go on through others.

    It is about who speaks through which. That their rank, alpha, rslora or target is another one is a fault of its own
    (`model_checks.lora_faults`), so each mistake has one message.
    """
    held = {name: adapter for lm in policies_of(student).values() for name, adapter in lm.checkpoint.predictors.items()}
    if len({*held.values()}) < 2 or held == wanted:
        return []
    listed = ", ".join(f"{name} through {adapter}" for name, adapter in held.items())
    grouping: str | dict[str, list[str]] = "per_predictor"
    if adapter_of("per_predictor", held) != held:
        grouping = {adapter: [n for n in held if held[n] == adapter] for adapter in dict.fromkeys(held.values())}
    settings = [f"adapters={grouping!r}"]
    if {*(config.trained or policies_of(student))} != {*held}:
        settings.insert(0, f"trained={[*held]}")
    if config.adapter is None:
        settings.insert(0, "adapter=LoRA(...) as it was trained")
    return [
        f"adapters: the student speaks through several LoRA adapters ({listed}), which cannot be merged into one set "
        f"of weights; go on with the same: set {' and '.join(settings)}"
    ]


def _sampling_faults(student: dspy.Module) -> list[str]:
    """Settings of a PolicyLM, or of a predictor that uses it, with which nothing could be trained."""
    faults = []
    policies = policies_of(student)
    configs = {name: predictor.config for name, predictor in student.named_predictors() if name in policies}
    for policy in policies.values():
        faults += [*bad_numbers({"temperature": None, **policy.kwargs}), *_reshaping(policy.kwargs)]
    for name, config in configs.items():
        faults += [f"predictor {name!r}: {fault}" for fault in _reshaping(config)]
    drawn = [config.get("temperature", policies[name].sampling_temperature) for name, config in configs.items()]
    if drawn and all(temperature == 0 for temperature in drawn):
        faults.append("temperature=0: greedy replies have no gradient; use PolicyLM(temperature=1.0)")
    return list(dict.fromkeys(faults))


def _reshaping(settings: Mapping[str, object]) -> Iterator[str]:
    """Settings that sample tokens from another distribution than the one that training scores."""
    if (temperature := settings.get("temperature")) is not None and (fault := temperature_fault(temperature)):
        yield fault
    for key in RESHAPING:
        if settings.get(key) not in (None, 0, 0.0, 1, 1.0):
            yield f"{key}={settings[key]}: training scores plain temperature sampling; remove it"
