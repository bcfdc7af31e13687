"""What a user put into GEPA's place: an optimizer that cannot search there, or that would fail after the start."""

import inspect
from collections.abc import Iterator, Mapping
from importlib.util import find_spec

import dspy
from dspy.teleprompt import Teleprompter

from dspy_fst.config import FSTConfig
from dspy_fst.errors import meant
from dspy_fst.fast.fast_optimizer import FastOptimizer
from dspy_fst.fast.teleprompter_search import (
    DEMOS,
    TeleprompterSearch,
    demo_limits,
    demo_names,
    has_prompt_model,
    own_prompt_model,
    quiet,
    quiet_streams,
    run_limits,
    seated,
    settled,
    taken_by,
    unwrapped,
)

MIPRO = "pip install 'dspy-fst[mipro]'"
EXAMPLES = "e.g. fast=dspy.SIMBA, or fast=TeleprompterSearch(dspy.MIPROv2, auto=None, num_candidates=6, num_trials=12)"
OWN = "an object with a name and one method, search(seat) -> programs (docs/fast-optimizers.md)"
REFUSED = {
    "GEPA": "GEPA searches by default: leave fast out, and give its options to FSTOptimizer itself",
    "FSTOptimizer": "it trains weights too; in a sequence of optimizers use dspy.BetterTogether(fst=FSTOptimizer(...))",
    "BetterTogether": "it trains weights too; give it this optimizer: dspy.BetterTogether(fst=FSTOptimizer(...))",
    "BootstrapFinetune": "it trains weights; to train them, supervised, before the first search use "
    "warm_start='labels' or compile(teacher=program)",
    "GRPO": "it trains weights; the losses of this package are chosen with loss='grpo', 'dapo', 'gspo' and others",
    "Ensemble": "it joins programs into one of another form, whose texts cannot be trained together; the population of "
    "a compiled program holds several candidates",
    "KNNFewShot": "its program looks demos up at each call, so it is no candidate of fixed texts; use "
    "dspy.BootstrapFewShotWithRandomSearch",
    "AvatarOptimizer": "it is made for dspy.predict.avatar alone; evolve an agent's texts with GEPA, and its tools' "
    "with tool_descriptions='evolved'",
}
"""Class of DSPy's -> why it cannot search in GEPA's place, and what to use."""
NEEDS_OPTUNA = ("MIPROv2", "BootstrapFewShotWithOptuna")
ONLY_DEMOS = ("BootstrapFewShot", "BootstrapFewShotWithRandomSearch", "BootstrapFewShotWithOptuna", "LabeledFewShot")
"""Classes of DSPy's that write no instructions."""
GIVEN = ("trainset", "valset", "seed", "metric")
OF_GEPA = ("reflection_minibatch", "proposals_at_once", "components", "reflection_tokens", "tool_descriptions")
"""Settings that only GEPA reads."""


def fast_faults(
    config: FSTConfig | None,
    fast: object,
    reflection_lm: object,
    propose: object,
    code_proposer: object,
    student: object = None,
    anchors: int | None = None,
) -> Iterator[str]:
    """Faults of the optimizer in GEPA's place, and of what is given beside it.

    Args:
        anchors: With different inputs, of the search with the fewest; None: as many as the settings say.
    """
    if fast is None:
        return
    if isinstance(fast, type) and hasattr(fast, "search") and not issubclass(fast, Teleprompter):
        yield f"fast={fast.__name__}: it is a class, and a search needs an object of it: fast={fast.__name__}(...)"
        return
    if faults := [*_of_own(fast)]:
        yield from faults
        return
    if isinstance(student, dspy.Module) and not student.predictors():
        yield (
            f"fast={_name(fast)}: the program has no predictor outside dspy.Flex, and only GEPA changes the source of "
            "a dspy.Flex; leave fast out"
        )
    for name, given in {"propose": propose, "code_proposer": code_proposer}.items():
        if given is not None:
            yield f"{name}: only GEPA asks it, and fast={_name(fast)} searches in GEPA's place; leave one of them out"
    if isinstance(fast, FastOptimizer) and not isinstance(fast, TeleprompterSearch):
        return
    search = fast if isinstance(fast, TeleprompterSearch) else TeleprompterSearch(fast)  # type: ignore[arg-type]
    yield from _of_teleprompter(search, config, reflection_lm, student, anchors)


