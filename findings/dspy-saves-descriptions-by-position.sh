#!/usr/bin/env bash
# Finding: DSPy loads the descriptions of a signature's fields by their order, not by their names.
# Packages: dspy==3.4.1
# Guess: A saved program names its fields, so a signature whose fields were put in another order gets each
# description where it belongs, or an error.
# Behaviour: The file holds a list without names. After a reorder each field is described by what was said of
# another; after a new field in front every description has moved on by one. No error or warning comes.
# Who meets it: Whoever edits a signature between a run and the loading of its program.
# Here: A saved program names the field of each description, and fields that do not fit are refused
# (dspy_fst/saving).
# Output seen (Python 3.11):
#   as saved: question='what is asked', context='what is known'
#   reordered: context='what is asked', question='what is known'
#   one more in front: hint='what is asked', question='what is known', context='${answer}'
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq $(sed -n 's/^# Packages: //p' "$0")
cat > "$folder/shown.py" <<'PYTHON'
import tempfile
from pathlib import Path

import dspy


def described(predictor):
    fields = predictor.signature.input_fields.items()
    return ", ".join(f"{name}={field.json_schema_extra['desc']!r}" for name, field in fields)


class Saved(dspy.Signature):
    question: str = dspy.InputField(desc="what is asked")
    context: str = dspy.InputField(desc="what is known")
    answer: str = dspy.OutputField()


with tempfile.TemporaryDirectory() as folder:
    file = str(Path(folder) / "program.json")
    dspy.Predict(Saved).save(file)
    for label, signature in {
        "as saved": "question, context -> answer",
        "reordered": "context, question -> answer",
        "one more in front": "hint, question, context -> answer",
    }.items():
        program = dspy.Predict(signature)
        program.load(file)
        print(f"{label}: {described(program)}")
PYTHON
env -i PATH="$PATH" HOME="$folder" "$folder/venv/bin/python" "$folder/shown.py" > "$folder/output" 2> "$folder/log" || {
  tail -n 30 "$folder/log"
  exit 1
}
sed -n 's/^#   //p' "$0" | diff - "$folder/output"
echo "as stated"
