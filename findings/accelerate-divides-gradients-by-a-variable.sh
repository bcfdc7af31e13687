#!/usr/bin/env bash
# Finding: An environment variable divides the gradients of accelerate, though the program accumulates nothing.
# Packages: torch==2.13.0 accelerate==1.15.0
# Guess: A number of accumulation steps acts inside `with accelerator.accumulate(...)`; a plain backward() is a
# plain backward().
# Behaviour: Accelerator() reads ACCELERATE_GRADIENT_ACCUMULATION_STEPS, which `accelerate launch` sets from its
# config file, also where the program says nothing of accumulation. Every accelerator.backward() then divides by it,
# the optimizer steps each time, and the loss that is logged is the whole one.
# Who meets it: Whoever runs a loop of his own under accelerate with a config file that another project wrote:
# clipping and the learning rate are of other strength.
# Here: The trainer is plain torch and reads nothing from the environment (DECISIONS.md, Slow).
# Output seen (Python 3.11):
#   not set: loss 3.0, gradient [[1.0, 2.0]]
#   set to 8: loss 3.0, gradient [[0.125, 0.25]]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq $(sed -n 's/^# Packages: //p' "$0")
cat > "$folder/shown.py" <<'PYTHON'
import os
import subprocess
import sys

STEP = """
import torch
from accelerate import Accelerator

accelerator = Accelerator(cpu=True)
layer = torch.nn.Linear(2, 1, bias=False)
torch.nn.init.ones_(layer.weight)
layer, optimizer = accelerator.prepare(layer, torch.optim.SGD(layer.parameters(), lr=1.0))
loss = layer(torch.tensor([[1.0, 2.0]])).sum()
accelerator.backward(loss)
optimizer.step()
print(f"loss {loss.item()}, gradient {layer.weight.grad.tolist()}")
"""
for label, variables in {"not set": {}, "set to 8": {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "8"}}.items():
    printed = subprocess.run(
        [sys.executable, "-c", STEP], env={**os.environ, **variables}, stdout=subprocess.PIPE, text=True, check=True
    )
    print(f"{label}: {printed.stdout.strip()}")
PYTHON
env -i PATH="$PATH" HOME="$folder" "$folder/venv/bin/python" "$folder/shown.py" > "$folder/output" 2> "$folder/log" || {
  tail -n 30 "$folder/log"
  exit 1
}
sed -n 's/^#   //p' "$0" | diff - "$folder/output"
echo "as stated"
