"""A vLLM server that was launched: its process, wherever that runs, and the address at which it will answer."""

import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from dspy_fst.engine.machine import free_port
from dspy_fst.engine.vllm.address import Address
from dspy_fst.engine.vllm.launch import vllm_command, vllm_environment
from dspy_fst.engine.vllm.lora_files import LoRANeeds
from dspy_fst.engine.vllm.process import ServerProcess
from dspy_fst.engine.vllm.server_settings import VLLMSettings
from dspy_fst.errors import EngineError


class Process(Protocol):
    """The process of a server: a `ServerProcess` of this machine, or one of another machine."""

    @property
    def log_path(self) -> Path | str:
        """Where its output goes, for messages."""
        ...

    @property
    def exit_status(self) -> int | None:
        """None while it runs, and where its machine is lost; 128 + N if signal N ended it."""
        ...

    def exits_within(self, seconds: float) -> bool:
        """Whether it ends within this time; waits until then at most."""
        ...

    def output(self) -> list[str]:
        """The last lines of its output."""
        ...

    def folder(self, here: Path) -> Path:
        """Where the server finds a folder of this machine, as it is now.

        Raises:
            NoAnswerError: it was not copied there.
        """
        ...

    def kill(self) -> None:
        """End it at once. Call ``stop`` afterwards."""
        ...

    def stop(self, *, keep_log: bool = False) -> None:
        """Ask it to end, and kill it after the grace period. May be called twice."""
        ...


@dataclass(frozen=True)
class Launched:
    """A server that was told to start."""

    process: Process
    address: Callable[[], Address]
    """Where it will listen; waits until that is known, and raises EngineError if it does not become known in time."""


Launch = Callable[[VLLMSettings, Path, LoRANeeds | None], Launched]
"""Launches a server: its settings, the folder of the model, and what the LoRA adapters need if there are any.

An EngineError says why it cannot."""


def launch_here(settings: VLLMSettings, model: Path, loras: LoRANeeds | None) -> Launched:
    """Launch a server on this machine; see `Launch`."""
    port = settings.port or free_port(settings.host)
    key = f"sk-{secrets.token_hex(32)}"  # a form that secret scanners recognise wherever it appears
    try:
        process = ServerProcess(
            vllm_command(settings, model, port, loras),
            vllm_environment(settings, key, loras=loras is not None),
            log_path=Path(settings.log_path) if settings.log_path else None,
            grace_s=settings.stop_grace_s,
        )
    except OSError as error:
        raise EngineError(f"vLLM could not be launched: {error}") from error
    address = Address(f"http://{settings.host}:{port}", key, through_proxy=False)
    return Launched(process, lambda: address)
