"""What the reflection LM's calls cost: over HTTP from our own chat endpoint, by LiteLLM and by DSPy's own engine.

The laboratory's model cannot reflect: its context ends before DSPy's prompt for that does, and it writes no JSON. Whole
searches ask a scripted model behind the same endpoint; single calls ask the laboratory's.
"""

from types import SimpleNamespace

import dspy
import httpx
import litellm
import pytest

from dspy_fst.fast.journal_protocol import NoJournal
from dspy_fst.fast.reflection_cost import CostMeter
from dspy_fst.fast.reflections import Reflections
from dspy_fst.report.costs import ReflectionLM
from dspy_fst.report.from_events import record_of
from dspy_fst.report.metric_names import entry_of
from dspy_fst.run.search_journal import Journal
from dspy_fst.serve.app import create_app
from dspy_fst.serve.serving_settings import ServeSettings
from tests.fast.test_components import evolved
from tests.report.happenings import cycle, plan
from tests.serve.command import compiled_lab
from tests.serve.fake_vllm import FakeVLLM, behind
from tests.serve.makers import KEY, compiled, served, wait_until

NAME = "openai/policy"
REPLY = '{"new_instruction": "Finds what matters."}'
PRICE = {"input_cost_per_token": 1e-6, "output_cost_per_token": 2e-6, "litellm_provider": "openai", "mode": "chat"}


def at(app):
    with served(app) as url:
        wait_until(lambda: httpx.get(f"{url}/ready", timeout=60).status_code == 200, "weights are served", 120)
        yield f"{url}/v1"


@pytest.fixture(scope="module")
def laboratory():
    """The laboratory's model behind our chat endpoint."""
    yield from at(create_app(compiled_lab(), ServeSettings(api_key=KEY)))


@pytest.fixture(scope="module")
def server():
    """One that reflects, behind the same endpoint: 7 tokens read and ``len(REPLY)`` written a call."""
    program, _ = compiled()
    with behind(program, FakeVLLM(lambda messages, seed: REPLY)):
        yield from at(create_app(program, ServeSettings(api_key=KEY)))


@pytest.fixture
def priced():
    """LiteLLM knows a price of the model."""
    litellm.register_model({NAME: PRICE})
    yield
    litellm.model_cost.pop(NAME)


def asked(server, **more):
    options = {"api_base": server, "api_key": KEY, "cache": False, "num_retries": 0, "max_tokens": 64, **more}
    return dspy.LM(NAME, temperature=0.5, **options)


def searched(lm, **more):
    return evolved(dspy.Predict("question -> answer"), reflection_lm=lm, budget=8, **more)


def usage_of(lm):
    reports = [entry["usage"] for entry in lm.history]
    return (sum(report[name] for report in reports) for name in ("prompt_tokens", "completion_tokens"))


@pytest.mark.parametrize("engine", ["litellm", "auto"])
def test_tokens_are_counted_and_a_price_that_nobody_knows_is_unknown(server, engine):
    lm = asked(server, engine=engine)
    lm("asked before the search")
    lm.history.clear()
    search = searched(lm)
    read, written = usage_of(lm)
    assert (read, written) == (7 * len(lm.history), len(REPLY) * len(lm.history))
    assert len(lm.history) == search.counts["reflection_calls"] == search.counts["reflection_calls_unpriced"] > 0
    assert (search.counts["reflection_input_tokens"], search.counts["reflection_output_tokens"]) == (read, written)
    assert search.money == {}


def test_where_litellm_knows_the_price_it_is_told_in_dollars_and_a_search_taken_up_again_tells_the_same(
    server, priced, tmp_path
):
    lm = asked(server, engine="litellm")
    first = searched(lm, journal=Journal(tmp_path / "journal", {"cycle": 0}))
    read, written = usage_of(lm)
    calls = len(lm.history)
    assert first.money == {"dollars": pytest.approx(read * 1e-6 + written * 2e-6)}
    assert first.counts["reflection_calls_unpriced"] == 0
    again = searched(lm, journal=Journal(tmp_path / "journal", {"cycle": 0}))
    assert len(lm.history) == calls, "everything is on record"
    assert (again.money, again.counts) == (first.money, first.counts)


