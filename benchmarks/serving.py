"""What serving costs beside the program itself, and what it does when it is asked too much.

    python -m benchmarks.serving --repeats 5

1. requests/s of the endpoint over calling the program in this process, side by side, as many at once: a program
   whose model costs nothing, where all is overhead, and the laboratory's model; with the latter, latency too;
2. 10,000 requests, each with an answer of its own: how many are lost or get another's;
3. more callers than there are places: every reply is an answer or a refusal.

Locust makes the load. Server and load run in processes of their own, each bounded in count and time; ratios and
counts only, for absolute times on a shared machine mean nothing. Needs the extra `benchmarks`.
"""

import argparse
import json
import re
import secrets
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

# Only the standard library up here: the process that makes the load must import locust before all others.

AT_ONCE = 16
"""Callers at once, in process and over HTTP."""
LIMIT_S = 900
"""Longest time of one process of load, and of a server's start."""
RESULT = Path(__file__).parent / "results" / "serving.json"
PATH = "/v1/program"


@dataclass(frozen=True)
class Load:
    """What a run of requests came to."""

    per_second: float
    median_s: float
    tail_s: float
    """99th percentile."""
    statuses: dict[str, int]
    """HTTP status -> replies; ``"0"`` are requests without any reply."""
    wrong: int
    """Successes that were not the answer to their question."""

    @classmethod
    def of(cls, seconds: float, latencies: Sequence[float], statuses: Counter[str], wrong: int) -> "Load":
        cuts = statistics.quantiles(latencies, n=100, method="inclusive")
        return cls(len(latencies) / seconds, cuts[49], cuts[98], dict(statuses), wrong)


@dataclass(frozen=True)
class Problem:
    """One request and the outputs that it must get; None when the program itself gives none."""

    inputs: dict[str, str]
    outputs: dict[str, str] | None


# ---- the two programs ---------------------------------------------------------------------------


def echo_program() -> Any:
    """A program that gives back what it is asked, through a model that costs nothing."""
    import dspy

    from dspy_fst.engine.chat import ChatMessage
    from tests.fakes import fields, scripted_policy

    def speak(messages: list[ChatMessage], seed: int) -> str:
        question = re.search(r"\[\[ ## question ## \]\]\n(.*)\n", messages[-1]["content"])
        assert question is not None
        return fields(answer=f"echo {question[1]}")

    policy, _ = scripted_policy(speak)
    program = dspy.Predict("question: str -> answer: str")
    program.set_lm(policy)
    return _compiled(program)


def lab_program() -> Any:
    """The laboratory's program on its base model, told the rule. Greedy, so that every question has one answer."""
    from dspy_fst import PolicyLM
    from programs.lab import BASE, build

    lab = build(train=4, val=0, test=0)
    lab.program.set_lm(PolicyLM(BASE, engine="in_process", max_tokens=16, temperature=0.0))
    lab.program.solve.signature = lab.program.solve.signature.with_instructions(lab.world.told)
    return _compiled(lab.program)


def _compiled(program: Any) -> Any:
    from dspy_fst.rollout.components import read_texts
    from dspy_fst.types import Population

    program.population = Population.of_seed(read_texts(program), 1)
    return program


PROGRAMS: dict[str, Callable[[], Any]] = {"echo": echo_program, "lab": lab_program}


def questions(kind: str, count: int) -> list[dict[str, str]]:
    """Inputs of which no two are equal."""
    if kind == "echo":
        return [{"question": f"number {index}"} for index in range(count)]
    from programs.lab import build

    return [{"numbers": example.numbers} for example in build(train=count, val=0, test=0).trainset]


# ---- in process ---------------------------------------------------------------------------------


