"""What a run takes of memory and disk, and what is there: told before anything is loaded.

In bytes; P: parameters, tied ones once; V: vocabulary; h, f, L: width, inner width and number of the layers; T: tokens
of a micro-batch (``micro_batch_tokens``, or one longest reply).

| who       | what                | bytes                       | why                                                 |
| --------- | ------------------- | --------------------------- | --------------------------------------------------- |
| trainer   | weights             | 4 P                         | float32, also under a bfloat16 body                 |
| trainer   | gradients           | 4 P                         | held over the micro-batches of an update            |
| trainer   | AdamW               | 8 P                         | two moments                                         |
| trainer   | reference           | 4 P                         | the frozen start, for a KL coefficient > 0          |
| trainer   | a state being saved | 12 P of main memory         | copied from the GPU, when it is on one              |
| engine    | weights             | 4 P on a CPU, 2 P on a GPU  | float32 or bfloat16; the head untied                |
| engine    | in process, bfloat16 | 2 V h more                 | the head is in float32                              |
| engine    | vLLM, keys, values  | cpu_kv_cache_gib            | on a GPU all is within gpu_memory_utilization       |
| disk      | published weights   | 4 P or 2 P each             | the first, the best, keep_weights, one being written |
| disk      | resumable states    | 12 P each, the first 4 P    | keep_states, one being written                      |
| an update | logits, at most     | 4 T V (5 with KL, else 3)   | ours, measured: log-softmax, the reference's, KL's  |
| an update | a teacher's logits  | 4 T V more                  | read in parts of T tokens and put in our order      |
| an update | layers, at most     | 4 T L (16 h + 6 f)          | ours, measured: what the backward pass reads        |
| an update | casts, at most      | 2 P                         | bfloat16 copies of the weights, under such a body   |
| sampling  | in process, at most | max_batch_tokens times L    | keys and values; never at the time of an update     |

Written over a run, what it removes again included: 4 P or 2 P at every update that moves the weights, 12 P at every
state (``checkpoint_every``). After a step that moved nothing a state shares its files with the one before.

With ``method="gepa"`` nothing is updated, and of the trainer's rows only the weights count.

What is taken for certain and does not fit is a fault. What comes on top *at most* is only warned of: how many of a
micro-batch's tokens are scored depends on prompts and replies that nobody has seen yet.
"""

import math
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from dspy_fst.architectures import largest
from dspy_fst.config import FSTConfig
from dspy_fst.engine.memory import free_gpu_bytes
from dspy_fst.policy import PolicyLM
from dspy_fst.run.written import GIB, MUCH_WRITTEN, Writes, shown
from dspy_fst.validation import stored_shapes

MEMORY, GPU, DISK = "memory", "GPU memory", "disk"


@dataclass(frozen=True)
class Take:
    """What one part of a run takes in one place, in bytes."""

    place: str
    """``MEMORY``, ``GPU`` or ``DISK``."""
    who: str
    """E.g. ``"the trainer"``."""
    certain: int
    advice: tuple[str, ...] = ()
    """What would make it less."""
    at_most: int = 0
    """On top for a time; never while another's is."""
    when: str = ""
    """That time, e.g. ``"an update"``."""
    relief: str = ""
    """What would make that less."""


@dataclass(frozen=True)
class Need:
    """All that is taken in one place, and what is free there, in bytes."""

    place: str
    takes: tuple[Take, ...]
    free: int

    @property
    def certain(self) -> int:
        return sum(take.certain for take in self.takes)

    @property
    def at_most(self) -> int:
        """With whatever comes on top at the worst time."""
        return self.certain + self._worst.at_most

    @property
    def _worst(self) -> Take:
        return max(self.takes, key=lambda take: take.at_most)

    def fault(self, model: str) -> str | None:
        """What does not fit for certain, as a sentence."""
        if self.certain <= self.free:
            return None
        shares = " and ".join(f"{shown(take.certain)} for {take.who}" for take in self.takes if take.certain)
        advice = ", ".join(dict.fromkeys(advice for take in self.takes for advice in take.advice))
        return f"{self.place}: training {model} takes {shares}, and {shown(self.free)} are free; {advice}"

    def warning(self, model: str) -> str | None:
        """What may not fit, as a sentence."""
        if not self.certain <= self.free < self.at_most:
            return None
        return (
            f"{self.place}: with {model} {self._worst.when} may take up to {shown(self.at_most)} in all, and "
            f"{shown(self.free)} are free; if that proves too little, {self._worst.relief}"
        )


@dataclass(frozen=True)
class Fit:
    """Whether a run fits on this machine."""

    model: str
    parameters: int
    needs: tuple[Need, ...]
    writes: Writes

    def faults(self) -> list[str]:
        """A sentence for every place that cannot hold what is taken for certain."""
        return [fault for need in self.needs if (fault := need.fault(self._model))]

    def warnings(self) -> list[str]:
        """A sentence for every place that may become too small for a time, and one when very much is written."""
        warnings = [warning for need in self.needs if (warning := need.warning(self._model))]
        if self.writes.total > MUCH_WRITTEN and self.writes.states:
            warnings.append(f"{DISK}: {self.writes.words}; raise checkpoint_every to write fewer states")
        return warnings

    @property
    def _model(self) -> str:
        millions = self.parameters / 1e6
        count = f"{millions / 1000:.1f}B" if millions >= 1000 else f"{millions:.3g}M"
        return f"model={self.model!r} ({count} parameters)"


