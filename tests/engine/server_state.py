"""What a test wants to know of a server's state: its process group, and whether it answers."""

import httpx

from dspy_fst.engine.vllm.server import VLLMServer


def group_of(server: VLLMServer) -> int | None:
    """Process group of everything that the server launched; None when it launched nothing."""
    return server._process.group if server._process else None


def answers(server: VLLMServer) -> bool:
    """Whether the server answers a health check now."""
    if server.address is None:
        return False
    try:
        return httpx.get(f"{server.address.url}/health", trust_env=False).is_success
    except httpx.HTTPError:
        return False
