"""What goes wrong in a run without an error is told while it can still be helped.

Pure: the warnings are a function of the sequence of reports. A run that is continued shows its earlier reports to a
new `Watch` and drops what that says.
"""

from dspy_fst.monitoring.form_advice import Form
from dspy_fst.monitoring.history import History
from dspy_fst.monitoring.rollout_rules import ROLLOUT_RULES
from dspy_fst.monitoring.update_rules import UPDATE_RULES
from dspy_fst.types import StepReport

CALM = 5
"""Steps without a trouble after which it counts as gone; if it comes back later it is told again (ours)."""


class Watch:
    """Tells each kind of trouble once an episode.

    Args:
        worst: Reward of a failed rollout.
        best: Reward of a perfect one.
        parse_share: ``FSTConfig.parse_warning_share``.
    """

    def __init__(self, worst: float = 0.0, best: float = 1.0, parse_share: float = 0.1):
        self._worst, self._best, self._parse_share = worst, best, parse_share
        self._reports: list[StepReport] = []
        self._last_seen: dict[str, int] = {}

    def see(self, report: StepReport, form: Form | None = None, reply: str = "") -> list[str]:
        """Warnings that this report gives rise to: what was seen, over how many steps, and what to do.

        Args:
            report: Of the newest step.
            form: How the program asks now, so that what it does already is not advised.
            reply: A failed reply of the step and its reason, for the warnings that are about such.
        """
        self._reports.append(report)
        now = len(self._reports)
        history = History(self._reports, self._worst, self._best, self._parse_share, form or Form(), reply)
        warnings = []
        for finding in filter(None, (rule(history) for rule in (*ROLLOUT_RULES, *UPDATE_RULES))):
            if finding.kind not in self._last_seen or now - self._last_seen[finding.kind] > CALM:
                warnings.append(str(finding))
            self._last_seen[finding.kind] = now
        return warnings
