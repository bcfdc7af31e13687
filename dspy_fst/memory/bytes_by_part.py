"""How much each part of a run allocates in each place; the table in `dspy_fst.memory` gives the formulas."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from dspy_fst.config import FSTConfig
from dspy_fst.formatting.numbers import GIB, format_bytes
from dspy_fst.memory.arithmetic import HEAP, MicroBatchShape, expected_micro_batch, extreme_micro_batches, update_bytes
from dspy_fst.memory.available import DISK, GPU, MEMORY, SECOND_GPU, Available
from dspy_fst.memory.shape import ModelSize
from dspy_fst.policy_lm import EngineKind

TRAINER, ENGINE = "the trainer", "the engine"
PROCESS = GIB
"""Main memory for Python with torch, transformers and DSPy (measured by `python -m benchmarks.sizes`, rounded up)."""

CACHED_TOKENS = 8 * 4096
"""Tokens whose keys and values a server should hold: eight texts of 4,096 tokens (assumed). Further texts wait."""
LARGEST_SHARE = 0.95
"""The highest ``gpu_memory_utilization`` that is advised (ours)."""
VLLM_WORKINGS = 3 * GIB // 2
"""GPU memory for vLLM's CUDA context, graphs and activations (assumed, not measured)."""
MUCH_WRITTEN = 2**40
"""Bytes over a run above which a warning is given (ours): a disk that writes 1 GiB/s takes 17 minutes."""


@dataclass(frozen=True)
class Writes:
    """The most that a run writes to the disk, including files that it removes again."""

    weights: int
    """Bytes of one published version. Each update that moves the weights publishes one."""
    updates: int
    state: int
    """Bytes of one resumable state after an update."""
    states: int

    @property
    def total(self) -> int:
        return self.weights * (1 + self.updates) + self.state * self.states

    @property
    def words(self) -> str:
        return (
            f"written over the run: at most {format_bytes(self.total)}, {format_bytes(self.weights)} of weights for "
            f"each of {self.updates} updates and {format_bytes(self.state)} for each of {self.states} states"
        )


@dataclass(frozen=True)
class Allocation:
    """How much one part of a run holds in one place, in bytes."""

    place: str
    """``MEMORY``, ``GPU``, ``SECOND_GPU`` or ``DISK``."""
    part: str
    """E.g. ``"the trainer"``."""
    certain: int
    """Held over the whole run."""
    advice: tuple[str, ...] = ()
    """What reduces ``certain``, whether or not it is enough."""
    at_most: int = 0
    """Peak on top of ``certain``. Peaks of two parts never coincide."""
    expected: int = 0
    """The same peak for typical texts."""
    when: str = ""
    """The time of the peak, e.g. ``"an update"``."""
    relief: str = ""
    """What reduces the peak."""
    cuts: tuple[str, ...] = ()
    """Settings that reduce ``certain``."""
    least: int | None = None
    """``certain`` after all of ``cuts``; None means that it stays as it is."""

    @property
    def with_cuts(self) -> int:
        """``certain`` when every setting in ``cuts`` is changed."""
        return self.certain if self.least is None else min(self.certain, self.least)


@dataclass(frozen=True)
class Workload:
    """The model that is trained, and the engine that samples from it."""

    model: str
    size: ModelSize
    kind: EngineKind
    """``"vllm"`` or ``"in_process"``."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """The engine's settings."""
    longest_reply: int = 0
    """In tokens; 0 when it is unknown. A reply longer than a micro-batch is a micro-batch of its own."""


def allocations_of(workload: Workload, config: FSTConfig, tokens: int, available: Available) -> list[Allocation]:
    """All allocations of a run whose micro-batches have ``tokens`` tokens."""
    process = [Allocation(MEMORY, "the process", PROCESS)] if available.imagined else []
    return [
        *process,
        *trainer_allocations(workload, config, tokens, on_gpu=available.on_gpu),
        engine_allocation(workload, available),
        *disk_allocations(workload.size, config, on_gpu=available.on_gpu),
    ]


# ---- the trainer -------------------------------------------------------------------------------


def trainer_allocations(workload: Workload, config: FSTConfig, tokens: int, *, on_gpu: bool) -> list[Allocation]:
    """What the trainer holds over a run, and its peak during an update."""
    size, place, smaller = workload.size, GPU if on_gpu else MEMORY, "use a smaller model"
    if config.method == "gepa":
        return [Allocation(place, TRAINER, 4 * size.parameters, (smaller,))]
    kl = with_kl(config)
    expected, at_most = update_range(workload, config, tokens, on_gpu=on_gpu)
    trainer = Allocation(
        place,
        TRAINER,
        (20 if kl else 16) * size.parameters,
        (smaller,),
        at_most=at_most,
        expected=expected,
        when="an update",
        relief=f"lower micro_batch_tokens={tokens}",
        cuts=(f"kl_coefficient=0 ({format_bytes(4 * size.parameters)} less)",) if kl else (),
        least=16 * size.parameters,
    )
    return (
        [trainer, Allocation(MEMORY, "a state being saved", 12 * size.parameters, (smaller,))] if on_gpu else [trainer]
    )


def update_range(workload: Workload, config: FSTConfig, tokens: int, *, on_gpu: bool) -> tuple[int, int]:
    """Peak of an update on top of what the trainer holds: (expected, at most)."""
    low = number_bytes(config.precision, on_gpu=on_gpu) == 2
    heap = 1.0 if on_gpu else HEAP
    alike = config.group_size if config.method == "rl" else config.group_size // config.population_size

    def bytes_of(batch: MicroBatchShape) -> int:
        return update_bytes(workload.size, batch, with_kl=with_kl(config), teacher=config.distills, low=low)

    def peak(*batches: MicroBatchShape) -> int:
        return round(heap * max(map(bytes_of, batches)))

    longest = max(tokens, workload.longest_reply)
    return peak(expected_micro_batch(tokens, alike)), peak(*extreme_micro_batches(longest, config.group_size))