@dataclass(frozen=True)
class Room:
    """What is free now, in bytes."""

    free: Mapping[str, int]
    """Place -> bytes; ``GPU`` only where there is one."""
    gpu_total: int = 0


def measure_fit(policy: PolicyLM, config: FSTConfig, run_dir: Path, room: Room | None = None) -> Fit | None:
    """What a run with this model and recipe takes here. The policy's and the recipe's settings are sound already.

    Args:
        room: What is free; None looks.

    Returns:
        None when the model is not a local folder of safetensors: nothing is known before it is downloaded.
    """
    size = model_size(policy.checkpoint.path)
    if size is None:
        return None
    room = room or room_now(run_dir)
    longest = max(config.micro_batch_tokens, policy.reply_limit or 0)
    engine = _engine_take(size, policy, room)
    on_gpu = GPU in room.free
    takes = [*_trainer_takes(size, config, longest, on_gpu=on_gpu), engine, *_disk_takes(size, config, on_gpu=on_gpu)]
    free = dict(room.free)
    if policy.handle.engine.weights is not None:  # the student's engine runs, and is stopped before ours starts
        free[engine.place] += engine.certain
    needs = [Need(place, tuple(take for take in takes if take.place == place), free[place]) for place in room.free]
    return Fit(policy.model, size.parameters, tuple(needs), _writes(size, config, on_gpu=on_gpu))


# ---- what is taken -----------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelSize:
    """What a model's files say of its size."""

    parameters: int
    untied: int
    """Parameters of the published weights, which hold a tied head twice."""
    vocabulary: int
    width: int
    inner_width: int
    layers: int
    cached: int
    """Numbers that a token's keys and values are, over all layers."""


