#!/usr/bin/env bash
# Finding: With longrope a short text's numbers depend on the padding beside it.
# Packages: torch==2.13.0 transformers==5.19.0
# Guess: Which factors scale a text's positions is decided by its own length; masked padding changes nothing.
# Behaviour: One decision is made for the batch, from its longest row, padding included. A text within the original
# length that stands beside a longer one, or is padded beyond that length, gets the factors for long texts.
# Who meets it: Whoever scores or samples a Phi-3 or Phi-4-mini with several texts in a batch: log-probabilities
# differ from those of the text alone, and so from a server's.
# Here: Such a model's context is its original length on both sides (DECISIONS.md, Tokens and weights).
# Output seen (Python 3.11):
#   8 tokens padded to 16, original length 16: as alone: True
#   8 tokens padded to 40, original length 16: as alone: False
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq $(sed -n 's/^# Packages: //p' "$0")
cat > "$folder/shown.py" <<'PYTHON'
import torch
from transformers import Phi3Config, Phi3ForCausalLM

torch.manual_seed(0)
config = Phi3Config(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    original_max_position_embeddings=16,
    initializer_range=0.3,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    rope_parameters={
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "original_max_position_embeddings": 16,
        "long_factor": [4.0] * 4,
        "short_factor": [1.0] * 4,
    },
)
model = Phi3ForCausalLM(config).eval()
text = torch.arange(3, 11)[None]
with torch.no_grad():
    alone = model(text, use_cache=False).logits
    for length in (16, 40):
        padded = torch.nn.functional.pad(text, (0, length - 8))
        mask = (torch.arange(length) < 8).long()[None]
        logits = model(padded, attention_mask=mask, use_cache=False).logits[:, :8]
        print(f"8 tokens padded to {length}, original length 16: as alone:", torch.allclose(alone, logits, atol=1e-3))
PYTHON
env -i PATH="$PATH" HOME="$folder" "$folder/venv/bin/python" "$folder/shown.py" > "$folder/output" 2> "$folder/log" || {
  tail -n 30 "$folder/log"
  exit 1
}
sed -n 's/^#   //p' "$0" | diff - "$folder/output"
echo "as stated"
