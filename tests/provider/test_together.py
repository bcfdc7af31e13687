"""BetterTogether with DSPy's optimizer of weights and ours as its steps; and DSPy's optimizers on a real server."""

import zlib

import dspy
import pytest
from dspy.teleprompt.grpo import GRPO

from dspy_fst import FSTOptimizer
from dspy_fst.engine.base import Checkpoint
from dspy_fst.engine.verification import verify_tensors
from dspy_fst.policy_lm import policy_of
from dspy_fst.run.files import read_json
from programs.lab import BASE
from tests.provider.lessons import lab_with, policy
from tests.test_compile import SHORT, propose

FST = {**SHORT, "cycles": 1, "steps_per_cycle": 1, "problems_per_step": 4, "warmup_steps": 0, "parse_trial": 0}


def any_reply(gold, pred, trace=None):
    """Whatever parses is learnt from."""
    return 1.0


def by_text(gold, pred, trace=None):
    """Different replies have different scores: a length was once the same for all of a step, and nothing moved."""
    return zlib.crc32(str(pred.answer).encode()) / 2**32


def fine_tuner(folder):
    how = {"folder": folder, "learning_rate": 1e-3, "epochs": 1}
    return dspy.BootstrapFinetune(metric=any_reply, num_threads=16, train_kwargs=how)


@pytest.mark.parametrize("engine", ["in_process", pytest.param("vllm", marks=pytest.mark.vllm)])
def test_fst_goes_on_from_what_bootstrap_finetune_has_learnt_and_every_candidate_keeps_its_weights(
    engine, request, tmp_path
):
    options = request.getfixturevalue("lab_on_vllm").vllm if engine == "vllm" else {"linger_s": 60.0}
    lm = policy(engine=engine, engine_options=options)
    lab = lab_with(lm, train=16, val=4)
    fst = FSTOptimizer(metric=lab.metric, propose=propose, run_dir=tmp_path / "fst", **FST)
    together = dspy.BetterTogether(metric=any_reply, w=fine_tuner(tmp_path / "jobs"), fst=fst)
    compiled = together.compile(
        lab.program, trainset=lab.trainset, valset=lab.valset, strategy="w -> fst", num_threads=8
    )
    assert not compiled.flag_compilation_error_occurred
    tried = {entry["strategy"]: policy_of(entry["program"]) for entry in compiled.candidate_programs}
    assert {strategy: each.checkpoint.version for strategy, each in tried.items()} == {
        "": "base",
        "w": "sft-000001",
        "w -> fst": tried["w -> fst"].checkpoint.version,
    }
    start = tmp_path / "fst" / "weights" / "step-000000"
    for strategy, folder in (("", BASE), ("w", tmp_path / "jobs" / "sft-000001" / "weights")):
        assert tried[strategy].checkpoint.folder == folder
        checkpoint = tried[strategy].checkpoint
        verify_tensors(tried[strategy].handle.ready(), Checkpoint(checkpoint.version, checkpoint.path))
    learnt = tried["w"].handle.engine
    assert verify_tensors(learnt, Checkpoint("start", start)).wrong == {}  # FST began with them
    assert tried["w -> fst"].checkpoint.folder.parent == start.parent
    for each in tried.values():
        each.release()
    assert lm.handle.ready().weights == "base"  # as others expect of the server
    lm.release()


@pytest.mark.vllm
def test_both_train_on_a_server_and_it_serves_what_they_learnt(lab_on_vllm, tmp_path):
    lm = policy(engine="vllm", engine_options=lab_on_vllm.vllm)
    lab = lab_with(lm, train=16)
    try:
        tuned = fine_tuner(tmp_path).compile(lab.program, trainset=lab.trainset)
        learnt = policy_of(tuned)
        assert learnt.handle.ready().weights == "sft-000001"  # compared with the trainer's, tensors and scores
        how = {"folder": tmp_path, "learning_rate": 1e-3, "warmup_steps": 0}
        grpo = GRPO(
            metric=by_text,
            adapter=dspy.ChatAdapter(),
            exclude_demos=True,
            num_train_steps=2,
            num_dspy_examples_per_grpo_step=4,
            num_rollouts_per_grpo_step=4,
            num_threads=16,
            train_kwargs=how,
        )
        trained = policy_of(grpo.compile(tuned, trainset=lab.trainset))
        told = read_json(tmp_path / "grpo-000001" / "job.json")
        assert (told["rows"], told["found"], told["updates"]) == (32, 32, 2)
        assert trained.checkpoint.version == "grpo-000001-step-000002"
        assert trained.handle.engine.weights == trained.checkpoint.version
        verify_tensors(trained.handle.engine, trained.checkpoint)
        held = trained.handle.engine._check
        assert held is None  # it would hold the trainer
    finally:
        policy_of(lab.program).release()
        assert lm.handle.ready().weights == "base"  # as others expect of the server
        lm.release()
