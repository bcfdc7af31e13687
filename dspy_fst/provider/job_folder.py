"""The folder of one job: made for it alone, so that neither another job nor a killed one is in the way.

runs/dspy/sft-000001/    or grpo-000001
  job.json               what was learnt and left out, and what it cost; written last
  weights/               of a supervised job; steps/ of a job of reinforcement
"""

import itertools
from collections.abc import Mapping
from pathlib import Path

from dspy_fst.run.files import write_json


class JobFolder:
    """See the module.

    Args:
        root: Where jobs have their folders.
        kind: ``"sft"`` or ``"grpo"``.
    """

    def __init__(self, root: Path, kind: str):
        root.mkdir(parents=True, exist_ok=True)
        ends = [path.name.rpartition("-")[2] for path in root.glob(f"{kind}-*")]
        taken = [int(end) for end in ends if end.isdigit()]
        for number in itertools.count(max(taken, default=0) + 1):
            self.path = root.resolve() / f"{kind}-{number:06d}"
            try:
                self.path.mkdir()
                return
            except FileExistsError:  # another process was first
                continue

    @property
    def name(self) -> str:
        return self.path.name

    def tell(self, facts: Mapping[str, object]) -> None:
        """Write what the job did; replaces what it said before."""
        write_json(self.path / "job.json", facts)
