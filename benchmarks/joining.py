"""What it saves in process that calls join replies that are still sampled, beside waves that wait for the longest row.

    python -m benchmarks.joining --out benchmarks/results/joining.json

Callers ask one call after another, each for a reply whose length is drawn (exponential, cut at the longest). Both ways
are measured in turn on the laboratory's model: the passes through the model, which on a GPU are the time, the rows that
a pass holds on average, and seconds of this process's CPU.
"""

import argparse
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from dspy import lm15

from dspy_fst.engine import in_process
from dspy_fst.engine.base import Checkpoint
from dspy_fst.engine.generation import SideBySide
from dspy_fst.engine.in_process import InProcessEngine
from dspy_fst.engine.options import InProcessSettings
from programs.lab import BASE

CALLERS, CALLS, MEAN, LONGEST = 32, 192, 80, 480
PARTS = {"replies of 80 tokens, 480 at most": MEAN, "replies of 12 tokens, 480 at most": 12}


@contextmanager
def counted(rows: list[int]) -> Iterator[None]:
    """A block in which ``rows`` gets the number of unfinished replies of each pass."""
    step = SideBySide.step

    def counting(batch: SideBySide) -> object:
        rows.append(len(batch.calls))
        return step(batch)

    with mock.patch.object(SideBySide, "step", counting):
        yield


def sampled(engine: InProcessEngine, lengths: list[int]) -> dict[str, float]:
    rows: list[int] = []

    def ask(number: int) -> None:
        config = lm15.Config(max_tokens=lengths[number], temperature=1.0)
        message = lm15.Message.user(f"{number % 9} 2 3")
        engine.complete(lm15.Request(model="policy", messages=(message,), config=config), number)

    began = time.process_time()
    engine.expect(CALLERS)
    with counted(rows), ThreadPoolExecutor(CALLERS) as pool:
        asked = [pool.submit(ask, number) for number in range(len(lengths))]
        for left, one in zip(range(len(lengths), 0, -1), asked, strict=True):
            one.result()
            engine.expect(min(CALLERS, left - 1))
    seconds = time.process_time() - began
    return {"passes": len(rows), "rows in a pass": round(sum(rows) / len(rows), 1), "seconds": round(seconds, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    engine = InProcessEngine(InProcessSettings(device="cpu", dtype="float32", linger_s=0.2))
    engine.load(Checkpoint("base", BASE))
    found = {}
    with mock.patch.object(engine, "_eos", frozenset):
        for name, mean in PARTS.items():
            drawn = np.random.default_rng(0).exponential(mean, CALLS)
            lengths = [min(LONGEST, 1 + int(length)) for length in drawn]
            for way, joins in (("waves", False), ("joining", True)):
                with mock.patch.object(in_process, "JOIN_ON", {"cpu"} if joins else set()):
                    found[f"{name}, {way}"] = sampled(engine, lengths)
    engine.close()
    options.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(options.out.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
