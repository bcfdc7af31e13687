"""A real vLLM server with LoRA adapters: each call has its version, and what is in use is compared exactly."""

import logging
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dspy
import pytest
import torch
from peft import PeftModel

from dspy_fst.engine.base import AdapterFiles, Checkpoint, Completion, Scorer
from dspy_fst.engine.replies import ReplyReader
from dspy_fst.engine.verification import Expected, verify, verify_identity
from dspy_fst.engine.vllm.client import VLLMClient
from dspy_fst.engine.vllm.lora_client import LoRAClient
from dspy_fst.engine.vllm.server import VLLMServer
from dspy_fst.engine.vllm.supervisor import Supervisor
from dspy_fst.errors import DiskError, EngineError, SyncError
from dspy_fst.policy_lm import PolicyLM
from dspy_fst.recipe.lora_settings import LoRA
from dspy_fst.rollout.call_recorder import SETTING, Recording, tag_predictors
from dspy_fst.slow.trainer import Trainer
from dspy_fst.slow.training_settings import TrainingSettings
from dspy_fst.training.publisher import Publishing
from tests.engine.lora_adapters import alter, digests_of, make_adapter
from tests.engine.server_state import group_of
from tests.engine.test_server_process import below, members
from tests.engine.test_vllm_server import PROBES, TOLERANCE, ask, gap
from tests.engine.tiny_qwen import make_model, rescore, save, small

pytestmark = pytest.mark.vllm
HOPS, ANSWER = "hops", "answer"
Q = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"


class Versions:
    """Checkpoints of two adapters on one base, which a trainer wrote, and the models that they make of it."""

    def __init__(self, folder: Path):
        source = save(make_model(0), folder, "source")
        self.trainer = Trainer(source.path, TrainingSettings(adapter=LoRA(rank=4, alpha=6.0)), device="cpu")
        self.folder = folder / "weights"
        self.base = self.trainer.publish(self.folder / "step-start", "step-start")
        self.models: dict[tuple[str, str], PeftModel] = {}

    def make(self, version: str) -> Checkpoint:
        """A new version: ranks, scalings and layers of the two adapters differ."""
        seed, place = 2 * len(self.models), self.folder / version
        made: list[AdapterFiles] = []
        for name, config in (
            (HOPS, {"r": 8, "lora_alpha": 16, "rank_pattern": {"layers.1.self_attn.q_proj": 4}}),
            (
                ANSWER,
                {"r": 3, "lora_alpha": 5, "use_rslora": True, "target_modules": ["q_proj", "v_proj", "down_proj"]},
            ),
        ):
            files, self.models[version, name] = make_adapter(place, name, seed, **config)
            made.append(files)
            seed += 1
        return replace(self.base, version=version, adapters=tuple(made))

    def gap(self, reply: Completion, name: str, temperature: float = 1.0) -> float:
        """See `test_vllm_server.gap`; the model is that of the reply's version."""
        return gap(self.models[reply.weights, name], reply, temperature)


@pytest.fixture(scope="module")
def versions(tmp_path_factory: pytest.TempPathFactory) -> Versions:
    return Versions(tmp_path_factory.mktemp("lora"))


@pytest.fixture(scope="module")
def engine(versions: Versions, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Supervisor]:
    logging.getLogger("dspy_fst").setLevel(logging.INFO)
    engine = Supervisor(replace(small(tmp_path_factory.mktemp("log") / "vllm.log"), max_loras=2))
    engine.load(versions.make("step-000000"))
    yield engine
    group = group_of(engine.server)
    engine.close()
    assert group is not None
    assert members(group) == []


def on_server(engine: Supervisor) -> set[str]:
    """Names of the LoRA adapters that the server itself says it has."""
    client = engine.server._client
    assert client is not None
    return set(LoRAClient(client).folders())


def prove(engine: Supervisor, checkpoint: Checkpoint) -> None:
    held = engine.held(checkpoint)
    assert held is not None
    verify_identity(held, checkpoint)


