"""DSPy 3.4's GEPA adapter, answering from rollouts of our own. It and `seeding` alone touch gepa's insides."""

import hashlib
import json
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import dspy
from dspy.teleprompt.bootstrap_trace import FailedPrediction
from dspy.teleprompt.gepa.gepa_utils import DspyAdapter
from dspy.teleprompt.gepa.instruction_proposal import InstructionProposer
from gepa.core.adapter import EvaluationBatch

from dspy_fst.errors import MeasurementError, RunDirectoryError
from dspy_fst.fast.heard import heard
from dspy_fst.fast.mending import kept_texts
from dspy_fst.fast.reflective_dataset import asked_for, bounded
from dspy_fst.fast.seeding import UNMEASURED
from dspy_fst.rollout.call_recorder import tag_predictors
from dspy_fst.rollout.components import is_tool, lost_lines, predictor_of, with_texts
from dspy_fst.rollout.jsonable import from_plain, to_plain
from dspy_fst.types import PREDICTOR_TAG, Candidate, Problem, Rollout

Play = Callable[[Sequence[tuple[Problem, Candidate]]], list[Rollout]]
"""Makes one rollout for each (problem, candidate), all under the current weights."""
Feedback = Callable[[dspy.Example, Any, Any, str, Any], str]
"""(example, prediction, trace, predictor name, predictor trace) -> what the metric says of that predictor."""
Propose = Callable[..., dict[str, str]]
"""gepa's ProposalFn: (candidate, reflective_dataset, components_to_update) -> {component: new text}."""
ProposeCode = Callable[..., dict[str, str]]
"""DSPy's CodeProposalFn: the same with task_descriptions and context_blurbs, for the sources of dspy.Flex modules."""
DESCRIBE_TOOL = """I gave an agent a tool, with the description in current_instruction (of the tool, or of one of its \
arguments), which is all that the agent knows about it. You are given examples of the agent's steps, and feedback on \
how each run went.

Write a better description: what the tool or argument is for, when to use it and when not, what to give it and what \
comes back. Keep to what the examples show and the current description says; the tool itself does not change."""
"""What a reflection LM is asked for a tool's description, in the place of DSPy's words for instructions (ours)."""


OUTAGE = 12
"""Rollouts in a row, whole batches of them, that may measure nothing before a search stops (ours)."""
TRIES = 2
"""How often a masked rollout is made in all, before it stays unmeasured for the search (ours)."""


class Journal(Protocol):
    """Keeps what each costly act of a search gave, so that a killed search can be repeated without paying again."""

    def next_is(self, kind: str, key: str) -> bool:
        """Whether the next act on record is this one."""

    def recall(self, kind: str, key: str) -> Any:
        """What the next act gave; None when it is not on record."""

    def record(self, kind: str, key: str, gave: Any) -> Any:
        """Keep what an act gave, and give it back as it is kept."""

    def remove(self) -> None:
        """Forget everything."""


class NoJournal:
    """Remembers nothing."""

    def next_is(self, kind: str, key: str) -> bool:
        return False

    def recall(self, kind: str, key: str) -> Any:
        return None

    def record(self, kind: str, key: str, gave: Any) -> Any:
        return gave

    def remove(self) -> None:
        pass


