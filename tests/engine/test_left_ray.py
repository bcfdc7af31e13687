"""A server's place on a Ray cluster that this process has left."""

import re
import threading
from contextlib import ExitStack
from pathlib import Path

import pytest
import ray

from dspy_fst.engine.vllm.on_ray.places import NOT_CONNECTED, ActorProcess, Places
from dspy_fst.engine.vllm.server_settings import VLLMSettings
from dspy_fst.errors import EngineError


@pytest.fixture
def left() -> ActorProcess:
    """The process of a server whose cluster was left; no actor and no reference of Ray's is asked any more."""
    places = Places(VLLMSettings(on_ray=True))
    process = object.__new__(ActorProcess)
    settings = VLLMSettings(on_ray=True, shared_folder=False)
    process._places, process._settings, process._bundle, process._sent = places, settings, 0, ExitStack()
    process._actor, process._ended = None, ray.ObjectRef.nil()
    process._stopped = threading.Lock()
    return process


def test_after_this_process_left_the_cluster_a_server_has_ended_and_ray_begins_no_other(left, monkeypatch):
    monkeypatch.setattr(ray, "init", lambda: pytest.fail("a cluster was begun"))
    assert left.exits_within(1)
    assert left.exit_status is None
    assert left.output() == [NOT_CONNECTED]
    with pytest.raises(EngineError, match=re.escape(NOT_CONNECTED)):
        left.folder(Path("weights"))
    left.kill()
    left.stop()
    assert left._places._free == {0}
