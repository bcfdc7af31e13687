#!/usr/bin/env bash
# Finding: DSPy's GRPO samples under one adapter and trains on the prompts of another.
# Packages: dspy==3.4.1
# Guess: The training rows hold the prompts and replies that were sampled.
# Behaviour: Rollouts run under ChatAdapter, DSPy's default. The rows are made anew from the parsed fields with
# XMLAdapter, which is GRPO's own default where neither adapter= nor dspy.configure(adapter=...) is given. So prompt
# and reply of a row are texts that nobody sent and nobody sampled, with the reward of the ones that were.
# Who meets it: Whoever trains a local LM by dspy.teleprompt.grpo without naming an adapter, or brings its settings
# to this package.
# Here: Training reads the token ids that the engine sampled, and a trained program keeps the adapter of its
# training (DECISIONS.md, Tokens and weights).
# Output seen (Python 3.11):
#   sampled under: [[ ## question ## ]]
#   trained on: <question>
#   reply sampled: [[ ## answer ## ]]
#   reply trained on: <answer>
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq $(sed -n 's/^# Packages: //p' "$0")
cat > "$folder/shown.py" <<'PYTHON'
import contextlib
import sys

import dspy
from dspy.teleprompt.grpo import GRPO
from dspy.utils import DummyLM


class Job:
    """Takes the training rows down."""

    def get_status(self):
        return {"pending_batch_ids": [0]}

    def step(self, train_data, train_data_format):
        rows.extend(row for batch in train_data for row in batch["group"])

    def terminate(self):
        pass


class Trainable(DummyLM):
    def reinforce(self, train_kwargs):
        return Job()


def first_line_of_form(text):
    return next(line for line in text.splitlines() if line.startswith(("[[ ## ", "<")))


rows = []
lm = Trainable([{"answer": "yes"}] * 20)
program = dspy.Predict("question -> answer")
program.set_lm(lm)
optimizer = GRPO(metric=lambda gold, pred, trace=None: 1.0, exclude_demos=True, num_train_steps=1, num_rollouts_per_grpo_step=2)
with contextlib.redirect_stdout(sys.stderr):
    optimizer.compile(program, trainset=[dspy.Example(question="?").with_inputs("question")])

sampled = lm.history[-1]
print("sampled under:", first_line_of_form(sampled["messages"][-1]["content"]))
print("trained on:", first_line_of_form(rows[0]["messages"][-1]["content"]))
print("reply sampled:", first_line_of_form(sampled["outputs"][0]))
print("reply trained on:", first_line_of_form(rows[0]["completion"]["content"]))
PYTHON
env -i PATH="$PATH" HOME="$folder" "$folder/venv/bin/python" "$folder/shown.py" > "$folder/output" 2> "$folder/log" || {
  tail -n 30 "$folder/log"
  exit 1
}
sed -n 's/^#   //p' "$0" | diff - "$folder/output"
echo "as stated"
