"""vLLM's workers compare what their forward pass reads with a folder: packed, fused and tied tensors included."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dspy_fst.engine.base import Checkpoint
from dspy_fst.engine.verification import verify_identity
from dspy_fst.engine.vllm import client as vllm_client
from dspy_fst.engine.vllm.launch import vllm_command
from dspy_fst.engine.vllm.served.dspy_fst_weight_check import difference, digest
from dspy_fst.engine.vllm.server import VLLMServer
from dspy_fst.engine.vllm.server_settings import VLLMSettings
from dspy_fst.errors import DiskError, SyncError
from tests.engine.tiny_qwen import make_model, save

PROBES = [[3, *range(40, 90), 0], [4, *range(300, 340)]]
LAYER = "model.layers.1."
ALTERED = (
    *("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight", f"{LAYER}input_layernorm.weight"),
    *(f"{LAYER}self_attn.{part}.weight" for part in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm")),
    *(f"{LAYER}mlp.{part}.weight" for part in ("gate_proj", "up_proj", "down_proj")),
)


# What counts as a difference


def test_a_digest_tells_apart_values_types_and_shapes():
    one = torch.arange(6, dtype=torch.float32)
    others = [one.clone().index_fill_(0, torch.tensor([3]), 3.0000002), one.to(torch.bfloat16), one.view(2, 3)]
    assert digest(one) == digest(one.clone())
    assert len({digest(tensor) for tensor in (one, *others)}) == 4


def test_a_difference_says_how_many_numbers_and_how_far():
    wanted = torch.ones(4, 3)
    used = wanted.clone()
    assert difference(used, wanted) is None
    used[0, 1] += 0.5
    assert difference(used, wanted) == "1 of 12 numbers, by up to 0.5"
    assert difference(used[:2], wanted) == "shape (2, 3) for (4, 3)"
    used[0, 1] = float("nan")
    assert difference(used, wanted) == "1 of 12 numbers, by up to nan"


def test_padding_that_no_tensor_fills_is_not_compared():
    wanted = torch.full((4, 3), float("nan"))
    wanted[:2] = 1.0
    assert difference(torch.ones(4, 3), wanted) is None
    assert difference(torch.zeros(4, 3), wanted) == "6 of 6 numbers, by up to 1"


def test_weights_are_compared_in_the_type_in_use():
    wanted = torch.tensor([1.001, 2.0])
    assert difference(wanted.to(torch.bfloat16), wanted) is None


# The command line


def overrides_of(dtype: str, *extra: str) -> dict[str, object] | None:
    command = vllm_command(VLLMSettings(dtype=dtype, extra_args=extra), Path("weights"), 8000)
    return json.loads(command[command.index("--hf-overrides") + 1]) if "--hf-overrides" in command else None


def test_the_head_is_in_float32_whatever_the_body_and_beside_the_user_s_overrides():
    assert overrides_of("bfloat16") == {"head_dtype": "float32"}
    assert overrides_of("float32") is None
    assert overrides_of("bfloat16", "--hf-overrides", '{"rope_theta": 5}', "--max-num-seqs", "8") == {
        "head_dtype": "float32",
        "rope_theta": 5,
    }
    assert overrides_of("bfloat16", '--hf-overrides={"head_dtype": "model"}') == {"head_dtype": "model"}


# The shared server


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    return save(make_model(0), tmp_path, "step-000000")


def with_altered(checkpoint: Checkpoint, name: str, place: Path) -> Checkpoint:
    """The same folder but for one number of one tensor, off by the least that its type can hold."""
    tensors = load_file(checkpoint.path / "model.safetensors")
    flat = tensors[name].view(-1)
    flat[flat.numel() // 2] = torch.nextafter(flat[flat.numel() // 2], torch.tensor(1e9))
    place.mkdir()
    for file in checkpoint.path.iterdir():
        (place / file.name).write_bytes(file.read_bytes())
    save_file(tensors, place / "model.safetensors", {"format": "pt"})
    return Checkpoint(f"{checkpoint.version} but {name}", place)


@pytest.mark.vllm
def test_the_server_says_what_it_really_uses(server: VLLMServer, checkpoint: Checkpoint, tmp_path: Path) -> None:
    server.load(checkpoint)
    scores = server.score(PROBES)
    sound = server.held(checkpoint)
    assert sound is not None
    assert (sound.wrong, sound.dtype) == ({}, "float32")
    tensors = load_file(checkpoint.path / "model.safetensors")
    assert sound.digests == {name: digest(tensor) for name, tensor in tensors.items()}
    for number, name in enumerate(ALTERED):
        server.load(with_altered(checkpoint, name, tmp_path / str(number)))
        found = server.held(checkpoint)
        assert found is not None
        assert list(found.wrong) == [name]
        assert found.wrong[name].startswith(f"1 of {tensors[name].numel()} numbers, by up to")
        with pytest.raises(SyncError, match=name):
            verify_identity(found, checkpoint)
    server.load(checkpoint)
    assert server.held(checkpoint) == sound
    assert server.score(PROBES) == scores  # comparing leaves the model as it was


@pytest.mark.vllm
def test_a_file_that_is_not_what_was_written_is_the_disk_s_fault(server: VLLMServer, checkpoint: Checkpoint) -> None:
    server.load(checkpoint)
    found = server.held(checkpoint)
    assert found is not None
    written = replace(checkpoint, digests={**found.digests, "model.norm.weight": "other"})
    with pytest.raises(DiskError, match=r"model\.norm\.weight \(its bytes differ\)"):
        verify_identity(found, written)


@pytest.mark.vllm
def test_an_attached_server_without_the_extension_cannot_tell_and_lives_on(
    server: VLLMServer, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert server.address is not None
    guest = VLLMServer(VLLMSettings(attach_url=server.address.url, api_key=server.address.api_key))
    guest.load(checkpoint)
    assert guest.held(checkpoint) is not None
    monkeypatch.setattr(vllm_client, "COMPARE", "dspy_fst_no_such_method")
    assert guest.held(checkpoint) is None
    assert guest.score(PROBES)
    guest.close()
