"""One measurement in a process of its own, by the package of any checkout.

A script is run again with its case in the environment variable `CASE`. It must read that variable before it imports
anything of `benchmarks`: another checkout need not have it.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

CASE = "BENCHMARK_CASE"


def measured(script: str, case: object, checkout: Path) -> tuple[dict[str, Any], str]:
    """The figures that the script prints on its last line as JSON, and what it wrote to stderr.

    Args:
        script: ``__file__`` of the benchmark.
        case: What it measures; JSON can hold it.
        checkout: Whose `dspy_fst` it uses.

    Raises:
        RuntimeError: the script failed; the message is its stderr.
    """
    path = str(Path(script).resolve())
    command = [sys.executable, "-c", f"import runpy; runpy.run_path({path!r}, run_name='__main__')"]
    environment = {**os.environ, "PYTHONPATH": str(checkout), CASE: json.dumps(case)}
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures, done.stderr
