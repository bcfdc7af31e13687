"""What rollouts would save as tasks of one event loop, beside the threads that a run has.

    python -m benchmarks.async_rollouts --out benchmarks/results/async_rollouts.json

The same rollouts of the laboratory's program in process, in turns: as `Rollouter` makes them; as tasks that await
``program.acall`` and the engine's own future; and as such tasks without the two jumps into a thread that DSPy makes
in each awaited call, which no program can leave out. Time is the process's own, for each rollout.
"""

import argparse
import asyncio
import gc
import json
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import dspy
import torch
from dspy import lm15
from dspy.utils.exceptions import AdapterParseError

from benchmarks.throughput import GROUP, MAX_TOKENS, PROBLEMS
from dspy_fst import PolicyLM
from dspy_fst.engine.base import Completion
from dspy_fst.engine.chat import text_response
from dspy_fst.engine.generation import Pending
from dspy_fst.policy_lm import EngineHandle
from dspy_fst.rollout.call_recorder import SETTING, Recording, _begun, tag_predictors
from dspy_fst.rollout.components import read_texts, with_texts
from dspy_fst.rollout.copying import Copier
from dspy_fst.rollout.outages import Outages
from dspy_fst.rollout.parse_failures import Entry, ParseFailures
from dspy_fst.rollout.reward import Reward
from dspy_fst.rollout.rollout_settings import RolloutSettings
from dspy_fst.rollout.rollouter import FormattedOnce, Listeners, Rollouter, Task, _quiet
from dspy_fst.types import Population, Problem, Rollout
from programs.lab import BASE, build

IN_FLIGHT = (64, 256)
THREADS, TASKS, BARE_TASKS = "threads", "tasks", "tasks without DSPy's threads"


class AwaitingHandle:
    """The engine in process for ``acall``: a call waits for its future, and no thread does."""

    def __init__(self, handle: EngineHandle):
        self._handle = handle

    async def complete(self, request: lm15.Request) -> lm15.Response:
        seed, prompt_ids, record = _begun(dspy.settings.get(SETTING), request, self._handle._continued)
        completion = await _completed(self._handle.ready(), request, seed, prompt_ids)
        record(completion)
        return completion.response

    def __deepcopy__(self, memo: dict[int, object]) -> "AwaitingHandle":
        return self


async def _completed(engine: Any, request: lm15.Request, seed: int, prompt_ids: Any) -> Completion:
    """`InProcessEngine.complete`, awaited."""
    prompt = engine._render(request) if prompt_ids is None else prompt_ids
    call = Pending(prompt, engine._longest_reply(prompt, request.config.max_tokens), 1.0, seed, None)
    answered = asyncio.wrap_future(call.reply)
    with engine._lock:
        engine._pending.append(call)
        engine._wake()
    reply = await answered
    ids = reply.ids[:-1] if reply.finish_reason == "stop" else reply.ids
    text = engine._tokenizer.decode(ids, skip_special_tokens=True)
    response = text_response(request.model, text, reply.finish_reason, len(prompt), len(reply.ids))
    tokens = (prompt, tuple(reply.ids), tuple(reply.logprobs))
    return Completion(response, *tokens, reply.finish_reason, reply.weights)


class OnOneLoop(Rollouter):
    """Makes rollouts as tasks of one event loop, without time limits and without a judgement of what went wrong."""

    def rollout(self, tasks: Sequence[Task], draw: str, *_: object, **__: object) -> list[Rollout]:
        with _quiet():
            return asyncio.run(self._all(tasks, draw))

    async def _all(self, tasks: Sequence[Task], draw: str) -> list[Rollout]:
        bound = {task.candidate.digest: with_texts(self.program, task.candidate) for task in tasks}
        for program in bound.values():
            tag_predictors(program)
        copiers = {digest: Copier(program) for digest, program in bound.items()}
        formatted, todo, found = FormattedOnce(), iter(range(len(tasks))), dict[int, Rollout]()

        async def work() -> None:
            for i in todo:
                self._in_flight(min(len(tasks) - len(found), self.settings.num_threads))
                program = copiers[tasks[i].candidate.digest].copy(lean=True)
                found[i] = await self._one(tasks[i], program, Recording(self._seed(tasks[i], draw)), formatted)
            self._in_flight(min(len(tasks) - len(found), self.settings.num_threads))

        await asyncio.gather(*(work() for _ in range(self.settings.num_threads)))
        return [found[i] for i in range(len(tasks))]

    async def _one(self, task: Task, program: Any, recording: Recording, formatted: FormattedOnce) -> Rollout:
        trace: list[Entry] = []
        listeners = [Listeners(ParseFailures(trace), Outages())]
        settings = {SETTING: recording, "callbacks": listeners, "trace": trace, "disable_history": True}
        try:
            with dspy.context(**settings, **formatted.settings()):
                prediction = await program.acall(**task.problem.example.inputs())
        except AdapterParseError:
            reward = self.settings.format_failure_score
        else:
            reward = self.reward(task.problem.example, prediction, trace).value
        return Rollout(task.problem.index, task.candidate, recording.close(), reward)


