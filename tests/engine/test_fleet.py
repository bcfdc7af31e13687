"""Several servers as one engine, with scripted servers in the place of the real ones."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from dspy.lm15 import Config, InvalidRequestError, Message, Request

from dspy_fst.config import FSTConfig
from dspy_fst.engine.base import Checkpoint, Holding, Scorer
from dspy_fst.engine.making import engine_maker
from dspy_fst.engine.vllm import repeating as repeating_module
from dspy_fst.engine.vllm import supervisor as supervisor_module
from dspy_fst.engine.vllm.fleet import alike as alike_module
from dspy_fst.engine.vllm.fleet import fleet as fleet_module
from dspy_fst.engine.vllm.fleet import member as member_module
from dspy_fst.engine.vllm.fleet import placing
from dspy_fst.engine.vllm.fleet.affinity import BLOCK_CHARACTERS, SPILL_CALLS, Routes, beginnings
from dspy_fst.engine.vllm.fleet.alike import Kind
from dspy_fst.engine.vllm.fleet.each import members_of
from dspy_fst.engine.vllm.fleet.fleet import Fleet
from dspy_fst.engine.vllm.fleet.member import FleetServer
from dspy_fst.engine.vllm.fleet.roster import Due
from dspy_fst.engine.vllm.launch import vllm_environment
from dspy_fst.engine.vllm.served.dspy_fst_weight_check import require_heard
from dspy_fst.engine.vllm.server_settings import VLLMSettings, vllm_faults
from dspy_fst.engine.vllm.supervisor import Supervisor
from dspy_fst.errors import (
    ConfigurationError,
    EngineError,
    NoAnswerError,
    ServerDiedError,
    ServerReplacedError,
    SyncError,
)
from dspy_fst.policy_lm import PolicyLM
from dspy_fst.preflight.ray_checks import room_faults, servers_on_ray
from programs.lab import BASE
from tests.engine.test_supervisor import Server, World

LIMIT_S = 20
"""Of every wait here; none is near it on a machine that is not broken."""
PAIR = ("http://a:1", "http://b:2")


class Place(World):
    """Servers by the place that they stand for; a place's server may be replaced by another one."""

    def __init__(self) -> None:
        super().__init__()
        self.places: dict[int, list[Server]] = {}
        self.keys: dict[Any, int] = {}

    def make(self, settings: VLLMSettings) -> Server:
        server = super().make(settings)
        key = settings.attach_url or settings.log_path
        server.place = self.keys.setdefault(key, len(self.keys))  # type: ignore[attr-defined]
        self.places.setdefault(server.place, []).append(server)  # type: ignore[attr-defined]
        return server


def place_of(server: Server) -> int:
    return server.place  # type: ignore[attr-defined]


@pytest.fixture(autouse=True)
def hardly_any_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FIRST_WAIT_S", "LONGEST_WAIT_S", "JITTER_S"):
        monkeypatch.setattr(repeating_module, name, 0.001)
    monkeypatch.setattr(supervisor_module, "RELAUNCH_PAUSE_S", 0.001)
    monkeypatch.setattr(member_module, "RETURN_PAUSE_S", 0.01)
    monkeypatch.setattr(fleet_module, "vllm_faults", lambda settings: [])
    monkeypatch.setattr(fleet_module, "require_alike", lambda settings: None)


@pytest.fixture
def world() -> Place:
    return Place()


@pytest.fixture
def fleet(world: Place, tmp_path: Path) -> Iterator[Fleet]:
    """Two servers that are launched here."""
    yield from made(world, VLLMSettings(servers=2, log_path=tmp_path / "log", max_restarts=2))


@pytest.fixture
def attached(world: Place) -> Iterator[Fleet]:
    """Two servers that somebody else launched."""
    yield from made(world, VLLMSettings(attach_url=PAIR))


def made(world: Place, settings: VLLMSettings) -> Iterator[Fleet]:
    fleet = Fleet(settings, world.make)  # type: ignore[arg-type]
    fleet.told = []  # type: ignore[attr-defined]
    fleet.on_recovery(fleet.told.append, None)  # type: ignore[attr-defined]
    yield fleet
    fleet.close()


