"""Each loss through the trainer: as trl computes it on the same rows, however the batch is cut, and until it learns."""

import random
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from dspy_fst.slow.credit import credit
from dspy_fst.slow.losses.by_name import loss_of
from dspy_fst.slow.training_settings import TrainingSettings
from dspy_fst.types import Batch, Group, Rollout
from tests.slow.makers import VOCABULARY, make_call, make_rollout, make_tokenizer
from tests.slow.test_losses import NAMES
from tests.slow.test_trainer import as_sampled_by, assert_close, loop_of, make_trainer, recorded_gradients

LONGEST = 8
LENGTHS = ((2, 7, 3), (5, 1, 6))
"""Tokens of the replies of two problems: as many rollouts and tokens each, so that means over problems, over rollouts
and over all tokens agree between the libraries."""
REWARDS = ((1.0, 0.0, 0.25), (0.0, 1.0, 0.5))
TRL = {
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.1},  # trl's epsilon_high is the cap itself here
    "grpo": {"loss_type": "grpo"},
    "dapo": {"loss_type": "dapo", "epsilon_high": 0.28},
    "dr_grpo": {"loss_type": "dr_grpo"},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.05, "epsilon_high": 0.1},
}
OURS = {"cispo": {"importance_cap": 1.1}, "gspo": {"clip": (0.05, 0.1)}}


@pytest.fixture
def groups(start) -> list[Group]:
    """Rollouts whose recorded log-probabilities are up to .6 off those of the model: many ratios leave every band."""
    draw, trainer = random.Random(1), make_trainer(start)

    def rollout(problem: int, reward: float, length: int) -> Rollout:
        completion = [draw.randrange(VOCABULARY) for _ in range(length)]
        call = make_call(completion, [problem + 1] * 4)
        (own,) = trainer.logprobs([call])
        shift = draw.uniform(-0.2, 0.2)  # of the reply, so that its mean moves as well
        call = replace(call, logprobs=tuple(one + shift + draw.uniform(-0.4, 0.4) for one in own))
        return make_rollout(reward, call, problem=problem)

    both = [zip(rewards, lengths, strict=True) for rewards, lengths in zip(REWARDS, LENGTHS, strict=True)]
    return [Group(p, tuple(rollout(p, *each) for each in rollouts)) for p, rollouts in enumerate(both)]


def batch_of(name: str, groups: list[Group]) -> Batch:
    return credit(groups, loss=loss_of(TrainingSettings(loss=name), longest_reply=LONGEST))


def ours(start, name: str, batch: Batch, **changes):
    """Gradient and report of one update without a KL term."""
    settings = {"importance_cap": 4.0, "kl_coefficient": 0.0, **OURS.get(name, {}), "loss": name, **changes}
    trainer = make_trainer(start, **settings)
    with recorded_gradients(trainer) as gradients:
        report = trainer.step(batch)
    return gradients, report


# ---- trl -------------------------------------------------------------------------------------------


