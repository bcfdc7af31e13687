#!/usr/bin/env bash
# Finding: peft's all-linear adapts the router of a mixture-of-experts model, and exclude_modules does not keep it
# out.
# Packages: torch==2.13.0 transformers==5.19.0 peft==0.21.2
# Guess: all-linear takes the linear layers; a router held as a bare parameter is none, and exclude_modules=['gate']
# leaves it alone in any case.
# Behaviour: The router of Qwen3-MoE in transformers 5 is a bare parameter and gets its LoRA as one. The exclusion,
# which is read for modules, changes nothing and says nothing.
# Who meets it: Whoever trains adapters of a mixture of experts: sampler and trainer then also differ in which
# experts they choose.
# Here: A LoRA adapter goes on the layers that are named one by one, and never on a router
# (dspy_fst/engine/lora.py).
# Output seen (Python 3.11):
#   target_modules='all-linear': router adapted: True
#   target_modules='all-linear', exclude_modules=['gate']: router adapted: True
#   target_modules=['q_proj', 'gate_proj', 'up_proj', 'down_proj']: router adapted: False
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq $(sed -n 's/^# Packages: //p' "$0")
cat > "$folder/shown.py" <<'PYTHON'
import torch
from peft import LoraConfig, get_peft_model
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

config = Qwen3MoeConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    moe_intermediate_size=16,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    num_experts=4,
    num_experts_per_tok=2,
)
for asked in (
    {"target_modules": "all-linear"},
    {"target_modules": "all-linear", "exclude_modules": ["gate"]},
    {"target_modules": ["q_proj", "gate_proj", "up_proj", "down_proj"]},
):
    adapted = get_peft_model(Qwen3MoeForCausalLM(config), LoraConfig(r=2, **asked))
    trained = [name for name, weight in adapted.named_parameters() if weight.requires_grad]
    label = ", ".join(f"{setting}={value!r}" for setting, value in asked.items())
    print(f"{label}: router adapted:", any(".mlp.gate.lora_" in name for name in trained))
PYTHON
env -i PATH="$PATH" HOME="$folder" "$folder/venv/bin/python" "$folder/shown.py" > "$folder/output" 2> "$folder/log" || {
  tail -n 30 "$folder/log"
  exit 1
}
sed -n 's/^#   //p' "$0" | diff - "$folder/output"
echo "as stated"
