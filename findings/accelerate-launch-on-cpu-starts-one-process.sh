#!/usr/bin/env bash
# Finding: accelerate launch --cpu --num_processes 2 runs one process.
# Packages: torch==2.13.0 accelerate==1.15.0
# Guess: Two processes that speak by gloo, as torchrun starts them.
# Behaviour: One process runs, told that it is alone, and the exit status is 0. torchrun with
# ACCELERATE_USE_CPU=true runs two.
# Who meets it: Whoever tries a distributed set-up on a machine without a GPU: the test passes and has tested one
# process.
# Here: docs/several-gpus.md says to use torchrun on a CPU; the tests of several ranks do (tests/ranks).
# Output seen (Python 3.11):
#   accelerate launch --cpu --num_processes 2: processes 1
#   torchrun --nproc_per_node 2: processes 2
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq $(sed -n 's/^# Packages: //p' "$0")
cat > "$folder/shown.py" <<'PYTHON'
import os
import subprocess
import sys
from pathlib import Path

program = Path(__file__).with_name("world.py")
program.write_text("from accelerate import Accelerator\n\nprint('processes', Accelerator().num_processes)\n")
folder = Path(sys.executable).parent
one_thread = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
for command in (
    ["accelerate", "launch", "--cpu", "--num_processes", "2"],
    ["torchrun", "--nproc_per_node", "2"],
):
    ran = subprocess.run(
        [folder / command[0], *command[1:], program], env=one_thread, stdout=subprocess.PIPE, text=True, check=True
    )
    print(f"{' '.join(command)}: {ran.stdout.splitlines()[0]}")
PYTHON
env -i PATH="$PATH" HOME="$folder" "$folder/venv/bin/python" "$folder/shown.py" > "$folder/output" 2> "$folder/log" || {
  tail -n 30 "$folder/log"
  exit 1
}
sed -n 's/^#   //p' "$0" | diff - "$folder/output"
echo "as stated"
