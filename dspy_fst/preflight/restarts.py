"""Warns of models for which every publish restarts the vLLM server."""

from collections.abc import Mapping
from pathlib import Path

from dspy_fst.engine.machine import has_gpu
from dspy_fst.model_files.architectures import folder_restart_reason


def restart_warnings(folder: Path, engine: str, options: Mapping[str, object], *, lora: bool = False) -> list[str]:
    """A sentence when publishing restarts the server. An attached server is never started from here.

    Args:
        folder: The model's folder.
        engine: ``"vllm"`` or ``"in_process"``.
        options: The engine's options.
        lora: Whether LoRA adapters are trained, so that the base on the server stays.
    """
    if lora or engine != "vllm" or options.get("attach_url") is not None:
        return []
    if (reason := folder_restart_reason(folder, on_gpu=has_gpu())) is None:
        return []
    return [
        f"the vLLM server is restarted for each new version of the weights: {reason}. Each step counts its restarts "
        "(engine: restarts for experts). engine='in_process' or a GPU avoids them"
    ]
