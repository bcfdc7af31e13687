"""Weights that are sent to a server, by vLLM's own weight transfer, and compared as they are sent again.

A real server and vLLM's engines of both sides, on a CPU: `no_card` stands in for NCCL, CUDA's streams and CUDA IPC.
"""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file

from dspy_fst.engine.base import Checkpoint
from dspy_fst.engine.verification import verify_identity
from dspy_fst.engine.vllm import server_settings, transfer
from dspy_fst.engine.vllm.address import Address
from dspy_fst.engine.vllm.client import VLLMClient
from dspy_fst.engine.vllm.launch import vllm_command, vllm_environment
from dspy_fst.engine.vllm.served.dspy_fst_weight_check import digest
from dspy_fst.engine.vllm.server import VLLMServer
from dspy_fst.engine.vllm.server_settings import VLLMSettings, vllm_faults
from dspy_fst.engine.vllm.transfer import Transfer
from dspy_fst.engine.vllm.wire import TRANSFER
from dspy_fst.errors import EngineError, NoAnswerError, SyncError
from tests.engine import no_card
from tests.engine.lora_adapters import make_adapter
from tests.engine.server_state import unread_version
from tests.engine.test_vllm_client import MISSING, Canned
from tests.engine.test_weight_check import ALTERED, PROBES, with_altered
from tests.engine.tiny_qwen import make_model, save

SWAP = (
    *("/pause?mode=wait", "/start_weight_update", "/update_weights", "/finish_weight_update"),
    *("/reset_prefix_cache", "/resume"),
)


@pytest.fixture(autouse=True)
def seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The settings see a card."""
    monkeypatch.setattr(server_settings, "has_gpu", lambda: True)


@pytest.fixture(scope="module")
def card() -> Iterator[None]:
    """This process can send. A tiny model makes several chunks."""
    with pytest.MonkeyPatch.context() as patch:
        no_card.install(patch.setattr)
        patch.setattr(transfer, "BUFFER_BYTES", 200_000)
        yield


@pytest.fixture
def guest(server: VLLMServer, card: None) -> Iterator[VLLMServer]:
    """Attached to the shared server, to which it sends."""
    assert server.address is not None
    url, key = server.address.url, server.address.api_key
    engine = VLLMServer(VLLMSettings(attach_url=url, api_key=key, weight_transfer="nccl", load_timeout_s=60))
    yield engine
    engine.close()


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Where each request goes, and the method that workers are asked for."""
    paths: list[str] = []
    send = VLLMClient.send

    def noted(client, method, path, *, timeout_s, json=None):
        paths.append(json["method"] if path == "/collective_rpc" else path)
        return send(client, method, path, timeout_s=timeout_s, json=json)

    monkeypatch.setattr(VLLMClient, "send", noted)
    return paths


def require_whole(engine: VLLMServer, checkpoint: Checkpoint) -> None:
    held = engine.held(checkpoint)
    assert held is not None
    assert held.wrong == {}


def digests_of(checkpoint: Checkpoint) -> dict[str, str]:
    return {name: digest(tensor) for name, tensor in load_file(checkpoint.path / "model.safetensors").items()}


# The shared server


@pytest.mark.vllm
def test_what_is_sent_is_what_the_disk_would_have_given(
    server: VLLMServer, guest: VLLMServer, tmp_path: Path, asked: list[str]
) -> None:
    one, two = (save(make_model(seed), tmp_path, f"step-00000{seed}") for seed in (1, 2))
    guest.load(one)
    asked.clear()
    guest.load(two)
    assert tuple(asked) == SWAP
    asked.clear()
    held = guest.held(two)
    assert held is not None
    assert asked == ["dspy_fst_compare_sent"]
    assert (held.wrong, held.digests, held.dtype) == ({}, digests_of(two), "float32")
    sent = guest.score(PROBES)
    server.load(two)
    assert server.score(PROBES) == sent


