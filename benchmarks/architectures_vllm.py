"""The vLLM column of docs/architectures.md: what vLLM scores when it starts on a model, and after a reload.

    python -m benchmarks.architectures --vllm            # the families of `TRIED`, some seconds each
    python -m benchmarks.architectures --vllm Granite    # some

vLLM's own `LLM` class is asked, in one process for each family, and not a server: it is the same engine, and the reload
is the same call (`reload_weights`). Its attention on a CPU has no heads of 16 numbers, so heads are twice as wide here.
"""

import dataclasses
import json
import os
import select
import signal
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.families import FAMILIES, Family, knows
from dspy_fst.model_files.architectures import restart_reason
from dspy_fst.preflight.vllm_start import vllm_faults

TRIED = (
    *("Llama", "Llama 3.1 (llama3 rope)", "Llama, YaRN", "Qwen2", "Qwen3", "Qwen3-MoE", "Mixtral", "OLMoE", "Gemma 2"),
    *("Gemma 3 (text)", "Phi-3", "Phi-3, longrope", "Granite", "GPT-NeoX, Pythia", "Mistral, no window", "SmolLM3"),
    *(
        "OLMo 2",
        "GPT-OSS",
        "Cohere",
        "GPT-2",
        "Bloom",
        "OPT",
        "GLM 4",
        "StableLM",
        "StarCoder2",
        "EXAONE 4",
        "Seed-OSS",
    ),
    *("ERNIE 4.5", "HunYuan (dense)", "Llama, dynamic rope", "LFM2", "Falcon-H1", "Gemma 3 (multimodal)"),
)
SEQUENCES = ((2, 30, 31, 32, 33, 34, 35, 36, 37, 38, 39, 40), (9, 8, 7, 50, 51))
WIDER = {"num_attention_heads": 2, "n_head": 2, "head_dim": 32, "num_key_value_heads": 2}
LATENT = {"kv_lora_rank": 512, "qk_rope_head_dim": 64}
"""The one size of a latent key and value that vLLM's attention has on a CPU: DeepSeek's own."""
EQUAL = 3e-4
ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
"""A gibibyte for the cache, and the engine in the process that asks it."""
TIMEOUT_S = 300.0
"""Of one family's process."""


def serve_all(names: Sequence[str], known: dict[str, str]) -> dict[str, str]:
    """What the column says for these families, on top of what is known."""
    tried = [family for family in FAMILIES if family.name in (names or TRIED)]
    with tempfile.TemporaryDirectory() as scratch:
        prepared = {}
        for number, family in enumerate(tried):
            if refusals := list(vllm_faults(family.config(), {"dtype": "float32"}, on_gpu=False)):
                known[family.name] = f"refused: {refusals[0]}"
                continue
            try:
                prepared[family.name] = _prepare(_wider(family), Path(scratch) / str(number))
            except Exception as error:  # a family whose heads cannot be wider
                known[family.name] = f"not tried ({type(error).__name__})"
        os.environ |= ENVIRONMENT
        import vllm  # noqa: F401 - once, and not in each of the processes

        for name, (folders, own) in prepared.items():
            known[name] = _said(_in_a_process(folders), own)
            print(f"{name}: {known[name]}", flush=True)
    return known


def as_run(name: str, said: str) -> str:
    """What a run meets of what was measured: where each version gets a new start, nothing is reloaded."""
    config = next(family for family in FAMILIES if family.name == name).config()
    if "; reloaded: " in said and restart_reason(config, on_gpu=False):
        return f"{said.partition(';')[0]}; started anew"
    return said


def _wider(family: Family) -> Family:
    config = family.config().get_text_config()
    told: dict[str, Any] = {
        name: value for name, value in WIDER.items() if knows(config, name) and name not in family.told
    }
    if "rope_parameters" in family.told and "short_factor" in family.told["rope_parameters"]:
        rope = family.told["rope_parameters"]
        told |= {"rope_parameters": {**rope, "short_factor": [1.0] * 16, "long_factor": [4.0] * 16}}
    if knows(config, "kv_lora_rank"):
        told |= LATENT
    wider = dataclasses.replace(family, told={**family.told, **told})
    try:
        wider.config()
    except Exception:  # heads that are no heads of attention, as those of Mamba 2
        return family
    return wider


def _prepare(family: Family, folder: Path) -> tuple[list[str], list[list[list[float]]]]:
    """Two versions as the trainer publishes them, and its own scores of each."""
    from dspy_fst.slow.trainer import Trainer
    from dspy_fst.slow.training_settings import TrainingSettings

    folders, scores = [], []
    for seed in (0, 1):
        base = family.save(folder / f"start-{seed}", seed)
        trainer = Trainer(base, TrainingSettings(learning_rate=1e-3), device="cpu")
        folders.append(str(trainer.publish(folder / f"v{seed}", f"v{seed}").path))
        scores.append(trainer.score(SEQUENCES))
    return folders, scores


def _in_a_process(folders: list[str]) -> dict[str, Any]:
    """What vLLM scored: started on the first folder, then with the second loaded into it."""
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        answer: dict[str, Any] = {}
        try:
            answer = _scores(folders)
        except BaseException as error:
            answer = {"error": " ".join(f"{type(error).__name__}: {error}".split())[:240]}
        os.write(writing, json.dumps(answer).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        in_time = bool(select.select([pipe], [], [], TIMEOUT_S)[0])
        if not in_time:
            os.kill(child, signal.SIGKILL)
        reply = pipe.read()
    os.waitpid(child, 0)
    silent = "the process ended without an answer" if in_time else f"no answer within {TIMEOUT_S:g} s"
    answered: dict[str, Any] = json.loads(reply) if reply else {"error": silent}
    return answered


def _scores(folders: list[str]) -> dict[str, Any]:
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=folders[0],
        dtype="float32",
        enforce_eager=True,
        gpu_memory_utilization=0.1,
        logprobs_mode="processed_logprobs",
        generation_config="vllm",
        enable_chunked_prefill=False,
        enable_prefix_caching=False,
        max_num_seqs=8,
    )

    def score() -> list[list[float]]:
        asked = [{"prompt_token_ids": list(ids)} for ids in SEQUENCES]
        outputs = llm.generate(asked, SamplingParams(max_tokens=1, prompt_logprobs=0), use_tqdm=False)
        return [
            [place[token].logprob for place, token in zip(output.prompt_logprobs[1:], ids[1:], strict=True)]
            for output, ids in zip(outputs, SEQUENCES, strict=True)
        ]

    found: dict[str, Any] = {"first": score()}
    try:
        llm.collective_rpc("reload_weights", kwargs={"weights_path": folders[1]})
        found["reloaded"] = score()
    except Exception as error:
        found["reload_error"] = f"{type(error).__name__}: {error}".partition("\n")[0][:120]
    return found


def _said(answer: Mapping[str, Any], own: list[list[list[float]]]) -> str:
    if "error" in answer:
        return f"does not start ({answer['error'].replace('|', '/')})"
    first = _equal(answer["first"], own[0])
    if "reload_error" in answer:
        return f"{first}; the reload fails"
    return f"{first}; reloaded: {_equal(answer['reloaded'], own[1])}"


def _equal(ours: Sequence[Sequence[float]], own: Sequence[Sequence[float]]) -> str:
    gaps = [abs(a - b) for x, y in zip(ours, own, strict=True) for a, b in zip(x, y, strict=True)]
    return "equal" if all(gap <= EQUAL for gap in gaps) else f"off by {max(gaps):.1g}"
