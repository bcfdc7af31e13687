#!/usr/bin/env bash
# Finding: The failures that dspy.BestOfN forgives are counted over the object's life, not for each call.
# Packages: dspy==3.4.1
# Guess: N tries and fail_count hold for a call: a call whose first try fails and whose second try succeeds always
# gives the second.
# Behaviour: Each failure of any call lowers fail_count for good. After the third such question the same object
# raises at the first failed try and asks no second time. The same lines stand in dspy.Refine.
# Who meets it: Whoever wraps a small model, whose replies often do not parse, in BestOfN and evaluates or trains on
# more than a handful of examples.
# Here: Every rollout and every request to serve gets a copy of the program, so the count is fresh
# (dspy_fst/rollout, dspy_fst/serve). A program that is called for long in Python keeps DSPy's behaviour: give
# fail_count a large number.
# Output seen (Python 3.11):
#   question 1: yes
#   question 2: yes
#   question 3: yes
#   question 4: ValueError, tries made: 1
#   question 5: ValueError, tries made: 1
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq $(sed -n 's/^# Packages: //p' "$0")
cat > "$folder/shown.py" <<'PYTHON'
import contextlib
import sys

import dspy
from dspy.utils import DummyLM

tries = 0


class FailsFirst(dspy.Module):
    """Its first try at each question raises, its second answers."""

    def __init__(self):
        super().__init__()
        self.answer = dspy.Predict("question -> answer")

    def forward(self, question):
        global tries
        tries += 1
        if tries == 1:
            raise ValueError("the first try fails")
        return self.answer(question=question)


program = FailsFirst()
program.set_lm(DummyLM([{"answer": "yes"}] * 10))
best = dspy.BestOfN(program, N=2, reward_fn=lambda inputs, prediction: 1.0, threshold=1.0)
for number in range(1, 6):
    tries = 0
    try:
        with contextlib.redirect_stdout(sys.stderr):
            answer = best(question="?").answer
        print(f"question {number}: {answer}")
    except ValueError:
        print(f"question {number}: ValueError, tries made: {tries}")
PYTHON
env -i PATH="$PATH" HOME="$folder" "$folder/venv/bin/python" "$folder/shown.py" > "$folder/output" 2> "$folder/log" || {
  tail -n 30 "$folder/log"
  exit 1
}
sed -n 's/^#   //p' "$0" | diff - "$folder/output"
echo "as stated"
