"""Calls that are sampled side by side: prompts as a tree, calls that join others, and who decides when they may."""

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import AutoTokenizer

from benchmarks.families import FAMILIES
from dspy_fst.engine import chat, in_process
from dspy_fst.engine.base import Checkpoint
from dspy_fst.engine.generation import BatchDecoder, Pending, SideBySide, generate
from dspy_fst.engine.in_process import InProcessEngine
from dspy_fst.engine.options import InProcessSettings
from programs.lab import BASE
from tests.engine.test_contract import request_of

BY_NAME = {family.name: family for family in FAMILIES}
AS_TREES = ("Llama", "Qwen3-MoE", "GPT-2", "OPT", "DeepSeek-V2")
JOINING = ("Bloom", "GPT-J", "StableLM", "RWKV")
"""Rows may join, and prompts are read one by one: another attention, or no cache at all."""
IN_WAVES = ("Mistral", "Gemma 3 (text)", "Mamba")
"""Windows and states: nothing joins rows that have begun."""


def decoder_of(name: str) -> BatchDecoder:
    torch.manual_seed(0)
    return BatchDecoder(BY_NAME[name].make().eval())


def prompts() -> list[tuple[int, ...]]:
    """Two candidates' system messages, which begin alike, two problems each, a prompt that begins another, and one of
    its own; all of them twice."""
    draw = random.Random(0)

    def ids(count):
        return tuple(draw.randrange(3, 90) for _ in range(count))

    begun, systems, problems = ids(6), (ids(14), ids(11)), (ids(8), ids(5))
    found = [(*begun, *system, *problem) for system in systems for problem in problems]
    return [*found, found[0][:-2], ids(9)] * 2


def calls() -> list[Pending]:
    return [Pending(prompt, 6 + n % 3, (1.0, 0.7)[n % 2], n) for n, prompt in enumerate(prompts())]


def assert_alike(replies, others):
    for one, other in zip(replies, others, strict=True):
        assert (one.ids, one.finish_reason) == (other.ids, other.finish_reason)
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)


def alone(decoder, eos):
    return [generate(decoder, eos, [call])[0] for call in calls()]


@pytest.mark.parametrize("name", [*AS_TREES, *JOINING, *IN_WAVES])
def test_what_prompts_have_in_common_is_read_once_with_the_replies_of_prompts_that_are_read_alone(name):
    decoder, eos = decoder_of(name), frozenset({7})
    together, told = generate(decoder, eos, calls()), decoder.prompt_tokens
    assert told.in_calls == sum(map(len, prompts()))
    unique = set(prompts())
    if name in AS_TREES:
        assert told.read == len({prompt[:end] for prompt in unique for end in range(1, len(prompt) + 1)})
    elif name == "Mamba":  # one length at a time
        assert told.read == sum(map(len, unique))
    else:
        assert told.read == len(unique) * max(map(len, unique))
    assert_alike(together, alone(decoder, eos))


@pytest.mark.parametrize("name", [*AS_TREES, *JOINING])
def test_calls_that_join_others_between_two_tokens_have_the_replies_that_they_have_alone(name):
    decoder, eos = decoder_of(name), frozenset({7})
    waiting, replies, batch = (
        sorted(calls(), key=lambda call: -call.max_tokens),
        {},
        SideBySide(decoder, frozenset({7})),
    )
    while waiting or batch.calls:
        batch.admit(waiting[:2])  # prompts longer and shorter than those of the rows that have begun
        waiting = waiting[2:]
        for _ in range(2 if waiting else 1):
            replies |= {call.seed: reply for call, reply in (batch.step() if batch.calls else [])}
    assert_alike([replies[seed] for seed in range(len(replies))], alone(decoder, eos))


@pytest.mark.parametrize("name", IN_WAVES)
def test_nothing_joins_rows_that_have_begun_where_the_cache_does_not_allow_it(name):
    batch, (first, *others) = SideBySide(decoder_of(name), frozenset()), calls()
    assert batch.room_for([first], 10_000, mixed=False) == 1
    batch.admit([first])
    batch.step()
    assert batch.room_for(others, 10_000, mixed=False) == 0


