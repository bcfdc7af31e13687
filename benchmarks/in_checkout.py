"""One measurement in a process of its own, by the package of any checkout.

A benchmark is run again with its case in the environment variable `CASE`, by the whole of another checkout (`measured`)
or by its `dspy_fst` alone (`measured_by`).
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

CASE = "BENCHMARK_CASE"
"""Environment variable with what a process measures, as JSON."""
LIMIT_S = 7200


def measured(script: str, case: object, checkout: Path) -> tuple[dict[str, Any], str]:
    """The figures that the script prints on its last line as JSON, and what it wrote to stderr.

    Args:
        script: ``__file__`` of the benchmark. It reads `CASE` before it imports anything of `benchmarks`.
        case: What it measures; JSON can hold it.
        checkout: Whose `dspy_fst`, `benchmarks` and `tests` it uses.

    Raises:
        RuntimeError: the script failed; the message is its stderr.
    """
    path = str(Path(script).resolve())
    return _run(["-c", f"import runpy; runpy.run_path({path!r}, run_name='__main__')"], case, str(checkout), checkout)


def measured_by(module: str, case: object, checkout: Path) -> dict[str, Any]:
    """The figures that a module of this checkout's `benchmarks` prints on its last line, with one thread.

    Args:
        module: Its name; run as a script it asks `asked_case` first.
        case: What it measures; JSON can hold it.
        checkout: Whose `dspy_fst` it uses, beside this checkout's `benchmarks`.

    Raises:
        RuntimeError: the module failed; the message is its stderr.
    """
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / "dspy_fst").symlink_to(checkout.resolve() / "dspy_fst")
        path = os.pathsep.join([place, str(Path(__file__).resolve().parent.parent)])
        return _run(["-m", module], case, path, Path(place), OMP_NUM_THREADS="1")[0]


def asked_case() -> Any:
    """What this process measures; None where it is not one that measures a case."""
    return json.loads(os.environ[CASE]) if CASE in os.environ else None


def _run(what: list[str], case: object, path: str, folder: Path, **variables: str) -> tuple[dict[str, Any], str]:
    environment = {**os.environ, "PYTHONPATH": path, CASE: json.dumps(case), **variables}
    command = [sys.executable, *what]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=LIMIT_S
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures, done.stderr
