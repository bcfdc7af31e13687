"""Command line and environment of a vLLM server. vLLM's flags are in this file only.

Written for vLLM 0.32 (CPU) and 0.33; what differs on a GPU (dtype, CUDA graphs) is untried.
"""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from dspy_fst.engine.machine import has_gpu, visible_devices, without_launcher
from dspy_fst.engine.vllm.lora_files import LoRANeeds
from dspy_fst.engine.vllm.server_settings import VLLMSettings

SERVED_NAME = "policy"
_LAUNCHER = "vllm.entrypoints.launchers.api_server.entry"
_SERVED_FOLDER = Path(__file__).with_name("served")
_OVERRIDES = "--hf-overrides"
HOW_TO_ATTACH = (
    "Launch it with VLLM_SERVER_DEV_MODE=1, VLLM_API_KEY and a PYTHONPATH with dspy_fst/engine/vllm/served in its "
    "environment, and with --logprobs-mode processed_logprobs --generation-config vllm "
    "--middleware dspy_fst_rows.Rows --middleware dspy_fst_key_guard.KeyGuard "
    "--worker-extension-cls dspy_fst_weight_check.WeightCheck "
    """--hf-overrides '{"head_dtype": "float32"}', on a host that nobody else reaches: """
    "these endpoints can run any method, and vLLM's own check of the key leaves them open. For LoRA adapters add "
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1, --enable-lora, --max-lora-rank and --max-loras, and launch it on their base."
)


def vllm_command(settings: VLLMSettings, model: Path, port: int, loras: LoRANeeds | None = None) -> list[str]:
    """The command line of a server for a model's folder; it contains no secret.

    Args:
        settings: Of the server.
        model: The folder.
        port: On which it listens.
        loras: What LoRA adapters on the model need; None: there are none.
    """
    on_gpu = has_gpu()
    eager = not on_gpu if settings.enforce_eager is None else settings.enforce_eager
    dtype = ("bfloat16" if on_gpu else "float32") if settings.dtype == "auto" else settings.dtype
    length = [] if settings.max_model_len is None else ["--max-model-len", str(settings.max_model_len)]
    return [
        *(sys.executable, "-m", _LAUNCHER),  # the `vllm` command fails on the CPU build
        *("--model", str(model), "--served-model-name", SERVED_NAME),
        *("--host", settings.host, "--port", str(port)),
        *("--dtype", dtype, "--gpu-memory-utilization", str(settings.gpu_memory_utilization), *length),
        *("--logprobs-mode", "processed_logprobs"),  # those of the distribution sampled from, temperature included
        *("--generation-config", "vllm"),  # ignores the sampling defaults of the model
        *("--middleware", "dspy_fst_rows.Rows", "--middleware", "dspy_fst_key_guard.KeyGuard"),  # the last is outermost
        *("--worker-extension-cls", "dspy_fst_weight_check.WeightCheck"),
        "--disable-uvicorn-access-log",
        "--no-log-error-stack",  # developer mode would log a stack trace for every refused request
        *(["--enforce-eager"] if eager else []),
        *([] if settings.sleep_level is None else ["--enable-sleep-mode"]),
        *_transfer_flags(settings),
        # On a CPU, a seeded request whose prompt is prefilled in chunks crashes vLLM 0.32.
        *([] if on_gpu else ["--no-enable-chunked-prefill"]),
        *([] if loras is None else _lora_flags(settings, loras)),
        *(settings.extra_args if dtype in ("float32", "float") else _head_in_float32(settings.extra_args)),
    ]


def lora_places(settings: VLLMSettings, loras: LoRANeeds) -> tuple[int, int]:
    """How many LoRA adapters one batch may use, and how many the server keeps in memory."""
    at_once = settings.max_loras or 2 * loras.adapters  # a new version beside the calls on the one before
    return at_once, max(2 * at_once, 4 * loras.adapters)


def _transfer_flags(settings: VLLMSettings) -> list[str]:
    way = settings.weight_transfer
    return [] if way == "disk" else ["--weight-transfer-config", json.dumps({"backend": way})]


def _lora_flags(settings: VLLMSettings, loras: LoRANeeds) -> list[str]:
    at_once, in_memory = lora_places(settings, loras)
    return [
        *("--enable-lora", "--max-lora-rank", str(loras.rank)),
        *("--max-loras", str(at_once), "--max-cpu-loras", str(in_memory)),
        # By default every linear layer is wrapped, and the LM head too. On a CPU, vLLM 0.32 dies of scores through a
        # wrapped head unless the request is alone in its batch.
        *("--lora-target-modules", *sorted(loras.modules)),
    ]


def vllm_environment(settings: VLLMSettings, key: str, *, loras: bool = False) -> dict[str, str]:
    """This process's environment, with the variables that the server needs; ``loras``: whether it serves adapters."""
    python_path = os.pathsep.join(filter(None, [str(_SERVED_FOLDER), os.environ.get("PYTHONPATH")]))
    return {
        **without_launcher(os.environ),  # vLLM would take this process's rank for its own
        "PYTHONPATH": python_path,
        **({} if settings.cards is None else {"CUDA_VISIBLE_DEVICES": visible_devices(settings.cards)}),
        "VLLM_API_KEY": key,
        "VLLM_SERVER_DEV_MODE": "1",
        **({"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"} if loras else {}),
        # CUDA's handles of memory are sent as pickles, which this lets the server read.
        **({"VLLM_ALLOW_INSECURE_SERIALIZATION": "1"} if settings.weight_transfer == "ipc" else {}),
        "VLLM_CPU_KVCACHE_SPACE": str(settings.cpu_kv_cache_gib),
        "VLLM_NO_USAGE_STATS": "1",
        # The default of 5 s closes pooled connections between two batches, sometimes during a request.
        "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "3600",
    }


def _head_in_float32(extra_args: Sequence[str]) -> list[str]:
    """The arguments, with the LM head in float32 as in the trainer. The user's own overrides take precedence.

    By default vLLM 0.32 keeps the head in the body's precision. Its documentation calls a float32 head required for
    consistency between training and inference.
    """
    kept: list[str] = []
    overrides: Mapping[str, object] = {}
    arguments = iter(extra_args)
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if name.replace("_", "-") != _OVERRIDES:
            kept.append(argument)
            continue
        try:
            overrides = json.loads(value if equals else next(arguments, "{}"))
        except ValueError:
            return list(extra_args)  # vLLM reports the fault itself
    return [*kept, _OVERRIDES, json.dumps({"head_dtype": "float32", **overrides})]
