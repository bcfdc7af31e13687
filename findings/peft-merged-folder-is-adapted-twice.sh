#!/usr/bin/env bash
# Finding: A folder that holds merged weights and still the adapter's files is loaded with the adapter applied
# twice.
# Packages: torch==2.13.0 transformers==5.19.0 peft==0.21.2
# Guess: from_pretrained reads config.json and the weights beside it; an adapter is applied where one asks for it.
# Behaviour: With peft installed transformers sees adapter_config.json, loads the whole weights and puts the adapter
# on top. The result is a model of the right class with other numbers, without a warning. Without peft the same
# folder loads right.
# Who meets it: Whoever saves a merged model into the folder of its adapter.
# Here: Whole weights beside an adapter's files are refused (dspy_fst/model_files).
# Output seen (Python 3.11):
#   merged weights alone: as merged: True
#   merged weights and the adapter's files: as merged: False
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq $(sed -n 's/^# Packages: //p' "$0")
cat > "$folder/shown.py" <<'PYTHON'
import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
model = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
)
adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"])).eval()
for name, weight in adapted.named_parameters():
    if "lora_B" in name:
        torch.nn.init.normal_(weight)
ids = torch.arange(12)[None]
with tempfile.TemporaryDirectory() as folder, torch.no_grad():
    both, alone = Path(folder) / "both", Path(folder) / "alone"
    adapted.save_pretrained(both)
    merged = adapted.merge_and_unload()
    wanted = merged(ids).logits
    for label, path in {"merged weights alone": alone, "merged weights and the adapter's files": both}.items():
        merged.save_pretrained(path)
        loaded = AutoModelForCausalLM.from_pretrained(path).eval()
        print(f"{label}: as merged:", torch.allclose(loaded(ids).logits, wanted, atol=1e-4))
PYTHON
env -i PATH="$PATH" HOME="$folder" "$folder/venv/bin/python" "$folder/shown.py" > "$folder/output" 2> "$folder/log" || {
  tail -n 30 "$folder/log"
  exit 1
}
sed -n 's/^#   //p' "$0" | diff - "$folder/output"
echo "as stated"
