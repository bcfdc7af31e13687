"""What a run takes of memory and disk, on figures one can check by hand, and what a machine is asked for."""

import dataclasses
import errno
import gc
import json
import resource
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dspy_fst.cli.memory_tables import requirements
from dspy_fst.config import FSTConfig
from dspy_fst.errors import ConfigurationError
from dspy_fst.formatting.numbers import format_bytes
from dspy_fst.memory import (
    DISK,
    GPU,
    MEMORY,
    SECOND_GPU,
    Allocation,
    Available,
    Requirement,
    Workload,
    available_now,
    find_size,
    fitting_share,
    free_memory,
    imagined_machine,
    least_served,
    model_size,
    plan_for,
    plan_memory,
    vllm_share,
    with_chosen_micro_batch,
    with_recorded_micro_batch,
    writable_fault,
)
from dspy_fst.memory.allocation import Writes
from dspy_fst.memory.arithmetic import MicroBatchShape, Update, update_bytes
from dspy_fst.memory.bytes_by_part import trainer_allocations, trainer_parts
from dspy_fst.memory.does_it_fit import SPARE
from dspy_fst.model_files.folder import stored_shapes
from dspy_fst.policy_lm import PolicyLM
from dspy_fst.recipe.lora_settings import LoRA
from dspy_fst.slow.trainer import Trainer
from dspy_fst.slow.training_settings import TrainingSettings
from programs import smollm2
from programs.lab import BASE
from tests.slow.makers import make_batch, make_row, save_model

GIB = 2**30
P = 939_904
"""Parameters of the laboratory's model, untied."""
HEAD = 594 * 128
FIRST_RELEASE = Path(__file__).parent / "fixtures" / "first_release" / "run"
PLENTY = Available({MEMORY: 100 * GIB, DISK: 100 * GIB})
ON_GPU = Available({GPU: 8 * GIB, MEMORY: 100 * GIB, DISK: 100 * GIB}, gpu_total=10 * GIB)


def lab_policy(engine: str = "in_process", **options) -> PolicyLM:
    return PolicyLM(BASE, engine=engine, max_tokens=16, engine_options=options)


def allocations(policy=None, available=PLENTY, **recipe) -> dict[str, dict[str, int]]:
    """Place -> who -> bytes for certain."""
    plan = plan_memory(policy or lab_policy(), FSTConfig(**recipe), Path("nowhere"), available)
    return {
        requirement.place: {allocation.part: allocation.certain for allocation in requirement.allocations}
        for requirement in plan.requirements
    }


def test_the_laboratory_s_model_is_counted_from_its_files():
    size = model_size(BASE)
    assert size.parameters == size.untied == P
    assert (size.width, size.inner_width, size.layers) == (128, 384, 4)
    assert size.cached == 2 * 4 * 2 * 32


def test_a_tied_head_counts_once_for_training_and_twice_when_published(tmp_path):
    tied, untied = (model_size(save_model(tmp_path / str(tied), tied=tied)) for tied in (True, False))
    assert untied.parameters == untied.untied == tied.untied == tied.parameters + 64 * 32


def test_shards_count_together_and_files_beside_them_do_not(tmp_path):
    save_model(tmp_path / "whole")
    model = save_model(tmp_path / "model")
    (model / "model.safetensors").rename(model / "a.safetensors")
    (model / "consolidated.safetensors").write_bytes(b"for another program")
    index = {"weight_map": dict.fromkeys(stored_shapes(tmp_path / "whole"), "a.safetensors")}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    assert model_size(model) == model_size(tmp_path / "whole")


