"""The report and a model card of a finished run as files, for trackers that keep files beside a run's numbers."""

from pathlib import Path

import dspy

from dspy_fst.errors import FSTError, briefly
from dspy_fst.monitoring.tracking import FOLDER, Documents
from dspy_fst.run.directory import COMPILED
from dspy_fst.run.files import writing
from dspy_fst.run.secrets import Redactor, secret_faults
from dspy_fst.saving.card import run_card
from dspy_fst.saving.facts import facts_of

REPORT, CARD = "report.html", "model_card.md"


def documents_of(run_dir: Path) -> Documents:
    """Write them into ``run_dir/tracking``. What cannot be made is left out, and said."""
    made, troubles = [], []
    for name, write in ((REPORT, _write_report), (CARD, _write_card)):
        try:
            with writing(run_dir / FOLDER):
                (run_dir / FOLDER).mkdir(exist_ok=True)
                write(run_dir, run_dir / FOLDER / name)
            made.append(run_dir / FOLDER / name)
        except (FSTError, ImportError, OSError) as error:
            troubles.append(f"trackers get no {name}: {briefly(error)}")
    return made, troubles


def _write_report(run_dir: Path, out: Path) -> None:
    from dspy_fst.report.page import build_report  # needs an extra

    build_report([run_dir], out)


def _write_card(run_dir: Path, out: Path) -> None:
    """The environment's secrets are looked for once more: this file leaves the machine."""
    card = run_card(facts_of(run_dir / COMPILED))
    if faults := secret_faults(Redactor.of(dspy.Module()), {CARD: dict(enumerate(card.splitlines(), start=1))}):
        raise FSTError("; ".join(faults))
    out.write_text(card, encoding="utf-8", errors="replace")  # a model's text may hold half a character
