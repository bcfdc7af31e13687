"""FSTOptimizer: the alternation of fast and slow learning."""

import gc
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import dspy
from dspy.teleprompt import Teleprompter

from dspy_fst.config import unknown_settings
from dspy_fst.errors import ConfigurationError
from dspy_fst.fast.evolve import GEPAOptions
from dspy_fst.model_files.reach import IN_A_RUN_S
from dspy_fst.monitoring.progress import ProgressView, log_ending
from dspy_fst.monitoring.tracking import Track, Tracking, trackers_of
from dspy_fst.preflight.argument_checks import argument_faults
from dspy_fst.preflight.gepa_names import gepa_faults, gepa_kwargs_faults, selector_fault
from dspy_fst.rollout.reward import Metric
from dspy_fst.run.interrupts import ctrl_c_as_sentence, signals_raise
from dspy_fst.slow.ranks.joining import all_ranks
from dspy_fst.training.request import Arguments, Proposers, check
from dspy_fst.training.stored import fetch
from dspy_fst.types import Population

if TYPE_CHECKING:
    from dspy_fst.fast.fast_optimizer import FastOptimizer
    from dspy_fst.fast.teleprompter_search import Maker
    from dspy_fst.training.open_run import Listeners
    from dspy_fst.training.session import Session


class FSTOptimizer(Teleprompter):
    """Improve a DSPy program's instructions and its local LM's weights together (arXiv 2605.12484).

    >>> optimizer = FSTOptimizer(metric=metric, reflection_lm=dspy.LM("openai/gpt-5"))  # doctest: +SKIP
    >>> compiled = optimizer.compile(program, trainset=train, valset=val)              # doctest: +SKIP
    """

    def __init__(
        self,
        *,
        metric: Metric,
        reflection_lm: dspy.LM | None = None,
        propose: Callable[..., dict[str, str]] | None = None,
        code_proposer: Callable[..., dict[str, str]] | None = None,
        instruction_proposer: Callable[..., dict[str, str]] | None = None,
        component_selector: Callable[..., list[str]] | None = None,
        gepa_kwargs: Mapping[str, Any] | None = None,
        fast: "FastOptimizer | Teleprompter | Maker | None" = None,
        run_dir: str | Path | None = None,
        auto: Literal["light", "medium", "heavy"] | None = None,
        num_threads: int | None = None,
        seed: int = 0,
        track_stats: bool = True,
        progress: bool = True,
        show_samples: bool = False,
        listeners: Sequence[Callable[[Mapping[str, Any]], None]] = (),
        track: "Track | Sequence[Track]" = (),
        **recipe: Any,
    ):
        """Describe the run; work begins with `compile`.

        Args:
            metric: ``(gold, pred, trace=None) -> float`` or GEPA's ``(gold, pred, trace, pred_name, pred_trace)
                -> float | dspy.Prediction(score=..., feedback=...)``. Feedback is what the reflection reads. The
                prediction may also hold ``predictor_scores={name: float}``, by which those predictors' calls are
                credited instead of by ``score``, and ``predictor_feedback={name: text}``.
            reflection_lm: A strong, frozen LM that proposes instructions.
            propose: A proposer that needs no LM instead: gepa's ``(candidate, reflective_dataset,
                components_to_update) -> {component: text}``.
            code_proposer: A proposer of sources for the program's dspy.Flex modules: DSPy's ``(candidate,
                reflective_dataset, components_to_update, task_descriptions, context_blurbs) -> {component: source}``.
                Without it ``reflection_lm`` writes them.
            instruction_proposer: dspy.GEPA's: as ``propose``, but ``reflection_lm`` may be given beside it, as the LM
                of its context, e.g. for ``dspy.teleprompt.gepa.InstructionProposer(skills=...)``.
            component_selector: dspy.GEPA's: a function that chooses the texts which a proposal changes. The built-in
                ones are the setting ``components``.
            gepa_kwargs: Of gepa.optimize: ``callbacks`` and ``stop_callbacks``, as lists.
            fast: Searches for texts and demos in GEPA's place: a DSPy optimizer or its class, e.g. ``dspy.SIMBA``; with
                arguments of its ``compile`` ``TeleprompterSearch(dspy.MIPROv2, auto=None, num_trials=12)``; or a
                `dspy_fst.fast.fast_optimizer.FastOptimizer`.
            run_dir: Where the run is kept; the same directory and recipe continue a run. None makes a new
                directory under ``runs/``.
            auto: DSPy's budgets: ``"light"``, ``"medium"`` or ``"heavy"`` instead of ``cycles``: 2, 8 or 34.
            num_threads: Rollouts in flight.
            seed: Of every random draw.
            track_stats: Keep every report in ``compiled.detailed_results``.
            progress: Show a live view (a terminal) or plain lines (elsewhere).
            listeners: Functions that are told every event of the run.
            show_samples: Show one sampled reply after each step, of at most 200 characters, in the view or the lines.
            track: Experiment trackers by accelerate's names, e.g. ``"tensorboard"`` or ``["wandb", "mlflow"]``, or
                trackers made with settings of their own. A continued run may name others. mlflow, wandb and trackio
                also get the report and a model card when the run is finished.
            **recipe: Any other field of FSTConfig, e.g. ``cycles=4, learning_rate=1e-5``.

        Raises:
            ConfigurationError: arguments of a wrong kind, or names that are no setting, all of them with the one that
                was meant.
        """
        super().__init__()
        self.trackers, faults = trackers_of(track)
        switches = {"track_stats": track_stats, "progress": progress, "show_samples": show_samples}
        faults += argument_faults(run_dir, listeners, **switches)
        own = inspect.signature(FSTOptimizer).parameters
        of_gepa = gepa_faults(recipe)
        unknown = [name for name in recipe if name not in of_gepa]
        faults = [*of_gepa.values(), *gepa_kwargs_faults(gepa_kwargs), *faults]
        faults += [fault] if (fault := selector_fault(component_selector)) else []
        if propose is not None and instruction_proposer is not None:
            faults.append("propose and instruction_proposer are both given, and are the same thing; remove one of them")
        if faults := [*unknown_settings(unknown, [name for name in own if name != "recipe"]), *faults]:
            raise ConfigurationError(faults)
        self.metric, self.reflection_lm, self.propose = metric, reflection_lm, propose
        self.code_proposer, self.fast = code_proposer, fast
        self.instruction_proposer = instruction_proposer
        self.component_selector, self.gepa_kwargs = component_selector, dict(gepa_kwargs or {})
        self.run_dir, self.track_stats, self.progress = run_dir, track_stats, progress
        self.show_samples = show_samples
        self.listeners = tuple(listeners)
        self.recipe: dict[str, Any] = {"seed": seed, **recipe}
        if auto is not None:
            self.recipe["auto"] = auto
        if num_threads is not None:
            self.recipe["num_threads"] = num_threads

    def compile(  # type: ignore[override]  # nothing else is taken, so that a misspelt argument is an error
        self,
        student: dspy.Module,
        *,
        trainset: list[dspy.Example],
        teacher: dspy.Module | None = None,
        valset: list[dspy.Example] | None = None,
    ) -> dspy.Module:
        """Train a copy of the student; the student and its LM are left as they are.

        Args:
            student: Its trained predictors speak with one PolicyLM. A compiled program goes on from its
                weights and population.
            trainset: Problems of both phases.
            teacher: A program of the student's form. Before the first search the student's weights learn, supervised,
                from the traces of its rollouts that score well (`warm_start_score`). It may speak with any LM.
            valset: Measures the student before the start and the final population, and chooses the best of it, or the
                best state of the run (``return_best``). Without it nothing is compared, and the anchors' scores choose.

        Returns:
            A copy that speaks the best instructions with the trained weights, with ``population``,
            ``detailed_results``, ``summary()``, ``candidate_programs`` and ``_compiled`` set
            (see `dspy_fst.training.result`). The same program lies in ``run_dir/compiled``, for `dspy_fst.load`,
            `dspy-fst serve` and other commands.

        Raises:
            ConfigurationError: before any work, with every fault that was found.
            NothingLearnedError: so many steps in a row had no gradient (``max_unmoved_steps``), and no step before
                them. It names ``run_dir``; the same call with a higher limit goes on.
            FSTError: the run stopped; what it committed is whole, and the same call goes on from there.
            SystemExit: this process is one of several, and not the first of them: it has trained with rank 0, which
                is done (status 0). Or SIGTERM or SIGHUP came; like Ctrl-C it ends the run after everything was let go.
            KeyboardInterrupt: Ctrl-C; its text says what is saved. In a script it is a SystemExit as well, so that a
                script which does not catch it ends with 130 and without a traceback.
        """
        with ExitStack() as stack:
            ranks = stack.enter_context(all_ranks())
            stack.enter_context(ctrl_c_as_sentence(self.progress))
            stack.enter_context(signals_raise())
            title = Path(self.run_dir).name if self.run_dir else "run"
            view = stack.enter_context(ProgressView(title, samples=self.show_samples)) if self.progress else None
            tracking = Tracking(self.trackers)
            told: Listeners = [*([view] if view else []), *([tracking] if self.trackers else [])]
            given = self.arguments(student, trainset, valset, teacher)
            with nothing_collected():
                request = check(given, hub_s=IN_A_RUN_S)
                if fetch(request.config, request.run_dir):  # what the directory records counts now
                    request = check(replace(given, run_dir=request.run_dir), hub_s=IN_A_RUN_S)
                # torch and transformers take seconds to import: an argument that is refused does not wait for them.
                from dspy_fst.training.open_run import open_run
                from dspy_fst.training.result import compiled_program, keep_compiled
                from dspy_fst.training.run_documents import documents_of

            run = stack.enter_context(open_run(request, (*self.listeners, *told), ranks))
            if view:
                view.recall(run.run.events())
            stack.enter_context(tracking.following(run.run.path, run.run.events(), run.recorder.note))
            compiled = compiled_program(run, alternate(run), track_stats=self.track_stats)
            if view is None:
                log_ending(run.schedule.end, run.observer.ending.words)
            keep_compiled(compiled, run)
            tracking.keep(lambda: documents_of(run.run.path))
            return compiled

    def arguments(
        self,
        student: dspy.Module,
        trainset: list[dspy.Example],
        valset: list[dspy.Example] | None = None,
        teacher: dspy.Module | None = None,
    ) -> Arguments:
        """All that a run is made of, for `dspy_fst.training.request.check`: it starts nothing."""
        return Arguments(
            student=student,
            trainset=trainset,
            metric=self.metric,
            valset=valset,
            teacher=teacher,
            proposers=self._proposers(),
            run_dir=self.run_dir,
            settings=self.recipe,
        )

    def _proposers(self) -> Proposers:
        options = GEPAOptions(
            self.component_selector,
            tuple(self.gepa_kwargs.get("callbacks", ())),
            tuple(self.gepa_kwargs.get("stop_callbacks", ())),
        )
        proposer = self.propose or self.instruction_proposer
        return Proposers(self.reflection_lm, proposer, self.code_proposer, self.fast, options, self.propose is not None)


@contextmanager
def nothing_collected() -> Iterator[None]:
    """A block in which Python looks for no garbage. In one that imports torch and transformers there is next to none,
    and each look walks through all that was imported before: a seventh of the processor time of these imports."""
    looked = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if looked:
            gc.enable()


def alternate(run: "Session") -> Population:
    """Fast-Slow Training (paper, section 3): a cycle is one search over texts, then T updates of the weights."""
    population = run.population
    for cycle in run.cycles():
        if run.must_search(cycle):  # fast: text moves, weights do not
            search = run.search(cycle, population)
            population = search.population
            run.commit_search(cycle, search)
        for step in run.steps(cycle):  # slow: weights move, text does not
            groups = run.sample(step, population)
            seed_rollouts = run.sample_seed(step, population)
            batch = run.credit(groups, seed_rollouts)
            update = run.update(batch)
            if update.moved:
                run.publish(step + 1)
            run.commit_step(step, cycle, groups, batch, update, population)
    return population
