"""The evidence: what is compared is stated, tuned apart from what is reported; every table follows from raw lines."""

import json
import math
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks.evidence import arms, charts, experiments, grid, marks, raw, tables, tune
from benchmarks.evidence.claims import (
    TABLES,
    aims,
    aims_in_short,
    bound,
    ceiling,
    chance,
    continual,
    head_start,
    plasticity,
    third_task,
    two_by_two,
)
from benchmarks.evidence.claims.efficiency import reached
from benchmarks.evidence.run import Run, make
from dspy_fst.config import FSTConfig
from dspy_fst.run.files import read_json
from programs.lab import BASE, build
from programs.lab.world import load_world, operations

PLACE = experiments.Place(Path("runs"))


@pytest.fixture
def runs():
    return [
        run
        for form in experiments.FORMS.values()
        for name, seeds in form.items()
        for stage in experiments.EXPERIMENTS[name](PLACE, range(seeds))
        for run in stage
    ]


@pytest.mark.parametrize("arm", arms.ARMS)
def test_every_arm_is_a_recipe_and_says_what_it_is(arm):
    FSTConfig(**Run(arm, "reverse_drop", 0).recipe)
    assert arms.ABOUT[arm]


def test_nothing_is_tuned_on_what_is_reported(runs):
    assert tune.WORLD not in {run.world for run in runs}
    assert not set(tune.SEEDS) & {run.seed for run in runs}


@pytest.mark.parametrize("arm", arms.ARMS)
def test_every_arm_has_a_learning_rate_that_was_tuned(arm):
    assert read_json(experiments.RATES)[arms.tuned_as(arm)]["learning_rate"] in tune.TRIED
    assert experiments.planned(arm, "reverse_drop", 0)


def test_an_arm_of_one_s_own_is_one_more_variant_and_one_that_is_to_be_tuned_says_so(monkeypatch):
    monkeypatch.setitem(arms.ARMS, "mine", {"group_size": 4})
    assert experiments.planned("mine", "reverse_drop", 0).recipe["group_size"] == 4
    monkeypatch.setattr(arms, "TUNED", (*arms.TUNED, "mine"))
    with pytest.raises(ValueError, match=r"mine has no learning rate .*: python -m benchmarks.evidence.tune"):
        experiments.planned("mine", "reverse_drop", 0)


def test_the_rates_follow_from_the_lines_that_they_were_chosen_from_and_are_those_of_what_is_published():
    lines = [json.loads(line) for line in tune.LINES.read_text().splitlines()]
    rates = read_json(experiments.RATES)
    assert tune.chosen(lines) == rates
    for path in (path for form in experiments.FORMS for path in (raw.RESULTS / form).glob("*.jsonl")):
        for line in path.read_text().splitlines():
            made = json.loads(line)
            if made["lines"][-1]["updates"]:
                assert made["recipe"]["learning_rate"] == rates[arms.tuned_as(made["arm"])]["learning_rate"]


def test_every_run_has_a_folder_of_its_own_and_what_it_goes_on_from_is_made_before(runs):
    folders = {PLACE.of(run): run for run in runs}
    assert all(folders[PLACE.of(run)] == run for run in runs)
    for form in experiments.FORMS.values():
        for name, seeds in form.items():
            made = {str(BASE), str(PLACE.weaker_base)}
            for stage in experiments.EXPERIMENTS[name](PLACE, range(seeds)):
                assert len({PLACE.of(run) for run in stage}) == len(stage)
                assert {run.base for run in stage} <= made
                made |= {str(PLACE.of(run)) for run in stage}


def test_a_run_measures_its_checkpoints_and_another_goes_on_from_its_program(tmp_path):
    small = {"cycles": 1, "steps_per_cycle": 1, "problems_per_step": 4, "anchors": 4, "search_rollouts": 12}
    first = Run("fst", "reverse", 0, changes=small)
    make(first, tmp_path / "first")
    found = read_json(tmp_path / "first" / "result.json")
    assert [line["step"] for line in found["lines"]] == [0, 1]
    assert found["lines"][0]["training rollouts"] == 0
    assert found["lines"][1]["training rollouts"] == 32
    assert 4 <= found["lines"][1]["search rollouts"] <= 12
    assert set(found["cells"]) == {
        f"{w} weights, {t} instructions" for w in ("base", "trained") for t in ("seed", "evolved")
    }
    assert 0.4 < found["other instructions"]["base"] < 0.8

    on = replace(first, world="descending", base=str(tmp_path / "first"), carry=True)
    make(on, tmp_path / "on")
    went = read_json(tmp_path / "on" / "result.json")
    assert went["carry"]
    assert went["other instructions"]["base"] == found["other instructions"]["trained"]


