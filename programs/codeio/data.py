"""Problems: small programs that we generate and really run, or those of CodeI/O with their recorded runs."""

import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import dspy

from programs.codeio.sandbox import run
from programs.common import PublicSet

PUBLIC = PublicSet(
    "hkust-nlp/CodeIO-PyEdu-Reasoning-Raw",
    revision="413a78caa01e634318ef8aa0e84f5ff242f25807",
    lines="0_368500_filtered_v2_ds25.sced.jsonl",
)
"""CodeI/O (arXiv 2502.07316), licence ODC-By. Inputs and outputs are of any type, hence read line by line."""

LONGEST_CODE, LONGEST_OUTPUT = 4000, 500
"""Characters of a public problem that we keep (ours): longer ones are cut off by the policy's context."""

BATCH = 64
"""Programs run by one sandboxed process: starting one costs more than running them."""

Line = Callable[[random.Random], str]


def _number(rng: random.Random) -> int:
    return rng.randint(2, 5)


STEPS: list[Line] = [
    lambda rng: f"xs = [x * {_number(rng)} - {_number(rng)} for x in xs]",
    lambda rng: f"xs = [x for x in xs if x % {_number(rng)} != {rng.randint(0, 1)}]",
    lambda rng: f"xs = sorted(xs, key=lambda x: (x % {_number(rng)}, x))",
    lambda rng: f"xs = xs[{_number(rng)}:] + xs[:{_number(rng)}]",
    lambda rng: f"xs = [x + i * {_number(rng)} for i, x in enumerate(xs)]",
    lambda rng: f"xs = xs[::{rng.choice((-1, 2, -2))}]",
    lambda rng: f"xs = [a - b for a, b in zip(xs, xs[1:])] + [{_number(rng)}]",
    lambda rng: f"for i in range(len(xs)):\n        if xs[i] > {5 * _number(rng)}:\n            xs[i] -= xs[0]",
    lambda rng: f"while xs and xs[-1] % {_number(rng)} == 0:\n        xs.pop()",
]
"""What a program does with its list, one or a few lines each."""

ENDS: list[Line] = [
    lambda rng: "return xs",
    lambda rng: "return sum(xs), len(xs)",
    lambda rng: f"return {{x % {_number(rng)}: x for x in xs}}",
    lambda rng: "return '-'.join(str(abs(x)) for x in xs)",
    lambda rng: f"return max(xs, default=0) > {5 * _number(rng)}",
    lambda rng: f"return sum(x for x in xs if x > {_number(rng)})",
    lambda rng: "return [xs[:2], xs[-2:]]",
]


def generated(count: int, seed: int) -> Iterator[dspy.Example]:
    """Programs with an input and the value that they really return, `count` different ones."""
    rng = random.Random(f"codeio-{seed}")
    inputs: dict[str, str] = {}
    while len(inputs) < count:  # there are millions of programs
        inputs.setdefault(_program(rng), str([rng.randint(0, 20) for _ in range(rng.randint(4, 7))]))
    calls = list(inputs.items())
    for start in range(0, count, BATCH):
        part = calls[start : start + BATCH]
        for (code, given), output in zip(part, outputs(part), strict=True):
            yield _example(code, given, output)


def _program(rng: random.Random) -> str:
    lines = [step(rng) for step in rng.sample(STEPS, rng.randint(2, 4))]
    return "\n    ".join(["def main(xs):", *lines, rng.choice(ENDS)(rng)])


def outputs(calls: Sequence[tuple[str, str]]) -> list[str]:
    """The `repr` of what each (code, input) returns, from one sandboxed process.

    Raises:
        RuntimeError: a program failed or took too long.
    """
    ran = run(
        f"for code, given in {calls!r}:\n"
        "    space = {}\n"
        "    exec(code, space)\n"
        "    print(repr(space['main'](eval(given))))\n"
    )
    if ran.ended != "done":
        raise RuntimeError(f"a generated program did not end well: {ran.ended} {ran.error}")
    return ran.output.splitlines()


def public_example(row: Mapping[str, Any]) -> dspy.Example | None:
    """The first recorded run of a row; None when there is none or it is too long."""
    runs = row.get("ios") or []
    if not runs or len(row["refcode"]) > LONGEST_CODE:
        return None
    call = {"function": row["funcname"], "arguments": runs[0]["input"]}
    output = repr(runs[0]["output"])
    return _example(row["refcode"], json.dumps(call), output) if len(output) <= LONGEST_OUTPUT else None


def _example(code: str, given: str, output: str) -> dspy.Example:
    return dspy.Example(code=code, input=given, output=output).with_inputs("code", "input")
