"""`dspy.LM.reinforce` of a PolicyLM: the updates of `dspy.teleprompt.grpo.GRPO`, by the trainer of a run.

DSPy's GRPO calls `initialize`, then for each of its steps `get_status` (before and after it samples) and `step`, and at
the end `terminate` (dspy 3.4.1, dspy/teleprompt/grpo.py). It updates its LM in place, so the job moves the LM to an
engine of its own: copies that were made before, such as an earlier candidate of BetterTogether, keep the old weights.

Defects of that GRPO that are not inherited:

- It hands over text. A row is trained on the ids that were sampled, or left out (`sampled_calls`).
- It pads groups by repeating rows, and hands groups over again, also at the next step. Each is taken once.
- It asks how many groups are wanted. Fewer than it has leaves the rest for after the update; so many are asked for that
  every group comes.
"""

import itertools
import logging
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import dspy
from dspy.clients.provider import ReinforceJob
from dspy.clients.utils_finetune import GRPOStatus, TrainDataFormat, TrainingStatus

from dspy_fst.engine.base import Checkpoint
from dspy_fst.engine.verification import Expected, verify, verify_tensors
from dspy_fst.errors import ConfigurationError, TrainingError
from dspy_fst.policy_lm import EngineHandle, PolicyLM
from dspy_fst.provider.chat_data import format_fault
from dspy_fst.provider.fine_tuning import several_adapters_fault
from dspy_fst.provider.job_folder import JobFolder
from dspy_fst.provider.job_settings import ReinforceSettings
from dspy_fst.provider.sampled_calls import NO_PROMPT, SampledCalls
from dspy_fst.run.files import remove
from dspy_fst.slow.credit import credit, mini_batches
from dspy_fst.slow.length_penalty import penalty_of
from dspy_fst.slow.losses.by_name import loss_of
from dspy_fst.slow.trainer import Trainer
from dspy_fst.slow.update_metrics import in_one_report
from dspy_fst.training.publisher import NaturalTexts, Publishing
from dspy_fst.training.without_effect import update_settings_without_effect
from dspy_fst.types import Call, Candidate, Group, Rollout, UpdateReport, version_of

logger = logging.getLogger(__name__)
NOBODY = Candidate({})
"""DSPy's GRPO has one set of texts."""
FIRST_IDS = itertools.count(0, 2**40)
"""First batch id of each job of this process. A GRPO object remembers the ids of its earlier jobs, and waits for ever
for a job that only offers those."""


