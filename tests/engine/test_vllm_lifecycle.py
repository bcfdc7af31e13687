"""How a real server starts, fails and dies; each test has a server of its own, one after the other."""

import time
from pathlib import Path

import pytest

from dspy_fst.engine.base import Checkpoint
from dspy_fst.engine.verification import verify_identity
from dspy_fst.engine.vllm.server import VLLMServer
from dspy_fst.errors import EngineError, SyncError
from tests.engine.server_state import answers, group_of
from tests.engine.test_server_process import below, members
from tests.engine.test_vllm_server import PROBES, TOLERANCE, ask, largest_gap
from tests.engine.tiny_qwen import make_model, save, small

pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("servers_start_as_a_user_s")]


def test_stale_tied_head_is_caught(tmp_path: Path) -> None:
    """vLLM 0.32 on a CPU keeps the old output head of a model that is served as tied, and says nothing.

    When this test fails because nothing is raised, vLLM has mended it.
    """
    engine = VLLMServer(small(tmp_path / "log"))
    first, second = make_model(7, tied=True), make_model(8, tied=True)
    try:
        fresh = save(first, tmp_path, "step-000001")
        engine.load(fresh)
        prove(engine, fresh)
        assert largest_gap(engine.score(PROBES), first) < TOLERANCE
        stale = save(second, tmp_path, "step-000002")
        engine.load(stale)
        with pytest.raises(SyncError, match=r"step-000002.*a packed copy was left behind"):
            prove(engine, stale)
        assert largest_gap(engine.score(PROBES), second) > 0.1
        assert_death_is_explained(engine)
    finally:
        engine.close()


def prove(engine: VLLMServer, checkpoint: Checkpoint) -> None:
    held = engine.held(checkpoint)
    assert held is not None
    verify_identity(held, checkpoint)


def assert_death_is_explained(engine: VLLMServer) -> None:
    """Kill the engine's core as the kernel does when memory runs out."""
    group = group_of(engine)
    assert group is not None
    core = below(group, "EngineCore")
    assert core is not None
    core.kill()
    with pytest.raises(EngineError, match=r"vLLM died, exit status \d+, log .*\n  \| "):
        engine.complete(ask("hello"), seed=0)
    assert not answers(engine)
    engine.close()
    assert members(group) == []


def test_a_model_that_cannot_be_served_is_reported_at_once(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "no_such_model", "architectures": ["NoSuchModel"]}')
    (tmp_path / "model.safetensors").write_bytes(b"")
    engine = VLLMServer(small(tmp_path / "log"))
    began = time.monotonic()
    with pytest.raises(EngineError, match=r"(?s)vLLM ended after .*no_such_model.*To fix: the checkpoint's model"):
        engine.load(Checkpoint("step-000001", tmp_path))
    assert time.monotonic() - began < engine.settings.startup_timeout_s / 2
    assert group_of(engine) is None
    assert engine.weights is None
