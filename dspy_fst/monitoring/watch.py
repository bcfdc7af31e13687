"""Warnings about problems that raise no error, given while the run can still be changed.

Pure: the warnings are a function of the sequence of reports. A continued run shows its earlier reports to a new `Watch`
and drops the warnings for them.
"""

from dspy_fst.monitoring.form_advice import Form
from dspy_fst.monitoring.history import History
from dspy_fst.monitoring.rollout_rules import ROLLOUT_RULES
from dspy_fst.monitoring.update_rules import UPDATE_RULES
from dspy_fst.types import StepReport

CALM = 5
"""After this many steps without a problem it counts as gone, and is warned of again when it returns (ours)."""


class Watch:
    """Warns of each kind of problem once an episode.

    Args:
        worst: Reward of a failed rollout.
        best: Reward of a perfect rollout.
        parse_share: ``FSTConfig.parse_warning_share``.
    """

    def __init__(self, worst: float = 0.0, best: float = 1.0, parse_share: float = 0.1):
        self._worst, self._best, self._parse_share = worst, best, parse_share
        self._reports: list[StepReport] = []
        self._last_seen: dict[str, int] = {}

    def see(self, report: StepReport, form: Form | None = None, reply: str = "") -> list[str]:
        """The warnings that follow from this report: what was seen, over how many steps, and what to do.

        Args:
            report: The report of the newest step.
            form: The form of the program's prompts now. Advice leaves out what it does already.
            reply: A failed reply of the step and its reason, for warnings about failed replies.
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