def test_a_text_of_another_adapter_joins_only_where_a_batch_may_hold_several():
    batch, own = SideBySide(decoder_of("Llama"), frozenset()), calls()
    batch.admit(own[:1])
    other = Pending(own[1].prompt, 4, 1.0, 1, "other")
    assert batch.room_for([other], 10_000, mixed=False) == 0
    assert batch.room_for([other], 10_000, mixed=True) == 1


def test_a_call_joins_when_a_reply_ended_only_if_it_fits_the_budget():
    batch = SideBySide(decoder_of("Llama"), frozenset())
    short, long, other = (Pending(tuple(range(3, 13)), tokens, 1.0, tokens) for tokens in (2, 8, 4))
    assert batch.room_for([short, long, other], 40, mixed=False) == 2
    batch.admit([short, long])
    assert (batch.step(), batch.room_for([other], 40, mixed=False)) == ([], 0)
    assert [call.seed for call, _ in batch.step()] == [2]
    assert batch.room_for([other], 40, mixed=False) == 1


# ---- the engine decides ---------------------------------------------------------------------------------------------


@pytest.fixture
def engine(monkeypatch):
    """Replies end at their limits alone. ``engine.joined``: (tokens since others joined, seeds) of each admission."""
    engine = InProcessEngine(InProcessSettings(device="cpu", dtype="float32", linger_s=5.0))
    engine.load(Checkpoint("base", BASE))
    engine.joined, admit = [], SideBySide.admit

    def watched(batch, joining):
        if joining:
            engine.joined.append((batch.steps, [call.seed for call in joining]))
        admit(batch, joining)

    monkeypatch.setattr(in_process, "JOIN_ON", {"cpu"})
    monkeypatch.setattr(SideBySide, "admit", watched)
    monkeypatch.setattr(engine, "_eos", frozenset)
    yield engine
    engine.close()


def asked(engine, limits, delays):
    """Replies to one call for each limit, asked after these delays; and the order in which they came."""
    came = []

    def ask(n):
        time.sleep(delays[n])
        reply = engine.complete(request_of(f"{n % 3} 2 3", max_tokens=limits[n]), n)
        came.append(n)
        return reply

    engine.expect(len(limits))
    with ThreadPoolExecutor(len(limits)) as pool:
        return list(pool.map(ask, range(len(limits)))), came


def test_calls_beyond_the_budget_join_as_replies_end_at_the_same_tokens_whoever_came_first(engine):
    limits = [3, 40, 4, 40, 5, 6, 30, 7]
    found = []
    for draw in (1, 2):
        delays = [random.Random(draw).random() / 20 for _ in limits]
        random.Random(draw).shuffle(delays)
        engine.settings = InProcessSettings(device="cpu", max_batch_tokens=240, linger_s=5.0)
        replies, came = asked(engine, limits, delays)
        assert came.index(0) < came.index(1), "a short reply does not wait for the longest row"
        found.append(([(r.completion_ids, r.logprobs) for r in replies], list(engine.joined)))
        engine.joined.clear()
    assert found[0] == found[1]
    joined = found[0][1]
    assert len(joined) > 1
    assert all(0 < steps < 40 for steps, _ in joined[1:]), "they joined rows that had begun"


def test_on_a_cpu_calls_of_callers_in_flight_wait_for_the_batch_as_joining_takes_longer_there(engine, monkeypatch):
    monkeypatch.setattr(in_process, "JOIN_ON", frozenset({"cuda"}))
    engine.settings = InProcessSettings(device="cpu", max_batch_tokens=240, linger_s=5.0)
    beside, admit = [], SideBySide.admit

    def watched(batch, joining):
        beside.append(len(batch.calls))
        admit(batch, joining)

    monkeypatch.setattr(SideBySide, "admit", watched)
    replies, _ = asked(engine, [3, 40, 4, 40, 5, 6, 30, 7], [0.0] * 8)
    assert [len(reply.completion_ids) for reply in replies] == [3, 40, 4, 40, 5, 6, 30, 7]
    assert len(beside) > 1
    assert set(beside) == {0}, "each admission began a batch"


