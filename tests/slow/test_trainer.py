"""One update against arithmetic done by hand: the gradient, AdamW, and what may not change it."""

import dataclasses
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3ForCausalLM

from dspy_fst.errors import ConfigurationError, TrainingError
from dspy_fst.slow.batching import NONE
from dspy_fst.slow.credit import credit
from dspy_fst.slow.model import Policy
from dspy_fst.slow.trainer import Trainer
from dspy_fst.slow.training_settings import TrainingSettings
from dspy_fst.types import Batch, Group, Rollout, SeedKLCall
from tests.slow.makers import VOCABULARY, make_batch, make_call, make_rollout, make_row, save_model

SETTINGS = TrainingSettings(
    learning_rate=1e-2, kl_coefficient=0.1, importance_cap=1.5, micro_batch_tokens=40, min_effective_share=0.0
)


def make_trainer(start, reference=None, share_prompts=True, adapters=NONE, **changes) -> Trainer:
    settings = TrainingSettings(**(SETTINGS.model_dump() | changes))
    return Trainer(start, settings, device="cpu", reference=reference, adapters=adapters, share_prompts=share_prompts)


def as_sampled_by(trainer: Trainer, groups: Sequence[Group]) -> list[Group]:
    """The groups with the log-probabilities that the trainer's weights give their calls: fresh rollouts of them."""

    def sampled(rollout: Rollout) -> Rollout:
        calls = (dataclasses.replace(call, logprobs=tuple(trainer.logprobs([call])[0])) for call in rollout.calls)
        return dataclasses.replace(rollout, calls=tuple(calls))

    return [Group(group.problem, tuple(map(sampled, group.rollouts))) for group in groups]


def draw_call(draw: random.Random, predictor: str = "answer"):
    """A call of any length, often of a prompt seen before; recorded log-probabilities put some ratios above the cap."""
    completion = [draw.randrange(VOCABULARY) for _ in range(draw.randint(1, 7))]
    prompt = [draw.randrange(3)] * draw.choice([3, 8, 12])
    logprobs = [-draw.uniform(0.5, 12) for _ in completion]
    return make_call(completion, prompt, predictor=predictor, logprobs=logprobs, temperature=draw.choice([0.7, 1.0]))


@pytest.fixture
def groups() -> list[Group]:
    """Two live problems whose rollouts call two modules a different number of times, a masked rollout, a flat group."""
    draw = random.Random(3)

    def rollout(problem, reward):
        calls = [draw_call(draw, draw.choice(["query", "answer"])) for _ in range(draw.randint(1, 3))]
        return make_rollout(reward, *calls, problem=problem, mask="timeout" if reward is None else None)

    rewards = [(1.0, 0.0, 0.25, None), (0.0, 1.0), (1.0, 1.0)]
    return [Group(p, tuple(rollout(p, reward) for reward in group)) for p, group in enumerate(rewards)]


@pytest.fixture
def batch(groups):
    return credit(groups)


@contextmanager
def recorded_gradients(trainer: Trainer) -> Iterator[dict[str, torch.Tensor]]:
    """The gradients that the optimizer is handed."""
    seen: dict[str, torch.Tensor] = {}

    def record(*_):
        seen.update({name: p.grad.clone() for name, p in trainer.parameters.items() if p.grad is not None})

    hook = register_optimizer_step_pre_hook(record)
    try:
        yield seen
    finally:
        hook.remove()


