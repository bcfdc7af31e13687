#!/usr/bin/env bash
# Finding: accelerate's tracker for wandb begins a run and then raises, where its tracker for tensorboard works.
# Packages: torch==2.13.0 accelerate==1.15.0 wandb==0.31.0 tensorboard==2.21.0
# Guess: The trackers of accelerate.tracking work alike without an Accelerator, which none of them is given.
# Behaviour: Each tracker writes to accelerate's own log, which raises a RuntimeError until a PartialState was made.
# tensorboard's and mlflow's trackers make one, as their methods run on the main process only. wandb's and trackio's run
# on all processes and make none: start() leaves a run that has begun behind it, and so does every later call.
# Who meets it: Whoever uses one of these trackers outside of accelerate's own training loop, or tries a loop with
# tensorboard and then switches to wandb.
# Here: A PartialState is made before a tracker starts (dspy_fst/monitoring/tracking.py); the trackers are tested with
# the real libraries.
# Output seen (Python 3.11):
#   wandb alone: RuntimeError: You must initialize the accelerate state
#   wandb's runs on the disk: 1
#   tensorboard: took a number
#   wandb after it: took a number
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq $(sed -n 's/^# Packages: //p' "$0")
cat > "$folder/shown.py" <<'PYTHON'
import os
import sys
from pathlib import Path

from accelerate.tracking import TensorBoardTracker, WandBTracker

folder = Path(sys.argv[1])
os.environ.update(WANDB_MODE="offline", WANDB_DIR=str(folder), WANDB_SILENT="true")


def tried(tracker):
    try:
        tracker.start()
        tracker.log({"reward": 1.0}, step=0)
        tracker.finish()
    except RuntimeError as error:
        return f"RuntimeError: {str(error).split(' by ')[0]}"
    return "took a number"


if sys.argv[2] == "first":
    print("wandb alone:", tried(WandBTracker("some-project")))
    print("wandb's runs on the disk:", len(list(folder.glob("wandb/offline-run-*"))))
else:
    print("tensorboard:", tried(TensorBoardTracker("some-run", str(folder))))
    print("wandb after it:", tried(WandBTracker("some-project")))
PYTHON
for part in first second; do
  mkdir "$folder/$part"
  env -i PATH="$PATH" HOME="$folder" "$folder/venv/bin/python" "$folder/shown.py" "$folder/$part" $part 2> "$folder/log" || {
    tail -n 30 "$folder/log"
    exit 1
  }
done > "$folder/output"
sed -n 's/^#   //p' "$0" | diff - "$folder/output"
echo "as stated"