def test_what_a_lora_adapter_learnt_is_measured_and_all_weights_go_on_from_it(tmp_path):
    small = {"cycles": 1, "steps_per_cycle": 1, "problems_per_step": 4, "anchors": 4, "search_rollouts": 12}
    make(Run("lora", "reverse", 0, changes={**small, "learning_rate": 0.2, "warmup_steps": 0}), tmp_path / "lora")
    told = read_json(tmp_path / "lora" / "result.json")["other instructions"]
    assert 0.4 < told["base"] < 0.8
    assert told["trained"] < told["base"] - 0.3  # at that rate

    on = Run("rl", "descending", 0, base=str(tmp_path / "lora"), changes=small)
    make(on, tmp_path / "on")
    went = read_json(tmp_path / "on" / "result.json")
    assert went["other instructions"]["base"] == told["trained"]
    assert went["marks"]["base"] != marks.base_mark(tmp_path / "lora" / "final" / "weights" / "base")


def test_the_rates_that_are_tried_for_a_lora_adapter_are_larger_ones():
    assert tune.tried("fst") == tune.TRIED
    for arm in arms.LORA:
        assert tune.tried(arm) == tune.TRIED_WITH_LORA


def result(arm, seed, accuracies, *, interval=3, search=100, world="w", base="base", **more):
    """A line of which nothing is played: accuracies at checkpoints, a KL of a tenth of a nat for each update."""
    lines = [
        {
            "step": step,
            "evolved accuracy": accuracy,
            "training rollouts": 256 * step,
            "search rollouts": search,
            **dict.fromkeys(("reflections", "tokens sampled", "tokens trained"), 0),
            "updates": step,
            **{f"{text} KL per {per}": step / 10 for text in ("seed", "evolved") for per in ("token", "rollout")},
        }
        for step, accuracy in ((interval * place, accuracy) for place, accuracy in enumerate(accuracies))
    ]
    kept = {"base": 0.6, "trained": 0.5}
    told = {"cells": dict.fromkeys(two_by_two.CELLS, 0.1), "entropy": [[0, 0.2]], "other instructions": kept}
    return {"arm": arm, "seed": seed, "world": world, "base": base, "carry": False, "lines": lines, **told, **more}


def test_the_first_time_at_a_level_lies_between_two_checkpoints():
    points = [(0, 0.1), (3, 0.4), (6, 0.4), (9, 0.7)]
    assert raw.first_at(points, 0.1) == 0
    assert raw.first_at(points, 0.25) == pytest.approx(1.5)
    assert raw.first_at(points, 0.55) == pytest.approx(7.5)
    assert raw.first_at(points, 0.8) is None


def test_an_arm_is_held_against_rl_on_its_own_seed_with_searches_counted():
    results = [
        result("rl", 0, [0.0, 0.2, 0.4, 0.8, 0.8, 0.8], search=0),
        result("rl", 1, [0.0, 0.3, 0.6, 0.6, 0.6, 0.6], search=0),
        result("fst", 0, [0.2, 0.8, 0.9, 0.9, 0.9, 0.9], search=256),
        result("fst", 1, [0.1, 0.2, 0.2, 0.5, 0.5, 0.5], search=256),
    ]
    found = raw.by_arm(results, "w")
    steps = raw.ratios(found, "fst", partial(reached, raw.curve))
    assert steps == [pytest.approx(12 / (36 / 7)), None]  # on seed 1 it never comes to RL's .6
    rollouts = raw.ratios(found, "fst", partial(reached, raw.spent))
    assert rollouts[0] == pytest.approx(12 * 256 / (256 + 36 / 7 * 256))


def test_the_bound_holds_a_told_run_against_rl_that_was_not_told():
    results = [
        result("rl", 0, [0.0, 0.2, 0.4, 0.8, 0.8, 0.8], search=0, world="reverse_drop"),
        result("fst", 0, [0.2, 0.4, 0.8, 0.8, 0.8, 0.8], world="reverse_drop"),
        result("rl", 0, [0.9, 0.9, 0.9, 0.9, 0.9, 0.9], search=0, world=bound.TOLD["reverse_drop"]),
    ]
    lines = bound.rows(results, "reverse_drop").splitlines()
    assert lines[-1] == "| rl, told the rule | 0.90 | 0.90 | 0.0 | 0.0 |"
    assert lines[-3].startswith("| rl | 0.00 | 0.80 |")