class RolloutBank:
    """Rollouts of one cycle by (candidate, problem): none is made twice under the same weights.

    Args:
        play: Makes rollouts.
        program: Whose predictors the traces of recalled rollouts refer to.
    """

    def __init__(self, play: Play, program: dspy.Module, journal: Journal):
        self._play, self._program, self._journal = play, program, journal
        self._masked_in_a_row = 0
        self._made: dict[tuple[str, int], Rollout] = {}
        self._tries: Counter[tuple[str, int]] = Counter()
        self.fresh: list[Rollout] = []
        self.reused = 0
        self.sampled_tokens = 0

    def get(self, wanted: Sequence[tuple[Problem, Candidate]]) -> list[Rollout]:
        missing = {(c.digest, p.index): (p, c) for p, c in wanted if (c.digest, p.index) not in self._made}
        played = dict(zip(missing, self._play_once(list(missing.values())), strict=True)) if missing else {}
        self.fresh += played.values()
        self.reused += len(wanted) - len(missing)
        known = self._made | played
        self._tries.update(played.keys())
        # A masked rollout measured nothing: whoever asks again gets another try, but no try without end.
        done = {key: rollout for key, rollout in played.items() if rollout.mask is None or self._tries[key] >= TRIES}
        self._made |= done
        return [known[candidate.digest, problem.index] for problem, candidate in wanted]

    def _play_once(self, wanted: Sequence[tuple[Problem, Candidate]]) -> list[Rollout]:
        """Play, or recall what an interrupted search played.

        Rollouts that JSON cannot hold are played again, in the same batch and with the same seeds.
        """
        key = _key([(problem.index, candidate.digest) for problem, candidate in wanted])
        recalled = self._journal.recall("rollouts", key)
        if recalled is not None and recalled["rollouts"] is not None:
            self.sampled_tokens += recalled["tokens"]
            candidates = [candidate for _, candidate in wanted]
            # Of a source that does not bind there is no program, and no trace that would refer to it.
            traced = [c for c, rollout in zip(candidates, recalled["rollouts"], strict=True) if rollout["trace"]]
            programs = self._speaking(traced)
            return from_plain(recalled["rollouts"], candidates, lambda c: programs[c.digest])
        played = self._play(wanted)
        self._refuse_outage(played)
        tokens = sum(rollout.tokens for rollout in played)
        self.sampled_tokens += tokens
        if recalled is None:
            self._journal.record("rollouts", key, {"rollouts": to_plain(played), "tokens": tokens})
        return played

    def _refuse_outage(self, played: Sequence[Rollout]) -> None:
        """Stop when nothing is measured any more: to GEPA every new candidate would look worthless.

        Raises:
            MeasurementError: what was played last is not recorded, so that a repeated search tries it again.
        """
        masks = [rollout.mask for rollout in played if rollout.mask is not None]
        self._masked_in_a_row = self._masked_in_a_row + len(masks) if len(masks) == len(played) else 0
        if self._masked_in_a_row >= OUTAGE:
            raise MeasurementError(
                f"the last {self._masked_in_a_row} rollouts of the search measured nothing "
                f"({', '.join(sorted(set(masks)))}); mend the cause and compile again with the same run_dir to go on"
            )

    def _speaking(self, candidates: Sequence[Candidate]) -> dict[str, dspy.Module]:
        programs = {candidate.digest: with_texts(self._program, candidate) for candidate in candidates}
        for program in programs.values():
            tag_predictors(program)
        return programs