def in_process(program: Any, asked: Sequence[dict[str, str]]) -> tuple[Load, list[Problem]]:
    """Call the program from as many threads as there are callers."""
    import dspy
    from dspy.utils.exceptions import AdapterParseError

    latencies: list[float] = []

    def call(inputs: dict[str, str]) -> Problem:
        started = time.perf_counter()
        with dspy.context(trace=[], disable_history=True):
            try:
                outputs = dict(program(**inputs).items())
            except AdapterParseError:
                outputs = None
        latencies.append(time.perf_counter() - started)
        return Problem(inputs, outputs)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        started = time.perf_counter()
        problems = list(pool.map(call, asked))
        seconds = time.perf_counter() - started
    statuses = Counter("200" if problem.outputs else "502" for problem in problems)
    return Load.of(seconds, latencies, statuses, 0), problems


# ---- over HTTP ----------------------------------------------------------------------------------


def serve_forever(kind: str, settings: str) -> None:
    """Of the server's process."""
    from dspy_fst.serve.app import create_app
    from dspy_fst.serve.listening import serve
    from dspy_fst.serve.serving_settings import ServeSettings

    chosen = ServeSettings(**json.loads(settings))
    serve(create_app(PROGRAMS[kind](), chosen), chosen)


def make_load(url: str, key: str, file: str, users: int) -> None:
    """Of the load's process: every problem once, then print the Load."""
    import gevent  # type: ignore[import-untyped]
    from locust import FastHttpUser, constant, task
    from locust.env import Environment
    from locust.exception import StopUser

    problems: list[dict[str, Any]] = json.loads(Path(file).read_text())
    waiting: Iterator[dict[str, Any]] = iter(problems)
    latencies: list[float] = []
    statuses: Counter[str] = Counter()
    wrong: list[str] = []

    class Caller(FastHttpUser):
        host = url
        wait_time = constant(0)

        @task
        def ask(self) -> None:
            if (problem := next(waiting, None)) is None:
                raise StopUser
            started = time.perf_counter()
            headers = {"Authorization": f"Bearer {key}"}
            body = {"inputs": problem["inputs"]}
            with self.client.post(PATH, json=body, headers=headers, catch_response=True) as reply:
                latencies.append(time.perf_counter() - started)
                statuses[str(reply.status_code)] += 1
                reply.success()
                if reply.status_code == 200 and reply.json()["outputs"] != problem["outputs"]:
                    wrong.append(reply.text)

    runner = Environment(user_classes=[Caller]).create_local_runner()
    started = time.perf_counter()
    with gevent.Timeout(LIMIT_S):
        runner.start(users, spawn_rate=users)
        while len(latencies) < len(problems):
            gevent.sleep(0.02)
    seconds = time.perf_counter() - started
    runner.quit()
    print(json.dumps(asdict(Load.of(seconds, latencies, statuses, len(wrong)))))


@contextmanager
def server(kind: str, **settings: Any) -> Iterator[Callable[[Sequence[Problem], int], Load]]:
    """A server in its own process; gives a function that loads it with problems, from so many callers."""
    import httpx

    key = secrets.token_urlsafe(32)
    chosen = json.dumps({"api_key": key, "port": 0, "timeout_s": 300, **settings})
    process = subprocess.Popen(_command("serve", kind, chosen), stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        line = process.stderr.readline()
        address = re.search(r"http://[^/]+", line)
        if address is None:
            raise RuntimeError(f"the server did not start: {line}{process.stderr.read()}")
        # A pipe that nobody reads is full after 64 KiB of log, and then the server waits for ever.
        threading.Thread(target=_drain, args=[process.stderr], daemon=True).start()
        until = time.monotonic() + LIMIT_S
        while httpx.get(f"{address[0]}/ready", timeout=LIMIT_S).status_code != 200:
            if time.monotonic() > until:
                raise RuntimeError(f"waited {LIMIT_S} s in vain for the server to be ready")
            time.sleep(0.1)

        def load(problems: Sequence[Problem], users: int) -> Load:
            with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
                json.dump([asdict(problem) for problem in problems], file)
                file.flush()
                command = _command("load", address[0], key, file.name, str(users))
                said = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=LIMIT_S + 60, check=True)
            return Load(**json.loads(said.stdout.splitlines()[-1]))

        yield load
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=120)


def _drain(said: IO[str]) -> None:
    """Pass on what the server says."""
    for line in said:
        sys.stderr.write(line)


def _command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "benchmarks.serving", *arguments]


