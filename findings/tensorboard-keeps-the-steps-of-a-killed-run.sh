#!/usr/bin/env bash
# Finding: Points of steps that a resumed run makes again stand twice in tensorboard.
# Packages: torch==2.13.0 tensorboard==2.21.0
# Guess: The newer value of a step replaces the older one when a second writer opens the folder.
# Behaviour: Both are kept, in the order of writing, so the curve goes back and forth. Only a writer that is told
# purge_step removes what stands at and after that step.
# Who meets it: Whoever goes on from a checkpoint with a new SummaryWriter on the same log folder.
# Here: A tracker is fed from the run's log less what it was given (dspy_fst/monitoring).
# Output seen (Python 3.11):
#   second writer: steps [0, 1, 2, 3, 2, 3, 4]
#   second writer with purge_step=2: steps [0, 1, 2, 3, 4]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq $(sed -n 's/^# Packages: //p' "$0")
cat > "$folder/shown.py" <<'PYTHON'
import tempfile

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter


def write(folder, first, last, **options):
    with SummaryWriter(folder, filename_suffix=f".{first}", **options) as writer:
        for step in range(first, last + 1):
            writer.add_scalar("reward", step / 10, step)


for label, options in {"second writer": {}, "second writer with purge_step=2": {"purge_step": 2}}.items():
    with tempfile.TemporaryDirectory() as folder:
        write(folder, 0, 3)  # killed after step 3, its last checkpoint is of step 1
        write(folder, 2, 4, **options)
        read = EventAccumulator(folder)
        read.Reload()
        print(f"{label}: steps {[event.step for event in read.Scalars('reward')]}")
PYTHON
env -i PATH="$PATH" HOME="$folder" "$folder/venv/bin/python" "$folder/shown.py" > "$folder/output" 2> "$folder/log" || {
  tail -n 30 "$folder/log"
  exit 1
}
sed -n 's/^#   //p' "$0" | diff - "$folder/output"
echo "as stated"
