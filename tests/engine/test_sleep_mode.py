"""Trainer and server take turns on a card. vLLM has no sleep mode on a CPU, so a small server of our own stands in."""

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path

import dspy
import pytest
import torch
from dspy.lm15 import Config, Message, Request

from dspy_fst.engine import machine
from dspy_fst.engine.base import Checkpoint, Scorer
from dspy_fst.engine.in_process import InProcessEngine
from dspy_fst.engine.verification import verify_tensors
from dspy_fst.engine.vllm import launched, server_settings
from dspy_fst.engine.vllm import server as server_module
from dspy_fst.engine.vllm import supervisor as supervisor_module
from dspy_fst.engine.vllm.launch import vllm_command
from dspy_fst.engine.vllm.server_settings import VLLMSettings, vllm_faults
from dspy_fst.engine.vllm.sleep_mode import UnverifiedWeightsError
from dspy_fst.engine.vllm.supervisor import Supervisor
from dspy_fst.errors import EngineError
from dspy_fst.policy_lm import PolicyLM
from dspy_fst.preflight.model_checks import lora_faults
from dspy_fst.recipe.lora_settings import LoRA
from dspy_fst.slow.trainer import Trainer
from programs.lab import BASE
from tests.engine import sleeping_server
from tests.engine.server_state import unread_version
from tests.engine.sleeping_server import DROPPED
from tests.engine.test_lora_versions import version
from tests.test_compile import compile_relay

REQUEST = Request("policy", (Message.user("hi"),), config=Config(max_tokens=4))
CHECKED = "/collective_rpc"


