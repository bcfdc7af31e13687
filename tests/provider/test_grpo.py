"""DSPy's GRPO on a PolicyLM: it trains on what was sampled, and what it hands over otherwise is left out or refused."""

import gc
import logging
import weakref

import dspy
import pytest
from dspy import lm15
from dspy.clients.utils_finetune import TrainDataFormat, TrainingStatus
from dspy.teleprompt.grpo import GRPO

from dspy_fst import ConfigurationError
from dspy_fst.engine.base import Completion
from dspy_fst.errors import TrainingError
from dspy_fst.provider.reinforcement import ReinforcementJob
from dspy_fst.provider.sampled_calls import NO_PROMPT, NO_REPLY, TAKEN, SampledCalls
from dspy_fst.run.files import read_json
from dspy_fst.slow.trainer import Trainer
from programs.lab import BASE
from tests.provider.lessons import is_right, lab_with, policy

GRPO_CHAT = TrainDataFormat.GRPO_CHAT
SAMPLING = {"num_dspy_examples_per_grpo_step": 4, "num_rollouts_per_grpo_step": 4, "num_threads": 16}


def optimizer(folder, steps, **changes):
    how = {"folder": folder, "learning_rate": 1e-3, "warmup_steps": 0}
    given = {
        "adapter": dspy.ChatAdapter(),
        "exclude_demos": True,
        "train_kwargs": how,
        "metric": is_right,
        **SAMPLING,
        **changes,
    }
    return GRPO(num_train_steps=steps, **{**given, **SAMPLING, **changes})


def is_near(gold, pred, trace=None):
    """Share of the places that are right: groups differ in it from the first step on."""
    said = str(pred.answer).split()
    return sum(a == b for a, b in zip(said, gold.answer.split(), strict=False)) / 6


class Watched:
    """Everything that an LM sampled, and every row that a trainer learnt from."""

    def __init__(self, monkeypatch):
        self.sampled, self.rows, self.per_step, self.trainer = [], [], [], None
        hear, step = SampledCalls.hear, Trainer.step

        def heard(calls, request, completion):
            self.sampled.append((completion.prompt_ids, completion.completion_ids, completion.logprobs))
            hear(calls, request, completion)

        def stepped(trainer, batch, **options):
            self.trainer = weakref.ref(trainer)
            self.rows += [(row.prompt_ids, row.completion_ids, row.logprobs) for row in batch.rows]
            self.per_step.append(batch.counts)
            return step(trainer, batch, **options)

        monkeypatch.setattr(SampledCalls, "hear", heard)
        monkeypatch.setattr(Trainer, "step", stepped)


def test_every_row_is_a_reply_as_it_was_sampled_and_the_lm_learns(tmp_path, monkeypatch):
    lm, watched = policy(), Watched(monkeypatch)
    lab = lab_with(lm)
    earlier = lab.program.deepcopy()  # as BetterTogether keeps its candidates
    compiled = optimizer(tmp_path, steps=6, metric=is_near).compile(lab.program, trainset=lab.trainset)
    gc.collect()
    assert watched.rows
    assert {*watched.rows} <= {*watched.sampled}
    assert [counts["groups"] for counts in watched.per_step] == [4] * 6  # each once, and none of the step before
    assert {counts["rollouts"] for counts in watched.per_step} == {16}
    told = read_json(tmp_path / "grpo-000001" / "job.json")
    assert (told["status"], told["rows"], told["found"], told["steps"]) == ("succeeded", 96, 96, 6)
    assert watched.trainer() is None  # its memory is free
    assert compiled.solve.lm is lm
    assert lm.checkpoint.version == f"grpo-000001-step-{told['updates']:06d}"
    assert lm.model == str(lm.checkpoint.folder)
    assert sorted(path.name for path in (tmp_path / "grpo-000001" / "steps").iterdir())[0] == "step-000000"
    assert len([*(tmp_path / "grpo-000001" / "steps").iterdir()]) == 3  # the first, and the two newest
    assert earlier.solve.lm.checkpoint.folder == BASE
    assert earlier.solve.lm.handle.ready().weights == "base"
    lm.kill()
    assert lm.handle.ready().weights == lm.checkpoint.version  # verified: it was scored before the trainer went
    for each in (lm, earlier.solve.lm):
        each.release()


