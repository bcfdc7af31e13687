"""What a run needs of memory and disk, told before anything is loaded.

Read from the headers of the model's files alone. With P parameters and V tokens in the vocabulary:

| what                       | bytes                                                                             |
| -------------------------- | --------------------------------------------------------------------------------- |
| weights, gradient, moments | 4 P each in float32: 16 P (slow/trainer.py keeps them so also on a GPU)            |
| reference of the KL term   | 4 P on a CPU, 2 P on a GPU; none when kl_coefficient is 0                          |
| logits of a micro-batch    | 4 V a token, three copies alive at once: logits, log-softmax, gradient             |
| vLLM on a CPU              | 4 P and cpu_kv_cache_gib                                                           |
| vLLM on a GPU              | gpu_memory_utilization of the device                                               |
| in-process engine          | 4 P on a CPU, 2 P on a GPU; its cache is small beside the rest and left out        |
| disk: a published version  | 4 P (2 P on a GPU); the first, the best, keep_weights and one being written         |
| disk: a state              | 12 P: weights and two moments; keep_states and one being written                   |

Activations inside the layers are left out: they depend on the attention kernel. The sum is therefore a lower bound, and
what it refuses would certainly not fit.
"""

import json
import shutil
import struct
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

import psutil

from dspy_fst.config import FSTConfig
from dspy_fst.engine.memory import free_gpu_bytes
from dspy_fst.policy import PolicyLM

GIB = 1024**3
LIVE_COPIES = 3
"""Arrays of (tokens, vocabulary) that an update holds at once."""
LONGEST_HEADER = 100_000_000
"""Bytes; what safetensors itself accepts."""


@dataclass(frozen=True)
class Need:
    """Bytes that a run takes at least, and bytes that are free."""

    parameters: int
    trainer: int
    engine: int
    disk: int
    memory_free: int
    disk_free: int
    on_gpu: bool


def parameter_count(folder: Path) -> int | None:
    """Numbers in a model's safetensors files; None when there are none to read."""
    headers = [_header(path) for path in sorted(folder.glob("*.safetensors"))]
    if not headers or any(header is None for header in headers):
        return None
    return sum(prod(shape) for header in headers if header for shape in header)


def need(policy: PolicyLM, config: FSTConfig, run_dir: Path) -> Need | None:
    """What this run takes and what there is; None for a model whose files are not on this machine."""
    folder = policy.checkpoint.path
    parameters = parameter_count(folder) if folder.is_dir() else None
    if parameters is None:
        return None
    gpu = free_gpu_bytes()
    half = 2 if gpu else 4
    logits = LIVE_COPIES * 4 * _vocabulary(folder) * config.micro_batch_tokens
    reference = half * parameters if config.kl_coefficient else 0
    free, _ = gpu or (_free_memory(), 0)
    return Need(
        parameters=parameters,
        trainer=4 * parameters if config.method == "gepa" else 16 * parameters + reference + logits,
        engine=_engine_bytes(policy, half * parameters, gpu),
        disk=max(0, _on_disk(parameters, half, config) - _held(run_dir)),
        memory_free=free,
        disk_free=shutil.disk_usage(_existing(run_dir)).free,
        on_gpu=gpu is not None,
    )


def fit_faults(policy: PolicyLM, config: FSTConfig, run_dir: Path) -> list[str]:
    """Why this run would run out of memory or disk, one sentence each."""
    if (needed := need(policy, config, run_dir)) is None:
        return []
    faults = []
    size = f"model={policy.model!r} ({needed.parameters / 1e6:,.1f}M parameters)"
    if needed.trainer + needed.engine > needed.memory_free:
        where, engine_advice = (
            ("the GPU's memory", "gpu_memory_utilization") if needed.on_gpu else ("memory", "cpu_kv_cache_gib")
        )
        faults.append(
            f"{where}: training {size} takes at least {_gib(needed.trainer)} for the trainer and "
            f"{_gib(needed.engine)} for the engine, and {_gib(needed.memory_free)} are free; use a smaller model, "
            f"lower micro_batch_tokens or engine_options[{engine_advice!r}], or free memory"
        )
    if needed.disk > needed.disk_free:
        faults.append(
            f"run_dir={str(run_dir)!r}: a run of {size} keeps about {_gib(needed.disk)} there, and "
            f"{_gib(needed.disk_free)} are free; lower keep_weights or keep_states, free space, or name a directory on "
            "another disk"
        )
    return faults


def writable_fault(run_dir: Path) -> str | None:
    """Why nothing can be written at ``run_dir``, found by trying; nothing is left behind."""
    parent = _existing(run_dir)
    if not parent.is_dir():
        return f"run_dir={str(run_dir)!r}: {parent} is a file; name another directory"
    try:
        with tempfile.NamedTemporaryFile(dir=parent, prefix=".dspy-fst-") as file:
            file.write(bytes(4096))
            file.flush()
    except OSError as error:
        return f"run_dir={str(run_dir)!r} cannot be written: {error}; name another directory"
    return None


def _engine_bytes(policy: PolicyLM, weights: int, gpu: tuple[int, int] | None) -> int:
    options = policy.handle.options
    if policy.handle.resolved_kind != "vllm":
        return weights
    if options.get("attach_url"):
        return 0  # it runs already, and its memory is taken
    from dspy_fst.engine.vllm_server import VLLMSettings

    settings = VLLMSettings(**options)
    if gpu is not None:
        return int(settings.gpu_memory_utilization * gpu[1])
    return weights + int(settings.cpu_kv_cache_gib * GIB)


def _on_disk(parameters: int, half: int, config: FSTConfig) -> int:
    if config.method == "gepa":  # nothing is updated: one version, and states without moments
        return 2 * half * parameters + 4 * parameters
    return (config.keep_weights + 3) * half * parameters + (config.keep_states + 1) * 12 * parameters


def _held(run_dir: Path) -> int:
    """Bytes that the run has there already; files with several names count once."""
    stats = [path.lstat() for name in ("weights", "states") for path in (run_dir / name).rglob("*")]
    return sum({stat.st_ino: stat.st_size for stat in stats}.values())


def _header(path: Path) -> Iterator[list[int]] | None:
    """Shapes of the tensors in a safetensors file; None when it is none."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > LONGEST_HEADER:
                return None
            header = json.loads(file.read(length))
        return iter([tensor["shape"] for name, tensor in header.items() if name != "__metadata__"])
    except (OSError, ValueError, struct.error, AttributeError, TypeError, KeyError):
        return None


def _vocabulary(folder: Path) -> int:
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return 0
    return int(config.get("vocab_size") or config.get("text_config", {}).get("vocab_size") or 0)


def _free_memory() -> int:
    """Memory that can be taken, the container's limit included."""
    free = psutil.virtual_memory().available
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
    except (OSError, ValueError):
        return int(free)
    return int(free) if limit == "max" else min(int(free), max(0, int(limit) - used))


def _existing(path: Path) -> Path:
    """The path, or its nearest parent that exists."""
    while not path.exists():
        path = path.parent
    return path


def _gib(size: int) -> str:
    return f"{size / GIB:,.1f} GiB"
