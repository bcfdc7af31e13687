"""How many tokens a micro-batch may have: the setting, until an update runs out of memory.

Then the budget is halved and stays so, because the next update of that size would fail as well. A gradient does not
depend on it but for rounding.
"""

from typing import Literal

from dspy_fst.errors import TrainingError
from dspy_fst.types import Batch

UNPLANNED_TOKENS = 4096
"""Tokens of a micro-batch under ``micro_batch_tokens="auto"`` where no memory plan chose a number: a CPU is fastest
about here."""


class MicroBatchBudget:
    """The tokens of a micro-batch, padding included.

    Args:
        given: The setting ``micro_batch_tokens``.
    """

    def __init__(self, given: int | Literal["auto"]):
        self.tokens = self._given = UNPLANNED_TOKENS if given == "auto" else given

    @property
    def facts(self) -> dict[str, int]:
        """What a trainer's state keeps of it: nothing before memory ran out."""
        return {"micro_batch_tokens": self.tokens} if self.tokens < self._given else {}

    def restore(self, facts: dict[str, int]) -> None:
        """Take up a lowered budget; a setting that is lower still stands."""
        self.tokens = min(self._given, facts.get("micro_batch_tokens", self._given))

    def halve(self, batch: Batch, update: int) -> None:
        """Lower the budget after an update ran out of memory, to the batch's longest sequence at least.

        Args:
            update: Number of the update.

        Raises:
            TrainingError: it is no larger than that sequence, so a lower one would change nothing.
        """
        longest = longest_sequence(batch)
        if self.tokens <= longest:
            raise TrainingError(
                f"update {update} ran out of memory with micro-batches of {self.tokens} tokens, and its longest "
                f"sequence has {longest}; the weights were left as they are. Lower max_tokens, train a LoRA adapter "
                "(adapter=LoRA(rank=16)), set kl_coefficient=0, or give the engine less memory (in a new run_dir)"
            )
        self.tokens = max(self.tokens // 2, longest)


def longest_sequence(batch: Batch) -> int:
    """Tokens of the batch's longest prompt and completion, of the seed's prompts too."""
    lengths = [len(row.prompt_ids) + len(row.completion_ids) for row in batch.rows]
    for held in batch.seed_kl_calls:
        prompt = max(len(held.call.prompt_ids), len(held.start_prompt_ids))
        lengths.append(prompt + len(held.call.completion_ids))
    return max(lengths)
