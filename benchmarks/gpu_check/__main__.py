"""The command: ``python -m benchmarks.gpu_check`` (see the package). Standard library only: it may install the rest."""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu_check.wheels import joined

RESULT = Path(__file__).parents[1] / "results" / "gpu_check.json"
INSTALLED = "DSPY_FST_GPU_CHECK_SITE"
"""Environment variable: where the wheels were installed; set for the process that then runs the parts."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Install the wheels, run the parts, print the tables; the status is 0 when no part failed."""
    options = _parser().parse_args(arguments)
    if options.wheels and INSTALLED not in os.environ:
        return _again_with(options.wheels, sys.argv[1:] if arguments is None else list(arguments))
    from benchmarks.gpu_check.runner import check

    out = options.out or (None if options.rehearse else RESULT)
    return check(options.minutes * 60, rehearse=options.rehearse, only=options.only, out=out)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=__doc__)
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything (default 8)")
    parser.add_argument("--wheels", type=Path, action="append", help="folder of wheels to install first; repeatable")
    parser.add_argument("--rehearse", action="store_true", help="tiny models on the CPU: does every part run?")
    parser.add_argument("--only", nargs="+", metavar="PART", help="parts whose names begin so")
    parser.add_argument("--out", type=Path, help=f"JSON file (default {RESULT.name}; none for a rehearsal)")
    return parser


def _again_with(folders: Sequence[Path], arguments: list[str]) -> int:
    """Install every wheel of the folders into a folder of its own, without an index, and run again with it."""
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as scratch:
        site = Path(scratch) / "site"
        wheels = joined(folders, Path(scratch))
        quiet = ("-q", "--no-index", "--no-deps", "--no-compile", "--no-cache-dir", "--disable-pip-version-check")
        command = [sys.executable, "-m", "pip", "install", *quiet, "--target", str(site), *map(str, wheels)]
        if subprocess.run(command, timeout=300).returncode:
            print(f"the wheels of {', '.join(map(str, folders))} could not be installed", file=sys.stderr)
            return 1
        path = os.pathsep.join(filter(None, [str(site), os.getcwd(), os.environ.get("PYTHONPATH")]))
        environment = os.environ | {"PYTHONPATH": path, INSTALLED: str(site)}
        return subprocess.run([sys.executable, "-m", __package__, *arguments], env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