# ---- the measurements ---------------------------------------------------------------------------


def side_by_side(kind: str, count: int, repeats: int) -> dict[str, list[float]]:
    """The endpoint over the program, in turns, so that both meet the same machine."""
    program, asked = PROGRAMS[kind](), questions(kind, count)
    found: dict[str, list[float]] = {"requests/s": [], "median latency": [], "99th percentile": [], "lost or wrong": []}
    with server(kind) as load:
        _, problems = in_process(program, asked)
        load(problems[: 4 * AT_ONCE], AT_ONCE)  # warm
        for _ in range(repeats):
            here, _ = in_process(program, asked)
            there = load(problems, AT_ONCE)
            found["requests/s"].append(there.per_second / here.per_second)
            found["median latency"].append(there.median_s / here.median_s)
            found["99th percentile"].append(there.tail_s / here.tail_s)
            found["lost or wrong"].append(_lost(there, len(asked), here.statuses))
    next(iter(program.named_predictors()))[1].lm.release()
    return found


def _lost(load: Load, count: int, expected: dict[str, int]) -> int:
    """Requests that did not get what the program in process gave to the same question."""
    answered = sum(min(load.statuses.get(status, 0), due) for status, due in expected.items())
    return count - answered + load.wrong


def many(count: int) -> Load:
    """Every request of thousands has an answer of its own."""
    asked = questions("echo", count)
    problems = [Problem(inputs, {"answer": f"echo {inputs['question']}"}) for inputs in asked]
    with server("echo") as load:
        return load(problems, AT_ONCE)


def overload(count: int) -> Load:
    """Eight callers for every place, at work or in line."""
    asked = questions("echo", count)
    problems = [Problem(inputs, {"answer": f"echo {inputs['question']}"}) for inputs in asked]
    with server("echo", max_in_flight=2, max_queue=2) as load:
        return load(problems, 32)


def main(arguments: Sequence[str] | None = None) -> None:
    from rich.console import Console

    from benchmarks.readme import serving as table
    from dspy_fst.run.files import write_json

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args(arguments)
    rows: dict[str, dict[str, Any]] = {}

    def measure(name: str, aim: str, values: Sequence[float]) -> None:
        rows[name] = {"aim": aim, "median": statistics.median(values), "values": list(values)}
        Console(stderr=True).print(f"{name}: {statistics.median(values):.3g}")

    def count(name: str, faults: Sequence[float]) -> None:
        """Their sum: the median of [0, 0, 37] would hide them."""
        rows[name] = {"aim": "0", "sum": sum(faults), "values": list(faults)}
        Console(stderr=True).print(f"{name}: {sum(faults)}")

    free, model = side_by_side("echo", 1_000, options.repeats), side_by_side("lab", 600, options.repeats)
    measure("endpoint requests/s over program calls/s, a model that costs nothing", "-", free["requests/s"])
    measure("endpoint requests/s over program calls/s, 1M", ">= 0.8", model["requests/s"])
    measure("endpoint median latency over program's, 16 callers, 1M", "-", model["median latency"])
    measure("endpoint 99th percentile latency over program's, 16 callers, 1M", "-", model["99th percentile"])
    count(f"lost or mixed-up answers of {options.repeats} x 600, 1M", model["lost or wrong"])
    whole = many(options.requests)
    lost = _lost(whole, options.requests, {"200": options.requests})
    count(f"lost or mixed-up answers of {options.requests:,}, a model that costs nothing", [lost])
    crowd = overload(2_000)
    told = crowd.statuses.get("200", 0) + crowd.statuses.get("429", 0) + crowd.statuses.get("503", 0) - crowd.wrong
    measure("overload: share of requests answered or told to come back", "1", [told / 2_000])
    measure("overload: share of requests refused with 429", "-", [crowd.statuses.get("429", 0) / 2_000])
    print(table(rows))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(options.out, rows)


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        serve_forever(*sys.argv[2:])
    elif sys.argv[1:2] == ["load"]:
        url, key, file, users = sys.argv[2:]
        make_load(url, key, file, int(users))
    else:
        main()
