"""The arithmetic of sizes against what was measured; the recipes for GPUs and the README against the arithmetic."""

import dataclasses
import json
import re

import pytest
import yaml

from benchmarks.sizes import RESULT, TOLERANCE, Case, computed
from dspy_fst.cli.sizes import LONGEST_REPLY, _fitting
from dspy_fst.config import FSTConfig
from dspy_fst.memory import DISK, Workload, find_size, fitting_share, imagined_machine, plan_for
from dspy_fst.memory.arithmetic import MicroBatchShape
from dspy_fst.memory.shape import ModelSize
from tests.docs.pages import DOCS, ROOT

GIB = 2**30
MEASURED = json.loads(RESULT.read_text()) if RESULT.is_file() else []


def name_of(row):
    case = row["case"]
    ways = [name for name in ("recompute", "lora") if case.get(name)]
    return "-".join([case["model"], case["precision"], f"kl-{case['kl']}", f"share-{case['share']}", *ways])


def test_one_line_of_each_size_and_kl_was_measured():
    float32 = {(row["case"]["model"], row["case"]["kl"]) for row in MEASURED if row["case"]["precision"] == "float32"}
    assert float32 >= {(model, kl) for model in ("1M", "25M", "135M") for kl in (True, False)}


@pytest.mark.parametrize("row", MEASURED, ids=name_of)
def test_what_is_computed_now_is_what_was_measured_then(row):
    now = computed(ModelSize(**row["size"]), Case(**row["case"]), MicroBatchShape(**row["reading"]))
    assert now == pytest.approx(row["peak"], rel=TOLERANCE)


def recipes(*, by_turns=False):
    """Project files of the page on GPUs that name a model, and the GiB of the card that each is for."""
    blocks = re.findall(r"```yaml\n(.*?)```", (DOCS / "gpus.md").read_text(), re.DOTALL)
    found = [(re.search(r"# one card of (\d+) GiB", block), yaml.safe_load(block)) for block in blocks]
    named = [(card and int(card[1]), recipe) for card, recipe in found if "model" in recipe]
    return [
        (card, recipe) for card, recipe in named if ("sleep_level" in recipe["policy"]["engine_options"]) is by_turns
    ]


@pytest.mark.parametrize(("card", "recipe"), recipes(), ids=[f"{recipe['model']}-{card}" for card, recipe in recipes()])
def test_a_recipe_for_a_card_fits_on_it_by_the_arithmetic(card, recipe):
    policy, size = recipe["policy"], find_size(recipe["model"])
    workload = Workload("it", size, policy["engine"], policy["engine_options"], policy["max_tokens"])
    plan = plan_for(workload, FSTConfig(**recipe.get("recipe", {})), imagined_machine(card * GIB))
    assert [*plan.faults(), *plan.doubts()] == []
    held = {a.part: a.certain / GIB for need in plan.requirements for a in need.allocations if "GPU" in need.place}
    row = [f"{size.parameters / 1e9:.1f}B", f"{card} GiB", "all weights" if not plan.adapter else "LoRA"]
    row += [f"{held['the trainer']:.1f}", f"{held['the engine']:.1f}", f"{plan.micro_batch_tokens:,}"]
    row += ["yes" if plan.gradient_checkpointing else "no"]
    assert f"| {' | '.join(row)} |" in (DOCS / "gpus.md").read_text()


def plan_of(card, recipe, **options):
    policy, size = recipe["policy"], find_size(recipe["model"])
    workload = Workload("it", size, "vllm", {**policy["engine_options"], **options}, policy["max_tokens"])
    return plan_for(workload, FSTConfig(**recipe.get("recipe", {})), imagined_machine(card * GIB))