def test_without_its_adapter_grpo_formats_prompts_that_were_never_sampled_and_nothing_is_trained(tmp_path):
    lm = policy()
    lab = lab_with(lm)
    with pytest.raises(TrainingError) as refused:
        optimizer(tmp_path, steps=2, adapter=None).compile(lab.program, trainset=lab.trainset)
    assert "none of 16 replies that GRPO hands over was sampled by this LM" in str(refused.value)
    assert f"({NO_PROMPT}: 16)" in str(refused.value)
    assert "GRPO(adapter=dspy.ChatAdapter(), ...)" in str(refused.value)
    told = read_json(tmp_path / "grpo-000001" / "job.json")
    assert (told["status"], told.get("steps", 0)) == ("failed", 0)
    assert lm.handle.heard is None
    lm.release()


def test_replies_are_trained_after_the_demonstrations_that_they_were_sampled_with(tmp_path, monkeypatch, caplog):
    lm, watched = policy(), Watched(monkeypatch)
    lab = lab_with(lm)
    lab.program.solve.demos = [dspy.Example(numbers="1 2 3 4", answer="4 3 2 1").with_inputs("numbers")]
    with caplog.at_level(logging.WARNING, "dspy_fst"):
        optimizer(tmp_path, steps=2).compile(lab.program, trainset=lab.trainset)
    told = read_json(tmp_path / "grpo-000001" / "job.json")
    assert told["rows with demonstrations"] == told["found"] == told["rows"] == 32
    assert "without the program's demonstrations" in caplog.text
    assert caplog.text.count("without the program's demonstrations") == 1
    assert {*watched.rows} <= {*watched.sampled}
    lm.release()


def test_one_grpo_trains_twice(tmp_path):
    """It remembers the batch ids of its first job, and would wait for ever for a second that offers the same."""
    lm = policy()
    lab = lab_with(lm)
    grpo = optimizer(tmp_path, steps=1)
    for number in (1, 2):
        grpo.compile(lab.program, trainset=lab.trainset)
        assert read_json(tmp_path / f"grpo-{number:06d}" / "job.json")["rows"] == 16
    lm.release()


# ---- a job by itself -----------------------------------------------------------------------------


@pytest.fixture
def job(tmp_path):
    lm = policy()
    job = lm.reinforce({"folder": tmp_path, "adapter": "lora", "learning_rate": 1e-2, "warmup_steps": 0})
    yield job
    job.terminate()
    lm.release()


def group_of(job, numbers, rewards):
    """Rows as GRPO makes them, of replies that the program samples now."""
    program = lab_with(job.lm).program
    rows = []
    for reward in rewards:
        said = program(numbers=numbers)
        told = dspy.ChatAdapter().format_finetune_data(program.solve.signature, [], {"numbers": numbers}, said)
        *messages, completion = told["messages"]
        rows.append({"messages": messages, "completion": completion, "reward": reward})
    return rows


def handed(job, *groups):
    return [
        {"batch_id": number, "group": group}
        for number, group in zip(job.get_status()["pending_batch_ids"], groups, strict=False)
    ]


def test_a_job_moves_its_lm_keeps_checkpoints_and_ends_twice(job, tmp_path):
    lm = job.lm
    first = lm.checkpoint
    assert job.get_status()["status"] == TrainingStatus.running
    job.save_checkpoint("start")
    report = job.step(handed(job, group_of(job, "4 7 1 9", (1.0, 0.0, 0.5, 0.0))), GRPO_CHAT)
    assert report.rows == 4
    assert lm.checkpoint.version == "grpo-000001-step-000001"
    assert job.checkpoints == {"start": str(first.folder)}
    assert [adapter.name for adapter in lm.checkpoint.adapters] == ["shared"]
    status = job.get_status()
    assert (status["current_model"], status["last_checkpoint"]) == (lm.model, "start")
    job.initialize()
    assert lm.checkpoint.version == "grpo-000001-step-000001"
    job.terminate()
    job.terminate()
    assert job.status() == TrainingStatus.succeeded
    with pytest.raises(TrainingError, match="the job is succeeded; call initialize"):
        job.step([], GRPO_CHAT)


