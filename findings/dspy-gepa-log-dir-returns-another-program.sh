#!/usr/bin/env bash
# Finding: dspy.GEPA with the log_dir of an earlier run gives a program the instruction of that run's program.
# Packages: dspy==3.4.1
# Guess: log_dir continues the run of the same program, and another program's directory is refused or begun anew.
# Behaviour: Nothing is compared. The candidates in the directory are taken for those of the program at hand. The
# budget counts as spent, so the second program comes back at once with the first one's instruction, and no error or
# warning says so.
# Who meets it: Whoever runs two programs, or two versions of one, from a script with a fixed log_dir.
# Here: A run directory is continued by the same program, problems, model and recipe only, and the refusal names
# what differs (dspy_fst/run). The state of a search is never read from gepa's file.
# Output seen (Python 3.11):
#   translator: Translate the text to French.
#   sorter: Translate the text to French.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq $(sed -n 's/^# Packages: //p' "$0")
cat > "$folder/shown.py" <<'PYTHON'
import contextlib
import sys
import tempfile

import dspy
from dspy.utils import DummyLM


def improved(instruction, log_dir):
    program = dspy.Predict(dspy.Signature("text -> answer", instruction))
    program.set_lm(DummyLM([{"answer": "no"}] * 100))
    optimizer = dspy.GEPA(
        metric=lambda gold, pred, trace=None, pred_name=None, pred_trace=None: 0.0,
        reflection_lm=lambda prompt: ["```\nA proposal that is never better.\n```"],
        max_metric_calls=8,
        num_threads=1,
        log_dir=log_dir,
    )
    examples = [dspy.Example(text=f"text {number}", answer="yes").with_inputs("text") for number in range(4)]
    with contextlib.redirect_stdout(sys.stderr):  # progress bars
        return optimizer.compile(program, trainset=examples, valset=examples).signature.instructions


with tempfile.TemporaryDirectory() as log_dir:
    print("translator:", improved("Translate the text to French.", log_dir))
    print("sorter:", improved("Sort the words of the text.", log_dir))
PYTHON
env -i PATH="$PATH" HOME="$folder" "$folder/venv/bin/python" "$folder/shown.py" > "$folder/output" 2> "$folder/log" || {
  tail -n 30 "$folder/log"
  exit 1
}
sed -n 's/^#   //p' "$0" | diff - "$folder/output"
echo "as stated"
