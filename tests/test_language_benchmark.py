"""The comparison on SmolLM2: its arms are recipes, its runs lie apart, its lines fill the laboratory's tables."""

import json
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import transformers
from dspy import lm15

from benchmarks.evidence.claims import TABLES
from benchmarks.evidence.experiments import Place
from benchmarks.evidence.raw import Lacking
from benchmarks.language import base, grid
from benchmarks.language.arms import ABOUT, ARMS, RECIPE, SELF_REFLECTING
from benchmarks.language.run import LanguageRun, Reflecting, perplexity, reflection_lm, told
from dspy_fst.config import FSTConfig
from dspy_fst.engine.chat import text_response
from dspy_fst.rollout.components import read_texts
from dspy_fst.types import Candidate
from programs.lab import BASE as LAB
from programs.language import EXPERT, TASKS
from programs.language.feedback import FeedbackProposer

BASE = "smollm2-135m-instruct"


def run(arm: str = "fst", world: str = "desk", seed: int = 0) -> LanguageRun:
    return LanguageRun(arm, world, seed, base=BASE)


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_is_a_recipe_and_says_what_it_is(arm: str) -> None:
    FSTConfig(**run(arm).recipe)
    assert ABOUT[arm]
    asked = run(arm).proposer() if arm != SELF_REFLECTING else {}
    assert not asked or isinstance(asked["propose"], FeedbackProposer)


def test_the_model_as_reflection_lm_is_asked_for_another_draw_each_time() -> None:
    seeds = []

    def complete(request: lm15.Request, seed: int) -> SimpleNamespace:
        seeds.append((seed, request.config.temperature))
        return SimpleNamespace(response=text_response(request.model, f"Text {seed}.", "stop", 1, 1))

    engine = SimpleNamespace(complete=complete)
    lm = reflection_lm(cast(Any, SimpleNamespace(handle=SimpleNamespace(ready=lambda: engine))))
    assert [lm("Write it.")[0], lm.copy()("Write it.")[0]] == ["Text 0.", "Text 1."]
    assert seeds == [(0, 1.0), (1, 1.0)]


def test_what_the_model_says_first_is_the_text_and_silence_leaves_the_old_one() -> None:
    asked: list[str] = []

    def lm(prompt: str) -> list[str]:
        asked.append(prompt)
        return ["Be brief.\nAnd kind.\n\nWhy? Because."] if len(asked) == 1 else [" \n\n"]

    propose, records = Reflecting(cast(Any, lm)), {"route": [{"Feedback": "Wrong. It was late."}]}
    assert propose({"route": "Say it."}, records, ["route"]) == {"route": "Be brief.\nAnd kind."}
    assert "Say it." in asked[0]
    assert "- Wrong. It was late." in asked[0]
    assert propose({"route": "Say it."}, records, ["route"]) == {"route": "Say it."}


