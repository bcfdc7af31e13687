#!/usr/bin/env bash
# Finding: A metric that returns a dspy.Prediction filters nothing in DSPy's optimizers: one with the score 0 is true.
# Packages: dspy==3.4.1
# Guess: A Prediction stands for its score, as in Evaluate and GEPA, so a reply with the score 0 is no demo and is not
# trained on.
# Behaviour: Prediction has comparisons and arithmetic of its score, but no truth value of its own: it is true whatever the
# score. BootstrapFewShot takes a wrong reply for a demo, and BootstrapFinetune, which asks the same, trains on it. A plain
# score of -1 is true as well. metric_threshold compares the score.
# Who meets it: Whoever has a metric with feedback, as GEPA wants it, and gives it to another optimizer or to BetterTogether.
# Here: FSTOptimizer reads the score. docs/dspy-optimizers.md and docs/better-together.md say the trap, and their examples
# give True or False, or metric_threshold.
# Output seen (Python 3.11):
#   equal to 0: True, bool: True
#   metric 0.0: 0 demos
#   metric Prediction(score=0.0): 1 demos
#   metric -1.0: 1 demos
#   metric Prediction(score=0.0), metric_threshold=0.5: 0 demos
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

none = dspy.Prediction(score=0.0)
print(f"equal to 0: {float(none) == 0}, bool: {bool(none)}")
program = dspy.Predict("question -> answer")
examples = [dspy.Example(question="2 + 2?", answer="4").with_inputs("question")]


def demos(score, **arguments):
    optimizer = dspy.BootstrapFewShot(metric=lambda *_: score, max_labeled_demos=0, max_rounds=1, **arguments)
    with contextlib.redirect_stdout(sys.stderr), dspy.context(lm=DummyLM([{"answer": "5"}] * 9)):
        return len(optimizer.compile(program.deepcopy(), trainset=examples).demos)


print("metric 0.0:", demos(0.0), "demos")
print("metric Prediction(score=0.0):", demos(none), "demos")
print("metric -1.0:", demos(-1.0), "demos")
print("metric Prediction(score=0.0), metric_threshold=0.5:", demos(none, metric_threshold=0.5), "demos")
PYTHON
env -i PATH="$PATH" HOME="$folder" "$folder/venv/bin/python" "$folder/shown.py" > "$folder/output" 2> "$folder/log" || {
  tail -n 30 "$folder/log"
  exit 1
}
sed -n 's/^#   //p' "$0" | diff - "$folder/output"
echo "as stated"
