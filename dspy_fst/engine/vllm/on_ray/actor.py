"""A vLLM server inside a Ray actor, on whichever machine Ray placed it."""

import os
from dataclasses import replace
from pathlib import Path

import ray

from dspy_fst.engine.vllm.address import Address
from dspy_fst.engine.vllm.launched import Launched, launch_here
from dspy_fst.engine.vllm.lora_files import LoRANeeds
from dspy_fst.engine.vllm.on_ray.copies import Copies, StoredFolder
from dspy_fst.engine.vllm.on_ray.nodes import node_name
from dspy_fst.engine.vllm.server_settings import VLLMSettings
from dspy_fst.errors import EngineError

_POLL_S = 5.0
SHARE = "keep run_dir and the model in a folder that all nodes share, or set engine_options: {shared_folder: false}"
"""What to do about a folder that a node does not see."""


class ServerActor:
    """Launches one server and ends it; the server also ends with this process.

    Several threads call it: one waits in `ended`.

    Args:
        cards: How many cards Ray gave it.
    """

    def __init__(self, cards: int):
        if not cards:
            os.environ["CUDA_VISIBLE_DEVICES"] = ""  # releases of Ray differ in whether they hide the machine's cards
        self._launched: Launched | None = None
        self._copies: Copies | None = None

    @ray.method
    def launch(
        self, settings: VLLMSettings, model: Path | StoredFolder, loras: LoRANeeds | None
    ) -> tuple[Address, str]:
        """Launch the server at this machine's address in the cluster, on a folder that it sees or on a copy.

        Its endpoints can run any method of the engine, and all of them ask for a random key of 256 bits.

        Returns:
            Its address, and the name of this machine.

        Raises:
            EngineError: this machine does not see the model, or cannot start the process.
        """
        host = ray.util.get_node_ip_address()
        name = node_name(host, ray.get_runtime_context().get_node_id())
        if isinstance(model, StoredFolder):
            # The weights in use and the next ones, and as many of each adapter.
            self._copies = Copies(2 * (loras.adapters if loras else 1), keep_first=loras is not None)
        folder = self._taken(model) if isinstance(model, StoredFolder) else model
        if not (folder / "config.json").is_file():
            raise EngineError(f"{name} does not see {folder}: {SHARE}")
        self._launched = launch_here(replace(settings, host=host), folder, loras)
        return self._launched.address(), name

    @ray.method
    def find(self, name: str) -> Path | None:
        """See `Copies.find`."""
        return self._copies.find(name) if self._copies is not None else None

    @ray.method
    def take(self, sent: StoredFolder) -> Path:
        """See `Copies.take`.

        Raises:
            EngineError: this machine cannot write the copy.
        """
        return self._taken(sent)

    @ray.method
    def ended(self) -> int | None:
        """The exit status of the server, once it has ended."""
        process = self._require().process
        while not process.exits_within(_POLL_S):
            pass
        return process.exit_status

    @ray.method
    def output(self) -> tuple[str, list[str]]:
        """Where its output goes, and the last lines."""
        process = self._require().process
        return str(process.log_path), process.output()

    @ray.method
    def kill(self) -> None:
        """See `launched.Process`."""
        self._require().process.kill()

    @ray.method
    def stop(self, keep_log: bool) -> None:
        """See `launched.Process`."""
        if self._launched is not None:
            self._launched.process.stop(keep_log=keep_log)
        if self._copies is not None:
            self._copies.close()

    def _taken(self, sent: StoredFolder) -> Path:
        if self._copies is None:
            raise EngineError("no server was launched here on a copy")
        try:
            return self._copies.take(sent)
        except OSError as error:
            raise EngineError(f"{sent.name} cannot be copied to this machine: {error}") from error

    def _require(self) -> Launched:
        if self._launched is None:
            raise EngineError("no server was launched here")
        return self._launched
