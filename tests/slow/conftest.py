from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.slow.makers import save_model


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)  # other tests compare bits with those of a process of its own


@pytest.fixture(scope="session")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a random untied model."""
    return save_model(tmp_path_factory.mktemp("models") / "untied")


@pytest.fixture(scope="session")
def tied_start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a random model whose LM head is its embedding."""
    return save_model(tmp_path_factory.mktemp("models") / "tied", tied=True)