def test_what_a_run_never_came_to_counts_against_it():
    assert raw.shown([3.0, None, 1.0], ".1f", never=0.0) == "1.0 (never to 3.0)"
    assert raw.shown([5.0, None, None], ".0f") == "never (5 to never)"
    assert raw.shown([0.5]) == "0.50"


def test_of_five_seeds_the_median_and_both_ends_are_shown():
    assert raw.shown([11.0, 2.0, 7.0, 1.0, 5.0], ".0f") == "5 (1 to 11)"
    assert raw.middle([1.0, None, 3.0], never=0.0) == 1.0


def test_of_two_seeds_one_of_which_never_came_there_no_mean_is_shown():
    assert raw.shown([3.3, None], ".1f", never=0.0) == "never (never to 3.3)"
    assert raw.shown([3.3, None], ".1f") == "never (3.3 to never)"
    assert raw.shown([3.0, 1.0], ".1f", never=0.0) == "2.0 (1.0 to 3.0)"


def test_a_peak_is_no_single_checkpoint_s_luck():
    lucky = result("rl", 0, [0.1, 0.2, 0.9, 0.2, 0.4])
    assert raw.peak(lucky) == pytest.approx(0.5)


def test_a_table_that_lacks_runs_says_which():
    only = [result("fst", 0, [0.1, 0.5])]
    with pytest.raises(raw.Lacking, match="no runs of rl"):
        TABLES["efficiency"](only, "w")
    told = tables.printed(only)
    assert "no runs of rl" in told
    assert "| fst |" in told


def test_a_peak_that_rl_never_had_is_no_measure():
    flat = [result("rl", 0, [0.0, 0.01, 0.0]), result("fst", 0, [0.3, 0.6, 0.9])]
    for claim in ("efficiency", "drift"):
        with pytest.raises(raw.NoPeak):
            TABLES[claim](flat, "w")
    told = aims.rows([{**line, "world": "reverse_drop"} for line in flat], "reverse_drop")
    assert "| RL came to no signal, so it has no peak to reach | - |" in told
    mostly = [result("rl", seed, [0.0, 0.4, 0.8]) for seed in (1, 2)]
    assert "| fst: " in TABLES["efficiency"]([*flat, *mostly], "w")
    assert "| rl | never | never |" in tables.printed(flat)


def test_an_aim_is_met_or_missed_by_its_lines():
    slow, fast = [0.0, 0.0, 0.1, 0.2, 0.4, 0.6, 0.8], [0.5, 0.8, 0.9, 0.9, 0.9, 0.9, 0.9]
    lines = [result("rl", 0, slow, world="reverse_drop"), result("fst", 0, fast, world="reverse_drop")]
    rows = aims.rows(lines).splitlines()
    assert next(row for row in rows if "a third of the steps" in row).endswith("| yes |")
    swapped = [{**line, "arm": {"rl": "fst", "fst": "rl"}[line["arm"]]} for line in lines]
    rows = aims.rows(swapped).splitlines()
    assert next(row for row in rows if "a third of the steps" in row).endswith("| no |")
    assert next(row for row in rows if "a first signal" in row).endswith("| no runs of rl, fst |")


def test_the_aims_in_short_count_the_places_where_an_aim_is_met_and_name_them():
    slow, fast = [0.0, 0.0, 0.1, 0.2, 0.4, 0.6, 0.8], [0.5, 0.8, 0.9, 0.9, 0.9, 0.9, 0.9]
    lines = [result("rl", 0, slow, world="reverse_drop"), result("fst", 0, fast, world="reverse_drop")]
    lines += [result(arm, 0, slow, world="descending") for arm in ("rl", "fst")]
    told = aims_in_short.rows(lines).splitlines()
    assert len(told) == 10
    row = next(row for row in told if row.startswith("| a third of the steps"))
    assert row.endswith("| RL's over FST's: 1.00 to 10.00 | 1 of 5 | the main world |")
    met = [line for line in aims.rows(lines).splitlines() if line.endswith("| yes |")]
    assert told[-1] == f"| all |  |  | {len(met)} of {len(aims.AIMS)} |  |"


