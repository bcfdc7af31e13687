"""`dspy-fst eval`: scores of any cycle's population and weights, with intervals, kept where the report finds them."""

import hashlib
import json
import shutil
import sys
from dataclasses import asdict

import numpy as np
import pytest
from transformers.utils import logging as transformers_logging

from dspy_fst.errors import MeasurementError
from dspy_fst.evaluation import two_by_two_table
from dspy_fst.evaluation.two_by_two_table import estimate, keep
from dspy_fst.outcomes.outcome import Outcome
from dspy_fst.report.from_directory import read_records
from dspy_fst.run.directory import read_events
from dspy_fst.types import Candidate, Rollout
from tests.cli.conftest import MODULE, invoke

TEXTS = Candidate({"solve": "Solve it."})
FAST = ("--k", "2", "--limit", "2", "--json")


@pytest.fixture(autouse=True)
def own_module():
    """Another test of this process may have imported a module of the same name."""
    yield
    sys.modules.pop(MODULE, None)


def rollouts(*rewards, start=0):
    """Rollouts of one problem each; None was masked."""
    return [
        Rollout(start + i, TEXTS, (), reward, Outcome("masked", "timeout") if reward is None else Outcome("scored"))
        for i, of in enumerate(rewards)
        for reward in of
    ]


def evaluated(*arguments):
    return json.loads(invoke("eval", *arguments).stdout)


def lines(run_dir):
    return [json.loads(line) for line in (run_dir / "evaluations.jsonl").read_text().splitlines()]


# ---- the figures -----------------------------------------------------------------------------------


def test_the_interval_is_the_bootstrap_s_over_problems_and_the_same_for_a_seed():
    played = rollouts(*([x, x] for x in np.random.default_rng(0).random(32)))
    made = estimate(played, k=2)
    assert made.problems == 32
    assert estimate(played, k=2).mean_interval == made.mean_interval
    assert estimate(played, k=2, seed=1).mean_interval != made.mean_interval
    # Close to the normal interval over 32 problems; over 64 rollouts it would be narrower by a third.
    normal = made.mean_at_k + np.array([-1.96, 1.96]) * made.standard_error
    assert np.allclose(made.mean_interval, normal, atol=0.15 * made.standard_error)


def test_the_bootstrap_draws_one_resample_after_the_other_however_many_are_drawn_at_once(monkeypatch):
    values, seed = np.random.default_rng(1).random((5, 2)), [*hashlib.sha256(b"7 bootstrap").digest()]
    draw = np.random.default_rng(seed)
    means = [values[draw.integers(5, size=5)].mean(axis=0) for _ in range(10_000)]
    wanted = [(float(low), float(high)) for low, high in np.quantile(means, [0.025, 0.975], axis=0).T]
    for block in (2**20, 5 * 999, 1):
        monkeypatch.setattr(two_by_two_table, "BLOCK", block)
        assert two_by_two_table._intervals(values.T, 7) == wanted


def test_best_at_k_has_its_own_interval():
    made = estimate(rollouts(*([1.0, 0.0], [1.0, 1.0], [0.0, 0.0], [0.0, 1.0]) * 8), k=2)
    assert (made.mean_at_k, made.best_at_k) == (0.5, 0.75)
    low, high = made.best_interval
    assert made.mean_interval[0] < low < 0.75 < high


def test_one_problem_has_no_interval():
    made = estimate(rollouts([1.0, 0.0]), k=2)
    assert (made.mean_interval, made.best_interval) == (None, None)


def test_masked_rollouts_enter_no_figure_and_are_counted():
    made = estimate(rollouts([1.0, None], [0.0, 0.0], [None, None]), k=2)
    assert (made.mean_at_k, made.problems, made.masked) == (0.5, 2, 3)
    assert made.lost == {"masked: timeout": 3}
    with pytest.raises(MeasurementError, match="none of 2 rollouts measured anything"):
        estimate(rollouts([None, None]), k=2)


def test_a_torn_line_does_not_swallow_the_next_evaluation(tmp_path):
    (tmp_path / "evaluations.jsonl").write_text('{"kind": "ev')
    (tmp_path / "events.jsonl").write_text("")
    keep(tmp_path, [{"kind": "eval", "mean": 0.5}, {"kind": "eval", "mean": 0.25}])
    keep(tmp_path, [{"kind": "eval", "mean": 0.75}])
    assert [made.mean for made in read_records([tmp_path])[0].evaluations] == [0.5, 0.25, 0.75]