class BankedAdapter(DspyAdapter):
    """DSPy's GEPA adapter, answering evaluations from a bank of our own rollouts."""

    def __init__(
        self,
        program: dspy.Module,
        bank: RolloutBank,
        feedback: Feedback,
        propose: Propose | None,
        reflection_lm: dspy.LM | None,
        seed: int,
        minibatch: int,
        journal: Journal,
        code_proposer: ProposeCode | None = None,
        record_tokens: int = 4000,
        protected: Mapping[str, Sequence[str]] | None = None,
    ):
        names = [name for name, _ in program.named_predictors()]
        super().__init__(
            student_module=program,
            metric_fn=None,
            feedback_map={name: partial(self._feedback_of, name) for name in names},
            reflection_lm=reflection_lm,
            custom_instruction_proposer=propose,
            custom_code_proposer=code_proposer,
            add_format_failure_as_feedback=True,
            warn_on_score_mismatch=False,
            rng=random.Random(seed),
        )
        self._bank, self._journal, self._seed = bank, journal, seed
        self._feedback = feedback
        self._run_trace: list[Any] = []
        self._record_tokens, self._protected = record_tokens, protected or {}
        self._describe = InstructionProposer(base_instructions=DESCRIBE_TOOL) if propose is None else None
        self._reflective_sets = 0
        self.minibatch = minibatch
        self.counts: Counter[str] = Counter()
        self.last_failure = ""
        self.warned: dict[str, None] = {}
        """What the proposer warned of, each text once."""
        self.stopped_by: RunDirectoryError | None = None
        """What the journal raised. gepa logs whatever a reflection raises and goes on."""

    def evaluate(
        self,
        batch: Sequence[Problem],
        candidate: Mapping[str, str],
        capture_traces: bool = False,
        num_threads: int | None = None,
    ) -> EvaluationBatch:
        return self.batch_evaluate([(candidate, batch)], capture_traces=capture_traces)[0]

    def batch_evaluate(
        self, items: Sequence[tuple[Mapping[str, str], Sequence[Problem]]], *, capture_traces: bool = True
    ) -> list[EvaluationBatch]:
        before = len(self._bank.fresh)
        wanted = [(problem, Candidate(dict(candidate))) for candidate, batch in items for problem in batch]
        rollouts = iter(self._bank.get(wanted))
        fresh = len(self._bank.fresh) - before
        batches = []
        for _, batch in items:
            made = [next(rollouts) for _ in batch]
            examples = {problem.index: problem.example for problem in batch}
            batches.append(
                EvaluationBatch(
                    outputs=[None] * len(made),
                    scores=[UNMEASURED if r.reward is None else r.reward for r in made],
                    trajectories=[_trajectory(i, r, examples) for i, r in enumerate(made) if r.reward is not None],
                    num_metric_calls=fresh,
                )
            )
            fresh = 0  # the fresh ones are counted once, with the first item
        return batches

    def propose_new_texts(
        self, candidate: dict[str, str], reflective_dataset: dict[str, Any], components_to_update: list[str]
    ) -> dict[str, str]:
        """One reflection. gepa logs what it raises and goes on, so failures are kept here and counted."""
        if self.stopped_by is not None:
            raise self.stopped_by
        try:
            gave = self._reflect_once(candidate, reflective_dataset, components_to_update)
        except RunDirectoryError as error:
            self.stopped_by = error
            raise
        self.warned |= dict.fromkeys(gave.get("warned", ()))
        if "failed" in gave:
            self.counts["reflections_failed"] += 1
            self.last_failure = gave["failed"]
            raise RuntimeError(gave["failed"])
        self.counts["reflections"] += 1
        texts = kept_texts(gave["texts"], candidate, self._flex_paths, self.counts)
        return {name: self._with_protected(name, text) for name, text in texts.items()}

    def _with_protected(self, component: str, text: str) -> str:
        """The text with the protected lines that it lost, at its end."""
        lost = lost_lines(text, self._protected.get(component, ()))
        self.counts["lines_restored"] += len(lost)
        return "\n".join([text, *lost])

    def _reflect_once(
        self, candidate: dict[str, str], reflective_dataset: dict[str, Any], components_to_update: list[str]
    ) -> dict[str, Any]:
        """Reflect, or recall what an interrupted search was told."""
        key = self._reflection_key(candidate, components_to_update)
        gave: Any = self._journal.recall("reflection", key)
        if gave is None:
            shown = [name for name in components_to_update if name in reflective_dataset]
            gave = self._journal.record("reflection", key, self._reflect(candidate, reflective_dataset, shown))
        return dict(gave)

    def _reflection_key(self, candidate: Mapping[str, str], components_to_update: list[str]) -> str:
        """Counted, because a reflective set that stays empty is followed by no reflection and leaves no record."""
        return _key([self._reflective_sets, sorted(candidate.items()), components_to_update])

    def _reflect(
        self, candidate: dict[str, str], reflective_dataset: dict[str, Any], shown: list[str]
    ) -> dict[str, Any]:
        # What a reflection LM warns of is its library's affair.
        listening: AbstractContextManager[list[str]] = heard() if self._describe is None else nullcontext([])
        with listening as warned:
            try:
                texts = self._proposed(candidate, reflective_dataset, shown)
                if wrong := [name for name, text in texts.items() if not isinstance(text, str)]:
                    raise TypeError(f"the proposer gave no text for {', '.join(map(str, wrong))}")
                gave: dict[str, Any] = {"texts": texts}
            except Exception as error:
                gave = {"failed": repr(error)}
        return {**gave, "warned": warned}

    def _proposed(
        self, candidate: dict[str, str], reflective_dataset: dict[str, Any], shown: list[str]
    ) -> dict[str, str]:
        """DSPy's proposers' texts; a tool's description is asked for in other words than an instruction."""
        tools = [name for name in shown if is_tool(name)] if self._describe is not None else []
        texts = dict(super().propose_new_texts(candidate, reflective_dataset, [n for n in shown if n not in tools]))
        if tools and self._describe is not None:
            with dspy.context(lm=self.reflection_lm or dspy.settings.lm):
                texts |= self._describe(candidate, reflective_dataset, tools)
        return texts

    def build_program(self, candidate: Mapping[str, str]) -> dspy.Module:
        """As DSPy's, and with the candidate's tools."""
        return with_texts(self.student, Candidate(dict(candidate)))

    def make_reflective_dataset(
        self, candidate: dict[str, str], eval_batch: EvaluationBatch, components_to_update: list[str]
    ) -> dict[str, Any]:
        """DSPy's records, each predictor's from its own calls, with the rest of the run and within the budget.

        DSPy tells predictors apart by signature, and would mix up two that share one.
        """
        self._reflective_sets += 1
        if self._journal.next_is("reflection", self._reflection_key(candidate, components_to_update)):
            return {name: [] for name in components_to_update}  # what came of it is on record
        self.rng = random.Random(f"{self._seed} reflection {self._reflective_sets}")
        told = {name: self._records(candidate, eval_batch, name) for name in components_to_update}
        records = {name: shown for name, shown in told.items() if shown}
        if not records:
            raise LookupError(f"no call of {components_to_update} in the minibatch, so there is nothing to reflect on")
        return records

    def _records(self, candidate: dict[str, str], eval_batch: EvaluationBatch, component: str) -> list[dict[str, Any]]:
        """One for each run in which the component had a part."""
        name, records = predictor_of(component), []
        predictor = dict(self.build_program(candidate).named_predictors()).get(name)
        for trajectory in eval_batch.trajectories or ():
            whole = self._run_trace = trajectory["trace"]
            own = [entry for entry in whole if getattr(entry[0], PREDICTOR_TAG, None) == name]
            if component in self._flex_paths:
                said = dspy.Prediction(score=trajectory["score"], feedback=trajectory["feedback"])
                given, others = {**trajectory, "score": said}, []
            elif own:
                chosen = next((e for e in own if isinstance(e[2], FailedPrediction)), None) or self.rng.choice(own)
                given = {**trajectory, "trace": [(predictor, *chosen[1:])]}
                others = [entry for entry in whole if entry is not chosen]
            else:
                continue
            made = super().make_reflective_dataset(candidate, replace(eval_batch, trajectories=[given]), [name])
            failed = own and isinstance(chosen[2], FailedPrediction)
            told = [asked_for(record, chosen[2], predictor) for record in made[name]] if failed else made[name]
            records += [bounded(record, others, self._record_tokens) for record in told]
        return records

    def _feedback_of(
        self,
        name: str,
        predictor_output: Any,
        predictor_inputs: Any,
        module_inputs: Any,
        module_outputs: Any,
        captured_trace: Any,
    ) -> dict[str, Any]:
        """DSPy's PredictorFeedbackFn; the metric is given the whole run's trace."""
        if isinstance(module_outputs, FailedRun):
            return {"score": None, "feedback": module_outputs.feedback}
        own = [(None, predictor_inputs, predictor_output)]
        # As when it scored: without replies that did not parse.
        trace = [entry for entry in self._run_trace if not isinstance(entry[2], FailedPrediction)]
        return {"score": None, "feedback": self._feedback(module_inputs, module_outputs, trace, name, own)}


def _key(act: Any) -> str:
    """Names an act, so that a record is never taken for another's."""
    return hashlib.sha256(json.dumps(act).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class FailedRun:
    """In the place of a prediction that never came: what the reflection is told instead."""

    feedback: str

    def __str__(self) -> str:
        return f"no prediction: {self.feedback}"


def _trajectory(index: int, rollout: Rollout, examples: Mapping[int, dspy.Example]) -> dict[str, Any]:
    """A rollout as DSPy's TraceData."""
    return {
        "example_ind": index,
        "example": examples[rollout.problem],
        "prediction": FailedRun(rollout.feedback) if rollout.outcome.kind == "failed" else rollout.prediction,
        "trace": list(rollout.trace),
        "score": rollout.reward,
        "feedback": rollout.feedback,
    }
