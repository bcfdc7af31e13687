"""`lm.finetune` of a PolicyLM: what it learns, what it serves, what it refuses, and how a job ends that fails."""

import queue
import shutil
import threading
import time

import pytest
from dspy.clients.utils_finetune import TrainDataFormat, TrainingStatus
from safetensors.torch import load_file

from dspy_fst import ConfigurationError, LoRA, PolicyLM
from dspy_fst.errors import DiskError, TrainingError
from dspy_fst.provider import fine_tuning
from dspy_fst.run.files import read_json
from programs.lab import BASE
from tests.provider.lessons import accuracy, lab_with, labels, policy

CHAT = TrainDataFormat.CHAT
FAST = {"learning_rate": 2e-3, "epochs": 2}
LIMIT_S = 300
READ = [list(range(8, 40))]
"""Tokens whose log-probabilities tell weights apart."""


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """The lab, its LM as it was, and the job that learnt the trainset's labels."""
    lm, folder = policy(), tmp_path_factory.mktemp("jobs")
    lab, scored = lab_with(lm), lm.handle.ready().score(READ)
    job = lm.finetune(labels(lab), CHAT, {"folder": folder, **FAST})
    learnt = job.result(LIMIT_S)
    assert isinstance(learnt, PolicyLM), learnt
    assert lm.handle.ready().score(READ) == scored, "the LM that was trained serves other weights than before"
    assert learnt.handle.ready().score(READ) != scored
    yield lab, lm, job, learnt
    for each in (lm, learnt):
        each.release()


def test_labels_are_learnt_and_the_lm_that_was_trained_stays_as_it_was(taught):
    lab, lm, job, learnt = taught
    trained = lab.program.deepcopy()
    trained.set_lm(learnt)
    before = accuracy(lab.program, lab)
    assert accuracy(trained, lab) >= before + 0.25
    assert (lm.checkpoint.folder, lm.model) == (BASE, str(BASE))
    assert lm.handle is not learnt.handle
    assert job.status() == TrainingStatus.succeeded


def test_a_job_writes_one_folder_and_says_what_it_cost(taught):
    _, _, _, learnt = taught
    folder = learnt.checkpoint.folder.parent
    assert learnt.model == str(folder / "weights")
    assert sorted(path.name for path in folder.iterdir()) == ["job.json", "weights"]
    told = read_json(folder / "job.json")
    assert (told["pairs"], told["updates"], told["left_out"], told["from"]) == (24, 6, {}, str(BASE))
    assert told["tokens"] > 2 * 24 * 4
    assert told["last_loss"] < told["first_loss"]


def test_the_new_weights_are_compared_with_the_trainer_s_whenever_they_are_loaded(taught):
    _, _, _, learnt = taught
    weights = learnt.checkpoint.path / "model.safetensors"
    right = weights.read_bytes()
    learnt.release()
    shutil.copy(BASE / "model.safetensors", weights)
    try:
        with pytest.raises(DiskError, match="does not hold what the trainer wrote"):
            learnt.handle.ready()
    finally:
        weights.write_bytes(right)
    assert learnt.handle.ready().weights == "sft-000001"


def test_a_lora_adapter_is_trained_on_weights_that_stay(tmp_path):
    lm = policy()
    lab = lab_with(lm, train=8)
    job = lm.finetune(labels(lab), CHAT, {"folder": tmp_path, "adapter": LoRA(rank=4), "epochs": 1})
    learnt = job.result(LIMIT_S)
    assert [adapter.name for adapter in learnt.checkpoint.adapters] == ["shared"]
    base = load_file(learnt.checkpoint.path / "model.safetensors")
    for name, tensor in load_file(BASE / "model.safetensors").items():
        assert base[name].equal(tensor)
    assert learnt.handle.ready().weights == "sft-000001"
    learnt.release()


def test_the_next_job_goes_on_from_the_newest_weights_and_has_a_folder_of_its_own(taught):
    lab, _, job, learnt = taught
    again = learnt.finetune(labels(lab)[:8], CHAT, {**job.train_kwargs, "epochs": 1}).result(LIMIT_S)
    assert again.checkpoint.version == "sft-000002"
    assert read_json(again.checkpoint.folder.parent / "job.json")["from"] == learnt.model


ROW = {"messages": [{"role": "user", "content": "2 1"}, {"role": "assistant", "content": "1 2"}]}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"train_data": []}, ["there is nothing to learn from", "warm_start='labels'"]),
        ({"train_data_format": TrainDataFormat.COMPLETION}, ["chat messages only", "dspy.ChatAdapter"]),
        ({"train_data_format": TrainDataFormat.GRPO_CHAT}, ["lm.reinforce()"]),
        ({"train_data": [ROW, {"prompt": "x"}]}, ["train_data[1]: 'messages' with a prompt and a reply"]),
        ({"train_data": [{"messages": ROW["messages"][:1] * 2}]}, ["['messages'][1]: the last message must be"]),
        (
            {"train_data": [{"messages": [{"role": "user", "content": [{"type": "image_url"}]}, ROW["messages"][1]]}]},
            ["['messages'][0]: its content is no text", "FSTOptimizer"],
        ),
        ({"train_kwargs": {"num_train_epochs": 3}}, ["num_train_epochs: there is no such setting; use epochs"]),
        ({"train_kwargs": {"learning_rates": 3}}, ["did you mean 'learning_rate'?"]),
        ({"train_kwargs": {"loss": "grpo"}}, ["loss: there is no use for it in this job"]),
        ({"train_kwargs": {"epochs": 0}}, ["epochs=0"]),
    ],
)
def test_what_cannot_be_learnt_is_refused_before_a_thread_starts(tmp_path, given, words):
    threads = threading.active_count()
    whole = {"train_data": [ROW], "train_data_format": CHAT, "train_kwargs": {}, **given}
    whole["train_kwargs"] = {"folder": tmp_path / "jobs", **whole["train_kwargs"]}
    with pytest.raises(ConfigurationError) as refused:
        policy().finetune(**whole)
    for part in words:
        assert part in str(refused.value)
    assert not (tmp_path / "jobs").exists()
    assert threading.active_count() == threads


