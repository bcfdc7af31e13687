"""A published run that is made again is compared number by number."""

from benchmarks.evidence.raw import read
from benchmarks.evidence.reproduce import differences


def test_a_run_is_equal_to_itself_and_each_other_number_is_named():
    (published, *_) = (run for run in read("short", "main") if (run["arm"], run["seed"]) == ("fst", 0))
    assert list(differences(published, published)) == []
    lines = [dict(line) for line in published["lines"]]
    before, lines[1]["seed accuracy"] = lines[1]["seed accuracy"], 0.5
    step = lines[1]["step"]
    changed = f"step {step}, seed accuracy: published {before!r}, now 0.5"
    assert list(differences(published, {**published, "lines": lines})) == [changed]
    drifted = [dict(line) for line in published["lines"]]
    drifted[3]["seed KL per token"] *= 1.05
    assert list(differences(published, {**published, "lines": drifted})) == []
    drifted[3]["seed KL per token"] *= 1.2
    assert len(list(differences(published, {**published, "lines": drifted}))) == 1
    fewer = {**published, "lines": published["lines"][:-1]}
    assert list(differences(published, fewer)) == [f"{len(lines)} lines are published, {len(lines) - 1} came now"]
