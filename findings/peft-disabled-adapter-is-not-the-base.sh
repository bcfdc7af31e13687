#!/usr/bin/env bash
# Finding: With PiSSA or OLoRA a model whose adapter is disabled is not the base model.
# Packages: torch==2.13.0 transformers==5.19.0 peft==0.21.2
# Guess: disable_adapter() gives the base's numbers: what was not merged can be taken away.
# Behaviour: These two start from a part of the base's own weights, which they subtract from the base in memory. The
# model with its fresh adapter is the base, and the model without it is the base less that part. LoRA with its
# default start gives the base both ways.
# Who meets it: Whoever takes the policy with its adapter off as the reference of a KL term, as trainers with LoRA
# do to save a second model.
# Here: An adapter starts with B at zero, by no other initialisation, so that the model without it is the start
# (dspy_fst/engine/lora.py).
# Output seen (Python 3.11):
#   lora: base with a fresh adapter: True, with it disabled: True
#   pissa: base with a fresh adapter: True, with it disabled: False
#   olora: base with a fresh adapter: True, with it disabled: False
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq $(sed -n 's/^# Packages: //p' "$0")
cat > "$folder/shown.py" <<'PYTHON'
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

ids = torch.arange(12)[None]
for name, start in {"lora": True, "pissa": "pissa", "olora": "olora"}.items():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        base = model(ids).logits
        adapted = get_peft_model(
            model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=start)
        ).eval()
        fresh = torch.allclose(adapted(ids).logits, base, atol=1e-4)
        with adapted.disable_adapter():
            disabled = torch.allclose(adapted(ids).logits, base, atol=1e-4)
    print(f"{name}: base with a fresh adapter: {fresh}, with it disabled: {disabled}")
PYTHON
env -i PATH="$PATH" HOME="$folder" "$folder/venv/bin/python" "$folder/shown.py" > "$folder/output" 2> "$folder/log" || {
  tail -n 30 "$folder/log"
  exit 1
}
sed -n 's/^#   //p' "$0" | diff - "$folder/output"
echo "as stated"