@pytest.mark.vllm
def test_a_server_lets_go_of_the_connection_with_its_client(
    server: VLLMServer, guest: VLLMServer, tmp_path: Path, asked: list[str]
) -> None:
    guest.load(save(make_model(1), tmp_path, "step-000001"))
    guest.close()
    assert asked[-1] == "/shutdown_weight_transfer_engine"
    assert server.address is not None
    client = VLLMClient(server.address, request_timeout_s=60, load_timeout_s=60)
    nothing: dict[str, list[str]] = {"names": [], "dtype_names": [], "shapes": []}
    with pytest.raises(EngineError, match="NCCL weight transfer not initialized"):
        client.run("dspy_fst_compare_sent", update_info=nothing)
    client.close()


@pytest.mark.vllm
def test_one_number_that_differs_is_found_wherever_it_is(guest: VLLMServer, tmp_path: Path) -> None:
    checkpoint = save(make_model(0), tmp_path, "step-000000")
    guest.load(checkpoint)
    scores = guest.score(PROBES)
    for number, name in enumerate(ALTERED):
        guest.load(with_altered(checkpoint, name, tmp_path / str(number)))
        found = guest.held(checkpoint)
        assert found is not None
        assert list(found.wrong) == [name]
        with pytest.raises(SyncError, match=name):
            verify_identity(found, checkpoint)
    guest.load(checkpoint)
    assert guest.score(PROBES) == scores


