"""Whether runs of the short form give their published lines again.

python -m benchmarks.evidence.reproduce                    # Fast-Slow Training with seed 0, some minutes
python -m benchmarks.evidence.reproduce fst rl --seeds 0 1

Accuracies, rollouts and tokens must be equal, drift within a tenth. Drift is measured on sampled replies. Code after
the commit of a line may add an update's numbers in another order, and a sampled reply can then differ. Ends with
1 when a number is outside of that.
"""

import argparse
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.evidence.arms import ARMS
from benchmarks.evidence.raw import Result, read
from benchmarks.evidence.run import Run, make
from dspy_fst.run.files import read_json

DRIFT_TOLERANCE = 0.1
"""Relative. The run of seed 0, made again many commits later, had gaps of up to .06 and no other."""
DRIFT_FLOOR = 1e-3
"""Nats. Of a drift near zero no share is asked."""


def differences(published: Result, again: Result) -> Iterator[str]:
    """A sentence for each number that differs, and for lines that only one of them has."""
    for line, other in zip(published["lines"], again["lines"], strict=False):
        for name, value in line.items():
            if not _equal(name, value, other.get(name)):
                yield f"step {line['step']}, {name}: published {value!r}, now {other.get(name)!r}"
    if len(published["lines"]) != len(again["lines"]):
        yield f"{len(published['lines'])} lines are published, {len(again['lines'])} came now"


def _equal(name: str, value: float, other: float | None) -> bool:
    if other is None or " KL " not in name:
        return value == other
    return math.isclose(value, other, rel_tol=DRIFT_TOLERANCE, abs_tol=DRIFT_FLOOR)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arms", nargs="*", default=["fst"], help=f"of {', '.join(sorted(ARMS))}")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    options = parser.parse_args()
    chosen = [run for run in read("short", "main") if run["arm"] in options.arms and run["seed"] in options.seeds]
    if not chosen:
        raise SystemExit("no such run is published in benchmarks/results/evidence/short")
    found = [sentence for published in chosen for sentence in _made_again(published)]
    raise SystemExit("\n".join(found) or 0)


def _made_again(published: Result) -> list[str]:
    name = f"{published['arm']}, seed {published['seed']}"
    what = {field: published[field] for field in ("arm", "world", "seed", "changes", "interval", "seed_interval")}
    with tempfile.TemporaryDirectory() as folder:
        make(Run(**what), Path(folder) / "run")
        found = list(differences(published, read_json(Path(folder) / "run" / "result.json")))
    print(f"{name}: {len(published['lines'])} lines, {len(found)} differences")
    return [f"{name}, {sentence}" for sentence in found]


if __name__ == "__main__":
    main()
