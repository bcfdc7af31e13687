"""What cannot search in GEPA's place is refused before work, with what to use instead."""

import functools
import sys

import dspy
import pytest
from dspy.teleprompt import Teleprompter
from dspy.teleprompt.grpo import GRPO

from dspy_fst import FSTConfig, FSTOptimizer, TeleprompterSearch
from dspy_fst.preflight.fast_checks import REFUSED, fast_faults, fast_identity, fast_warnings
from dspy_fst.run.secrets import Redactor
from dspy_fst.training.request import Proposers
from tests.fakes import scripted_policy
from tests.fast.seats import Asks, metric, speak, writer

LM, _ = writer()
SMALL, LARGE = FSTConfig(anchors=24), FSTConfig(anchors=64)


def copro(**arguments):
    return TeleprompterSearch(dspy.COPRO, **arguments)


def mipro(**arguments):
    return TeleprompterSearch(dspy.MIPROv2, **arguments)


class Mine:
    name = "Mine"

    def search(self, seat):
        return []


class Unnamed(Mine):
    """Its name is known once it is made."""

    @property
    def name(self):
        return "Unnamed"


class Nearest(Teleprompter):
    """Its k is no number of demos."""

    def __init__(self, metric=None, k=3):
        self.metric, self.k = metric, k


class OnlyFlex(dspy.Module):
    def __init__(self):
        super().__init__()
        self.steps = dspy.Flex("question -> answer")


def with_policy_as_prompt_model():
    policy, _ = scripted_policy(speak)
    with dspy.context(lm=policy):
        return dspy.SIMBA(metric=metric, bsize=8, max_demos=0)


@pytest.mark.parametrize(
    ("fast", "beside", "told"),
    [
        (3, {}, "fast=3: pass a DSPy optimizer or its class"),
        (dspy.COPRO, {"lm": None}, "fast=COPRO: it asks an LM for texts and has no frozen one; pass reflection_lm"),
        (with_policy_as_prompt_model(), {"lm": None}, "fast=SIMBA: it asks an LM for texts and has no frozen one"),
        (dspy.COPRO, {"propose": metric}, "propose: only GEPA asks it, and fast=COPRO searches in GEPA's place"),
        (dspy.COPRO, {"code_proposer": metric}, "code_proposer: only GEPA asks it"),
        (copro(bredth=4), {}, "fast: COPRO takes no argument bredth"),
        (copro(trainset=[]), {}, "fast: TeleprompterSearch(COPRO, trainset=...): the search gives it"),
        (
            dspy.SIMBA(metric=metric, max_demos=0),
            {},
            "fast=SIMBA: bsize=32 is more than the 24 anchors of a search; give it bsize=24",
        ),
        (
            mipro(auto=None, num_candidates=4, minibatch=False),
            {},
            "with auto=None it needs num_candidates and num_trials",
        ),
        (mipro(num_trials=4), {}, "fast=MIPROv2: auto='light' sets num_candidates and num_trials; leave them out"),
        (mipro(auto=None, num_candidates=4, num_trials=4), {}, "minibatch_size=35 is more than the 24 anchors"),
        (
            mipro(teacher_settings={"lm": LM}),
            {},
            "fast=MIPROv2: it has a teacher, and demos come",
        ),
        (
            functools.partial(dspy.MIPROv2, auto=None),
            {"config": LARGE},
            "with auto=None it needs num_candidates and num_trials",
        ),
        (dspy.SIMBA(metric=metric, bsize=8), {}, "fast=SIMBA: its demos (max_demos=4) would be lost"),
        (dspy.SIMBA, {}, "fast=SIMBA: bsize=32 is more than the 24 anchors of a search; give it bsize=24 or fewer"),
        (dspy.SIMBA, {"config": LARGE, "anchors": 8}, "bsize=8), or use more examples in the trainset"),
        (functools.partial(dspy.SIMBA, bsize=25), {}, "fast=SIMBA: bsize=25 is more than the 24 anchors"),
        (copro(breadth=1), {}, "fast=COPRO: it cannot be made (ValueError: Breadth must be greater than 1); mend its"),
        (lambda metric: dspy.COPRO(metric=metric, breadth=1), {}, "Breadth must be greater than 1"),
        (lambda: dspy.Ensemble(), {}, "fast=Ensemble: it joins programs into one of another form"),
        (dspy.InferRules, {"lm": None}, "fast=InferRules: it asks an LM for rules; pass reflection_lm"),
        *(
            (only, {}, "it changes nothing but demos, and may show none; set max_bootstrapped_demos=4 or max_labeled")
            for only in (dspy.BootstrapFewShot, dspy.BootstrapFewShotWithRandomSearch)
        ),
        (dspy.LabeledFewShot, {}, "may show none; set max_labeled_demos=4 in FSTOptimizer"),
        (
            lambda metric: dspy.BootstrapFewShot(metric=metric, max_labeled_demos=0),
            {},
            "fast=BootstrapFewShot: its demos (max_bootstrapped_demos=4) would be lost, as this run's candidates hold "
            "none; let them: set max_bootstrapped_demos=4 or max_labeled_demos=4 in FSTOptimizer",
        ),
        (Mine, {}, "fast=Mine: it is a class, and a search needs an object of it: fast=Mine(...)"),
        (Unnamed, {}, "fast=Unnamed: it is a class"),
        (TeleprompterSearch, {}, "fast=TeleprompterSearch: it is a class"),
        (Mine(), {"student": OnlyFlex()}, "fast=Mine: the program has no predictor outside dspy.Flex"),
        (dspy.COPRO, {"student": OnlyFlex()}, "fast=COPRO: the program has no predictor outside dspy.Flex"),
        (FSTOptimizer(metric=metric, reflection_lm=LM), {}, "fast=FSTOptimizer: it trains weights too"),
        (GRPO, {}, "fast=GRPO: it trains weights"),
        *((getattr(dspy, name), {}, f"fast={name}: ") for name in REFUSED if name not in ("GRPO", "FSTOptimizer")),
    ],
)
def test_it_is_refused(fast, beside, told):
    given = {"lm": LM, "propose": None, "code_proposer": None, "student": Asks(), "config": SMALL, **beside}
    faults = [
        *fast_faults(
            given["config"],
            fast,
            *(given.get(name) for name in ("lm", "propose", "code_proposer", "student", "anchors")),
        )
    ]
    assert len(faults) == 1, faults
    assert told in faults[0]


