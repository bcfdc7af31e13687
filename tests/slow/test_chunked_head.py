"""The head in chunks beside the whole one: the same numbers and gradients, and never all logits at once."""

import dataclasses
import random
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from dspy_fst.slow.batching import MicroBatch, Scored, micro_batches, part_of
from dspy_fst.slow.head import Head, Measured, Readout, kl_to, learn, logprobs
from dspy_fst.slow.losses import cispo
from dspy_fst.slow.losses.loss import Band, Tokens
from dspy_fst.slow.model import Policy
from dspy_fst.slow.sizes import CHUNK_LOGITS, CHUNK_TENSORS, CHUNK_TENSORS_WITHOUT_KL
from dspy_fst.slow.trainer import Trainer
from dspy_fst.slow.training_settings import TrainingSettings
from dspy_fst.types import SeedKLCall
from tests.slow.makers import VOCABULARY, make_batch, make_call, make_row, save_model
from tests.slow.test_trainer import assert_close, recorded_gradients

WIDTH, WORDS, CAP = 24, 57, 1.5
HEADS = {
    "plain": Head(),
    "scaled before": Head(before=0.25),
    "scaled after": Head(scale=1 / 8),
    "capped": Head(cap=3.0),
    "all": Head(before=2.0, scale=0.5, cap=2.0),
}


@dataclasses.dataclass
class Case:
    """Hidden states of policy and start, their heads, and what the loss knows of each token."""

    policy: Readout
    reference: Readout
    micro: MicroBatch
    tokens: Tokens
    coefficient: float

    def loss(self, logprobs: Tensor, kl: Tensor | None, part: slice) -> Tensor:
        own = part_of(self.tokens, part)
        value = cispo.value(logprobs, own, Band(0.0, CAP))
        return value if kl is None else value + self.coefficient * (own.weights * kl).sum()

    @property
    def start(self) -> Readout | None:
        return self.reference if self.coefficient else None

    @property
    def gradients(self) -> dict[str, Tensor]:
        found = {"hidden": self.policy.hidden, **dict(self.policy.linear.named_parameters())}
        return {name: tensor.grad for name, tensor in found.items()}


def make_case(head: Head, *, bias: bool = False, kl: bool = True, sequences: int = 4) -> Case:
    torch.manual_seed(0)
    draw = random.Random(0)
    texts = [
        Scored(tuple(draw.randrange(WORDS) for _ in range(7 + i)), 3, draw.choice([0.6, 1.0, 1.3]))
        for i in range(sequences)
    ]
    (micro,) = micro_batches(texts, 1000, share=False)
    n = len(micro.targets)
    linears = [nn.Linear(WIDTH, WORDS, bias=bias) for _ in range(2)]
    policy = Readout(head, linears[0], (4 * torch.randn(n, WIDTH)).requires_grad_())
    reference = Readout(head, linears[1], 4 * torch.randn(n, WIDTH))
    tokens = Tokens(-torch.rand(n) * 8, torch.randn(n), torch.rand(n) / n)
    return Case(policy, reference, micro, tokens, 0.3 if kl else 0.0)


def whole_log_probs(readout: Readout, micro) -> Tensor:
    logits = readout.head.scale * readout.linear(readout.head.before * readout.hidden)
    if (cap := readout.head.cap) is not None:
        logits = cap * torch.tanh(logits / cap)
    return torch.log_softmax(logits / micro.temperatures[:, None], -1)


def learn_whole(case: Case) -> Measured:
    """All logits at once, and autograd."""
    own = whole_log_probs(case.policy, case.micro)
    chosen = own.gather(-1, case.micro.targets[:, None])[:, 0]
    weights = (chosen.detach() - case.tokens.behaviour).exp().clamp(max=CAP)
    loss = -(case.tokens.weights * weights * case.tokens.advantages * chosen).sum()
    kl = None
    if case.coefficient:
        other = whole_log_probs(case.reference, case.micro).detach()
        kl = (own.exp() * (own - other)).sum(-1)
        loss = loss + case.coefficient * (case.tokens.weights * kl).sum()
    loss.backward()
    return Measured(loss, chosen, -(own.exp() * own).sum(-1), kl)