def asking(text: str, *more: str) -> Request:
    """A question, or a conversation: question, answer, question ..."""
    turns = [(Message.assistant if turn % 2 else Message.user)(said) for turn, said in enumerate((text, *more))]
    return Request("policy", tuple(turns), system="Answer." + " Be brief." * 60, config=Config(max_tokens=4))


def until(fleet: Fleet, holds: Callable[[], bool]) -> None:
    with fleet._changed:
        assert fleet._changed.wait_for(holds, LIMIT_S)


def states(fleet: Fleet) -> list[str]:
    return [member.state for member in fleet.members]


def dies(server: Server, seed: int) -> None:
    raise ServerDiedError("vLLM died, exit status 137, log /tmp/log:\n  | last words")


# Who gets a call


class Busy:
    def __init__(self) -> None:
        self.in_flight = 0


def test_a_group_s_calls_and_what_continues_them_go_to_one_server_and_the_next_group_to_another():
    routes, servers = Routes[Busy](), [Busy(), Busy()]

    def goes(*texts: str) -> Busy:
        return routes.choose(beginnings(asking(*texts)), servers)

    first = goes("one")
    first.in_flight = SPILL_CALLS + 1  # all of its group but one
    second = goes("two")
    assert second is not first
    second.in_flight = SPILL_CALLS + 1
    assert [goes("one") for _ in range(4)] == [first] * 4
    assert [goes("two") for _ in range(4)] == [second] * 4
    assert goes("one", "an answer " * BLOCK_CHARACTERS, "go on") is first
    assert goes("one", "an answer " * BLOCK_CHARACTERS, "go on", "yes", "and?") is first


def test_problems_that_share_an_instruction_alone_are_spread():
    routes, servers = Routes[Busy](), [Busy(), Busy()]
    problems = [f"{number} " * 800 for number in range(6)]
    chosen = [routes.choose(beginnings(asking(problem)), servers) for problem in problems]
    assert [server is chosen[0] for server in chosen] == [True, False] * 3


def test_a_server_with_much_more_to_do_gets_no_call_for_its_cache_and_then_both_have_the_prompt():
    routes, servers = Routes[Busy](), [Busy(), Busy()]
    prompt = beginnings(asking("one"))
    first = routes.choose(prompt, servers)
    (other,) = (server for server in servers if server is not first)
    first.in_flight = SPILL_CALLS
    assert routes.choose(prompt, servers) is first
    first.in_flight += 1
    assert routes.choose(prompt, servers) is other
    first.in_flight = 1
    assert routes.choose(prompt, servers) is other  # it has read the prompt, too, and less to do


def test_keys_and_values_of_another_adapter_or_of_older_weights_are_of_no_use():
    request = asking("one")
    assert not set(beginnings(request, "one")) & set(beginnings(request, "another"))
    routes, servers = Routes[Busy](), [Busy(), Busy()]
    chosen = [routes.choose(beginnings(request), servers)]
    routes.forget_all()
    chosen.append(routes.choose(beginnings(request), servers))
    assert chosen[0] is not chosen[1]  # equally loaded ones take turns


def test_the_memory_of_prompts_is_bounded(monkeypatch):
    monkeypatch.setattr("dspy_fst.engine.vllm.fleet.affinity.MOST_BEGINNINGS", 50)
    routes, servers = Routes[Busy](), [Busy()]
    for number in range(200):
        routes.choose(beginnings(asking(str(number))), servers)
    assert len(routes._readers) < 60


def test_calls_are_spread_over_the_servers(world, fleet, weights):
    fleet.load(weights("v0"))
    both = threading.Barrier(2)
    world.on_ask = lambda server, seed: both.wait(LIMIT_S)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda seed: fleet.complete(asking(str(seed) * 600), seed), range(2)))
    assert {number for number, _ in world.asked} == {0, 1}
    assert [member.in_flight for member in fleet.members] == [0, 0]
    assert fleet._routes._readers
    fleet.load(weights("v1"))  # empties the servers' caches
    assert not fleet._routes._readers