def rollouts(engine, draw):
    """Two callers: one asks for a long reply, the other for short ones, one after another, at any time."""
    wait = random.Random(draw)

    def short():
        found = []
        for n in range(12):
            found.append(engine.complete(request_of(f"{n} 2", max_tokens=10), n))
            time.sleep(wait.random() / 50)
        return found

    def ask_for_much():
        reply = engine.complete(request_of("9 9", max_tokens=60), 99)
        engine.expect(1)
        return reply

    engine.expect(2)
    with ThreadPoolExecutor(2) as pool:
        several, long = pool.submit(short), pool.submit(ask_for_much)
        replies = [*several.result(), long.result()]
    return [(reply.completion_ids, reply.logprobs) for reply in replies]


def test_later_calls_join_a_long_reply_at_tokens_that_do_not_depend_on_time(engine, monkeypatch):
    monkeypatch.setattr(in_process, "JOIN_AFTER", 12)
    found = []
    for draw in (1, 2):
        found.append((rollouts(engine, draw), list(engine.joined)))
        engine.joined.clear()
    assert found[0] == found[1]
    joined = [(steps, seeds) for steps, seeds in found[0][1] if seeds != [99]]
    assert joined[:4] == [(0, [0, 99]), (12, [1]), (12, [2]), (12, [3])]


def test_nobody_is_waited_for_twice_while_rows_stand_still(engine, monkeypatch):
    monkeypatch.setattr(in_process, "JOIN_AFTER", 2)
    engine.settings = InProcessSettings(device="cpu", linger_s=1.0)
    in_vain, wait_for = [], engine._lock.wait_for

    def counted(predicate, timeout=None):
        came = wait_for(predicate, timeout)
        in_vain.extend([timeout] if timeout == 1.0 and not came else [])
        return came

    monkeypatch.setattr(engine._lock, "wait_for", counted)
    engine.expect(3)  # one of them never calls
    with ThreadPoolExecutor(2) as pool:
        long = pool.submit(engine.complete, request_of("9 9", max_tokens=60), 99)
        pool.submit(engine.complete, request_of("1 2", max_tokens=4), 0).result()
        replies = [engine.complete(request_of("1 2", max_tokens=4), n) for n in (1, 2, 3)]
        assert len(long.result().completion_ids) == 60
    assert [len(reply.completion_ids) for reply in replies] == [4, 4, 4]
    assert 1 <= len(in_vain) <= 3, "once for the batch, and once or twice for the first rows that joined"


def test_new_weights_do_not_wait_for_calls_that_would_join_for_ever(engine):
    stop, versions = threading.Event(), []

    def keep_asking(n):
        while not stop.is_set():
            versions.append(engine.complete(request_of(f"{n} 2", max_tokens=20 + n), n).weights)

    def told(count):
        deadline = time.monotonic() + 60
        while len(versions) < count and time.monotonic() < deadline:
            time.sleep(0.01)
        return len(versions)

    with ThreadPoolExecutor(3) as pool:
        asking = [pool.submit(keep_asking, n) for n in range(3)]
        try:
            told(4)
            engine.load(Checkpoint("next", BASE))
            loaded = len(versions)
            assert told(loaded + 8) >= loaded + 8
        finally:
            stop.set()
        for done in asking:
            done.result()
    assert versions[0] == "base"
    assert set(versions[loaded + 3 :]) == {"next"}, "three replies may have been handed out before and told after"


# ---- prompts that are asked again ------------------------------------------------------------------------------------


@pytest.fixture
def rendered(monkeypatch):
    """A renderer of the laboratory's tokenizer; ``times`` counts what its template rendered."""
    times, render = [], chat.rendered_ids
    monkeypatch.setattr(chat, "rendered_ids", lambda *given, **more: times.append(0) or render(*given, **more))
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    return chat.PromptRenderer(tokenizer, chat.PLAIN), tokenizer, times


def test_a_prompt_whose_template_tells_the_date_is_rendered_each_time(rendered):
    renderer, tokenizer, times = rendered
    tokenizer.chat_template = "{% set day = strftime_now('%d') %}" + tokenizer.chat_template
    assert renderer.ids(request_of("1 2 3")) == renderer.ids(request_of("1 2 3"))
    assert len(times) == 2
