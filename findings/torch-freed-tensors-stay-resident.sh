#!/usr/bin/env bash
# Finding: On Linux the memory of freed CPU tensors of 16 MiB stays with the process, and larger tensors cannot use it.
# Packages: torch==2.13.0
# Guess: glibc maps blocks above 128 KiB one by one, so a large tensor's memory goes back when it is freed.
# Behaviour: The first block that is freed raises that threshold to its own size, up to 32 MiB; later ones come from
# the heap. There small tensors that live on lie between them, and the holes fit nothing larger. Computing in smaller
# pieces then lowers no peak. A threshold that is set by MALLOC_MMAP_THRESHOLD_ is not raised.
# Who meets it: Whoever lowers the peak memory of a training step on a CPU, or measures it: the peak depends on the order
# of allocations, not on what is in use.
# Here: The memory plan multiplies what an update on a CPU takes by a measured factor (dspy_fst/memory/arithmetic.py).
# Output seen (Python 3.11, glibc 2.36):
#   as it is: 512 MiB freed, still resident: yes; a tensor of 512 MiB took as much more: yes
#   MALLOC_MMAP_THRESHOLD_=1048576: 512 MiB freed, still resident: no; a tensor of 512 MiB took as much more: no
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq $(sed -n 's/^# Packages: //p' "$0")
cat > "$folder/shown.py" <<'PYTHON'
import os
import subprocess
import sys

MIB = 2**20


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / MIB


def show(label):
    import torch

    torch.set_num_threads(1)
    torch.ones(16 * MIB // 4)  # freed at once
    large, small, before = [], [], resident()
    for _ in range(32):
        large.append(torch.ones(16 * MIB // 4))
        small.append(torch.ones(64 * 1024 // 4))
    full = resident()
    large.clear()
    held = resident() - before
    whole = torch.ones(512 * MIB // 4)
    more = resident() - full
    answers = ["yes" if amount > 256 else "no" for amount in (held, more)]
    print(f"{label}: 512 MiB freed, still resident: {answers[0]}; a tensor of 512 MiB took as much more: {answers[1]}")
    del whole, small


if len(sys.argv) > 1:
    show(sys.argv[1])
else:
    for variables in ({}, {"MALLOC_MMAP_THRESHOLD_": str(MIB)}):
        label = ", ".join(f"{name}={value}" for name, value in variables.items()) or "as it is"
        subprocess.run([sys.executable, __file__, label], env={**os.environ, **variables}, check=True)
PYTHON
env -i PATH="$PATH" HOME="$folder" "$folder/venv/bin/python" "$folder/shown.py" > "$folder/output" 2> "$folder/log" || {
  tail -n 30 "$folder/log"
  exit 1
}
sed -n 's/^#   //p' "$0" | diff - "$folder/output"
echo "as stated"
