"""Runs under each loss: they learn, report, go on with the same loss only, and settings that do nothing are told of."""

import json

import pytest

from dspy_fst.config import FSTConfig
from dspy_fst.errors import ConfigurationError
from dspy_fst.preflight.reply_limits import limit_faults, longest_reply
from dspy_fst.report.from_events import record_of
from dspy_fst.report.step_options import option_lines
from dspy_fst.run.directory import read_events
from dspy_fst.training.without_effect import settings_without_effect
from tests.relay import relay
from tests.slow.test_losses import NAMES
from tests.test_compile import compile_relay

RL = {
    **{"method": "rl", "population_size": 1, "cycles": 1, "steps_per_cycle": 8, "problems_per_step": 6},
    **{"group_size": 8, "learning_rate": 1e-3, "warmup_steps": 0},
}


def steps_of(run_dir):
    return [event["report"] for event in read_events(run_dir) if event["event"] == "step"]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_short_run_raises_the_reward_under_each_loss(name, tmp_path):
    """The relay calls two predictors one to four times a rollout, and short answers are rewarded."""
    compile_relay(tmp_path / "run", loss=name, **RL)
    steps = steps_of(tmp_path / "run")
    rewards = [step["reward"] for step in steps]
    assert sum(rewards[-2:]) / 2 > sum(rewards[:2]) / 2 + 0.05
    assert json.loads((tmp_path / "run" / "recipe.json").read_text())["loss"] == name
    clipped = {step["update"]["capped_share"] for step in steps}
    assert clipped == {None} if name in ("rloo", "rft") else None not in clipped
    assert all(("rejected_calls" in step["counts"]) == (name == "rft") for step in steps)
    told = [
        line for line in option_lines(record_of(read_events(tmp_path / "run")).steps) if line.startswith("loss='rft'")
    ]
    assert len(told) == (name == "rft")


@pytest.mark.slow
def test_a_run_goes_on_with_its_own_loss_alone(tmp_path):
    small = {**RL, "steps_per_cycle": 1, "problems_per_step": 2, "group_size": 4}
    compile_relay(tmp_path / "run", loss="gspo", clip=(0.1, 0.2), updates_per_batch=2, **small)
    with pytest.raises(ConfigurationError, match=r"another configuration: loss \(there .gspo., now .grpo.\)"):
        compile_relay(tmp_path / "run", loss="grpo", clip=(0.1, 0.2), updates_per_batch=2, **small)
    with pytest.raises(ConfigurationError, match="another configuration: clip"):
        compile_relay(tmp_path / "run", loss="gspo", updates_per_batch=2, **small)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"loss": "grpo", "importance_cap": 5.0}, "importance_cap=5 does nothing under loss='grpo'"),
        ({"loss": "rft", "importance_cap": 5.0}, "Use loss='cispo', or leave it out"),
        ({"loss": "dr_grpo", "advantage_normalization": "batch"}, "does nothing under loss='dr_grpo', which divides"),
        ({"loss": "rloo", "updates_per_batch": 4}, "with updates_per_batch=4 only the first"),
        ({"loss": "dapo", "method": "gepa"}, "loss='dapo' does nothing under method='gepa'"),
    ],
    ids=["cap", "cap of rft", "std", "stale rloo", "no updates"],
)
def test_what_does_nothing_under_a_loss_is_told_before_work(settings, words):
    (warning,) = settings_without_effect(FSTConfig(**settings))
    assert words in warning
    assert settings_without_effect(FSTConfig(loss=settings["loss"])) == []


def test_a_distillation_has_no_loss_of_rewards():
    distill = {"method": "distill", "seed_kl_coefficient": 1.0, "seed_kl_teacher": "population"}
    with pytest.raises(ConfigurationError, match="loss='grpo' would do nothing"):
        FSTConfig.checked({**distill, "loss": "grpo"})


def test_dr_grpo_divides_by_the_largest_max_tokens_of_the_trained_predictors():
    program = relay()
    program.first.config["max_tokens"] = 40
    assert [longest_reply(program, trained) for trained in (None, ("first",), ("last",))] == [40, 40, 12]
    assert limit_faults(program, FSTConfig(loss="dr_grpo")) == []
    program.first.config["max_tokens"] = None
    (fault,) = limit_faults(program, FSTConfig(loss="dr_grpo"))
    assert "loss='dr_grpo': replies are measured against max_tokens, and those of first have none" in fault
    assert limit_faults(program, FSTConfig(loss="grpo")) == []


def test_an_unknown_loss_is_refused_with_those_there_are():
    with pytest.raises(ConfigurationError, match=r"loss='ppo'.*'cispo'.*'gspo'"):
        FSTConfig.checked({"loss": "ppo"})
