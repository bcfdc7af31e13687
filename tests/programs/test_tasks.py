"""What the five tasks of the paper have in common: the shape of `build`, the splits, the project files."""

import importlib
import json
from pathlib import Path
from typing import Any

import dspy
import pytest

from dspy_fst.project.project_file import load_project
from dspy_fst.rollout.reward import Reward, metric_fault
from programs import common

PROGRAMS = Path(common.__file__).parent
NAMES = ["star_graph", "codeio", "math", "hover", "physics"]
SIZES = {"train": 24, "val": 8, "test": 8}


def build(name: str, **options: Any) -> common.Task:
    return importlib.import_module(f"programs.{name}").build(**{**SIZES, **options})


def inputs(examples: list[dspy.Example]) -> list[str]:
    return [json.dumps(example.inputs().toDict(), sort_keys=True) for example in examples]


@pytest.mark.parametrize("name", NAMES)
def test_splits_are_disjoint_and_follow_the_seed(name: str) -> None:
    task, same, other = build(name, seed=3), build(name, seed=3), build(name, seed=4)
    sets = [inputs(task.trainset), inputs(task.valset), inputs(task.testset)]
    assert [len(problems) for problems in sets] == list(SIZES.values())
    assert len({problem for problems in sets for problem in problems}) == sum(SIZES.values())
    assert [task.trainset, task.valset, task.testset] == [same.trainset, same.valset, same.testset]
    assert sets[0] != inputs(other.trainset)


@pytest.mark.parametrize("name", NAMES)
def test_a_metric_scores_any_answer_and_gives_feedback(name: str) -> None:
    task = build(name)
    assert metric_fault(task.metric) is None
    reward = Reward(task.metric)
    for odd in (
        dspy.Prediction(),
        *(dspy.Prediction(**dict.fromkeys(FIELDS, text)) for text in ("", "\x00}{", "9" * 9999)),
    ):
        score = reward(task.trainset[0], odd)
        assert score.value == 0.0
        assert score.feedback.startswith("Wrong.")


FIELDS = ["path", "output", "answer", "verdict", "notes"]


@pytest.mark.parametrize("name", NAMES)
def test_the_papers_project_file_opens_with_offline_data(name: str) -> None:
    project = load_project(PROGRAMS / name / "paper.yaml")
    opened = project.open()
    recipe = project.recipe
    assert recipe is not None
    assert len(opened.trainset) >= recipe.lookahead == recipe.anchor_count == 192
    assert (recipe.steps_per_cycle, recipe.population_size, recipe.group_size) == (6, 4, 8)
    assert (recipe.importance_cap, recipe.kl_coefficient, recipe.search_passes) == (4.0, 0.001, 5.0)
    assert opened.valset
    assert all(predictor.lm is not None for predictor in opened.program.predictors())


def test_a_set_that_has_too_few_problems_says_how_many_there_are() -> None:
    with pytest.raises(ValueError, match="only 0 different"):
        build("hover", train=330, val=6, test=1)


def test_a_later_set_skips_what_an_earlier_one_holds() -> None:
    pool = [dspy.Example(text=letter) for letter in "abcadbe"]
    first, second = common.split([iter(pool), iter(pool)], [2, 2], key="text")
    assert [[example.text for example in part] for part in (first, second)] == [["a", "b"], ["c", "d"]]


def test_a_public_set_is_read_in_an_order_that_the_seed_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "numbers"
    folder.mkdir()
    (folder / "train.jsonl").write_text("".join(json.dumps({"number": i}) + "\n" for i in range(50)))
    public = common.PublicSet(str(folder), revision="main")
    first = [row["number"] for row in public.shuffled("train", seed=0)]
    assert sorted(first) == list(range(50)) != first
    assert first == [row["number"] for row in public.shuffled("train", seed=0)]
    assert first != [row["number"] for row in public.shuffled("train", seed=1)]


def test_a_public_file_of_lines_may_hold_rows_of_different_types(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"output": 1}, {"output": [None, {"a": True}]}, {"output": "text"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = []

    def download(name: str, file: str, *, repo_type: str, revision: str) -> str:
        asked.append((name, repo_type, revision))
        return str(tmp_path / file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    public = common.PublicSet("someone/rows", revision="0123abc", lines="rows.jsonl")
    assert sorted(map(str, public.shuffled("train", seed=0))) == sorted(map(str, rows))
    assert asked == [("someone/rows", "dataset", "0123abc")]


def test_a_public_set_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"no_such_set .*cannot be loaded.*source='offline'"):
        next(common.PublicSet(str(tmp_path / "no_such_set"), revision="main").shuffled("train", seed=0))
