"""What the keeper does about a server that fails, with a scripted server in the place of the real one."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
from dspy.lm15 import Config, InvalidRequestError, Message, Request

from dspy_fst.engine.base import Checkpoint, Completion
from dspy_fst.engine.chat import text_response
from dspy_fst.engine.vllm import repeating as repeating_module
from dspy_fst.engine.vllm import supervisor as supervisor_module
from dspy_fst.engine.vllm.client import NoAnswerError
from dspy_fst.engine.vllm.repeating import ATTEMPTS
from dspy_fst.engine.vllm.server_settings import VLLMSettings
from dspy_fst.engine.vllm.stalls import watch
from dspy_fst.engine.vllm.supervisor import Supervisor
from dspy_fst.errors import EngineError, ServerDiedError, ServerReplacedError, SyncError
from dspy_fst.policy_lm import EngineHandle

REQUEST = Request("policy", (Message.user("hi"),), config=Config(max_tokens=4))


class World:
    """The servers that were made so far, and what goes wrong with them."""

    def __init__(self) -> None:
        self.servers: list[Server] = []
        self.on_load: Callable[[Server, Checkpoint], None] = lambda server, checkpoint: None
        self.on_ask: Callable[[Server, int], None] = lambda server, seed: None
        self.on_swap: Callable[[Checkpoint], str | None] = lambda checkpoint: None
        """Why a running server cannot go over to these weights."""
        self.through: list[str | None] = []
        """LoRA adapter of each request that arrived."""
        self.asked: list[tuple[int, int]] = []
        """(number of the server, seed) of each request that arrived."""

    def make(self, settings: VLLMSettings) -> "Server":
        self.servers.append(Server(self, len(self.servers)))
        return self.servers[-1]

    @property
    def launched(self) -> list[list[str]]:
        """For each server that was started, the versions that it loaded."""
        return [server.loaded for server in self.servers if server.loaded]


class Server:
    """A VLLMServer as the keeper sees it."""

    def __init__(self, world: World, number: int):
        self.world, self.number = world, number
        self.version: str | None = None
        self.address: str | None = None
        self.loaded: list[str] = []
        self.killed: list[str] = []
        self.closed = threading.Event()
        self.in_flight, self.tokens, self.moves = 0, 0, 0

    def load(self, checkpoint: Checkpoint) -> None:
        self.version = None
        self.loaded.append(checkpoint.version)
        self.world.on_load(self, checkpoint)
        self.version, self.address = checkpoint.version, "somewhere"

    def restart_reason(self, checkpoint: Checkpoint) -> str | None:
        return self.world.on_swap(checkpoint) if self.loaded else None

    def complete(self, request: Request, seed: int, prompt_ids: Any = None, adapter: str | None = None) -> Completion:
        if (version := self.version) is None:
            raise EngineError("no weights are served")
        self.world.asked.append((self.number, seed))
        self.world.through.append(adapter)
        self.world.on_ask(self, seed)
        return Completion(text_response("m", "x", "stop", 1, 1), (1,), (seed,), (-1.0,), "stop", version)

    def score(self, sequences: Any, adapter: str | None = None) -> list[list[float]]:
        self.world.on_ask(self, -1)
        return [[-1.0] * (len(sequence) - 1) for sequence in sequences]

    def progress(self, timeout_s: float) -> tuple[float, str]:
        self.tokens += self.moves
        return 0.0, f"tokens {self.tokens}"

    def kill(self, reason: str) -> None:
        self.killed.append(reason)

    def close(self, *, keep_log: bool = False) -> None:
        self.version = self.address = None
        self.closed.set()


@pytest.fixture(autouse=True)
def hardly_any_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FIRST_WAIT_S", "LONGEST_WAIT_S", "JITTER_S"):
        monkeypatch.setattr(repeating_module, name, 0.001)
    monkeypatch.setattr(supervisor_module, "RELAUNCH_PAUSE_S", 0.001)


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture
def engine(world: World) -> Supervisor:
    engine = Supervisor(VLLMSettings(max_restarts=3), world.make)
    engine.told = []  # type: ignore[attr-defined]
    engine.on_event = engine.told.append  # type: ignore[attr-defined]
    return engine


def ask_all(engine: Supervisor, count: int = 16) -> list[Completion]:
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(lambda seed: engine.complete(REQUEST, seed), range(count)))


def ask_each(engine: Supervisor, count: int) -> list[BaseException | None]:
    with ThreadPoolExecutor(count) as pool:
        asked = [pool.submit(engine.complete, REQUEST, seed) for seed in range(count)]
    return [future.exception() for future in asked]


def dies(server: Server, seed: int) -> None:
    raise ServerDiedError("vLLM died, exit status 137, log /tmp/log:\n  | last words")


def first_dies(server: Server, seed: int) -> None:
    if server.number == 0:
        dies(server, seed)


# Lost requests


def test_a_killed_server_is_started_again_once_for_all_threads_and_on_the_same_weights(world, engine, weights):
    engine.load(weights("v0"))
    engine.load(weights("v1"))
    noticed = threading.Barrier(16)

    def together(server: Server, seed: int) -> None:
        if server.number == 0:
            noticed.wait(10)
            dies(server, seed)

    world.on_ask = together
    replies = ask_all(engine)
    assert world.launched == [["v0", "v1"], ["v1"]]
    assert world.servers[0].closed.is_set()
    assert [reply.completion_ids for reply in replies] == [(seed,) for seed in range(16)]
    assert {reply.weights for reply in replies} == {"v1"}
    assert engine.take_counts() == {"restarts": 1, "asked again": 16}
    assert engine.take_counts() == {}
    assert engine.told == [
        "vLLM is started again on weights v1 (restart 1 of 3): vLLM died, exit status 137, log /tmp/log"
    ]


def test_a_server_that_its_owner_starts_is_said_to_be_given_the_weights_again(world, weights):
    engine, told = Supervisor(VLLMSettings(attach_url="http://elsewhere:8000"), world.make), []
    engine.on_event = told.append
    engine.load(weights("v0"))

    def started_anew(server: Server, seed: int) -> None:
        if server.number == 0:
            raise ServerReplacedError("it was started anew")

    world.on_ask = started_anew
    engine.complete(REQUEST, 1)
    assert told == ["vLLM is given weights v0 again (restart 1 of 3): it was started anew"]


def test_a_server_that_lives_is_asked_again_with_the_same_seed(world, engine, weights):
    engine.load(weights("v0"))

    def two_errors(server: Server, seed: int) -> None:
        if len(world.asked) <= 2:
            raise NoAnswerError("answered 500")

    world.on_ask = two_errors
    assert engine.complete(REQUEST, 7).completion_ids == (7,)
    assert world.asked == [(0, 7)] * 3
    assert engine.counts == {"asked again": 2}


def test_a_reply_that_arrived_is_not_asked_for_again(world, engine, weights):
    engine.load(weights("v0"))
    arrived = threading.Barrier(16)

    def half_are_lost(server: Server, seed: int) -> None:
        if server.number == 0:
            arrived.wait(10)
            if seed >= 8:
                dies(server, seed)

    world.on_ask = half_are_lost
    ask_all(engine)
    assert sorted(world.asked) == [*((0, seed) for seed in range(16)), *((1, seed) for seed in range(8, 16))]


def test_a_server_that_lives_but_never_answers_a_request_is_restarted(world, engine, weights):
    engine.load(weights("v0"))

    def answers_500(server: Server, seed: int) -> None:
        if server.number == 0:
            raise NoAnswerError("answered 500")

    world.on_ask = answers_500
    engine.complete(REQUEST, 7)
    assert world.asked == [*[(0, 7)] * ATTEMPTS, (1, 7)]
    assert engine.counts == {"restarts": 1, "asked again": ATTEMPTS}


@pytest.mark.parametrize("error", [InvalidRequestError("too long"), EngineError("no token ids")])
def test_what_is_not_the_server_s_failure_is_raised_at_once(world, engine, weights, error):
    engine.load(weights("v0"))

    def refuses(server: Server, seed: int) -> None:
        raise error

    world.on_ask = refuses
    with pytest.raises(type(error), match=str(error)):
        engine.complete(REQUEST, 1)
    assert len(world.asked) == 1
    assert engine.counts == {}


def test_a_request_whose_server_is_replaced_under_it_is_asked_again_whatever_it_met(world, engine, weights):
    engine.load(weights("v0"))
    late, replaced = threading.Event(), threading.Event()

    def one_is_slow(server: Server, seed: int) -> None:
        if server.number == 0 and seed == 1:
            late.set()
            assert replaced.wait(10)
            raise EngineError("no weights are served")  # as a closed server says
        elif server.number == 0:
            dies(server, seed)

    world.on_ask = one_is_slow
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(engine.complete, REQUEST, 1)
        assert late.wait(10)
        engine.complete(REQUEST, 2)
        replaced.set()
        assert slow.result(10).weights == "v0"
    assert engine.counts["restarts"] == 1


def test_a_request_that_meets_a_server_while_it_is_ended_is_asked_again(world, engine, weights):
    engine.load(weights("v0"))
    failing = world.servers[0]
    arrived, ending, asked = threading.Barrier(2), threading.Event(), threading.Event()
    end = failing.close

    def ends_slowly(*, keep_log: bool = False) -> None:
        end()
        ending.set()
        assert asked.wait(10)

    def breaks_off(server: Server, seed: int) -> None:
        if server is not failing:
            return
        arrived.wait(10)
        if seed == 0:
            dies(server, seed)
        assert ending.wait(10)
        threading.Timer(0.2, asked.set).start()
        raise NoAnswerError("connection reset")

    failing.close, world.on_ask = ends_slowly, breaks_off
    assert {reply.weights for reply in ask_all(engine, 2)} == {"v0"}


def test_scores_are_asked_for_again_too(world, engine, weights):
    engine.load(weights("v0"))
    world.on_ask = first_dies
    assert engine.score([[1, 2, 3]]) == [[-1.0, -1.0]]
    assert engine.counts == {"restarts": 1, "asked again": 1}


# Limits


def test_after_max_restarts_every_call_fails_at_once_and_says_how_often_and_why(world, engine, weights):
    engine.load(weights("v0"))
    world.on_ask = dies
    errors = ask_each(engine, 8)
    expected = r"(?s)failed again after 3 restarts on weights v0 .*exit status 137.*last words"
    for error in errors:
        with pytest.raises(EngineError, match=expected):
            raise error
    assert len({id(error) for error in errors}) == 8  # a shared one would carry every thread's traceback
    launched, asked = len(world.launched), len(world.asked)
    assert launched == 4
    for call in (lambda: engine.complete(REQUEST, 1), lambda: engine.score([[1]]), lambda: engine.load(weights("v1"))):
        with pytest.raises(EngineError, match=expected):
            call()
    assert (len(world.launched), len(world.asked)) == (launched, asked)
    assert all(server.address is None for server in world.servers)
    assert engine.weights == "v0"  # None would make EngineHandle.ready load once more


def test_new_weights_give_new_restarts(world, engine, weights):
    engine.load(weights("v0"))
    for version in ("v1", "v2", "v3", "v4"):
        crashed = len(world.servers)
        world.on_ask = lambda server, seed, crashed=crashed: server.number < crashed and dies(server, seed)
        assert engine.complete(REQUEST, 1).weights
        engine.load(weights(version))
    assert engine.counts["restarts"] == 4


def test_a_launch_that_fails_is_tried_again_within_the_limit(world, engine, weights):
    engine.load(weights("v0"))
    world.on_ask = first_dies

    def second_server_fails(server: Server, checkpoint: Checkpoint) -> None:
        if server.number == 1:
            raise EngineError("vLLM ended after 3 s while starting")

    world.on_load = second_server_fails
    assert engine.complete(REQUEST, 1).weights == "v0"
    assert engine.counts == {"restarts": 2, "asked again": 1}
    assert "restart 2 of 3): vLLM ended after 3 s while starting" in engine.told[1]


def test_a_server_that_somebody_else_launched_is_asked_again_and_never_restarted(world, weights):
    engine = Supervisor(VLLMSettings(attach_url="http://127.0.0.1:9"), world.make)
    engine.load(weights("v0"))

    def gone(server: Server, seed: int) -> None:
        raise NoAnswerError("connection refused")

    world.on_ask = gone
    with pytest.raises(EngineError, match="connection refused"):
        engine.complete(REQUEST, 1)
    assert len(world.asked) == ATTEMPTS

    def fails(server: Server, checkpoint: Checkpoint) -> None:
        raise NoAnswerError("answered 500")

    world.on_load = fails
    with pytest.raises(EngineError, match="answered 500"):
        engine.load(weights("v1"))
    assert len(world.servers) == 1
    assert engine.counts == {"asked again": 2 * (ATTEMPTS - 1), "swaps failed": 1}


def test_a_publish_to_a_server_that_somebody_else_launched_is_made_again_if_a_request_of_it_fails(world, weights):
    engine = Supervisor(VLLMSettings(attach_url="http://127.0.0.1:9", load_timeout_s=60), world.make)
    checked: list[str] = []
    engine.on_recovery(engine.on_event, lambda scorer: checked.append("checked"))
    engine.load(weights("v0"))
    failing = iter([NoAnswerError("a gateway answered 502"), None, None])

    def fails_once(server: Server, checkpoint: Checkpoint) -> None:
        if (error := next(failing)) is not None:
            raise error

    world.on_load = fails_once
    engine.load(weights("v1"))
    assert (engine.weights, checked) == ("v1", ["checked"] * 2)
    assert engine.counts == {"asked again": 1}

    def hangs(server: Server, checkpoint: Checkpoint) -> None:
        loads.append(checkpoint.version)
        raise NoAnswerError("waited 60 s in vain")

    loads: list[str] = []
    world.on_load, engine.settings = hangs, replace(engine.settings, load_timeout_s=0)  # which was waited for once
    with pytest.raises(EngineError, match="in vain"):
        engine.load(weights("v2"))
    assert loads == ["v2"]


def started_anew(server: Server, *_: object) -> None:
    if server.number == 0:
        raise ServerReplacedError("http://127.0.0.1:9: the server was started anew since it got its weights")


@pytest.mark.parametrize("during", ["a call", "a publish"])
def test_a_server_that_was_started_anew_by_somebody_else_gets_the_weights_again_before_it_answers(
    world, weights, during
):
    engine, checked = Supervisor(VLLMSettings(attach_url="http://127.0.0.1:9"), world.make), []
    told: list[str] = []
    engine.on_recovery(told.append, lambda server: checked.append(server.number))
    engine.load(weights("v0"))
    if during == "a call":
        world.on_ask = started_anew
    else:
        world.on_load = started_anew
        engine.load(weights("v0"))
    assert engine.complete(REQUEST, 1).weights == "v0"
    assert world.servers[-1].loaded == ["v0"]
    assert checked == [0, 1]
    assert engine.counts["restarts"] == 1
    assert "the server was started anew since it got its weights" in told[0]


# New weights


def test_weights_that_cannot_be_swapped_are_launched_afresh(world, engine, weights):
    checked = []
    engine.verify = checked.append
    engine.load(weights("v0"))

    def swap_fails(server: Server, checkpoint: Checkpoint) -> None:
        if server.address is not None:
            raise NoAnswerError("waited 600 s in vain for vLLM to answer POST /collective_rpc")

    world.on_load = swap_fails
    engine.load(weights("v1"))
    assert world.launched == [["v0", "v1"], ["v1"]]
    assert engine.complete(REQUEST, 1).weights == "v1"
    assert engine.counts == {"swaps failed": 1, "restarts": 1}
    assert "on weights v1 (restart 1 of 3): the weights could not be swapped: waited 600 s" in engine.told[0]
    assert [server.number for server in checked] == [0, 1]
    world.on_ask = dies
    ask_each(engine, 1)
    assert engine.counts["restarts"] == 1 + 3  # the load that succeeded in the end gave all of them back


def test_a_first_launch_that_fails_is_reported_at_once(world, engine, weights):
    def fails(server: Server, checkpoint: Checkpoint) -> None:
        raise EngineError("no memory")

    world.on_load = fails
    with pytest.raises(EngineError, match="no memory"):
        engine.load(weights("v0"))
    assert len(world.launched) == 1
    assert engine.weights is None
    with pytest.raises(EngineError, match="no weights are served: call load"):
        engine.complete(REQUEST, 1)
    world.on_load = lambda server, checkpoint: None
    engine.load(weights("v0"))
    assert engine.complete(REQUEST, 1).weights == "v0"


def test_a_folder_without_weights_is_refused_and_the_old_ones_stay(world, engine, weights, tmp_path):
    engine.load(weights("v0"))
    with pytest.raises(EngineError, match=r"no config\.json"):
        engine.load(Checkpoint("v1", tmp_path / "missing"))
    assert engine.complete(REQUEST, 1).weights == engine.weights == "v0"


# Verification


def test_nobody_samples_from_a_restarted_server_before_it_is_verified(world, engine, weights):
    world.on_ask = first_dies
    before: list[list[tuple[int, int]]] = []

    def check(fresh: Any) -> None:
        if fresh.number:
            assert fresh.score([[1, 2]]) == [[-1.0]]
        time.sleep(0.1)
        before.append([asked for asked in world.asked if asked[0] == fresh.number])

    engine.verify = check
    engine.load(weights("v0"))
    ask_all(engine)
    assert before == [[], []]


def test_a_restarted_server_with_wrong_weights_serves_nobody(world, engine, weights):
    world.on_ask = first_dies

    def check(fresh: Any) -> None:
        if fresh.number:
            raise SyncError("weights v0: probe 0 differs by 0.6 nats")

    engine.verify = check
    engine.load(weights("v0"))
    errors = ask_each(engine, 8)
    assert [type(error) for error in errors] == [SyncError] * 8
    assert [number for number, _ in world.asked if number] == []
    assert engine.counts["restarts"] == 1
    assert world.servers[1].closed.is_set()
    with pytest.raises(SyncError, match="probe 0"):
        engine.complete(REQUEST, 1)


def test_a_server_that_fails_while_it_is_verified_is_restarted(world, engine, weights):
    world.on_ask = lambda server, seed: server.number < 2 and dies(server, seed)
    engine.verify = lambda fresh: fresh.score([[1, 2]]) and None
    engine.load(weights("v0"))
    assert engine.complete(REQUEST, 1).weights == "v0"
    assert engine.counts["restarts"] == 2


UNSOUND = (
    "weights v1: the engine uses other weights than were published: lm_head.weight (all of it). Nothing was sampled"
)


def refuses(where: Callable[[Server], bool]) -> Callable[[Any], None]:
    def check(server: Any) -> None:
        if where(server):
            raise SyncError(UNSOUND)

    return check


def test_a_swap_that_leaves_other_weights_in_use_is_mended_by_one_restart_and_told(world, engine, weights):
    engine.verify = refuses(lambda server: len(server.loaded) > 1)
    engine.load(weights("v0"))
    engine.load(weights("v1"))
    assert world.launched == [["v0", "v1"], ["v1"]]
    assert engine.complete(REQUEST, 1).weights == "v1"
    assert engine.counts == {"swaps refused": 1, "restarts": 1}
    assert engine.told == [f"vLLM is started again on weights v1 (restart 1 of 3): {UNSOUND}"]


def test_weights_that_a_restart_does_not_mend_are_refused_and_serve_nobody(world, engine, weights):
    engine.load(weights("v0"))
    engine.verify = refuses(lambda server: True)
    with pytest.raises(SyncError, match=r"lm_head\.weight"):
        engine.load(weights("v1"))
    assert world.launched == [["v0", "v1"], ["v1"]]
    with pytest.raises(SyncError, match=r"lm_head\.weight"):
        engine.complete(REQUEST, 1)
    assert world.asked == []
    assert all(server.address is None for server in world.servers)


def test_a_first_launch_on_other_weights_is_refused_at_once(world, engine, weights):
    engine.verify = refuses(lambda server: True)
    with pytest.raises(SyncError, match=r"lm_head\.weight"):
        engine.load(weights("v0"))
    assert world.launched == [["v0"]]
    with pytest.raises(EngineError, match="no weights are served"):
        engine.complete(REQUEST, 1)


def test_the_server_of_somebody_else_on_other_weights_is_refused(world, weights):
    engine = Supervisor(VLLMSettings(attach_url="http://127.0.0.1:9"), world.make)
    engine.load(weights("v0"))
    engine.verify = refuses(lambda server: True)
    with pytest.raises(SyncError, match=r"lm_head\.weight"):
        engine.load(weights("v1"))
    assert len(world.launched) == 1


def test_a_check_that_breaks_leaves_nothing_unverified_behind(world, engine, weights):
    world.on_ask = first_dies

    def check(fresh: Any) -> None:
        if fresh.number:
            raise ZeroDivisionError("a slip")

    engine.verify = check
    engine.load(weights("v0"))
    with pytest.raises(ZeroDivisionError):
        engine.complete(REQUEST, 1)
    with pytest.raises(EngineError, match="the check of the weights failed: ZeroDivisionError"):
        engine.complete(REQUEST, 1)


def test_weights_are_verified_by_the_check_that_was_set_before_they_were_loaded(world, engine, weights):
    """A new check is set while a late request restarts the server on the old weights."""
    checked = []
    engine.verify = lambda fresh: checked.append("old")
    engine.load(weights("v0"))
    world.on_ask = first_dies
    world.on_load = lambda server, checkpoint: setattr(engine, "verify", lambda fresh: checked.append("new"))
    engine.complete(REQUEST, 1)
    assert checked == ["old", "old"]
    engine.load(weights("v1"))
    world.on_ask = lambda server, seed: server.number < 2 and dies(server, seed)
    engine.complete(REQUEST, 1)
    assert checked == ["old", "old", "new", "new"]


# Threads that meet


@pytest.mark.parametrize("what", ["restart", "load"])
def test_a_handle_loads_nothing_of_its_own_while_another_thread_restarts_or_loads(world, engine, weights, what):
    own, newer = weights("base"), weights("v1")
    handle = EngineHandle(str(own.path), "vllm", {}, "base")
    handle._make = lambda: engine
    handle.ready()
    engine.load(newer)
    begun, go_on = threading.Event(), threading.Event()

    def slowly(server: Server, checkpoint: Checkpoint) -> None:
        begun.set()
        assert go_on.wait(10)

    world.on_load = slowly
    world.on_ask = first_dies if what == "restart" else world.on_ask
    begin = (lambda: engine.complete(REQUEST, 1)) if what == "restart" else (lambda: engine.load(weights("v2")))
    with ThreadPoolExecutor(2) as pool:
        change = pool.submit(begin)
        assert begun.wait(10)
        assert handle.ready() is engine  # at once: it would block, holding the handle's lock
        late = pool.submit(lambda: handle.ready().complete(REQUEST, 2))
        go_on.set()
        change.result(10)
        assert late.result(10).weights == ("v1" if what == "restart" else "v2")
    assert world.servers[0].loaded[:2] == ["base", "v1"]
    assert [version for server in world.servers for version in server.loaded].count("base") == 1


def test_closing_during_a_restart_ends_the_server_that_is_being_started(world, engine, weights):
    engine.load(weights("v0"))
    world.on_ask = first_dies
    booting = threading.Event()

    def boots_until_closed(server: Server, checkpoint: Checkpoint) -> None:
        booting.set()
        assert server.closed.wait(10)
        raise EngineError("vLLM ended while starting")

    world.on_load = boots_until_closed
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(engine.complete, REQUEST, 1)
        assert booting.wait(10)
        engine.close()
        with pytest.raises(EngineError, match="closed by another thread; before that, vLLM ended while starting"):
            asked.result(10)
    assert all(server.address is None for server in world.servers)
    assert engine.weights is None
    launched = len(world.launched)
    with pytest.raises(EngineError, match="no weights are served"):
        engine.complete(REQUEST, 1)
    assert len(world.launched) == launched
    engine.close()


def test_closing_does_not_wait_for_ever_for_a_check_that_hangs(world, engine, weights, monkeypatch):
    monkeypatch.setattr(supervisor_module, "CLOSE_TIMEOUT_S", 0.3)
    world.on_ask = first_dies
    checking, go_on = threading.Event(), threading.Event()

    def check(fresh: Any) -> None:
        if fresh.number:
            checking.set()
            assert go_on.wait(10)

    engine.verify = check
    engine.load(weights("v0"))
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(engine.complete, REQUEST, 1)
        assert checking.wait(10)
        engine.close()
        go_on.set()
        with pytest.raises(EngineError):
            asked.result(10)
    assert all(server.address is None for server in world.servers)


def test_a_closed_engine_can_be_loaded_again_also_after_it_had_given_up(world, engine, weights):
    engine.load(weights("v0"))
    world.on_ask = dies
    ask_each(engine, 1)
    engine.close()
    world.on_ask = lambda server, seed: None
    engine.load(weights("v1"))
    assert engine.complete(REQUEST, 1).weights == "v1"


def test_a_request_says_for_what_it_waited_in_vain(world, weights):
    engine = Supervisor(VLLMSettings(startup_timeout_s=0.1, load_timeout_s=0.1, request_timeout_s=0.1), world.make)
    loading, go_on = threading.Event(), threading.Event()

    def slowly(server: Server, checkpoint: Checkpoint) -> None:
        loading.set()
        assert go_on.wait(10)

    world.on_load = slowly
    with ThreadPoolExecutor(1) as pool:
        load = pool.submit(engine.load, weights("v0"))
        assert loading.wait(10)
        with pytest.raises(
            EngineError, match=r"a request waited 0\.3 s for another thread to load, restart or wake vLLM"
        ):
            engine.complete(REQUEST, 1)
        go_on.set()
        load.result(10)


# Hangs


def watched(server: Server, seconds: float) -> list[str]:
    """Why the server was killed, if it was, within so long of watching with a stall time-out of 0.2 s."""
    server.address = "somewhere"
    watch(server, 0.2)  # type: ignore[arg-type]
    deadline = time.monotonic() + seconds
    while not server.killed and time.monotonic() < deadline:
        time.sleep(0.01)
    server.address = None  # ends the watching
    return server.killed


@pytest.fixture
def server(world: World) -> Server:
    server = Server(world, 0)
    server.in_flight = 3
    return server


def test_a_server_in_which_nothing_moves_is_killed(server):
    reason = "no token was processed for 0.2 s (stall_timeout_s) with 3 requests in flight"
    assert watched(server, 5) == [reason]


def test_a_server_that_gets_on_is_left_alone(server):
    server.moves = 1
    assert watched(server, 1) == []


def test_a_server_without_requests_is_left_alone(server):
    """So are one that starts and one that swaps its weights: nothing is in flight then."""
    server.in_flight = 0
    assert watched(server, 1) == []


def test_a_server_without_counters_is_not_watched(server, caplog):
    server.progress = lambda timeout_s: (0.0, "")
    assert watched(server, 1) == []
    assert "no token counters" in caplog.text


def test_a_server_that_hangs_is_killed_and_its_requests_are_answered_by_the_next(world, weights):
    engine = Supervisor(VLLMSettings(stall_timeout_s=0.2), world.make)
    engine.load(weights("v0"))

    def hangs(server: Server, seed: int) -> None:
        if server.number == 0:
            server.in_flight = 4
            deadline = time.monotonic() + 10
            while not server.killed:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            raise ServerDiedError(f"vLLM was killed: {server.killed[0]}, exit status 137")

    world.on_ask = hangs
    assert len(ask_all(engine, 4)) == 4
    assert engine.counts == {"restarts": 1, "asked again": 4}
    engine.close()
