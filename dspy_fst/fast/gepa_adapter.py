"""DSPy 3.4's GEPA adapter over our own rollouts. Only it, `reflections` and `seeding` use the internals of gepa."""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypedDict

import dspy
from dspy.teleprompt.bootstrap_trace import FailedPrediction
from dspy.teleprompt.gepa.gepa_utils import DspyAdapter
from dspy.teleprompt.gepa.instruction_proposal import InstructionProposer
from gepa.core.adapter import EvaluationBatch

from dspy_fst.fast.journal_protocol import SearchJournal
from dspy_fst.fast.reflection_cost import CostMeter
from dspy_fst.fast.reflections import DrawDemos, Reflections, ReflectiveDataset, Texts
from dspy_fst.fast.reflective_dataset import Record, asked_for, bounded
from dspy_fst.fast.rollout_bank import RolloutBank
from dspy_fst.fast.seeding import UNMEASURED
from dspy_fst.formatting.demo_texts import is_demos
from dspy_fst.rollout.components import is_tool, predictor_of, with_texts
from dspy_fst.rollout.parse_failures import Entry
from dspy_fst.rollout.reward import Feedback
from dspy_fst.rollout.rollouter import Task
from dspy_fst.types import PREDICTOR_TAG, Candidate, Problem, Rollout

"""(example, prediction, trace, predictor name, predictor trace) -> what the metric says of that predictor."""
Propose = Callable[..., Texts]
"""gepa's ProposalFn: (candidate, reflective_dataset, components_to_update) -> {component: new text}."""
ProposeCode = Callable[..., Texts]
"""DSPy's CodeProposalFn: the same with task_descriptions and context_blurbs, for the sources of dspy.Flex modules."""
DESCRIBE_TOOL = """I gave an agent a tool, with the description in current_instruction (of the tool, or of one of its \
arguments), which is all that the agent knows about it. You are given examples of the agent's steps, and feedback on \
how each run went.

Write a better description: what the tool or argument is for, when to use it and when not, what to give it and what \
comes back. Keep to what the examples show and the current description says; the tool itself does not change."""
"""Instructions to the reflection LM for a tool's description, in place of DSPy's for instructions (ours)."""


@dataclass(frozen=True)
class Reflection:
    """How new texts are proposed."""

    feedback: Feedback
    """What the metric says of one predictor's part in a run."""
    instruction_proposer: Propose | None
    """Proposes texts without a reflection LM; None lets the reflection LM propose."""
    code_proposer: ProposeCode | None
    """Proposes sources of dspy.Flex modules; None lets the reflection LM propose."""
    lm: dspy.LM | None
    """The reflection LM."""
    seed: int
    """Names the draws of the calls that a reflection is shown."""
    record_tokens: int
    """Estimated tokens of one run that a reflection is shown at most."""
    protected: Mapping[str, Sequence[str]]
    """Component -> lines of its text that every proposal keeps."""
    draw_demos: DrawDemos
    """Proposes demos."""


class Trajectory(TypedDict):
    """DSPy's TraceData, and the feedback: one run of the program."""

    example_ind: int
    example: dspy.Example
    prediction: object
    trace: list[Entry]
    score: object
    feedback: str


@dataclass(frozen=True)
class FailedRun:
    """Stands for the prediction of a run that failed: what the reflection is told instead."""

    feedback: str

    def __str__(self) -> str:
        return f"no prediction: {self.feedback}"


@dataclass(frozen=True)
class _Selected:
    """What one run's record is made from."""

    trajectory: Trajectory
    others: list[Entry]
    """The run's other calls."""
    unparsed: FailedPrediction | None
    """The call's reply, where it did not parse."""


