"""The check of a GPU, on a CPU: its parts on tiny models, its clock, its table, and its wheels."""

import json
import sys
import zipfile

import pytest
import torch

from benchmarks.gpu_check import child, fst_and_rl, log_ratio, runner, update, wheels
from benchmarks.gpu_check.models import SHAPES, config_of, parameters_of, random_model
from benchmarks.gpu_check.parts import PARTS, REHEARSAL, TESTS, Part
from benchmarks.gpu_check.tables import show
from tests.conftest import TESTS as FOLDER

MACHINE = {"card": "none", "python": "3.12", "versions": {"torch": "2.11"}}


@pytest.fixture
def rows(monkeypatch, tmp_path):
    """Reads the rows that were handed over."""
    path = tmp_path / "rows.jsonl"
    monkeypatch.setenv(child.ROWS, str(path))
    return lambda: [json.loads(line) for line in path.read_text().splitlines()]


# ---- the parts --------------------------------------------------------------------------------------


SIZES = {"0.5B": 0.494, "1.7B": 1.721, "4B": 4.022, "8B": 8.191}


@pytest.mark.parametrize(("shape", "billions"), SIZES.items(), ids=str)
def test_the_shapes_have_the_sizes_that_they_are_named_for(shape, billions):
    assert parameters_of(shape) == pytest.approx(billions * 1e9, rel=0.001)


@pytest.mark.slow
@pytest.mark.parametrize("side", ["dspy_fst", "trl"])
def test_an_update_is_measured_with_full_weights_and_with_lora(side, rows, monkeypatch):
    monkeypatch.setattr(update, "REPEATS", 1)
    with random_model("tiny") as folder:
        update.run("tiny", folder, card="NVIDIA H100 80GB HBM3", card_bytes=2.0**30, sides=[side])
    found = {(row["weights"], row["trainer"]): row for row in rows()}
    assert set(found) == {("full", side), ("LoRA rank 16", side)}
    tokens = update.PROBLEMS * update.GROUP * 24
    read = 32 * 12 + 64 * 11 if side == "dspy_fst" else tokens
    for (weights, _), row in found.items():
        factor = 6 if weights == "full" else 4  # a frozen base needs no gradient of its weights
        assert row["flops_per_token"] == factor * parameters_of("tiny")
        assert row["tokens_per_s"] == pytest.approx(tokens / row["seconds"])
        assert row["mfu_rows"] == pytest.approx(factor * parameters_of("tiny") * tokens / (row["seconds"] * 989.4e12))
        # Replies of so few words may begin alike by chance.
        assert row["mfu_read"] / row["mfu_rows"] == pytest.approx(read / tokens, rel=0.01)


def test_what_is_trained_without_the_frozen_start_is_what_would_not_fit_with_it():
    kls = {case.shape: case.kl for shape in SHAPES for case in update.cases(shape, 80 * 2.0**30) if not case.adapter}
    assert kls == {"tiny": 0.001, "0.5B": 0.001, "1.7B": 0.001, "4B": 0.0}
    assert [case.weights for case in update.cases("8B", 80 * 2.0**30)] == ["LoRA rank 16"]


def test_a_step_that_runs_out_of_memory_is_measured_at_half_its_budget():
    asked = []

    def make(budget):
        def step():
            asked.append(budget)
            if budget > 1024:
                raise torch.OutOfMemoryError("CUDA out of memory")

        return step

    measured = update.measure(make, 4096)
    assert asked == [4096, 2048, *[1024] * (1 + update.REPEATS)]
    assert measured.budget == 1024
    with pytest.raises(torch.OutOfMemoryError):
        update.measure(make, 4096, least=2048)


def test_an_error_becomes_a_row_that_says_what_was_skipped(rows):
    def fails():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmore")

    child.attempt(fails, model="4B", trainer="trl")
    (row,) = rows()
    assert row == {
        "model": "4B",
        "trainer": "trl",
        "skipped": "OutOfMemoryError: CUDA out of memory. Tried to allocate",
    }