def model_size(folder: Path) -> ModelSize | None:
    """The size, from the files' headers; None when there is no folder, or nothing that can be read."""
    from transformers import AutoConfig

    try:
        shapes = stored_shapes(folder)
        if not shapes:
            return None
        config: Any = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError):
        return None
    tied = getattr(config.get_text_config(), "tie_word_embeddings", getattr(config, "tie_word_embeddings", False))
    if tied:
        shapes.pop("lm_head.weight", None)
    parameters = sum(map(math.prod, shapes.values()))
    heads = largest(config, "num_attention_heads") or 1
    width, layers = largest(config, "hidden_size") or 0, largest(config, "num_hidden_layers") or 0
    vocabulary = largest(config, "vocab_size") or 0
    cached_width = (largest(config, "head_dim") or width // heads) * (largest(config, "num_key_value_heads") or heads)
    return ModelSize(
        parameters=parameters,
        untied=parameters + (vocabulary * width if tied else 0),
        vocabulary=vocabulary,
        width=width,
        inner_width=largest(config, "intermediate_size") or 4 * width,
        layers=layers,
        cached=2 * layers * cached_width,
    )


def _trainer_takes(size: ModelSize, config: FSTConfig, tokens: int, *, on_gpu: bool) -> list[Take]:
    """See the table at the top."""
    parameters, place, smaller = size.parameters, GPU if on_gpu else MEMORY, "use a smaller model"
    if config.method == "gepa":
        return [Take(place, "the trainer", 4 * parameters, (smaller,))]
    with_kl = config.kl_coefficient > 0 or config.seed_kl_coefficient > 0
    copies = (5 if with_kl else 3) + (config.seed_kl_teacher == "population")
    logits = 4 * tokens * size.vocabulary * copies
    layers = 4 * tokens * size.layers * (16 * size.width + 6 * size.inner_width)
    trainer = Take(
        place,
        "the trainer",
        (20 if with_kl else 16) * parameters,
        (smaller, f"kl_coefficient=0 ({shown(4 * parameters)} less)") if with_kl else (smaller,),
        at_most=logits + layers + (2 * parameters if _bytes_of(config.precision, on_gpu=on_gpu) == 2 else 0),
        when="an update",
        relief=f"lower micro_batch_tokens={config.micro_batch_tokens}",
    )
    return [trainer, Take(MEMORY, "a state being saved", 12 * parameters, (smaller,))] if on_gpu else [trainer]


def _engine_take(size: ModelSize, policy: PolicyLM, room: Room) -> Take:
    if policy.handle.resolved_kind == "vllm":
        return _vllm_take(size, policy.handle.options, room)
    return _in_process_take(size, policy.handle.options, room)


def _vllm_take(size: ModelSize, options: Mapping[str, Any], room: Room) -> Take:
    from dspy_fst.engine.vllm_server import VLLMSettings

    settings = VLLMSettings(**options)
    if settings.attach_url is not None:
        return Take(MEMORY, "the engine", 0)  # it is there already, and has what it takes
    if GPU in room.free:
        share = settings.gpu_memory_utilization
        advice = f"lower engine_options={{'gpu_memory_utilization': {share:g}}}"
        return Take(GPU, "the engine", int(room.gpu_total * share), (advice,))
    weights, cache = _bytes_of(settings.dtype, on_gpu=False) * size.untied, settings.cpu_kv_cache_gib
    advice = f"engine_options={{'cpu_kv_cache_gib': 1}} ({cache - 1} GiB less)"
    return Take(MEMORY, "the engine", weights + cache * GIB, (advice,) if cache > 1 else ())


def _in_process_take(size: ModelSize, options: Mapping[str, Any], room: Room) -> Take:
    from dspy_fst.engine.in_process import InProcessSettings

    settings = InProcessSettings(**options)
    on_gpu = GPU in room.free and (settings.device or "cuda").startswith("cuda")
    number = _bytes_of(settings.dtype or "auto", on_gpu=on_gpu)
    return Take(
        GPU if on_gpu else MEMORY,
        "the engine",
        number * size.untied + (4 - number) * size.vocabulary * size.width,
        at_most=number * size.cached * settings.max_batch_tokens,
        when="sampling",
        relief=f"lower engine_options={{'max_batch_tokens': {settings.max_batch_tokens}}}",
    )


def _bytes_of(dtype: str, *, on_gpu: bool) -> int:
    return 4 if dtype in ("float32", "float") or (dtype == "auto" and not on_gpu) else 2


def _disk_takes(size: ModelSize, config: FSTConfig, *, on_gpu: bool) -> list[Take]:
    """See the table at the top. A short run never has as many as it may keep."""
    writes = _writes(size, config, on_gpu=on_gpu)
    # The best of the committed steps is kept beside the best of all until the next state.
    best = 1 if config.checkpoint_every == 1 else 2
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


def _writes(size: ModelSize, config: FSTConfig, *, on_gpu: bool) -> Writes:
    cycles = 0 if config.method == "gepa" else config.cycles
    return Writes(
        weights=_bytes_of(config.precision, on_gpu=on_gpu) * size.untied,
        updates=cycles * config.steps_per_cycle,
        state=12 * size.parameters,
        states=cycles * math.ceil(config.steps_per_cycle / config.checkpoint_every),
    )


# ---- what is there -----------------------------------------------------------------------------


def room_now(run_dir: Path) -> Room:
    """What is free on this machine; a run that goes on in ``run_dir`` has part of what it needs there."""
    disk = shutil.disk_usage(nearest_folder(run_dir))
    kept = [path.lstat() for name in ("weights", "states") for path in (run_dir / name).rglob("*")]
    held = sum({stat.st_ino: stat.st_size for stat in kept}.values())  # states share files under several names
    # Made-up file systems tell 0 of everything: that is unknown, not full.
    free = {MEMORY: free_memory(), DISK: disk.free + held if disk.total else sys.maxsize}
    gpu = free_gpu_bytes()
    return Room({GPU: gpu[0], **free}, gpu[1]) if gpu else Room(free)


def free_memory(root: Path = Path("/")) -> int:
    """Main memory, swap included, that this process may still take: what is free, or what its control groups leave.

    Args:
        root: Where ``/proc`` and ``/sys`` are.
    """
    free: int = psutil.virtual_memory().available + psutil.swap_memory().free
    return min([free, *_left_by_control_groups(root)])


def _left_by_control_groups(root: Path) -> Iterator[int]:
    """What each memory limit above this process leaves; psutil knows of none."""
    own = root / "proc/self/cgroup"
    for line in own.read_text().splitlines() if own.is_file() else ():
        _, controllers, name = line.split(":", 2)
        if controllers == "":  # version 2
            mount, limit, used, pages = root / "sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):  # version 1
            mount, limit = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes"
            used, pages = "memory.usage_in_bytes", "total_inactive_file"
        else:
            continue
        lowest = mount / name.strip("/")
        for group in (folder for folder in (lowest, *lowest.parents) if folder.is_relative_to(mount)):
            try:
                most, taken = (group / limit).read_text().strip(), int((group / used).read_text())
                facts = dict(fact.split() for fact in (group / "memory.stat").read_text().splitlines())
            except OSError:
                continue  # the topmost group has no limit, and a container does not see those above its own
            if most != "max":
                yield int(most) - taken + int(facts.get(pages, 0))  # pages of files are given back on demand


def nearest_folder(path: Path) -> Path:
    """The path itself or the nearest of its parents that exists."""
    return next(folder for folder in (path, *path.parents) if folder.exists())


def writable_fault(run_dir: Path) -> str | None:
    """Why nothing can be written into a run directory, found by writing; None when it can. Nothing is left behind."""
    where = f"run_dir={str(run_dir)!r}"
    try:
        folder = nearest_folder(run_dir)
        if not folder.is_dir():
            return f"{where}: {'it' if folder == run_dir else folder} is a file; name a directory"
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(4096))
            file.flush()
            os.fsync(file.fileno())
    except (OSError, ValueError) as error:
        return f"{where}: nothing can be written there ({error}); name another directory"
    return None
