"""The package: its bounds and their reasons; the wheel and sdist that are built of it, used outside of the checkout."""

import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email import message_from_bytes
from importlib.metadata import packages_distributions
from importlib.util import find_spec
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from tests.test_imports import imports

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
FOR_DEVELOPERS = {"dev"}
UNBOUNDED = {"mkdocs-material", "termtosvg"}
"""Tools of the documentation; the page says why."""
LOCKED = dict(line.split("==") for line in (ROOT / "requirements" / "lock.txt").read_text().splitlines())


def declared() -> list[tuple[str, Requirement]]:
    """(extra or "", requirement), developers' left out."""
    parts = {"": PROJECT["dependencies"], **{extra: EXTRAS[extra] for extra in EXTRAS if extra not in FOR_DEVELOPERS}}
    return [(extra, Requirement(line)) for extra, lines in parts.items() for line in lines]


def normal(bounds: str) -> SpecifierSet:
    return SpecifierSet(bounds.strip())


# ---- bounds ----------------------------------------------------------------------------------------


def test_every_bound_has_its_reason_on_the_page():
    page = (ROOT / "docs" / "dependencies.md").read_text()
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line.startswith("| ")
    ]
    told = {row[0]: row for row in rows if row[0] not in ("package", "---")}
    assert set(told) == {requirement.name for _, requirement in declared()}
    for extra, requirement in declared():
        row = told[requirement.name]
        assert normal(row[1]) == requirement.specifier
        assert all(reason for reason in row[-2:])
        assert len(row) == 4 or extra in row[2].split(", ")


def test_every_dependency_has_a_lower_and_an_upper_bound_and_the_locked_version_lies_inside():
    for _, requirement in declared():
        kinds = {bound.operator for bound in requirement.specifier}
        assert kinds == {"=="} or ">=" in kinds, requirement
        assert kinds == {"=="} or "<" in kinds or requirement.name in UNBOUNDED, requirement
        if requirement.name in LOCKED:
            assert requirement.specifier.contains(LOCKED[requirement.name]), requirement


COMES_WITH = {"markupsafe": "jinja2", "pydantic_core": "pydantic", "starlette": "fastapi"}
"""Import -> the declared package of whose interface it is a part."""
ONLY_IF_THERE = {"IPython", "mlflow"}
OURS = {"dspy_fst", "programs", "dspy_fst_weight_check", "dspy_fst_lora_check", "dspy_fst_transfer_check"}


@pytest.mark.slow
def test_every_library_that_the_package_imports_is_declared():
    """Else it is there by the grace of another package, which may drop it."""
    names = {requirement.name.lower() for _, requirement in declared()}
    found = {name.split(".")[0] for path in (ROOT / "dspy_fst").rglob("*.py") for name in imports(path)}
    foreign = found - set(sys.stdlib_module_names) - OURS - ONLY_IF_THERE
    packages = packages_distributions()
    undeclared = {
        name
        for name in foreign
        if not names & ({COMES_WITH.get(name)} | {package.lower().replace("_", "-") for package in packages[name]})
    }
    assert undeclared == set()