def hand_gradient(start, reference, groups, settings: TrainingSettings) -> tuple[dict[str, torch.Tensor], float]:
    """Gradient and loss written out in float64, one call at a time, unpadded, from the definitions.

    With z the logits, p = softmax(z / T), q the reference's, e the sampled token's unit vector:
    dL/dz = w / T * [ -min(p_y / b_y, cap) A (e - p) + kl_coefficient * p (log(p / q) - KL) ].
    """
    model = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float64)
    anchor = AutoModelForCausalLM.from_pretrained(reference, dtype=torch.float64)
    live = [[r for r in g.rollouts if r.reward is not None] for g in groups]
    live = [group for group in live if len({r.reward for r in group}) > 1]
    total = 0.0
    for group in live:
        rewards = torch.tensor([r.reward for r in group], dtype=torch.float64)
        advantages = (rewards - rewards.mean()) / (rewards.var(unbiased=False).sqrt() + 1e-6)
        share = 1 / (len(live) * sum(r.tokens for r in group))
        for rollout, advantage in zip(group, advantages, strict=True):
            for call in rollout.calls:
                ids = torch.tensor([[*call.prompt_ids, *call.completion_ids]])
                span = slice(len(call.prompt_ids) - 1, -1)
                logits = model(ids).logits[0, span]
                with torch.no_grad():
                    p = torch.softmax(logits / call.temperature, -1)
                    q = torch.softmax(anchor(ids).logits[0, span] / call.temperature, -1)
                    e = torch.nn.functional.one_hot(torch.tensor(call.completion_ids), VOCABULARY)
                    chosen = (p * e).sum(-1)
                    ratio = chosen / torch.tensor(call.logprobs, dtype=torch.float64).exp()
                    weight = ratio.clamp(max=settings.importance_cap)
                    kl = (p * (p / q).log()).sum(-1, keepdim=True)
                    push = -weight[:, None] * advantage * (e - p)
                    pull = settings.kl_coefficient * p * ((p / q).log() - kl)
                    total += float(
                        share * (-weight * advantage * chosen.log() + settings.kl_coefficient * kl[:, 0]).sum()
                    )
                logits.backward(share / call.temperature * (push + pull))
    return {name: p.grad for name, p in model.named_parameters()}, total


def assert_close(left: dict, right: dict, tolerance: float = 2e-6) -> None:
    """Every tensor agrees to a share of the largest entry of all."""
    assert left.keys() == right.keys()
    scale = max(float(t.abs().max()) for t in right.values())
    gaps = {name: float((left[name].detach().double() - right[name].double()).abs().max()) / scale for name in right}
    assert max(gaps.values()) < tolerance, gaps


@pytest.mark.parametrize("tied", [False, True])
def test_the_gradient_and_the_loss_are_those_worked_out_by_hand(start, tied_start, tmp_path, groups, batch, tied):
    begin, reference = (tied_start if tied else start), save_model(tmp_path / "reference", tied=tied, seed=9)
    trainer = make_trainer(begin, reference)
    assert len({row.prompt_ids for row in batch.rows}) < len(batch.rows) > 6
    with recorded_gradients(trainer) as gradients:
        report = trainer.step(batch)
    by_hand, loss = hand_gradient(begin, reference, groups, SETTINGS)
    assert_close(gradients, by_hand)
    assert report.loss == pytest.approx(loss, abs=1e-6)  # large terms of both signs cancel in it
    assert 0 < report.capped_share < 1
    assert report.grad_norm == pytest.approx(sum(float(g.square().sum()) for g in by_hand.values()) ** 0.5, rel=1e-5)


def test_neither_the_size_of_micro_batches_nor_shared_prompts_change_the_gradient(start, batch):
    seen = []
    for budget, share in ((1, False), (30, False), (10_000, False), (60, True), (10_000, True)):
        trainer = make_trainer(start, micro_batch_tokens=budget, share_prompts=share)
        with recorded_gradients(trainer) as gradients:
            trainer.step(batch)
        seen.append(gradients)
    for gradients in seen[1:]:
        assert_close(gradients, seen[0])


def loop_of(draw: random.Random, turns: int):
    """A loop's calls: every prompt is the call before and an observation more; temperatures differ."""
    ids, calls = [1, 2, 3], []
    for _ in range(turns):
        prompt = [*ids, *(draw.randrange(VOCABULARY) for _ in range(draw.randint(1, 4)))]
        calls.append(dataclasses.replace(draw_call(draw), prompt_ids=tuple(prompt)))
        ids = [*prompt, *calls[-1].completion_ids]
    return calls


@pytest.mark.parametrize("share", [True, False])
def test_a_loop_that_is_read_as_one_sequence_has_the_gradient_of_its_calls_one_by_one(start, tmp_path, share):
    draw = random.Random(5)
    rewards = ((1.0, 0.0, 0.5), (0.0, 1.0))
    groups = [
        Group(p, tuple(make_rollout(reward, *loop_of(draw, draw.randint(2, 6)), problem=p) for reward in group))
        for p, group in enumerate(rewards)
    ]
    batch, reference = credit(groups), save_model(tmp_path / "reference", seed=9)
    assert len({row.temperature for row in batch.rows}) == len({row.advantage > 0 for row in batch.rows}) == 2
    trainer = make_trainer(start, reference, share_prompts=share, micro_batch_tokens=200)
    with recorded_gradients(trainer) as gradients:
        report = trainer.step(batch)
    by_hand, loss = hand_gradient(start, reference, groups, SETTINGS)
    assert_close(gradients, by_hand)
    assert report.loss == pytest.approx(loss, abs=1e-6)
    assert (report.rows, report.sequences) == (len(batch.rows), 5)