def test_the_engine_and_the_trainer_of_a_random_model_agree():
    with random_model("tiny") as folder:
        gaps = log_ratio.gaps(folder, replies=4, max_tokens=8)
    assert gaps["tokens"] == 32
    assert abs(gaps["mean_log_ratio"]) <= gaps["mean_gap"] <= gaps["max_gap"] < 0.05
    assert gaps["effective_share"] == pytest.approx(1, abs=1e-3)


@pytest.mark.slow
def test_a_trained_method_tells_its_steps_and_rewards(tmp_path, monkeypatch):
    monkeypatch.setitem(fst_and_rl.SMALLER, "cycles", 2)
    fst_and_rl.train("fst", tmp_path / "run", seconds=200, tiny=True)
    told = fst_and_rl.figures(tmp_path / "run")
    assert (told["steps"], told["searches"], len(told["rewards"])) == (2, 2, 2)
    assert told["reward_first"] == pytest.approx(sum(told["rewards"]) / 2)
    assert told["least_effective_share"] > 0.9


def test_all_tests_marked_gpu_are_in_the_file_that_is_run():
    mark = "pytest.mark." + "gpu"  # not this line's own
    marked = [path.relative_to(FOLDER.parent) for path in FOLDER.rglob("test_*.py") if mark in path.read_text()]
    assert [path.as_posix() for path in marked] == [TESTS]


# ---- the clock --------------------------------------------------------------------------------------

SAYS = """
import json, os, sys, time
seconds = float(sys.stdin.readline())
open(os.environ["GPU_CHECK_ROWS"], "a").write(json.dumps({"method": "a", "steps": 3, "given": seconds}) + "\\n")
"""


def part(name, then="", limit_s=20.0, least_s=0.0):
    return Part(name, (sys.executable, "-c", SAYS + then), limit_s, least_s)


def test_a_part_that_crashes_or_hangs_keeps_its_rows_and_does_not_end_the_others():
    parts = [
        part("crashes", "os.write(2, b'no such device'); os.abort()"),
        part("hangs", "time.sleep(100)", limit_s=1.0),
        part("works"),
    ]
    crashed, hung, worked = runner.run_parts(parts, 60.0)
    assert (crashed.status, hung.status, worked.status) == ("failed", "out of time", "done")
    assert "no such device" in crashed.reason
    assert [row["given"] for row in crashed.rows] == [20.0]
    assert hung.rows
    assert 20.0 < worked.rows[0]["given"] <= 60.0  # the last part gets all that is left
    assert hung.seconds < 15


def test_a_part_is_skipped_when_too_little_time_is_left():
    first, second = runner.run_parts([part("slow", "time.sleep(1)"), part("long", least_s=500.0)], 60.0)
    assert (first.status, second.status) == ("done", "skipped")
    assert second.reason.endswith("s were left, it needs 500")
    assert second.rows == []


@pytest.mark.slow
def test_pytest_s_lines_become_rows(tmp_path):
    test = tmp_path / "test_it.py"
    test.write_text(
        "import pytest\ndef test_right(): pass\ndef test_wrong(): assert 0\n@pytest.mark.skip\ndef test_not(): pass\n"
    )
    command = (sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), str(test))
    (outcome,) = runner.run_parts([Part("tests", command, 60.0, 0.0, kind="pytest")], 100.0)
    assert outcome.status == "failed"
    assert {row["test"]: row["outcome"] for row in outcome.rows} == {
        "test_right": "passed",
        "test_wrong": "failed",
        "test_not": "skipped",
    }


def test_the_parts_of_the_check_fit_into_its_time():
    assert (
        sum(part.limit_s for part in PARTS[:-1]) + PARTS[-1].least_s <= 8 * 60 + 60
    )  # most take less than their limit
    kinds = {part.command[:3] for part in PARTS}
    assert kinds == {part.command[:3] for part in REHEARSAL}


