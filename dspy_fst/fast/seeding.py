"""A GEPA search that starts from several scored candidates, and knows what was not measured.

gepa 0.1.4 has no masks: every score is a number, and whatever number stands for a masked rollout would enter the
frontier as if it had been measured. Here nan stands for it. gepa's frontier takes no nan (no comparison with it is
true), the policy takes it out of the candidate's scores before a mean is made, and the acceptance of a proposal
compares only problems that both sides measured.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from gepa.core.data_loader import DataLoader
from gepa.core.state import GEPAState, ValsetEvaluation
from gepa.proposer.base import CandidateProposal
from gepa.proposer.reflective_mutation.base import CandidateSelector
from gepa.strategies.batch_sampler import BatchSampler
from gepa.strategies.eval_policy import FullEvaluationPolicy
from gepa.strategies.proposal_sampling import ProposalTask

from dspy_fst.types import Candidate

UNMEASURED = math.nan
"""Score of a masked rollout on its way through gepa."""

Row = Sequence[float | None]
"""A candidate's score on each anchor; None where its rollout was masked."""


class SeededPolicy(FullEvaluationPolicy[int, Any]):
    """Every anchor for every new candidate; the seeds bring their scores with them and are not scored again."""

    def get_seed_eval_batch(self, loader: object) -> list[int]:
        return []

    def get_valset_score(self, program_idx: int, state: GEPAState) -> float:
        """gepa asks for this first after it took in a candidate, so here what was not measured is taken out."""
        scores = state.prog_candidate_val_subscores[program_idx]
        for anchor in [anchor for anchor, score in scores.items() if math.isnan(score)]:
            del scores[anchor]
        return super().get_valset_score(program_idx, state)


class BetterWhereMeasured:
    """gepa's acceptance, strictly better in sum, over the problems that both the parent and the proposal measured."""

    def should_accept(self, proposal: CandidateProposal[int], state: GEPAState) -> bool:
        pairs = zip(proposal.subsample_scores_before or (), proposal.subsample_scores_after or (), strict=True)
        return sum(after - before for before, after in pairs if not math.isnan(after - before)) > 0

    def reject_reason(self, proposal: CandidateProposal[int], state: GEPAState) -> str:
        return "not better on the problems that both measured, skipping"


class SeveralAtOnce:
    """gepa's sampling strategy: several parents from the pool as it stands, each with the next minibatch.

    gepa's own strategy for several takes the minibatches by the number of the iteration, so that iterations in a row
    share all but one of them.

    Args:
        wanted: How many proposals the next iteration makes at most, from the number of those before.
    """

    def __init__(self, wanted: Callable[[int], int]):
        self._wanted = wanted
        self.drawn = 0
        """Proposals so far."""

    def sample_tasks(
        self,
        state: GEPAState,
        candidate_selector: CandidateSelector,
        batch_sampler: BatchSampler[int, Any],
        trainset: DataLoader[int, Any],
    ) -> list[ProposalTask[int, Any]]:
        tasks = []
        for _ in range(max(1, self._wanted(self.drawn))):
            parent = candidate_selector.select_candidate_idx(state)
            place = cast(GEPAState, SimpleNamespace(i=self.drawn))  # all that gepa's sampler reads of a state
            ids = batch_sampler.next_minibatch_ids(trainset, place)
            tasks.append(ProposalTask(parent, state.program_candidates[parent], ids, trainset.fetch(ids)))
            self.drawn += 1
        return tasks


def write_seeded_state(run_dir: Path, candidates: Sequence[Candidate], scores: Sequence[Row]) -> None:
    """A GEPA state that starts from several scored candidates; ``gepa.optimize(run_dir=...)`` goes on from it."""
    evaluations = [
        ValsetEvaluation(
            outputs_by_val_id=dict.fromkeys(range(len(row))),
            scores_by_val_id={anchor: score for anchor, score in enumerate(row) if score is not None},
        )
        for row in scores
    ]
    state = GEPAState(dict(candidates[0].texts), evaluations[0])
    for candidate, evaluation in zip(candidates[1:], evaluations[1:], strict=True):
        state.update_state_with_new_program(
            parent_program_idx=[],
            new_program=dict(candidate.texts),
            valset_evaluation=evaluation,
            run_dir=None,
            num_metric_calls_by_discovery_of_new_program=0,
        )
        state.parent_program_for_candidate[-1] = [None]
    state.total_num_evals = 0
    state.num_full_ds_evals = len(candidates)
    state.save(str(run_dir), use_cloudpickle=True)
