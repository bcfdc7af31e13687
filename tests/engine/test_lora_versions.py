"""LoRA adapters on vLLM without vLLM: what is refused from the files, names and places on the server, and its flags."""

import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from dspy_fst.engine.base import AdapterFiles, Checkpoint, Holding
from dspy_fst.engine.vllm.client import NoAnswerError
from dspy_fst.engine.vllm.launch import lora_places, vllm_command, vllm_environment
from dspy_fst.engine.vllm.lora_client import LoRAClient
from dspy_fst.engine.vllm.lora_files import LoRANeeds
from dspy_fst.engine.vllm.lora_versions import LoRAVersions
from dspy_fst.engine.vllm.server import VLLMServer
from dspy_fst.engine.vllm.server_settings import VLLMSettings, vllm_faults
from dspy_fst.engine.vllm.supervisor import Supervisor
from dspy_fst.errors import EngineError, SyncError
from dspy_fst.model_files.lora_folder import CONFIG, TENSORS
from tests.engine.test_supervisor import REQUEST, World
from tests.engine.test_vllm_client import Canned

LAYER = "base_model.model.model.layers.0"
CONTENT = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]}


def adapter(
    folder: Path, name: str = "shared", *, layers: tuple[str, ...] = ("self_attn.q_proj",), **config: Any
) -> AdapterFiles:
    """A peft folder as far as it is read here."""
    path = folder / name
    path.mkdir(parents=True, exist_ok=True)
    (path / CONFIG).write_text(json.dumps({**CONTENT, **config}))
    parts = [f"{layer}.lora_{part}.weight" for layer in layers for part in "AB"]
    save_file({f"{LAYER}.{part}": torch.zeros(1) for part in parts}, path / TENSORS)
    return AdapterFiles(name, path)


def version(folder: Path, name: str, *names: str, **config: Any) -> Checkpoint:
    base = folder / "base"
    base.mkdir(exist_ok=True)
    (base / "config.json").write_text("{}")
    (base / "model.safetensors").write_bytes(b"")
    adapters = tuple(adapter(folder / name, each, **config) for each in names or ("shared",))
    return Checkpoint(name, base, adapters=adapters)