@pytest.mark.parametrize(
    "fast",
    [
        None,
        dspy.COPRO,
        copro(breadth=4, eval_kwargs={"display_table": 0}),
        dspy.COPRO(metric=metric, prompt_model=LM),
        dspy.SIMBA(metric=metric, bsize=24, max_demos=0),
        mipro(auto=None, num_candidates=4, num_trials=4, minibatch=False),
        mipro(auto=None, num_candidates=4, num_trials=4, minibatch_size=12),
        functools.partial(dspy.SIMBA, bsize=8),
        Nearest,
        Nearest(metric, k=9),
        TeleprompterSearch(dspy.InferRules, num_rules=2, max_bootstrapped_demos=0),
        lambda metric, prompt_model: dspy.COPRO(metric=metric, prompt_model=prompt_model),
    ],
)
def test_it_may_search(fast):
    assert [*fast_faults(SMALL, fast, LM, None, None)] == []


HOLDS_DEMOS = FSTConfig(anchors=24, max_bootstrapped_demos=2, max_labeled_demos=1)


@pytest.mark.parametrize(
    ("fast", "told"),
    [
        (dspy.SIMBA(metric=metric, bsize=8), ["max_demos=4 is more than this run's max_bootstrapped_demos=2"]),
        (
            dspy.BootstrapFewShotWithRandomSearch(metric=metric),
            [
                "max_bootstrapped_demos=4 is more than this run's max_bootstrapped_demos=2; give it "
                "max_bootstrapped_demos=2, or FSTOptimizer max_bootstrapped_demos=4",
                "max_labeled_demos=16 is more than this run's max_labeled_demos=1",
            ],
        ),
        (TeleprompterSearch(dspy.BootstrapFewShot, max_labeled_demos=3), ["max_labeled_demos=3 is more than"]),
        (dspy.LabeledFewShot(), ["k=16 is more than this run's max_labeled_demos=1; give it k=1"]),
        (
            dspy.BootstrapFewShot(max_bootstrapped_demos=0, max_labeled_demos=0),
            ["set max_bootstrapped_demos=4 or max_labeled_demos=4 in FSTOptimizer, and give BootstrapFewShot no 0"],
        ),
        (TeleprompterSearch(dspy.InferRules, max_labeled_demos=2), ["max_labeled_demos=2 is more than"]),
        (dspy.SIMBA(metric=metric, bsize=8, max_demos=2), []),
        (dspy.BootstrapFewShotWithRandomSearch, []),
        (dspy.LabeledFewShot, []),
    ],
)
def test_more_demos_than_the_run_s_candidates_may_hold_are_refused(fast, told):
    faults = [*fast_faults(HOLDS_DEMOS, fast, LM, None, None)]
    assert len(faults) == len(told)
    assert all(part in fault for part, fault in zip(told, faults, strict=True)), faults