# ---- the built package -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The sdist, and the wheel that is made of what the sdist holds, as an index would make it."""
    out = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-c", "import sys, hatchling.build as b; print(getattr(b, sys.argv[1])(sys.argv[2]))"]

    def made(kind: str, source: Path) -> Path:
        done = subprocess.run(
            [*build, f"build_{kind}", str(out)], cwd=source, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        return out / done.stdout.split()[-1]

    sdist = made("sdist", ROOT)
    with tarfile.open(sdist) as archive:
        archive.extractall(out / "source", filter="data")
    (source,) = (out / "source").iterdir()
    return sdist, made("wheel", source)


def names(wheel: Path) -> set[str]:
    return set(zipfile.ZipFile(wheel).namelist())


@pytest.mark.slow
def test_the_wheel_holds_every_file_of_the_package_and_nothing_else(built):
    _, wheel = built
    tracked = subprocess.run(["git", "ls-files", "dspy_fst"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    held = {name for name in names(wheel) if ".dist-info/" not in name}
    assert held == set(tracked.stdout.split())
    assert "dspy_fst/py.typed" in held


def test_the_sdist_holds_no_environment_and_no_run(built):
    with tarfile.open(built[0]) as archive:
        top = {name.split("/")[1] for name in archive.getnames() if "/" in name}
    assert {"dspy_fst", "README.md", "LICENSE", "pyproject.toml", "PKG-INFO"} <= top
    assert not top & {".venv", ".git", ".mypy_cache", ".pytest_cache", "runs", "site"}


def test_the_metadata_say_what_the_project_file_says(built):
    archive = zipfile.ZipFile(built[1])
    (path,) = (name for name in names(built[1]) if name.endswith(".dist-info/METADATA"))
    metadata = message_from_bytes(archive.read(path))
    assert (metadata["Name"], metadata["Version"]) == (PROJECT["name"], PROJECT["version"])
    assert normal(metadata["Requires-Python"]) == normal(PROJECT["requires-python"])
    assert (metadata["License-Expression"], metadata["Description-Content-Type"]) == ("MIT", "text/markdown")
    assert set(metadata.get_all("Provides-Extra")) == set(EXTRAS)
    assert metadata.get_payload(decode=True).decode().strip() == (ROOT / "README.md").read_text().strip()
    needed = [Requirement(line) for line in metadata.get_all("Requires-Dist")]
    assert {(str(r.specifier), r.name) for r in needed if r.marker is None} == {
        (str(r.specifier), r.name) for extra, r in declared() if not extra
    }
    assert "Typing :: Typed" in metadata.get_all("Classifier")
    licences = [name for name in names(built[1]) if name.endswith("/licenses/LICENSE")]
    assert len(licences) == 1


@pytest.fixture(scope="module")
def bare(built, tmp_path_factory):
    """An environment with the wheel alone; `DEPENDENCIES` lead to what it needs. The checkout is not on its path."""
    folder = tmp_path_factory.mktemp("bare")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "venv")], check=True, timeout=120)
    python = folder / "venv" / "bin" / "python"
    install = [sys.executable, "-m", "uv", "pip", "install", "-q", "--no-deps", "--offline", "--python", str(python)]
    done = subprocess.run([*install, str(built[1])], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (folder / "empty").mkdir()
    return folder, python


def lent(python: Path) -> str:
    """The folder with the packages of this environment."""
    return str(Path(find_spec("dspy").origin).parent.parent)


RUNS = """
import sys
sys.path.append(sys.argv[1])  # after the environment's own packages, and without this checkout's .pth file
sys.modules.update(dict.fromkeys(sys.argv[2].split(","), None))
import dspy_fst
from pathlib import Path
assert "bare" in dspy_fst.__file__, dspy_fst.__file__
from dspy_fst.cli import app
from typer.testing import CliRunner
for words in sys.argv[3:]:
    done = CliRunner().invoke(app, words.split())
    print(words, "->", done.exit_code, done.output if done.exit_code else "", done.exception or "")
"""


def runs(bare, without: str, *commands: str) -> str:
    folder, python = bare
    done = subprocess.run(
        [python, "-I", "-c", RUNS, lent(python), without, *commands],
        cwd=folder, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


NOT_SERVED = "serve empty --program no_such_module:x"
MODULES = {
    "report": ("matplotlib",),
    "serve": ("fastapi", "fastapi_offline", "prometheus_client"),
    "tracking": ("tensorboard",),
    "quantized": ("bitsandbytes",),
    "benchmarks": ("locust", "trl"),
}
"""Extra -> what it brings and no other package needs to import the commands."""


def all_but(*extras: str) -> str:
    return ",".join(name for extra, modules in MODULES.items() if extra not in extras for name in modules)


@pytest.mark.slow
def test_the_wheel_alone_makes_a_project_and_says_which_extra_is_missing(bare):
    told = runs(bare, all_but(), "init made --example own", "--help", "report made", NOT_SERVED)
    assert "init made --example own -> 0" in told
    assert "--help -> 0" in told
    assert {path.name for path in (bare[0] / "made").iterdir()} >= {"project.yaml", "my_program.py", "train.jsonl"}
    assert "dspy-fst[report]" in told
    assert "dspy-fst[serve]" in told


@pytest.mark.slow
@pytest.mark.parametrize(
    ("extra", "command", "words"),
    [("report", "report nowhere", "is not the directory of a run"), ("serve", NOT_SERVED, "no_such_module")],
    ids=["report", "serve"],
)
def test_an_extra_by_itself_is_enough_for_its_command(bare, extra, command, words):
    told = runs(bare, all_but(extra), command)
    assert "dspy-fst[" not in told
    assert words in told
