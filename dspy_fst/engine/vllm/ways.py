"""How new weights reach a server: it reads the published folder, or they are sent to it."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Protocol

from dspy_fst.engine.base import Holding
from dspy_fst.engine.vllm.client import VLLMClient
from dspy_fst.engine.vllm.launch import HOW_TO_ATTACH
from dspy_fst.engine.vllm.server_settings import VLLMSettings
from dspy_fst.engine.vllm.transfer import Transfer

There = Callable[[Path], Path]
"""See `launched.Process.folder`."""


class Way(Protocol):
    """The way of weights to one server; see `VLLMSettings.weight_transfer`."""

    def swap(self, folder: Path) -> None:
        """Swap a folder's weights in, after the requests in flight; see `VLLMClient.swap_weights`."""
        ...

    def held(self, folder: Path) -> Holding | None:
        """Compare the weights in use with the folder's; see `Scorer.held`."""
        ...

    def close(self) -> None:
        """Let go of what was opened. May be called twice."""
        ...


class FromDisk:
    """The server reads the folder."""

    def __init__(self, client: VLLMClient, there: There, *, attached: bool):
        self._client, self._there, self._attached = client, there, attached

    def swap(self, folder: Path) -> None:
        there = self._there(folder)  # copied, if it must be, beside the requests in flight
        self._client.swap_weights(partial(self._client.run, "reload_weights", weights_path=str(there)))

    def held(self, folder: Path) -> Holding | None:
        return self._client.held(self._there(folder), optional=self._attached)

    def close(self) -> None:
        pass


def way_to(client: VLLMClient, settings: VLLMSettings, there: There = Path) -> Way:
    """The way to a server that answers.

    Args:
        client: Of the server.
        settings: Its own.
        there: Where it finds a folder of this machine; an attached one, under the same path.

    Raises:
        EngineError: it was not launched for the way that the settings name.
    """
    if settings.weight_transfer == "disk":
        return FromDisk(client, there, attached=settings.attach_url is not None)
    return Transfer(client, settings.weight_transfer, HOW_TO_ATTACH)