class Card:
    """A supervised server that can sleep, and what it was asked."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.told: list[str] = []
        self.checked: list[str] = []

    def engine(self, level: int | None = 1, **settings: float) -> Supervisor:
        limits = {"request_timeout_s": 30, "load_timeout_s": 30, "startup_timeout_s": 60, "stop_grace_s": 1} | settings
        return Supervisor(VLLMSettings(sleep_level=level, **limits))  # type: ignore[arg-type]

    def weights(self, version: str) -> Checkpoint:
        return unread_version(self.folder, version)

    def publish(self, engine: Supervisor, version: str) -> None:
        """Load weights that every later server is compared with, as a run does."""
        checkpoint = self.weights(version)

        def verify(scorer: Scorer) -> None:
            self.checked.append(version)
            verify_tensors(scorer, checkpoint)

        engine.on_recovery(self.told.append, verify)
        engine.load(checkpoint)

    def spoil(self, what: str, how: str) -> None:
        (self.folder / what).write_text(how)

    def mend(self, what: str) -> None:
        (self.folder / what).unlink()

    @property
    def asked(self) -> list[tuple[int, str, bool, int, str]]:
        """(process, path, whether it slept, calls in flight, weights in use) of each request so far."""
        return [tuple(json.loads(line)) for line in (self.folder / "asked").read_text().splitlines()]

    @property
    def bodies(self) -> list[dict[str, object]]:
        """What the workers were asked."""
        return [json.loads(line) for line in (self.folder / "bodies").read_text().splitlines()]

    @property
    def paths(self) -> list[str]:
        return [path for _, path, *_ in self.asked if path not in ("/v1/models", "/is_sleeping")]


@pytest.fixture
def card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Card:
    program = [sys.executable, "-S", sleeping_server.__file__, str(tmp_path)]
    monkeypatch.setattr(
        launched,
        "vllm_command",
        lambda settings, model, port, loras: [*program, "--model", str(model), "--port", str(port)],
    )
    monkeypatch.setattr(server_settings, "has_gpu", lambda: True)
    monkeypatch.setattr(supervisor_module, "RELAUNCH_PAUSE_S", 0.01)
    monkeypatch.setattr(server_module, "_DEATH_NOTICE_S", 0.3)
    return Card(tmp_path)


@pytest.fixture
def closing() -> Iterator[Callable[[Supervisor], Supervisor]]:
    engines: list[Supervisor] = []

    def note(engine: Supervisor) -> Supervisor:
        engines.append(engine)
        return engine

    yield note
    for engine in engines:
        engine.close()


def said(engine: Supervisor, seed: int = 0) -> str:
    return engine.complete(REQUEST, seed).response.text or ""


def during(engine: Supervisor, act: Callable[[], None] = lambda: None) -> None:
    with engine.asleep():
        act()


# ---- the order of the turns ----------------------------------------------------------------------


@pytest.mark.parametrize("level", [1, 2])
def test_the_server_sleeps_in_the_block_and_the_next_weights_are_loaded_once_and_verified(
    card, closing, level, monkeypatch
):
    emptied: list[str] = []
    monkeypatch.setattr(supervisor_module, "empty_gpu_cache", lambda: emptied.append(card.paths[-1]))
    engine = closing(card.engine(level))
    card.publish(engine, "first")
    seen: list[object] = []
    during(engine, lambda: seen.extend(card.asked[-2:]))
    card.publish(engine, "second")
    assert said(engine) == "second"
    assert [(path, slept) for _, path, slept, *_ in seen] == [
        (f"/sleep?level={level}&mode=wait", False),
        ("/is_sleeping", True),
    ]
    assert emptied == [f"/sleep?level={level}&mode=wait"], "the trainer's unused memory is free before it wakes"
    after = card.paths[card.paths.index("/wake_up") :]
    swap = ["/pause?mode=wait", "/collective_rpc", "/reset_prefix_cache", "/resume"]
    assert after == ["/wake_up", *swap, CHECKED, "/v1/chat/completions"]
    assert card.checked == ["first", "second"]
    assert engine.take_counts() == {}
    assert card.told == []


@pytest.mark.parametrize("level", [1, 2])
def test_after_an_update_that_moved_nothing_the_same_weights_are_verified_before_the_first_call(card, closing, level):
    engine = closing(card.engine(level))
    card.publish(engine, "first")
    during(engine)
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(lambda seed: said(engine, seed), range(8))) == {"first"}
    assert card.checked == ["first", "first"]
    calls = [weights for _, path, _, _, weights in card.asked if path == "/v1/chat/completions"]
    assert calls == ["first"] * 8
    assert len({process for process, *_ in card.asked}) == 1


def test_weights_that_a_sleep_spoiled_are_never_sampled_from_and_the_server_is_started_again(card, closing):
    engine = closing(card.engine(1))
    card.publish(engine, "first")
    card.spoil("spoil", "yes")
    during(engine)
    assert said(engine) == "first"
    assert engine.take_counts() == {"restarts": 1}
    assert len(card.told) == 1
    assert "uses other weights than were published: w (it is dropped)" in card.told[0]
    assert DROPPED not in [weights for _, path, _, _, weights in card.asked if path == "/v1/chat/completions"]


def test_without_the_setting_the_server_does_not_sleep(card, closing):
    engine = closing(card.engine(None))
    card.publish(engine, "first")
    during(engine)
    assert not {"/wake_up", "/sleep?level=1&mode=wait"} & set(card.paths)


def test_an_engine_that_serves_nothing_yet_is_left_alone(card, closing):
    engine = closing(card.engine(1))
    during(engine)
    assert not (card.folder / "asked").exists()
    card.publish(engine, "first")
    assert said(engine) == "first"


@pytest.mark.parametrize("spoilt", [False, True])
def test_the_base_below_lora_adapters_is_compared_again_after_a_sleep(card, closing, spoilt):
    """Their base is compared once a server, otherwise: no publish writes to it."""
    engine = closing(card.engine(1))

    def publish(name: str) -> None:
        checkpoint = version(card.folder, name)
        engine.on_recovery(card.told.append, lambda scorer: verify_tensors(scorer, checkpoint) and None)
        engine.load(checkpoint)

    publish("v0")
    publish("v1")
    assert said(engine) == "base"
    if spoilt:
        card.spoil("spoil", "yes")
    during(engine)
    publish("v2")
    assert said(engine) == "base"
    assert engine.take_counts() == ({"swaps refused": 1, "restarts": 1} if spoilt else {})
    compared = [body for body in card.bodies if body["method"] == "dspy_fst_compare"]
    assert len(compared) == (3 if spoilt else 2)


# ---- a run ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_lets_the_engine_sleep_round_each_update_and_no_longer(tmp_path, monkeypatch):
    """Rollouts, the trainer's own texts and a publish need the engine; an update without a gradient no card."""
    acts: list[str] = []

    def noting(owner: type, name: str) -> None:
        original = getattr(owner, name)

        def noted(self: object, *args: object, **kwargs: object) -> object:
            if acts[-1:] != [name]:
                acts.append(name)
            return original(self, *args, **kwargs)

        monkeypatch.setattr(owner, name, noted)

    class Sleeper(InProcessEngine):  # of its own: Python remembers for good which classes can sleep
        @contextmanager
        def asleep(self) -> Iterator[None]:
            acts.append("sleep")
            yield
            acts.append("wake")

    monkeypatch.setattr("dspy_fst.engine.in_process.InProcessEngine", Sleeper)
    noting(Sleeper, "load")
    noting(Sleeper, "complete")
    noting(Trainer, "step")

    def metric(gold: object, pred: dspy.Prediction, trace: object = None) -> float:
        return 1.0 / max(len(pred.answer), 1) if acts.count("load") < 2 else 1.0

    compile_relay(
        tmp_path / "run",
        method="rl",
        metric=metric,
        cycles=1,
        steps_per_cycle=2,
        problems_per_step=2,
        updates_per_batch=2,
    )
    flat = ["complete", "step"]
    assert "|".join(["load", "complete", "sleep", "step", "wake", "load", *flat]) in "|".join(acts)
    assert acts.count("sleep") == 1