class ReinforcementJob(ReinforceJob):
    """A job of reinforcement.

    Args:
        lm: It is moved to an engine of the job's own, and speaks with the newest weights after each step.
        train_kwargs: See `job_settings.ReinforceSettings`.

    Raises:
        ConfigurationError: the LM or the settings are refused, all faults together.
    """

    def __init__(self, lm: PolicyLM, train_kwargs: dict[str, Any] | None = None):
        super().__init__(lm, train_kwargs)
        faults = several_adapters_fault(str(lm.checkpoint.folder))
        if lm.sampling_temperature == 0:
            faults.append("temperature=0: all replies of a group would be alike; use temperature=1.0 on the PolicyLM")
        settings = ReinforceSettings.of(train_kwargs, faults)
        if settings is not None and lm.reply_limit is None and settings.loss == "dr_grpo":
            faults.append("loss='dr_grpo' divides by max_tokens, and the PolicyLM has none; set it there")
        if settings is None or faults:
            raise ConfigurationError(faults)
        for sentence in update_settings_without_effect(settings):
            logger.warning("train_kwargs: %s", sentence)
        self.lm: PolicyLM = lm
        self.settings = settings
        self.checkpoints: dict[str, str] = {}
        self.counts: Counter[str] = Counter()
        """Of all steps: rows, and those left out by their reason; groups, updates and tokens learnt."""
        self._status = TrainingStatus.not_started
        self._loss = loss_of(settings, lm.reply_limit or 1)
        self._sampled = SampledCalls()
        self._running: _Running | None = None
        self._handled: list[object] = []
        """The groups of the last step; DSPy may hand one over again."""
        self._next_id = next(FIRST_IDS)
        self._steps = 0

    # ---- what DSPy calls -----------------------------------------------------------------------

    def initialize(self) -> None:
        """Load the trainer, and serve its weights on an engine that the LM is moved to. A second call does nothing."""
        if self._running is not None:
            return
        self._running = _Running(self.lm, self.settings)
        try:
            self._publish(())
        except BaseException:
            self._end(TrainingStatus.failed)
            raise
        self._running.handle.heard = self._sampled.hear
        self._status = TrainingStatus.running

    def get_status(self) -> GRPOStatus:
        """With ids for more groups than DSPy can have: each reply since the last step may be one, twice.

        DSPy fills its queue with whole copies of its groups. With twice their number every one is handed over, also
        where a part of an older copy stands before them.
        """
        wanted = max(1, 2 * self._sampled.count)
        return GRPOStatus(
            job_id=self._running.folder.name if self._running else "not started",
            status=self._status.value,
            current_model=self.lm.model,
            checkpoints=dict(self.checkpoints),
            last_checkpoint=self.last_checkpoint,
            pending_batch_ids=list(range(self._next_id, self._next_id + wanted)),
        )

    def status(self) -> TrainingStatus:
        return self._status

    def step(
        self, train_data: list[dict[str, Any]], train_data_format: TrainDataFormat | str | None = None
    ) -> UpdateReport | None:
        """One weight update from these groups, published and verified before it returns.

        Args:
            train_data: ``[{"batch_id": 7, "group": [{"messages": ..., "completion": ..., "reward": 1.0}, ...]}, ...]``

        Returns:
            What the update measured; None where all groups were handed over before.

        Raises:
            TrainingError: no row tells of a reply that was sampled, or the update failed. The job is over then, and the
                LM keeps the weights of the step before.
        """
        if fault := format_fault(train_data_format, TrainDataFormat.GRPO_CHAT):
            raise ConfigurationError([fault])
        if self._running is None:
            raise TrainingError(f"the job is {self._status.value}; call initialize() before step()")
        try:
            self._next_id = max([self._next_id - 1, *(int(item["batch_id"]) for item in train_data)]) + 1
            groups = self._groups(train_data)
            return self._update(groups) if groups else None
        except BaseException:
            self._end(TrainingStatus.failed)
            raise

    def save_checkpoint(self, checkpoint_name: str) -> None:
        """Keep the weights as they are now under a name: ``checkpoints[name]`` is their folder."""
        self.checkpoints[checkpoint_name] = str(self.lm.checkpoint.folder)
        self.last_checkpoint = checkpoint_name  # type: ignore[assignment]  # DSPy declares None

    def terminate(self) -> None:
        """Let go of the trainer; the LM goes on with the newest weights. A second call does nothing."""
        self._end(TrainingStatus.succeeded)

    def cancel(self) -> None:
        """The same, told as cancelled."""
        self._end(TrainingStatus.cancelled)

    # ---- one step ------------------------------------------------------------------------------

    def _groups(self, train_data: Sequence[Mapping[str, Any]]) -> list[Group]:
        """The groups that come for the first time, with the calls that their rows tell of."""
        fresh = {id(item["group"]): item["group"] for item in train_data}
        fresh = {key: group for key, group in fresh.items() if not any(group is known for known in self._handled)}
        self._handled = list(fresh.values())
        counts: Counter[str] = Counter()
        groups = [self._group(index, rows, counts) for index, rows in enumerate(fresh.values())]
        self.counts.update(counts, groups=len(groups))
        logger.info("GRPO: %s of %s rows found among the sampled replies", counts["found"], counts["rows"])
        if counts["rows"] and not counts["found"]:
            raise TrainingError(_nothing_found(counts))
        return groups

    def _group(self, index: int, rows: Sequence[Mapping[str, Any]], counts: Counter[str]) -> Group:
        """Rows that repeat another of their group, which pad it, are left out without a word."""
        rollouts = []
        for row in {id(row): row for row in rows}.values():
            found = self._sampled.take(row)
            counts["rows"] += 1
            counts["found" if isinstance(found, Call) else f"left out: {found}"] += 1
            if isinstance(found, Call):
                rollouts.append(Rollout(index, NOBODY, (found,), float(row["reward"])))
        return Group(index, tuple(rollouts))

    def _update(self, groups: Sequence[Group]) -> UpdateReport:
        running, settings = self._run(), self.settings
        batch = credit(
            groups, loss=self._loss, normalize=settings.advantage_normalization, penalty=penalty_of(settings)
        )
        draw = random.Random(f"{settings.seed} mini-batches {self._steps}")
        parts = mini_batches(batch, settings.updates_per_batch, draw, self._loss)
        with running.handle.asleep() if batch.rows else nullcontext():
            reports = [running.trainer.step(part, moved=place > 0) for place, part in enumerate(parts)]
        report = in_one_report(reports)
        self._steps += 1
        self.counts.update(steps=1, updates=running.trainer.updates - self.counts["updates"], tokens=report.tokens)
        self._tell_demos()
        if report.moved:
            self._publish(batch_rollouts(groups))
        self._sampled.forget()
        return report

    def _publish(self, sampled: Sequence[Rollout]) -> None:
        self._run().publish(self._steps, sampled, {*self.checkpoints.values()})

    def _tell_demos(self) -> None:
        if self._sampled.without_demos and not self.counts["rows with demonstrations"]:
            logger.warning(
                "GRPO hands over prompts without the program's demonstrations; the replies are trained after the "
                "prompts that were sampled, which have them"
            )
        self.counts["rows with demonstrations"] = self._sampled.without_demos

    def _run(self) -> "_Running":
        if self._running is None:
            raise TrainingError(f"the job is {self._status.value}; call initialize() first")
        return self._running

    def _end(self, status: TrainingStatus) -> None:
        running, self._running = self._running, None
        if running is None:
            return
        self._status = status
        self._handled = []
        self._sampled.forget()
        running.end({"status": status.value, **self.counts}, sound=status != TrainingStatus.failed)