def test_an_index_that_is_none_is_named(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(ValueError, match=r"index\.json: no index of weights"):
        stored_shapes(tmp_path)


def test_a_hub_name_is_passed_over():
    assert plan_memory(PolicyLM("owner/model", engine="in_process"), FSTConfig(), Path("nowhere"), PLENTY) is None


def test_training_takes_weights_gradients_two_moments_and_the_reference():
    assert allocations()[MEMORY] == {"the trainer": 20 * P, "the engine": 4 * P}
    assert allocations(kl_coefficient=0)[MEMORY]["the trainer"] == 16 * P
    assert allocations(method="gepa")[MEMORY]["the trainer"] == 4 * P


def test_vllm_on_a_cpu_takes_weights_and_its_cache():
    assert allocations(lab_policy("vllm", cpu_kv_cache_gib=3))[MEMORY]["the engine"] == 4 * P + 3 * GIB
    of_two = allocations(lab_policy("vllm", cpu_kv_cache_gib=3, servers=2))[MEMORY]["the engine"]
    assert of_two == 2 * (4 * P + 3 * GIB)
    assert allocations(lab_policy("vllm", dtype="bfloat16"))[MEMORY]["the engine"] == 2 * P + 4 * GIB
    assert allocations(lab_policy("vllm", attach_url="http://127.0.0.1:1"))[MEMORY]["the engine"] == 0


def test_vllm_on_a_gpu_takes_its_share_of_the_whole():
    taken = allocations(lab_policy("vllm", gpu_memory_utilization=0.5), ON_GPU)
    assert taken[GPU] == {"the trainer": 20 * P - 2 * (P - 2 * HEAD), "the engine": 5 * GIB}
    assert taken[MEMORY] == {"a state being saved": 12 * P}


def test_the_in_process_engine_is_where_its_device_is():
    assert allocations(lab_policy(), ON_GPU)[GPU]["the engine"] == 2 * P + 2 * HEAD  # the head in float32
    assert allocations(lab_policy(dtype="float32"), ON_GPU)[GPU]["the engine"] == 4 * P
    assert allocations(lab_policy(device="cpu"), ON_GPU)[MEMORY]["the engine"] == 4 * P


@pytest.mark.slow
def test_the_trainer_really_holds_and_writes_that_much(tmp_path):
    """The table's rows against a real update: a trainer that comes to hold more must change them."""
    before = tensors_by_storage()
    trainer = Trainer(
        BASE, TrainingSettings(learning_rate=1e-3, kl_coefficient=0.1, min_effective_share=0.0), device="cpu"
    )
    trainer.step(make_batch([make_row([1, 2], [3, 4], [-1.0, -1.0], 1.0, 0.5)]))
    without_gradients = allocations()[MEMORY]["the trainer"] - 4 * P
    after = tensors_by_storage()
    held = sum(tensor.untyped_storage().nbytes() for place, tensor in after.items() if place not in before)
    assert held == pytest.approx(without_gradients, rel=0.01)
    trainer.save_state(tmp_path / "state")
    trainer.publish(tmp_path / "weights", "v")
    assert (tmp_path / "state" / "state.safetensors").stat().st_size == pytest.approx(12 * P, rel=0.01)
    assert (tmp_path / "weights" / "model.safetensors").stat().st_size == pytest.approx(4 * P, rel=0.01)


def tensors_by_storage() -> dict[int, torch.Tensor]:
    """Those that live: whoever keeps them keeps what an earlier test left from being freed in between."""
    gc.collect()
    tensors = [tensor for tensor in gc.get_objects() if type(tensor) in (torch.Tensor, torch.nn.Parameter)]
    return {tensor.untyped_storage().data_ptr(): tensor for tensor in tensors}


def test_the_disk_holds_what_is_kept_and_what_is_being_written():
    disk = allocations(keep_weights=2, keep_states=2)[DISK]
    assert disk == {"published weights": 5 * 4 * P, "resumable states": 3 * 12 * P}
    assert allocations(available=ON_GPU)[DISK]["published weights"] == 5 * 2 * P
    assert allocations(available=ON_GPU, precision="float32")[DISK]["published weights"] == 5 * 4 * P
    assert allocations(precision="bfloat16")[DISK]["published weights"] == 5 * 2 * P
    assert (
        allocations(checkpoint_every=2)[DISK]["published weights"] == 6 * 4 * P
    )  # the best of the committed steps too
    # The only newest one is not the second newest, which may be the best while the state before is the committed one.
    assert allocations(keep_weights=1)[DISK]["published weights"] == 5 * 4 * P


def test_what_is_written_over_a_run_is_told_and_warned_of_from_a_tebibyte_on():
    """The largest of the cases: 8B parameters, 48 steps."""
    written = plan_memory(lab_policy(), FSTConfig(cycles=8), Path("nowhere"), PLENTY).writes
    assert (written.updates, written.states) == (48, 48)
    assert written.total == 49 * 4 * P + 48 * 12 * P
    rare = plan_memory(lab_policy(), FSTConfig(cycles=8, checkpoint_every=6), Path("nowhere"), PLENTY)
    assert rare.writes.total == 49 * 4 * P + 8 * 12 * P
    assert not rare.warnings()
    large = dataclasses.replace(rare, writes=Writes(16 * 10**9, 48, 96 * 10**9, 48))
    assert large.warnings() == [
        "disk: written over the run: at most 5021.7 GiB, 14.9 GiB of weights for each of 48 updates and 89.4 GiB for "
        "each of 48 states; raise checkpoint_every to write fewer states"
    ]


def test_a_short_run_never_has_as_many_versions_as_it_may_keep():
    one = allocations(cycles=1, steps_per_cycle=1)[DISK]
    assert one == {"published weights": 2 * 4 * P, "resumable states": (4 + 12) * P}
    assert allocations(method="gepa")[DISK] == {"published weights": 4 * P, "resumable states": 4 * P}
    assert allocations(cycles=1, steps_per_cycle=6, checkpoint_every=6)[DISK]["resumable states"] == (4 + 12) * P


def test_an_update_is_counted_as_autograd_keeps_it():
    """Of the laboratory's model by hand: h 128, f 384, q 128, k 64, 4 layers, norms on heads, an untied head."""
    size = model_size(BASE)
    kept = 24 * 128 + 16 * (128 + 64) + 16 * 384  # of a token, in a layer
    block = 4 * 594 * 128  # the head's gradient on its way
    all_scored, few = MicroBatchShape(1000, 1000), MicroBatchShape(1000, 10)
    plain, with_kl = Update(with_kl=False, low=False), Update(with_kl=True, low=False)
    # The last norm; of each scored token the hidden state and its gradient, and the start's hidden state.
    without = 1000 * (4 * kept + 8 * 128 + 8 * 128 + 4 * 4 * 594) + block
    assert update_bytes(size, all_scored, plain) == without
    assert update_bytes(size, all_scored, with_kl) == without + 1000 * (4 * 128 + 4 * 4 * 594)
    layer_gradient = 4 * 1000 * (128 + 384)  # more than a chunk of ten tokens
    assert update_bytes(size, few, plain) == 1000 * (4 * kept + 8 * 128) + 10 * 8 * 128 + layer_gradient
    shared = dataclasses.replace(few, kept=5000, masked=7000)
    more = 16 * (128 + 64) * 5000 + 8 * 7000  # one layer's copies of keys
    assert update_bytes(size, shared, plain) == update_bytes(size, few, plain) + more


def test_logits_take_a_chunk_however_many_tokens_are_scored():
    large = dataclasses.replace(model_size(BASE), vocabulary=100_000)
    update = Update(with_kl=True, low=False)
    one, ten = (update_bytes(large, MicroBatchShape(10_000, scored), update) for scored in (1000, 10_000))
    assert ten - one == 9000 * 12 * 128
    on_gpu = update_bytes(large, MicroBatchShape(10_000, 1000), dataclasses.replace(update, on_gpu=True))
    assert on_gpu - one == 4 * 8 * 100_000 * (2**26 // 100_000 - 2**22 // 100_000)


def test_layers_that_are_computed_again_keep_their_inputs_and_one_layer():
    size, batch = model_size(BASE), MicroBatchShape(1000, 1000)
    kept, again = (update_bytes(size, batch, Update(True, False, recompute=way)) for way in (False, True))
    layer = 1000 * (24 * 128 + 16 * (128 + 64) + 16 * 384)
    assert kept - again == 3 * layer - 4 * 1000 * 4 * 128
    shared = MicroBatchShape(1000, 1000, kept=5000, masked=7000)
    more = 16 * (128 + 64) * 5000 + 8 * 7000
    assert update_bytes(size, shared, Update(True, False, recompute=True)) == again + more


def test_a_bfloat16_body_keeps_less_and_casts_its_weights_unless_they_are_stored_so():
    size = model_size(BASE)
    kept = 4 * (26 * 128 + 10 * (128 + 64) + 8 * 384)
    casts = 2 * (P - 2 * HEAD)
    expected = 1000 * (kept + 8 * 128 + 8 * 128 + 16 * 594) + 4 * 594 * 128 + casts
    batch = MicroBatchShape(1000, 1000)
    assert update_bytes(size, batch, Update(with_kl=False, low=True)) == expected
    assert update_bytes(size, batch, Update(with_kl=False, low=True, frozen=True)) == expected - casts


def adapted(lora: LoRA) -> int:
    return model_size(BASE).adapted(lora)


def test_a_lora_adapter_has_the_parameters_that_the_trainer_trains():
    for lora in (LoRA(rank=4), LoRA(rank=2, target=("q_proj", "down_proj"))):
        trainer = Trainer(BASE, TrainingSettings(adapter=lora), device="cpu")
        assert adapted(lora) == trainer.num_parameters


def test_with_a_lora_adapter_the_base_is_frozen_and_is_the_reference_itself():
    one = adapted(LoRA(rank=4))
    of_adapter = allocations(adapter=LoRA(rank=4))
    assert of_adapter[MEMORY]["the trainer"] == 4 * P + 16 * one
    assert of_adapter[DISK] == {"published weights": 5 * 4 * one + 4 * P, "resumable states": 3 * 12 * one}
    on_gpu = allocations(lab_policy("vllm"), ON_GPU, adapter=LoRA(rank=4))
    assert on_gpu[GPU]["the trainer"] == 2 * P + 16 * one
    assert on_gpu[MEMORY] == {"a state being saved": 12 * one}


@pytest.mark.parametrize(
    ("settings", "adapters", "words"),
    [
        ({}, 1, "trained: all weights, which fit"),
        ({"method": "gepa"}, 1, "trained: no weights, as method='gepa' searches texts alone"),
        ({"adapter": LoRA(rank=4)}, 1, "trained: a LoRA adapter of 0.0389M numbers, as the recipe's adapter says"),
        (
            {"adapter": LoRA(rank=4)},
            2,
            "trained: 2 LoRA adapters, together of 0.0778M numbers, as the recipe's adapter says",
        ),
    ],
    ids=["all", "texts", "one", "two"],
)
def test_the_plan_says_what_is_trained_and_why(settings, adapters, words):
    workload = Workload("it", model_size(BASE), "in_process", adapters=adapters)
    assert plan_for(workload, FSTConfig(**settings), PLENTY).choice == words


def test_moments_of_8_bits_take_a_quarter():
    assert allocations(optimizer="adamw_8bit")[MEMORY]["the trainer"] == (4 + 4 + 2 + 4) * P
    assert allocations(optimizer="adamw_8bit")[DISK]["resumable states"] == 3 * 6 * P


def test_a_quantised_base_takes_what_its_codes_take():
    held = [
        allocations(adapter=LoRA(rank=4), quantized_base=way)[MEMORY]["the trainer"] for way in (None, "int8", "nf4")
    ]
    layer = 128 * (128 + 64 + 64 + 128) + 3 * 128 * 384
    rounded = 4 * layer
    assert model_size(BASE).in_linear == rounded
    assert held[0] - held[1] == 3 * rounded
    assert held[1] - held[2] == rounded - round(0.5625 * rounded)


@pytest.mark.parametrize(
    ("settings", "ends", "layer"), [({}, 12, 8), ({"kl_coefficient": 0.0}, 8, 8), ({"adapter": LoRA(rank=8)}, 2, 2)]
)
def test_ranks_that_share_the_weights_hold_a_part_of_each_on_a_card_and_put_some_together(settings, ends, layer):
    size, config = find_size("Qwen/Qwen3-0.6B"), FSTConfig(**settings)
    one, two = (trainer_parts(Workload("m", size, "vllm", ranks=n), config, on_gpu=True) for n in (1, 2))
    together = two.pop("weights put together")
    assert {part: held // 2 for part, held in one.items()} == two
    assert together == ends * size.embedding + layer * (2 * size.body // size.layers)
    assert trainer_parts(Workload("m", size, "vllm", ranks=2), config, on_gpu=False) == trainer_parts(
        Workload("m", size, "vllm"), config, on_gpu=False
    )


@pytest.mark.parametrize(
    ("settings", "bytes_each"), [({}, 6), ({"precision": "float32"}, 4), ({"adapter": LoRA(rank=8)}, 2)]
)
def test_of_ranks_that_share_the_weights_the_first_puts_together_what_it_publishes_and_no_state(settings, bytes_each):
    size, config = find_size("Qwen/Qwen3-0.6B"), FSTConfig(**settings)
    _, written = trainer_allocations(Workload("m", size, "vllm", ranks=2), config, 1024, on_gpu=True)
    assert (written.place, written.part) == (MEMORY, "weights being published")
    assert written.certain == bytes_each * size.untied


@pytest.mark.parametrize(("sharding", "ranks"), [(None, 1), ("fsdp", 4)])
def test_the_plan_of_a_run_counts_the_ranks_that_share_its_weights(monkeypatch, tmp_path, sharding, ranks):
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    plan = plan_memory(PolicyLM(BASE, engine="in_process"), FSTConfig(sharding=sharding), tmp_path, PLENTY)
    assert plan.workload.ranks == ranks
    monkeypatch.undo()
    for room in (PLENTY, dataclasses.replace(PLENTY, imagined=True)):  # those on Ray are known without a launcher
        asked = FSTConfig(sharding=sharding, ray="local", ranks=4)
        assert plan_memory(PolicyLM(BASE, engine="in_process"), asked, tmp_path, room).workload.ranks == ranks


def test_each_adapter_has_its_own_weights_gradients_moments_and_places_on_the_server():
    size, config = find_size("Qwen/Qwen3-0.6B"), FSTConfig(adapter=LoRA(rank=8))
    one, three = (Workload("m", size, "vllm", {"gpu_memory_utilization": 0.5}, adapters=n) for n in (1, 3))
    numbers = size.adapted(LoRA(rank=8))

    def made_of(workload, part):
        needs = plan_for(workload, config, imagined_machine(24 * GIB)).requirements
        return next(dict(a.made_of) for need in needs for a in need.allocations if a.part == part)

    assert made_of(one, "the trainer") == {
        "frozen base": 2 * size.parameters,
        "trained weights": 4 * numbers,
        "gradients": 4 * numbers,
        "AdamW's moments": 8 * numbers,
    }
    trained = sum(made_of(three, "the trainer").values()) - sum(made_of(one, "the trainer").values())
    assert trained == 2 * 16 * numbers
    # twice as many places as adapters, in bfloat16
    assert made_of(three, "the engine")["weights"] - made_of(one, "the engine")["weights"] == 2 * 2 * 2 * numbers
    own = dataclasses.replace(one, options={**one.options, "max_loras": 7})
    assert made_of(own, "the engine")["weights"] == 2 * size.untied + 2 * size.embedding + 7 * 2 * numbers


ON_CARDS = [(80, "Qwen/Qwen3-8B"), (24, "Qwen/Qwen3-4B")]


@pytest.mark.parametrize(("card", "model"), ON_CARDS, ids=["8B-80", "4B-24"])
def test_models_that_people_have_fit_on_cards_that_people_have_with_a_lora_adapter(card, model):
    available, size = imagined_machine(card * GIB), find_size(model)
    workload = Workload(model, size, "vllm", {"gpu_memory_utilization": 0.3}, 512)
    full = plan_for(workload, FSTConfig(), available)
    assert full.faults()[-1].endswith(full.way_out)
    assert "or train a LoRA adapter, which is expected to fit: adapter='lora'" in full.faults()[-1]
    lora = FSTConfig(adapter="lora")
    share = fitting_share(workload, lora, available)
    assert share * card * GIB <= (card - 0.5) * GIB - 2 * size.parameters
    plan = plan_for(dataclasses.replace(workload, options={"gpu_memory_utilization": share}), lora, available)
    assert [*plan.faults(), *plan.doubts()] == []
    assert plan.choice.startswith("trained: a LoRA adapter of ")


def test_the_way_out_names_another_share_of_the_card_where_that_is_needed():
    available = imagined_machine(24 * GIB)
    workload = Workload("m", find_size("Qwen/Qwen3-4B"), "vllm", {"gpu_memory_utilization": 0.9}, 512)
    found = plan_for(workload, FSTConfig(), available).way_out
    share = float(found.removeprefix("adapter='lora', engine_options={'gpu_memory_utilization': ").removesuffix("}"))
    options = {"gpu_memory_utilization": share}
    plan = plan_for(dataclasses.replace(workload, options=options), FSTConfig(adapter="lora"), available)
    assert not plan.faults()
    assert plan.expected_to_fit
    tiny = imagined_machine(8 * GIB)
    assert plan_for(workload, FSTConfig(), tiny).way_out == "", "nothing that would not help is proposed"


def test_all_weights_are_taken_where_they_fit():
    plan = plan_memory(lab_policy(), FSTConfig(), Path("nowhere"), PLENTY)
    assert (plan.choice, plan.way_out, plan.trained) == ("trained: all weights, which fit", "", P)


def test_layers_are_computed_again_only_where_an_update_would_not_fit_otherwise():
    needed = update(micro_batch_tokens=4096, gradient_checkpointing=False)[1]
    with_it = update(micro_batch_tokens=4096, gradient_checkpointing=True)[1]
    assert with_it < 0.6 * needed

    def planned(extra: int, **recipe):
        config = FSTConfig(micro_batch_tokens=4096, **recipe)
        return plan_memory(lab_policy(), config, Path("nowhere"), room_for(extra))

    assert not planned(needed).gradient_checkpointing
    assert planned(needed).needed == ""
    assert planned(needed - 1).gradient_checkpointing
    assert planned(needed - 1).needed == (
        f"an update may take {format_bytes(needed)} otherwise, and {format_bytes(needed - 1)} are left for it"
    )
    assert planned(needed - 1).doubts() == []
    assert not planned(needed - 1, gradient_checkpointing=False).gradient_checkpointing
    assert with_chosen_micro_batch(FSTConfig(), planned(needed - 1)).gradient_checkpointing is True
    assert with_chosen_micro_batch(FSTConfig(), planned(needed)).gradient_checkpointing is False
    assert with_chosen_micro_batch(FSTConfig(gradient_checkpointing=True), None).gradient_checkpointing is True


MEASURED = json.loads((Path(__file__).parents[1] / "benchmarks" / "results" / "gpu_check.json").read_text())
SHAPES = {"0.5B": "Qwen/Qwen2.5-0.5B-Instruct", "1.7B": "Qwen/Qwen3-1.7B", "8B": "Qwen/Qwen3-8B"}
ON_A_CARD = [
    row for part in MEASURED["parts"] for row in part["rows"] if row.get("trainer") == "dspy_fst" and "peak_gib" in row
]


@pytest.mark.parametrize("row", ON_A_CARD, ids=[f"{row['model']}-{row['weights']}" for row in ON_A_CARD])
def test_the_peaks_of_a_card_are_what_is_computed_to_15_percent(row):
    size, lora = find_size(SHAPES[row["model"]]), "LoRA" in row["weights"]
    config = FSTConfig(adapter="lora" if lora else None, kl_coefficient=row["kl"])
    plan = plan_for(Workload("m", size, "in_process"), config, imagined_machine(80 * GIB))
    held = next(a.certain for need in plan.requirements for a in need.allocations if a.part == "the trainer")
    tokens = row["micro_batch_tokens"]
    update = Update(True, low=True, on_gpu=True, frozen=lora)
    then = 0 if lora else 2 * size.body  # the reference was float32 all over when these were measured
    peak = held + then + update_bytes(size, MicroBatchShape(tokens, tokens // 2), update)
    assert peak / GIB == pytest.approx(row["peak_gib"], rel=0.15)


def test_a_reading_of_shared_prompts_counts_each_reply_s_keys():
    batch = MicroBatchShape.shared(1000, replies=4, prompt=100, reply=25)  # 5 prompts, 20 replies
    assert batch == MicroBatchShape(read=1000, scored=500, kept=20 * 125, masked=20 * 125 * 25)
    assert MicroBatchShape.shared(1000, replies=1, prompt=75, reply=25) == MicroBatchShape(1000, 250)


def update(policy=None, available=PLENTY, **recipe):
    """(expected, at most) of an update on top."""
    plan = plan_memory(policy or lab_policy(), FSTConfig(**recipe), Path("nowhere"), available)
    return next(
        (t.expected, t.at_most)
        for requirement in plan.requirements
        for t in requirement.allocations
        if t.when == "an update"
    )


def test_what_is_expected_of_an_update_is_less_than_what_it_takes_at_most():
    expected, at_most = update(micro_batch_tokens=1024)
    assert 0 < expected < at_most
    assert update(micro_batch_tokens=2048)[0] == pytest.approx(2 * expected, rel=0.01)
    assert update(micro_batch_tokens=1024, kl_coefficient=0)[1] < at_most
    long_replies = PolicyLM(BASE, engine="in_process", max_tokens=1024)
    assert update(long_replies, micro_batch_tokens=16)[1] == at_most, "a reply longer than the budget comes alone"


def room_for(extra: float) -> Available:
    """Room for what the laboratory's run takes for certain, and ``extra`` bytes for its updates."""
    return Available({MEMORY: 24 * P + int(extra), DISK: 100 * GIB})


def chosen(available, **recipe) -> int:
    return plan_memory(lab_policy(), FSTConfig(**recipe), Path("nowhere"), available).micro_batch_tokens


def test_the_largest_micro_batch_that_fits_at_most_is_chosen():
    for tokens in (256, 1024, 4096):
        needed = update(micro_batch_tokens=tokens)[1] / (1 - SPARE)
        assert chosen(room_for(needed + 1)) == tokens
        assert chosen(room_for(needed - 2)) < tokens or tokens == 256
    assert chosen(PLENTY) == 4096
    assert chosen(Available({GPU: 80 * GIB, MEMORY: 100 * GIB, DISK: 100 * GIB}, 80 * GIB)) == 16384
    assert chosen(room_for(0), micro_batch_tokens=7) == 7, "a number that the recipe gives is kept"


def test_where_none_fits_at_most_the_largest_expected_one_is_chosen_and_the_doubt_is_told():
    long_replies = PolicyLM(BASE, engine="in_process", max_tokens=4096)
    expected = update(long_replies, micro_batch_tokens=512)[0] / (1 - SPARE)
    plan = plan_memory(long_replies, FSTConfig(gradient_checkpointing=False), Path("nowhere"), room_for(expected + 1))
    assert plan.micro_batch_tokens == 512
    assert "an update may take up to" in plan.doubts()[0]


def test_a_run_that_goes_on_keeps_the_number_that_it_began_with(tmp_path):
    def recorded(**config):
        (tmp_path / "events.jsonl").write_text(json.dumps({"event": "plan", "config": config}) + "\n")
        found = with_recorded_micro_batch(FSTConfig(), tmp_path)
        assert found.gradient_checkpointing == config.get("gradient_checkpointing", "auto")
        return found.micro_batch_tokens

    assert recorded(micro_batch_tokens=512, gradient_checkpointing=True) == 512
    assert recorded(gradient_checkpointing=False) == "auto"

    assert with_recorded_micro_batch(FSTConfig(), tmp_path / "new").micro_batch_tokens == "auto"
    assert recorded(micro_batch_tokens=512) == 512
    assert recorded() == "auto"
    assert with_recorded_micro_batch(FSTConfig(micro_batch_tokens=64), tmp_path).micro_batch_tokens == 64, (
        "the user's own word"
    )
    assert with_recorded_micro_batch(FSTConfig(), FIRST_RELEASE).micro_batch_tokens == 4096, (
        "its default, which it wrote down"
    )


def test_without_a_known_model_the_former_default_is_taken():
    assert with_chosen_micro_batch(FSTConfig(), None).micro_batch_tokens == 4096
    assert with_chosen_micro_batch(FSTConfig(micro_batch_tokens=9), None).micro_batch_tokens == 9


# ---- a config alone ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "base", [BASE, *sorted((BASE.parent.parent / "tiny" / "bases").iterdir())], ids=lambda p: p.name
)
def test_a_config_alone_gives_the_size_of_the_files(base, tmp_path):
    shutil.copy(base / "config.json", tmp_path)
    assert model_size(tmp_path) == model_size(base)


def test_a_tied_and_an_untied_config_alone_give_the_size_of_the_files(tmp_path):
    for tied in (True, False):
        model = save_model(tmp_path / f"{tied}", tied=tied)
        whole = model_size(model)
        (model / "model.safetensors").unlink()
        assert model_size(model) == whole
        assert whole.tied == tied


@pytest.mark.skipif(not smollm2.available(), reason="SmolLM2 is not installed")
def test_smollm2_s_config_alone_gives_the_size_of_its_files(tmp_path):
    shutil.copy(smollm2.folder() / "config.json", tmp_path)
    size = model_size(tmp_path)
    assert size == model_size(smollm2.folder()) == find_size("HuggingFaceTB/SmolLM2-135M-Instruct")
    assert size.parameters == smollm2.PARAMETERS


@pytest.mark.parametrize(
    ("model", "parameters"),
    [
        ("Qwen/Qwen3-0.6B", 596_049_920),
        ("Qwen/Qwen3-8B", 8_190_735_360),
        ("Qwen/Qwen2.5-0.5B-Instruct", 494_032_768),
        ("meta-llama/Llama-3.2-1B-Instruct", 1_235_814_400),
        ("HuggingFaceTB/SmolLM2-360M-Instruct", 361_821_120),
    ],
)
def test_known_models_have_the_parameters_that_their_makers_publish(model, parameters):
    assert find_size(model).parameters == parameters


def test_a_folder_without_a_config_and_a_broken_one_are_told(tmp_path):
    with pytest.raises(ConfigurationError, match=r"the folder holds no config\.json"):
        find_size(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigurationError, match="not a model that transformers can read"):
        find_size(str(tmp_path))


# ---- cards that are imagined --------------------------------------------------------------------


def test_an_imagined_card_has_the_trainer_and_the_engine_on_it_and_two_cards_one_each():
    size = find_size("Qwen/Qwen3-0.6B")
    workload = Workload("m", size, "vllm", {"gpu_memory_utilization": 0.5})
    one, two = (plan_for(workload, FSTConfig(), imagined_machine(24 * GIB, cards)) for cards in (1, 2))
    assert {n.place: {t.part: t.certain for t in n.allocations} for n in one.requirements}[GPU] == {
        "the trainer": 20 * size.parameters - 2 * size.body,
        "the engine": 12 * GIB,
    }
    assert {n.place: {t.part for t in n.allocations} for n in two.requirements} == {
        GPU: {"the trainer"},
        SECOND_GPU: {"the engine"},
        MEMORY: {"the process", "a state being saved"},
        DISK: {"published weights", "resumable states"},
    }
    assert two.micro_batch_tokens > one.micro_batch_tokens
    assert not two.faults()


def test_two_cards_do_not_hold_what_the_trainer_s_card_cannot():
    size = find_size("Qwen/Qwen3-8B")
    plan = plan_for(
        Workload("m", size, "vllm", {"gpu_memory_utilization": 0.9}), FSTConfig(), imagined_machine(80 * GIB, 2)
    )
    (fault,) = plan.faults()
    assert fault.startswith("GPU memory: training model='m' (8.2B parameters) takes 139.6 GiB for the trainer")


def test_a_share_of_the_card_that_cannot_hold_the_served_weights_is_a_fault():
    size = find_size("Qwen/Qwen3-4B")
    workload = Workload("m", size, "vllm", {"gpu_memory_utilization": 0.05})
    plan = plan_for(workload, FSTConfig(), imagined_machine(96 * GIB))
    assert any("gpu_memory_utilization=0.05 is 4.8 GiB of 96.0 GiB, and vLLM's weights" in f for f in plan.faults())
    share = vllm_share(workload, FSTConfig(), imagined_machine(96 * GIB))
    assert share * 96 * GIB >= least_served(workload, FSTConfig())


def test_a_place_is_too_small_from_one_byte_on_and_doubtful_up_to_the_most():
    def said(free):
        requirement = Requirement(
            MEMORY, (Allocation(MEMORY, "a", 60, ("x",)), Allocation(MEMORY, "b", 40, ("y",), 20, "rain", "z")), free
        )
        return bool(requirement.fault("m")), bool(requirement.warning("m"))

    assert [said(free) for free in (99, 100, 119, 120)] == [(True, False), (False, True), (False, True), (False, False)]


def test_two_times_never_come_together():
    requirement = Requirement(
        MEMORY, (Allocation(MEMORY, "a", 1, at_most=5, when="x"), Allocation(MEMORY, "b", 1, at_most=7, when="y")), 0
    )
    assert requirement.at_most == 2 + 7


def test_what_is_surely_taken_at_a_time_is_a_fault_from_one_byte_on():
    awake = Allocation(GPU, "b", 10, at_most=50, expected=50, when="sampling", relief="z", sure=40)

    def said(free):
        requirement = Requirement(GPU, (Allocation(GPU, "a", 60, at_most=45, when="x"), awake), free)
        return bool(requirement.fault("m")), bool(requirement.warning("m"))

    assert [said(free) for free in (109, 110, 119, 120)] == [
        (True, False),
        (False, True),
        (False, True),
        (False, False),
    ]


def in_turns(level, model="Qwen/Qwen3-1.7B", card=48, share=0.3, options=None, **recipe):
    options = {"gpu_memory_utilization": share, **({} if level is None else {"sleep_level": level}), **(options or {})}
    workload = Workload("m", find_size(model), "vllm", options, 1024)
    return plan_for(workload, FSTConfig(**recipe), imagined_machine(card * GIB))


def parts(plan, place):
    need = next(requirement for requirement in plan.requirements if requirement.place == place)
    return need, {allocation.part: allocation for allocation in need.allocations}


def test_a_server_that_sleeps_and_an_update_take_the_larger_of_both_and_not_their_sum():
    """All numbers by hand: the server has 0.3 of 48 GiB awake and 1.5 GiB asleep, which is assumed.

    At its turn the trainer holds no gradients, in an update it does.
    """
    beside, taking_turns = in_turns(None), in_turns(1)
    share = int(0.3 * 48 * GIB)
    (both, held), (turns, by_turns) = parts(beside, GPU), parts(taking_turns, GPU)
    trainer = held["the trainer"].certain
    assert trainer == by_turns["the trainer"].certain
    assert both.certain == both.sure == trainer + share
    assert turns.certain == trainer + 3 * GIB // 2
    gradients = 4 * find_size("Qwen/Qwen3-1.7B").parameters
    assert turns.sure == max(trainer + 3 * GIB // 2, trainer - gradients + share)
    update, awake = by_turns["the trainer"].at_most, by_turns["the engine"]
    assert turns.at_most == trainer + 3 * GIB // 2 + max(update, awake.at_most - gradients)
    assert turns.expected <= turns.at_most < both.at_most
    assert (beside.micro_batch_tokens, taking_turns.micro_batch_tokens) == (256, 2048)
    assert [*taking_turns.faults(), *taking_turns.doubts()] == []
    shown = next(need for need in requirements(taking_turns) if need["place"] == GPU)
    assert shown["made_of"]["the engine"] == {
        "while it sleeps": 3 * GIB // 2,
        "more while it samples": share - 3 * GIB // 2,
    }


def sent(way, cards=1, card=48, model="Qwen/Qwen3-1.7B", **recipe):
    workload = Workload("m", find_size(model), "vllm", {"gpu_memory_utilization": 0.3, "weight_transfer": way}, 1024)
    return plan_for(workload, FSTConfig(**recipe), imagined_machine(card * GIB, cards))


def test_weights_that_are_sent_over_ipc_lie_on_the_card_twice_at_a_publish():
    """In their published type, beside all that the trainer and the server hold."""
    need, held = parts(sent("ipc"), GPU)
    whole = 2 * find_size("Qwen/Qwen3-1.7B").untied
    moved = held["weights being sent"]
    assert (moved.certain, moved.sure, moved.expected, moved.at_most) == (0, whole, whole, whole)
    assert need.sure == held["the trainer"].certain + held["the engine"].certain + whole
    without, _ = parts(sent("disk"), GPU)
    fault = dataclasses.replace(need, free=need.sure - 1).fault("m")
    assert f"for weights being sent, and {format_bytes(need.sure - 1)} are free; " in fault
    assert "leave engine_options={'weight_transfer': 'ipc'} unset" in fault
    assert dataclasses.replace(without, free=need.sure - 1).fault("m") is None


def test_chunks_of_weights_that_are_sent_over_nccl_lie_on_both_cards():
    size = find_size("Qwen/Qwen3-1.7B")
    chunks = 3 * (GIB // 4 + 2 * size.embedding)
    plan = sent("nccl", cards=2)
    for place in (GPU, SECOND_GPU):
        moved = parts(plan, place)[1]["weights being sent"]
        assert (moved.certain, moved.sure, moved.at_most) == (0, 0, chunks)
    tiny = find_size("Qwen/Qwen3-0.6B")
    assert parts(sent("nccl", 2, model="Qwen/Qwen3-0.6B"), GPU)[1]["weights being sent"].at_most == 2 * tiny.untied
    for others in (sent("disk"), sent("ipc", adapter="lora")):
        assert "weights being sent" not in parts(others, GPU)[1]


def test_turns_are_not_named_to_whom_they_are_refused():
    assert sent("disk", card=40).turns_help
    assert not sent("ipc", card=40).turns_help


def test_the_weights_of_a_server_that_sleeps_take_main_memory_at_level_1_alone():
    size = find_size("Qwen/Qwen3-1.7B")
    served = 2 * size.untied + 2 * size.embedding
    one, two, none = (parts(in_turns(level), MEMORY)[1] for level in (1, 2, None))
    moved = one.pop("the engine's weights while it sleeps")
    assert (moved.certain, moved.at_most, moved.with_cuts(0)) == (served, served, 0)
    assert set(one) == set(two) == set(none)
    lora = parts(in_turns(1, adapter="lora"), MEMORY)[1]["the engine's weights while it sleeps"]
    assert (lora.cuts, lora.with_cuts(0)) == ((), lora.certain), "level 2 is refused beside LoRA adapters"


def test_the_trainer_scores_a_publish_in_the_server_s_turn():
    lora, full = (parts(in_turns(1, **recipe), GPU)[1]["the engine"] for recipe in ({"adapter": "lora"}, {}))
    assert GIB < lora.at_most - lora.sure < 2 * GIB
    assert 4 * GIB < full.at_most - full.sure < 5 * GIB, "the bfloat16 copies of the trained weights come on top"


def test_gradients_that_alone_stand_in_the_server_s_way_are_no_fault():
    """They are freed before it wakes: neither turn surely takes 48 GiB, though the sum of both parts does."""
    plan = in_turns(1, share=0.5)
    need, held = parts(plan, GPU)
    trainer = held["the trainer"]
    assert trainer.certain + int(0.5 * 48 * GIB) > 53 * GIB
    gradients = 4 * find_size("Qwen/Qwen3-1.7B").parameters
    assert need.sure == trainer.certain - gradients + int(0.5 * 48 * GIB) < 47.1 * GIB
    assert plan.faults() == []
    assert in_turns(2, share=0.5).faults() == []


@pytest.mark.parametrize(("free", "cuts"), [(104, True), (103, False)])
def test_settings_are_named_where_every_turn_fits_with_them(free, cuts):
    """With them an update takes 100 and 4, and the server's turn 100 less 30 and 4 and 20."""
    trainer = Allocation(GPU, "a", 110, cuts=("less of a",), least=100, given_back=30, when="x")
    awake = Allocation(GPU, "b", 4, cuts=("less of b",), least=24, sure=60, at_most=60, when="sampling")
    need = Requirement(GPU, (trainer, awake), free)
    assert (need.sure, need.with_cuts) == (110 - 30 + 4 + 60, 104)
    fault = need.fault("m")
    assert ("less of a, less of b" in fault) is cuts


def test_the_room_that_a_card_has_is_told_of_a_model_whose_config_leaves_settings_out():
    """That some of its size is assumed is a doubt of its own, which no setting of memory removes."""
    known = find_size("Qwen/Qwen3-1.7B")
    options, card = {"gpu_memory_utilization": 0.3}, imagined_machine(48 * GIB)
    guessed = Workload("m", dataclasses.replace(known, assumed=("tie_word_embeddings",)), "vllm", options, 1024)
    doubt, assumed = plan_for(guessed, FSTConfig(), card).doubts()
    assert doubt.endswith("engine_options={'sleep_level': 1}")
    assert "transformers' defaults are counted" in assumed
    for size in (24, 80):
        shares = {
            fitting_share(dataclasses.replace(guessed, size=s), FSTConfig(), imagined_machine(size * GIB))
            for s in (known, guessed.size)
        }
        assert len(shares) == 1


def test_a_share_that_the_trainer_leaves_no_room_for_is_a_fault_though_the_server_sleeps():
    """vLLM takes its share when it starts, and would refuse to."""
    (fault,) = in_turns(1, share=0.7).faults()
    assert "takes 23.0 GiB for the trainer and 33.6 GiB for the engine" in fault
    assert "lower engine_options={'gpu_memory_utilization': 0.7}" in fault


def test_where_turns_would_make_it_fit_they_are_named_and_only_there():
    turns = "; or let vLLM sleep during updates, with which all fits: engine_options={'sleep_level': 1}"
    (doubt,) = in_turns(None).doubts()
    assert doubt.endswith(turns)
    assert in_turns(None, card=80).doubts() == [], "it fits as it is"
    assert turns not in "".join(in_turns(None, "Qwen/Qwen3-8B", 24).faults()), "it would not fit either"
    assert turns not in "".join(in_turns(1, "Qwen/Qwen3-8B", 24).faults())
    attached = in_turns(None, options={"attach_url": "http://127.0.0.1:1"})
    assert attached.doubts()
    assert turns not in "".join(attached.doubts())


def test_a_fault_says_who_takes_how_much_and_what_to_do():
    available = Available({MEMORY: 2 * GIB, DISK: 16 * 2**20})
    plan = plan_memory(lab_policy("vllm"), FSTConfig(), Path("nowhere"), available)
    memory, disk = plan.faults()
    assert memory == (
        f"memory: training model={str(BASE)!r} (0.94M parameters) takes 18 MiB for the trainer and 4.0 GiB for the "
        "engine, and 2.0 GiB are free; use a smaller model, kl_coefficient=0 (4 MiB less), "
        "engine_options={'cpu_kv_cache_gib': 1} (3 GiB less)"
    )
    assert "disk: training" in disk
    assert "18 MiB for published weights and 32 MiB for resumable states, and 16 MiB are free; free space" in disk
    assert not plan.warnings()


def test_what_may_not_fit_is_only_a_warning():
    recipe = FSTConfig(micro_batch_tokens=4096)
    plan = plan_memory(lab_policy(), recipe, Path("nowhere"), Available({MEMORY: 64 * 2**20, DISK: GIB}))
    assert not plan.faults()
    (warning,) = plan.warnings()
    assert "an update may take up to" in warning
    assert "64 MiB are free; if that proves too little, lower micro_batch_tokens=4096" in warning


def test_what_the_student_s_own_engine_holds_will_be_given_back():
    policy = lab_policy()
    policy.handle.ready()
    try:
        requirements = plan_memory(
            policy, FSTConfig(), Path("nowhere"), Available({MEMORY: 1000, DISK: GIB})
        ).requirements
    finally:
        policy.release()
    assert next(requirement.free for requirement in requirements if requirement.place == MEMORY) == 1000 + 4 * P


def test_a_server_that_sleeps_gives_its_whole_share_back():
    policy = lab_policy("vllm", gpu_memory_utilization=0.5, sleep_level=2)
    policy.handle._engine = SimpleNamespace(weights="base")  # type: ignore[assignment]
    plan = plan_memory(policy, FSTConfig(), Path("nowhere"), ON_GPU)
    assert parts(plan, GPU)[0].free == ON_GPU.free[GPU] + 5 * GIB
    del policy.handle._engine


def test_a_run_that_goes_on_has_part_of_what_it_needs_on_disk(tmp_path, monkeypatch):
    disk = shutil.disk_usage(tmp_path)  # others write to it between two looks
    monkeypatch.setattr(shutil, "disk_usage", lambda path: disk)
    for name in ("weights/step-000000/model.safetensors", "states/000001/trainer/state.safetensors"):
        (tmp_path / name).parent.mkdir(parents=True)
        with (tmp_path / name).open("wb") as file:
            file.truncate(2**40)
    (tmp_path / "states/000001/linked").hardlink_to(tmp_path / "states/000001/trainer/state.safetensors")
    assert 2**41 <= available_now(tmp_path).free[DISK] - available_now(tmp_path / "weights").free[DISK] < 2**41 + 2**30


def test_this_machine_says_what_is_free(tmp_path):
    available = available_now(tmp_path / "not" / "there" / "yet")
    assert 0 < available.free[MEMORY] < 2**50
    assert 0 < available.free[DISK] < 2**60


def control_group(root: Path, name: str, own: str, **files: str) -> None:
    """A made-up /proc and /sys, with the memory group ``name`` of a process that is in ``own``."""
    (root / "proc/self").mkdir(parents=True, exist_ok=True)
    (root / "proc/self/cgroup").write_text(own)
    group = root / "sys/fs/cgroup" / name
    group.mkdir(parents=True, exist_ok=True)
    for file, content in files.items():
        (group / file.replace("__", ".")).write_text(content)


LIMITS = {"memory__max": "5000\n", "memory__current": "3000\n", "memory__stat": "anon 1\ninactive_file 500\n"}


@pytest.mark.parametrize(
    ("group", "own"),
    [
        ("", "0::/\n"),
        ("jobs/mine", "0::/jobs/mine\n"),
        ("jobs", "0::/jobs/mine\n"),
        ("", "0::/as/seen/outside\n"),
    ],
    ids=["a container's", "its own", "one above it", "with a name from outside"],
)
def test_a_control_group_s_limit_counts_and_file_pages_do_not(tmp_path, group, own):
    control_group(tmp_path, group, own, **LIMITS)
    assert free_memory(tmp_path) == 5000 - 3000 + 500


def test_a_control_group_of_version_1_counts_too(tmp_path):
    own = "5:cpu,cpuacct:/x\n4:memory:/jobs\n0::/\n"
    limits = {"memory__limit_in_bytes": "5000", "memory__usage_in_bytes": "3000"}
    control_group(tmp_path, "memory/jobs", own, memory__stat="total_inactive_file 7\n", **limits)
    assert free_memory(tmp_path) == 2007


def test_a_control_group_without_a_limit_leaves_all(tmp_path):
    control_group(tmp_path, "", "0::/\n", **(LIMITS | {"memory__max": "max\n"}))
    assert free_memory(tmp_path) > GIB


# ---- writing -----------------------------------------------------------------------------------


def test_a_directory_that_can_be_made_is_left_unmade(tmp_path):
    assert writable_fault(tmp_path / "a" / "b") is None
    assert writable_fault(tmp_path) is None
    assert not list(tmp_path.iterdir())


def test_a_file_is_no_directory(tmp_path):
    (tmp_path / "file").touch()
    assert "file': it is a file; name a directory" in writable_fault(tmp_path / "file")
    assert f"{tmp_path / 'file'} is a file; name a directory" in writable_fault(tmp_path / "file" / "run")


def test_a_place_that_takes_no_files_is_refused():
    assert "nothing can be written there" in writable_fault(Path("/proc/run"))


def test_a_disk_that_takes_no_byte_is_refused(tmp_path):
    """A limit on the size of files stands in for a full disk: the file opens, and its first write fails."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        fault = writable_fault(tmp_path / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert f"nothing can be written there ([Errno {errno.EFBIG}]" in fault
    assert not list(tmp_path.iterdir())


@given(st.integers(0, 2**50))
def test_sizes_read_as_people_say_them(amount):
    number, unit = format_bytes(amount).split()
    assert unit in ("MiB", "GiB")
    assert abs(float(number) * {"MiB": 2**20, "GiB": 2**30}[unit] - amount) <= 0.06 * 2**30
