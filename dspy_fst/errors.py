"""What a user can meet: every error names the setting or file, what is wrong, and what to do."""

import difflib
import importlib
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType


class FSTError(Exception):
    """Base of every error that dspy_fst raises on purpose."""


class ConfigurationError(FSTError):
    """Input that was found wrong before any work started; all faults are reported together.

    Args:
        faults: One sentence each: the setting, what is wrong with it, what to do.
    """

    def __init__(self, faults: Sequence[str]):
        self.faults = tuple(faults)
        heading = "1 problem" if len(self.faults) == 1 else f"{len(self.faults)} problems"
        super().__init__(f"{heading} found before starting:\n" + "\n".join(f"  - {fault}" for fault in self.faults))


class EngineError(FSTError):
    """The engine that samples tokens could not be started, reached or kept alive."""


class NoAnswerError(EngineError):
    """The server broke off, did not answer in time or failed inside; it may be dead."""


class ServerDiedError(NoAnswerError):
    """The server that was launched here has ended. The message quotes the end of its log."""


class ServerReplacedError(ServerDiedError):
    """A server that somebody else launched was started anew. It has other weights than it was given from here."""


class SyncError(EngineError):
    """After a publish the engine uses other weights than the trainer's, or computes other
    log-probabilities from them.
    """


class MeasurementError(FSTError):
    """Too little was measured to go on: the engine, a tool or the metric fails. The run can be continued."""


class ReflectionError(FSTError):
    """Every attempt to propose a text failed, so nothing was searched. The run can be continued."""


class FastOptimizerError(FSTError):
    """Another optimizer than GEPA failed within a search. The run can be continued."""


class TrainingError(FSTError):
    """The slow step cannot go on: non-finite loss, mixed weight versions, a model it cannot train."""


class NotFiniteError(TrainingError):
    """A loss, a gradient or a recorded log-probability is NaN or infinite. Nothing has moved."""


class MismatchError(TrainingError):
    """The batch was sampled from another distribution than the trainer's. Nothing has moved."""


class RankError(TrainingError):
    """Another process of a run of several failed or died, which ends all of them. The run can be continued."""


class ClusterError(FSTError):
    """A Ray cluster took no work, or lost the same work again and again. The run can be continued."""


class NothingLearnedError(FSTError):
    """So many steps in a row had no gradient that the run stopped (``max_unmoved_steps``), and none before had one.

    What was done is saved: the same call with a higher limit goes on. A run whose every problem is solved does not
    raise this, nor one of which some update changed the weights: it ends there and returns its program.

    Args:
        what: Which steps, and why they taught nothing, e.g. ``"steps 0 to 11: ..."``.
        run_dir: Where the run goes on from.
        steps: How many steps in a row had no gradient.
        cause: One of `dspy_fst.run.learning.Cause`, e.g. ``"unparsed"``.
        advice: What helped when it was tried on this model and task, or what to try.
    """

    def __init__(self, what: str, run_dir: Path, steps: int, cause: str, advice: str = ""):
        self.what, self.run_dir, self.steps, self.cause, self.advice = what, run_dir, steps, cause, advice
        how_to_go_on = (
            "No update changed the weights in these steps, so the run stopped (max_unmoved_steps). What it did is "
            f"saved: to go on, compile again with run_dir={str(run_dir)!r} and max_unmoved_steps above {steps}; None "
            "never stops"
        )
        super().__init__("\n".join([f"{what}.", *([advice] if advice else []), how_to_go_on]))

    def __reduce__(self) -> tuple[type, tuple[object, ...]]:
        return type(self), (self.what, self.run_dir, self.steps, self.cause, self.advice)


class RunDirectoryError(FSTError):
    """A run directory that is unreadable, foreign, or of another configuration."""


class ExportError(FSTError):
    """An exported folder could not be converted or uploaded."""


class DiskError(RunDirectoryError):
    """The disk refused to write, or gave back something else. What was committed is whole, and the run can go on."""


def is_signal(error: BaseException) -> bool:
    """Whether a signal ends the process by this exception, and not somebody's ``exit()``.

    What handlers of signals raise are KeyboardInterrupt and subclasses of SystemExit.
    """
    return isinstance(error, KeyboardInterrupt) or (isinstance(error, SystemExit) and type(error) is not SystemExit)


def meant(name: str, known: Sequence[str]) -> str:
    """``"; did you mean 'x'?"``, or nothing when nothing that is known is close."""
    close = difflib.get_close_matches(name, known, cutoff=0.65)  # its 0.6 takes "metrc" for "track" as well
    return f"; did you mean {' or '.join(map(repr, close))}?" if close else ""


def briefly(error: BaseException) -> str:
    """What an error says, on one line of at most 200 characters; its type where it says nothing."""
    text = " ".join(str(error).split())
    return (text if len(text) <= 200 else f"{text[:200]}...") or type(error).__name__


def imported(module: str) -> ModuleType:
    """A module, for the ``__getattr__`` of a package that imports its contents when they are first asked for.

    Raises:
        ImportError: an AttributeError came up while the module was imported. Python would take it for "there is no such
            name" and drop it.
    """
    try:
        return importlib.import_module(module)
    except AttributeError as error:
        raise ImportError(f"{module} cannot be imported: {error}", name=module) from error