def test_calls_of_many_versions_in_one_batch_are_each_sampled_by_their_own(
    engine: Supervisor, versions: Versions
) -> None:
    """Three versions of two adapters are in flight, where one batch may use two adapters."""
    replies: list[tuple[str, Future[Completion]]] = []
    published = [versions.make(f"step-{step:06d}") for step in range(1, 4)]
    with ThreadPoolExecutor(32) as pool:
        for step, checkpoint in enumerate(published, 1):
            engine.load(checkpoint)
            for i in range(8):
                name, long = (HOPS, ANSWER)[i % 2], ask(f"{i}: tell me more.", max_tokens=500, temperature=0.8)
                replies.append((name, pool.submit(engine.complete, long, i, adapter=name)))
            while engine.server.in_flight + sum(reply.done() for _, reply in replies) < 8 * step:
                time.sleep(0.01)
        names = on_server(engine)
    assert len({name.partition("@")[2] for name in names}) >= 3, "three versions were held at once"
    answered = [(name, reply.result()) for name, reply in replies]
    assert [reply.weights for _, reply in answered] == [f"step-{1 + i // 8:06d}" for i in range(24)]
    assert max(versions.gap(reply, name, 0.8) for name, reply in answered) < TOLERANCE
    assert engine.take_counts() == {}


def test_versions_that_no_call_uses_are_unloaded(engine: Supervisor, versions: Versions) -> None:
    engine.load(versions.make("step-000010"))
    began, pieces = engine.stream(ask("Tell me more.", max_tokens=200), 1, HOPS), []
    pieces.append(next(began))
    engine.load(versions.make("step-000011"))
    assert on_server(engine) == {"hops@step-000010", "hops@step-000011", "answer@step-000011"}
    try:
        while True:
            pieces.append(next(began))
    except StopIteration as end:
        told: Completion = end.value
    assert (told.weights, "".join(pieces)) == ("step-000010", told.response.message.text)
    assert versions.gap(told, HOPS) < TOLERANCE
    assert on_server(engine) == {"hops@step-000011", "answer@step-000011"}
    client = engine.server._client
    assert client is not None
    listed = client.call("POST", "/collective_rpc", json={"method": "list_loras"}, timeout_s=30).json()
    assert len(listed["results"][0]) == 2, "their memory is free, too"


def test_calls_and_scores_of_both_adapters_and_the_base_are_each_their_own_in_one_batch(
    engine: Supervisor, versions: Versions
) -> None:
    """Both places for adapters are taken: vLLM alone would compute calls on the base with the adapter in the last."""
    engine.load(versions.make("step-000020"))
    through = {HOPS: versions.models["step-000020", HOPS], ANSWER: versions.models["step-000020", ANSWER], None: None}
    for name in (HOPS, ANSWER):
        engine.complete(ask("hi"), 0, adapter=name)
    with ThreadPoolExecutor(16) as pool:
        asked = ask("Tell me more.", max_tokens=500)
        replies = [(name, pool.submit(engine.complete, asked, i, adapter=name)) for i in range(4) for name in through]
        scores = {name: engine.score(PROBES, name) for name in through}
        assert not all(reply.done() for _, reply in replies), "scores were made beside calls"
    models = {name: model or make_model(0) for name, model in through.items()}
    for name, reply in replies:
        assert gap(models[name], reply.result(), 1.0) < TOLERANCE, name
    for name, model in models.items():
        for scored, probe in zip(scores[name], PROBES, strict=True):
            assert scored == pytest.approx(rescore(model, probe), abs=TOLERANCE), name
    assert max(abs(a - b) for a, b in zip(scores[HOPS][0], scores[None][0], strict=True)) > 0.1
    assert engine.take_counts() == {}
    with pytest.raises(EngineError, match="no LoRA adapter 'judge'"):
        engine.complete(ask("hi"), 0, adapter="judge")


def test_what_is_in_use_is_compared_number_by_number(engine: Supervisor, versions: Versions) -> None:
    first, second = versions.make("step-000030"), versions.make("step-000031")
    engine.load(first)
    prove(engine, first)
    held = engine.held(first)
    assert held is not None
    assert (held.wrong, held.with_base) == ({}, False), "the base is compared once"
    assert held.digests == {a.tensor(name): found for a in first.adapters for name, found in a.digests.items()}
    with pytest.raises(SyncError, match="the engine uses other weights"):  # the server is stale: it still has the first
        prove(engine, second)
    stale = engine.held(second)
    assert stale is not None
    assert set(stale.wrong) == {a.tensor(name) for a in second.adapters for name in a.digests}
    engine.load(second)
    hops = second.adapters[0]
    alter(hops.path, Q)
    altered = engine.held(replace(second, adapters=(replace(hops, digests=digests_of(hops.path)), second.adapters[1])))
    assert altered is not None
    assert altered.wrong == {hops.tensor(Q): altered.wrong[hops.tensor(Q)]}
    assert altered.wrong[hops.tensor(Q)].startswith("1 of ")
    scores = engine.score(PROBES, HOPS)
    for scored, probe in zip(scores, PROBES, strict=True):  # comparing leaves the adapter as it was
        assert scored == pytest.approx(rescore(versions.models["step-000031", HOPS], probe), abs=TOLERANCE)


