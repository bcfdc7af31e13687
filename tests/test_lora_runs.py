"""compile() with a LoRA adapter, end to end on the laboratory's base model, and whatever reads such a run."""

import dspy
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import dspy_fst
from dspy_fst import ConfigurationError, FSTConfig, LoRA
from dspy_fst.engine.base import Checkpoint
from dspy_fst.evaluation.run_reader import RunReader
from dspy_fst.evaluation.two_by_two_table import two_by_two
from dspy_fst.memory.does_it_fit import counted
from dspy_fst.policy_lm import policy_of
from dspy_fst.run.directory import read_events
from dspy_fst.saving.export import export
from dspy_fst.saving.manifest import weights_faults
from dspy_fst.slow.trainer import Trainer
from dspy_fst.slow.training_settings import TrainingSettings
from dspy_fst.training.result import start_of
from programs.lab import BASE, build
from tests.relay import any_answer, relay
from tests.test_compile import compile_relay, speaks, told

ADAPTER = LoRA(rank=4)
RATE = {"adapter": ADAPTER, "learning_rate": 5e-3, "warmup_steps": 0}
SHORT_RUN = {"cycles": 1, "steps_per_cycle": 1, "method": "rl"}
ONE = "adapter_model.safetensors"
SEQUENCES = [[5, 6, 7, 8, 9], [11, 3, 2, 40, 17, 8]]


def scores(folder) -> torch.Tensor:
    trainer = Trainer(folder, TrainingSettings(), device="cpu")
    return torch.tensor([value for row in trainer.score(SEQUENCES) for value in row])


def served(program) -> torch.Tensor:
    rows = policy_of(program).handle.ready().score(SEQUENCES)
    return torch.tensor([value for row in rows for value in row])


@pytest.fixture(scope="module")
def heard():
    """Every event that the run of `run` told, also those that are not kept."""
    return []


@pytest.fixture(scope="module")
def run(tmp_path_factory, heard):
    """A run's directory, and the program that it returned, whose engine still serves."""
    run_dir = tmp_path_factory.mktemp("lora") / "run"
    compiled = compile_relay(run_dir, listeners=[heard.append], **RATE)
    yield run_dir, compiled
    policy_of(compiled).release()


def test_texts_and_adapter_are_trained_together(run):
    run_dir, compiled = run
    steps = [event["report"] for event in read_events(run_dir) if event["event"] == "step"]
    assert [step["step"] for step in steps] == [0, 1, 2, 3]
    for step in steps:
        assert step["update"]["rows"] > 0
        assert (
            step["update"]["max_log_ratio"] < 1e-4
        )  # the engine's tokens under its adapter, scored under the trainer's
    assert steps[-1]["update"]["kl_to_start"] > 0
    assert any("brief" in text for member in compiled.population.members for text in member.texts.values())
    assert speaks(compiled)
    moved = policy_of(compiled).checkpoint
    assert (moved.path, [adapter.name for adapter in moved.adapters]) == (run_dir / "weights" / "base", ["shared"])
    assert float((scores(moved.folder) - scores(start_of(compiled).folder)).abs().max()) > 1e-3
    assert torch.allclose(scores(start_of(compiled).folder), scores(BASE), atol=1e-6)
    assert torch.allclose(served(compiled), scores(moved.folder), atol=1e-4)


def test_the_plan_of_a_run_says_what_is_trained_and_why(run, heard):
    run_dir, _ = run
    notes = [event["text"] for event in heard if event["event"] == "note"]
    numbers = sum(tensor.numel() for tensor in load_file(run_dir / "weights" / "step-000000" / "shared" / ONE).values())
    assert f"trained: a LoRA adapter of {counted(numbers)} numbers, as the recipe's adapter says" in notes


def test_a_step_writes_megabytes_where_whole_weights_are_gigabytes(run):
    run_dir, _ = run
    base = size_of(run_dir / "weights" / "base")
    versions = [path for path in (run_dir / "weights").iterdir() if path.name != "base"]
    states = sorted((run_dir / "states").iterdir())
    assert len(versions) == 3  # the first, and the two newest
    adapter = load_file(versions[0] / "shared" / "adapter_model.safetensors")
    numbers = sum(tensor.numel() for tensor in adapter.values())
    assert all(size_of(version) < 4 * numbers + 20_000 for version in versions)
    assert size_of(states[-1]) < 3 * 4 * numbers + 60_000
    assert 4 * numbers < base / 10