# What vLLM would refuse


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"use_dora": True}, "use_dora=True, which vLLM does not support"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save=\['lm_head'\], which vLLM does not support"),
        ({"lora_bias": True}, "lora_bias=True, which vLLM does not support"),
        ({"trainable_token_indices": [7]}, r"trainable_token_indices=\[7\], which vLLM does not support"),
        ({"bias": "all"}, "bias='all', and vLLM adapts no biases"),
        ({"init_lora_weights": "pissa_niter_16"}, "init_lora_weights='pissa_niter_16', which changes the base"),
        ({"r": 600}, "its rank is 600, and vLLM's limit is 512"),
        ({"rank_pattern": {"q_proj": 513}}, "its rank is 513, and vLLM's limit is 512"),
        ({"r": 0}, "its rank is 0"),
        ({"r": None}, "its rank is None"),
        ({"peft_type": "IA3"}, "it is of the kind IA3, not LORA"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_an_adapter_that_vllm_cannot_serve_is_refused_before_anything_is_sent(
    tmp_path: Path, config: dict[str, Any], reason: str
) -> None:
    engine = Supervisor(VLLMSettings(), World().make)
    with pytest.raises(EngineError, match=rf"vLLM cannot serve LoRA adapter 'shared' at .*/shared: .*{reason}"):
        engine.load(version(tmp_path, "v0", **config))
    assert engine.server.address is None


def test_all_reasons_are_told_at_once(tmp_path: Path) -> None:
    one, other = adapter(tmp_path, "one", use_dora=True, bias="all"), adapter(tmp_path, "other", r=513)
    save_file({"x.lora_magnitude_vector": torch.zeros(1)}, other.path / TENSORS)
    with pytest.raises(EngineError) as told:
        LoRANeeds.of([one, other])
    for part in ("'one'", "use_dora", "bias='all'", "; nor LoRA adapter 'other'", "513", "x.lora_magnitude_vector"):
        assert part in str(told.value)


def test_a_folder_that_is_no_adapter_is_named(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"LoRA adapter 'shared': .*/nowhere cannot be read"):
        LoRANeeds.of([AdapterFiles("shared", tmp_path / "nowhere")])
    broken = adapter(tmp_path)
    (broken.path / TENSORS).write_bytes(b"none")
    with pytest.raises(EngineError, match=r"LoRA adapter 'shared': .* cannot be read"):
        LoRANeeds.of([broken])


@pytest.mark.parametrize("start", [True, False, "gaussian", "lora_ga"])
def test_starts_that_leave_the_base_as_it_is_are_served(tmp_path: Path, start: object) -> None:
    assert LoRANeeds.of([adapter(tmp_path, init_lora_weights=start)]).rank == 8


# What a server is started with


def test_a_server_is_started_for_the_highest_rank_and_for_the_layers_that_are_adapted(tmp_path: Path) -> None:
    needs = LoRANeeds.of(
        [
            adapter(tmp_path, "hops", layers=("self_attn.q_proj", "mlp.up_proj")),
            adapter(tmp_path, "answer", layers=("mlp.experts.3.down_proj",), rank_pattern={"down_proj": 9}),
        ]
    )
    assert needs == LoRANeeds(2, 16, frozenset({"q_proj", "up_proj", "down_proj", "experts"}))
    command = " ".join(vllm_command(VLLMSettings(), tmp_path, 8000, needs))
    assert "--enable-lora --max-lora-rank 16 --max-loras 4 --max-cpu-loras 8" in command
    assert "--lora-target-modules down_proj experts q_proj up_proj" in command
    assert vllm_environment(VLLMSettings(), "key", loras=True)["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "1"


def test_a_server_for_whole_weights_has_no_lora(tmp_path: Path) -> None:
    assert not [part for part in vllm_command(VLLMSettings(), tmp_path, 8000) if "lora" in part and part[:2] == "--"]
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING" not in vllm_environment(VLLMSettings(), "key")


def test_the_number_of_adapters_in_a_batch_is_a_setting() -> None:
    needs = LoRANeeds(3, 8, frozenset({"q_proj"}))
    assert lora_places(VLLMSettings(), needs) == (6, 12)
    assert lora_places(VLLMSettings(max_loras=1), needs) == (1, 12)
    assert lora_places(VLLMSettings(max_loras=20), needs) == (20, 40)
    faults = "\n".join(vllm_faults(VLLMSettings(max_loras=0, extra_args=("--max-loras", "3", "--enable-lora"))))
    assert "max_loras is 0: it must be at least 1" in faults
    assert "extra_args sets --enable-lora, --max-loras" in faults


# Versions beside each other


class Held(LoRAClient):
    """The adapters of a server, without one."""

    def __init__(self) -> None:
        self.names: dict[str, Path] = {}
        self.extended = True
        self.on_load: Callable[[str], None] = lambda name: None

    def load(self, name: str, folder: Path) -> None:
        self.on_load(name)
        self.names[name] = folder

    def unload(self, name: str) -> None:
        self.names.pop(name, None)

    def held(self, name: str, folder: Path) -> Holding:
        return Holding({"t": str(folder)}, {} if self.names[name] == folder else {"t": "stale"}, "float32")


def versions_of(server: Held, base: Checkpoint, *, capacity: int = 4, wait_s: float = 30) -> LoRAVersions:
    return LoRAVersions(server, base, LoRANeeds.of(base.adapters), capacity=capacity, wait_s=wait_s)


def test_a_call_keeps_the_version_that_it_began_with_and_the_last_one_unloads_it(tmp_path: Path) -> None:
    server = Held()
    versions = versions_of(server, version(tmp_path, "v0", "hops", "answer"))
    versions.load(version(tmp_path, "v0", "hops", "answer"))
    with versions.calling("hops") as one, versions.calling("hops"):
        versions.load(version(tmp_path, "v1", "hops", "answer"))
        assert one == ("hops@v0", "v0")
        assert versions.version == "v1"
        assert set(server.names) == {"hops@v0", "hops@v1", "answer@v1"}
        with versions.calling("hops") as other:
            assert other == ("hops@v1", "v1")
        with versions.calling(None) as base:
            assert base == (None, "v1"), "with several adapters, None is the base"
    assert set(server.names) == {"hops@v1", "answer@v1"}


def test_the_base_is_not_sampled_beside_adapters_on_a_server_without_the_extension(tmp_path: Path) -> None:
    server = Held()
    server.extended = False
    versions = versions_of(server, version(tmp_path, "v0", "hops", "answer"))
    versions.load(version(tmp_path, "v0", "hops", "answer"))
    with versions.calling("hops") as target:
        assert target.model == "hops@v0"
    with pytest.raises(EngineError, match="without a LoRA adapter needs dspy_fst's worker extension"):
        versions.calling(None).__enter__()
    assert versions.held(version(tmp_path, "v0"), lambda: None) is None, "nor can it be compared"


def test_the_only_adapter_needs_no_name(tmp_path: Path) -> None:
    versions = versions_of(Held(), version(tmp_path, "v0"))
    versions.load(version(tmp_path, "v0"))
    with versions.calling(None) as target:
        assert target == ("shared@v0", "v0")


def test_a_load_waits_for_room_until_calls_on_old_versions_end(tmp_path: Path) -> None:
    server = Held()
    versions = versions_of(server, version(tmp_path, "v0"), capacity=2)
    versions.load(version(tmp_path, "v0"))
    begun, may_end = threading.Event(), threading.Event()

    def call() -> None:
        with versions.calling(None):
            begun.set()
            assert may_end.wait(30)

    with ThreadPoolExecutor(2) as pool:
        old = pool.submit(call)
        assert begun.wait(30)
        versions.load(version(tmp_path, "v1"))
        load = pool.submit(versions.load, version(tmp_path, "v2"))
        assert not load.done()
        assert versions.version == "v1"
        may_end.set()
        load.result(30)
        old.result(30)
    assert set(server.names) == {"shared@v2"}


def test_a_load_that_finds_no_room_says_who_holds_it(tmp_path: Path) -> None:
    versions = versions_of(Held(), version(tmp_path, "v0"), capacity=2, wait_s=0.05)
    versions.load(version(tmp_path, "v0"))
    with versions.calling(None):
        versions.load(version(tmp_path, "v1"))
        with pytest.raises(EngineError, match=r"waited 0.05 s .*shared@v0, shared@v1 fill the server's 2 places"):
            versions.load(version(tmp_path, "v2"))


def test_after_a_load_that_failed_nothing_is_sampled_and_nothing_is_left_behind(tmp_path: Path) -> None:
    server = Held()
    versions = versions_of(server, version(tmp_path, "v0", "hops", "answer"))
    versions.load(version(tmp_path, "v0", "hops", "answer"))

    def refuse(name: str) -> None:
        if name == "answer@v1":
            raise EngineError("no")

    server.on_load = refuse
    with pytest.raises(EngineError, match="no"):
        versions.load(version(tmp_path, "v1", "hops", "answer"))
    assert versions.version is None
    with pytest.raises(EngineError, match="no weights are served"), versions.calling("hops"):
        pass
    server.on_load = lambda name: None
    versions.load(version(tmp_path, "v2", "hops", "answer"))
    assert set(server.names) == {"hops@v2", "answer@v2"}


def test_the_base_is_compared_until_it_was_found_sound(tmp_path: Path) -> None:
    server, checkpoint = Held(), version(tmp_path, "v0")
    versions = versions_of(server, checkpoint)
    versions.load(checkpoint)
    path = str(checkpoint.adapters[0].path)
    for base, wrong in (({"w": "packed"}, {"w": "packed"}), ({}, {})):
        found = versions.held(checkpoint, lambda base=base: Holding({"w": "1"}, base, "float32"))
        assert found == Holding({"w": "1", "shared: t": path}, wrong, "float32", with_base=True)
    again = versions.held(checkpoint, lambda: pytest.fail("the base was compared before"))
    assert again == Holding({"shared: t": path}, {}, "float32", with_base=False)
    stale = versions.held(version(tmp_path, "v1"), lambda: None)
    assert stale is not None
    assert stale.wrong == {"shared: t": "stale"}


def test_what_a_running_server_cannot_go_over_to_is_told(tmp_path: Path) -> None:
    first = version(tmp_path, "v0")
    versions = versions_of(Held(), first)
    elsewhere = version(tmp_path / "x" if (tmp_path / "x").mkdir() is None else tmp_path, "v1")
    assert versions.refuses(version(tmp_path, "v1")) is None
    assert "another base" in (versions.refuses(elsewhere) or "")
    written = {"digests": {"w": "1"}}
    versions = versions_of(Held(), replace(first, **written))
    assert versions.refuses(replace(elsewhere, **written)) is None, "the same numbers in another folder"
    assert "another base" in (versions.refuses(replace(first, digests={"w": "2"})) or "")
    assert "whole ones" in (versions.refuses(replace(first, adapters=())) or "")
    assert "rank 16 is above the 8" in (versions.refuses(version(tmp_path, "v2", r=9)) or "")
    assert "without LoRA on lm_head" in (versions.refuses(version(tmp_path, "v3", layers=("lm_head",))) or "")


def test_another_base_starts_the_server_anew_and_is_no_failure(tmp_path: Path) -> None:
    world = World()
    world.on_swap = lambda checkpoint: "another base" if checkpoint.version == "v1" else None
    engine = Supervisor(VLLMSettings(), world.make)
    for name in ("v0", "v1", "v2"):
        engine.load(version(tmp_path, name))
    assert world.launched == [["v0"], ["v1", "v2"]]
    assert engine.take_counts() == {"restarts for another base": 1}
    engine.complete(REQUEST, 1, adapter="shared")
    engine.score([[1, 2]], "shared")
    assert world.through == ["shared"]


# Against a server of canned replies


LORAS = {"/v1/load_lora_adapter": (200, "loaded"), "/v1/unload_lora_adapter": (200, "unloaded")}


@pytest.fixture
def guest(canned: Canned) -> VLLMServer:
    canned.replies |= LORAS
    canned.replies["/collective_rpc"] = (200, {"results": [True]})
    return VLLMServer(VLLMSettings(attach_url=canned.url, request_timeout_s=60, load_timeout_s=60))


def sent(canned: Canned, path: str) -> list[Any]:
    return [body for asked, body in canned.asked if asked == path]


def test_adapters_are_loaded_without_a_pause_and_named_by_the_request(
    guest: VLLMServer,
    canned: Canned,
    tmp_path: Path,
) -> None:
    guest.load(version(tmp_path, "v0"))
    guest.load(version(tmp_path, "v1"))
    assert guest.weights == "v1"
    assert guest.complete(REQUEST, 0).weights == "v1"
    assert sent(canned, "/v1/chat/completions")[0]["model"] == "shared@v1"
    assert not {"/pause?mode=wait", "/reset_prefix_cache"} & set(canned.paths())
    loads = sent(canned, "/v1/load_lora_adapter")[1:]  # the first only asks whether the server can
    assert loads[1] == {"lora_name": "shared@v1", "lora_path": str(tmp_path / "v1" / "shared")}
    assert sent(canned, "/v1/unload_lora_adapter") == [{"lora_name": "shared@v0"}]


def test_a_server_without_runtime_loading_is_refused_with_how_to_launch_it(
    guest: VLLMServer,
    canned: Canned,
    tmp_path: Path,
) -> None:
    del canned.replies["/v1/load_lora_adapter"]
    with pytest.raises(EngineError, match=r"without VLLM_ALLOW_RUNTIME_LORA_UPDATING=1.*--enable-lora"):
        guest.load(version(tmp_path, "v0"))
    assert guest.weights is None


def test_a_server_without_lora_is_refused_with_how_to_launch_it(
    guest: VLLMServer,
    canned: Canned,
    tmp_path: Path,
) -> None:
    canned.replies["/collective_rpc"] = (200, {"results": [False]})
    with pytest.raises(EngineError, match=r"launched without --enable-lora\. Launch it with .*--max-loras"):
        guest.load(version(tmp_path, "v0"))


def test_what_an_attached_server_refuses_is_told_and_not_taken_for_its_death(
    guest: VLLMServer,
    canned: Canned,
    tmp_path: Path,
) -> None:
    canned.replies["/v1/load_lora_adapter"] = (500, {"error": {"message": "LoRA rank 8 is greater than max_lora_rank"}})
    with pytest.raises(EngineError, match="so it refused: LoRA rank 8 is greater than max_lora_rank") as told:
        guest.load(version(tmp_path, "v0"))
    assert not isinstance(told.value, NoAnswerError)


def test_whole_weights_and_adapters_need_a_server_that_is_started_anew(
    guest: VLLMServer,
    tmp_path: Path,
) -> None:
    checkpoint = version(tmp_path, "v0")
    guest.load(replace(checkpoint, adapters=()))
    with pytest.raises(EngineError, match=r"weights v0 need a server that is started anew: .* without LoRA adapters"):
        guest.load(checkpoint)
    assert guest.weights == "v0"


def test_a_lost_answer_to_a_load_is_no_failure(
    canned: Canned,
    guest: VLLMServer,
    tmp_path: Path,
) -> None:
    guest.load(version(tmp_path, "v0"))
    lost = version(tmp_path, "v1")
    canned.replies["/v1/load_lora_adapter"] = (500, "lost")
    canned.replies["/health"] = (500, "")
    card = {"id": "shared@v1", "root": str(lost.adapters[0].path), "parent": "policy"}
    canned.replies["/v1/models"] = (200, {"data": [{"id": "policy"}, card]})
    guest.load(lost)
    assert guest.weights == "v1"
    canned.replies["/v1/models"] = (200, {"data": [{"id": "policy"}, {**card, "root": "elsewhere"}]})
    with pytest.raises(NoAnswerError, match="lost"):
        guest.load(version(tmp_path, "v2"))
    assert len(sent(canned, "/v1/load_lora_adapter")) == 1 + 1 + 1 + 2, "asked again once"


@pytest.mark.parametrize(
    ("layers", "is_attached", "batches"),
    [
        (("self_attn.q_proj", "lm_head"), False, [[[1, 2]]]),
        (("self_attn.q_proj",), False, [[[1, 2], [3, 4]]]),
        (("self_attn.q_proj",), True, [[[1, 2]]]),
    ],
    ids=["adapted-head", "launched-here", "attached"],
)
def test_where_vllm_may_have_wrapped_the_head_one_sequence_is_scored_at_a_time(
    guest: VLLMServer,
    canned: Canned,
    tmp_path: Path,
    layers: tuple[str, ...],
    is_attached: bool,
    batches: list[Any],
) -> None:
    guest.load(version(tmp_path, "v0", layers=layers))
    if not is_attached:
        guest.settings = VLLMSettings()
    canned.replies["/v1/completions"] = (200, {"choices": [{"index": 0}, {"index": 1}][: len(batches[0])]})
    with pytest.raises(EngineError, match="vLLM scored"):  # the canned reply is none, so the first batch is the last
        guest.score([[1, 2], [3, 4]])
    scored = [body for body in sent(canned, "/v1/completions") if body.get("prompt_logprobs") == 0]
    assert [(body["model"], body["prompt"]) for body in scored] == [("shared@v0", batch) for batch in batches]


def test_an_adapter_that_is_not_there_is_named(
    guest: VLLMServer,
    tmp_path: Path,
) -> None:
    guest.load(replace(version(tmp_path, "v0"), adapters=()))
    with pytest.raises(EngineError, match="weights v0 have no LoRA adapter 'hops'"):
        guest.complete(REQUEST, 0, adapter="hops")


def test_stale_adapters_start_the_server_anew(tmp_path: Path) -> None:
    world = World()
    engine = Supervisor(VLLMSettings(max_restarts=3), world.make)
    engine.load(version(tmp_path, "v0"))

    def stale_once(scorer: Any) -> None:
        if scorer.number == 0:
            raise SyncError("stale")

    engine.on_recovery(lambda sentence: None, stale_once)
    engine.load(version(tmp_path, "v1"))
    assert world.launched == [["v0", "v1"], ["v1"]]
    assert engine.take_counts() == {"swaps refused": 1, "restarts": 1}
