"""dspy.GEPA's own options: those that mean something here are taken, all others are refused with what to use."""

import inspect

import dspy
import gepa
import pytest

from dspy_fst import ConfigurationError, FSTConfig, FSTOptimizer
from dspy_fst.fast.evolve import GEPAOptions
from dspy_fst.preflight.argument_checks import search_faults
from dspy_fst.preflight.gepa_names import INSTEAD, KWARGS, gepa_kwargs_faults
from tests.fast.seats import Seated, metric, writer

TAKEN = {*inspect.signature(FSTOptimizer).parameters, *FSTConfig.model_fields}


@pytest.mark.parametrize("name", list(inspect.signature(dspy.GEPA).parameters))
def test_every_option_of_dspy_s_gepa_is_taken_or_refused_by_name(name):
    assert (name in TAKEN) != (name in INSTEAD)


@pytest.mark.parametrize("name", list(inspect.signature(gepa.optimize).parameters))
def test_every_option_of_gepa_is_taken_or_refused_with_what_to_use(name):
    faults = gepa_kwargs_faults({name: []})
    assert (faults == []) == (name in KWARGS)
    assert not any("it may hold" in fault for fault in faults)


def test_what_is_refused_is_told_at_once_with_what_to_use():
    with pytest.raises(ConfigurationError) as error:
        FSTOptimizer(
            metric=metric,
            use_merge=True,
            max_metric_calls=100,
            component_selector="all",
            gepa_kwargs={"batch_sampler": "epoch_shuffled", "callbacks": print},
            cycle=3,
        )
    told = "\n".join(error.value.faults)
    assert len(error.value.faults) == 6
    for words in (
        "max_metric_calls: it is an option of dspy.GEPA; here use search_rollouts=...",
        "use_merge: it is an option of dspy.GEPA; here use population_size=...",
        "component_selector='all': the built-in ones are a setting here, components='all'",
        "gepa_kwargs: batch_sampler is not taken; use reflection_minibatch=...",
        "gepa_kwargs: callbacks must be a list",
        "cycle: there is no such setting",
    ):
        assert words in told


def test_a_proposer_of_dspy_s_gepa_may_stand_beside_the_reflection_lm():
    lm, _ = writer()
    given = {"config": FSTConfig(), "metric": metric, "reflection_lm": lm, "propose": proposes}
    assert search_faults(**given, exclusive=False) == []
    assert len(search_faults(**given)) == 1
    proposers = (
        FSTOptimizer(metric=metric, reflection_lm=lm, instruction_proposer=proposes).arguments(None, []).proposers
    )
    assert (proposers.propose, proposers.reflection_lm, proposers.alone) == (proposes, lm, False)
    with pytest.raises(ConfigurationError, match="are the same thing"):
        FSTOptimizer(metric=metric, propose=proposes, instruction_proposer=proposes)


def proposes(candidate, reflective_dataset, components_to_update):
    return {name: f"{candidate[name]} even" for name in components_to_update}


def test_selector_callbacks_and_stops_are_gepa_s():
    seen, chosen = [], []

    class Watches:
        def on_iteration_start(self, event):
            seen.append(event["iteration"])

    def selects(state, trajectories, subsample_scores, candidate_idx, candidate):
        chosen.append(candidate_idx)
        return [*candidate]

    options = GEPAOptions(selects, (Watches(),), (lambda state: len(seen) >= 2,))
    search = Seated().search(None, options=options, propose=proposes, feedback=lambda *_: "wrong", budget=500)
    assert seen == [1, 2]
    assert chosen
    assert search.counts["reflections"] == len(chosen)
