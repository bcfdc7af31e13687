from pathlib import Path

import pytest
import torch

from tests.slow.makers import save_model


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a random untied model."""
    return save_model(tmp_path_factory.mktemp("models") / "untied")


@pytest.fixture(scope="session")
def tied_start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a random model whose LM head is its embedding."""
    return save_model(tmp_path_factory.mktemp("models") / "tied", tied=True)
