#!/usr/bin/env bash
# Finding: After peft's disable_adapter block every number of the active adapter is trained, also those that were frozen.
# Packages: torch==2.13.0 transformers==5.19.0 peft==0.21.2
# Guess: disable_adapter is a context manager: after the block the model is as before, requires_grad included.
# Behaviour: The block freezes all adapters, and its end makes each tensor of the active one trainable. An adapter that
# was loaded not to be trained is trained after a single forward of the base, and so is a half that was frozen by hand.
# Who meets it: Whoever takes the base as the KL's reference while a part of an adapter is frozen, or while a loaded
# adapter is to stay as it is: a later backward pass gives it gradients, and a new optimizer takes it up.
# Here: LoRA adapters are switched by the two fields that peft's forward reads, which leaves gradients alone
# (dspy_fst/engine/lora.py).
# Output seen (Python 3.11):
#   all are trained: trained tensors before, in and after the block: 4, 0, 4
#   A is frozen: trained tensors before, in and after the block: 2, 0, 4
#   loaded, not to be trained: trained tensors before, in and after the block: 0, 0, 4
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq $(sed -n 's/^# Packages: //p' "$0")
cat > "$folder/shown.py" <<'PYTHON'
import tempfile

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

config = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=1,
    num_attention_heads=2,
    head_dim=16,
)


def trained(model):
    return sum(weight.requires_grad for weight in model.parameters())


def show(label, model):
    before = trained(model)
    with model.disable_adapter(), torch.no_grad():
        model(torch.tensor([[1, 2, 3]]))
        inside = trained(model)
    print(f"{label}: trained tensors before, in and after the block: {before}, {inside}, {trained(model)}")


adapted = get_peft_model(LlamaForCausalLM(config), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
show("all are trained", adapted)
for name, weight in adapted.named_parameters():
    if "lora_A" in name:
        weight.requires_grad = False
show("A is frozen", adapted)
with tempfile.TemporaryDirectory() as saved:
    adapted.save_pretrained(saved)
    show("loaded, not to be trained", PeftModel.from_pretrained(LlamaForCausalLM(config), saved))
PYTHON
env -i PATH="$PATH" HOME="$folder" "$folder/venv/bin/python" "$folder/shown.py" > "$folder/output" 2> "$folder/log" || {
  tail -n 30 "$folder/log"
  exit 1
}
sed -n 's/^#   //p' "$0" | diff - "$folder/output"
echo "as stated"