def test_of_the_servers_holdings_the_one_that_differs_is_told(world, fleet, weights, monkeypatch):
    fleet.load(weights("v0"))
    sound = Holding({"w": "1"}, {}, "float32")
    for other in (replace(sound, wrong={"w": "stale"}), replace(sound, digests={"w": "2"})):
        of_each = {fleet.members[0]: sound, fleet.members[1]: other}
        monkeypatch.setattr(FleetServer, "held", lambda member, checkpoint, of_each=of_each: of_each[member])
        assert fleet.held(weights("v0")) is other
        of_each[fleet.members[1]] = sound
        assert fleet.held(weights("v0")) is sound


def test_a_run_that_has_ended_leaves_no_check_behind(world, fleet, weights):
    fleet.on_recovery(print, lambda server: None)
    fleet.load(weights("v0"))
    fleet.on_recovery(print, None)  # the check holds the trainer
    assert fleet._roster.due.check is None


def test_settings_and_servers_are_checked_before_any_gets_weights(world, fleet, weights, monkeypatch):
    def differ(settings: VLLMSettings) -> None:
        raise EngineError("the servers at attach_url differ")

    monkeypatch.setattr(fleet_module, "require_alike", differ)
    with pytest.raises(EngineError, match="differ"):
        fleet.load(weights("v0"))
    monkeypatch.setattr(fleet_module, "vllm_faults", lambda settings: ["servers is 0"])
    with pytest.raises(EngineError, match="cannot start vLLM: servers is 0"):
        fleet.load(weights("v0"))
    assert world.launched == []


# Publishing


def test_nobody_samples_before_every_server_serves_the_new_weights_verified(world, fleet, weights):
    fleet.load(weights("v0"))
    loading, go_on, checked = threading.Event(), threading.Event(), []

    def slow(server: Server, checkpoint: Checkpoint) -> None:
        if place_of(server) == 1:
            loading.set()
            assert go_on.wait(LIMIT_S)

    def verify(server: Scorer) -> None:
        checked.append((place_of(server), len(world.asked)))  # type: ignore[arg-type]

    world.on_load = slow
    fleet.on_recovery(print, verify)
    with ThreadPoolExecutor(8) as pool:
        publish = pool.submit(fleet.load, weights("v1"))
        assert loading.wait(LIMIT_S)
        calls = [pool.submit(fleet.complete, asking("x"), seed) for seed in range(6)]
        assert not world.asked
        go_on.set()
        publish.result(LIMIT_S)
        assert {call.result(LIMIT_S).weights for call in calls} == {"v1"}
    assert sorted(checked) == [(0, 0), (1, 0)]
    assert fleet.weights == "v1"


def test_servers_are_checked_side_by_side(world, fleet, weights):
    both = threading.Barrier(2)
    fleet.on_recovery(print, lambda server: both.wait(LIMIT_S))
    fleet.load(weights("v0"))


def test_a_server_that_does_not_take_new_weights_is_left_behind_until_it_does(world, attached, weights):
    attached.load(weights("v0"))
    back = threading.Event()

    def refuses(server: Server, checkpoint: Checkpoint) -> None:
        if place_of(server) == 1 and not back.is_set():
            raise NoAnswerError("nobody listens")

    world.on_load = refuses
    attached.load(weights("v1"))
    assert states(attached) == ["up", "lost"]
    assert {attached.complete(asking(str(seed)), seed).weights for seed in range(4)} == {"v1"}
    attached.load(weights("v2"))
    back.set()
    until(attached, lambda: states(attached) == ["up", "up"])
    assert world.places[1][-1].loaded[-1] == "v2"
    assert attached.told[-1] == "server 2 of 2 (http://b:2): it is back, and serves weights v2, verified"


def test_other_weights_on_any_server_stop_the_publish(world, fleet, weights):
    fleet.load(weights("v0"))

    def verify(server: Scorer) -> None:
        if place_of(server) == 1:  # type: ignore[arg-type]
            raise SyncError("other weights")

    fleet.on_recovery(print, verify)
    with pytest.raises(SyncError, match="other weights"):
        fleet.load(weights("v1"))
    assert fleet.weights is None
    with pytest.raises(EngineError, match="no weights are served"):
        fleet.complete(asking("x"), 1)


