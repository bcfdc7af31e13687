"""How much each part of a run allocates in each place; the table in `dspy_fst.memory` gives the formulas."""

import math
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from dspy_fst.config import FSTConfig
from dspy_fst.engine.vllm.fleet.placing import spares_first_card
from dspy_fst.engine.vllm.server_settings import BUFFER_BYTES, KEEPS_WEIGHTS, VLLMSettings
from dspy_fst.formatting.numbers import GIB, format_bytes
from dspy_fst.memory.allocation import Allocation, Workload, Writes
from dspy_fst.memory.arithmetic import (
    HEAP,
    MicroBatchShape,
    Update,
    expected_micro_batch,
    extreme_micro_batches,
    update_bytes,
)
from dspy_fst.memory.available import DISK, GPU, MEMORY, SECOND_GPU, Available
from dspy_fst.memory.shape import ModelSize

TRAINER, ENGINE = "the trainer", "the engine"
TRAINED, GRADIENTS, REFERENCE, BASE = "trained weights", "gradients", "the start's weights", "frozen base"
"""Parts of what the trainer holds."""
QUANTIZED = {"nf4": 0.5625, "int8": 1.0}
"""Bytes of a number of a quantised base, codes and scales of 4 bits, codes of 8 bits (`slow.quantized`)."""
PROCESS = GIB
"""Main memory for Python with torch, transformers and DSPy (measured by `python -m benchmarks.sizes`, rounded up)."""

CACHED_TOKENS, FEWEST_CACHED_TOKENS = 8 * 4096, 2 * 4096
"""Tokens whose keys and values a server should hold, and on a small card at least: eight texts of 4,096 tokens, or two
(assumed). Further texts wait."""
LARGEST_SHARE = 0.95
"""The highest ``gpu_memory_utilization`` that is advised (ours)."""
VLLM_WORKINGS = 3 * GIB // 2
"""GPU memory for vLLM's CUDA context, graphs and activations, also while it sleeps (assumed, not measured)."""
CHUNKS = 3
"""Chunks of weights that each side of a transfer over NCCL holds at most (vLLM 0.32, `packed_tensor.py`)."""
PROOF_TOKENS = 8 * 128
"""Most tokens that the trainer scores after a publish (`training.publisher`)."""
MUCH_WRITTEN = 2**40
"""Bytes over a run above which a warning is given (ours): a disk that writes 1 GiB/s takes 17 minutes."""


def allocations_of(workload: Workload, config: FSTConfig, tokens: int, available: Available) -> list[Allocation]:
    """All allocations of a run whose micro-batches have ``tokens`` tokens."""
    process = [Allocation(MEMORY, "the process", PROCESS)] if available.imagined else []
    engine = engine_allocation(workload, config, available)
    return [
        *process,
        *trainer_allocations(workload, config, tokens, on_gpu=available.on_gpu),
        engine,
        *transfer_allocations(workload, config, engine.place, available),
        *sleeping_allocations(workload, config, available),
        *disk_allocations(workload, config, on_gpu=available.on_gpu),
    ]


# ---- the trainer -------------------------------------------------------------------------------


def trainer_allocations(workload: Workload, config: FSTConfig, tokens: int, *, on_gpu: bool) -> list[Allocation]:
    """What the trainer holds over a run, and its peak during an update."""
    size, place, smaller = workload.size, GPU if on_gpu else MEMORY, "use a smaller model"
    if config.method == "gepa":
        return [Allocation(place, TRAINER, 4 * size.parameters, (smaller,))]
    expected, at_most = update_range(workload, config, tokens, on_gpu=on_gpu)
    parts = trainer_parts(workload, config, on_gpu=on_gpu)
    certain, reference = sum(parts.values()), parts.get(REFERENCE, 0)
    trainer = Allocation(
        place,
        TRAINER,
        certain,
        (smaller,),
        at_most=at_most,
        expected=expected,
        when="an update",
        relief=f"lower micro_batch_tokens={tokens}",
        cuts=(f"kl_coefficient=0 ({format_bytes(reference)} less)",) if reference else (),
        least=certain - reference,
        made_of=tuple(parts.items()),
        given_back=parts[GRADIENTS] if on_gpu and takes_turns(workload) else 0,
    )
    if workload.ranks == 1:
        written = Allocation(MEMORY, "a state being saved", state_bytes(workload, config), (smaller,))
    else:
        written = Allocation(MEMORY, "weights being published", gathered_bytes(workload, config), (smaller,))
    return [trainer, written] if on_gpu else [trainer]