@pytest.mark.parametrize("engine", ["litellm", "auto"])
def test_an_answer_of_dspy_s_cache_costs_nothing(laboratory, engine, priced):
    lm = asked(laboratory, engine=engine, cache=True, max_tokens=8)
    meter = CostMeter(lm)
    lm(f"once {engine}")
    spent = meter.take()
    assert spent["reflection_calls"] == 1
    assert spent["reflection_output_tokens"] <= 8
    assert ("dollars" in spent) == (engine == "litellm"), "DSPy's own engine does not ask LiteLLM"
    lm(f"once {engine}")
    assert len(lm.history) == 2
    assert meter.take() == {}


def test_the_price_of_a_cached_answer_of_dspy_s_own_engine_is_not_counted_again():
    """As DSPy 3.4's history tells of one: the cost of the first time, no usage, and the reply with its own."""
    meter = CostMeter(lm := SimpleNamespace(history=[]))
    lm.history.append(
        {"uuid": "1", "usage": {}, "cost": 0.5, "response": (SimpleNamespace(usage={"input_tokens": 9}),)}
    )
    assert meter.take() == {}
    lm.history.append({"uuid": "2", "usage": {"input_tokens": 9, "output_tokens": 1}, "cost": 0, "response": None})
    assert meter.take() == {
        "reflection_calls": 1,
        "reflection_input_tokens": 9,
        "reflection_output_tokens": 1,
        "dollars": 0.0,
    }, "a price that is known to be 0"


def draws_none(*_):
    raise AssertionError("no demos are wanted here")


@pytest.mark.parametrize("at_once", [1, 3])
def test_each_call_counts_once_in_reflections_that_fail_too_and_with_several_in_flight(server, at_once):
    def breaks(candidate, dataset, components):
        lm(f"asked about {candidate['last']}, and then it goes wrong")
        raise ValueError("no")

    lm = asked(server, engine="litellm")
    kept = Kept()
    reflections = Reflections(breaks, kept, {}, draws_none, (), CostMeter(lm), collects_warnings=False)
    lm("a judge of the metric asks the same LM")
    jobs = [({"last": str(number)}, {"last": []}, ["last"]) for number in range(at_once)]
    for candidate, _, components in jobs:
        reflections.expect(reflections.next_key(candidate, components))
    reflections.reflect_many(jobs)
    assert reflections.counts["reflections_failed"] == 2 * at_once, "each is tried again"
    assert reflections.counts["reflection_calls"] == len(lm.history) - 1 == 2 * at_once
    assert sum(gave.get("spent", {}).get("reflection_calls", 0) for gave in kept.gave) == 2 * at_once


class Kept(NoJournal):
    """A journal that forgets nothing and recalls nothing."""

    def __init__(self):
        self.gave = []

    def record(self, kind, key, gave):
        self.gave.append(gave)
        return gave


WORDS = {
    "priced": (ReflectionLM(3, 2000, 10, 0, 0, 0.012345), "3 calls, 2,000 tokens read and 10 written, 0.01235 dollars"),
    "unpriced": (ReflectionLM(1, 20, 10, 0, 1), "1 call, 20 tokens read and 10 written, price unknown"),
    "partly": (
        ReflectionLM(3, 20, 10, 1, 2, 0.5),
        "3 calls, at least 20 tokens read and 10 written, at least 0.5 dollars (the price of 2 is unknown)",
    ),
    "silent": (ReflectionLM(2, 0, 0, 2, 2), "2 calls, tokens not reported, price unknown"),
    "free": (ReflectionLM(2, 5, 5, 0, 0, 0.0), "2 calls, 5 tokens read and 5 written, 0 dollars"),
}


@pytest.mark.parametrize(("cost", "words"), WORDS.values(), ids=WORDS)
def test_a_cost_is_told_in_words(cost, words):
    assert cost.words == words


def test_a_run_s_cost_is_the_sum_over_its_searches_and_trackers_get_it():
    counts = {"reflection_calls": 2, "reflection_input_tokens": 70, "reflection_output_tokens": 5}
    events = [
        plan(),
        cycle(0, {"a": 0.5}, {}, ["a"], counts=counts) | {"dollars": 0.25},
        cycle(1, {"a": 0.5}, {}, ["a"], counts={**counts, "reflection_calls_unpriced": 2}),
    ]
    assert record_of(events).costs.reflection_lm == ReflectionLM(4, 140, 10, 0, 2, 0.25)
    assert record_of(events[:1]).costs.reflection_lm == ReflectionLM()
    first, second = (entry_of(event).values for event in events[1:])
    assert (first["search/dollars"], first["search/reflection_input_tokens"]) == (0.25, 70)
    assert "search/dollars" not in second, "an unknown price has no number"