def test_prompts_are_shared_where_every_layer_remembers_every_token(start, tmp_path):
    assert Policy.load(start, dtype=torch.float32).shares_prompts
    config = AutoConfig.from_pretrained(start)
    config.use_sliding_window, config.sliding_window = True, 4
    config.layer_types = ["full_attention", "sliding_attention"]
    Qwen3ForCausalLM(config).save_pretrained(tmp_path)
    assert not Policy.load(tmp_path, dtype=torch.float32).shares_prompts


def test_parameters_move_by_adamw_with_a_linear_warm_up(start, batch):
    """Three updates of a two-step warm-up, written out: rates 1/2, 1, 1 of the peak."""
    trainer = make_trainer(start, weight_decay=0.1, warmup_steps=2, adam_betas=(0.8, 0.9))
    weights = {name: p.detach().double().clone() for name, p in trainer.parameters.items()}
    first = {name: torch.zeros_like(w) for name, w in weights.items()}
    second = {name: torch.zeros_like(w) for name, w in weights.items()}
    for t, rate in enumerate([0.5e-2, 1e-2, 1e-2], start=1):
        with recorded_gradients(trainer) as gradients:
            assert trainer.step(batch).learning_rate == pytest.approx(rate)
        for name, gradient in gradients.items():
            g = gradient.double()
            first[name] = 0.8 * first[name] + 0.2 * g
            second[name] = 0.9 * second[name] + 0.1 * g**2
            step = (first[name] / (1 - 0.8**t)) / ((second[name] / (1 - 0.9**t)).sqrt() + 1e-8)
            weights[name] -= rate * (0.1 * weights[name] + step)
    assert_close(dict(trainer.parameters), weights)


def test_a_gradient_above_the_maximum_is_scaled_to_it_and_reported_unscaled(start, batch):
    free, clipped = make_trainer(start), make_trainer(start, max_grad_norm=0.01)
    with recorded_gradients(free) as full:
        norm = free.step(batch).grad_norm
    with recorded_gradients(clipped) as small:
        assert clipped.step(batch).grad_norm == pytest.approx(norm)
    assert norm > 0.01
    assert_close(small, {name: g * 0.01 / norm for name, g in full.items()}, tolerance=1e-4)


def test_an_empty_batch_moves_neither_weights_nor_schedule(start):
    trainer = make_trainer(start)
    before = {name: p.detach().clone() for name, p in trainer.parameters.items()}
    report = trainer.step(make_batch([]))
    assert (report.tokens, report.loss, report.grad_norm, trainer.updates) == (0, 0.0, 0.0, 0)
    assert all(torch.equal(before[name], p) for name, p in trainer.parameters.items())


def test_a_loss_that_is_not_finite_leaves_the_state_untouched(start, batch):
    trainer, twin = make_trainer(start), make_trainer(start)
    poisoned = [dataclasses.replace(batch.rows[0], advantage=float("nan")), *batch.rows[1:]]
    with pytest.raises(TrainingError, match="learning_rate"):
        trainer.step(make_batch(poisoned))
    assert trainer.step(batch) == twin.step(batch)
    assert all(torch.equal(p, twin.parameters[name]) for name, p in trainer.parameters.items())


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        (make_row([1], [2, 3], [-1.0], 1.0, 0.5), "has 1 log-probabilities for its 2 tokens"),
        (make_row([1], [2], [float("-inf")], 1.0, 1.0), "log-probability that is not finite"),
        (make_row([], [2], [-1.0], 1.0, 1.0), "no prompt"),
        (make_row([1], [VOCABULARY], [-1.0], 1.0, 1.0), "another model"),
    ],
)
def test_a_row_that_cannot_be_scored_is_refused_before_anything_moves(start, row, complaint):
    trainer = make_trainer(start)
    with pytest.raises(TrainingError, match=complaint):
        trainer.step(make_batch([row]))
    assert trainer.updates == 0