def size_of(folder) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_a_continued_run_equals_an_uninterrupted_one(run, tmp_path):
    run_dir, whole = run

    class KilledError(Exception):
        pass

    def kill(event):
        if event["event"] == "step" and event["report"]["step"] == 2:
            raise KilledError  # after the event was written and before the state was committed

    with pytest.raises(KilledError):
        compile_relay(tmp_path / "killed", listeners=[kill], **RATE)
    resumed = compile_relay(tmp_path / "killed", **RATE)
    policy_of(resumed).release()
    first, second = (policy_of(program).checkpoint.adapters[0].path for program in (whole, resumed))
    tensors = [load_file(path / "adapter_model.safetensors") for path in (first, second)]
    assert all(tensors[0][name].equal(tensors[1][name]) for name in tensors[0])
    assert whole.population == resumed.population
    kept = [[told(event) for event in read_events(path)] for path in (run_dir, tmp_path / "killed")]
    assert kept[0] == kept[1]


def test_another_adapter_does_not_continue_the_directory(run):
    run_dir, _ = run
    with pytest.raises(ConfigurationError, match=r"adapter \(there LoRA\(rank=4, .*\), now LoRA\(rank=8"):
        compile_relay(run_dir, **{**RATE, "adapter": LoRA(rank=8)})
    with pytest.raises(ConfigurationError, match=r"adapter \(there LoRA\(rank=4, .*\), now None"):
        compile_relay(run_dir, **{**RATE, "adapter": None})


def test_a_saved_program_holds_base_and_adapter_and_speaks_with_them(run, tmp_path):
    _, compiled = run
    dspy_fst.save(compiled, tmp_path / "saved")
    loaded = dspy_fst.load(tmp_path / "saved", relay(), engine="in_process")
    assert policy_of(loaded).checkpoint.path == tmp_path / "saved" / "weights" / "base"
    assert torch.equal(served(loaded), served(compiled))
    policy_of(loaded).release()


@pytest.mark.parametrize("damage", ["base", "config", "file"])
def test_a_saved_program_that_leads_elsewhere_is_not_loaded(run, tmp_path, damage):
    _, compiled = run
    saved = dspy_fst.save(compiled, tmp_path / "saved")
    config = saved / "weights" / "shared" / "adapter_config.json"
    if damage == "base":
        (saved / "weights" / "lora.json").write_text('{"format": 1, "base": "../base", "adapters": ["shared"]}')
    elif damage == "config":
        text = config.read_text().replace('"base_model_name_or_path": null', '"base_model_name_or_path": "/etc"')
        config.write_text(text)
    else:
        (config.parent / "code.py").write_text("")
    (fault,) = weights_faults(saved / "weights")
    words = {"base": "its base lies elsewhere", "config": "names another model", "file": "and nothing else"}
    assert words[damage] in fault


