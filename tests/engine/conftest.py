"""Servers that several files share: a real one, as to start it takes long, and one of canned replies."""

import logging
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from dspy_fst.engine.base import Checkpoint
from dspy_fst.engine.vllm.server import VLLMServer
from tests.engine.lessons import LESSONS
from tests.engine.no_card import launched_for_transfer
from tests.engine.server_state import group_of, unread_version
from tests.engine.taught import teach
from tests.engine.test_server_process import members
from tests.engine.test_vllm_client import Canned
from tests.engine.tiny_qwen import small


@pytest.fixture(scope="package")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that thinks and calls tools, of the shape of `tiny_qwen`."""
    return teach(tmp_path_factory.mktemp("taught") / "model", LESSONS)


@pytest.fixture(scope="package")
def server(taught: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VLLMServer]:
    """Each test loads the weights that it is about; the tokenizer and its template stay the taught model's.

    Its weights come from the disk, and it was launched so that `test_transfer` may send it others.
    """
    logging.getLogger("dspy_fst").setLevel(logging.INFO)
    launch = launched_for_transfer(tmp_path_factory.mktemp("plugin") / "no_card")
    engine = VLLMServer(small(tmp_path_factory.mktemp("log") / "vllm.log"), launch)
    engine.load(Checkpoint("taught", taught))
    yield engine
    group = group_of(engine)
    engine.close()
    assert group is not None
    assert members(group) == []


@pytest.fixture
def weights(tmp_path: Path) -> Callable[[str], Checkpoint]:
    """Makes the folder of a version, see `unread_version`."""
    return partial(unread_version, tmp_path)


@pytest.fixture
def canned() -> Iterator[Canned]:
    server = Canned()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield server
    server.stall.set()
    server.shutdown()
    server.server_close()