def trl_trainer(kind: str, start, tmp_path, rows: int, **settings):
    """A trainer of trl's that never generates: its loss is called with rows that are given."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from datasets.table import InMemoryTable

    common = {"output_dir": str(tmp_path), "per_device_train_batch_size": rows, "use_cpu": True, "bf16": False}
    common |= {"report_to": [], "gradient_checkpointing": False, "disable_tqdm": True}
    text = {"prompt": ["w1"] * rows} if kind != "SFT" else {"text": ["w1 w2"] * rows}
    if kind != "SFT":
        settings |= {"num_generations": rows, "max_completion_length": LONGEST, "beta": 0.0}
    given = {} if kind == "SFT" else {"reward_funcs": lambda completions, **_: [0.0] * len(completions)}
    trainer = getattr(trl, f"{kind}Trainer")(
        model=AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32),
        args=getattr(trl, f"{kind}Config")(**common, **settings),
        # With a fingerprint: computing one pickles the table, which fails where pyarrow is linked into place.
        train_dataset=Dataset(InMemoryTable.from_pydict(text), fingerprint="given"),
        processing_class=make_tokenizer(),
        **given,
    )
    trainer.current_gradient_accumulation_steps = 1  # what Trainer.train() would set
    trainer.model.train()
    return trainer


def padded(rows, pad: int = VOCABULARY - 1) -> dict[str, torch.Tensor]:
    """The rows as trl pads them: completions on the right. All prompts here are of one length."""
    long = max(len(row.completion_ids) for row in rows)

    def filled(values, filler):
        return torch.tensor([[*value, *[filler] * (long - len(value))] for value in values])

    prompts = torch.tensor([row.prompt_ids for row in rows])
    return {
        "prompt_ids": prompts,
        "prompt_mask": torch.ones_like(prompts),
        "completion_ids": filled([row.completion_ids for row in rows], pad),
        "completion_mask": filled([[1] * len(row.completion_ids) for row in rows], 0),
        "old_per_token_logps": filled([row.logprobs for row in rows], 0.0),
        "advantages": torch.tensor([row.advantage for row in rows]),
        "num_items_in_batch": torch.tensor(sum(len(row.completion_ids) for row in rows)),
    }


def gradients_of(trainer, inputs: dict[str, torch.Tensor], **named) -> tuple[dict[str, torch.Tensor], float]:
    loss = trainer.compute_loss(trainer.model, inputs, **named)
    loss.backward()
    return {name: p.grad for name, p in trainer.model.named_parameters()}, float(loss.detach())


@pytest.mark.slow
@pytest.mark.parametrize("name", TRL)
def test_value_gradient_and_clipped_tokens_are_those_of_trl_s_loss_of_that_name(name, start, groups, tmp_path):
    batch = batch_of(name, groups)
    trainer = trl_trainer("GRPO", start, tmp_path, len(batch.rows), **TRL[name])
    wanted, loss = gradients_of(trainer, padded(batch.rows))
    gradients, report = ours(start, name, batch)
    assert_close(gradients, wanted, tolerance=2e-5)
    assert report.loss == pytest.approx(loss, abs=1e-6)
    measured = trainer._metrics["train"]
    if name == "cispo":  # trl counts capped tokens with an advantage above 0 alone
        assert 0 < measured["cispo_clip_ratio"][-1] <= report.capped_share < 1
    elif name == "gspo":  # trl counts replies
        assert 0 < measured["clip_ratio/region_mean"][-1] < 1
        assert 0 < report.capped_share < 1
    else:
        assert report.capped_share == pytest.approx(measured["clip_ratio/region_mean"][-1])
        assert report.capped_share > 0


@pytest.mark.slow
def test_rloo_has_the_gradient_of_trl_s_trainer_on_fresh_rollouts(start, groups, tmp_path):
    """trl's ratio is 1 there, and so is its gradient's."""
    batch = batch_of("rloo", as_sampled_by(make_trainer(start), groups))
    inputs = padded(batch.rows)
    inputs["old_logps"] = (inputs["old_per_token_logps"] * inputs["completion_mask"]).sum(1)
    wanted, _ = gradients_of(trl_trainer("RLOO", start, tmp_path, len(batch.rows)), inputs)
    gradients, report = ours(start, "rloo", batch)
    assert_close(gradients, wanted, tolerance=2e-5)
    assert report.capped_share is None


@pytest.mark.slow
def test_rejection_sampling_has_the_loss_and_gradient_of_trl_s_supervised_trainer(start, groups, tmp_path):
    batch = batch_of("rft", groups)
    assert [len(row.completion_ids) for row in batch.rows] == [2, 1]
    inputs = padded(batch.rows)
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    scored = torch.cat([torch.zeros_like(inputs["prompt_ids"]), inputs["completion_mask"]], 1).bool()
    given = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(~scored, -100)}
    wanted, loss = gradients_of(trl_trainer("SFT", start, tmp_path, len(batch.rows)), given)
    gradients, report = ours(start, "rft", batch)
    assert_close(gradients, wanted, tolerance=2e-5)
    assert report.loss == pytest.approx(loss, abs=1e-6)


# ---- however the batch is cut ----------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_neither_micro_batches_nor_the_tree_change_the_gradient_and_rollouts_hold_several_replies(name, start):
    """Loops of several turns, whose prompts continue each other: as rows by themselves, and as one tree."""
    draw = random.Random(5)
    groups = [
        Group(p, tuple(make_rollout(reward, *loop_of(draw, draw.randint(1, 4)), problem=p) for reward in rewards))
        for p, rewards in enumerate(((1.0, 0.0, 0.5), (0.0, 1.0)))
    ]
    batch = batch_of(name, groups)
    ways = ((1, False), (60, False), (10_000, False), (40, True), (10_000, True))
    seen = [
        ours(start, name, batch, kl_coefficient=0.1, micro_batch_tokens=budget, share_prompts=share)
        for budget, share in ways
    ]
    (first, report), *others = seen
    assert report.kl_to_start == pytest.approx(0, abs=1e-6)
    for gradients, other in others:
        assert_close(gradients, first, tolerance=1e-5)
        assert other.capped_share == report.capped_share
        assert other.loss == pytest.approx(report.loss, rel=1e-5)


def test_the_reported_kl_is_a_mean_over_tokens_where_weights_do_not_sum_to_one(start, groups):
    """RLOO's weights sum to the tokens of a rollout; a KL that is summed over them would be that many times larger."""
    reported = {}
    for name in ("cispo", "rloo"):
        trainer = make_trainer(start, loss=name, kl_coefficient=0.01, warmup_steps=0)
        trainer.step(batch_of("cispo", groups))
        reported[name] = trainer.step(batch_of(name, groups)).kl_to_start
    assert reported["rloo"] == pytest.approx(reported["cispo"], rel=1.0)
