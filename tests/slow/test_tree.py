"""A batch that is read as a tree has the numbers of its sequences one by one, at any depth."""

import dataclasses
import random
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.families import FAMILIES
from dspy_fst.engine import tree
from dspy_fst.memory import arithmetic
from dspy_fst.report.metric_names import entry_of
from dspy_fst.run.phase_reports import StepReport
from dspy_fst.slow.batching import Scored, micro_batches
from dspy_fst.slow.model import Policy
from dspy_fst.slow.trainer import Trainer
from dspy_fst.slow.training_settings import TrainingSettings
from tests.slow.makers import VOCABULARY, make_batch, make_row, save_model

BY_NAME = {family.name: family for family in FAMILIES}
READ_AS_TREES = ("Llama", "Qwen2", "Qwen3-MoE", "Gemma", "GPT-NeoX, Pythia", "GPT-2", "OPT", "OLMo 2", "DeepSeek-V2")
ONE_BY_ONE = ("Mistral", "Gemma 3 (text)", "Bloom", "Falcon", "GPT-J", "StableLM", "GPT-OSS", "Mamba")

node = st.deferred(lambda: st.tuples(st.integers(1, 12), st.booleans(), st.lists(node, max_size=3)))
roots = st.lists(node, min_size=1, max_size=3)
"""Each node: its tokens, whether a sequence ends there, and what goes on from it."""


def sequences_of(nodes, draw, before=()) -> list[Scored]:
    """The sequences that end at a node, with scored parts of any length; some come twice."""
    found = []
    for length, ends, deeper in nodes:
        ids = (*before, *(draw.randrange(VOCABULARY) for _ in range(length)))
        found += sequences_of(deeper, draw, ids)
        for _ in range(draw.randint(1, 2) if ends or not deeper else 0):
            if len(ids) > 1:
                found.append(Scored(ids, draw.randint(1, len(ids) - 1), draw.choice([1.0, 0.5])))
    draw.shuffle(found)
    return found


def dspy_batch(draw) -> list[Scored]:
    """Two candidates' system messages, two problems, two replies of several lengths, and a turn that goes on."""

    def ids(count):
        return tuple(draw.randrange(3, VOCABULARY) for _ in range(count))

    systems, problems = [ids(24), ids(21)], [ids(18), ids(9)]
    prompts = [(*system, *problem) for system in systems for problem in problems]
    found = [Scored((*p, *ids(draw.randint(1, 9))), len(p), draw.choice([1.0, 0.7])) for p in prompts for _ in range(2)]
    return [*found, Scored((*found[0].ids, *ids(5)), len(found[0].ids) + 2)]


def states_and_gradient(policy: Policy, sequences: Sequence[Scored], budget: int, *, share: bool):
    """The hidden states that predict the scored tokens, sequence by sequence; the gradient of a sum over them."""
    found = {}
    for micro in micro_batches(sequences, budget, share=share):
        found |= dict(zip(micro.members, policy(micro).split(micro.tokens), strict=True))
    states = torch.cat([found[index] for index in range(len(sequences))])
    factors = torch.linspace(-1, 1, states.numel(), dtype=states.dtype).view_as(states)
    (states * factors).sum().backward()
    gradient = torch.cat([p.grad.flatten() for p in policy.model.parameters() if p.grad is not None])
    policy.model.zero_grad()
    return states.detach(), gradient


def assert_equal(policy: Policy, sequences: Sequence[Scored], budget: int, within: float) -> None:
    alone = states_and_gradient(policy, sequences, 1, share=False)
    for part, other in zip(states_and_gradient(policy, sequences, budget, share=True), alone, strict=True):
        assert float((part - other).norm() / other.norm()) < within


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    """In float64: only the norms round to float32."""
    return Policy.load(save_model(tmp_path_factory.mktemp("tree") / "model"), dtype=torch.float32).double()


