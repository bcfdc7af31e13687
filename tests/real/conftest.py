"""SmolLM2-135M-Instruct as the tests here use it. One process runs them all: two of them at once would need 16 GB."""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dspy_fst import PolicyLM
from programs import smollm2


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if item.path.is_relative_to(here):
            item.add_marker(pytest.mark.slow)
            item.add_marker(pytest.mark.timeout(1800))


@pytest.fixture(scope="session")
def on_disk() -> Iterator[Path]:
    """For gigabytes: where other tests write may be in memory."""
    with tempfile.TemporaryDirectory(prefix="dspy-fst-real-") as folder:
        yield Path(folder)


@pytest.fixture
def in_process() -> Iterator[Callable[..., PolicyLM]]:
    """Makes PolicyLMs on the embedded engine, and stops them."""
    made: list[PolicyLM] = []

    def make(precision: str = "float32", max_tokens: int = 24) -> PolicyLM:
        options = {"dtype": precision, "max_batch_tokens": 8192}
        made.append(PolicyLM(smollm2.folder(), engine="in_process", max_tokens=max_tokens, engine_options=options))
        return made[-1]

    yield make
    for policy in made:
        policy.release()
