"""What a test wants to know of a server's state, and the weights that a scripted server takes."""

from pathlib import Path

import httpx

from dspy_fst.engine.base import Checkpoint
from dspy_fst.engine.vllm.process import ServerProcess
from dspy_fst.engine.vllm.server import VLLMServer


def group_of(server: VLLMServer) -> int | None:
    """Process group of everything that the server launched; None when it launched nothing."""
    process = server._process
    return process.group if isinstance(process, ServerProcess) else None


def answers(server: VLLMServer) -> bool:
    """Whether the server answers a health check now."""
    if server.address is None:
        return False
    try:
        return httpx.get(f"{server.address.url}/health", trust_env=False).is_success
    except httpx.HTTPError:
        return False


def unread_version(folder: Path, version: str) -> Checkpoint:
    """A folder of weights as far as a scripted server looks: its files are there and hold nothing."""
    path = folder / version
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text("{}")
    (path / "model.safetensors").write_bytes(b"")
    return Checkpoint(version, path)