def test_the_first_load_needs_all_servers_and_ends_those_that_started(world, fleet, weights):
    def refuses(server: Server, checkpoint: Checkpoint) -> None:
        if place_of(server) == 1:
            raise EngineError("no memory is left")

    world.on_load = refuses
    with pytest.raises(EngineError, match="no memory is left"):
        fleet.load(weights("v0"))
    assert all(server.closed.is_set() for server in world.servers if server.loaded)
    world.on_load = lambda server, checkpoint: None
    fleet.load(weights("v0"))
    assert fleet.complete(asking("x"), 1).weights == "v0"


# A server is lost


def test_a_lost_server_s_calls_are_asked_elsewhere_with_the_same_seed_while_it_is_restarted(world, fleet, weights):
    checked: list[Scorer] = []
    fleet.on_recovery(fleet.told.append, checked.append)
    fleet.load(weights("v0"))
    go_on, all_eight, met = threading.Event(), threading.Barrier(8), set()

    def first_dies(server: Server, seed: int) -> None:
        if seed not in met:
            met.add(seed)
            all_eight.wait(LIMIT_S)
        if server is world.places[0][0]:
            dies(server, seed)

    world.on_ask = first_dies
    world.on_load = lambda server, checkpoint: assert_set(go_on)
    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(lambda seed: fleet.complete(asking(f"{seed} " * 600), seed), range(8)))
    assert [reply.completion_ids for reply in replies] == [(seed,) for seed in range(8)]
    lost = [seed for number, seed in world.asked if number == 0]
    answered = [seed for number, seed in world.asked if number == 1]
    assert (len(lost), sorted(answered)) == (4, [*range(8)])  # each was answered once
    assert states(fleet) == ["lost", "up"]
    go_on.set()
    until(fleet, lambda: states(fleet) == ["up", "up"])
    assert world.places[0][-1].loaded == ["v0"]
    assert checked[-1] is world.places[0][-1]
    assert fleet.take_counts() == {"servers lost": 1, "restarts": 1, "asked elsewhere": 4}
    assert [told.partition(":")[2].partition(":")[0].strip() for told in fleet.told] == [
        "it is lost, and its calls are asked elsewhere",
        "vLLM is started again on weights v0 (restart 1 of 2)",
        "it is back, and serves weights v0, verified",
    ]


def assert_set(event: threading.Event) -> None:
    assert event.wait(LIMIT_S)


def test_a_server_that_does_not_start_again_at_once_starts_on_the_weights_that_are_due_by_then(world, fleet, weights):
    checked: list[Scorer] = []
    fleet.load(weights("v0"))
    go_on = threading.Event()

    def removed(server: Server, checkpoint: Checkpoint) -> None:
        if server in world.places[0][1:] and checkpoint.version == "v0":
            assert_set(go_on)
            raise EngineError("the folder of v0 was removed")

    world.on_load = removed
    world.on_ask = lambda server, seed: dies(server, seed) if server is world.places[0][0] else None
    for seed in range(2):
        fleet.complete(asking(str(seed) * 600), seed)
    fleet.on_recovery(fleet.told.append, checked.append)
    fleet.load(weights("v1"))
    go_on.set()
    until(fleet, lambda: states(fleet) == ["up", "up"])
    assert "v0" not in world.places[0][-1].loaded
    assert checked[-1] is world.places[0][-1]


def test_a_server_that_is_restarted_during_a_publish_takes_the_new_weights_before_it_is_asked(world, fleet, weights):
    fleet.load(weights("v0"))
    go_on = threading.Event()

    def slow(server: Server, checkpoint: Checkpoint) -> None:
        if server in world.places[0][1:] and checkpoint.version == "v0":
            assert_set(go_on)

    world.on_load = slow
    world.on_ask = lambda server, seed: dies(server, seed) if server is world.places[0][0] else None
    for seed in range(2):
        fleet.complete(asking(str(seed) * 600), seed)
    fleet.load(weights("v1"))  # does not wait for the one that starts
    assert states(fleet) == ["lost", "up"]
    go_on.set()
    until(fleet, lambda: states(fleet) == ["up", "up"])
    assert world.places[0][-1].loaded == ["v0", "v1"]


