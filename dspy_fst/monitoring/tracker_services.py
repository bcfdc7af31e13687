"""How wandb, trackio, mlflow and other trackers name a run, continue it, end it, and take its files.

Read from each library's documentation. The first three are tried with the libraries themselves
(``tests/report/test_real_trackers.py``).
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

RunEnd: TypeAlias = Literal["finished", "failed", "stopped"]
"""How a run ended: complete, by an error, or by Ctrl-C or a signal."""
_MLFLOW_STATUS: dict[RunEnd, str] = {"finished": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}
_EXIT_CODE: dict[RunEnd, int] = {"finished": 0, "failed": 1, "stopped": 130}


def _finish(tracker: "GeneralTracker", end: RunEnd) -> None:
    tracker.finish()


def _finish_mlflow(tracker: "GeneralTracker", end: RunEnd) -> None:
    import mlflow

    mlflow.end_run(_MLFLOW_STATUS[end])  # accelerate's own says FINISHED of every run


def _finish_wandb(tracker: "GeneralTracker", end: RunEnd) -> None:
    tracker.tracker.finish(exit_code=_EXIT_CODE[end])


def _keep_in_wandb(tracker: "GeneralTracker", path: Path) -> None:
    tracker.tracker.save(str(path), base_path=str(path.parent), policy="now")


def _keep_in_trackio(tracker: "GeneralTracker", path: Path) -> None:
    tracker.tracker.log_artifact(path, name=f"{tracker.tracker.name}-{path.name}", type="report")


def _keep_as_accelerate_names_it(tracker: "GeneralTracker", path: Path) -> None:
    tracker.log_artifact(str(path))  # a method of MLflowTracker, and of a user's tracker that has one


@dataclass(frozen=True)
class TrackerService:
    """What differs between trackers."""

    named: str | None = None
    """The argument for the name of a run; None when there is none."""
    identity: Callable[[Any], object] | None = None
    """Gives the identity of the run that the tracker made; None: its runs cannot be continued by one."""
    continued: Callable[[str], dict[str, str]] = lambda identity: {}
    """Identity -> the arguments that continue that run."""
    finish: Callable[["GeneralTracker", RunEnd], None] = _finish
    keep: Callable[["GeneralTracker", Path], None] | None = None
    """Gives the tracker a file of the run; None: it takes none."""
    forgets: bool = False
    """Whether a continued run loses its hyperparameters unless they are given again."""


SERVICES = {
    "wandb": TrackerService(
        "name",
        lambda run: run.id,
        lambda identity: {"id": identity, "resume": "allow"},
        _finish_wandb,
        _keep_in_wandb,
    ),
    "trackio": TrackerService(
        "name",
        lambda run: run.name,
        lambda identity: {"name": identity, "resume": "allow"},
        keep=_keep_in_trackio,
        forgets=True,
    ),
    "mlflow": TrackerService(
        "run_name",
        lambda run: run.info.run_id,
        lambda identity: {"run_id": identity},
        _finish_mlflow,
        _keep_as_accelerate_names_it,
    ),
    "comet_ml": TrackerService(None, lambda run: run.get_key(), lambda identity: {"experiment_key": identity}),
    "aim": TrackerService(None, lambda run: run.hash, lambda identity: {"run_hash": identity}),
}
"""tensorboard continues by its folder. clearml, dvclive and swanlab begin a new run when ours is continued."""


def service_of(tracker: "str | GeneralTracker") -> TrackerService:
    """What is known of a tracker. One with settings of its own names, continues and ends its run itself."""
    if isinstance(tracker, str):
        return SERVICES.get(tracker, TrackerService())
    return TrackerService(keep=_keep_as_accelerate_names_it if hasattr(tracker, "log_artifact") else None)
