"""Rollouts of a search as members of the groups of the step after it (``reuse_rollouts``).

A search scores the members of its new population on its anchors. The same weights, texts and sampling settings make
the groups of the step after it, and no step comes between. So one rollout of each member and anchor is a sample of what
that step would sample again, with exact ids and log-probabilities: its importance weight is 1, as the others' is.

In: what the search played. Out: a document of the state that the search commits, and from it the rollouts. A run that
goes on reads that document, and an undisturbed run reads it too, so both have the same groups.

The members were chosen because of these very rewards, so the rewards are a little too high (see DECISIONS.md).
"""

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace

import dspy

from dspy_fst.fast.evolve import Search
from dspy_fst.outcomes.outcome import OutcomeCounts
from dspy_fst.report.step_options import LEFT_OUT
from dspy_fst.rollout.jsonable import rollouts_from_json, trainable_to_json
from dspy_fst.run.directory import RunDirectory
from dspy_fst.run.state import Documents
from dspy_fst.types import Batch, Group, Population, Rollout, WeightsVersion

DOCUMENT = "reusable.json"
"""Name of the document in the state."""
REUSED = "reused"
"""Name of the count of a step's rollouts that its search had made; ``rollouts`` counts them too."""


@dataclass
class Reuse:
    """What steps take over from the searches before them.

    Args:
        run: Holds the document.
        program: The program whose predictors the rollouts' traces refer to.
        judged_by: Identity of the metric.
        first_steps: Steps that may come right after a search: only there the document is read (`Plan.first_steps`).
    """

    run: RunDirectory
    program: dspy.Module
    judged_by: str
    first_steps: Collection[int]
    left_out: Counter[str] = field(default_factory=Counter)
    """Reason -> rollouts of the search that the newest step sampled again."""

    @property
    def conditions(self) -> dict[str, object]:
        """What the journal of a search must agree with. Another metric's rewards must not be handed over as this
        one's, so a killed search goes on under the same metric only, and begins anew under another."""
        return {"judged_by": self.judged_by}

    def handed_over(self, search: Search, step: int, problems: Collection[int]) -> Documents:
        """The document of the state that the search commits.

        Args:
            search: The search that is over.
            step: The step after it.
            problems: Indices of the step's problems.
        """
        members = {member.digest for member in search.population.members}
        made = {  # of a masked rollout that was made again, the second one
            (rollout.candidate.digest, rollout.problem): rollout
            for rollout in search.scoring
            if rollout.candidate.digest in members and rollout.problem in problems
        }
        measured = [(digest, rollout) for (digest, _), rollout in made.items() if rollout.mask is None]
        rollouts = [{"candidate": digest, **trainable_to_json(rollout)} for digest, rollout in measured]
        left_out = {"masked": len(made) - len(measured)}
        return {DOCUMENT: {"step": step, "judged_by": self.judged_by, "left_out": left_out, "rollouts": rollouts}}

    def known(self, step: int, population: Population, weights: WeightsVersion) -> list[Rollout]:
        """The rollouts that the step need not sample; none where no search came just before it.

        Args:
            population: Of the step.
            weights: The version that the step samples with. Rollouts with calls of another version are left out, and
                so are all that another metric scored.
        """
        self.left_out = Counter()
        document = self.run.document(DOCUMENT) if step in self.first_steps else None
        if document is None or document["step"] != step:
            return []
        members = {member.digest: member for member in population.members}
        items = [item for item in document["rollouts"] if item["candidate"] in members]
        rollouts = rollouts_from_json(items, [members[item["candidate"]] for item in items], self.program)
        kept = [rollout for rollout in rollouts if all(call.weights == weights for call in rollout.calls)]
        self.left_out.update({**document["left_out"], "other weights": len(rollouts) - len(kept)})
        if document["judged_by"] != self.judged_by:
            self.left_out["another metric"], kept = len(kept), []
        return [replace(rollout, reused=True) for rollout in kept]

    def counted(self, batch: Batch, groups: Sequence[Group]) -> Batch:
        """The batch of a step's groups, with counts of what was reused in them and of what was not."""
        reused = [rollout for group in groups for rollout in group.rollouts if rollout.reused]
        outcomes = OutcomeCounts.over(rollout.outcome for rollout in reused).as_reused
        left_out = {f"{LEFT_OUT}{reason}": count for reason, count in self.left_out.items()}
        counts = {REUSED: len(reused), **outcomes, **left_out}
        return replace(batch, counts=Counter({**batch.counts, **{name: n for name, n in counts.items() if n}}))