def test_a_corrupted_file_is_the_disk_s_fault(engine: Supervisor, versions: Versions) -> None:
    checkpoint = versions.make("step-000040")
    alter(checkpoint.adapters[0].path, Q)
    engine.load(checkpoint)
    with pytest.raises(DiskError, match=r"hops: .*layers\.1\.self_attn\.q_proj\.lora_B\.weight \(its bytes differ\)"):
        prove(engine, checkpoint)


def test_what_a_trainer_publishes_is_proved_by_its_tensors_and_its_numbers(
    engine: Supervisor, versions: Versions
) -> None:
    trainer, server = versions.trainer, engine.server
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trainer.parameters.values():
            parameter.add_(torch.randn(parameter.shape, generator=noise), alpha=0.05)
    published = trainer.publish(versions.folder / "step-000045", "step-000045")
    expected = Expected(published, PROBES, trainer.score(PROBES), "float32")
    engine.load(versions.base)
    with pytest.raises(SyncError, match="the engine uses other weights than were published: shared: "):
        verify(engine, expected)
    engine.load(published)
    assert engine.server is server, "one adapter in the place of two needs no restart"
    proof = verify(engine, expected)
    assert proof.identical
    assert proof.mean_gap < TOLERANCE


class Plain(dspy.ChatAdapter):
    """Asks the question alone, and takes any reply for the answer: the models are random."""

    def format(self, signature, demos, inputs):  # type: ignore[no-untyped-def]
        return [{"role": "user", "content": inputs["question"]}]

    def parse(self, signature, completion):  # type: ignore[no-untyped-def]
        return {"answer": completion}


class TwoSteps(dspy.Module):  # type: ignore[misc]
    """Each predictor speaks through its own LoRA adapter on the running server."""

    def __init__(self, engine: Supervisor):
        super().__init__()
        self.hops, self.answer = (dspy.Predict("question -> answer") for _ in range(2))
        for predictor, name in ((self.hops, HOPS), (self.answer, ANSWER)):
            predictor.lm = PolicyLM("no-model", engine="in_process", max_tokens=400, lora_adapter=name)
            predictor.lm.handle._engine = engine  # not by its maker: the server is shared, and outlives this handle
            predictor.lm.handle._reader = ReplyReader.load(Path("nowhere"))  # it neither thinks nor calls tools
        tag_predictors(self)

    def forward(self, question: str) -> dspy.Prediction:
        return self.answer(question=self.hops(question=question).answer[:40])


def trainer_of(folder: Path) -> Trainer:
    settings = TrainingSettings(adapter=LoRA(rank=4, alpha=6.0))
    return Trainer(folder, settings, device="cpu", adapters={"hops": HOPS, "answer": ANSWER})


def moved(trainer: Trainer, seed: int) -> Trainer:
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trainer.parameters.values():
            parameter.add_(torch.randn(parameter.shape, generator=noise), alpha=0.05)
    return trainer


def test_every_token_of_a_program_of_two_adapters_is_what_the_trainer_scores(
    engine: Supervisor, versions: Versions
) -> None:
    """Three versions of two adapters follow each other while calls are in flight.

    How many of them overlap depends on the machine; the first test of
    this file holds more in flight than one batch may use.
    """
    trainer, program = trainer_of(versions.base.path), TwoSteps(engine)
    recordings = [Recording(seed) for seed in range(12)]
    published = {f"step-{step:06d}": step for step in range(80, 83)}

    def run(recording: Recording) -> None:
        with dspy.context(**{SETTING: recording}, adapter=Plain()):
            program(question=f"{recording.seed}: tell me more.")

    with ThreadPoolExecutor(12) as pool:
        runs: list[Future[None]] = []
        for n, (version, step) in enumerate(published.items(), 1):
            engine.load(moved(trainer, step).publish(versions.folder / version, version))
            runs += [pool.submit(run, recording) for recording in recordings[4 * n - 4 : 4 * n]]
            while engine.server.in_flight + sum(each.done() for each in runs) < 4 * n:
                time.sleep(0.01)
    for each in runs:
        each.result()
    calls = [call for recording in recordings for call in recording.close()]
    assert len(calls) == 24
    for version in published:
        scored = trainer_of(versions.folder / version)
        own = [call for call in calls if call.weights == version]
        assert {call.predictor for call in own} >= {"hops"}
        for call, scores in zip(own, scored.logprobs(own), strict=True):
            assert list(call.logprobs) == pytest.approx(scores, abs=TOLERANCE)
    assert {call.weights for call in calls} == published.keys()


