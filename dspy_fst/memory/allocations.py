"""What each part of a run takes in each place, see the table in `dspy_fst.memory`."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from dspy_fst.config import FSTConfig
from dspy_fst.memory.arithmetic import HEAP, Reading, expected_reading, extreme_readings, update_bytes
from dspy_fst.memory.places import DISK, GPU, MEMORY, SECOND_GPU, Room
from dspy_fst.memory.shape import ModelSize
from dspy_fst.policy_lm import EngineKind
from dspy_fst.run.written import GIB, Writes, shown

TRAINER, ENGINE = "the trainer", "the engine"
PROCESS = GIB
"""Of main memory, for Python with torch, transformers and DSPy (measured, with room: `python -m benchmarks.sizes`)."""

CACHED_TOKENS = 8 * 4096
"""Keys and values that a server should hold: eight texts of 4,096 tokens (assumed); more texts in flight wait."""
LARGEST_SHARE = 0.95
"""Of a card: the highest ``gpu_memory_utilization`` that is advised (ours)."""
VLLM_WORKINGS = 3 * GIB // 2
"""Of a card, for vLLM's CUDA context, graphs and activations: assumed, never measured here."""


@dataclass(frozen=True)
class Take:
    """What one part of a run takes in one place, in bytes."""

    place: str
    """``MEMORY``, ``GPU``, ``SECOND_GPU`` or ``DISK``."""
    who: str
    """E.g. ``"the trainer"``."""
    certain: int
    advice: tuple[str, ...] = ()
    """What would make it less."""
    at_most: int = 0
    """On top for a time; never while another's is."""
    expected: int = 0
    """The same with texts as they usually are."""
    when: str = ""
    """That time, e.g. ``"an update"``."""
    relief: str = ""
    """What would make that less."""
    cuts: tuple[str, ...] = ()
    """Settings that would make ``certain`` less."""
    least: int | None = None
    """Bytes that those settings leave at least; None: ``certain``."""

    @property
    def with_cuts(self) -> int:
        """What it takes for certain when every setting in ``cuts`` is changed."""
        return self.certain if self.least is None else min(self.certain, self.least)


@dataclass(frozen=True)
class Subject:
    """What is trained, and who samples from it."""

    model: str
    size: ModelSize
    kind: EngineKind
    """``"vllm"`` or ``"in_process"``."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """The engine's settings."""
    longest_reply: int = 0
    """Tokens; a reply that is longer than a micro-batch comes alone. 0: not known."""


def takes_of(subject: Subject, config: FSTConfig, tokens: int, room: Room) -> list[Take]:
    """Everything that a run takes with micro-batches of ``tokens`` tokens."""
    process = [Take(MEMORY, "the process", PROCESS)] if room.imagined else []
    return [
        *process,
        *trainer_takes(subject, config, tokens, on_gpu=room.on_gpu),
        engine_take(subject, room),
        *disk_takes(subject.size, config, on_gpu=room.on_gpu),
    ]


# ---- the trainer -------------------------------------------------------------------------------


def trainer_takes(subject: Subject, config: FSTConfig, tokens: int, *, on_gpu: bool) -> list[Take]:
    """What the trainer of whole weights holds over a run, and on top during an update."""
    size, place, smaller = subject.size, GPU if on_gpu else MEMORY, "use a smaller model"
    if config.method == "gepa":
        return [Take(place, TRAINER, 4 * size.parameters, (smaller,))]
    kl = with_kl(config)
    expected, at_most = update_range(subject, config, tokens, on_gpu=on_gpu)
    trainer = Take(
        place,
        TRAINER,
        (20 if kl else 16) * size.parameters,
        (smaller,),
        at_most=at_most,
        expected=expected,
        when="an update",
        relief=f"lower micro_batch_tokens={tokens}",
        cuts=(f"kl_coefficient=0 ({shown(4 * size.parameters)} less)",) if kl else (),
        least=16 * size.parameters,
    )
    return [trainer, Take(MEMORY, "a state being saved", 12 * size.parameters, (smaller,))] if on_gpu else [trainer]


def update_range(subject: Subject, config: FSTConfig, tokens: int, *, on_gpu: bool) -> tuple[int, int]:
    """What an update takes on top of what the trainer holds: expected, and at most."""
    low = number_bytes(config.precision, on_gpu=on_gpu) == 2
    heap = 1.0 if on_gpu else HEAP
    alike = config.group_size if config.method == "rl" else config.group_size // config.population_size

    def one(reading: Reading) -> int:
        return update_bytes(subject.size, reading, with_kl=with_kl(config), teacher=config.distills, low=low)

    def taken(*readings: Reading) -> int:
        return round(heap * max(one(reading) for reading in readings))

    longest = max(tokens, subject.longest_reply)
    return taken(expected_reading(tokens, alike)), taken(*extreme_readings(longest, config.group_size))


def with_kl(config: FSTConfig) -> bool:
    """Whether the frozen start is held."""
    return config.kl_coefficient > 0 or config.seed_kl_coefficient > 0


# ---- the engine --------------------------------------------------------------------------------