class _Running:
    """What a job holds while it runs."""

    def __init__(self, lm: PolicyLM, settings: ReinforceSettings):
        self.lm, self.settings = lm, settings
        source = lm.handle.local_folder
        lm.release()  # its engine would hold memory beside the job's
        self.folder = JobFolder(settings.folder, "grpo")
        self.source = str(source)
        self.trainer = Trainer(source, settings, seed=settings.seed)
        self.handle: EngineHandle = lm.fork().handle
        texts = NaturalTexts(dspy.Module(), (), (), self.trainer.tokenizer)
        tolerance = settings.sync_tolerance
        self._serving = Publishing(self.handle, self.trainer, texts, tolerance=tolerance, tell=logger.warning)
        self._written: list[Path] = []

    def publish(self, step: int, sampled: Sequence[Rollout], checkpoints: set[str]) -> None:
        """Write the weights, have them served and verified, and let the LM speak with them."""
        self._serving.texts.see(sampled)
        path = self.folder.path / "steps" / version_of(step)
        checkpoint = self.trainer.publish(path, f"{self.folder.name}-{version_of(step)}")
        self._serving.serve(checkpoint)
        self.lm.move_to(self.handle)
        self._written.append(path)
        older = [path for path in self._written[1 : -self.settings.keep_weights] if str(path) not in checkpoints]
        for path in older:
            remove(path)
            self._written.remove(path)

    def end(self, facts: Mapping[str, object], *, sound: bool) -> None:
        """Let go of the trainer; what it makes of the newest weights is kept for their next verification.

        Args:
            sound: Whether the trainer holds the weights that are served. After a failure it may have moved on.
        """
        self.handle.heard = None
        served = self.handle.checkpoint
        if sound:
            self.handle.prove_by(served, partial(verify, expected=self._expected(served)))
        elif self._written:
            self.handle.prove_by(served, partial(verify_tensors, checkpoint=served))
        else:
            self.handle.release()
        self.folder.tell({"from": self.source, **facts})

    def _expected(self, checkpoint: Checkpoint) -> Expected:
        ids = self._serving.texts.ids()
        tolerance = self.settings.sync_tolerance
        return Expected(checkpoint, ids, self.trainer.score(ids), self.trainer.dtype, tolerance=tolerance)


def batch_rollouts(groups: Sequence[Group]) -> list[Rollout]:
    return [rollout for group in groups for rollout in group.rollouts]


def _nothing_found(counts: Mapping[str, int]) -> str:
    reasons = {name: count for name, count in counts.items() if name.startswith("left out")}
    told = ", ".join(f"{name.removeprefix('left out: ')}: {count}" for name, count in reasons.items())
    why = (
        "GRPO formats with its own adapter, DSPy's setting, or else XMLAdapter: name the one that the program speaks "
        "through, GRPO(adapter=dspy.ChatAdapter(), ...) or dspy.configure(adapter=...)"
        if counts.get(f"left out: {NO_PROMPT}")
        else "the program must speak with this very PolicyLM, and through a chat adapter that writes what it parses"
    )
    return (
        f"none of {counts['rows']} replies that GRPO hands over was sampled by this LM under its current weights "
        f"({told}), so nothing was trained; {why}. FSTOptimizer(method='rl') trains any program and adapter"
    )
