"""The scripts in findings/ install packages and are not run here. Their form and their table are held."""

import os
import re
import subprocess
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "findings"
SCRIPTS = sorted(FOLDER.glob("*.sh"))
LABELS = ["Finding", "Packages", "Guess", "Behaviour", "Who meets it", "Here", "Output seen"]
PINNED = re.compile(r"[A-Za-z0-9._-]+(\[[a-z]+\])?==[0-9][0-9a-z.]*")


def header(script: Path) -> list[str]:
    """The comment lines at the script's beginning, without their marks."""
    lines = script.read_text(encoding="utf-8").splitlines()[1:]
    end = next(number for number, line in enumerate(lines) if not line.startswith("#"))
    return [line[2:] for line in lines[:end]]


def parts(script: Path) -> dict[str, str]:
    """Label -> what the header says under it, on one line."""
    said: dict[str, str] = {}
    for line in header(script):
        label = next((label for label in LABELS if line.startswith((f"{label}: ", f"{label} ("))), None)
        if label is not None:
            said[label] = line.removeprefix(f"{label}: ")
        else:
            said[next(reversed(said))] += f" {line}"
    return said


def packages(script: Path) -> list[str]:
    return parts(script)["Packages"].split()


def code(script: Path) -> str:
    return script.read_text(encoding="utf-8").split("\nset -euo pipefail\n", 1)[1]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_the_header_says_what_was_guessed_what_happens_and_what_was_seen(script):
    lines = header(script)
    labels = [label for line in lines for label in LABELS if line.startswith(label) and not line.startswith(" ")]
    assert labels == LABELS
    said = lines.index(next(line for line in lines if line.startswith("Output seen")))
    assert lines[said + 1 :]
    assert all(line.startswith("  ") for line in lines[said + 1 :])
    assert packages(script)
    assert all(PINNED.fullmatch(package) for package in packages(script))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_it_installs_in_a_folder_of_its_own_and_compares_with_its_header(script):
    assert os.access(script, os.X_OK)
    text = code(script)
    assert "dspy_fst" not in text
    assert "trap 'rm -rf \"$folder\"' EXIT" in text
    assert "install -qq $(sed -n 's/^# Packages: //p' \"$0\")" in text
    assert 'sed -n \'s/^#   //p\' "$0" | diff - "$folder/output"' in text
    assert not re.search(r"--(extra-)?index-url|find-links|https?://(?!127\.0\.0\.1)", text)
    subprocess.run(["bash", "-n", script], check=True, timeout=30)
    python = re.search(r"<<'PYTHON'\n(.*?)^PYTHON$", text, re.DOTALL | re.MULTILINE)
    assert python
    compile(python[1], script.name, "exec")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_the_places_of_this_package_that_it_names_exist(script):
    named = re.findall(r"\b(?:dspy_fst|docs|benchmarks|programs)/[\w/.-]*\w", parts(script)["Here"])
    assert [place for place in named if not (FOLDER.parent / place).exists()] == []


def test_the_table_says_of_every_script_what_its_header_says():
    table = (FOLDER / "README.md").read_text(encoding="utf-8")
    rows = [row.strip("| ").split(" | ") for row in table.splitlines() if row.startswith("| [")]
    said = {script.stem: parts(script) for script in SCRIPTS}
    assert sorted(rows) == sorted(
        [
            f"[{name}]({name}.sh)",
            ", ".join(package.replace("==", " ") for package in header["Packages"].split()),
            header["Finding"],
            header["Here"],
        ]
        for name, header in said.items()
    )
