"""`Service`: the program and its population, its engine, and the answer to one request."""

import asyncio
import logging
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import cast

import dspy
from pydantic import BaseModel

from dspy_fst.errors import ConfigurationError
from dspy_fst.policy_lm import PolicyLM, policy_of
from dspy_fst.rollout.call_recorder import Recording, tag_predictors
from dspy_fst.rollout.components import with_texts
from dspy_fst.rollout.copying import Copier
from dspy_fst.serve.admission import AdmissionQueue, Ticket
from dspy_fst.serve.chat_completions import Chat
from dspy_fst.serve.chat_models import served_models
from dspy_fst.serve.choice import ballot, decided, speakers, vote_faults
from dspy_fst.serve.events import Feed
from dspy_fst.serve.prometheus import Metrics
from dspy_fst.serve.schema import schema_of
from dspy_fst.serve.serving_settings import ServeSettings
from dspy_fst.serve.stream import SETTING, Deltas, ModuleEvents, streaming_lm
from dspy_fst.serve.upstream import Addressed, Upstream
from dspy_fst.serve.worker import in_thread, run_program
from dspy_fst.types import Candidate, Population

logger = logging.getLogger(__name__)
SEED_BITS = 53
"""Bits of the largest seed: JSON readers keep integers exactly up to this many."""


class Meta(BaseModel):
    """How an answer was made."""

    candidate: str
    """Digest of the candidate that answered."""
    choice: str
    weights: str
    seed: int
    """The same seed gives the same answer again, up to the server's batching."""
    prompt_tokens: int
    completion_tokens: int
    """Of the trained model, summed over all candidates that were asked."""
    agreement: float | None = None
    """Share of the population that gave this answer; null without a vote."""


@dataclass(frozen=True)
class Answer:
    outputs: BaseModel
    meta: Meta


