#!/usr/bin/env bash
# Finding: GRPOConfig(use_cpu=True) computes in bfloat16.
# Packages: torch==2.13.0 transformers==5.19.0 trl==1.16.0
# Guess: On a CPU a float32 model is trained in float32 unless bf16=True is said, as with transformers' own
# TrainingArguments.
# Behaviour: trl turns bf16 on wherever fp16 is off, use_cpu included. Log-probabilities of a float32 model are then
# off by some thousandths, as large as what an update at 1e-6 changes, and importance weights measure rounding.
# Who meets it: Whoever compares a run of trl on a CPU with this package, or with a sampler in float32.
# Here: The trainer's precision is a setting of its own, and one that is not the engine's is warned of; the
# benchmark of trl says bf16=False (benchmarks/throughput.py).
# Output seen (Python 3.11):
#   TrainingArguments(use_cpu=True).bf16: False
#   GRPOConfig(use_cpu=True).bf16: True
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq $(sed -n 's/^# Packages: //p' "$0")
cat > "$folder/shown.py" <<'PYTHON'
import tempfile

from transformers import TrainingArguments
from trl import GRPOConfig

with tempfile.TemporaryDirectory() as folder:
    for kind in (TrainingArguments, GRPOConfig):
        print(f"{kind.__name__}(use_cpu=True).bf16:", kind(output_dir=folder, use_cpu=True).bf16)
PYTHON
env -i PATH="$PATH" HOME="$folder" "$folder/venv/bin/python" "$folder/shown.py" > "$folder/output" 2> "$folder/log" || {
  tail -n 30 "$folder/log"
  exit 1
}
sed -n 's/^#   //p' "$0" | diff - "$folder/output"
echo "as stated"
