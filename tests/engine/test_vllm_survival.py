"""A real server that fails under requests in flight: every one of them is answered, by the right weights.

One engine for all tests, in this order; each failure but the first costs the start of a server.
"""

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from dspy.lm15 import Config
from transformers import Qwen3ForCausalLM

from dspy_fst.engine.base import Checkpoint, Completion, Engine, verify_sync
from dspy_fst.engine.keeper import Keeper
from tests.engine.test_server_process import wait_until_gone
from tests.engine.test_vllm_server import PROBES, TOLERANCE, ask, gap, hf_scores, small
from tests.engine.tiny_qwen import make_model, save

pytestmark = pytest.mark.vllm

REQUESTS = 12
OUTAGE = """
import os

class Outage:
    '''Answers 500 to chat completions for as long as a file exists.'''

    def __init__(self, app):
        self._app = app

    async def __call__(self, scope, receive, send):
        if scope.get("path") != "/v1/chat/completions" or not os.path.exists(os.environ["OUTAGE_FLAG"]):
            return await self._app(scope, receive, send)
        await send({"type": "http.response.start", "status": 500, "headers": []})
        await send({"type": "http.response.body", "body": b'{"error": {"message": "an outage"}}'})
"""


class Watched:
    """The engine, its flag for an outage, and what it told."""

    def __init__(self, folder: Path):
        (folder / "dspy_fst_outage.py").write_text(OUTAGE)
        self.folder, self.flag = folder, folder / "outage"
        settings = replace(
            small(folder / "log"), stall_timeout_s=10, extra_args=("--middleware", "dspy_fst_outage.Outage")
        )
        self.engine = Keeper(settings)
        self.told: list[str] = []
        self.engine.on_event = self.told.append
        self.checked: list[str | None] = []

    def serve(self, seed: int) -> tuple[Qwen3ForCausalLM, Checkpoint]:
        """Load a model of its own for each test, and expect its scores of a restarted server."""
        model = make_model(seed)
        checkpoint = save(model, self.folder, f"step-{seed:06d}")

        def check(fresh: Engine) -> None:
            verify_sync(fresh.score(PROBES), hf_scores(model), tolerance=TOLERANCE, version=checkpoint.version)
            self.checked.append(fresh.weights)

        self.engine.after_restart = check
        self.engine.load(checkpoint)
        self.engine.take_counts()
        self.told.clear()
        self.checked.clear()
        return model, checkpoint

    def process(self, name: str) -> psutil.Process:
        """The server's process whose command line contains this."""
        group = self.engine.server.process_group
        assert group is not None
        below = psutil.Process(group).children(recursive=True)
        return next(process for process in below if name in "".join(process.cmdline()))


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    folder = tmp_path_factory.mktemp("survival")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
        environment.setenv("OUTAGE_FLAG", str(folder / "outage"))
        watched = Watched(folder)
        yield watched
        group = watched.engine.server.process_group
        watched.engine.close()
        assert group is not None
        assert wait_until_gone(group, seconds=5) == []


def in_flight(pool: ThreadPoolExecutor, engine: Keeper) -> list[Future[Completion]]:
    """Long requests, once several of them wait at the server at the same time.

    On a busy machine the first may be answered before the next is sent; then they are asked anew.
    """
    config = Config(temperature=1.0, max_tokens=450, extensions={"ignore_eos": True})
    requests = [replace(ask(f"request {seed}"), config=config) for seed in range(REQUESTS)]
    for _ in range(10):
        futures = [pool.submit(engine.complete, request, seed) for seed, request in enumerate(requests)]
        while not all(future.done() for future in futures):
            if engine.server.in_flight >= REQUESTS // 3:
                return futures
            time.sleep(0.002)
    raise AssertionError(f"never {REQUESTS // 3} requests in flight at the same time")


def test_requests_that_are_answered_with_500_for_a_while_are_asked_again(watched: Watched) -> None:
    model, checkpoint = watched.serve(0)
    server = watched.engine.server
    watched.flag.touch()
    with ThreadPoolExecutor(REQUESTS) as pool:
        futures = [pool.submit(watched.engine.complete, ask(f"request {i}"), i) for i in range(REQUESTS)]
        deadline = time.monotonic() + 30
        while watched.engine.counts["asked again"] < REQUESTS:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        watched.flag.unlink()
        replies = [future.result(60) for future in futures]
    assert {reply.weights for reply in replies} == {checkpoint.version}
    assert max(gap(model, reply, 1.0) for reply in replies) < TOLERANCE
    assert watched.engine.take_counts().keys() == {"asked again"}
    assert watched.engine.server is server


def test_a_server_that_hangs_is_started_again_and_answers_everything(watched: Watched) -> None:
    """Its API process is stopped. Whole runs, and the engine process, are in tests/test_survival.py."""
    model, checkpoint = watched.serve(1)
    failing = watched.engine.server
    group = failing.process_group
    assert group is not None
    process = watched.process("api_server")  # looked up first: that takes longer than some replies
    with ThreadPoolExecutor(REQUESTS) as pool:
        futures = in_flight(pool, watched.engine)
        process.send_signal(signal.SIGSTOP)
        time.sleep(1)  # for replies that were on their way
        lost = sum(not future.done() for future in futures)
        replies = [future.result(280) for future in futures]
    assert watched.engine.server is not failing
    assert wait_until_gone(group, seconds=10) == []
    assert {reply.weights for reply in replies} == {checkpoint.version}
    assert max(gap(model, reply, 1.0) for reply in replies) < TOLERANCE
    counts = watched.engine.take_counts()
    assert counts["restarts"] == 1
    assert counts["asked again"] >= lost > 0
    assert watched.checked == [checkpoint.version]
    assert len(watched.told) == 1
    reason = "vLLM was killed: no token was processed for 10 s"
    assert f"started again on weights {checkpoint.version} (restart 1 of 3): {reason}" in watched.told[0]