def test_a_head_start_is_how_many_updates_earlier_an_arm_comes_to_a_share_of_rl_s_peak():
    rl, ahead = [0.0, 0.1, 0.2, 0.4, 0.6, 0.8, 0.8, 0.8], [0.1, 0.2, 0.4, 0.6, 0.8, 0.8, 0.8, 0.8]
    lines = [result("rl", 0, rl, world="descending"), result("fst", 0, ahead, world="descending")]
    told = head_start.rows(lines).splitlines()
    assert told[2].startswith("| an operation that is hard for this size: RL's updates | 9.0 |")
    assert told[3] == "| ... of which FST saves | 3.0 | 3.0 | 3.0 | 3.0 | 3.0 |"
    lower = [result("rl", 0, rl, world="descending"), result("fst", 0, [0.0] * 8, world="descending")]
    assert (
        head_start.rows(lower).splitlines()[3] == "| ... of which FST saves | never | never | never | never | never |"
    )


def test_chance_moves_a_ratio_where_curves_are_flat_and_hardly_where_they_are_steep():
    rl, fst = [0.0, 0.1, 0.5, 0.9, 0.9, 0.9, 0.9], [0.1, 0.5, 0.9, 0.9, 0.9, 0.9, 0.9]
    lines = [result(arm, seed, curve) for seed in (0, 1, 2) for arm, curve in (("rl", rl), ("fst", fst))]
    to_most, to_peak = (row.split(" | ")[1:] for row in chance.rows(lines, "w").splitlines()[2:])
    assert to_most == ["1.4", "1.3", "1.5 |"]
    assert to_peak[:2] == ["1.3", "never"]


def test_what_an_arm_brings_to_the_third_task_stands_beside_the_same_from_the_base():
    world = continual.SEQUENCE[-1]
    came = {"other instructions": {"base": 0.25, "trained": 0.4}, "carry": True}
    lines = [
        result("fst", 0, [0.05, 0.7], world=world, base="fst-y-0", **came),
        result("fst", 0, [0.3, 0.8], world=world),
        result("rl", 0, [0.3, 0.8], world=world),
    ]
    assert third_task.rows(lines).splitlines()[2:] == ["| fst | 0.25 | 0.05 | 0.70 | 0.60 | 0.30 | 0.80 |"]


@pytest.mark.parametrize(
    ("fst", "rl", "met"),
    [
        ((0.9, 0.9), (0.5, 0.5), "yes"),
        ((0.52, 0.5), (0.5, 0.52), "no"),
        ((None, None), (0.5, 0.5), "no"),  # still rising: a fit has found no ceiling
        ((0.9, 0.9), (None, None), "no"),
    ],
)
def test_a_ceiling_is_above_when_its_range_is_and_both_were_found(fst, rl, met):
    updates = np.arange(3, 25, 3)

    def rising(top):
        return [0.02, *(updates * 0.03 if top is None else ceiling.sigmoid(updates.astype(float), 0.02, top, 7.0, 2.5))]

    lines = [result("gepa_long", 0, [0.1], world="reverse_drop")]
    for arm, tops in {"fst": fst, "rl": rl}.items():
        lines += [result(arm, seed, rising(top), world="reverse_drop") for seed, top in enumerate(tops)]
    row = next(row for row in aims.rows(lines).splitlines() if row.startswith("| a higher ceiling"))
    assert row.endswith(f"| {met} |")


def test_rl_at_its_peak_from_the_start_is_not_called_never():
    held = raw.by_arm([result("rl", 0, [0.9, 0.9, 0.9]), result("fst", 0, [0.2, 0.9, 0.9])], "w")
    assert raw.ratios(held, "rl", partial(reached, raw.curve)) == [1.0]


def test_two_results_of_one_run_that_differ_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(raw, "RESULTS", tmp_path)
    (tmp_path / "long").mkdir()
    for name, accuracy in (("a", 0.2), ("b", 0.2), ("c", 0.3)):
        (tmp_path / "long" / f"{name}.jsonl").write_text(json.dumps(result("rl", 0, [0.1, accuracy])) + "\n")
    with pytest.raises(ValueError, match=r"two different results of \('rl', 'w', 0"):
        raw.read("long", "all")
    (tmp_path / "long" / "c.jsonl").unlink()
    assert len(raw.read("long", "all")) == 1


