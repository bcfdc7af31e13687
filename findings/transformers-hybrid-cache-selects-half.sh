#!/usr/bin/env bash
# Finding: Choosing rows of a cache leaves the recurrent states of a hybrid model where they were.
# Packages: torch==2.13.0 transformers==5.19.0
# Guess: Batch_select_indices chooses the rows of all that the cache holds, as reorder_cache does, or refuses.
# Behaviour: In layers that hold attention beside a state-space part (Falcon-H1 and its like) it chooses the keys
# and values alone. Each row then goes on with its own attention and another row's recurrent state, and no error
# comes. reorder_cache moves both. With a number of rows other than before, the next forward raises.
# Who meets it: Whoever expands or filters the cache of a shared prompt, as sampling of several replies does.
# Here: A shared prompt is read through a cache only for models whose layers remember every token (DECISIONS.md,
# Slow).
# Output seen (Python 3.11):
#   reorder_cache: right: True
#   batch_select_indices: right: False
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq $(sed -n 's/^# Packages: //p' "$0")
cat > "$folder/shown.py" <<'PYTHON'
import torch
from transformers import FalconH1Config, FalconH1ForCausalLM

torch.manual_seed(0)
config = FalconH1Config(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    mamba_d_ssm=32,
    mamba_n_heads=4,
    mamba_d_head=8,
    mamba_d_state=8,
    mamba_n_groups=1,
    initializer_range=0.3,
)
model = FalconH1ForCausalLM(config).eval()
prompts, token, swapped = torch.randint(3, 64, (2, 8)), torch.randint(3, 64, (2, 1)), torch.tensor([1, 0])
with torch.no_grad():
    wanted = model(torch.cat([prompts[swapped], token], dim=1), use_cache=False).logits[:, -1]
    for method in ("reorder_cache", "batch_select_indices"):
        cache = model(prompts, use_cache=True).past_key_values
        getattr(cache, method)(swapped)
        logits = model(token, past_key_values=cache).logits[:, -1]
        print(f"{method}: right:", torch.allclose(logits, wanted, atol=1e-3))
PYTHON
env -i PATH="$PATH" HOME="$folder" "$folder/venv/bin/python" "$folder/shown.py" > "$folder/output" 2> "$folder/log" || {
  tail -n 30 "$folder/log"
  exit 1
}
sed -n 's/^#   //p' "$0" | diff - "$folder/output"
echo "as stated"
