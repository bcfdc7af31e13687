#!/usr/bin/env bash
# Finding: deepcopy() of a DSPy program shares a predictor with the original when a lock stands beside it.
# Packages: dspy==3.4.1
# Guess: A copy has predictors of its own, and what cannot be copied raises.
# Behaviour: An attribute that copy.deepcopy refuses is copied one level deep. A dictionary or list that holds a
# predictor and a lock is a new dictionary with the very same predictor, so an instruction set on the copy is set on
# the original. Only a line in the log tells.
# Who meets it: Whoever keeps a predictor and a lock, a client or a file in one container: every optimizer of DSPy
# works on such copies.
# Here: A program is copied by a copier of this package, and a program whose copies would still share a predictor is
# refused before any work (dspy_fst/rollout).
# Output seen (Python 3.11):
#   predictor that stands alone, shared: False
#   predictor beside a lock, shared: True
#   the original's instruction after the copy's was changed: changed on the copy
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq $(sed -n 's/^# Packages: //p' "$0")
cat > "$folder/shown.py" <<'PYTHON'
import threading

import dspy


class Guarded(dspy.Module):
    def __init__(self):
        super().__init__()
        self.alone = dspy.Predict("question -> answer")
        self.guarded = {"step": dspy.Predict("question -> answer"), "lock": threading.Lock()}


original = Guarded()
copy = original.deepcopy()
print("predictor that stands alone, shared:", copy.alone is original.alone)
print("predictor beside a lock, shared:", copy.guarded["step"] is original.guarded["step"])
copy.guarded["step"].signature = copy.guarded["step"].signature.with_instructions("changed on the copy")
print("the original's instruction after the copy's was changed:", original.guarded["step"].signature.instructions)
PYTHON
env -i PATH="$PATH" HOME="$folder" "$folder/venv/bin/python" "$folder/shown.py" > "$folder/output" 2> "$folder/log" || {
  tail -n 30 "$folder/log"
  exit 1
}
sed -n 's/^#   //p' "$0" | diff - "$folder/output"
echo "as stated"
