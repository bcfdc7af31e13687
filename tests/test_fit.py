"""What will not fit is told before anything is loaded."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from dspy_fst import FSTConfig, PolicyLM
from dspy_fst import fit as fit_module
from dspy_fst.fit import GIB, fit_faults, need, parameter_count, writable_fault
from programs.lab import BASE


def test_parameters_are_counted_from_the_headers_alone():
    counted = sum(tensor.numel() for tensor in load_file(BASE / "model.safetensors").values())
    assert parameter_count(BASE) == counted


def test_files_that_are_no_safetensors_are_not_counted(tmp_path):
    assert parameter_count(tmp_path) is None
    for content in (b"", b"\xff" * 8, (10).to_bytes(8, "little") + b"not json!!"):
        (tmp_path / "model.safetensors").write_bytes(content)
        assert parameter_count(tmp_path) is None


def test_every_part_of_the_need_follows_its_setting(tmp_path):
    policy = PolicyLM(BASE, engine="in_process")
    parameters = parameter_count(BASE)
    vocabulary = json.loads((BASE / "config.json").read_text())["vocab_size"]
    base = need(policy, FSTConfig(micro_batch_tokens=1000, kl_coefficient=0), tmp_path)
    assert base.trainer == 16 * parameters + 3 * 4 * vocabulary * 1000
    assert need(policy, FSTConfig(micro_batch_tokens=1000), tmp_path).trainer == base.trainer + 4 * parameters
    assert need(policy, FSTConfig(keep_states=3), tmp_path).disk - base.disk == 12 * parameters
    assert need(policy, FSTConfig(keep_weights=3), tmp_path).disk - base.disk == 4 * parameters


@pytest.mark.skipif(fit_module.free_gpu_bytes() is not None, reason="the figures are those of a CPU")
def test_vllm_s_cache_counts(tmp_path):
    small, large = (PolicyLM(BASE, engine="vllm", engine_options={"cpu_kv_cache_gib": size}) for size in (1, 5))
    assert need(large, FSTConfig(), tmp_path).engine - need(small, FSTConfig(), tmp_path).engine == 4 * GIB


def test_a_model_that_is_too_large_is_refused_with_the_figures(tmp_path, monkeypatch):
    monkeypatch.setattr(fit_module, "parameter_count", lambda folder: 3_000_000_000)
    monkeypatch.setattr(fit_module, "_free_memory", lambda: 8 * GIB)
    monkeypatch.setattr(fit_module.shutil, "disk_usage", lambda path: Free(GIB))
    memory, disk = fit_faults(PolicyLM(BASE, engine="in_process"), FSTConfig(), tmp_path / "run")
    assert "3,000.0M parameters" in memory
    assert "8.0 GiB are free" in memory
    assert "1.0 GiB are free" in disk
    assert "keep_states" in disk


class Free:
    def __init__(self, free):
        self.free = free


def test_what_fits_is_not_refused(tmp_path):
    assert fit_faults(PolicyLM(BASE, engine="in_process"), FSTConfig(), tmp_path / "run") == []


def test_a_directory_that_cannot_be_written_is_found_by_trying(tmp_path):
    assert writable_fault(tmp_path / "new" / "run") is None
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    assert "is a file" in str(writable_fault(tmp_path / "file" / "run"))
    assert "cannot be written" in str(writable_fault(Path("/proc/run")))