class BankedAdapter(DspyAdapter):
    """DSPy's GEPA adapter, answering evaluations from a bank of our own rollouts."""

    def __init__(self, program: dspy.Module, bank: RolloutBank, reflection: Reflection, journal: SearchJournal):
        names = [name for name, _ in program.named_predictors()]
        super().__init__(
            student_module=program,
            metric_fn=None,  # type: ignore[arg-type]  # never asked: the bank's rollouts are scored
            feedback_map={name: partial(self._feedback_of, name) for name in names},
            reflection_lm=reflection.lm,
            custom_instruction_proposer=reflection.instruction_proposer,
            custom_code_proposer=reflection.code_proposer,
            add_format_failure_as_feedback=True,
            warn_on_score_mismatch=False,
            rng=random.Random(reflection.seed),
        )
        self._bank, self._reflection = bank, reflection
        self._describe = (
            InstructionProposer(base_instructions=DESCRIBE_TOOL) if reflection.instruction_proposer is None else None
        )
        self._run_trace: list[Entry] = []
        self.reflections = Reflections(
            self._proposed,
            journal,
            reflection.protected,
            reflection.draw_demos,
            self._flex_paths,
            CostMeter(reflection.lm),
            # Warnings are collected from the user's proposer only: those of a reflection LM are its library's.
            collects_warnings=reflection.instruction_proposer is not None,
        )

    def evaluate(  # type: ignore[override]  # of problems, where DSPy has their examples
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
        wanted = [Task(problem, Candidate(dict(candidate))) for candidate, batch in items for problem in batch]
        rollouts = iter(self._bank.get(wanted))
        fresh = len(self._bank.fresh) - before
        batches = []
        for _, batch in items:
            of_batch = [next(rollouts) for _ in batch]
            examples = {problem.index: problem.example for problem in batch}
            batches.append(
                EvaluationBatch(
                    outputs=[None] * len(of_batch),
                    scores=[UNMEASURED if r.reward is None else r.reward for r in of_batch],
                    trajectories=[_trajectory(i, r, examples) for i, r in enumerate(of_batch) if r.reward is not None],
                    num_metric_calls=fresh,
                )
            )
            fresh = 0  # fresh rollouts are counted once, with the first item
        return batches

    # ---- proposing -------------------------------------------------------------------------------

    propose_new_texts = None  # type: ignore[assignment]  # gepa asks `reflections` instead, for all jobs at once

    def _proposed(self, candidate: Texts, reflective_dataset: ReflectiveDataset, components: list[str]) -> Texts:
        """The texts of DSPy's proposers. A tool's description is asked for in other words than an instruction."""
        tools = [name for name in components if is_tool(name)] if self._describe is not None else []
        others = [name for name in components if name not in tools]
        records = {name: [dict(record) for record in shown] for name, shown in reflective_dataset.items()}
        texts = dict(DspyAdapter.propose_new_texts(self, candidate, records, others))
        if tools and self._describe is not None:
            with dspy.context(lm=self.reflection_lm or dspy.settings.lm):
                texts |= self._describe(candidate, reflective_dataset, tools)
        return texts

    # ---- what a reflection is shown --------------------------------------------------------------

    def build_program(self, candidate: Mapping[str, str]) -> dspy.Module:
        """As DSPy's, and with the candidate's tools."""
        return with_texts(self.student, Candidate(dict(candidate)))

    def make_reflective_dataset(
        self, candidate: Texts, eval_batch: EvaluationBatch, components_to_update: list[str]
    ) -> ReflectiveDataset:
        """DSPy's records: each predictor's from its own calls, with the rest of the run, within the budget of tokens.

        DSPy tells predictors apart by signature, and would mix up two that share one.

        A proposal of demos is shown none: it is a draw.

        Raises:
            LookupError: no component had a part in any run of the minibatch.
        """
        key = self.reflections.next_key(candidate, components_to_update)
        demos: ReflectiveDataset = {name: [] for name in components_to_update if is_demos(name)}
        if len(demos) == len(components_to_update) or self.reflections.is_on_record(key):
            self.reflections.expect(key)
            return {name: [] for name in components_to_update}
        self.rng = random.Random(f"{self._reflection.seed} reflection {self.reflections.sets}")
        records = {
            name: self._records(candidate, eval_batch, name) for name in components_to_update if name not in demos
        }
        if not any(records.values()):
            raise LookupError(f"no call of {components_to_update} in the minibatch, so there is nothing to reflect on")
        self.reflections.expect(key)
        return {name: of_component for name, of_component in records.items() if of_component} | demos

    def _records(self, candidate: Texts, eval_batch: EvaluationBatch, component: str) -> list[Record]:
        """The records of each run in which the component had a part."""
        predictor = dict(self.build_program(candidate).named_predictors()).get(predictor_of(component))
        records: list[Record] = []
        for trajectory in eval_batch.trajectories or ():
            self._run_trace = trajectory["trace"]
            selected = self._selected(trajectory, component, predictor)
            if selected is None:
                continue
            one_run = replace(eval_batch, trajectories=[selected.trajectory])
            given = super().make_reflective_dataset(candidate, one_run, [predictor_of(component)])
            of_run: list[Record] = given[predictor_of(component)]
            if selected.unparsed is not None:
                of_run = [asked_for(record, selected.unparsed, predictor) for record in of_run]
            records += [bounded(record, selected.others, self._reflection.record_tokens) for record in of_run]
        return records

    def _selected(self, trajectory: Trajectory, component: str, predictor: dspy.Predict | None) -> _Selected | None:
        """What a record is made from: a reply that did not parse, else a drawn call. None without a call of its own."""
        if component in self._flex_paths:
            score = dspy.Prediction(score=trajectory["score"], feedback=trajectory["feedback"])
            return _Selected({**trajectory, "score": score}, [], None)
        name = predictor_of(component)
        own = [entry for entry in trajectory["trace"] if getattr(entry[0], PREDICTOR_TAG, None) == name]
        if predictor is None or not own:
            return None
        chosen = next((entry for entry in own if _unparsed(entry)), None) or self.rng.choice(own)
        others = [entry for entry in trajectory["trace"] if entry is not chosen]
        return _Selected({**trajectory, "trace": [(predictor, *chosen[1:])]}, others, _unparsed(chosen))

    def _feedback_of(
        self,
        name: str,
        predictor_output: object,
        predictor_inputs: object,
        module_inputs: dspy.Example,
        module_outputs: dspy.Prediction | FailedRun,
        captured_trace: object,
    ) -> dict[str, object]:
        """DSPy's PredictorFeedbackFn; the metric is given the whole run's trace."""
        if isinstance(module_outputs, FailedRun):
            return {"score": None, "feedback": module_outputs.feedback}
        own = [(None, predictor_inputs, predictor_output)]
        # As when it scored: without replies that did not parse.
        trace = [entry for entry in self._run_trace if not _unparsed(entry)]
        feedback = self._reflection.feedback(module_inputs, module_outputs, trace, name, own)
        return {"score": None, "feedback": feedback}


def _unparsed(entry: Entry) -> FailedPrediction | None:
    return entry[2] if isinstance(entry[2], FailedPrediction) else None


def _trajectory(index: int, rollout: Rollout, examples: Mapping[int, dspy.Example]) -> Trajectory:
    """A rollout as DSPy's TraceData."""
    return {
        "example_ind": index,
        "example": examples[rollout.problem],
        "prediction": FailedRun(rollout.feedback) if rollout.outcome.kind == "failed" else rollout.prediction,
        "trace": list(rollout.trace),
        "score": rollout.reward,
        "feedback": rollout.feedback,
    }
