#!/usr/bin/env bash
# Finding: Offline, wandb with resume='must' begins a new run and counts its steps from 0.
# Packages: wandb==0.31.0
# Guess: resume='must' raises where the run is not known, and goes on at the step after the last one where it is.
# Behaviour: Offline nothing is looked up, not even in the folder where the run's own files lie. Each start is
# another offline run under the same id, with resumed False and step 0, so a loop that logs without step= writes its
# points over the beginning of the curve once both are synchronized.
# Who meets it: Whoever continues a run on a node of a cluster without a network.
# Here: Every point is logged with its step, and what a tracker was given is kept in the run directory
# (dspy_fst/monitoring).
# Output seen (Python 3.11):
#   first start: resumed False, step 0
#   after five points: step 5
#   second start: resumed False, step 0
#   offline runs on the disk: 2
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq $(sed -n 's/^# Packages: //p' "$0")
cat > "$folder/shown.py" <<'PYTHON'
import os
import tempfile
from pathlib import Path

with tempfile.TemporaryDirectory() as folder:
    os.environ.update(WANDB_MODE="offline", WANDB_DIR=folder, WANDB_SILENT="true")
    import wandb

    for start in ("first", "second"):
        run = wandb.init(project="some-project", id="some-run", resume="must")
        print(f"{start} start: resumed {run.resumed}, step {run.step}")
        if start == "first":
            for number in range(5):
                run.log({"reward": number})
            print(f"after five points: step {run.step}")
        run.finish()
    print("offline runs on the disk:", len(list(Path(folder).glob("wandb/offline-run-*"))))
PYTHON
env -i PATH="$PATH" HOME="$folder" "$folder/venv/bin/python" "$folder/shown.py" > "$folder/output" 2> "$folder/log" || {
  tail -n 30 "$folder/log"
  exit 1
}
sed -n 's/^#   //p' "$0" | diff - "$folder/output"
echo "as stated"
