"""The real server: exact tokens, provably fresh weights, no process left behind."""

import asyncio
import re
import socket
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import dspy
import httpx
import pytest
from dspy.lm15 import Config, ContextLengthError, InvalidRequestError, Message, Request
from dspy.utils.exceptions import AdapterParseError
from transformers import AutoTokenizer, Qwen3ForCausalLM

from dspy_fst import PolicyLM
from dspy_fst.engine.base import Checkpoint, Completion
from dspy_fst.engine.chat import PromptRenderer, TemplateTraits
from dspy_fst.engine.replies import ReplyReader
from dspy_fst.engine.vllm.launch import vllm_command, vllm_environment
from dspy_fst.engine.vllm.server import VLLMServer
from dspy_fst.engine.vllm.server_settings import VLLMSettings, vllm_faults
from dspy_fst.errors import EngineError
from dspy_fst.rollout.call_recorder import SETTING, Recording
from tests.engine.server_state import answers, group_of
from tests.engine.tiny_qwen import make_model, rescore, save, untied

PROBES = [[3, *range(40, 90), 0], [4, *range(300, 340)], [5, 6]]
# Long enough to fill a block of the prefix cache, which holds 128 tokens on a CPU.
LONG = "The quick brown fox jumps over the lazy dog. " * 8
TOLERANCE = 1e-4
"""Nats per token, float32 on both sides."""


def ask(text: str, *, temperature: float = 1.0, max_tokens: int = 12) -> Request:
    return Request("policy", (Message.user(text),), config=Config(temperature=temperature, max_tokens=max_tokens))


def gap(model: Qwen3ForCausalLM, completion: Completion, temperature: float) -> float:
    """Largest difference in nats between the engine's and the model's log-probability of a sampled token."""
    sequence = [*completion.prompt_ids, *completion.completion_ids]
    scores = rescore(model, sequence, temperature=temperature)[-len(completion.completion_ids) :]
    return max(abs(a - b) for a, b in zip(scores, completion.logprobs, strict=True))


# Settings, without a server


def test_sound_settings_have_no_faults() -> None:
    assert vllm_faults(VLLMSettings(attach_url="http://127.0.0.1:8000")) == []


def test_every_fault_is_found_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    settings = VLLMSettings(
        host="0.0.0.0",
        gpu_memory_utilization=1.5,
        request_timeout_s=0,
        stall_timeout_s=0,
        max_restarts=-1,
        extra_args=("--logprobs-mode=raw_logprobs", "--max-num-seqs", "8", "--disable-log-stats"),
    )
    faults = "\n".join(vllm_faults(settings))
    for part in ("dspy-fst[vllm]", "0.0.0.0", "gpu_memory_utilization is 1.5", "request_timeout_s", "--logprobs-mode"):
        assert part in faults
    for part in ("stall_timeout_s is 0", "max_restarts is -1", "--disable-log-stats"):
        assert part in faults
    assert "--max-num-seqs" not in faults