@pytest.mark.parametrize(
    ("card", "recipe"),
    recipes(by_turns=True),
    ids=[f"{recipe['model']}-{card}" for card, recipe in recipes(by_turns=True)],
)
def test_a_recipe_by_turns_fits_by_the_arithmetic_and_is_in_the_table(card, recipe):
    plan, beside = plan_of(card, recipe), plan_of(card, recipe, sleep_level=None)
    assert [*plan.faults(), *plan.doubts()] == []
    held = {allocation.part: allocation for need in plan.requirements for allocation in need.allocations}
    engine, moved = held["the engine"], held["the engine's weights while it sleeps"]
    sizes = (held["the trainer"].certain, engine.certain + engine.sure, engine.certain, moved.certain)
    row = [f"{plan.parameters / 1e9:.1f}B", f"{card} GiB", "LoRA" if plan.adapter else "all weights"]
    row += [*(f"{size / GIB:.1f}" for size in sizes), f"{plan.micro_batch_tokens:,}", _fitting(beside)]
    assert f"| {' | '.join(row)} |" in (DOCS / "gpus.md").read_text()


def test_the_page_has_a_recipe_for_each_of_these():
    assert {(card, recipe["model"]) for card, recipe in recipes()} >= {
        (24, "Qwen/Qwen3-0.6B"),
        (24, "Qwen/Qwen3-4B"),
        (80, "Qwen/Qwen3-1.7B"),
        (80, "Qwen/Qwen3-8B"),
    }


README_SAYS = [
    (24, "Qwen/Qwen2.5-0.5B-Instruct", "0.5B trains on a card of 24 GiB", {}),
    (48, "Qwen/Qwen2.5-1.5B-Instruct", "1.5B on 48", {}),
    (80, "meta-llama/Llama-3.2-3B-Instruct", "3B on 80", {}),
    (24, "Qwen/Qwen3-4B", "4B on 24 and 8B on 80", {"adapter": "lora"}),
    (80, "Qwen/Qwen3-8B", "4B on 24 and 8B on 80", {"adapter": "lora"}),
]


def fit_on(card, model, **recipe):
    available, config = imagined_machine(card * GIB), FSTConfig(**recipe)
    workload = Workload(model, find_size(model), "vllm", longest_reply=LONGEST_REPLY)
    options = {"gpu_memory_utilization": fitting_share(workload, config, available)}
    return plan_for(dataclasses.replace(workload, options=options), config, available)


@pytest.mark.parametrize(
    ("card", "model", "words", "recipe"), README_SAYS, ids=[f"{says[1]}-{says[0]}" for says in README_SAYS]
)
def test_what_the_readme_says_of_cards_is_what_is_computed(card, model, words, recipe):
    assert words in " ".join((ROOT / "README.md").read_text().split())
    plan = fit_on(card, model, **recipe)
    assert [*plan.faults(), *plan.doubts()] == []


def test_the_readme_s_other_figures_are_computed_too():
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert "With all weights 8B fits on none" in readme
    assert fit_on(80, "Qwen/Qwen3-8B").faults()
    disk = next(
        requirement.certain for requirement in fit_on(24, "Qwen/Qwen3-0.6B").requirements if requirement.place == DISK
    )
    assert f"A run of 0.6B keeps up to {disk / GIB:.0f} GiB" in readme


def test_what_the_page_says_of_the_disk_at_8b_is_computed():
    plan = fit_on(80, "Qwen/Qwen3-8B")
    weights, states = (
        allocation.certain / GIB
        for requirement in plan.requirements
        for allocation in requirement.allocations
        if allocation.place == DISK
    )
    update = (plan.writes.weights + plan.writes.state) / GIB
    page = " ".join((DOCS / "sizes.md").read_text().split())
    assert (
        f"keeps {weights:.0f} GiB of weights and {states:.0f} GiB of states, and writes {update:.0f} GiB at every"
        in page
    )
    assert f"{plan.writes.weights / GIB:.0f} GiB of weights, which it must publish" in page
    assert f"Over {plan.writes.updates} updates that is {plan.writes.total / 2**40:.0f} TiB" in page