# ---- calls ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", [1, 2])
def test_calls_in_flight_end_first_and_calls_that_come_meanwhile_wait_until_it_wakes(card, closing, level):
    engine = closing(card.engine(level))
    card.publish(engine, "first")
    card.spoil("slow", "0.5")
    with ThreadPoolExecutor(2) as pool:
        early = pool.submit(said, engine, 1)
        while not any("chat" in path for path in card.paths):
            time.sleep(0.01)
        with engine.asleep():
            assert early.result(10) == "first"  # the server replied before it slept; its thread may be held up
            late = pool.submit(said, engine, 2)
            time.sleep(0.3)
            assert not late.done()
        assert late.result(30) == "first"
    slept = [(in_flight, path) for _, path, _, in_flight, _ in card.asked if path.startswith("/sleep")]
    assert [in_flight for in_flight, _ in slept] == [0]
    assert not [path for _, path, asleep, *_ in card.asked if asleep and "chat" in path]


@pytest.mark.parametrize(("level", "spoilt"), [(1, None), (1, "spoil"), (1, "wake_up"), (2, None)])
def test_a_call_that_has_the_server_already_samples_no_unverified_weights(card, closing, level, spoilt):
    """The thread was held up between asking for the server and sending its request."""
    engine = closing(card.engine(level))
    card.publish(engine, "first")
    if spoilt is not None:
        card.spoil(spoilt, "500")
    serving, held_up = engine._serving, threading.Event()

    def slowly():
        server = serving()
        if threading.current_thread().name == "late":
            held_up.wait(30)
        return server

    engine._serving = slowly  # type: ignore[method-assign]
    with ThreadPoolExecutor(1) as pool:

        def late() -> str:
            threading.current_thread().name = "late"
            return said(engine)

        answer = pool.submit(late)
        with engine.asleep():
            held_up.set()
            time.sleep(0.2)
            assert not answer.done()
        assert answer.result(30) == "first"
    calls = [(process, weights) for process, path, _, _, weights in card.asked if path == "/v1/chat/completions"]
    assert calls == [(card.asked[-1][0], "first")], "by the server that was verified last, and once"
    assert card.checked == ["first"] * (3 if spoilt == "spoil" else 2)
    assert engine.take_counts() == ({"restarts": 1} if spoilt else {})


def test_a_call_that_has_the_server_already_waits_until_a_publish_after_the_sleep_is_verified(card, closing):
    engine = closing(card.engine(2))
    card.publish(engine, "first")
    server, second = engine.server, card.weights("second")
    met: list[BaseException | None] = []

    def verify(scorer: Scorer) -> None:
        with ThreadPoolExecutor(1) as pool:
            met.append(pool.submit(server.complete, REQUEST, 0).exception(30))
        verify_tensors(scorer, second)

    during(engine)
    engine.on_recovery(card.told.append, verify)
    engine.load(second)
    assert [type(error) for error in met] == [UnverifiedWeightsError]
    assert server.complete(REQUEST, 0).response.text == said(engine) == "second"


def test_a_call_that_waits_longer_than_its_limits_is_told_so(card, closing):
    engine = closing(card.engine(1, request_timeout_s=0.2, load_timeout_s=0.2, startup_timeout_s=10))
    card.publish(engine, "first")
    engine._lock._limits = {"request_timeout_s": 0.3}  # type: ignore[assignment]
    with ThreadPoolExecutor(1) as pool, engine.asleep():
        error = pool.submit(said, engine).exception(30)
    assert isinstance(error, EngineError)
    assert "a request waited 0.3 s for another thread to load, restart or wake vLLM" in str(error)
    assert said(engine) == "first"


# ---- what fails ----------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_it_wakes_however_the_block_ends(card, closing, error):
    engine = closing(card.engine(1))
    card.publish(engine, "first")
    with pytest.raises(error), engine.asleep():
        raise error
    assert card.paths[-1] == "/wake_up"
    assert said(engine) == "first"
    assert engine.take_counts() == {}


