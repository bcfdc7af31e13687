"""The arithmetic of sizes against what was measured; the recipes for GPUs and the README against the arithmetic."""

import json
import re

import pytest
import yaml

from benchmarks.sizes import RESULT, TOLERANCE, Case, computed
from dspy_fst.cli.sizes import LONGEST_REPLY
from dspy_fst.config import FSTConfig
from dspy_fst.memory import DISK, Workload, find_size, imagined_machine, plan_for, vllm_share
from dspy_fst.memory.arithmetic import MicroBatchShape
from dspy_fst.memory.shape import ModelSize
from tests.docs.pages import DOCS, ROOT

GIB = 2**30
MEASURED = json.loads(RESULT.read_text()) if RESULT.is_file() else []


def name_of(row):
    case = row["case"]
    return f"{case['model']}-{case['precision']}-kl-{case['kl']}-share-{case['share']}"


def test_one_line_of_each_size_and_kl_was_measured():
    float32 = {(row["case"]["model"], row["case"]["kl"]) for row in MEASURED if row["case"]["precision"] == "float32"}
    assert float32 >= {(model, kl) for model in ("1M", "25M", "135M") for kl in (True, False)}


@pytest.mark.parametrize("row", MEASURED, ids=name_of)
def test_what_is_computed_now_is_what_was_measured_then(row):
    now = computed(ModelSize(**row["size"]), Case(**row["case"]), MicroBatchShape(**row["reading"]))
    assert now == pytest.approx(row["peak"], rel=TOLERANCE)


def recipes():
    """Project files of the page on GPUs that name a model."""
    blocks = re.findall(r"```yaml\n(.*?)```", (DOCS / "gpus.md").read_text(), re.DOTALL)
    return [block for block in map(yaml.safe_load, blocks) if "model" in block]


def test_the_recipes_for_a_card_fit_on_it_by_the_arithmetic():
    found = recipes()
    assert found
    for recipe in found:
        policy, size = recipe["policy"], find_size(recipe["model"])
        workload = Workload("it", size, policy["engine"], policy["engine_options"], policy["max_tokens"])
        plan = plan_for(workload, FSTConfig(**recipe.get("recipe", {})), imagined_machine(24 * GIB))
        assert [*plan.faults(), *plan.doubts()] == []
        assert f"micro-batches of {plan.micro_batch_tokens} tokens" in (DOCS / "gpus.md").read_text()


README_SAYS = [
    (24, "Qwen/Qwen2.5-0.5B-Instruct", "0.5B trains on a card of 24 GiB", {}),
    (48, "Qwen/Qwen2.5-1.5B-Instruct", "1.5B on 48", {}),
    (80, "Qwen/Qwen3-1.7B", "1.7B on 80", {}),
    (80, "meta-llama/Llama-3.2-3B-Instruct", "(3B with `kl_coefficient=0`)", {"kl_coefficient": 0}),
]


def fit_on(card, model, **recipe):
    available, size = imagined_machine(card * GIB), find_size(model)
    options = {"gpu_memory_utilization": vllm_share(size, available)}
    return plan_for(Workload(model, size, "vllm", options, LONGEST_REPLY), FSTConfig(**recipe), available)


@pytest.mark.parametrize(("card", "model", "words", "recipe"), README_SAYS, ids=[says[2] for says in README_SAYS])
def test_what_the_readme_says_of_cards_is_what_is_computed(card, model, words, recipe):
    assert words in " ".join((ROOT / "README.md").read_text().split())
    plan = fit_on(card, model, **recipe)
    assert [*plan.faults(), *plan.doubts()] == []


def test_the_readme_s_other_figures_are_computed_too():
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert "and 8B on none" in readme
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