def test_an_exported_program_is_whole_weights(run, tmp_path):
    run_dir, compiled = run
    out = export(run_dir, tmp_path / "out")
    ids = torch.tensor([SEQUENCES[0]])
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    with torch.no_grad():
        chosen = model(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
    assert torch.allclose(chosen, served(compiled)[: len(chosen)], atol=1e-4)
    assert "A LoRA adapter was trained" in (out / "README.md").read_text()
    loaded = dspy_fst.load(out, relay(), engine="in_process")
    assert torch.allclose(served(loaded), served(compiled), atol=1e-4)
    policy_of(loaded).release()


def test_the_run_s_weights_are_read_by_version(run):
    run_dir, compiled = run
    past = RunReader.of(run_dir)
    assert past.kept == ["step-000000", "step-000003", "step-000004"]
    assert past.checkpoint(past.version()) == policy_of(compiled).checkpoint
    assert past.checkpoint("step-000000") == Checkpoint.at("step-000000", run_dir / "weights" / "step-000000")


def test_both_weights_are_evaluated_on_one_engine(run):
    _, compiled = run
    before = served(compiled)
    lab = build(train=32, val=4, test=4)
    table = two_by_two(relay(), compiled, lab.testset[:2], any_answer, k=1)
    assert len(table.cells) == 4
    assert all(drift.per_token > 0 for drift in table.drift.values())
    assert torch.equal(served(compiled), before)


def test_a_program_goes_on_from_whole_weights_to_an_adapter_and_back(tmp_path):
    few = {**SHORT_RUN, "warmup_steps": 0}
    whole = compile_relay(tmp_path / "whole", **few)
    adapted = compile_relay(tmp_path / "adapted", program=whole, **{**RATE, **few})
    start = start_of(adapted)
    assert torch.allclose(scores(start.folder), scores(policy_of(whole).checkpoint.folder), atol=1e-6)
    back = compile_relay(tmp_path / "back", program=adapted, **few)
    assert not policy_of(back).checkpoint.adapters
    assert torch.allclose(scores(start_of(back).folder), scores(policy_of(adapted).checkpoint.folder), atol=1e-4)
    for program in (whole, adapted, back):
        policy_of(program).release()


def test_an_adapter_and_its_moments_go_on(run, tmp_path):
    _, compiled = run
    few = {**SHORT_RUN, "continue_optimizer": True}
    further = compile_relay(tmp_path / "further", program=compiled, **{**RATE, **few})
    first = start_of(further).adapters[0].path / "adapter_model.safetensors"
    last = policy_of(compiled).checkpoint.adapters[0].path / "adapter_model.safetensors"
    assert all(tensor.equal(load_file(last)[name]) for name, tensor in load_file(first).items())
    notes = [event["text"] for event in read_events(tmp_path / "further") if event["event"] == "note"]
    assert any("with AdamW's moments and its count of updates, 4" in note for note in notes)
    policy_of(further).release()
    with pytest.raises(ConfigurationError, match=r"trained the LoRA adapter .*, and this one trains all weights"):
        compile_relay(tmp_path / "other", program=compiled, **few)
    with pytest.raises(
        ConfigurationError, match="trained the LoRA adapters shared, and this one trains for-first, for-l"
    ):
        compile_relay(tmp_path / "other", program=compiled, **{**RATE, **few}, adapters="per_predictor")
    assert not (tmp_path / "other").exists()


def test_one_predictor_alone_trains_the_adapter(tmp_path):
    compiled = compile_relay(tmp_path / "run", trained=("last",), **{**RATE, **SHORT_RUN})
    (step,) = [event["report"] for event in read_events(tmp_path / "run") if event["event"] == "step"]
    assert step["update"]["rows"] > 0
    assert step["predictors"]["last"]["rows"] == step["update"]["rows"]
    policy_of(compiled).release()


def test_distillation_trains_an_adapter(tmp_path):
    distil = {"method": "distill", "seed_kl_coefficient": 1.0, "seed_kl_teacher": "population"}
    compiled = compile_relay(tmp_path / "run", **{**RATE, **SHORT_RUN, **distil})
    (step,) = [event["report"] for event in read_events(tmp_path / "run") if event["event"] == "step"]
    assert step["update"]["kl_under_seed"] is not None
    assert policy_of(compiled).checkpoint.version == "step-000001"
    policy_of(compiled).release()


# ---- an adapter for each predictor --------------------------------------------------------------


def test_each_predictor_learns_in_an_adapter_of_its_own(tmp_path):
    apart = {**RATE, "cycles": 1, "steps_per_cycle": 2, "adapters": "per_predictor"}
    compiled = compile_relay(tmp_path / "run", **apart)
    steps = [event["report"] for event in read_events(tmp_path / "run") if event["event"] == "step"]
    for step in steps:  # each call was sampled through its predictor's adapter and is scored through it
        assert step["update"]["max_log_ratio"] < 1e-4
        assert min(step["predictors"][name]["rows"] for name in ("first", "last")) > 0
        rows = {name: step["update"]["adapters"][f"for-{name}"]["rows"] for name in ("first", "last")}
        assert rows == {name: step["predictors"][name]["rows"] for name in rows}
    checkpoint = policy_of(compiled).checkpoint
    assert checkpoint.predictors == {"first": "for-first", "last": "for-last"}
    through = {name: predictor.lm.lora_adapter for name, predictor in compiled.named_predictors()}
    assert through == checkpoint.predictors
    assert len({predictor.lm.handle for _, predictor in compiled.named_predictors()}) == 1
    assert speaks(compiled)
    engine = policy_of(compiled).handle.ready()
    first, last = (engine.score(SEQUENCES, adapter=name)[0] for name in ("for-first", "for-last"))
    assert first != pytest.approx(last, abs=1e-3)

    saved = dspy_fst.save(compiled, tmp_path / "saved")
    loaded = dspy_fst.load(saved, relay(), engine="in_process")
    assert {name: predictor.lm.lora_adapter for name, predictor in loaded.named_predictors()} == through
    assert policy_of(loaded).handle.ready().score(SEQUENCES, adapter="for-last")[0] == last
    asked = {name: predictor.lm("1 2 3", temperature=0.0) for name, predictor in loaded.named_predictors()}
    assert asked == {name: predictor.lm("1 2 3", temperature=0.0) for name, predictor in compiled.named_predictors()}
    policy_of(loaded).release()

    lab = build(train=32, val=4, test=4)
    table = two_by_two(relay(), compiled, lab.testset[:2], any_answer, k=1)
    assert all(drift.per_token > 0 for drift in table.drift.values())
    with pytest.raises(ConfigurationError, match=r"several LoRA adapters \(first through for-first, last"):
        compile_relay(tmp_path / "merged", program=compiled, **{**RATE, **SHORT_RUN})
    further = compile_relay(tmp_path / "further", program=compiled, **{**apart, **SHORT_RUN})
    for name in ("for-first", "for-last"):
        paths = [next(a.path for a in c.adapters if a.name == name) for c in (checkpoint, start_of(further))]
        tensors = [load_file(path / "adapter_model.safetensors") for path in paths]
        assert all(tensors[0][key].equal(tensors[1][key]) for key in tensors[0])
    for program in (compiled, further):
        policy_of(program).release()


def test_a_killed_run_with_two_adapters_equals_an_uninterrupted_one(tmp_path):
    groups = {"one": ("first",), "two": ("last",)}
    apart = {**RATE, "cycles": 1, "steps_per_cycle": 2, "method": "rl", "adapters": groups}

    class KilledError(Exception):
        pass

    def kill(event):
        if event["event"] == "step" and event["report"]["step"] == 1:
            raise KilledError

    whole = compile_relay(tmp_path / "whole", **apart)
    with pytest.raises(KilledError):
        compile_relay(tmp_path / "killed", listeners=[kill], **apart)
    resumed = compile_relay(tmp_path / "killed", **apart)
    for one, other in zip(policy_of(whole).checkpoint.adapters, policy_of(resumed).checkpoint.adapters, strict=True):
        tensors = [load_file(adapter.path / "adapter_model.safetensors") for adapter in (one, other)]
        assert all(tensors[0][key].equal(tensors[1][key]) for key in tensors[0])
    for program in (whole, resumed):
        policy_of(program).release()


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"adapters": "per_predictor"}, "adapter=None trains all weights"),
        ({"adapter": "lora", "adapters": "each"}, "use 'shared', 'per_predictor', or groups"),
        ({"adapter": "lora", "adapters": {"a": ["first"], "b": ["first"]}}, "'first' in more than one group"),
        ({"adapter": "lora", "adapters": {"a.b": ["first"]}}, "a group's name has 1 to 64 letters"),
        ({"adapter": "lora", "adapters": {"a": ["frist"]}}, "'frist' is no trained predictor; there are first, last"),
    ],
    ids=["no adapter", "unknown", "twice", "name", "no predictor"],
)
def test_groups_that_cannot_be_are_refused_before_work(tmp_path, settings, complaint):
    with pytest.raises(ConfigurationError, match=complaint):
        compile_relay(tmp_path / "run", **settings)