def test_the_report_measures_the_weights_before_they_move(start, groups):
    trainer = make_trainer(start)
    calls = [call for group in groups for rollout in group.rollouts for call in rollout.calls]
    exact = [dataclasses.replace(c, logprobs=tuple(lp)) for c, lp in zip(calls, trainer.logprobs(calls), strict=True)]
    rows = [make_row(c.prompt_ids, c.completion_ids, c.logprobs, 1.0, 0.01, temperature=c.temperature) for c in exact]
    report = trainer.step(make_batch(rows))
    assert report.max_log_ratio == pytest.approx(0, abs=1e-5)
    assert report.kl_to_start == pytest.approx(0, abs=1e-6)
    assert report.capped_share == 0
    assert (report.rows, report.tokens) == (len(calls), sum(len(c.completion_ids) for c in calls))


def test_without_a_kl_term_no_reference_is_loaded_and_the_report_says_unmeasured(start, batch):
    trainer = make_trainer(start, reference="/nowhere", kl_coefficient=0.0)
    assert trainer.step(batch).kl_to_start is None


def test_scores_are_the_models_own_log_probabilities_in_the_order_given(start):
    draw = random.Random(0)
    sequences = [[draw.randrange(VOCABULARY) for _ in range(n)] for n in (3, 9, 1, 6, 0, 2)]
    scores = make_trainer(start, micro_batch_tokens=12).score(sequences)
    model = AutoModelForCausalLM.from_pretrained(start)
    assert [len(score) for score in scores] == [2, 8, 0, 5, 0, 1]
    for sequence, score in zip(sequences, scores, strict=True):
        if score:
            ids = torch.tensor([sequence])
            wanted = torch.log_softmax(model(ids).logits[0, :-1], -1).gather(-1, ids[0, 1:, None])[:, 0]
            assert score == pytest.approx(wanted.tolist(), abs=1e-5)


def test_calls_are_scored_at_the_temperature_they_were_sampled_with(start):
    call = make_call([4, 5, 6], [1, 2], temperature=0.7)
    model = AutoModelForCausalLM.from_pretrained(start)
    logits = model(torch.tensor([[1, 2, 4, 5, 6]])).logits[0, 1:-1]
    wanted = torch.log_softmax(logits / 0.7, -1).gather(-1, torch.tensor([[4], [5], [6]]))[:, 0]
    assert make_trainer(start).logprobs([call])[0] == pytest.approx(wanted.tolist(), abs=1e-5)


def test_the_kl_to_the_start_is_zero_at_the_start_and_above_it_afterwards(start, batch):
    trainer = make_trainer(start)
    calls = [make_call([4, 5, 6], [1, 2]), make_call([9], [8, 7, 6])]
    assert [value for values in trainer.kl_by_call(calls) for value in values] == pytest.approx([0] * 4, abs=1e-6)
    trainer.step(batch)
    by_call = trainer.kl_by_call(calls)
    assert [len(values) for values in by_call] == [3, 1]
    assert min(value for values in by_call for value in values) > 0


def test_updates_raise_the_likelihood_of_what_was_rewarded(start):
    trainer = make_trainer(start, warmup_steps=0)
    good, bad = make_call([4, 5], [1, 2]), make_call([6, 7], [1, 2])
    before = trainer.logprobs([good, bad])
    for _ in range(5):
        of_good, of_bad = map(tuple, trainer.logprobs([good, bad]))
        rewarded = make_rollout(1.0, dataclasses.replace(good, logprobs=of_good))
        punished = make_rollout(0.0, dataclasses.replace(bad, logprobs=of_bad))
        trainer.step(credit([Group(0, (rewarded, punished))]))
    after = trainer.logprobs([good, bad])
    assert sum(after[0]) > sum(before[0])
    assert sum(after[1]) < sum(before[1])


def test_bfloat16_runs_the_body_low_and_keeps_float32_weights_and_logits(start, batch):
    exact, low = make_trainer(start), make_trainer(start, precision="bfloat16")
    assert (exact.dtype, low.dtype) == ("float32", "bfloat16")
    assert {p.dtype for p in low.parameters.values()} == {torch.float32}
    sequence = list(range(20))
    gaps = [abs(a - b) for a, b in zip(exact.score([sequence])[0], low.score([sequence])[0], strict=True)]
    assert 1e-4 < max(gaps) < 0.3
    with recorded_gradients(exact) as wanted:
        exact.step(batch)
    with recorded_gradients(low) as gradients:
        low.step(batch)
    assert_close(gradients, wanted, tolerance=0.1)