@pytest.mark.parametrize("during", ["a call", "a publish"])
def test_a_server_that_its_owner_starts_anew_is_asked_only_once_it_has_the_weights_again(
    world, attached, weights, during
):
    def started_anew(server: Server, *_: object) -> None:
        if server is world.places[0][0]:
            raise ServerReplacedError("the server was started anew since it got its weights")

    attached.load(weights("v0"))
    due = "v0"
    if during == "a call":
        world.on_ask = started_anew
    else:
        world.on_load, due = started_anew, "v1"
        attached.load(weights("v1"))
    assert {attached.complete(asking(str(seed)), seed).weights for seed in range(4)} == {due}
    until(attached, lambda: states(attached) == ["up", "up"])
    assert world.places[0][1].loaded == [due]
    counts = attached.take_counts()
    assert counts["servers lost"] == 1
    assert counts["asked elsewhere"] == (during == "a call")
    assert "the server was started anew" in attached.told[0]


def test_a_server_that_its_owner_starts_anew_as_another_is_told_and_comes_back_once_it_is_as_before(
    world, attached, weights, monkeypatch
):
    attached.load(weights("v0"))
    attached._roster.kind, found = Kind("/model", 512, "float32"), [Kind("/model", 512, "bfloat16")]
    monkeypatch.setattr(alike_module, "require_alike", lambda settings: found[0])
    world.on_ask = lambda server, seed: dies(server, seed) if server is world.places[0][0] else None
    attached.complete(asking("x"), 0), attached.complete(asking("y"), 1)
    until(attached, lambda: "dtype bfloat16, and the run began on /model" in attached.told[-1])
    assert (states(attached), len(attached.told)) == (["lost", "up"], 2), "told once"
    assert not any(server.loaded for server in world.places[0][1:])
    found[0] = attached._roster.kind
    until(attached, lambda: states(attached) == ["up", "up"])


def test_a_server_that_is_started_anew_while_it_comes_back_is_attached_to_once_more(world, attached, weights):
    def started_anew(server: Server, *_: object) -> None:
        if server in world.places[0][:2]:
            raise ServerReplacedError("the server was started anew since it got its weights")

    attached.load(weights("v0"))
    with attached._changed:
        attached._roster.due = Due(attached._roster.due.checkpoint, started_anew)
    world.on_ask = started_anew
    assert {attached.complete(asking(str(seed)), seed).weights for seed in range(4)} == {"v0"}
    until(attached, lambda: states(attached) == ["up", "up"])
    assert [server.loaded for server in world.places[0]] == [["v0"]] * 3


def test_a_server_that_hangs_gives_its_calls_back_and_its_late_replies_are_dropped(world, attached, weights):
    attached.load(weights("v0"))
    hangs, hung = threading.Event(), threading.Semaphore(0)

    def first_hangs(server: Server, seed: int) -> None:
        if server is world.places[0][0]:
            hung.release()
            assert_set(hangs)

    world.on_ask = first_hangs
    with ThreadPoolExecutor(4) as pool:
        calls = [pool.submit(attached.complete, asking(str(seed) * 600), seed) for seed in range(4)]
        assert hung.acquire(timeout=LIMIT_S)
        attached.members[0]._stalls(world.places[0][0], "no token was processed for 9 s (stall_timeout_s)")
        assert [call.result(LIMIT_S).completion_ids for call in calls] == [(seed,) for seed in range(4)]
    until(attached, lambda: states(attached) == ["up", "up"])
    hangs.set()
    assert world.places[0][0].closed.is_set()
    assert world.places[0][-1].loaded == ["v0"]
    assert "no token was processed for 9 s" in attached.told[0]


def test_a_server_that_somebody_else_launched_is_watched_for_hangs(world, monkeypatch, weights):
    watched = []
    monkeypatch.setattr(member_module, "watch", lambda server, limit_s, _: watched.append((place_of(server), limit_s)))
    for fleet in made(world, VLLMSettings(attach_url=PAIR, stall_timeout_s=7)):
        fleet.load(weights("v0"))
    assert sorted(watched) == [(0, 7), (1, 7)]


