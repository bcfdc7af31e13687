#!/usr/bin/env bash
# Finding: A run that trackio resumes loses the config of its first start.
# Packages: trackio==0.43.0
# Guess: trackio.init(..., resume="must") goes on in the run with the config that it has, as it does with its metrics.
# Behaviour: The first log() of a start replaces the stored config by that of this start, and a start without one has
# only trackio's own entries. The metrics of both starts are kept.
# Who meets it: Whoever gives the hyperparameters once, at the first start, as with MLflow, whose params cannot be given
# again with another value.
# Here: trackio is given the recipe at every start (dspy_fst/monitoring/tracker_services.py).
# Output seen (Python 3.11):
#   after the first start: learning_rate 0.1
#   after the second start: learning_rate None
#   steps: [0, 1, 2, 3]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq $(sed -n 's/^# Packages: //p' "$0")
cat > "$folder/shown.py" <<'PYTHON'
import os
import sys
from contextlib import redirect_stdout

os.environ["TRACKIO_DIR"] = sys.argv[1]
import trackio
from trackio.sqlite_storage import SQLiteStorage


def logged(start, **options):
    with redirect_stdout(sys.stderr):
        trackio.init(project="some-project", name="some-run", auto_log_cpu=False, auto_log_gpu=False, **options)
        for step in (start, start + 1):
            trackio.log({"reward": 1.0}, step=step)
        trackio.finish()
    (run,) = trackio.Api().runs("some-project")
    return run


run = logged(0, config={"learning_rate": 0.1})
print("after the first start: learning_rate", run.config.get("learning_rate"))
run = logged(2, resume="must")
print("after the second start: learning_rate", run.config.get("learning_rate"))
print("steps:", [row["step"] for row in SQLiteStorage.get_logs("some-project", run.name, run_id=run.id)])
PYTHON
env -i PATH="$PATH" HOME="$folder" "$folder/venv/bin/python" "$folder/shown.py" "$folder/data" > "$folder/output" 2> "$folder/log" || {
  tail -n 30 "$folder/log"
  exit 1
}
sed -n 's/^#   //p' "$0" | diff - "$folder/output"
echo "as stated"