@pytest.mark.parametrize("rows", [1, 5, 7, 1000])
@pytest.mark.parametrize("kl", [True, False], ids=["KL", "no KL"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("name", HEADS)
def test_a_head_in_chunks_measures_and_learns_what_a_whole_one_does(name, bias, kl, rows, monkeypatch):
    case, twin = (make_case(HEADS[name], bias=bias, kl=kl) for _ in range(2))
    monkeypatch.setitem(CHUNK_LOGITS, "cpu", rows * WORDS + WORDS // 2)
    assert rows == 1 or len(case.micro.targets) % rows
    ours, wanted = learn(case.policy, case.micro, case.loss, case.start), learn_whole(twin)
    for name, right in vars(wanted).items():
        found = getattr(ours, name)
        if right is None:
            assert found is None
        else:
            assert found.tolist() == pytest.approx(right.tolist(), rel=2e-6, abs=1e-6)
    for tensor, gradient in case.gradients.items():
        wanted_gradient = twin.gradients[tensor]
        assert float((gradient - wanted_gradient).norm()) < 1e-6 * float(wanted_gradient.norm())
    assert all(p.grad is None for p in case.reference.linear.parameters())


@pytest.mark.parametrize("kl", [True, False], ids=["KL", "no KL"])
def test_a_micro_batch_of_one_chunk_has_the_bits_of_all_logits_at_once(kl):
    case, twin = (make_case(HEADS["plain"], bias=True, kl=kl) for _ in range(2))
    ours, wanted = learn(case.policy, case.micro, case.loss, case.start), learn_whole(twin)
    assert torch.equal(ours.loss, wanted.loss)
    assert torch.equal(ours.logprobs, wanted.logprobs)
    assert all(torch.equal(gradient, twin.gradients[name]) for name, gradient in case.gradients.items())


def test_a_second_micro_batch_adds_its_gradient_to_the_first():
    once, twice = (make_case(HEADS["all"], bias=True) for _ in range(2))
    learn(once.policy, once.micro, once.loss, once.start)
    for _ in range(2):
        learn(twice.policy, twice.micro, twice.loss, twice.start)
    for name, gradient in once.gradients.items():
        assert torch.allclose(2 * gradient, twice.gradients[name])


def test_a_head_that_is_frozen_gets_no_gradient_and_the_body_gets_its_own():
    case, twin = (make_case(HEADS["plain"], bias=True) for _ in range(2))
    case.policy.linear.requires_grad_(False)
    learn(case.policy, case.micro, case.loss, case.start)
    learn(twin.policy, twin.micro, twin.loss, twin.start)
    assert case.policy.linear.weight.grad is None
    assert case.policy.linear.bias.grad is None
    assert torch.equal(case.policy.hidden.grad, twin.policy.hidden.grad)


@pytest.mark.parametrize("block", [5, 1000])
def test_a_weight_in_bfloat16_is_used_as_its_float32_value_block_by_block(block, monkeypatch):
    monkeypatch.setattr("dspy_fst.slow.head.BLOCK_ROWS", block)
    case, twin = (make_case(HEADS["all"], bias=True) for _ in range(2))
    for readout in (case.policy, twin.policy):
        readout.linear.to(torch.bfloat16).requires_grad_(False)
    twin.policy.linear.float()
    ours, wanted = (learn(each.policy, each.micro, each.loss, each.start) for each in (case, twin))
    assert torch.allclose(ours.logprobs, wanted.logprobs, atol=1e-6)
    assert torch.allclose(case.policy.hidden.grad, twin.policy.hidden.grad, atol=1e-7)


def test_scores_and_the_kl_are_those_of_whole_log_probabilities(monkeypatch):
    case = make_case(HEADS["all"], bias=True)
    monkeypatch.setitem(CHUNK_LOGITS, "cpu", 3 * WORDS)
    own, other = (whole_log_probs(readout, case.micro) for readout in (case.policy, case.reference))
    chosen = own.gather(-1, case.micro.targets[:, None])[:, 0]
    assert torch.allclose(logprobs(case.policy, case.micro), chosen, atol=1e-6)
    assert torch.allclose(
        kl_to(case.reference, case.policy, case.micro), (own.exp() * (own - other)).sum(-1), atol=1e-6
    )


class Logits(TorchDispatchMode):
    """Sees every tensor that is made: those over the vocabulary that are alive at once, in numbers."""

    def __init__(self, *policies: Policy):
        super().__init__()
        self.vocabulary, self.most, self.largest = VOCABULARY, 0, 0
        self.weights = {p.untyped_storage().data_ptr() for policy in policies for p in policy.parameters()}
        self._alive: dict[int, tuple[object, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor) and tensor.dim() == 2 and tensor.shape[1] == self.vocabulary:
                if tensor.untyped_storage().data_ptr() in self.weights:
                    continue  # a head's weight, transposed
                self.largest = max(self.largest, tensor.numel())
                self._count(tensor)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self._alive = {key: entry for key, entry in self._alive.items() if entry[0]() is not None}
        self._alive[storage.data_ptr()] = (weakref.ref(tensor), tensor.numel())
        self.most = max(self.most, sum(numel for _, numel in self._alive.values()))


def long_batch(rows: int, reply: int):
    draw = random.Random(1)
    made = [
        make_row(
            [draw.randrange(VOCABULARY) for _ in range(4)],
            [draw.randrange(VOCABULARY) for _ in range(reply)],
            [-4.0] * reply,
            (-1.0) ** i,
            1 / (rows * reply),
        )
        for i in range(rows)
    ]
    calls = [make_call(row.completion_ids, row.prompt_ids) for row in made]
    return dataclasses.replace(make_batch(made), seed_kl_calls=tuple(SeedKLCall(c, (1, 2)) for c in calls)), calls


def narrow_model(path, seed: int):
    """No width of it but the head's is the vocabulary's."""
    config = AutoConfig.from_pretrained(save_model(path))
    config.intermediate_size = 48
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return path


@pytest.fixture
def small_chunks(monkeypatch) -> int:
    rows = 3
    monkeypatch.setitem(CHUNK_LOGITS, "cpu", rows * VOCABULARY)
    return rows


@pytest.mark.parametrize(("kl", "tensors"), [(0.1, CHUNK_TENSORS), (0.0, CHUNK_TENSORS_WITHOUT_KL)])
def test_logits_of_an_update_take_the_same_however_long_a_reply_is(kl, tensors, tmp_path, small_chunks):
    start, reference = (narrow_model(tmp_path / str(seed), seed) for seed in (0, 9))
    settings = TrainingSettings(
        learning_rate=1e-3,
        kl_coefficient=kl,
        seed_kl_coefficient=2 * kl,
        micro_batch_tokens=16,
        min_effective_share=0.0,
    )
    most = []
    for reply in (10, 100):  # both replies are longer than the budget allows with others
        trainer = Trainer(start, settings, device="cpu", reference=reference, share_prompts=False)
        batch, calls = long_batch(2, reply)
        if kl:
            trainer.kl_by_call(calls)
        with Logits(trainer._policy, trainer._start.policy) as seen:
            trainer.step(batch)
            if kl:
                trainer.kl_by_call(calls)
            trainer.logprobs(calls)
        assert seen.largest == small_chunks * VOCABULARY
        most.append(seen.most)
    assert most[0] == most[1] == tensors * small_chunks * VOCABULARY


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_chunks_change_no_gradient_of_an_update(tied, start, tied_start, tmp_path, monkeypatch):
    """Weights, embedding and head alike, with a KL and seed-KL calls, over several micro-batches."""
    reference = save_model(tmp_path / "reference", tied=tied, seed=9)
    settings = TrainingSettings(
        learning_rate=1e-3,
        kl_coefficient=0.1,
        seed_kl_coefficient=0.2,
        micro_batch_tokens=60,
        min_effective_share=0.0,
    )
    batch, _ = long_batch(6, 11)
    found = []
    for rows in (1, 4, 1000):
        monkeypatch.setitem(CHUNK_LOGITS, "cpu", rows * VOCABULARY)
        trainer = Trainer(tied_start if tied else start, settings, device="cpu", reference=reference)
        with recorded_gradients(trainer) as gradients:
            report = trainer.step(batch)
        found.append((gradients, report))
    for gradients, report in found[1:]:
        assert_close(gradients, found[0][0], tolerance=1e-6)
        for value, wanted in zip(dataclasses.astuple(report), dataclasses.astuple(found[0][1]), strict=True):
            assert value == pytest.approx(wanted, abs=1e-6)