def test_all_faults_are_told_at_once():
    with pytest.raises(ConfigurationError) as refused:
        policy().finetune([], TrainDataFormat.COMPLETION, {"use_peft": True, "bf16": True})
    assert len(refused.value.faults) == 4


class Dies(BaseException):
    """What a thread may end with, and DSPy does not catch."""


@pytest.mark.parametrize("error", [Dies("the device is gone"), MemoryError("no memory")])
def test_a_job_that_dies_says_at_what_and_leaves_no_weights(tmp_path, monkeypatch, error):
    def dies(*args, **kwargs):
        raise error

    monkeypatch.setattr(fine_tuning, "fine_tune", dies)
    lm = policy()
    job = lm.finetune([ROW], CHAT, {"folder": tmp_path})
    ended = job.result(LIMIT_S)
    assert isinstance(ended, TrainingError)
    assert "ended while learning 1 reply: " in str(ended)
    assert str(error) in str(ended)
    assert job.status() == TrainingStatus.failed
    assert [path.name for path in tmp_path.iterdir()] == ["sft-000001"]
    assert [*(tmp_path / "sft-000001").iterdir()] == []
    assert lm.checkpoint.folder == BASE


def test_a_job_is_cancelled_after_the_update_in_progress(tmp_path):
    job = policy().finetune([ROW], CHAT, {"folder": tmp_path, "epochs": 100_000})
    until = time.monotonic() + LIMIT_S
    while not job.doing.startswith("learning") and time.monotonic() < until:
        time.sleep(0.01)
    assert job.cancel()
    ended = job.result(LIMIT_S)
    assert "supervised training was cancelled" in str(ended)
    assert job.status() == TrainingStatus.cancelled
    assert not (tmp_path / "sft-000001" / "weights").exists()
    job.thread.join(LIMIT_S)
    assert not job.thread.is_alive()


def test_a_job_that_is_cancelled_while_it_waits_for_another_loads_no_weights(tmp_path, monkeypatch):
    def loaded(*args, **kwargs):
        raise AssertionError("the weights were loaded")

    monkeypatch.setattr(fine_tuning, "Trainer", loaded)
    with fine_tuning.ONE_AT_A_TIME:
        job = policy().finetune([ROW], CHAT, {"folder": tmp_path})
        assert job.cancel()
    ended = job.result(LIMIT_S)
    assert isinstance(ended, TrainingError)
    assert "ended while waiting for another job: supervised training was cancelled" in str(ended)
    assert job.status() == TrainingStatus.cancelled
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize(
    ("last", "doing"), [("fine_tune", "learning 1 reply"), ("_expected", "reading the new weights")]
)
def test_a_job_that_is_cancelled_after_its_last_update_leaves_no_weights(tmp_path, monkeypatch, last, doing):
    real, jobs = getattr(fine_tuning, last), queue.Queue()

    def then_cancelled(*args, **kwargs):
        done = real(*args, **kwargs)
        jobs.get(timeout=LIMIT_S).cancel()
        return done

    monkeypatch.setattr(fine_tuning, last, then_cancelled)
    job = policy().finetune([ROW], CHAT, {"folder": tmp_path, "epochs": 1})
    jobs.put(job)
    ended = job.result(LIMIT_S)
    assert isinstance(ended, TrainingError)
    assert f"ended while {doing}: supervised training was cancelled" in str(ended)
    assert job.status() == TrainingStatus.cancelled
    assert [*(tmp_path / "sft-000001").iterdir()] == []


def test_an_engine_is_launched_and_killed_as_often_as_one_likes():
    lm = policy()
    lm.kill()
    for _ in range(2):
        lm.launch()
        assert lm.handle.engine.weights == "base"
    lm.kill()
    lm.kill()
    assert lm.copy(temperature=0.5).handle is lm.handle
    other = lm.copy(model="elsewhere")
    assert (other.model, str(other.checkpoint.folder)) == ("elsewhere", "elsewhere")
    assert lm.checkpoint.folder == BASE


def test_rows_that_are_all_left_out_are_told_with_what_to_do(tmp_path):
    long = {"messages": [{"role": "user", "content": "2 1 " * 2000}, ROW["messages"][1]]}
    told = str(policy().finetune([long], CHAT, {"folder": tmp_path}).result(LIMIT_S))
    assert "none of 1 rows can be learnt (1 longer than the context: shorten prompts and replies" in told