# ---- the setting --------------------------------------------------------------------------------


def test_the_setting_is_given_as_an_object_a_dictionary_or_its_name():
    assert FSTConfig(adapter="lora").adapter == LoRA()
    assert FSTConfig(adapter={"rank": 8, "target": ["v_proj", "q_proj"]}).adapter == LoRA(
        rank=8, target=("q_proj", "v_proj")
    )
    assert FSTConfig().adapter is None


@pytest.mark.parametrize(
    ("adapter", "complaint"),
    [
        ({"rank": 0}, "adapter.rank=0: Input should be greater than or equal to 1"),
        ({"ranks": 4}, "adapter.ranks: there is no such setting"),
        (True, "use LoRA"),
        (dspy.JSONAdapter(), r"a chat adapter is set with dspy.configure\(adapter=...\)"),
        ({"target": "qproj"}, "adapter: target='qproj': a 'qwen3' model has no linear layer of this name.*'q_proj'"),
        ({"target": ["lm_head"]}, "adapter: target='lm_head' is the LM head"),
    ],
    ids=["rank", "unknown", "true", "chat adapter", "no such layer", "head"],
)
def test_what_is_no_adapter_of_this_model_is_refused_before_work(tmp_path, adapter, complaint):
    with pytest.raises(ConfigurationError, match=complaint):
        compile_relay(tmp_path / "run", adapter=adapter)
    assert not (tmp_path / "run").exists()