def test_a_group_that_is_handed_over_again_and_rows_that_pad_one_are_taken_once(job):
    group = group_of(job, "4 7 1 9", (1.0, 0.0))
    report = job.step(handed(job, [*group, *group], group), GRPO_CHAT)
    assert report.rows == 2
    assert (job.counts["rows"], job.counts["found"]) == (4, 2)
    assert job.counts[f"left out: {TAKEN}"] == 2
    padded = group_of(job, "3 1 2 2", (1.0, 0.0))
    padded += padded[:1]
    assert job.step(handed(job, padded, padded), GRPO_CHAT).rows == 2
    assert job.step(handed(job, padded), GRPO_CHAT) is None  # left over in DSPy's queue


def test_what_other_weights_sampled_is_left_out(job):
    old = group_of(job, "4 7 1 9", (1.0, 0.0))
    job.step(handed(job, group_of(job, "5 5 2 1", (1.0, 0.0))), GRPO_CHAT)
    new = group_of(job, "3 1 2 2", (1.0, 0.0))
    job.step(handed(job, old, new), GRPO_CHAT)
    assert job.counts[f"left out: {NO_PROMPT}"] == 2
    elsewhere = [{**new[0], "completion": {"role": "assistant", "content": "never said"}}]
    group_of(job, "3 1 2 2", (1.0,))
    with pytest.raises(TrainingError, match="none of 1 replies"):
        job.step(handed(job, elsewhere), GRPO_CHAT)
    assert job.counts[f"left out: {NO_REPLY}"] == 1
    assert job.status() == TrainingStatus.failed
    assert job.lm.handle.heard is None


@pytest.mark.parametrize(
    ("lm", "train_kwargs", "words"),
    [
        ({"temperature": 0.0}, {}, "temperature=0: all replies of a group would be alike"),
        ({"max_tokens": None}, {"loss": "dr_grpo"}, "loss='dr_grpo' divides by max_tokens"),
        ({}, {"beta": 0.1}, "beta: there is no such setting; use kl_coefficient"),
        ({}, {"baseline": "candidate", "bogus": 1}, "bogus: there is no such setting"),
        ({}, {"baseline": "candidate", "loss": "ppo"}, "loss='ppo'"),
        ({}, {"baseline": "candidate", "bogus": 1}, "baseline: there is no use for it in this job"),
        ({}, {"adapters": "per_predictor"}, "adapters: there is no use for it in this job; it is for FSTOptimizer"),
    ],
)
def test_what_cannot_be_reinforced_is_refused_before_anything_is_loaded(lm, train_kwargs, words):
    with pytest.raises(ConfigurationError) as refused:
        policy(**lm).reinforce(train_kwargs)
    assert words in str(refused.value)


def test_what_does_nothing_under_the_job_s_loss_is_told(caplog):
    policy().reinforce({"loss": "rft", "importance_cap": 3.0, "advantage_normalization": "batch"})
    for name in ("importance_cap=3", "advantage_normalization='batch'"):
        assert f"train_kwargs: {name} does nothing under loss='rft'" in caplog.text


def test_data_of_another_format_is_refused(job):
    with pytest.raises(ConfigurationError, match="takes 'grpo_chat'"):
        job.step([], TrainDataFormat.CHAT)
    assert isinstance(job, ReinforcementJob)


# ---- finding what was sampled --------------------------------------------------------------------


def completion(text, ids):
    message = lm15.Response(
        id=None, model="m", message=lm15.Message.assistant(text), finish_reason="stop", usage=lm15.Usage()
    )
    return Completion(message, (1,), ids, (-1.0,) * len(ids), "stop", "v0")


def row(text, *turns):
    messages = [{"role": role, "content": content} for role, content in turns]
    return {"messages": messages, "completion": {"role": "assistant", "content": text}}


def test_replies_of_the_same_text_are_handed_out_once_each():
    calls, asked = SampledCalls(), lm15.Request(model="m", system="Sort.", messages=(lm15.Message.user("2 1"),))
    for ids in ((5,), (6,)):
        calls.hear(asked, completion("1 2", ids))
    told = row("1 2\n", ("system", "Sort."), ("user", "2 1"))
    assert [calls.take(told).completion_ids for _ in range(2)] == [(5,), (6,)]
    assert calls.take(told) == TAKEN
    assert calls.take(row("2 1", ("system", "Sort."), ("user", "2 1"))) == NO_REPLY
    assert calls.take(row("1 2", ("user", "2 1"))) == NO_PROMPT
    calls.forget()
    assert calls.take(told) == NO_PROMPT
    assert calls.count == 0
