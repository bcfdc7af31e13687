#!/usr/bin/env bash
# Finding: Gradient checkpointing that is enabled does nothing while a model is in eval().
# Packages: torch==2.13.0 transformers==5.19.0
# Guess: It saves memory wherever gradients flow; eval() is about dropout.
# Behaviour: The layers look at self.training. In eval() every layer runs once and keeps all its activations, and
# gradient_checkpointing_enable() and is_gradient_checkpointing say that it is on. No warning comes.
# Who meets it: Whoever trains a policy in eval(), so that its log-probabilities are those of the sampler, and
# counts on checkpointing for memory.
# Here: The trainer keeps the model in eval() and computes layers again by itself (dspy_fst/slow/layers.py).
# Output seen (Python 3.11):
#   train: says on: True, forwards of a layer in one step: 2
#   eval: says on: True, forwards of a layer in one step: 1
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq $(sed -n 's/^# Packages: //p' "$0")
cat > "$folder/shown.py" <<'PYTHON'
import torch
from transformers import LlamaConfig, LlamaForCausalLM

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
model.gradient_checkpointing_enable()
forwards = []
model.model.layers[0].self_attn.register_forward_pre_hook(lambda layer, inputs: forwards.append(1))
for name in ("train", "eval"):
    getattr(model, name)()
    forwards.clear()
    model(torch.arange(12)[None], use_cache=False).logits.sum().backward()
    print(f"{name}: says on: {model.is_gradient_checkpointing}, forwards of a layer in one step: {len(forwards)}")
PYTHON
env -i PATH="$PATH" HOME="$folder" "$folder/venv/bin/python" "$folder/shown.py" > "$folder/output" 2> "$folder/log" || {
  tail -n 30 "$folder/log"
  exit 1
}
sed -n 's/^#   //p' "$0" | diff - "$folder/output"
echo "as stated"