def _of_own(fast: object) -> Iterator[str]:
    """What is neither an optimizer of DSPy's nor one of the user's own."""
    if isinstance(fast, TeleprompterSearch):
        made: object = fast.teleprompter
    elif callable(search := getattr(fast, "search", None)) and not isinstance(fast, Teleprompter):
        kind = type(fast).__name__
        if not isinstance(getattr(fast, "name", None), str):
            yield f"fast={kind}: it has no name for messages and recipes; an own optimizer is {OWN}"
        try:
            inspect.signature(search).bind(None)
        except TypeError:
            yield f"fast={kind}: its search takes something else than one seat; an own optimizer is {OWN}"
        return
    else:
        made = fast
    if not isinstance(made, Teleprompter) and not callable(made):
        yield (
            f"fast={made!r}: pass a DSPy optimizer or its class, {EXAMPLES}; or your own, {OWN}; None searches with "
            "GEPA"
        )


def fast_identity(fast: object) -> dict[str, object]:
    """What a run records of the optimizer in GEPA's place; nothing for GEPA."""
    if fast is None:
        return {}
    search = seated(fast)
    return {"fast": [search.name, search.settings if isinstance(search, TeleprompterSearch) else {}]}


def fast_warnings(config: FSTConfig, fast: object) -> list[str]:
    """Settings that do nothing because GEPA does not search, or no one, and demos that nobody asks for."""
    if fast is None:
        return []
    if config.method == "rl":
        return [
            f"fast={_name(fast)} does nothing under method='rl', which never searches. Leave it out, or use "
            "method='fst'"
        ]
    return [*_of_gepa(config, fast), *_without_demos(config, fast)]


def _of_gepa(config: FSTConfig, fast: object) -> Iterator[str]:
    fields = FSTConfig.model_fields
    given = [f"{n}={getattr(config, n)!r}" for n in OF_GEPA if getattr(config, n) != fields[n].default]
    if given:
        does, them = ("does", "it") if len(given) == 1 else ("do", "them")
        yield (
            f"{' and '.join(given)} {does} nothing: GEPA reads {them}, and fast={_name(fast)} searches. "
            f"Leave {them} out"
        )


def _without_demos(config: FSTConfig, fast: object) -> Iterator[str]:
    """An optimizer that could choose demos too, and was not told how many."""
    search = seated(fast)
    if (
        config.demos_evolve
        or not isinstance(search, TeleprompterSearch)
        or isinstance(search.teleprompter, Teleprompter)
    ):
        return
    limits = demo_names(search.name) & taken_by(search.teleprompter)
    if limits and not demo_limits(search.name, search.all_settings):
        yield (
            f"fast={search.name} writes instructions alone, as this run's candidates hold no demos; set "
            "max_bootstrapped_demos=4 if it shall choose demos too"
        )


def _of_teleprompter(
    search: TeleprompterSearch, config: FSTConfig | None, reflection_lm: object, student: object, anchors: int | None
) -> Iterator[str]:
    name = search.name
    faults = [*_before_it_is_made(search, reflection_lm)]
    yield from faults
    if faults or config is None:
        return
    try:
        made = _made(search, config, reflection_lm, student)
    except Exception as error:  # of DSPy's class, or of the user's function
        own = "" if isinstance(unwrapped(search.teleprompter), type) else f"; an own optimizer is {OWN}"
        yield f"fast={name}: it cannot be made ({type(error).__name__}: {error}); mend its arguments{own}"
        return
    if not isinstance(made, Teleprompter):
        yield f"fast={name}: it makes {type(made).__name__}, which is no optimizer of DSPy; an own optimizer is {OWN}"
        return
    settings = {**settled(made), **search.arguments}
    if not isinstance(unwrapped(search.teleprompter), type):  # what a function makes is known only now
        name = type(made).__name__
        if name in REFUSED:
            yield f"fast={name}: {REFUSED[name]}"
            return
    if settings.get("teacher_settings") or settings.get("teacher") is not None:
        yield (
            f"fast={name}: it has a teacher, and demos come from the policy's own rollouts here; leave teacher and "
            "teacher_settings out. A teacher's traces teach the weights: FSTOptimizer.compile(teacher=program)"
        )
    yield from _too_large(name, settings, config, anchors)
    yield from _demos(name, demo_limits(name, settings), config)
    if name == "MIPROv2":
        yield from _trials(settings)


def _before_it_is_made(search: TeleprompterSearch, reflection_lm: object) -> Iterator[str]:
    name, made = search.name, search.teleprompter
    if name in REFUSED:
        yield f"fast={name}: {REFUSED[name]}"
        return
    if name in NEEDS_OPTUNA and find_spec("optuna") is None:
        yield f"fast={name}: it needs optuna, which is not installed: {MIPRO}"
    if has_prompt_model(made) and own_prompt_model(made) is None and reflection_lm is None:
        yield (
            f"fast={name}: it asks an LM for texts and has no frozen one; pass reflection_lm=dspy.LM(...), or give it "
            "a prompt_model"
        )
    if name == "InferRules" and reflection_lm is None:
        yield f"fast={name}: it asks an LM for rules; pass reflection_lm=dspy.LM(...)"
    yield from _unknown_arguments(search)


