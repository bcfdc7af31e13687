"""Models for whose every new version a vLLM server is started anew, told before a run pays for it."""

from collections.abc import Mapping
from pathlib import Path

from dspy_fst.engine.devices import has_gpu
from dspy_fst.model_files.architectures import folder_restart_reason


def restart_warnings(folder: Path, engine: str, options: Mapping[str, object]) -> list[str]:
    """A sentence when publishing takes a start of the server; an attached server is never started from here.

    Args:
        folder: The model's.
        engine: ``"vllm"`` or ``"in_process"``.
        options: Of the engine.
    """
    if engine != "vllm" or options.get("attach_url") is not None:
        return []
    if (reason := folder_restart_reason(folder, on_gpu=has_gpu())) is None:
        return []
    return [
        f"the vLLM server is started anew for each new version of the weights: {reason}. The steps' counts name these "
        "restarts (engine: restarts for experts); use engine='in_process' or a GPU to do without"
    ]
