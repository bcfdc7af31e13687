"""What each publish verifies: every tensor, and the numbers of as many texts as are needed to name a broken engine."""

import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

from dspy_fst import LoRA
from dspy_fst.engine.base import Checkpoint, Scorer
from dspy_fst.engine.in_process import InProcessEngine
from dspy_fst.engine.options import InProcessSettings
from dspy_fst.errors import SyncError
from dspy_fst.slow.trainer import Trainer
from dspy_fst.slow.training_settings import TrainingSettings
from dspy_fst.training import publisher
from dspy_fst.training.publisher import FULL_EVERY, SHORT_TOKENS, TEXTS, NaturalTexts, Publishing
from dspy_fst.types import Call, Candidate, Rollout
from programs.lab import BASE
from tests.relay import relay

HOPS, ANSWER = "for-first", "for-last"
EVERY = [None, HOPS, ANSWER]


class Spied(InProcessEngine):
    """Notes which texts it scores, and through what. ``served`` says through what a broken one computes instead."""

    def __init__(self):
        super().__init__(InProcessSettings(device="cpu", dtype="float32"))
        self.scored: list[tuple[str | None, list[int]]] = []
        self.served = dict[str | None, str | None]()
        self.stale: InProcessEngine | None = None
        self.off = 0.0
        self.blind = False

    def score(self, sequences, adapter=None):
        self.scored.append((adapter, [len(sequence) for sequence in sequences]))
        scorer = self.stale if self.stale is not None and adapter == HOPS else super()
        scores = scorer.score(sequences, self.served.get(adapter, adapter))
        scores[0][0] += self.off
        return scores

    def held(self, checkpoint):
        return None if self.blind else super().held(checkpoint)

    def taken(self) -> list[tuple[str | None, list[int]]]:
        taken, self.scored = self.scored, []
        return taken


class Bench:
    """A trainer of two LoRA adapters that publishes to an engine."""

    def __init__(self, folder, tolerance=None):
        groups = {"first": HOPS, "last": ANSWER}
        self.trainer = Trainer(BASE, TrainingSettings(adapter=LoRA(rank=4)), device="cpu", adapters=groups)
        self.folder, self.told, self.steps = folder / "weights", list[str](), 0
        texts = NaturalTexts(relay(), groups, [], self.trainer.tokenizer)
        call = Call("first", tuple(range(5, 17)), tuple(range(50, 62)), (-1.0,) * 12, "stop", "v")
        texts.see([Rollout(0, Candidate({}), (call,) * TEXTS, 1.0)])
        self.handle = SimpleNamespace(engine=Spied(), checkpoint=None)
        self.serving = Publishing(self.handle, self.trainer, texts, tolerance=tolerance, tell=self.told.append)

    def publish(self) -> Checkpoint:
        self.move()
        version = f"step-{self.steps:06d}"
        self.serving.serve(self.trainer.publish(self.folder / version, version))
        return self.handle.checkpoint

    def move(self) -> None:
        self.steps += 1
        noise = torch.Generator().manual_seed(self.steps)
        with torch.no_grad():
            for parameter in self.trainer.parameters.values():
                parameter.add_(torch.randn(parameter.shape, generator=noise), alpha=0.05)


ALL, ONE = [24] * TEXTS, [SHORT_TOKENS]


@pytest.fixture
def bench(tmp_path):
    bench = Bench(tmp_path)
    yield bench
    bench.handle.engine.close()


def test_all_texts_are_scored_at_the_start_and_at_every_nth_publish_and_one_short_text_between(bench, monkeypatch):
    monkeypatch.setattr(publisher, "FULL_EVERY", 3)
    scored = []
    for _ in range(5):
        bench.publish()
        scored.append(bench.handle.engine.taken())
    assert scored == [[(name, ids) for name in EVERY] for ids in (ALL, ONE, ONE, ALL, ONE)]
    assert FULL_EVERY == 64