def trainer_parts(workload: Workload, config: FSTConfig, *, on_gpu: bool) -> dict[str, int]:
    """What the trainer holds over a run, in bytes, part by part; of several ranks that share the weights, one rank.

    On a CPU these hold together what one process holds.
    """
    whole = _whole_parts(workload, config, on_gpu=on_gpu)
    if workload.ranks == 1 or not on_gpu:
        return whole
    shares = {part: -(-size // workload.ranks) for part, size in whole.items()}
    return {**shares, "weights put together": together_bytes(workload, config)}


def together_bytes(workload: Workload, config: FSTConfig) -> int:
    """What is whole for a time on a rank that holds a part of the weights: embedding and head, and two layers, of which
    one is fetched ahead, with their gradients."""
    size, number = workload.size, number_bytes(config.precision, on_gpu=True)
    ends, layers = size.parameters - size.body, 2 * size.body // size.layers
    if config.adapter is not None:
        return number * (ends + layers)
    return 8 * (ends + layers) + (4 * ends if with_kl(config) else 0)


def gathered_bytes(workload: Workload, config: FSTConfig) -> int:
    """Main memory in which rank 0 puts published weights together, where ranks on cards share them: as they are
    trained, and as they are published. With LoRA adapters it is the frozen base, once.

    Of a state no more than one part of a tensor is there at a time.
    """
    number, numbers = number_bytes(config.precision, on_gpu=True), workload.size.untied
    return numbers * (number if config.adapter is not None or number == 4 else 4 + number)


def _whole_parts(workload: Workload, config: FSTConfig, *, on_gpu: bool) -> dict[str, int]:
    """What a process alone holds. The frozen base of a LoRA adapter is also the reference of its KL."""
    size, trained = workload.size, trained_numbers(workload, config)
    moved = {
        TRAINED: 4 * trained,
        GRADIENTS: 4 * trained,
        "AdamW's moments": moment_bytes(config) * trained,
    }
    number = number_bytes(config.precision, on_gpu=on_gpu)
    if config.adapter is not None:
        rounded = QUANTIZED[config.quantized_base] if config.quantized_base else number
        base = number * (size.parameters - size.in_linear) + round(rounded * size.in_linear)
        return {BASE: base, **moved}
    reference = 4 * (size.parameters - size.body) + number * size.body
    return moved | ({REFERENCE: reference} if with_kl(config) else {})


def trained_numbers(workload: Workload, config: FSTConfig) -> int:
    """How many numbers training may change."""
    size = workload.size
    return size.parameters if config.adapter is None else workload.adapters * size.adapted(config.adapter)


def moment_bytes(config: FSTConfig) -> int:
    """Bytes of both of AdamW's moments of one number; the scales of 8 bits are a 64th more, and left out."""
    return 2 if config.optimizer == "adamw_8bit" else 8


def state_bytes(workload: Workload, config: FSTConfig) -> int:
    """Of one resumable state: the trained weights and their moments."""
    return (4 + moment_bytes(config)) * trained_numbers(workload, config)


def update_range(workload: Workload, config: FSTConfig, tokens: int, *, on_gpu: bool) -> tuple[int, int]:
    """Peak of an update on top of what the trainer holds: (expected, at most)."""
    update = Update(
        with_kl(config),
        low=number_bytes(config.precision, on_gpu=on_gpu) == 2,
        on_gpu=on_gpu,
        recompute=config.gradient_checkpointing is True,
        frozen=config.adapter is not None,
    )
    heap = 1.0 if on_gpu else HEAP
    alike = config.group_size if config.method == "rl" else config.group_size // config.population_size

    def peak(*batches: MicroBatchShape) -> int:
        return round(heap * max(update_bytes(workload.size, batch, update) for batch in batches))

    longest = max(tokens, workload.longest_reply)
    expected = peak(expected_micro_batch(tokens, alike))
    return expected, max(expected, peak(*extreme_micro_batches(longest, config.group_size)))


def with_kl(config: FSTConfig) -> bool:
    """Whether the trainer also holds the starting weights, as the reference of a KL term."""
    return config.kl_coefficient > 0 or config.seed_kl_coefficient > 0


# ---- the engine --------------------------------------------------------------------------------


def engine_allocation(workload: Workload, config: FSTConfig, available: Available) -> Allocation:
    """What the engine holds: on the second card where there is one, else on the first."""
    if workload.kind == "vllm":
        return _vllm_allocation(workload, config, available)
    return _in_process_allocation(workload.size, workload.options, available)


def _vllm_allocation(workload: Workload, config: FSTConfig, available: Available) -> Allocation:
    size, settings = workload.size, VLLMSettings(**workload.options)
    if settings.elsewhere and not available.imagined:
        return Allocation(MEMORY, ENGINE, 0)  # in the memory of another machine, or of a server that runs already
    if available.on_gpu:
        share = settings.gpu_memory_utilization
        elsewhere = available.imagined or spares_first_card(settings)
        place = SECOND_GPU if elsewhere and SECOND_GPU in available.free else GPU
        whole, weights = int(available.gpu_total * share), served_bytes(workload, config)
        advice = f"lower engine_options={{'gpu_memory_utilization': {share:g}}}"
        made_of = (("weights", weights), ("keys, values and workings", max(0, whole - weights)))
        server = Allocation(place, ENGINE, whole, cuts=(advice,), least=weights, made_of=made_of)
        return server if settings.sleep_level is None else _taking_turns(server, workload, config)
    weights, cache = number_bytes(settings.dtype, on_gpu=False) * size.untied, settings.cpu_kv_cache_gib
    servers = settings.servers  # all on this machine
    advice = f"engine_options={{'cpu_kv_cache_gib': 1}} ({servers * (cache - 1)} GiB less)"
    cuts = (advice,) if cache > 1 else ()
    return Allocation(MEMORY, ENGINE, servers * (weights + cache * GIB), cuts=cuts, least=servers * (weights + GIB))


def _taking_turns(server: Allocation, workload: Workload, config: FSTConfig) -> Allocation:
    """A server that sleeps during updates. Its turn ends with a publish, in which the trainer scores some texts."""
    low = number_bytes(config.precision, on_gpu=True) == 2
    update = Update(with_kl=False, low=low, on_gpu=True, recompute=True, frozen=config.adapter is not None)
    scoring = update_bytes(workload.size, MicroBatchShape(PROOF_TOKENS, PROOF_TOKENS), update)
    asleep = min(server.certain, VLLM_WORKINGS)
    turn = server.certain - asleep
    peak = turn + scoring
    return replace(
        server,
        certain=asleep,
        sure=turn,
        at_most=peak,
        expected=peak,
        when="sampling",
        relief="; ".join(server.cuts),
        made_of=(("while it sleeps", asleep), ("more while it samples", turn)),
    )


def takes_turns(workload: Workload) -> bool:
    """Whether the server sleeps during updates. An update's gradients are freed, and given back, before it wakes."""
    return workload.kind == "vllm" and workload.options.get("sleep_level") is not None


def sleeping_allocations(workload: Workload, config: FSTConfig, available: Available) -> list[Allocation]:
    """Main memory that a server's weights are moved to while it sleeps at level 1; it stays pinned in between.

    PyTorch may round each pinned block up to a power of two (2.13, `CachingHostAllocator.h`).
    """
    if workload.kind != "vllm" or workload.options.get("sleep_level") != KEEPS_WEIGHTS or not available.on_gpu:
        return []
    weights = served_bytes(workload, config)
    level_2 = f"engine_options={{'sleep_level': 2}} ({format_bytes(weights)} less)"
    cuts = (level_2,) if config.adapter is None else ()
    smaller = "use a smaller model"
    relief = level_2 if cuts else smaller
    return [
        Allocation(
            MEMORY,
            "the engine's weights while it sleeps",
            weights,
            (smaller,),
            at_most=weights,
            when="a sleep",
            relief=relief,
            cuts=cuts,
            least=0 if cuts else None,
        )
    ]


def transfer_allocations(workload: Workload, config: FSTConfig, served: str, available: Available) -> list[Allocation]:
    """What weights take on cards while they are sent to a server: all of them at once for CUDA IPC, chunks for NCCL.

    Args:
        served: The place of the server.
    """
    way = workload.options.get("weight_transfer", "disk")
    if workload.kind != "vllm" or way == "disk" or config.adapter is not None or not available.on_gpu:
        return []
    number, size = number_bytes(config.precision, on_gpu=True), workload.size
    whole = number * size.untied
    # Two chunks are under way and a third is put together. The tensor that exceeds a chunk's size is its last one.
    chunks = min(whole, CHUNKS * (BUFFER_BYTES + number * size.embedding))
    taken, places = (whole, {GPU}) if way == "ipc" else (chunks, {GPU, served} - {MEMORY})
    unset = f"leave engine_options={{'weight_transfer': {way!r}}} unset"
    return [
        Allocation(
            place,
            "weights being sent",
            0,
            at_most=taken,
            expected=taken,
            sure=taken if way == "ipc" else 0,
            when="a publish",
            relief=unset,
            cuts=(f"{unset} ({format_bytes(taken)} less)",),
            least=0,
        )
        for place in sorted(places)
    ]


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


def served_bytes(workload: Workload, config: FSTConfig) -> int:
    """What a vLLM server on a GPU cannot run without: its weights in bfloat16, the head in float32, and the places of
    LoRA adapters."""
    size, places = workload.size, 0
    if config.adapter is not None:  # a new version is loaded beside the calls on the one before
        places = VLLMSettings(**workload.options).max_loras or 2 * workload.adapters
        places *= 2 * size.adapted(config.adapter)
    return 2 * size.untied + 2 * size.embedding + places


def least_served(workload: Workload, config: FSTConfig, cached: int = CACHED_TOKENS) -> int:
    """What a vLLM server on a GPU should have: its weights, so many tokens' keys and values, and `VLLM_WORKINGS`."""
    return served_bytes(workload, config) + 2 * workload.size.cached * cached + VLLM_WORKINGS


def vllm_share(workload: Workload, config: FSTConfig, available: Available, cached: int = CACHED_TOKENS) -> float:
    """``gpu_memory_utilization``: as little as works on a card shared with the trainer, most of a card of its own."""
    if SECOND_GPU in available.free:
        return 0.9
    return min(LARGEST_SHARE, math.ceil(20 * least_served(workload, config, cached) / available.gpu_total) / 20)


def number_bytes(dtype: str, *, on_gpu: bool) -> int:
    """Bytes of one number in this precision, which may be ``"auto"``."""
    return 4 if dtype in ("float32", "float") or (dtype == "auto" and not on_gpu) else 2


def known_options(settings: type, options: Mapping[str, object]) -> dict[str, object]:
    """The options that these settings define; options of the other engine are dropped."""
    names = {option.name for option in fields(settings)}
    return {name: value for name, value in options.items() if name in names}


# ---- the disk ----------------------------------------------------------------------------------


def disk_allocations(workload: Workload, config: FSTConfig, *, on_gpu: bool) -> list[Allocation]:
    """Weights and states on the disk. A short run makes fewer than it may keep."""
    writes = writes_of(workload, config, on_gpu=on_gpu)
    # The best of the committed steps is kept beside the best of all until the next state. With a state after each step
    # they differ only if the newest step is the best, whose weights are the second newest.
    best = 1 if config.checkpoint_every == 1 and config.keep_weights > 1 else 2
    best *= 1 if config.validate_every is None else 2  # the best by reward, and the best by validation
    versions = min(1 + writes.updates, 1 + best + config.keep_weights + 1)
    kept = config.keep_states + 1
    moved = min(writes.states, kept)
    base = 0 if config.adapter is None else number_bytes(config.precision, on_gpu=on_gpu) * workload.size.untied
    return [
        Allocation(
            DISK,
            "published weights",
            versions * writes.weights + base,  # all versions of a LoRA adapter share their base
            ("free space there", "name a run_dir on another disk", "lower keep_weights or keep_states"),
        ),
        Allocation(
            DISK,
            "resumable states",
            moved * writes.state + (4 * trained_numbers(workload, config) if moved < kept else 0),
        ),
    ]


def writes_of(workload: Workload, config: FSTConfig, *, on_gpu: bool) -> Writes:
    """How much a run writes."""
    cycles = 0 if config.method == "gepa" else config.cycles
    number = number_bytes(config.precision, on_gpu=on_gpu)
    whole = number * workload.size.untied
    return Writes(
        weights=whole if config.adapter is None else 4 * trained_numbers(workload, config),
        updates=cycles * config.steps_per_cycle,
        state=state_bytes(workload, config),
        states=cycles * math.ceil(config.steps_per_cycle / config.checkpoint_every),
    )