def test_a_taken_port_is_named_before_anything_is_launched(tmp_path: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        engine = VLLMServer(VLLMSettings(port=port, log_path=tmp_path / "log"))
        with pytest.raises(EngineError, match=f"port {port} is in use"):
            engine.load(save(make_model(0), tmp_path, "step-0"))
    assert not (tmp_path / "log").exists()


def test_the_key_is_in_the_environment_and_not_on_the_command_line() -> None:
    settings = VLLMSettings(extra_args=("--max-num-seqs", "8"))
    command = vllm_command(settings, Path("weights"), 8000)
    environment = vllm_environment(settings, "secret")
    assert environment["VLLM_API_KEY"] == "secret"
    assert "secret" not in " ".join(command)
    assert command[-2:] == ["--max-num-seqs", "8"]


def test_nothing_is_served_before_the_first_load() -> None:
    engine = VLLMServer()
    assert engine.weights is None
    assert not answers(engine)
    with pytest.raises(EngineError, match="call load"):
        engine.complete(ask("hi"), seed=0)
    engine.close()
    engine.close()


# One shared server


@pytest.fixture(scope="module")
def models() -> list[Qwen3ForCausalLM]:
    return [make_model(seed) for seed in range(3)]


@pytest.fixture(scope="module")
def checkpoints(models: list[Qwen3ForCausalLM], tmp_path_factory: pytest.TempPathFactory) -> list[Checkpoint]:
    folder = tmp_path_factory.mktemp("weights")
    return [save(model, folder, f"step-{i:06d}") for i, model in enumerate(models)]


@pytest.mark.vllm
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampled_tokens_score_alike_on_both_sides(
    server: VLLMServer, checkpoints: list[Checkpoint], models: list[Qwen3ForCausalLM], taught: Path, temperature: float
) -> None:
    server.load(checkpoints[0])
    requests = [ask(f"{i}: {LONG[: 3 * i]}", temperature=temperature) for i in range(64)]
    with ThreadPoolExecutor(32) as pool:
        replies = list(pool.map(server.complete, requests, range(64)))
    assert max(gap(models[0], reply, temperature) for reply in replies) < TOLERANCE
    tokenizer = AutoTokenizer.from_pretrained(taught)
    for request, reply in zip(requests, replies, strict=True):
        messages = [{"role": "user", "content": request.messages[0].text}]
        rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert list(reply.prompt_ids) == rendered
    assert len({reply.completion_ids for reply in replies}) == 64


@pytest.mark.vllm
def test_a_reply_comes_in_pieces_that_are_the_whole_reply_of_the_same_draw(
    server: VLLMServer, checkpoints: list[Checkpoint], models: list[Qwen3ForCausalLM]
) -> None:
    server.load(checkpoints[0])
    whole = server.complete(ask("draw", max_tokens=24), seed=5)
    stream = server.stream(ask("draw", max_tokens=24), seed=5)
    pieces = []
    while True:
        try:
            pieces.append(next(stream))
        except StopIteration as end:
            told: Completion = end.value
            break
    assert len(pieces) > 3
    assert "".join(pieces) == told.response.message.text == whole.response.message.text
    assert (told.prompt_ids, told.completion_ids) == (whole.prompt_ids, whole.completion_ids)
    assert told.finish_reason == whole.finish_reason
    assert told.weights == whole.weights == checkpoints[0].version
    assert gap(models[0], told, 1.0) < TOLERANCE


@pytest.mark.vllm
@pytest.mark.parametrize("is_async", [True, False])
def test_streamify_tells_tokens_while_the_model_speaks(
    server: VLLMServer, checkpoints: list[Checkpoint], is_async: bool
) -> None:
    server.load(checkpoints[0])
    policy = PolicyLM("no-model", engine="in_process", max_tokens=24, version=checkpoints[0].version)
    policy.handle._engine = server  # not by its maker: the server is shared, and outlives this handle
    policy.handle._reader = ReplyReader.load(Path("nowhere"))  # these weights neither think nor call tools
    program = dspy.Predict("question -> answer")
    program.set_lm(policy)
    ask_in_pieces = dspy.streamify(program, is_async_program=is_async)
    chunks: list[str] = []

    async def listen() -> None:
        async for item in ask_in_pieces(question="draw"):
            if getattr(item, "choices", None):
                chunks.append(item.choices[0].delta.content or "")

    recording = Recording(seed=3)
    with (
        dspy.context(**{SETTING: recording}, adapter=dspy.ChatAdapter(use_json_adapter_fallback=False)),
        pytest.raises(AdapterParseError) as said,  # random weights
    ):
        asyncio.run(listen())
    (call,) = recording.close()
    assert len([chunk for chunk in chunks if chunk]) > 3
    assert "".join(chunks) == said.value.lm_response
    assert len(call.completion_ids) == len(call.logprobs) <= 24
    assert call.weights == checkpoints[0].version


@pytest.mark.vllm
def test_the_seed_fixes_the_draw(server: VLLMServer, checkpoints: list[Checkpoint]) -> None:
    server.load(checkpoints[0])
    first, again, other = (server.complete(ask("draw"), seed=seed) for seed in (5, 5, 6))
    assert first.completion_ids == again.completion_ids != other.completion_ids


@pytest.mark.vllm
def test_a_load_changes_version_scores_and_samples(
    server: VLLMServer, checkpoints: list[Checkpoint], models: list[Qwen3ForCausalLM]
) -> None:
    for model, checkpoint in zip(models, checkpoints, strict=True):
        server.load(checkpoint)
        assert server.weights == checkpoint.version
        assert largest_gap(server.score(PROBES), model) < TOLERANCE
        # The same long prompt under every version: stale keys and values of the last one would show.
        reply = server.complete(ask(LONG), seed=1)
        assert reply.weights == checkpoint.version
        assert gap(model, reply, 1.0) < TOLERANCE


@pytest.mark.vllm
def test_no_reply_straddles_a_load(
    server: VLLMServer, checkpoints: list[Checkpoint], models: list[Qwen3ForCausalLM]
) -> None:
    by_version = {c.version: model for c, model in zip(checkpoints, models, strict=True)}
    server.load(checkpoints[0])
    replies: list[Completion] = []
    done = threading.Event()

    def keep_asking(thread: int) -> None:
        for i in range(thread, 10_000, 16):
            if done.is_set():
                return
            replies.append(server.complete(ask(LONG, max_tokens=40), seed=i))

    with ThreadPoolExecutor(16) as pool:
        asking = [pool.submit(keep_asking, thread) for thread in range(16)]
        try:
            for checkpoint in (*checkpoints, checkpoints[0]):
                server.load(checkpoint)
                wait_for_replies(replies, checkpoint.version, asking)
        finally:
            done.set()
        for thread in asking:
            thread.result()
    assert max(gap(by_version[reply.weights], reply, 1.0) for reply in replies) < TOLERANCE


def wait_for_replies(replies: list[Completion], version: str, asking: Sequence[Future[None]]) -> None:
    """Until some more were answered with these weights, so that the next load comes amid others."""
    before, deadline = len(replies), time.monotonic() + 60
    while sum(reply.weights == version for reply in replies[before:]) < 8:
        for thread in asking:
            if thread.done():
                thread.result()
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.vllm
def test_a_failed_load_serves_nothing_until_a_good_one(
    server: VLLMServer, checkpoints: list[Checkpoint], models: list[Qwen3ForCausalLM], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_bytes((checkpoints[0].path / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(EngineError, match="collective_rpc answered 500"):
        server.load(Checkpoint("step-broken", tmp_path))
    with pytest.raises(EngineError, match="no weights are served"):
        server.score(PROBES)
    server.load(checkpoints[1])
    assert gap(models[1], server.complete(ask("again"), seed=0), 1.0) < TOLERANCE


@pytest.mark.vllm
def test_a_prompt_beyond_the_context_is_the_requests_fault(server: VLLMServer, checkpoints: list[Checkpoint]) -> None:
    server.load(checkpoints[0])
    with pytest.raises(InvalidRequestError, match="maximum context length"):
        server.complete(ask("x" * 1200), seed=0)


@pytest.mark.vllm
def test_developer_endpoints_are_closed_to_others_on_the_machine(server: VLLMServer) -> None:
    assert server.address is not None
    with httpx.Client(base_url=server.address.url, timeout=60, trust_env=False) as stranger:
        for path in ("/collective_rpc", "/pause", "/v1/completions"):
            assert stranger.post(path, json={}).status_code == 401
        assert stranger.get("/health").status_code == 200


@pytest.mark.vllm
def test_another_engine_can_attach_and_leaves_the_server_running(
    server: VLLMServer, checkpoints: list[Checkpoint], models: list[Qwen3ForCausalLM]
) -> None:
    address = server.address
    assert address is not None
    guest = VLLMServer(VLLMSettings(attach_url=f"{address.url}/v1", api_key=address.api_key))
    guest.load(checkpoints[2])
    assert gap(models[2], guest.complete(ask("guest"), seed=0), 1.0) < TOLERANCE
    assert group_of(guest) is None
    guest.close()
    assert answers(server)
    stranger = VLLMServer(VLLMSettings(attach_url=address.url, api_key="wrong"))
    with pytest.raises(EngineError, match="Is the API key right"):
        stranger.load(checkpoints[2])


def largest_gap(sampled_by: Sequence[Sequence[float]], model: Qwen3ForCausalLM) -> float:
    return max(
        abs(a - b)
        for sampled, probe in zip(sampled_by, PROBES, strict=True)
        for a, b in zip(sampled, rescore(model, probe), strict=True)
    )


@pytest.mark.vllm
def test_an_untied_export_of_a_tied_model_stays_fresh(server: VLLMServer, tmp_path: Path) -> None:
    for seed in (7, 8):
        model = make_model(seed, tied=True)
        server.load(save(untied(model), tmp_path, f"step-{seed}"))
        assert largest_gap(server.score(PROBES), model) < TOLERANCE


# Prompts that were rendered here


@pytest.mark.vllm
def test_ids_given_as_the_prompt_are_sampled_from_as_the_messages_are(
    server: VLLMServer, checkpoints: list[Checkpoint], models: list[Qwen3ForCausalLM]
) -> None:
    server.load(checkpoints[0])
    request = ask("Tell me more.", temperature=0.8)
    by_messages = server.complete(request, 5)
    by_ids = server.complete(request, 5, by_messages.prompt_ids)
    assert (by_ids.completion_ids, by_ids.finish_reason) == (by_messages.completion_ids, by_messages.finish_reason)
    assert by_ids.prompt_ids == by_messages.prompt_ids
    assert by_ids.logprobs == pytest.approx(by_messages.logprobs, abs=TOLERANCE)
    assert by_ids.response.text == by_messages.response.text
    assert gap(models[0], by_ids, 0.8) < TOLERANCE


@pytest.mark.vllm
def test_a_conversation_goes_on_from_the_ids_that_the_server_sampled(
    server: VLLMServer, checkpoints: list[Checkpoint], models: list[Qwen3ForCausalLM], taught: Path
) -> None:
    server.load(checkpoints[0])
    tokenizer = AutoTokenizer.from_pretrained(taught)
    renderer = PromptRenderer(tokenizer, TemplateTraits.of(tokenizer))
    respelt = 0
    for seed in range(6):
        first = ask("Tell me more.")
        reply = server.complete(first, seed)
        said = (*reply.prompt_ids, *reply.completion_ids)
        text = tokenizer.decode([id for id in reply.completion_ids if id != tokenizer.eos_token_id])
        goes_on = replace(first, messages=(*first.messages, Message.assistant(text), Message.user("Go on.")))
        prompt = renderer.continued(goes_on, [said])
        rendered = server.complete(goes_on, seed).prompt_ids
        if prompt is None:  # a reply whose bytes are no text
            continue
        respelt += rendered != prompt
        answer = server.complete(goes_on, seed, prompt)
        assert answer.prompt_ids[: len(said)] == said
        assert tokenizer.decode(answer.prompt_ids) == tokenizer.decode(rendered)
        assert gap(models[0], answer, 1.0) < TOLERANCE
    assert respelt


@pytest.mark.vllm
def test_a_prompt_of_ids_beyond_the_context_is_refused_as_its_messages_are(
    server: VLLMServer, checkpoints: list[Checkpoint]
) -> None:
    server.load(checkpoints[0])
    with pytest.raises(ContextLengthError):
        server.complete(ask("x" * 2000), 1, tuple([300] * 2000))


@pytest.mark.vllm
def test_a_reply_ends_at_every_token_that_the_model_s_files_name(
    server: VLLMServer, checkpoints: list[Checkpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    server.load(checkpoints[0])
    ends = frozenset(range(100, 400))
    monkeypatch.setattr(server, "_reader", replace(server._reader, stop_ids=ends))
    for request, given in ((ask("Tell me more.", max_tokens=200), ()), (ask("Tell.", max_tokens=200), ((30, 31, 32),))):
        reply = server.complete(request, 5, *given)
        assert (reply.finish_reason, reply.completion_ids[-1] in ends) == ("stop", True)
        assert not ends & set(reply.completion_ids[:-1])


@pytest.mark.vllm
def test_a_system_text_that_the_template_has_no_role_for_is_sent_in_the_first_user_turn(
    server: VLLMServer, checkpoints: list[Checkpoint], taught: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.load(checkpoints[0])
    monkeypatch.setattr(server, "_reader", replace(server._reader, traits=TemplateTraits(system="refused")))
    reply = server.complete(replace(ask("Which?"), system="Name a flower."), 5)
    text = AutoTokenizer.from_pretrained(taught).decode(reply.prompt_ids)
    assert "<|user|>Name a flower.\n\nWhich?" in text
    assert "<|system|>" not in text


@pytest.mark.parametrize("page", ["dspy_fst/engine/vllm/launch.py", "dspy_fst/training/publisher.py", "docs/gpus.md"])
def test_the_folder_that_an_attached_server_must_have_on_its_path_holds_what_it_loads(page: str) -> None:
    root = Path(__file__).parents[2]
    folders = re.findall(r"dspy_fst/[a-z/]*served", (root / page).read_text(encoding="utf-8"))
    assert folders
    for folder in folders:
        assert (root / folder / "dspy_fst_weight_check.py").is_file()