@pytest.mark.slow
@given(roots, st.integers(1, 120), st.randoms(use_true_random=False))
@settings(max_examples=40, deadline=None)
def test_any_tree_has_the_hidden_states_and_the_gradient_of_its_sequences(policy, nodes, budget, draw):
    if sequences := sequences_of(nodes, draw):
        assert_equal(policy, sequences, budget, within=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", READ_AS_TREES)
@pytest.mark.parametrize("budget", [60, 1000])
def test_a_family_that_is_read_as_a_tree_keeps_its_numbers(name, budget, tmp_path):
    policy = Policy.load(BY_NAME[name].save(tmp_path), dtype=torch.float32)
    assert policy.shares_prompts
    if name in ("Qwen3-MoE", "DeepSeek-V2"):  # torch multiplies groups of experts in float32 at most
        assert_equal(policy, dspy_batch(random.Random(3)), budget, within=5e-6)
    else:
        assert_equal(policy.double(), dspy_batch(random.Random(3)), budget, within=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ONE_BY_ONE)
def test_a_family_that_cannot_share_falls_back_by_itself(name, tmp_path):
    assert not Policy.load(BY_NAME[name].save(tmp_path), dtype=torch.float32).shares_prompts


def test_a_tree_in_bfloat16_is_as_close_as_its_sequences_are(tmp_path):
    folder, sequences = save_model(tmp_path / "model"), dspy_batch(random.Random(4))
    exact, low = (Policy.load(folder, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    wanted = states_and_gradient(exact, sequences, 1, share=False)
    gaps = [
        [float((part.float() - other).norm() / other.norm()) for part, other in zip(found, wanted, strict=True)]
        for found in (states_and_gradient(low, sequences, 1000, share=share) for share in (False, True))
    ]
    assert all(0 < alone < 0.1 for alone in gaps[0])
    assert all(tree < 1.5 * alone for alone, tree in zip(*gaps, strict=True))


def test_layers_that_are_computed_again_have_the_same_gradient_bit_for_bit(tmp_path):
    folder, sequences, found = save_model(tmp_path / "model"), dspy_batch(random.Random(5)), []
    for again in (False, True, False):
        policy = Policy.load(folder, dtype=torch.float32)
        if again:
            policy.recompute_layers()
        found.append(states_and_gradient(policy, sequences, 200, share=True)[1])
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_no_layer_keeps_the_copied_keys(tmp_path):
    """What autograd keeps grows with the tokens that are read, not with the texts that share a beginning."""
    policy = Policy.load(save_model(tmp_path / "model"), dtype=torch.float32)

    def kept(texts: int) -> int:
        sequences = [Scored((*range(60), i, 1), 60) for i in range(texts)]
        (micro,) = micro_batches(sequences, 1000, share=True)
        seen: dict[int, int] = {}

        def note(held):
            seen[held.untyped_storage().data_ptr()] = held.untyped_storage().nbytes()
            return held

        with torch.autograd.graph.saved_tensors_hooks(note, lambda held: held):
            policy(micro)
        return sum(seen.values()) // micro.tokens_read

    assert kept(40) < 1.2 * kept(4)


def test_an_update_tells_the_tokens_that_it_read_beside_those_of_its_rows(tmp_path):
    prompts = [(*range(2, 32), 40 + problem, *range(2, 12)) for problem in range(2)]
    rows = [make_row(prompt, (7 + i, 50), (-1.0, -1.0), 1.0, 0.1) for prompt in prompts for i in range(3)]
    settings = TrainingSettings(learning_rate=1e-3, min_effective_share=0.0)
    folder = save_model(tmp_path / "model")
    shared, alone = (
        Trainer(folder, settings, device="cpu", share_prompts=share).step(make_batch(rows)) for share in (True, False)
    )
    assert (shared.row_tokens, shared.tokens_read) == (6 * 43, 30 + 2 * 11 + 6)
    assert (alone.row_tokens, alone.tokens_read) == (6 * 43, 6 * 42)
    assert shared.loss == pytest.approx(alone.loss, abs=1e-6)
    report = dataclasses.asdict(StepReport(1, 0, 0.5, {}, shared, 0, {}))
    values = entry_of({"event": "step", "report": report}).values
    assert (values["train/row_tokens"], values["train/tokens_read"]) == (258, 58)


def test_the_probe_reads_a_beginning_that_is_shared(tmp_path, monkeypatch):
    """Else a model would be taken to read trees that it never was given."""
    seen = []
    monkeypatch.setattr(tree, "_of_block", lambda *a, of=tree._of_block: (seen.append(a[1].mask), of(*a))[1])
    assert Policy.load(save_model(tmp_path / "model"), dtype=torch.float32).shares_prompts
    assert any(mask is not None for mask in seen)


def test_the_memory_plan_counts_the_keys_that_a_block_copies():
    assert arithmetic.BLOCK_KEYS == tree.BLOCK_KEYS