def engine_take(subject: Subject, room: Room) -> Take:
    """What the engine holds, on the second card where there is one for it."""
    if subject.kind == "vllm":
        return _vllm_take(subject.size, subject.options, room)
    return _in_process_take(subject.size, subject.options, room)


def _vllm_take(size: ModelSize, options: Mapping[str, Any], room: Room) -> Take:
    from dspy_fst.engine.vllm.server import VLLMSettings

    settings = VLLMSettings(**options)
    if settings.attach_url is not None and not room.imagined:
        return Take(MEMORY, ENGINE, 0)  # it is there already, and has what it takes
    if room.on_gpu:
        share = settings.gpu_memory_utilization
        place = SECOND_GPU if room.imagined and SECOND_GPU in room.free else GPU
        advice = f"lower engine_options={{'gpu_memory_utilization': {share:g}}}"
        return Take(place, ENGINE, int(room.gpu_total * share), cuts=(advice,), least=served_bytes(size))
    weights, cache = number_bytes(settings.dtype, on_gpu=False) * size.untied, settings.cpu_kv_cache_gib
    advice = f"engine_options={{'cpu_kv_cache_gib': 1}} ({cache - 1} GiB less)"
    cuts = (advice,) if cache > 1 else ()
    return Take(MEMORY, ENGINE, weights + cache * GIB, cuts=cuts, least=weights + GIB)


def _in_process_take(size: ModelSize, options: Mapping[str, Any], room: Room) -> Take:
    from dspy_fst.engine.in_process import InProcessSettings

    settings = InProcessSettings(**options)
    device = settings.device or ("cuda" if room.on_gpu else "cpu")
    on_gpu = room.on_gpu and device.startswith("cuda")
    second = SECOND_GPU in room.free and (device == "cuda:1" or (room.imagined and settings.device is None))
    number = number_bytes(settings.dtype or "auto", on_gpu=on_gpu)
    sampling = number * size.cached * settings.max_batch_tokens
    return Take(
        (SECOND_GPU if second else GPU) if on_gpu else MEMORY,
        ENGINE,
        number * size.untied + (4 - number) * size.embedding,
        at_most=sampling,
        expected=sampling,
        when="sampling",
        relief=f"lower engine_options={{'max_batch_tokens': {settings.max_batch_tokens}}}",
    )


def served_bytes(size: ModelSize) -> int:
    """What a vLLM server on a GPU cannot do without: its weights in bfloat16 and the head in float32."""
    return 2 * size.untied + 2 * size.embedding


def least_served(size: ModelSize) -> int:
    """What a vLLM server on a GPU should have: its weights, `CACHED_TOKENS` keys and values, and `VLLM_WORKINGS`."""
    return served_bytes(size) + 2 * size.cached * CACHED_TOKENS + VLLM_WORKINGS


def vllm_share(size: ModelSize, room: Room) -> float:
    """``gpu_memory_utilization``: the least on a card that the trainer is on too, most of a card of its own."""
    if SECOND_GPU in room.free:
        return 0.9
    return min(LARGEST_SHARE, math.ceil(20 * least_served(size) / room.gpu_total) / 20)


def number_bytes(dtype: str, *, on_gpu: bool) -> int:
    """Bytes of a number in a precision that may be ``"auto"``."""
    return 4 if dtype in ("float32", "float") or (dtype == "auto" and not on_gpu) else 2


def known_options(settings: type, options: Mapping[str, Any]) -> dict[str, Any]:
    """Those options that an engine has: the ones of another engine mean nothing to it."""
    names = {one.name for one in fields(settings)}
    return {name: value for name, value in options.items() if name in names}


# ---- the disk ----------------------------------------------------------------------------------


def disk_takes(size: ModelSize, config: FSTConfig, *, on_gpu: bool) -> list[Take]:
    """See the table in `dspy_fst.memory`. A short run never has as many as it may keep."""
    writes = writes_of(size, config, on_gpu=on_gpu)
    # The best of the committed steps is kept beside the best of all until the next state.
    best = 1 if config.checkpoint_every == 1 else 2
    best *= 1 if config.validate_every is None else 2  # the best by reward, and the best by validation
    versions = min(1 + writes.updates, 1 + best + config.keep_weights + 1)
    kept = config.keep_states + 1
    moved = min(writes.states, kept)
    return [
        Take(
            DISK,
            "published weights",
            versions * writes.weights,
            ("free space there", "name a run_dir on another disk", "lower keep_weights or keep_states"),
        ),
        Take(DISK, "resumable states", moved * writes.state + (4 * size.parameters if moved < kept else 0)),
    ]


def writes_of(size: ModelSize, config: FSTConfig, *, on_gpu: bool) -> Writes:
    """What is written over a run."""
    cycles = 0 if config.method == "gepa" else config.cycles
    return Writes(
        weights=number_bytes(config.precision, on_gpu=on_gpu) * size.untied,
        updates=cycles * config.steps_per_cycle,
        state=12 * size.parameters,
        states=cycles * math.ceil(config.steps_per_cycle / config.checkpoint_every),
    )
