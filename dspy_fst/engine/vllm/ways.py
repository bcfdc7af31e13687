"""How new weights reach a server: it reads the published folder, or they are sent to it."""

from functools import partial
from pathlib import Path
from typing import Protocol

from dspy_fst.engine.base import Holding
from dspy_fst.engine.vllm.client import VLLMClient
from dspy_fst.engine.vllm.launch import HOW_TO_ATTACH
from dspy_fst.engine.vllm.server_settings import VLLMSettings
from dspy_fst.engine.vllm.transfer import Transfer


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

    def __init__(self, client: VLLMClient, *, attached: bool):
        self._client, self._attached = client, attached

    def swap(self, folder: Path) -> None:
        self._client.swap_weights(partial(self._client.run, "reload_weights", weights_path=str(folder)))

    def held(self, folder: Path) -> Holding | None:
        return self._client.held(folder, optional=self._attached)

    def close(self) -> None:
        pass


def way_to(client: VLLMClient, settings: VLLMSettings) -> Way:
    """The way to a server that answers.

    Raises:
        EngineError: it was not launched for the way that the settings name.
    """
    if settings.weight_transfer == "disk":
        return FromDisk(client, attached=settings.attach_url is not None)
    return Transfer(client, settings.weight_transfer, HOW_TO_ATTACH)