class Unsupervised:
    """The server itself: its supervisor would start another one in place of a broken one."""

    def __init__(self, server: VLLMServer):
        self.server = server

    def __getattr__(self, name: str) -> Any:
        return getattr(self.server, name)

    def on_recovery(self, *verify: object) -> None:
        """Nothing: it never recovers."""


@pytest.mark.parametrize(
    ("broken", "named"),
    [
        ("another adapter", r"LoRA adapter hops: the engine's log-probabilities"),
        ("base", r"LoRA adapter hops: the engine's log-probabilities"),
        ("the version before", r"the engine uses other weights than were published: hops: "),
    ],
    ids=["another", "base", "stale"],
)
def test_a_server_that_computes_an_adapter_s_calls_with_something_else_is_named_at_the_next_publish(
    engine: Supervisor, versions: Versions, monkeypatch: pytest.MonkeyPatch, broken: str, named: str
) -> None:
    trainer = moved(trainer_of(versions.base.path), 90)
    texts = SimpleNamespace(ids=lambda: PROBES, short=lambda publish: [PROBES[0][:16]])
    handle = SimpleNamespace(engine=Unsupervised(engine.server), checkpoint=None)
    serving = Publishing(handle, trainer, texts, tolerance=None, tell=lambda sentence: None)  # type: ignore[arg-type]
    first, second = (f"step-{broken.replace(' ', '-')}-{n}" for n in (1, 2))
    serving.serve(trainer.publish(versions.folder / first, first))
    score, load = VLLMClient.score, LoRAClient.load

    def elsewhere(self: VLLMClient, sequences: Sequence[Sequence[int]], model: str | None = None) -> list[list[float]]:
        if model is not None and model.startswith(HOPS):
            model = None if broken == "base" else model.replace(HOPS, ANSWER)
        return score(self, sequences, model)

    def stale(self: LoRAClient, name: str, folder: Path) -> None:
        load(self, name, versions.folder / first / HOPS if folder.name == HOPS else folder)

    if broken == "the version before":
        monkeypatch.setattr(LoRAClient, "load", stale)
    else:
        monkeypatch.setattr(VLLMClient, "score", elsewhere)
    published = moved(trainer, 91).publish(versions.folder / second, second)
    with pytest.raises(SyncError, match=named):
        serving.serve(published)
    monkeypatch.undo()
    serving.serve(published)


def test_a_load_whose_answer_was_lost_is_no_failure(engine: Supervisor, versions: Versions) -> None:
    checkpoint = versions.make("step-000050")
    client = engine.server._client
    assert client is not None
    loras, folder = LoRAClient(client), checkpoint.adapters[0].path
    loras.load("twice", folder)
    loras.load("twice", folder)  # the server answers 400: the name is loaded
    with pytest.raises(EngineError, match="has already been loaded"):
        loras.load("twice", checkpoint.adapters[1].path)
    loras.unload("twice")


def test_the_same_version_loaded_again_has_a_name_of_its_own(engine: Supervisor, versions: Versions) -> None:
    checkpoint = versions.make("step-000060")
    engine.load(checkpoint)
    engine.load(checkpoint)
    assert on_server(engine) == {"hops@step-000060#2", "answer@step-000060#2"}
    assert versions.gap(engine.complete(ask("again"), 0, adapter=ANSWER), ANSWER) < TOLERANCE


def test_a_killed_engine_comes_back_with_its_adapters(engine: Supervisor, versions: Versions) -> None:
    checkpoint, proofs = versions.make("step-000070"), []

    def verify(scorer: Scorer) -> None:
        held = scorer.held(checkpoint)
        assert held is not None
        verify_identity(held, checkpoint)
        proofs.append((scorer, held.with_base))

    engine.on_recovery(lambda sentence: None, verify)
    engine.load(checkpoint)
    failed, group = engine.server, group_of(engine.server)
    assert group is not None
    core = below(group, "EngineCore")
    assert core is not None
    core.kill()
    reply = engine.complete(ask("hello"), 0, adapter=HOPS)
    assert proofs == [(failed, False), (engine.server, True)], "nobody samples before base and adapters are verified"
    assert reply.weights == "step-000070"
    assert versions.gap(reply, HOPS) < TOLERANCE
    assert on_server(engine) == {"hops@step-000070", "answer@step-000070"}
    assert engine.take_counts()["restarts"] == 1