# ---- the command -----------------------------------------------------------------------------------


def test_the_final_population_is_evaluated_and_the_report_finds_it(run_dir):
    outcome = evaluated(run_dir, "--candidate", "all", *FAST)
    final = read_events(run_dir)[-1]["validation"]
    assert [result["candidate"] for result in outcome["results"]] == list(final)
    for result in outcome["results"]:
        assert (result["split"], result["weights"], result["cycle"], result["k"]) == ("val", "step-000006", 1, 2)
        assert result["low"] <= result["mean"] <= result["high"]
        assert result["mean"] <= result["best"]
        assert result["metric"].startswith("tests.relay.any_answer ")
    assert lines(run_dir) == outcome["results"]
    assert [made.mean for made in read_records([run_dir])[0].evaluations] == [r["mean"] for r in outcome["results"]]


def test_the_same_seed_gives_the_same_figures_and_a_cycle_has_its_own_weights_and_texts(run_dir):
    first, again = (evaluated(run_dir, *FAST)["results"][0] for _ in range(2))
    assert {**first, "time": None} == {**again, "time": None}
    (run_dir / "weights" / "step-000005").rename(run_dir / "weights" / "step-000003")  # as if it were the best
    early = evaluated(run_dir, "--cycle", "0", *FAST)["results"][0]
    population = json.loads((run_dir / "populations" / "cycle-000.json").read_text())
    assert (early["cycle"], early["weights"]) == (0, "step-000003")
    assert early["candidate"] == Candidate(population["members"][0]).digest


def test_weights_a_digest_and_other_splits_can_be_named(run_dir, tmp_path):
    seed = evaluated(run_dir, "--candidate", "seed", "--weights", "step-000000", "--split", "train", *FAST)["results"]
    assert (seed[0]["weights"], seed[0]["split"]) == ("step-000000", "train")
    assert seed[0]["cycle"] is None, "these weights are of no cycle's end"
    named = evaluated(run_dir, "--candidate", seed[0]["candidate"][:6], "--split", f"{MODULE}:held_out", *FAST)
    assert named["results"][0]["candidate"] == seed[0]["candidate"]
    examples = [{"numbers": "1 2 3 4", "answer": "4 3 2"}, {"numbers": "5 6 7 8", "answer": "8 7 6"}]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, examples)))
    assert evaluated(run_dir, "--split", tmp_path / "mine.jsonl", *FAST)["results"][0]["problems_of_split"] == 2


def test_weights_that_were_pruned_are_told_with_those_that_are_kept(run_dir):
    shutil.rmtree(run_dir / "weights" / "step-000003", ignore_errors=True)
    text = invoke("eval", run_dir, "--cycle", "0", code=2).stderr
    kept = ", ".join(sorted(path.name for path in (run_dir / "weights").iterdir()))
    assert f"the weights step-000003 are not kept; those that are: {kept}" in text
    assert "keep_weights" in text
    assert not (run_dir / "evaluations.jsonl").exists()


def test_a_compiled_program_is_evaluated_as_its_run_is(run_dir):
    of_run = evaluated(run_dir, *FAST)["results"][0]
    of_program = evaluated(run_dir / "compiled", *FAST)["results"][0]
    same = ("candidate", "weights", "mean", "low", "high", "best")
    assert {name: of_program[name] for name in same} == {name: of_run[name] for name in same}
    alone = shutil.copytree(run_dir / "compiled", run_dir.parent / "alone")
    assert "--project" in invoke("eval", alone, code=2).stderr
    outcome = evaluated(alone, "--project", run_dir / "project.yaml", *FAST)
    assert outcome["results"][0]["mean"] == of_run["mean"]
    assert outcome["kept_in"] is None