@pytest.mark.vllm
def test_a_refusal_is_told_at_once_and_the_next_transfer_is_whole(
    guest: VLLMServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sender waits, as NCCL would, for a server that takes nothing."""
    one, two = (save(make_model(seed), tmp_path, f"step-00000{seed}") for seed in (1, 2))
    guest.load(one)
    gone = threading.Event()
    typeless = {"names": ["lm_head.weight"], "dtype_names": ["no_such_type"], "shapes": [[640, 64]]}
    with monkeypatch.context() as patch:
        patch.setattr(no_card.StoreGroup, "broadcast", lambda group, tensor, src: gone.wait(60))
        patch.setattr(no_card.StoreGroup, "destroy", lambda group: gone.set())
        patch.setattr(transfer, "_as_json", lambda update_info: typeless)
        began = time.monotonic()
        with pytest.raises(EngineError, match=r"POST .*/update_weights .*the server is well, so it refused"):
            guest.load(two)
    assert time.monotonic() - began < 40
    assert gone.is_set(), "the group was left"
    assert guest.weights is None
    guest.load(two)
    require_whole(guest, two)


@pytest.mark.vllm
def test_a_fault_of_the_sender_is_the_engine_s(
    guest: VLLMServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is no time limit of ours, though it is called one."""
    checkpoint = save(make_model(1), tmp_path, "step-000001")
    guest.load(checkpoint)

    def out_of_time(group: no_card.StoreGroup, tensor: object, src: int) -> None:
        raise TimeoutError("of NCCL")

    with monkeypatch.context() as patch:
        patch.setattr(no_card.StoreGroup, "broadcast", out_of_time)
        with pytest.raises(
            EngineError, match=r"the weight transfer \(nccl\) to vLLM at .* failed: TimeoutError\('of N"
        ):
            guest.load(checkpoint)
    assert guest.weights is None
    guest.load(checkpoint)
    require_whole(guest, checkpoint)


@pytest.mark.vllm
def test_a_server_on_the_trainer_s_card_takes_the_weights_from_its_memory(
    server: VLLMServer, tmp_path: Path, card: None
) -> None:
    one, two = (save(make_model(seed), tmp_path, f"step-00000{seed}") for seed in (1, 2))
    assert server.address is not None
    client = VLLMClient(server.address, request_timeout_s=60, load_timeout_s=60)
    with pytest.MonkeyPatch.context() as patch:  # it was launched for NCCL
        patch.setattr(Transfer, "_require_launched_for_it", lambda self, how: None)
        way = Transfer(client, "ipc", "")
    server.load(one)
    way.swap(two.path)
    assert way.held(two.path).wrong == {}
    assert way.held(one.path).wrong.keys() >= {"lm_head.weight", "model.embed_tokens.weight"}
    sent = server.score(PROBES)
    server.load(two)
    assert server.score(PROBES) == sent
    way.close()
    client.close()


# A server that answers as it is told


def test_a_server_that_was_launched_without_it_is_refused_before_anything_is_sent(
    canned: Canned, weights: Callable[[str], Checkpoint]
) -> None:
    engine = VLLMServer(VLLMSettings(attach_url=canned.url, weight_transfer="nccl"))
    for backend, why in ((None, "the weight transfer off"), ("ipc", "the weight transfer ipc")):
        canned.replies["/collective_rpc"] = (200, {"results": [backend]})
        with pytest.raises(EngineError, match=rf"was launched with {why}\. Launch it with --weight-transfer-config"):
            engine.load(weights("v0"))
    canned.replies["/collective_rpc"] = (500, {"error": {"message": MISSING.replace("compare", "transfer_backend")}})
    with pytest.raises(EngineError, match=r"was launched without our worker extension\. Launch it with"):
        engine.load(weights("v0"))
    assert "/pause?mode=wait" not in canned.paths()


def test_a_transfer_that_does_not_end_is_given_up(
    canned: Canned, card: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    canned.replies |= {path: (200, {}) for path in TRANSFER} | {"/get_world_size": (200, {"world_size": 1})}
    canned.replies["/collective_rpc"] = (200, {"results": ["nccl"]})
    canned.stalled_path = "/update_weights"
    left = threading.Event()
    group = SimpleNamespace(broadcast=lambda tensor, src: left.wait(60), destroy=left.set)
    monkeypatch.setattr(
        "vllm.distributed.weight_transfer.nccl_common.stateless_init_process_group", lambda *_, **__: group
    )
    client = VLLMClient(Address(canned.url, None, through_proxy=False), request_timeout_s=60, load_timeout_s=60)
    way = Transfer(client, "nccl", "")
    client.load_timeout_s = 1
    folder = save(make_model(0), tmp_path, "step-000000").path
    with pytest.raises(NoAnswerError, match=r"did not end within 1 s \(load_timeout_s\)|waited 1 s in vain"):
        way.swap(folder)
    assert left.wait(10), "the group was left"
    assert "/resume" in canned.paths()
    way.close()
    assert "/shutdown_weight_transfer_engine" not in canned.paths(), "it may be stuck, and would not answer"
    client.close()


def test_a_server_that_is_refused_after_it_got_weights_is_let_go(
    canned: Canned, weights: Callable[[str], Checkpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    canned.logprobs_heed_temperature = False
    ended: list[str] = []
    way = SimpleNamespace(swap=lambda folder: None, close=lambda: ended.append("way"))
    monkeypatch.setattr("dspy_fst.engine.vllm.server.way_to", lambda client, settings: way)
    with pytest.raises(EngineError, match="ignore the temperature"):
        VLLMServer(VLLMSettings(attach_url=canned.url, weight_transfer="nccl")).load(weights("v0"))
    assert ended == ["way"]


def test_a_connection_that_comes_about_too_late_is_closed_on_both_sides(
    canned: Canned, card: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    canned.replies |= {path: (200, {}) for path in TRANSFER} | {"/get_world_size": (200, {"world_size": 1})}
    canned.replies["/collective_rpc"] = (200, {"results": ["nccl"]})
    given_up, left = threading.Event(), threading.Event()

    def late(*_: object, **__: object) -> object:
        assert given_up.wait(60)
        return SimpleNamespace(destroy=left.set)

    monkeypatch.setattr("vllm.distributed.weight_transfer.nccl_common.stateless_init_process_group", late)
    client = VLLMClient(Address(canned.url, None, through_proxy=False), request_timeout_s=60, load_timeout_s=1)
    with pytest.raises(NoAnswerError, match=r"did not end within 1 s \(load_timeout_s\)"):
        Transfer(client, "nccl", "")
    assert "/shutdown_weight_transfer_engine" not in canned.paths()
    given_up.set()
    assert left.wait(10), "the group was left"
    assert "/shutdown_weight_transfer_engine" in canned.paths()
    client.close()


def test_servers_take_turns_in_the_order_of_their_asking_and_wait_for_all_ahead() -> None:
    turns, done = transfer._Turns(), list[int]()

    def take(number: int) -> None:
        with turns.turn(20):
            done.append(number)

    with turns.turn(20):
        threads = [threading.Thread(target=take, args=(number,)) for number in range(4)]
        for ahead, thread in enumerate(threads, 1):
            thread.start()
            while len(turns._line) <= ahead:
                time.sleep(0.001)
        with pytest.raises(NoAnswerError, match=r"waited 0\.5 s in vain for weight transfers"), turns.turn(0.1):
            pytest.fail("two at a time")
        assert done == []
    for thread in threads:
        thread.join(20)
    assert done == [0, 1, 2, 3]
    with turns.turn(0):
        pass


# The settings


def faults(**settings: object) -> list[str]:
    return [fault for fault in vllm_faults(VLLMSettings(**settings)) if "weight_transfer" in fault]


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"weight_transfer": "nccl"}, "give the server others (cards)"),
        ({"weight_transfer": "nccl", "cards": (0,)}, "give the server others (cards)"),
        ({"weight_transfer": "ipc", "cards": (1,)}, "one server that shares the trainer's card alone"),
        ({"weight_transfer": "ipc", "servers": 2}, "one server that shares the trainer's card alone"),
        ({"weight_transfer": "ipc", "attach_url": "http://127.0.0.1:1"}, "one server that shares the trainer's card"),
        ({"weight_transfer": "ipc", "extra_args": ("-tp", "2")}, "one server that shares the trainer's card alone"),
        ({"weight_transfer": "ipc", "sleep_level": 1}, "no plan counts its memory beside sleep_level"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_starts(
    settings: dict[str, object], why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for place in ("dspy_fst.engine.vllm.fleet.placing", "dspy_fst.engine.machine"):
        monkeypatch.setattr(f"{place}.gpu_count", lambda: 4)
    (told,) = faults(**settings)
    assert why in told
    assert told.startswith(f"weight_transfer is {settings['weight_transfer']!r}: ")


def test_what_can_work_is_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dspy_fst.engine.vllm.fleet.placing.gpu_count", lambda: 4)
    assert faults(weight_transfer="nccl", cards=(1,)) == []
    assert faults(weight_transfer="nccl", servers=3) == []
    assert faults(weight_transfer="nccl", attach_url="http://127.0.0.1:1") == []
    assert faults(weight_transfer="ipc") == []


def test_without_a_card_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_settings, "has_gpu", lambda: False)
    assert faults(weight_transfer="nccl", attach_url="http://127.0.0.1:1") == [
        "weight_transfer is 'nccl': weights are sent from the trainer's GPU, and torch sees none here; leave it unset"
    ]


def test_the_command_says_how_weights_come_and_ipc_alone_lets_pickles_in() -> None:
    flag = "--weight-transfer-config"
    for way in ("nccl", "ipc"):
        settings = VLLMSettings(weight_transfer=way)
        command = vllm_command(settings, Path("weights"), 8000)
        assert command[command.index(flag) + 1] == f'{{"backend": "{way}"}}'
        assert ("VLLM_ALLOW_INSECURE_SERIALIZATION" in vllm_environment(settings, "key")) == (way == "ipc")
    assert flag not in vllm_command(VLLMSettings(), Path("weights"), 8000)


def test_lora_adapters_do_not_go_this_way(tmp_path: Path) -> None:
    """They are files of a few MB, and their base stays."""
    engine = VLLMServer(VLLMSettings(weight_transfer="nccl", attach_url="http://127.0.0.1:9"))
    adapter, _ = make_adapter(tmp_path / "shared", "shared", 0)
    adapted = Checkpoint("v0", unread_version(tmp_path, "base").path, adapters=(adapter,))
    with pytest.raises(EngineError, match="weight_transfer is 'nccl': LoRA adapters go by their files"):
        engine.load(adapted)