def with_kl(config: FSTConfig) -> bool:
    """Whether the trainer also holds the starting weights, as the reference of a KL term."""
    return config.kl_coefficient > 0 or config.seed_kl_coefficient > 0


# ---- the engine --------------------------------------------------------------------------------


def engine_allocation(workload: Workload, available: Available) -> Allocation:
    """What the engine holds: on the second card where there is one, else on the first."""
    if workload.kind == "vllm":
        return _vllm_allocation(workload.size, workload.options, available)
    return _in_process_allocation(workload.size, workload.options, available)


def _vllm_allocation(size: ModelSize, options: Mapping[str, Any], available: Available) -> Allocation:
    from dspy_fst.engine.vllm.server_settings import VLLMSettings

    settings = VLLMSettings(**options)
    if settings.attach_url is not None and not available.imagined:
        return Allocation(MEMORY, ENGINE, 0)  # an attached server runs already and has its memory
    if available.on_gpu:
        share = settings.gpu_memory_utilization
        place = SECOND_GPU if available.imagined and SECOND_GPU in available.free else GPU
        advice = f"lower engine_options={{'gpu_memory_utilization': {share:g}}}"
        return Allocation(place, ENGINE, int(available.gpu_total * share), cuts=(advice,), least=served_bytes(size))
    weights, cache = number_bytes(settings.dtype, on_gpu=False) * size.untied, settings.cpu_kv_cache_gib
    advice = f"engine_options={{'cpu_kv_cache_gib': 1}} ({cache - 1} GiB less)"
    cuts = (advice,) if cache > 1 else ()
    return Allocation(MEMORY, ENGINE, weights + cache * GIB, cuts=cuts, least=weights + GIB)


def _in_process_allocation(size: ModelSize, options: Mapping[str, Any], available: Available) -> Allocation:
    from dspy_fst.engine.options import InProcessSettings

    settings = InProcessSettings(**options)
    device = settings.device or ("cuda" if available.on_gpu else "cpu")
    on_gpu = available.on_gpu and device.startswith("cuda")
    second = SECOND_GPU in available.free and (device == "cuda:1" or (available.imagined and settings.device is None))
    number = number_bytes(settings.dtype or "auto", on_gpu=on_gpu)
    sampling = number * size.cached * settings.max_batch_tokens
    return Allocation(
        (SECOND_GPU if second else GPU) if on_gpu else MEMORY,
        ENGINE,
        number * size.untied + (4 - number) * size.embedding,
        at_most=sampling,
        expected=sampling,
        when="sampling",
        relief=f"lower engine_options={{'max_batch_tokens': {settings.max_batch_tokens}}}",
    )


def served_bytes(size: ModelSize) -> int:
    """What a vLLM server on a GPU cannot run without: its weights in bfloat16 and the head in float32."""
    return 2 * size.untied + 2 * size.embedding


def least_served(size: ModelSize) -> int:
    """What a vLLM server on a GPU should have: its weights, `CACHED_TOKENS` keys and values, and `VLLM_WORKINGS`."""
    return served_bytes(size) + 2 * size.cached * CACHED_TOKENS + VLLM_WORKINGS


def vllm_share(size: ModelSize, available: Available) -> float:
    """``gpu_memory_utilization``: as little as works on a card shared with the trainer, most of a card of its own."""
    if SECOND_GPU in available.free:
        return 0.9
    return min(LARGEST_SHARE, math.ceil(20 * least_served(size) / available.gpu_total) / 20)


def number_bytes(dtype: str, *, on_gpu: bool) -> int:
    """Bytes of one number in this precision, which may be ``"auto"``."""
    return 4 if dtype in ("float32", "float") or (dtype == "auto" and not on_gpu) else 2


def known_options(settings: type, options: Mapping[str, object]) -> dict[str, object]:
    """The options that these settings define; options of the other engine are dropped."""
    names = {option.name for option in fields(settings)}
    return {name: value for name, value in options.items() if name in names}


# ---- the disk ----------------------------------------------------------------------------------


def disk_allocations(size: ModelSize, config: FSTConfig, *, on_gpu: bool) -> list[Allocation]:
    """Weights and states on the disk. A short run makes fewer than it may keep."""
    writes = writes_of(size, config, on_gpu=on_gpu)
    # The best of the committed steps is kept beside the best of all until the next state.
    best = 1 if config.checkpoint_every == 1 else 2
    best *= 1 if config.validate_every is None else 2  # the best by reward, and the best by validation
    versions = min(1 + writes.updates, 1 + best + config.keep_weights + 1)
    kept = config.keep_states + 1
    moved = min(writes.states, kept)
    return [
        Allocation(
            DISK,
            "published weights",
            versions * writes.weights,
            ("free space there", "name a run_dir on another disk", "lower keep_weights or keep_states"),
        ),
        Allocation(DISK, "resumable states", moved * writes.state + (4 * size.parameters if moved < kept else 0)),
    ]


def writes_of(size: ModelSize, config: FSTConfig, *, on_gpu: bool) -> Writes:
    """How much a run writes."""
    cycles = 0 if config.method == "gepa" else config.cycles
    return Writes(
        weights=number_bytes(config.precision, on_gpu=on_gpu) * size.untied,
        updates=cycles * config.steps_per_cycle,
        state=12 * size.parameters,
        states=cycles * math.ceil(config.steps_per_cycle / config.checkpoint_every),
    )