@pytest.mark.filterwarnings("ignore:Cannot (dis|en)able progress bars")
def test_two_by_two_gives_the_four_cells_and_the_drift_and_the_report_finds_them(run_dir, monkeypatch):
    monkeypatch.setattr(transformers_logging, "_tqdm_active", True)  # as outside of tests
    result = invoke("eval", run_dir, "--two-by-two", "--k", "2", "--limit", "2")
    (line,) = lines(run_dir)
    assert list(line["cells"]) == ["seed/base", "seed/trained", "evolved/base", "evolved/trained"]
    table = read_records([run_dir])[0].two_by_two
    assert (table.rows, table.columns) == (["seed", "evolved"], ["base", "trained"])
    assert table.written == {name: tuple(cell) for name, cell in line["cells"].items()}
    assert {name: asdict(moved) for name, moved in table.drift.items()} == line["drift"]
    joint = line["figures"]["evolved/trained"]
    assert joint["low"] <= joint["mean"] == line["cells"]["evolved/trained"][0]
    assert line["drift"]["evolved instructions"]["per_token"] > 0
    assert f"{joint['low']:.3f} to {joint['high']:.3f}" in result.stdout
    assert "95% percentile bootstrap over problems" in result.stdout
    assert table.words.startswith("split val, the first 2 problems, k=2, cycle 1, weights step-000006, candidate ")
    assert "val, only the first 2 problems, weights step-000006, cycle 1, seed 0" in result.stdout
    assert "val: these problems chose the best candidate" in result.stderr
    assert "Loading weights" not in result.output
    own = evaluated(run_dir, *FAST)["results"][0]
    assert (own["mean"], own["high"]) == (joint["mean"], joint["high"]), "the joint cell is what eval measures"


def test_masked_rollouts_are_told_and_a_split_that_measures_nothing_is_an_error(run_dir):
    project = run_dir / "project.yaml"
    project.write_text(project.read_text().replace(f"{MODULE}:metric", f"{MODULE}:unmeasured"))
    text = invoke("eval", run_dir, "--split", "train", "--k", "1", "--limit", "12").stdout
    (line,) = lines(run_dir)
    assert 0 < line["masked"] < 12
    assert line["problems"] < 12
    assert f"{line['masked']} rollouts measured nothing and are left out (masked: metric raised OSError)" in text
    examples = [{"numbers": "1 2 3 4 5", "answer": "5 4 3 2"}]
    (run_dir.parent / "odd.jsonl").write_text(json.dumps(examples[0]))
    text = invoke("eval", run_dir, "--split", run_dir.parent / "odd.jsonl", "--k", "4", code=1).stderr
    assert "none of 4 rollouts measured anything" in text
    assert len(lines(run_dir)) == 1


def test_a_result_that_cannot_be_kept_is_shown_all_the_same(run_dir):
    (run_dir / "evaluations.jsonl").mkdir()
    result = invoke("eval", run_dir, *FAST, code=1)
    outcome = json.loads(result.stdout)
    assert outcome["results"][0]["mean"] is not None
    assert outcome["kept_in"] is None
    assert "evaluations.jsonl" in result.stderr
    assert "is not kept" in result.stderr


def test_a_file_is_evaluated_with_the_trainset_s_inputs_and_the_project_is_opened_once(run_dir, tmp_path):
    module = run_dir.parent / "mine.py"
    module.write_text(
        f"from {MODULE} import *\nmade = []\n\n\n"
        "def once():\n    made.append(1)\n    assert len(made) == 1, 'made twice'\n    return train\n\n\n"
        "def nothing():\n    return []\n"
    )
    project = run_dir / "project.yaml"
    project.write_text(project.read_text().replace(f"trainset: {MODULE}:train", "trainset: mine:once"))
    file = tmp_path / "some.jsonl"
    file.write_text('{"numbers": "1 2 3 4", "answer": "4 3 2"}')
    sys.path.insert(0, str(run_dir.parent))
    try:
        assert evaluated(run_dir, "--split", file, *FAST)["results"][0]["problems"] == 1
        file.write_text('{"number": "1 2 3 4", "answer": "4 3 2"}')
        sys.modules.pop("mine")
        lacking = invoke("eval", run_dir, "--split", file, code=2).stderr
        assert "example 1 has no 'numbers', an input of the trainset" in lacking
        project.write_text(project.read_text().replace("mine:once", "mine:nothing"))
        assert "the trainset is empty" in invoke("eval", run_dir, "--split", file, code=2).stderr
    finally:
        sys.path.remove(str(run_dir.parent))
        sys.modules.pop("mine", None)


REFUSED = [
    (["--cycle", "7"], "has not reached it; its cycles so far: 0 to 1"),
    (["--candidate", "zz"], "no candidate has this digest"),
    (["--candidate", "all", "--two-by-two"], "--two-by-two compares the seed and the best"),
    (["--split", "nothing:here"], "No module named 'nothing'"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED)
def test_what_cannot_be_evaluated_is_told_before_anything_is_played(finished, arguments, message):
    result = invoke("eval", finished, *arguments, code=2)
    assert message in result.stderr
    assert result.stdout == ""
    assert not (finished / "evaluations.jsonl").exists()
