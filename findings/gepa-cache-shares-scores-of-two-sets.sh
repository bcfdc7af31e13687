#!/usr/bin/env bash
# Finding: gepa's evaluation cache gives the examples of the validation set the scores of the training set.
# Packages: gepa==0.1.4
# Guess: An entry belongs to a candidate and an example, so two sets that hold different examples share nothing.
# Behaviour: An entry belongs to a candidate and a place in a list. Place 0 of the validation set is answered by
# place 0 of the training set. A text that solves the training set alone is told as validated, and wins.
# Who meets it: Whoever gives gepa.optimize, or dspy.GEPA through gepa_kwargs, cache_evaluation=True and a
# validation set of its own.
# Here: Searches run with cache_evaluation=False (dspy_fst/fast). Rollouts of a cycle are banked by candidate and
# problem.
# Output seen (Python 3.11):
#   cache_evaluation=False: validation scores of seed and proposal [0.0, 0.0]
#   cache_evaluation=True: validation scores of seed and proposal [0.0, 1.0]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq $(sed -n 's/^# Packages: //p' "$0")
cat > "$folder/shown.py" <<'PYTHON'
import gepa
from gepa.core.adapter import EvaluationBatch


class Memoriser:
    """The proposed text solves every training example and no validation example."""

    propose_new_texts = None

    def evaluate(self, batch, candidate, capture_traces=False):
        scores = [float(candidate["text"] == "by heart" and example["set"] == "train") for example in batch]
        return EvaluationBatch(outputs=scores, scores=scores, trajectories=[{}] * len(batch) if capture_traces else None)

    def make_reflective_dataset(self, candidate, evaluation, components):
        return {component: [{"Feedback": "wrong"}] for component in components}


class Quiet:
    def log(self, message):
        pass


for cached in (False, True):
    result = gepa.optimize(
        {"text": "seed"},
        trainset=[{"set": "train", "number": number} for number in range(3)],
        valset=[{"set": "val", "number": number} for number in range(3)],
        adapter=Memoriser(),
        custom_candidate_proposer=lambda candidate, examples, components: {c: "by heart" for c in components},
        reflection_minibatch_size=3,
        max_metric_calls=12,
        cache_evaluation=cached,
        logger=Quiet(),
    )
    print(f"cache_evaluation={cached}: validation scores of seed and proposal {result.val_aggregate_scores}")
PYTHON
env -i PATH="$PATH" HOME="$folder" "$folder/venv/bin/python" "$folder/shown.py" > "$folder/output" 2> "$folder/log" || {
  tail -n 30 "$folder/log"
  exit 1
}
sed -n 's/^#   //p' "$0" | diff - "$folder/output"
echo "as stated"