def test_a_reference_of_another_model_is_refused(start, tmp_path, batch):
    config = AutoConfig.from_pretrained(start)
    config.vocab_size = VOCABULARY + 1
    Qwen3ForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(TrainingError, match="of 65 tokens"):
        make_trainer(start, reference=tmp_path).step(batch)


def test_settings_name_all_their_faults_at_once():
    with pytest.raises(ConfigurationError) as error:
        TrainingSettings.checked(
            {"learning_rate": 0, "adam_betas": (0.9, 1.0), "max_grad_norm": 0, "micro_batch_tokens": 0}
        )
    assert len(error.value.faults) == 4


def test_held_calls_add_the_gradient_of_their_mean_kl(start, tmp_path, groups, batch):
    """Against autograd through transformers' own forward, one call at a time."""
    reference = save_model(tmp_path / "reference", seed=5)
    calls = tuple(draw_call(random.Random(n)) for n in range(3))
    holding = make_trainer(start, reference, seed_kl_coefficient=0.3)
    plain = make_trainer(start, reference)
    with recorded_gradients(plain) as alone:
        plain.step(batch)
    with recorded_gradients(holding) as both:
        report = holding.step(
            dataclasses.replace(batch, seed_kl_calls=tuple(SeedKLCall(call, call.prompt_ids) for call in calls))
        )
    wanted, kl = mean_kl_gradient(start, reference, calls, [call.prompt_ids for call in calls])
    assert report.kl_under_seed == pytest.approx(kl, rel=1e-4)
    assert_close({name: both[name] - alone[name] for name in both}, {n: 0.3 * g for n, g in wanted.items()})


def test_held_calls_alone_learn_what_the_start_says_after_another_prompt(start, tmp_path):
    """Distillation: the policy reads its own prompt, the start a longer or a shorter one, before the same tokens."""
    reference = save_model(tmp_path / "reference", seed=5)
    calls = tuple(draw_call(random.Random(n)) for n in range(4))
    prompts = [(7, 8, 9), calls[1].prompt_ids[:1], (*calls[2].prompt_ids, *range(20, 50)), calls[3].prompt_ids]
    trainer = make_trainer(start, reference, seed_kl_coefficient=1.0)
    held = tuple(SeedKLCall(call, prompt) for call, prompt in zip(calls, prompts, strict=True))
    with recorded_gradients(trainer) as found:
        report = trainer.step(Batch(rows=(), weights="step-000000", seed_kl_calls=held))
    wanted, kl = mean_kl_gradient(start, reference, calls, prompts)
    assert report.kl_under_seed == pytest.approx(kl, rel=1e-4)
    assert report.loss == pytest.approx(kl, rel=1e-4)
    assert (report.rows, report.tokens) == (4, sum(len(call.completion_ids) for call in calls))
    assert report.entropy > 0
    assert trainer.updates == 1
    assert_close(found, wanted)


def mean_kl_gradient(start, reference, calls, prompts):
    model, base = (AutoModelForCausalLM.from_pretrained(path) for path in (start, reference))
    values = []
    for call, prompt in zip(calls, prompts, strict=True):
        ours, its = (
            torch.log_softmax(
                m(torch.tensor([[*before, *call.completion_ids]])).logits[0, len(before) - 1 : -1] / call.temperature,
                -1,
            )
            for m, before in ((model, call.prompt_ids), (base, prompt))
        )
        values.append((ours.exp() * (ours - its.detach())).sum(-1))
    kl = torch.cat(values).mean()
    kl.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, kl.item()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_a_caller_s_mode_without_gradients_changes_no_update(start, tmp_path, batch, mode):
    reference = save_model(tmp_path / "reference", tied=False, seed=9)
    plain, inside = make_trainer(start, reference), None
    with mode():
        inside = make_trainer(start, reference)
        inside.score([[1, 2, 3, 4]])
        reports = [inside.step(batch)]
        inside.save_state(tmp_path / "state")
        inside.load_state(tmp_path / "state")
        reports.append(inside.step(batch))
    reports.append(inside.step(batch))  # and back outside
    assert reports == [plain.step(batch) for _ in range(3)]
    assert reports[0].grad_norm > 0
    ours, its = inside.parameters, plain.parameters
    assert all(torch.equal(ours[name], its[name]) for name in its)
