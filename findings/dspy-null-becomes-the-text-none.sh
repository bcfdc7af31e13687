#!/usr/bin/env bash
# Finding: DSPy's JSONAdapter reads a null in a text field as the four letters None.
# Packages: dspy==3.4.1 json-repair==0.64.5
# Guess: A null is no text, so the reply does not parse; or the field holds Python's None.
# Behaviour: Every JSON value is turned into text by Python's str(). A null becomes 'None', true becomes 'True', an
# object becomes Python's notation of a dictionary. A metric that asks whether there is an answer is told yes.
# Who meets it: Whoever trains or evaluates a program under JSONAdapter on a model that writes null where it knows
# no answer.
# Here: docs/parsing.md says which answers parse against expectation. An optional text field keeps the null, which
# the second line shows.
# Output seen (Python 3.11):
#   answer: str -> 'None' 'True' "{'city': 'Rome'}"
#   answer: str | None -> None
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq $(sed -n 's/^# Packages: //p' "$0")
cat > "$folder/shown.py" <<'PYTHON'
import dspy

adapter = dspy.JSONAdapter()
text = dspy.Signature("question -> answer: str")
optional = dspy.Signature("question -> answer: str | None")

replies = ('{"answer": null}', '{"answer": true}', '{"answer": {"city": "Rome"}}')
print("answer: str ->", *(repr(adapter.parse(text, reply)["answer"]) for reply in replies))
print("answer: str | None ->", repr(adapter.parse(optional, replies[0])["answer"]))
PYTHON
env -i PATH="$PATH" HOME="$folder" "$folder/venv/bin/python" "$folder/shown.py" > "$folder/output" 2> "$folder/log" || {
  tail -n 30 "$folder/log"
  exit 1
}
sed -n 's/^#   //p' "$0" | diff - "$folder/output"
echo "as stated"