def test_an_optimizer_whose_library_is_missing_is_refused_with_the_install_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    [fault] = fast_faults(FSTConfig(), dspy.MIPROv2, LM, None, None)
    assert fault == "fast=MIPROv2: it needs optuna, which is not installed: pip install 'dspy-fst[mipro]'"


def test_what_only_gepa_reads_is_told():
    config = FSTConfig(components="all", reflection_minibatch=4)
    assert fast_warnings(config, None) == []
    [warning] = fast_warnings(config, dspy.COPRO)
    assert "reflection_minibatch=4 and components='all' do nothing: GEPA reads them, and fast=COPRO searches" in warning


class HasNoName:
    def search(self, seat):
        return [seat.program]


class TakesNoSeat:
    name = "seatless"

    def search(self):
        return []


@pytest.mark.parametrize(
    ("fast", "words"),
    [
        (HasNoName(), "fast=HasNoName: it has no name"),
        (TakesNoSeat(), "fast=TakesNoSeat: its search takes something else than one seat"),
        (lambda seat: [seat.program], "it cannot be made"),
        (lambda: ["no optimizer"], "it makes list, which is no optimizer of DSPy"),
        ("simba", "fast='simba': pass a DSPy optimizer or its class"),
    ],
)
def test_what_is_no_optimizer_is_refused_with_the_form_of_an_own_one(fast, words):
    [fault] = fast_faults(SMALL, fast, None, None if callable(fast) else writer, None)
    assert words in fault
    assert "an object with a name and one method, search(seat) -> programs" in fault


def test_an_optimizer_that_never_searches_is_told():
    [warning] = fast_warnings(FSTConfig(method="rl"), dspy.SIMBA)
    assert "fast=SIMBA does nothing under method='rl'" in warning
    assert fast_warnings(HOLDS_DEMOS.model_copy(update={"method": "fst"}), dspy.SIMBA) == []


@pytest.mark.parametrize(
    ("fast", "told"),
    [
        (dspy.SIMBA, True),
        (mipro(auto="light"), True),
        (mipro(max_bootstrapped_demos=0, max_labeled_demos=0), False),
        (functools.partial(dspy.SIMBA, max_demos=0), False),
        (dspy.SIMBA(metric=metric, max_demos=0), False),
        (dspy.COPRO, False),
        (Mine(), False),
    ],
)
def test_an_optimizer_that_could_choose_demos_and_may_not_is_told(fast, told):
    assert fast_warnings(HOLDS_DEMOS, fast) == []
    warnings = fast_warnings(SMALL, fast)
    assert len(warnings) == told
    assert all("writes instructions alone, as this run's candidates hold no demos; set max_bo" in w for w in warnings)


def test_a_run_records_what_searches_and_its_numbers():
    assert fast_identity(None) == {}
    assert fast_identity(copro(breadth=4)) == {"fast": ["COPRO", {"breadth": 4}]}
    assert fast_identity(dspy.COPRO(metric=metric, breadth=4)) != fast_identity(dspy.COPRO(metric=metric, breadth=5))


KEYED = dspy.LM("openai/gpt-5", api_key="not-shaped-like-a-key-7")


class HoldsLM(Mine):
    def __init__(self):
        self.writer = KEYED


@pytest.mark.parametrize(
    "fast",
    [
        dspy.COPRO(metric=metric, prompt_model=KEYED),
        TeleprompterSearch(dspy.COPRO(metric=metric, prompt_model=KEYED)),
        copro(prompt_model=KEYED),
        functools.partial(dspy.COPRO, prompt_model=KEYED),
        HoldsLM(),
    ],
    ids=["made", "wrapped", "argument", "partial", "own"],
)
def test_the_secrets_of_an_optimizer_s_own_lms_are_hidden(fast):
    student = Asks()
    student.set_lm(scripted_policy(speak)[0])
    redactor = Redactor.of(student, *Proposers(fast=fast).lms)
    assert redactor.clean("401: not-shaped-like-a-key-7") == "401: ***"
