"""Weights that are not the trainer's are caught, tensor by tensor, in bfloat16 as in float32; sound ones pass."""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dspy_fst import FSTOptimizer, PolicyLM
from dspy_fst.engine.base import Checkpoint
from dspy_fst.engine.in_process import InProcessEngine
from dspy_fst.engine.verification import MEAN_GAP_LIMITS
from dspy_fst.errors import FSTError, SyncError
from dspy_fst.policy_lm import policy_of
from dspy_fst.run.directory import read_events
from dspy_fst.run.files import read_json
from programs.lab import BASE, build
from tests.relay import any_answer, relay

Fault = Callable[[dict[str, Tensor], Mapping[str, Tensor]], None]
"""(tensors of the folder, those of the version before): what the engine loads instead."""
BOTH = pytest.mark.parametrize("precision", ["float32", "bfloat16"])
LAYER = "model.layers.1."
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def all_stale(tensors: dict[str, Tensor], before: Mapping[str, Tensor]) -> None:
    tensors.update(before)


def head_left_behind(tensors: dict[str, Tensor], before: Mapping[str, Tensor]) -> None:
    tensors["lm_head.weight"] = before["lm_head.weight"]


def layer_left_behind(tensors: dict[str, Tensor], before: Mapping[str, Tensor]) -> None:
    tensors.update({name: tensor for name, tensor in before.items() if name.startswith(LAYER)})


def tensor_scaled(tensors: dict[str, Tensor], before: Mapping[str, Tensor]) -> None:
    """In float32, as a trainer would: times 1.001 every bfloat16 number rounds back to itself."""
    name = f"{LAYER}self_attn.q_proj.weight"
    scaled = load_file(BASE / "model.safetensors")[name].float() * 1.001
    tensors[name] = scaled.to(tensors[name].dtype)


FAULTS: list[tuple[Fault, str]] = [
    (all_stale, "model.embed_tokens.weight"),
    (head_left_behind, "lm_head.weight"),
    (layer_left_behind, f"{LAYER}mlp.down_proj.weight"),
    (tensor_scaled, f"{LAYER}self_attn.q_proj.weight"),
]


def altered(checkpoint: Checkpoint, before: Path, fault: Fault, place: Path) -> Checkpoint:
    """A folder like the checkpoint's but for the fault."""
    shutil.copytree(checkpoint.path, place)
    tensors = load_file(checkpoint.path / "model.safetensors")
    fault(tensors, load_file(before / "model.safetensors"))
    save_file({name: t.contiguous() for name, t in tensors.items()}, place / "model.safetensors", {"format": "pt"})
    return replace(checkpoint, path=place)


def fault_at_the_second_load(monkeypatch: pytest.MonkeyPatch, fault: Fault, place: Path) -> None:
    """From the second publish on the engine says "loaded" and uses something else."""
    load, folders = InProcessEngine.load, []

    def faulty(self: InProcessEngine, checkpoint: Checkpoint) -> None:
        used = altered(checkpoint, folders[-1], fault, place) if folders else checkpoint
        folders.append(checkpoint.path)
        load(self, used)

    monkeypatch.setattr(InProcessEngine, "load", faulty)


def compile_with(policy: PolicyLM, run_dir: Path, precision: str, **changes):
    lab = build(train=16, val=4, test=4)
    program = relay()
    program.set_lm(policy)
    optimizer = FSTOptimizer(
        metric=any_answer,
        run_dir=run_dir,
        **{
            "method": "rl",
            "precision": precision,
            "cycles": 1,
            "steps_per_cycle": 1,
            "problems_per_step": 6,
            "group_size": 4,
            "learning_rate": 1e-6,
            "kl_coefficient": 0.0,
            "progress": False,
            **changes,
        },
    )
    return optimizer.compile(program, trainset=lab.trainset, valset=lab.valset)


def policy_in(precision: str) -> PolicyLM:
    options = {"dtype": precision, "device": "cpu"}
    return PolicyLM(BASE, engine="in_process", max_tokens=12, temperature=1.5, engine_options=options)


def test_the_limits_leave_sound_engines_twice_what_was_measured_and_faults_to_the_tensors():
    """What a limit of numbers must not refuse; what is below it, identity must find."""
    measured = read_json(RESULTS / "sync.json")
    for name, result in measured.items():
        limit = MEAN_GAP_LIMITS[name.split(", ")[1]]
        assert limit > 2 * max(result["rows"]["sound"]["gaps"]), name
        for what, row in result["rows"].items():
            assert row["right"] == result["seeds"], (name, what)
            assert what == "sound" or min(row["tensors"]) > 0, (name, what)
    kinds = read_json(RESULTS / "architectures.json")["in_process"].values()
    largest = max(kind["published"] for kind in kinds if kind["refused"] is None)
    assert MEAN_GAP_LIMITS["float32"] > 2 * largest


@BOTH
@pytest.mark.parametrize("seed", range(2))
def test_sound_weights_pass_in_every_precision(tmp_path, precision, seed):
    """On 845e963 four random-id probes in bfloat16 were off by more than their limit, and compile() stopped."""
    compiled = compile_with(policy_in(precision), tmp_path / "run", precision, seed=seed)
    steps = [event["report"] for event in read_events(tmp_path / "run") if event["event"] == "step"]
    assert len(steps) == 1
    assert any(step["update"]["rows"] for step in steps)
    policy_of(compiled).release()


@BOTH
@pytest.mark.parametrize(("fault", "named"), FAULTS, ids=[fault.__name__ for fault, _ in FAULTS])
def test_weights_that_were_left_behind_or_altered_are_caught_by_name(tmp_path, precision, fault, named, monkeypatch):
    """After one real update at 1e-6: on 845e963 the run went on, its probes off by less than bfloat16's own noise."""
    fault_at_the_second_load(monkeypatch, fault, tmp_path / "altered")
    with pytest.raises(SyncError) as caught:
        compile_with(policy_in(precision), tmp_path / "run", precision)
    said = str(caught.value)
    assert "weights step-000001: the engine uses other weights than were published: " in said
    assert f"{named} (" in said
    if fault in (tensor_scaled, head_left_behind):
        assert said.count(".weight (") == 1
    if fault is layer_left_behind:
        assert said.count(".weight (") == said.count(LAYER)


@BOTH
def test_a_folder_that_is_not_what_the_trainer_wrote_is_caught(tmp_path, precision, monkeypatch):
    """A bit that the disk flipped is the same for whoever compares the engine with the folder."""
    load = InProcessEngine.load

    def corrupt(self, checkpoint):
        file = checkpoint.path / "model.safetensors"
        tensors = load_file(file)
        tensors["model.norm.weight"].view(torch.uint8)[0] ^= 1
        save_file(tensors, file, {"format": "pt"})
        load(self, checkpoint)

    monkeypatch.setattr(InProcessEngine, "load", corrupt)
    with pytest.raises(
        FSTError, match=r"does not hold what the trainer wrote: model\.norm\.weight \(its bytes differ\)"
    ):
        compile_with(policy_in(precision), tmp_path / "run", precision)