@pytest.mark.parametrize("error", [None, RuntimeError("of the update")])
def test_it_wakes_although_torch_cannot_give_its_memory_back(card, closing, error, monkeypatch, caplog):

    def fail() -> None:
        raise RuntimeError("of CUDA")

    def update() -> None:
        if error is not None:
            raise error

    monkeypatch.setattr(machine, "has_gpu", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", fail)
    engine = closing(card.engine(1))
    card.publish(engine, "first")
    with nullcontext() if error is None else pytest.raises(RuntimeError, match="of the update"):
        during(engine, update)
    assert card.paths[-1] == "/wake_up"
    assert "did not give back the GPU memory that it leaves unused: of CUDA" in caplog.text
    assert said(engine) == "first"
    assert engine.take_counts() == {}


@pytest.mark.slow
@pytest.mark.parametrize("how", ["hang", "die", "500"])
@pytest.mark.parametrize("what", ["sleep", "wake_up"])
def test_a_server_that_does_not_sleep_or_wake_is_ended_and_another_one_serves_the_same_weights(
    card, closing, what, how
):
    engine = closing(card.engine(1, load_timeout_s=1))
    card.publish(engine, "first")
    card.spoil(what, how)
    updated: list[bool] = []
    during(engine, lambda: updated.append(engine.address is None))
    assert updated == [what == "sleep"], "a server that does not sleep is ended before the update, as it holds memory"
    assert engine.address is None
    assert engine.weights == "first"
    card.mend(what)
    assert said(engine) == "first"
    assert engine.take_counts() == {"restarts": 1}
    assert "vLLM is started again on weights first (restart 1 of 3)" in card.told[0]
    assert card.checked == ["first", "first"]
    assert len({process for process, *_ in card.asked}) == 2


def test_after_it_failed_to_wake_the_next_publish_starts_one_server_and_on_the_new_weights(card, closing):
    engine = closing(card.engine(1, load_timeout_s=1))
    card.publish(engine, "first")
    card.spoil("wake_up", "500")
    during(engine)
    during(engine)  # a step whose batch moved nothing: there is no server to put to sleep
    card.mend("wake_up")
    card.publish(engine, "second")
    assert said(engine) == "second"
    processes = {process: weights for process, path, _, _, weights in card.asked if path == "/v1/models"}
    assert sorted(processes.values()) == ["first", "second"]
    assert engine.take_counts() == {"restarts": 1}
    assert card.checked == ["first", "second"]


def test_a_server_that_never_wakes_again_uses_up_the_restarts(card, closing):
    engine = closing(card.engine(1, load_timeout_s=1, max_restarts=1))
    card.publish(engine, "first")
    card.spoil("wake_up", "500")
    during(engine)
    card.spoil("health", "die")
    with pytest.raises(EngineError, match="vLLM failed again after 1 restarts on weights first"):
        said(engine)


def test_it_can_be_closed_while_it_sleeps(card, closing):
    engine = closing(card.engine(1))
    card.publish(engine, "first")
    with ThreadPoolExecutor(1) as pool:
        with engine.asleep():
            closed = pool.submit(engine.close)
            while engine.address is not None:
                time.sleep(0.01)
        closed.result(30)
    assert engine.weights is None
    card.publish(engine, "second")
    assert said(engine) == "second"


# ---- settings ------------------------------------------------------------------------------------


def test_the_setting_is_refused_where_it_cannot_work(monkeypatch):
    assert vllm_faults(VLLMSettings(sleep_level=1)) == [
        "sleep_level is 1: vLLM sleeps on a GPU only, and torch sees none here; leave sleep_level unset"
    ]
    monkeypatch.setattr(server_settings, "has_gpu", lambda: True)
    assert vllm_faults(VLLMSettings(sleep_level=1)) == vllm_faults(VLLMSettings(sleep_level=2)) == []
    assert "sleep_level is 3: use 1" in vllm_faults(VLLMSettings(sleep_level=3))[0]
    assert "sleep_level is True: use 1" in vllm_faults(VLLMSettings(sleep_level=True))[0]
    [attached] = vllm_faults(VLLMSettings(sleep_level=1, attach_url="http://127.0.0.1:1"))
    assert attached.startswith(
        "sleep_level is 1: a server at attach_url is not put to sleep, because others may use it"
    )
    assert "extra_args sets --enable-sleep-mode" in vllm_faults(VLLMSettings(extra_args=("--enable-sleep-mode",)))[0]


def test_the_server_is_launched_with_sleep_mode_only_where_it_is_wanted():
    assert "--enable-sleep-mode" in vllm_command(VLLMSettings(sleep_level=2), Path("model"), 1)
    assert "--enable-sleep-mode" not in vllm_command(VLLMSettings(), Path("model"), 1)


def test_lora_adapters_are_refused_beside_level_2():
    """Their base is not part of a publish, so nothing would load it again."""

    def faults(level: int) -> list[str]:
        return lora_faults(PolicyLM(BASE, engine="vllm", engine_options={"sleep_level": level}), LoRA(rank=4))

    assert faults(1) == []
    assert len(faults(2)) == 1
    assert "use sleep_level=1" in faults(2)[0]