def test_tensors_of_several_servers_are_compared_side_by_side_and_the_trainer_scores_once(bench, monkeypatch):
    engine, both, scored = bench.handle.engine, threading.Barrier(2), []
    score, compare = bench.trainer.score, publisher.verify_tensors

    class Two:
        def on_recovery(self, tell, prove):
            self.prove = prove

        def load(self, checkpoint):
            engine.load(checkpoint)
            with ThreadPoolExecutor(2) as pool:
                list(pool.map(self.prove, (engine, engine)))

    def slowly(ids, **adapter):
        scored.append(adapter.get("adapter"))
        threading.Event().wait(0.05)
        return score(ids, **adapter)

    def compared(*arguments):
        both.wait(20)
        return compare(*arguments)

    monkeypatch.setattr(bench.trainer, "score", slowly)
    monkeypatch.setattr(publisher, "verify_tensors", compared)
    monkeypatch.setattr(bench.handle, "engine", Two())
    bench.publish()
    assert scored == EVERY


def test_the_short_text_is_another_one_at_each_publish(bench):
    texts = bench.serving.texts
    texts._recorded = [[n] * 20 for n in range(3)]
    assert [texts.short(publish) for publish in range(4)] == [[[n] * SHORT_TOKENS] for n in (0, 1, 2, 0)]


@pytest.mark.parametrize(
    ("served", "named"),
    [
        ({HOPS: ANSWER, ANSWER: HOPS}, HOPS),
        ({ANSWER: HOPS}, ANSWER),
        ({HOPS: None}, HOPS),
    ],
    ids=["exchanged", "another adapter", "base"],
)
def test_an_adapter_whose_calls_go_elsewhere_is_named_at_the_next_publish(bench, served, named):
    bench.publish()
    bench.handle.engine.served = served
    with pytest.raises(SyncError, match=rf"weights step-000002, LoRA adapter {named}: the engine's log-prob"):
        bench.publish()
    assert bench.handle.engine.weights is None


def test_an_adapter_instead_of_the_base_is_named(bench):
    bench.publish()
    bench.handle.engine.served = {None: HOPS}
    with pytest.raises(SyncError, match="weights step-000002: the engine's log-probabilities"):
        bench.publish()


def test_a_kernel_that_reads_old_numbers_is_named_though_every_tensor_is_right(bench):
    stale = InProcessEngine(InProcessSettings(device="cpu", dtype="float32"))
    stale.load(bench.publish())
    bench.handle.engine.stale = stale
    with pytest.raises(SyncError, match=f"LoRA adapter {HOPS}"):
        bench.publish()
    stale.close()


def test_an_engine_that_kept_the_old_adapter_is_named_by_its_tensors(bench, monkeypatch):
    bench.publish()
    monkeypatch.setattr("dspy_fst.engine.loaded_model.put_on_as_read", lambda *read: None)
    with pytest.raises(SyncError, match=f"other weights than were published: {HOPS}: .*lora_A"):
        bench.publish()


def test_a_short_text_beyond_the_limit_is_decided_by_all_texts(tmp_path):
    bench = Bench(tmp_path, tolerance=1e-4)
    engine = bench.handle.engine
    bench.publish()
    engine.taken()
    engine.off = 0.01  # of one token: 7e-4 a token of the short text, 5e-5 of all
    bench.publish()
    assert engine.taken() == [(None, ONE), *[(name, ALL) for name in EVERY]]
    engine.off = 2.0
    with pytest.raises(SyncError):
        bench.publish()
    engine.close()


def test_a_recovered_server_is_verified_on_what_was_published_and_then_on_all_texts(bench):
    engine = bench.handle.engine
    checked: list[object] = []
    bench.publish()
    published = bench.publish()
    prove = engine._verify
    engine.taken()
    other = Spied()
    other.on_recovery(checked.append, prove)
    bench.move()  # the trainer has gone on: what it scored at the publish is what counts
    other.load(published)
    assert other.taken() == [(name, ONE) for name in EVERY]
    bench.handle.engine = other
    bench.publish()
    assert other.taken() == [(name, ALL) for name in EVERY], "this server has not scored them all before"
    bench.publish()
    assert other.taken() == [(name, ONE) for name in EVERY]
    other.served = {HOPS: ANSWER}
    recover: Scorer = other
    with pytest.raises(SyncError, match=f"LoRA adapter {HOPS}"):
        other._verify(recover)
    other.close()


def test_a_server_that_cannot_compare_its_tensors_scores_all_texts_each_time(bench):
    bench.handle.engine.blind = True
    for _ in range(3):
        bench.publish()
    assert bench.handle.engine.taken() == [(name, ALL) for _ in range(3) for name in EVERY]
    assert len(bench.told) == 1