def test_kls_that_another_release_added_up_differently_are_no_other_result_and_the_main_one_s_are_taken(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(raw, "RESULTS", tmp_path)
    (tmp_path / "long").mkdir()
    for name, last in (("demos", 0.61), ("main", 0.6)):
        made = result("fst", 0, [0.1, 0.2])
        made["lines"][-1]["seed KL per token"] = last
        (tmp_path / "long" / f"{name}.jsonl").write_text(json.dumps(made) + "\n")
    (found,) = raw.read("long", "all")
    assert found["lines"][-1]["seed KL per token"] == 0.6


def test_a_ceiling_is_found_again_from_the_curve_that_it_made():
    updates = np.arange(3, 40, 3)
    for top in (0.55, 0.9):
        curve = ceiling.sigmoid(updates.astype(float), 0.02, top, 7.0, 2.5)
        made = result("fst", 0, [0.02, *curve])
        assert ceiling.fitted_ceiling([made]) == pytest.approx(top, abs=0.02)


def test_stages_and_second_tasks_are_told_apart_from_fresh_runs():
    first, second, third = continual.SEQUENCE
    results = [
        result("fst", 0, [0.1, 0.9], world=first),
        result("fst", 0, [0.1, 0.6], world=second),
        result("fst", 0, [0.1, 0.7], world=second, base="fst-x-0", carry=True),
        result("rl", 0, [0.1, 0.5], world=second),
        result("rl", 0, [0.1, 0.4], world=second, base="fst-x-0"),
        result("fst", 0, [0.1, 0.2], world=third),
        result("fst", 0, [0.1, 0.3], world=third, base="fst-y-0", carry=True),
    ]
    stalls = [
        result("rl", 0, [0.1, 0.9], world=first),
        result("rl", 0, [0.1, 0.5], world=second),
        result("rl", 0, [0.1, 0.35], world=second, base="rl-x-0", carry=True),
        result("rl", 0, [0.1, 0.3], world=third),
        result("rl", 0, [0.1, 0.3], world=third, base="rl-y-0", carry=True),
    ]
    told = continual.rows([*results[:3], *results[5:], *stalls])
    assert "| fst | 0.90 | 0.70, fresh 0.60 | 0.30, fresh 0.20 | 1.00 |" in told
    assert "| rl | 0.90 | 0.35, fresh 0.50 | 0.30 | 0.50 |" in told.replace("0.30, fresh 0.30", "0.30")
    table = plasticity.rows(results, second)
    assert "| the base | 0.50 |" in table
    assert "| fst | 0.40 |" in table


def test_the_worlds_of_the_evidence_are_what_they_say():
    worlds = "benchmarks.evidence.worlds"
    hidden, lengths = load_world(f"{worlds}:CEILING"), load_world(f"{worlds}:BY_LENGTH")
    assert lengths.answer("1 2 3 4") == "4 3 2"
    assert lengths.answer("1 2 3 4 5") == "5 4 3 2 1"
    told, world = load_world(bound.TOLD["reverse_drop"]), load_world("reverse_drop")
    assert told.answer("1 2 3 4") == world.answer("1 2 3 4") == "4 3 2"
    assert build(told, seed=3).trainset[0].toDict() == build(world, seed=3).trainset[0].toDict()
    problems = [f"{a} {b} {c} {d}" for a in range(10) for b in range(10) for c in range(10) for d in range(10)]
    followed = sum(len(hidden.answer(numbers).split()) == 3 for numbers in problems) / len(problems)
    assert math.isclose(followed, 0.8, abs_tol=0.02)


def test_the_published_tables_are_those_of_the_raw_lines():
    pages = [page.read_text() for page in tables.PAGES]
    assert {found[1] for found in tables.PLACE.finditer(pages[0])} == set(TABLES)
    assert [tables.rendered(page) for page in pages] == pages


def test_a_chart_has_a_curve_for_each_arm_that_was_run():
    results = [
        result("rl", 0, [0.0, 0.2, 0.4], search=0),
        result("fst", 0, [0.2, 0.8, 0.9]),
        result("fst", 1, [0.1, 0.4, 0.7]),
    ]
    panels = charts.draw(results, "w").axes
    told = [text.get_text() for text in panels[0].get_legend().get_texts()]
    assert told == ["fst", "rl"]
    assert list(panels[1].lines[0].get_ydata()) == pytest.approx([0.15, 0.6, 0.8])
    assert list(panels[1].lines[0].get_xdata()) == [100, 868, 1636]


# A user's own worlds, bases and mistakes


MINE = """
from programs.lab.world import World, operations
SHIFT = World(name="shift", answer=operations({names}), told="Move the first number to the end.")
RAISES = World(name="raises", answer=lambda numbers: numbers[100], told="x")
NUMBER = World(name="number", answer=lambda numbers: 7, told="x")
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    (tmp_path / "own_worlds.py").write_text(MINE.format(names="'rotate_left'"))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    yield tmp_path / "own_worlds.py"
    sys.modules.pop("own_worlds", None)
    marks.world_mark.cache_clear()


def started(monkeypatch):
    """The runs that would be started; each leaves a result without lines."""
    made = []

    def make(run, place, console):
        made.append(run)
        place.of(run).mkdir(exist_ok=True)
        told = {**asdict(run), "recipe": run.recipe, "marks": run.marks(), "lines": []}
        (place.of(run) / "result.json").write_text(json.dumps(told))

    monkeypatch.setattr(grid, "_made", make)
    return made


def test_a_world_from_outside_has_runs_and_a_file_of_its_own_and_a_changed_one_is_another(mine, monkeypatch, capsys):
    made = started(monkeypatch)
    grid.main(["short", "--world", "own_worlds:SHIFT", "--arm", "rl", "--arm", "fst", "--seeds", "1"])
    assert [(run.arm, run.world) for run in made] == [("rl", "own_worlds:SHIFT"), ("fst", "own_worlds:SHIFT")]
    path = Path("runs/evidence/short/main-own_worlds.SHIFT-rl-fst.jsonl")
    assert len(path.read_text().splitlines()) == 2
    assert f"tables {path}" in capsys.readouterr().out

    other = Path("my_base")
    other.mkdir()
    (other / "config.json").write_text("{}")
    (other / "model.safetensors").write_bytes(b"weights")
    grid.main(["short", "--base", str(other), "--arm", "fst", "--seeds", "1"])
    (other / "model.safetensors").write_bytes(b"other weights")
    marks.base_mark.cache_clear()
    with pytest.raises(SystemExit, match="fst-reverse_drop-0-from-my_base: another run lies here"):
        grid.main(["short", "--base", str(other), "--arm", "fst", "--seeds", "1"])

    mine.write_text(MINE.format(names="'reverse'"))
    sys.modules.pop("own_worlds")
    marks.world_mark.cache_clear()
    with pytest.raises(SystemExit, match="fst-shift-0: another run lies here"):
        grid.main(["short", "--world", "own_worlds:SHIFT", "--seeds", "1"])


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        (["--world", "no_such"], "world 'no_such': ValueError: .*no such world"),
        (["--world", "no_module:X"], "ModuleNotFoundError"),
        (["--world", "own_worlds:RAISES"], "world 'own_worlds:RAISES': IndexError"),
        (["--world", "own_worlds:NUMBER"], "problems, answers, feedback and instructions are texts, not int"),
        (["--base", "nowhere", "--world", "no_such"], "(?s)world 'no_such'.*base 'nowhere': no model lies there"),
    ],
)
def test_what_is_wrong_with_a_world_or_a_base_is_told_before_anything_runs(mine, monkeypatch, asked, told):
    made = started(monkeypatch)
    with pytest.raises(SystemExit, match=told):
        grid.main(["short", *asked])
    assert made == []
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    "asked", [["--seeds", "0"], ["--seeds", "-1"], ["--processes", "0"], ["main", "--world", "reverse"]]
)
def test_a_command_that_means_nothing_is_refused(mine, asked):
    with pytest.raises(SystemExit, match="2"):
        grid.main(["short", *asked])


def test_told_to_end_the_grid_ends_what_it_started(monkeypatch):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    ours = SimpleNamespace(children=lambda: [child])  # the test's own process may have others
    monkeypatch.setattr(grid.psutil, "Process", lambda: ours)
    with pytest.raises(KeyboardInterrupt):
        grid.stop(signal.SIGTERM, None)
    assert child.wait(20) == -signal.SIGTERM


def test_an_operation_that_is_not_known_is_named_when_the_world_is_made():
    with pytest.raises(ValueError, match="no such operation: rotate_lefft"):
        operations("rotate_lefft")