def _made(search: TeleprompterSearch, config: FSTConfig, reflection_lm: object, student: object) -> Teleprompter:
    """The optimizer as a search makes it. Nothing is asked or measured."""
    predictors = student.predictors() if isinstance(student, dspy.Module) else []
    known = {"metric": lambda *_: 0.0, "prompt_model": reflection_lm, "num_threads": 1, "seed": 0}
    known["task_model"] = (predictors[0].lm if predictors else None) or object()  # MIPROv2 is not made without
    with quiet_streams(), quiet():
        return search.made(known | run_limits(config.max_bootstrapped_demos, config.max_labeled_demos))


def _unknown_arguments(search: TeleprompterSearch) -> Iterator[str]:
    made = search.teleprompter
    taken = search.compile_arguments
    if taken is None:
        return
    if not isinstance(made, Teleprompter):
        taken |= taken_by(made)
    known = sorted(taken - {*GIVEN, "self", "student"})
    for argument in search.arguments:
        if argument in GIVEN:
            yield f"fast: TeleprompterSearch({search.name}, {argument}=...): the search gives it; leave it out"
        elif argument not in taken:
            otherwise = meant(argument, known) or f"; it takes {', '.join(known)}"
            yield f"fast: {search.name} takes no argument {argument}{otherwise}"


def _demos(name: str, most: Mapping[str, int], config: FSTConfig) -> Iterator[str]:
    """Demos beyond those that the run's candidates may hold, and none where demos are all that is searched for.

    Args:
        most: The optimizer's own name of a limit -> the limit.
    """
    only, of_run = name in ONLY_DEMOS, " or ".join(f"{limit}=4" for limit in dict.fromkeys(map(DEMOS.get, most)))
    if only and not any(most.values()):
        yield (
            f"fast={name}: it changes nothing but demos, and may show none; set {of_run} in FSTOptimizer, and give "
            f"{name} no 0, or search for instructions, e.g. with fast=dspy.SIMBA, or with GEPA, the default"
        )
    elif any(most.values()) and not config.demos_evolve:
        given = ", ".join(f"{limit}={number}" for limit, number in most.items() if number)
        instead = "" if only else ", or give it " + ", ".join(f"{limit}=0" for limit, number in most.items() if number)
        yield (
            f"fast={name}: its demos ({given}) would be lost, as this run's candidates hold none; let them: set "
            f"{of_run} in FSTOptimizer{instead}"
        )
    else:
        for limit, number in most.items():
            if number > (allowed := getattr(config, DEMOS[limit])):
                yield (
                    f"fast={name}: {limit}={number} is more than this run's {DEMOS[limit]}={allowed}; give it "
                    f"{limit}={allowed}, or FSTOptimizer {DEMOS[limit]}={number}"
                )


def _too_large(name: str, settings: Mapping[str, object], config: FSTConfig, anchors: int | None) -> Iterator[str]:
    """Batches of the optimizer that are larger than the anchors: DSPy refuses them, after the start of the run."""
    most, size = config.anchor_count if anchors is None else anchors, settings.get("bsize")
    if isinstance(size, int) and size > most:
        yield (
            f"fast={name}: bsize={size} is more than the {most} anchors of a search; give it bsize={most} or fewer, "
            f"e.g. TeleprompterSearch(dspy.{name}, bsize={most}), or use {config.more_anchors(anchors)}"
        )
    size = settings.get("minibatch_size", 35)
    by_itself = name == "MIPROv2" and settings.get("auto", "light") is None and settings.get("minibatch", True)
    if by_itself and isinstance(size, int) and size > most:
        yield (
            f"fast={name}: minibatch_size={size} is more than the {most} anchors of a search; use "
            f"TeleprompterSearch(dspy.{name}, ..., minibatch=False), or minibatch_size={most} or fewer"
        )


def _trials(settings: Mapping[str, object]) -> Iterator[str]:
    """MIPROv2's own rule of which of its numbers go together."""
    auto, numbers = settings.get("auto", "light"), (settings.get("num_candidates"), settings.get("num_trials"))
    if auto is None and None in numbers:
        yield (
            "fast=MIPROv2: with auto=None it needs num_candidates and num_trials: "
            "TeleprompterSearch(dspy.MIPROv2, auto=None, num_candidates=6, num_trials=12)"
        )
    if auto is not None and numbers != (None, None):
        yield f"fast=MIPROv2: auto={auto!r} sets num_candidates and num_trials; leave them out, or give auto=None"


def _name(fast: object) -> str:
    return seated(fast).name
