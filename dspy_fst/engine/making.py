"""Which engine a PolicyLM means on this machine, and how that engine is made. Nothing is started here."""

import importlib.util
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from dspy_fst.engine.base import Checkpoint, Engine
from dspy_fst.engine.machine import has_gpu
from dspy_fst.engine.options import InProcessSettings, make_settings
from dspy_fst.errors import ConfigurationError

if TYPE_CHECKING:
    from dspy_fst.engine.vllm.server_settings import VLLMSettings

EngineKind = Literal["auto", "vllm", "in_process"]


def downloaded(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint as a folder on this machine; a hub name is fetched."""
    if checkpoint.path.is_dir():
        return checkpoint
    from huggingface_hub import snapshot_download

    return Checkpoint(checkpoint.version, Path(snapshot_download(str(checkpoint.path))))


def resolve_kind(kind: EngineKind) -> EngineKind:
    """What ``"auto"`` stands for on this machine."""
    if kind != "auto":
        return kind
    return "vllm" if importlib.util.find_spec("vllm") and has_gpu() else "in_process"


def _on_ray(settings: "VLLMSettings") -> Engine:
    """A fleet even of one server: it gives calls back whose machine is lost.

    Raises:
        ConfigurationError: Ray is not installed.
    """
    if importlib.util.find_spec("ray") is None:
        raise ConfigurationError(
            ["engine_options: on_ray needs Ray, which is not installed: pip install 'dspy-fst[ray]'"]
        )
    from dspy_fst.engine.vllm.fleet.fleet import Fleet
    from dspy_fst.engine.vllm.on_ray.places import Places
    from dspy_fst.engine.vllm.server import VLLMServer

    return Fleet(settings, partial(VLLMServer, launch=Places(settings).launch))


def engine_maker(kind: EngineKind, options: Mapping[str, object]) -> Callable[[], Engine]:
    """A function that makes the engine; faults in its options are found now.

    Raises:
        ConfigurationError: the engine is unknown or does not take an option.
    """
    if kind == "vllm":
        from dspy_fst.engine.vllm.server_settings import VLLMSettings

        served = make_settings(VLLMSettings, options, kind)

        def on_servers() -> Engine:
            from dspy_fst.engine.vllm.fleet.each import members_of
            from dspy_fst.engine.vllm.fleet.fleet import Fleet
            from dspy_fst.engine.vllm.supervisor import Supervisor

            if served.on_ray:
                return _on_ray(served)
            each = members_of(served)
            return Supervisor(each[0]) if len(each) == 1 else Fleet(served)

        return on_servers
    if kind == "in_process":
        settings = make_settings(InProcessSettings, options, kind)

        def in_process() -> Engine:
            from dspy_fst.engine.in_process import InProcessEngine  # imports torch and transformers

            return InProcessEngine(settings)

        return in_process
    raise ConfigurationError([f"engine={kind!r} is unknown; use 'auto', 'vllm' or 'in_process'"])