async def _at_once(function: Callable[..., Any], /, *arguments: Any, **named: Any) -> Any:
    return function(*arguments, **named)


async def _awaited(program: Any, numbers: str) -> dspy.Prediction:
    return await program.solve.acall(numbers=numbers)


def in_turn(ways: Sequence[str], turn: int) -> list[str]:
    """The ways, with another one first each time: whoever comes later meets what the others left behind."""
    first = turn % len(ways)
    return [*ways[first:], *ways[:first]]


def measured(in_flight: int, repeats: int) -> dict[str, Any]:
    """Milliseconds and switches of threads for each rollout, and how much longer threads took in the same turn."""
    lab = build()
    setattr(type(lab.program), "aforward", _awaited)  # noqa: B010 (mypy refuses a plain assignment)
    policy = PolicyLM(BASE, engine="in_process", max_tokens=MAX_TOKENS)
    lab.program.set_lm(policy)
    policy._async_engine_spec = AwaitingHandle(policy.handle)
    parts = (lab.program, Reward(lab.metric), RolloutSettings(num_threads=in_flight), policy.handle.ready().expect)
    made_by = {THREADS: Rollouter(*parts), TASKS: OnOneLoop(*parts), BARE_TASKS: OnOneLoop(*parts)}
    problems = [Problem(i, example) for i, example in enumerate(lab.trainset[:PROBLEMS])]
    population = Population.of_seed(read_texts(lab.program), 4)
    cost: dict[str, list[float]] = {way: [] for way in made_by}
    switches: dict[str, list[float]] = {way: [] for way in made_by}
    for turn in range(repeats + 1):  # the first is not counted
        sampled = set()
        for way in in_turn(list(made_by), turn):
            gc.collect()
            began, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF)
            with mock.patch.object(asyncio, "to_thread", _at_once if way == BARE_TASKS else asyncio.to_thread):
                groups = made_by[way].groups(problems, population, GROUP, f"draw {turn}")
            rollouts = [rollout for group in groups for rollout in group.rollouts]
            sampled.add(tuple((call.completion_ids, rollout.reward) for rollout in rollouts for call in rollout.calls))
            if turn:
                cost[way].append((time.process_time() - began) / len(rollouts) * 1e3)
                now = resource.getrusage(resource.RUSAGE_SELF)
                switches[way].append((now.ru_nvcsw - before.ru_nvcsw) / len(rollouts))
        assert len(sampled) == 1, "the ways sampled different replies"
    policy.release()
    ratios = {way: [a / b for a, b in zip(cost[THREADS], cost[way], strict=True)] for way in (TASKS, BARE_TASKS)}
    return {
        "ms of processor time for each rollout": {way: _spread(times) for way, times in cost.items()},
        "switches of threads for each rollout": {way: round(statistics.median(n), 1) for way, n in switches.items()},
        "threads over": {way: _spread(values) for way, values in ratios.items()},
    }


def _spread(values: Sequence[float]) -> dict[str, float]:
    low, _, high = statistics.quantiles(values, n=4)
    found = {"median": statistics.median(values), "lower quartile": low, "upper quartile": high, "least": min(values)}
    return {name: round(value, 2) for name, value in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = {f"{count} in flight": measured(count, options.repeats) for count in IN_FLIGHT}
    options.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(options.out.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
