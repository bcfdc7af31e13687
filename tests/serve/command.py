"""`dspy-fst serve` in a process of its own."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import dspy
import httpx
import psutil

import dspy_fst
from dspy_fst.rollout.components import read_texts, with_texts
from dspy_fst.types import Candidate, Population
from programs.lab import BASE, build
from tests.serve.makers import PATH

ROOT = Path(__file__).parent.parent.parent
START_S = 240
END_S = 60
NUMBERS = {"inputs": {"numbers": "4 7 1 9"}}


def compiled_lab() -> dspy.Module:
    """The laboratory's base model as a compiled program of two candidates. Greedy: a question has one answer."""
    lab = build(train=4, val=0, test=0)
    lab.program.set_lm(dspy_fst.PolicyLM(BASE, engine="in_process", max_tokens=12, temperature=0.0))
    names = read_texts(lab.program).texts
    members = tuple(Candidate(dict.fromkeys(names, text)) for text in (lab.world.told, lab.world.seed_instruction))
    program = with_texts(lab.program, members[0])
    program.population = Population(members, (0.4, 0.1))
    return program


def saved_lab(folder: Path) -> Path:
    """`compiled_lab` in a folder."""
    return dspy_fst.save(compiled_lab(), folder)


class Server:
    """Its address, and its key if it made one, are read from what it prints."""

    def __init__(self, process: subprocess.Popen[str], key: str):
        self.process, self.key = process, key
        self.url = ""
        self.said: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.said.append(line.rstrip())
            if line.startswith("serving "):
                self.url = line.split(" at ")[1].split("/v1/")[0]
            if line.startswith("key: "):
                self.key = line.removeprefix("key: ").strip()

    def wait_for(self, true: Callable[[], bool], what: str, limit_s: float = START_S) -> None:
        until = time.monotonic() + limit_s
        while not true():
            assert self.process.poll() is None, f"it ended: {self.said}"
            assert time.monotonic() < until, f"waited {limit_s} s in vain until {what}: {self.said}"
            time.sleep(0.05)

    @property
    def auth(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"}

    def ready(self) -> bool:
        return bool(self.url) and httpx.get(f"{self.url}/ready", timeout=60).status_code == 200

    def ask(self, body: Any, path: str = PATH) -> httpx.Response:
        return httpx.post(self.url + path, json=body, headers=self.auth, timeout=120)

    def figure(self, start: str) -> float:
        """Sum of the figures at /metrics that begin so."""
        lines = httpx.get(f"{self.url}/metrics", headers=self.auth, timeout=30).text.splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(start))

    @property
    def vllm(self) -> dict[str, str]:
        """How an engine attaches to the vLLM server that the command started."""
        for process in psutil.Process(self.process.pid).children(recursive=True):
            with suppress(psutil.Error):
                command, key = process.cmdline(), process.environ().get("VLLM_API_KEY")
                if key and "--port" in command:
                    return {"attach_url": f"http://127.0.0.1:{command[command.index('--port') + 1]}", "api_key": key}
        raise AssertionError(f"there is none: {self.said}")

    def end(self) -> int:
        """Its exit code, once it has ended."""
        code = self.process.wait(END_S)
        self._reader.join(END_S)
        return code


@contextmanager
def serving(*arguments: object, cwd: Path = ROOT, key: str = "") -> Iterator[Server]:
    """The command on a free port; gives the server before it is ready."""
    command = [sys.executable, "-m", "dspy_fst.cli", "serve", "--port", "0", *map(str, arguments)]
    path = os.pathsep.join([str(ROOT), os.environ["PYTHONPATH"]])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": path}
    if key:
        command += ["--api-key-env", "KEY_OF_THE_TESTS"]
        environment["KEY_OF_THE_TESTS"] = key
    process = subprocess.Popen(
        command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        yield Server(process, key)
    finally:
        process.kill()
        process.wait(END_S)