@pytest.mark.parametrize("form", grid.FORMS.values(), ids=grid.FORMS)
def test_every_run_has_a_folder_of_its_own_and_is_measured_after_each_cycle(
    form: grid.Form, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.language.run.folder", lambda: Path(BASE))
    place, runs = Place(Path("runs")), grid.planned(form)
    assert len({place.of(each) for each in runs}) == len(runs) == len(form.worlds) * len(ARMS) * form.seeds
    assert {(each.interval, each.seed_interval) for each in runs} == {(form.interval, form.seed_interval)}
    assert RECIPE["steps_per_cycle"] % form.interval == 0


def test_only_finished_runs_are_published_on_request_and_never_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("benchmarks.language.run.folder", lambda: LAB)
    monkeypatch.setattr(grid, "PUBLISHED", tmp_path / "published")
    asked = ["long", "--finished", "--folder", str(tmp_path)]
    with pytest.raises(SystemExit):
        grid.main(asked)
    assert f"no run is finished in {tmp_path / 'long'}" in capsys.readouterr().err
    done = grid.planned(grid.FORMS["long"], ["slips"], ["rl"])[0]
    out = Place(tmp_path / "long").of(done)
    out.mkdir(parents=True)
    result = {**asdict(done), "recipe": done.recipe, "marks": done.marks()}
    (out / "result.json").write_text(json.dumps(result))
    grid.main(asked)
    assert [json.loads(line) for line in (tmp_path / "published" / "long.jsonl").read_text().splitlines()] == [
        {**result, "base": LAB.name}
    ]


def test_the_mark_of_a_task_is_that_of_its_problems_and_an_unknown_one_is_named() -> None:
    assert run().world_mark() == run("rl").world_mark() != run(world="slips").world_mark()
    assert run().world_mark() != run(seed=1).world_mark()
    with pytest.raises(ValueError, match="world 'desks': there is no such task; take one of desk, slips, almanac"):
        run(world="desks").world_mark()


def test_both_instructions_are_measured_under_each_adapter_and_learning_under_the_last() -> None:
    names = [case.name for case in base.cases(["desk"], ["XMLAdapter", "JSONAdapter"], weights=True)]
    told = [f"desk, {adapter}, {state}" for adapter in ("XMLAdapter", "JSONAdapter") for state in ("seed", "expert")]
    assert names == [*told, "desk, JSONAdapter, warm"]
    assert not [case for case in base.cases(list(TASKS), list(base.ADAPTERS), weights=False) if case.state == "warm"]


@pytest.mark.parametrize("task", TASKS)
def test_an_expert_s_instruction_takes_the_place_of_each_predictor_s(task: str) -> None:
    own = read_texts(TASKS[task](2, 2, 2).program)
    assert told(own, EXPERT[task]) == Candidate(EXPERT[task])


def line(step: int, accuracy: float, *, seed: float | None = None) -> dict[str, float]:
    spent = {"training rollouts": 32 * step, "search rollouts": 40, "tokens sampled": 900 * step}
    own = {"evolved accuracy": accuracy, "evolved parsed": 0.75, "evolved KL per rollout": step / 10}
    return {"step": step, **spent, **own, **({} if seed is None else {"seed accuracy": seed})}


def test_a_checkpoint_is_a_row_with_what_was_spent_by_then() -> None:
    lines = [line(0, 0.1, seed=0.1), line(3, 0.2), line(6, 0.5, seed=0.3)]
    told = {"world": "desk", "seed": 0, "base": BASE, "lines": lines, "CPU seconds": {"training": 90.0}}
    rows = TABLES["checkpoints"]([{**told, "arm": "fst"}], "desk", BASE).splitlines()[2:]
    assert rows == [
        "| fst | 0 | 0.10 | 0.75 | 0.10 | 0.00 | 40 | 0 |  |",
        "| fst | 3 | 0.20 | 0.75 |  | 0.30 | 136 | 2,700 |  |",
        "| fst | 6 | 0.50 | 0.75 | 0.30 | 0.60 | 232 | 5,400 | 1.5 |",
    ]
    continued = TABLES["checkpoints"]([{**told, "arm": "fst", "CPU seconds": None}], "desk", BASE)
    assert continued.splitlines()[-1].endswith("| 5,400 |  |")


def test_what_is_left_of_other_abilities_stands_beside_the_base_and_an_arm_without_updates_has_no_row() -> None:
    ends = {"other instructions": {"base": 0.4, "trained": 0.25}, "perplexity": {"base": 30.0, "trained": 36.04}}
    told = {"world": "desk", "seed": 0, "base": BASE, **ends}
    trained = {**told, "arm": "rl", "lines": [{**line(6, 0.5), "updates": 6}]}
    searched = {**told, "arm": "gepa", "lines": [{**line(0, 0.3), "updates": 0}]}
    assert TABLES["retained"]([trained, searched], "desk", BASE).splitlines()[2:] == [
        "| the base | 0.40 | 30.0 | 0.00 |",
        "| rl | 0.25 | 36.0 | 0.60 |",
    ]
    with pytest.raises(Lacking, match="no run measured plain text"):
        TABLES["retained"]([searched], "desk", BASE)


def test_plain_text_is_harder_to_foretell_for_weights_that_are_noise(tmp_path: Path) -> None:
    """Of the laboratory's model, which takes no download: its own lists are easier for it than for changed weights."""
    text = "Reverse the list. 3 1 4 1 5"
    model = transformers.AutoModelForCausalLM.from_pretrained(LAB)
    own, noise = perplexity(LAB, text), torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data += torch.randn(parameter.shape, generator=noise)
    model.save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(LAB).save_pretrained(tmp_path)
    assert 1.0 < own < perplexity(tmp_path, text)
