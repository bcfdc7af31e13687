"""`dspy-fst run FILE --adapter ...`, and a run with a LoRA adapter that goes on from its directory alone."""

import sys

import pytest
import yaml

from tests.cli.conftest import MODULE, SETTINGS, SOURCE, invoke

FEW = {"cycles": 1, "steps_per_cycle": 1, "search_rollouts": 4, "anchors": 2, "reflection_minibatch": 2}


@pytest.fixture
def folder(tmp_path):
    sys.modules.pop(MODULE, None)
    (tmp_path / f"{MODULE}.py").write_text(SOURCE)
    recipe = {**SETTINGS["recipe"], **FEW, "adapter": "lora"}
    (tmp_path / "project.yaml").write_text(yaml.safe_dump({**SETTINGS, "recipe": recipe, "run_dir": "run"}))
    yield tmp_path
    sys.modules.pop(MODULE, None)


def test_the_flag_replaces_the_recipe_s_adapter_and_the_run_goes_on_without_it(folder):
    invoke("run", folder, "--adapter", '{"rank": 2, "alpha": 4}')
    kept = yaml.safe_load((folder / "run" / "project.yaml").read_text())["recipe"]
    assert (kept["adapter"]["rank"], kept["adapter"]["alpha"]) == (2, 4)
    assert (folder / "run" / "weights" / "step-000001" / "shared" / "adapter_model.safetensors").is_file()
    (folder / "run" / "compiled").rename(folder / "elsewhere")
    invoke("resume", folder / "run")
    assert (folder / "run" / "compiled" / "weights" / "lora.json").is_file()


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ("rank=2", "--adapter rank=2: use lora, none, or JSON"),
        ('{"rank": 0}', "--adapter.rank=0: Input should be greater than or equal to 1"),
        ('{"target": ["qproj"]}', "target='qproj'"),
    ],
    ids=["no JSON", "rank", "target"],
)
def test_what_is_no_adapter_is_refused(folder, given, complaint):
    assert complaint in invoke("run", folder, "--adapter", given, code=2).stderr
    assert not (folder / "run" / "events.jsonl").exists()


def test_the_flag_of_a_loss_replaces_the_recipe_s_and_an_unknown_one_is_refused(folder):
    assert "--loss='ppo': Input should be 'cispo', 'grpo'" in invoke("run", folder, "--loss", "ppo", code=2).stderr
    invoke("run", folder, "--loss", "rloo")
    assert yaml.safe_load((folder / "run" / "project.yaml").read_text())["recipe"]["loss"] == "rloo"


def test_none_trains_all_weights_whatever_the_file_says_of_adapters(folder):
    project = folder / "project.yaml"
    recipe = {"adapter": {"rank": 2}, "adapters": "per_predictor", "quantized_base": "nf4"}
    given = yaml.safe_load(project.read_text())
    project.write_text(yaml.safe_dump({**given, "recipe": {**given["recipe"], **recipe}}))
    invoke("run", folder, "--adapter", "none")
    kept = yaml.safe_load((folder / "run" / "project.yaml").read_text())["recipe"]
    assert not {name for name in recipe if kept.get(name) is not None}
