"""`dspy.LM.finetune` of a PolicyLM: a supervised job in a thread of its own, by trl's SFTTrainer.

It trains from the LM's weights as they are, and writes others. DSPy makes the LM of the result; it serves the weights
when it is first called, and they are verified then.
"""

import gc
import shutil
import threading
from collections import Counter
from concurrent.futures import Future
from dataclasses import asdict
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any

from dspy.clients.provider import TrainingJob
from dspy.clients.utils_finetune import TrainDataFormat, TrainingStatus

from dspy_fst.engine.base import Checkpoint
from dspy_fst.engine.verification import Expected, verify
from dspy_fst.errors import ConfigurationError, TrainingError, briefly
from dspy_fst.formatting.numbers import counted
from dspy_fst.policy_lm import PolicyLM
from dspy_fst.preflight.library_checks import trl_fault
from dspy_fst.provider.chat_data import REMEDIES, chat_faults, format_fault, pairs_of
from dspy_fst.provider.job_folder import JobFolder
from dspy_fst.provider.job_settings import FineTuneSettings
from dspy_fst.rollout.written_replies import ReplyWriter
from dspy_fst.slow.supervised import CANCELLED, Pair, Supervision, fine_tune
from dspy_fst.slow.trainer import Trainer
from dspy_fst.training.publisher import TEXT_TOKENS, TEXTS

ONE_AT_A_TIME = threading.Lock()
"""Jobs of one process follow each other: they share its memory, and trl seeds its random generators."""


class FineTuningJob(TrainingJob):
    """A supervised job. Its result is the PolicyLM of the new weights, or the exception that ended it.

    Raises:
        ConfigurationError: data, format or settings are refused, all faults together.
    """

    def __init__(
        self,
        thread: Thread | None = None,
        model: str | None = None,
        train_data: list[dict[str, Any]] | None = None,
        train_data_format: TrainDataFormat | None = None,
        train_kwargs: dict[str, Any] | None = None,
    ):
        super().__init__(thread, model, train_data, train_data_format, train_kwargs)
        faults = [fault for fault in (format_fault(train_data_format, TrainDataFormat.CHAT), trl_fault()) if fault]
        faults += chat_faults(train_data) + several_adapters_fault(model)
        settings = FineTuneSettings.of(train_kwargs, faults)
        if settings is None or faults:
            raise ConfigurationError(faults)
        self.settings = settings
        self.doing = "waiting for another job"
        """What goes on, in words."""
        self.expected: Expected | None = None
        """The weights that were published, once they are."""
        self._stop, self._status = threading.Event(), TrainingStatus.pending
        if thread is not None:
            thread.daemon = True  # Ctrl-C ends the process, and not after the training only

    def cancel(self) -> bool:
        """Stop before any work, after the optimizer step in progress, or once the weights are written and read.

        The result is then the error that says so, and no weights are left.
        """
        self._stop.set()
        return not self.done()

    @property
    def cancelling(self) -> bool:
        return self._stop.is_set()

    def status(self) -> TrainingStatus:
        return self._status

    def begin(self) -> None:
        self.require_wanted()
        self._status = TrainingStatus.running

    def require_wanted(self) -> None:
        """
        Raises:
            TrainingError: the job was cancelled.
        """
        if self.cancelling:
            raise TrainingError(CANCELLED)

    def set_result(self, result: Any) -> None:
        """DSPy gives the LM of the new weights, or an exception."""
        if isinstance(result, PolicyLM) and self.expected is not None:
            result.handle.prove_by(self.expected.checkpoint, partial(verify, expected=self.expected))
        failed = TrainingStatus.cancelled if self.cancelling else TrainingStatus.failed
        self._status = failed if isinstance(result, Exception) else TrainingStatus.succeeded
        Future.set_result(self, result)


def several_adapters_fault(model: str | None) -> list[str]:
    """Why weights of several LoRA adapters are refused."""
    if model is None or len(Checkpoint.at("start", Path(model)).adapters) < 2:
        return []
    return [
        f"{model} holds a LoRA adapter for each of several predictors, and DSPy's data does not say whose a reply is; "
        "train with FSTOptimizer, or export one of them (dspy-fst export --predictor NAME)"
    ]


def finetuned(job: FineTuningJob, model: str) -> str:
    """The folder of the new weights.

    Raises:
        TrainingError: the job ended before; the message says at what. No weights of it are left.
    """
    try:
        with ONE_AT_A_TIME:
            job.begin()
            return _finetuned(job, model)
    except BaseException as error:  # DSPy would wait for ever for a thread that ends with anything but an Exception
        said = str(error) if isinstance(error, TrainingError) else f"{type(error).__name__}: {briefly(error)}"
        raise TrainingError(f"the supervised job on {model} ended while {job.doing}: {said}") from error


def _finetuned(job: FineTuningJob, model: str) -> str:
    settings, folder = job.settings, JobFolder(job.settings.folder, "sft")
    job.doing = "loading the weights"
    trainer = Trainer(model, settings, seed=settings.seed)
    writer = ReplyWriter(trainer.tokenizer, Checkpoint.at("start", Path(model)).path)
    pairs, left_out = pairs_of(job.train_data or [], writer, trainer.policy.context)
    if not pairs:
        raise TrainingError(f"none of {left_out.total()} rows can be learnt ({_remedies(left_out)})")
    job.doing = f"learning {counted(len(pairs), 'reply')}"
    how = Supervision(settings.epochs, settings.rate, settings.seed)
    learnt = fine_tune(trainer, pairs, how, stopped=lambda: job.cancelling)
    job.require_wanted()
    job.doing, weights = f"writing {folder.path}", folder.path / "weights"
    try:
        checkpoint = trainer.publish(weights, folder.name)
        del trainer
        gc.collect()
        job.doing = "reading the new weights"
        job.expected = _expected(checkpoint, settings, pairs)
        job.require_wanted()
    except BaseException:
        shutil.rmtree(weights, ignore_errors=True)
        raise
    folder.tell({"from": model, "left_out": left_out, **asdict(learnt)})
    return str(checkpoint.folder)


def _remedies(left_out: Counter[str]) -> str:
    return "; ".join(f"{count} {reason}: {REMEDIES[reason]}" for reason, count in left_out.items())


def _expected(checkpoint: Checkpoint, settings: FineTuneSettings, pairs: list[Pair]) -> Expected:
    """What an engine must make of these weights: read again, as trl has wrapped the forward of the trainer's model."""
    trainer = Trainer(checkpoint.folder, settings)
    texts = [pair.ids[:TEXT_TOKENS] for pair in pairs[:TEXTS]]
    return Expected(checkpoint, texts, trainer.score(texts), trainer.dtype)