def test_a_server_whose_restarts_are_used_up_is_gone_and_the_run_goes_on_without_it(world, fleet, weights):
    fleet.load(weights("v0"))

    def never_starts(server: Server, checkpoint: Checkpoint) -> None:
        if place_of(server) == 0:
            raise NoAnswerError("vLLM ended while starting")

    world.on_load = never_starts
    world.on_ask = lambda server, seed: dies(server, seed) if place_of(server) == 0 else None
    for seed in range(2):
        assert fleet.complete(asking(str(seed) * 600), seed).completion_ids == (seed,)
    until(fleet, lambda: states(fleet) == ["gone", "up"])
    assert "it does not come back: vLLM failed again after 2 restarts" in fleet.told[-1]
    fleet.load(weights("v1"))
    assert fleet.complete(asking("x"), 5).weights == "v1"
    world.on_ask = dies
    world.on_load = lambda server, checkpoint: never_starts(world.places[0][0], checkpoint)
    with pytest.raises(EngineError, match=r"all servers are lost: server 1 of 2: vLLM failed again.*; server 2 of 2: "):
        fleet.complete(asking("x"), 6)


def test_one_that_comes_back_with_other_weights_is_gone(world, fleet, weights):
    fleet.load(weights("v0"))

    def verify(server: Scorer) -> None:
        if server in world.places[0][1:]:
            raise SyncError("other weights")

    fleet.on_recovery(fleet.told.append, verify)
    fleet.load(weights("v1"))
    world.on_ask = lambda server, seed: dies(server, seed) if place_of(server) == 0 else None
    for seed in range(2):
        fleet.complete(asking(str(seed) * 600), seed)
    until(fleet, lambda: states(fleet) == ["gone", "up"])
    assert "other weights" in fleet.told[-1]


def test_a_request_that_is_refused_is_not_asked_elsewhere(world, fleet, weights):
    fleet.load(weights("v0"))

    def refuses(server: Server, seed: int) -> None:
        raise InvalidRequestError("too long")

    world.on_ask = refuses
    with pytest.raises(InvalidRequestError):
        fleet.complete(asking("x"), 1)
    assert (len(world.asked), states(fleet)) == (1, ["up", "up"])


def test_closing_ends_a_server_that_is_being_restarted_and_fails_the_calls_that_wait(world, fleet, weights):
    fleet.load(weights("v0"))
    starting = threading.Semaphore(0)

    def until_closed(server: Server, checkpoint: Checkpoint) -> None:
        starting.release()
        assert_set(server.closed)
        raise NoAnswerError("closed")

    world.on_load, world.on_ask = until_closed, dies
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(fleet.complete, asking("x"), 1)
        for _ in range(2):
            assert starting.acquire(timeout=LIMIT_S)
        fleet.close()
        with pytest.raises(EngineError):
            call.result(LIMIT_S)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("mends")]
    assert fleet.weights is None
    assert fleet.address is None


# What is refused before any work


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"attach_url": ("http://localhost:1/v1", "http://127.0.0.1:1/")}, "names http://127.0.0.1:1 2 times"),
        ({"attach_url": ()}, "attach_url is an empty list"),
        ({"attach_url": PAIR, "servers": 2}, "servers is 2 beside attach_url"),
        ({"attach_url": "http://a:1", "cards": (1,)}, r"cards is \(1,\) beside attach_url"),
        ({"attach_url": ("http://a:1", "b:2")}, "attach_url is 'b:2': it must start with http"),
        *[
            (
                {"attach_url": url},
                "it must start with http:// or https://, and name one server's host and port; several",
            )
            for url in ("http://a:1,http://b:2", "http://a:99999", "http://a:x", "http://a:1 ", "http://a:1/v1/models")
        ],
        ({"attach_url": ("http://A:80", "http://a")}, "names http://a 2 times"),
        ({"attach_url": PAIR, "shared_folder": False}, "shared_folder is False beside attach_url"),
        ({"shared_folder": False}, "shared_folder is False, and on_ray is not set: servers on this machine see its"),
        ({"servers": 0}, "servers is 0: it must be at least 1"),
        ({"servers": 2, "port": 8123}, "port is 8123 and servers is 2"),
        (
            {"servers": 5},
            r"5 x 1 cards \(.*\) are needed, and torch sees 4: lower servers to at most 4",
        ),
        ({"servers": 3, "extra_args": ("-tp", "2")}, "3 x 2 cards .* lower servers to at most 2"),
        ({"servers": 2, "cards": (3, 4)}, r"cards names \[4\]: torch sees 4 cards"),
        ({"servers": 2, "cards": (3, 3)}, r"cards is \(3, 3\): name each card once"),
        ({"servers": 2, "cards": (3,)}, r"cards names 1, and 2 x 1 cards .* are needed"),
    ],
)
def test_settings_that_cannot_place_the_servers_are_refused(monkeypatch, settings, told):
    monkeypatch.setattr(placing, "gpu_count", lambda: 4)
    with pytest.raises(AssertionError, match=told):
        assert vllm_faults(VLLMSettings(**settings)) == []