# ---- the table --------------------------------------------------------------------------------------


def test_the_table_tells_what_was_measured_and_what_was_not():
    measured = {"model": "4B", "weights": "full", "trainer": "trl", "kl": 0.0, "micro_batch_tokens": 2048}
    measured |= {"seconds": 2.0, "tokens_per_s": 16192.0, "mfu_rows": 0.4, "mfu_read": None, "peak_gib": 70.123}
    parts = [
        {"name": "update 4B", "status": "failed", "reason": "status -6", "rows": [measured]},
        {"name": "log-ratio", "status": "done", "reason": "", "rows": [{"model": "any", "skipped": "no vLLM"}]},
    ]
    text = show({"machine": MACHINE, "parts": parts, "seconds": 100.0})
    assert "| 4B | full | trl | 0 | 2048 | 2 | 16,192 | 40.0% | - | 70.1 | - |" in text
    assert "MFU counts 6 FLOPs for each parameter and token with full weights, and 4 with a LoRA" in text
    assert "- update 4B: failed: status -6" in text
    assert "- log-ratio, any: skipped: no vLLM" in text


def test_without_a_card_the_check_says_how_to_rehearse(monkeypatch, capsys):
    monkeypatch.setattr(runner, "_card", lambda: "none")
    assert runner.check(60.0, rehearse=False, only=None, out=None) == 1
    assert "--rehearse" in capsys.readouterr().out


# ---- the wheels -------------------------------------------------------------------------------------


def test_a_wheel_that_was_split_over_folders_is_put_together(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    with zipfile.ZipFile(tmp_path / "a" / "model-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("model/weights", bytes(range(256)) * 40)
    whole = (tmp_path / "a" / "model-1-py3-none-any.whl").read_bytes()
    parts = wheels.split(tmp_path / "a" / "model-1-py3-none-any.whl", 1000)
    assert len(parts) > 10  # ten comes after nine, not after one
    assert wheels.joined([tmp_path / "a"], tmp_path)[0].read_bytes() == whole
    for piece in parts[3:]:
        piece.rename(tmp_path / "b" / piece.name)
    assert wheels.joined([tmp_path / "a"], tmp_path) == []  # the rest has not come yet
    assert wheels.joined([tmp_path / "a", tmp_path / "b"], tmp_path)[0].read_bytes() == whole


def test_a_stripped_wheel_lacks_the_files_and_their_records(tmp_path):
    path = tmp_path / "big-1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("big/page/index.html", "x")
        wheel.writestr("big/code.py", "y")
        wheel.writestr("big-1.dist-info/RECORD", "big/page/index.html,,1\nbig/code.py,,1\n")
    wheels.strip(path, ("big/page/",))
    with zipfile.ZipFile(path) as wheel:
        assert wheel.namelist() == ["big/code.py", "big-1.dist-info/RECORD"]
        assert wheel.read("big-1.dist-info/RECORD") == b"big/code.py,,1\n"


def test_the_wheels_to_collect_are_what_the_other_machine_lacks():
    found = wheels.missing()
    assert {"dspy", "gepa", "trl", "litellm", "openai", "datasets", "diskcache", "gguf", "pydantic-core"} <= set(found)
    assert not set(found) & {"torch", "transformers", "peft", "accelerate", "triton", "numpy", "dspy-fst"}


def test_a_trainer_of_the_rows_is_on_policy(tmp_path):
    """What makes the update real: its rows pass the check that stops a run on foreign rows."""
    with random_model("tiny") as folder:
        case = update.Case("tiny", adapter=False, kl=0.001, budget=2048)
        step = update.our_step(case, 2048, folder, update.texts(config_of("tiny").vocab_size, 12, 12))
        report = step()
    assert report.effective_sample_share == pytest.approx(1, abs=1e-3)
    assert (report.rows, report.tokens, report.sequences) == (64, 64 * 12, 64)
