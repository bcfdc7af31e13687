#!/usr/bin/env bash
# Finding: dspy.Refine gives no hint to a program whose LM was set by set_lm.
# Packages: dspy==3.4.1
# Guess: Refine asks for its advice where the program asks, so a program that works by set_lm alone is refined.
# Behaviour: The advice is asked of the LM of dspy.configure alone. Without one that question raises, Refine prints
# a line that the try failed, although the try succeeded, and repeats the program as it is. It still answers, as
# BestOfN would.
# Who meets it: Whoever sets LMs by set_lm, as weight optimizers of DSPy require, and holds Refine against BestOfN.
# Here: A run's start warns of a Refine that has nobody to ask (dspy_fst/preflight).
# Output seen (Python 3.11):
#   set_lm alone: answered no, prompts with a hint: 0 of 3
#   set_lm and dspy.context(lm=...): answered no, prompts with a hint: 2 of 3
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


class Asks(dspy.Module):
    def __init__(self):
        super().__init__()
        self.answer = dspy.Predict("question -> answer")

    def forward(self, question):
        prediction = self.answer(question=question)
        prompts.append(self.answer.lm.history[-1]["messages"][-1]["content"])
        return prediction


def not_enough(inputs, prediction):
    return 0.0


def refine(label, **settings):
    program = Asks()
    program.set_lm(lm)
    refined = dspy.Refine(program, N=3, reward_fn=not_enough, threshold=1.0)
    with contextlib.redirect_stdout(sys.stderr), dspy.context(**settings):
        answer = refined(question="?").answer
    hints = sum("hint_" in prompt for prompt in prompts)
    print(f"{label}: answered {answer}, prompts with a hint: {hints} of {len(prompts)}")


for label, configured in {"set_lm alone": False, "set_lm and dspy.context(lm=...)": True}.items():
    prompts = []
    lm = DummyLM([{"answer": "no", "discussion": "It is wrong.", "advice": '{"answer": "Say yes."}'}] * 20)
    refine(label, **({"lm": lm} if configured else {}))
PYTHON
env -i PATH="$PATH" HOME="$folder" "$folder/venv/bin/python" "$folder/shown.py" > "$folder/output" 2> "$folder/log" || {
  tail -n 30 "$folder/log"
  exit 1
}
sed -n 's/^#   //p' "$0" | diff - "$folder/output"
echo "as stated"