class Service:
    """Starts and releases the engine, and answers requests with the program.

    Args:
        program: Compiled by FSTOptimizer, or loaded; it is not changed.

    Raises:
        ConfigurationError: the program cannot be served, or not with these settings.
    """

    def __init__(self, program: dspy.Module, settings: ServeSettings):
        self.settings = settings
        self.population = _population_of(program)
        self.schema = schema_of(program, settings.signature)
        if settings.choice == "vote" and (faults := vote_faults(self.schema.outputs, settings.vote_on)):
            raise ConfigurationError(faults)
        self.models = served_models(program, settings.model_name)
        self.name = type(program).__name__
        self.policy: PolicyLM = policy_of(program)
        self.engine = self.policy.handle.engine  # read once: the handle is locked while it starts its engine
        self._upstreams = self._made_upstreams() if hasattr(self.engine, "address") else {}
        self.upstream = next(iter(self._upstreams.values()), None)
        self.queue = AdmissionQueue(settings.max_in_flight, settings.max_queue)
        self.metrics = Metrics(self.queue)
        self.failure: BaseException | None = None
        """Why the engine could not be started."""
        self._releasing = False
        self._last, last = program.named_predictors()[-1]
        self._last_fields = list(last.signature.output_fields)
        self._programs = {member.digest: self._program_of(program, member) for member in self.population.unique()}

    def _made_upstreams(self) -> dict[str | None, Upstream]:
        """LoRA adapter -> a client that asks the engine's server through it; of weights without one: None -> client."""
        engine, timeout_s = cast(Addressed, self.engine), self.settings.timeout_s
        adapters = {adapter.name: adapter.path for adapter in self.policy.checkpoint.adapters}
        if not adapters:
            return {None: Upstream(engine, timeout_s)}
        return {name: Upstream(engine, timeout_s, path) for name, path in adapters.items()}

    def _upstream_of(self, lora_adapter: str | None) -> Upstream | None:
        """The client through which an LM's replies are streamed; None where they are not: in process, and of the base
        beside several LoRA adapters, which only the engine may ask."""
        adapter = self.policy.checkpoint.adapter(lora_adapter)
        return self._upstreams.get(adapter.name if adapter else None)

    def chats(self) -> dict[str, Chat]:
        """Name at the chat endpoint -> what answers there."""
        return {
            name: Chat(name, model.policy, self.engine, self._upstream_of(model.adapter), self.metrics, model.adapter)
            for name, model in self.models.items()
        }

    def _program_of(self, program: dspy.Module, candidate: Candidate) -> Copier:
        """Makes copies of the program that speak with this candidate's texts."""
        with_candidate = with_texts(program, candidate)
        tag_predictors(with_candidate)
        lms: dict[PolicyLM, PolicyLM] = {}  # one LM must stay one: BestOfN and Refine refuse a module of two
        for _, predictor in with_candidate.named_predictors():
            if isinstance(lm := predictor.lm, PolicyLM) and (upstream := self._upstream_of(lm.lora_adapter)):
                predictor.lm = lms.setdefault(lm, streaming_lm(lm, upstream))
        return Copier(with_candidate)

    # ---- the engine ----------------------------------------------------------------------------

    async def start(self) -> None:
        """Start the engine. A failure is kept in ``failure``."""
        try:
            await in_thread(self.policy.handle.ready)
        except Exception as error:
            self.failure = error
            if self._releasing:
                logger.info("the server ended while its engine was being started")
            else:
                logger.error("the engine could not be started: %s", error)

    async def release(self) -> None:
        self._releasing = True
        await in_thread(self._release)

    def _release(self) -> None:
        self.engine.close()  # first: this works also while another thread starts the engine
        self.policy.release()
        for upstream in self._upstreams.values():
            upstream.close()

    def not_ready(self) -> str | None:
        """Why no request can be answered now, or None."""
        if self.failure is not None:
            return "The engine could not be started; the server's log says why."
        # An engine with a server names its weights while they are being loaded; it has an address only afterwards.
        if self.engine.weights is None or (self.upstream is not None and self.upstream.address is None):
            return "The engine does not serve its weights now; it is being started."
        if self.queue.stuck() >= self.queue.slots:
            return "Every slot is taken by a request that has timed out."
        return None

    # ---- one request ---------------------------------------------------------------------------

    async def answer(
        self, inputs: BaseModel, seed: int | None, ticket: Ticket, context: Mapping[str, object] | None = None
    ) -> Answer:
        """Ask the candidates that the setting ``choice`` names.

        Args:
            context: Further DSPy settings for the runs of the program.

        Raises:
            ApiError: no candidate answered.
        """
        seed = secrets.randbits(SEED_BITS) if seed is None else seed
        ranks = speakers(self.settings.choice, len(self.population.members), seed)
        recordings = [Recording(hash((seed, rank))) for rank in ranks]
        why = "the request was answered"
        try:
            outcomes = await asyncio.gather(
                *(
                    in_thread(partial(self._run, rank, inputs, recording, context or {}), ticket)
                    for rank, recording in zip(ranks, recordings, strict=True)
                ),
                return_exceptions=True,
            )
        except asyncio.CancelledError:
            why = ticket.why_over
            raise
        finally:  # also when the request is abandoned: threads that still run must not call the model any more
            calls = [call for recording in recordings for call in recording.close(why)]
            read, sampled = sum(len(c.prompt_ids) for c in calls), sum(len(c.completion_ids) for c in calls)
            self.metrics.tokens(read, sampled)
        winner, agreement = self._decide(outcomes)
        meta = Meta(
            candidate=self.population.members[ranks[winner]].digest,
            choice=self.settings.choice,
            weights=str(self.engine.weights),
            seed=seed,
            prompt_tokens=read,
            completion_tokens=sampled,
            agreement=agreement,
        )
        return Answer(outcomes[winner], meta)  # type: ignore[arg-type]

    async def tell(self, inputs: BaseModel, seed: int | None, ticket: Ticket, feed: Feed) -> None:
        """Answer, and send what each module says on the way."""
        callbacks = [*dspy.settings.get("callbacks", []), ModuleEvents(feed.send)]
        context: dict[str, object] = {"callbacks": callbacks}
        if self.upstream is not None:
            context[SETTING] = Deltas(self._last, self._last_fields, feed.send)
        feed.send({"tokens": self.upstream is not None}, "start")
        answer = await self.answer(inputs, seed, ticket, context)
        reply = {"outputs": answer.outputs.model_dump(mode="json"), "meta": answer.meta.model_dump()}
        feed.send(reply, "result")

    def _run(self, rank: int, inputs: BaseModel, recording: Recording, context: Mapping[str, object]) -> BaseModel:
        program = self._programs[self.population.members[rank].digest]
        given = {name: getattr(inputs, name) for name in type(inputs).model_fields}
        return run_program(program, given, self.schema.outputs, recording, context)

    def _decide(self, outcomes: list[BaseModel | BaseException]) -> tuple[int, float | None]:
        """Index of the outcome that is the answer, and the share that agrees with it."""
        given = [outcome if isinstance(outcome, BaseModel) else None for outcome in outcomes]
        if not any(outcome is not None for outcome in given):
            first = outcomes[0]
            assert isinstance(first, BaseException)
            raise first
        if self.settings.choice != "vote":
            return 0, None
        ballots = [None if outcome is None else ballot(outcome, self.settings.vote_on) for outcome in given]
        return decided(ballots)


def _population_of(program: dspy.Module) -> Population:
    population = getattr(program, "population", None)
    if not isinstance(population, Population):
        raise ConfigurationError(
            ["program: it has no population; serve what FSTOptimizer.compile or dspy_fst.load returns"]
        )
    return population