def test_each_server_has_cards_and_a_log_of_its_own(monkeypatch, tmp_path):
    monkeypatch.setattr(placing, "gpu_count", lambda: 8)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(10, 18))))
    settings = VLLMSettings(servers=3, extra_args=("--tensor-parallel-size=2",), log_path=tmp_path / "vllm.log")
    each = members_of(settings)
    assert [one.cards for one in each] == [(2, 3), (4, 5), (6, 7)]  # the trainer's is left to it
    assert [Path(str(one.log_path)).name for one in each] == ["vllm-1.log", "vllm-2.log", "vllm-3.log"]
    assert vllm_environment(each[0], "key")["CUDA_VISIBLE_DEVICES"] == "12,13"
    assert members_of(VLLMSettings()) == [VLLMSettings()]
    monkeypatch.setattr(placing, "gpu_count", lambda: 0)
    assert [one.cards for one in members_of(VLLMSettings(servers=2))] == [None, None]


def test_one_server_is_an_engine_without_a_fleet():
    assert isinstance(engine_maker("vllm", {})(), Supervisor)
    one = engine_maker("vllm", {"attach_url": ["http://localhost:1/v1"]})()
    assert isinstance(one, Supervisor)
    assert one.settings.attach_url == "http://127.0.0.1:1"
    assert isinstance(engine_maker("vllm", {"attach_url": [*PAIR]})(), Fleet)
    assert isinstance(engine_maker("vllm", {"servers": 2})(), Fleet)


def test_a_data_parallel_engine_whose_answer_vllm_drops_fails_the_comparison_itself():
    first, second = SimpleNamespace(data_parallel_index=0), SimpleNamespace(data_parallel_index=1)
    require_heard(first, {"lm_head.weight": "stale"})  # told in its answer
    require_heard(second, {})
    with pytest.raises(RuntimeError, match=r"data-parallel engine 1 uses other weights, e.g. lm_head.weight \(stale\)"):
        require_heard(second, {"lm_head.weight": "stale"})


# On Ray


def test_what_ray_chooses_is_refused_beside_on_ray():
    on_ray = VLLMSettings(on_ray=True, servers=2)
    assert vllm_faults(on_ray) == []
    for setting, value in (("cards", (0, 1)), ("sleep_level", 1), ("attach_url", PAIR)):
        assert any(setting in fault for fault in vllm_faults(replace(on_ray, **{setting: value})))
    assert any("port" in fault for fault in vllm_faults(replace(on_ray, servers=1, port=8000)))
    assert [one.cards for one in members_of(on_ray)] == [None, None]


@pytest.mark.parametrize(("on_ray", "held"), [(True, 3), (False, 0)])
def test_only_servers_on_ray_hold_cpus_of_the_cluster(on_ray, held):
    options = {"on_ray": on_ray, "servers": 3}
    assert servers_on_ray(PolicyLM(BASE, engine="vllm", engine_options=options)) == held


def test_servers_on_ray_without_ray_are_a_fault_of_the_settings(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match="on_ray needs Ray, which is not installed: pip install"):
        engine_maker("vllm", {"on_ray": True})()


def test_servers_on_ray_need_a_connection_before_anything_else(tmp_path):
    policy = PolicyLM(BASE, engine="vllm", engine_options={"on_ray": True})
    (fault,) = room_faults(policy, FSTConfig(), tmp_path)
    assert "connected to no Ray cluster" in fault
    assert isinstance(policy.handle.engine, Fleet)  # one server, too: its calls are given back when its node is lost
    with pytest.raises(EngineError, match="connected to no Ray cluster"):
        policy.handle.ready()
