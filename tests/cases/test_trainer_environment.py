"""What the process's environment and torch's settings must not change: the gradient of an update."""

from collections.abc import Iterator

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from dspy_fst.errors import TrainingError
from dspy_fst.slow.trainer import Trainer
from dspy_fst.slow.training_settings import TrainingSettings
from tests.slow.conftest import one_thread, start  # noqa: F401
from tests.slow.makers import make_batch, make_row

SETTINGS = TrainingSettings(learning_rate=1e-2, kl_coefficient=0.0, max_grad_norm=0.5)


def first_update(start):  # noqa: F811
    trainer = Trainer(start, SETTINGS, device="cpu")
    before = {name: p.detach().clone() for name, p in trainer.parameters.items()}
    rows = [make_row([1, 2, 3], [4, 5], [-3.0, -2.0], 1.0, 0.25), make_row([1, 2], [7, 8], [-3.0, -3.0], -0.7, 0.25)]
    report = trainer.step(make_batch(rows))
    moved = sum(float((p.detach() - before[name]).abs().double().sum()) for name, p in trainer.parameters.items())
    return report, moved


@pytest.fixture(scope="module")
def clean(start):  # noqa: F811
    torch.set_num_threads(1)
    report, moved = first_update(start)
    return report.grad_norm, moved


VARIABLES = {
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "8",
    "ACCELERATE_MIXED_PRECISION": "bf16",
    "ACCELERATE_DYNAMO_BACKEND": "AOT_EAGER",
    "ACCELERATE_USE_FSDP": "true",
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_USE_MEGATRON_LM": "true",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "true",
    "ACCELERATE_DOWNCAST_BF16": "true",
    "ACCELERATE_SPLIT_BATCHES": "true",
    "ACCELERATE_FP8_BACKEND": "TE",
    "ACCELERATE_TORCH_DEVICE": "meta",
}


@pytest.fixture
def forgotten() -> Iterator[None]:
    """accelerate reads most of its variables once a process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("variable", VARIABLES)
def test_a_variable_of_a_launcher_leaves_the_update_as_it_is(start, clean, monkeypatch, forgotten, variable):  # noqa: F811
    monkeypatch.setenv(variable, VARIABLES[variable])
    report, moved = first_update(start)
    assert (report.grad_norm, moved) == pytest.approx(clean, rel=1e-6)


@pytest.mark.parametrize("variable", ["WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE"])
def test_several_processes_are_refused_by_the_variable_that_tells_of_them(start, monkeypatch, variable):  # noqa: F811
    monkeypatch.setenv(variable, "2")
    with pytest.raises(TrainingError, match=rf"one of several that were launched together \({variable}=2\)"):
        Trainer(start, SETTINGS, device="cpu")


def test_a_process_launched_alone_may_train(start, monkeypatch, clean):  # noqa: F811
    for name in ("WORLD_SIZE", "PMI_SIZE"):
        monkeypatch.setenv(name, "1")
    assert first_update(start)[0].grad_norm == pytest.approx(clean[0], rel=1e-6)


def test_what_another_user_of_accelerate_chose_is_not_inherited(start, clean, forgotten):  # noqa: F811
    Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=4)
    assert first_update(start)[0].grad_norm == pytest.approx(clean[0], rel=1e-6)


def test_float32_products_are_exact_whatever_the_process_allows(start):  # noqa: F811
    """What TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1 or a library's call has set."""
    trainer = Trainer(start, SETTINGS, device="cpu")
    seen = set()
    hook = torch.nn.modules.module.register_module_forward_hook(
        lambda *_: seen.add(torch.get_float32_matmul_precision())
    )
    torch.set_float32_matmul_precision("medium")
    try:
        trainer.step(make_batch([make_row([1, 2, 3], [4, 5], [-3.0, -2.0], 1.0, 0.5)]))
        trainer.score([[1, 2, 3]])
        assert torch.get_float32_matmul_precision() == "medium"  # the user's own setting is left as it was
    finally:
        torch.set_float32_matmul_precision("highest")
        hook.remove()
    assert seen == {"highest"}


def test_the_default_dtype_of_the_process_leaves_the_update_as_it_is(start, clean):  # noqa: F811
    torch.set_default_dtype(torch.bfloat16)
    try:
        report, moved = first_update(start)
    finally:
        torch.set_default_dtype(torch.float32)
    assert (report.grad_norm, moved) == pytest.approx(clean, rel=1e-6)
