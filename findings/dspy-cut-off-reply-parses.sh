#!/usr/bin/env bash
# Finding: A reply that max_tokens cut off in the middle parses in DSPy as a whole answer.
# Packages: dspy==3.4.1 json-repair==0.64.5
# Guess: JSON without its end does not parse, so a cut-off reply raises AdapterParseError and gets the failure's
# score.
# Behaviour: json_repair closes what is open, in JSONAdapter and in every typed field of ChatAdapter. The last word
# of a text is half a word, the last number of a list has lost its digits, and nothing tells.
# Who meets it: Whoever sets a small max_tokens, as training does: a metric scores half an answer as one that the
# policy chose.
# Here: Cut-off replies are counted from the engine's finish reason, never from the parse, warned of, and marked in
# the samples (dspy_fst/monitoring).
# Output seen (Python 3.11):
#   JSONAdapter, text: {'answer': 'It is not'}
#   JSONAdapter, list: {'sums': [12, 345, 6]}
#   ChatAdapter, list: {'sums': [12, 345, 6]}
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq $(sed -n 's/^# Packages: //p' "$0")
cat > "$folder/shown.py" <<'PYTHON'
import dspy

text = dspy.Signature("question -> answer: str")
numbers = dspy.Signature("question -> sums: list[int]")

# What would have followed: `hing.`, and `789]`.
print("JSONAdapter, text:", dspy.JSONAdapter().parse(text, '{"answer": "It is not'))
print("JSONAdapter, list:", dspy.JSONAdapter().parse(numbers, '{"sums": [12, 345, 6'))
print("ChatAdapter, list:", dspy.ChatAdapter().parse(numbers, "[[ ## sums ## ]]\n[12, 345, 6"))
PYTHON
env -i PATH="$PATH" HOME="$folder" "$folder/venv/bin/python" "$folder/shown.py" > "$folder/output" 2> "$folder/log" || {
  tail -n 30 "$folder/log"
  exit 1
}
sed -n 's/^#   //p' "$0" | diff - "$folder/output"
echo "as stated"
