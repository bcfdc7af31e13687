#!/usr/bin/env bash
# Finding: Two texts packed into one row see each other in transformers unless use_cache=False is said.
# Packages: torch==2.13.0 transformers==5.19.0
# Guess: position_ids that begin anew at 0 divide the row into texts, or they do not; use_cache is about generation.
# Behaviour: The division is made from position_ids only where no cache is made. use_cache is on by default, the
# model makes one although nobody asked for its output, and the second text reads the first. In train() the same
# holds. No error or warning comes.
# Who meets it: Whoever packs prompts and replies into rows to score or train them with a plain forward call.
# Here: Texts are not packed: rows of a micro-batch are padded, and a shared prompt is read through a cache of its
# own (dspy_fst/slow).
# Output seen (Python 3.11):
#   use_cache not said: packed as alone: False
#   use_cache=False: packed as alone: True
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq $(sed -n 's/^# Packages: //p' "$0")
cat > "$folder/shown.py" <<'PYTHON'
import torch
from transformers import LlamaConfig, LlamaForCausalLM

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
).eval()
first, second = torch.randint(0, 64, (1, 6)), torch.randint(0, 64, (1, 6))
row = torch.cat([first, second], dim=1)
positions = torch.arange(6).repeat(2)[None]
with torch.no_grad():
    alone = model(second).logits
    for label, said in {"use_cache not said": {}, "use_cache=False": {"use_cache": False}}.items():
        packed = model(row, position_ids=positions, **said).logits[:, 6:]
        print(f"{label}: packed as alone:", torch.allclose(packed, alone, atol=1e-4))
PYTHON
env -i PATH="$PATH" HOME="$folder" "$folder/venv/bin/python" "$folder/shown.py" > "$folder/output" 2> "$folder/log" || {
  tail -n 30 "$folder/log"
  exit 1
}
sed -n 's/^#   //p' "$0" | diff - "$folder/output"
echo "as stated"
