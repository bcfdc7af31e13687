"""Imports run one way, and heavy or foreign libraries stay in their corner."""

import ast
import re
import tomllib
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from benchmarks.house import sources, uses_of_any

PACKAGE = Path(__file__).parent.parent / "dspy_fst"
LAYERS = [
    ["errors", "formatting", "outcomes"],
    ["types", "recipe"],
    ["model_files", "run"],
    ["engine"],
    ["slow", "rollout"],
    ["fast", "policy_lm"],
    ["config"],  # inherits the settings that slow, rollout and fast declare, so no room below it knows the whole recipe
    ["cluster", "report"],
    ["monitoring", "preflight"],
    ["memory", "saving"],
    ["training"],
    ["evaluation", "optimizer", "provider", "sizing"],
    ["project"],
    ["serve", "templates"],
    ["cli"],
]
"""From below to above: packages and the root's modules. Each imports from lower layers, or from itself."""
ROOT = {"config", "errors", "optimizer", "policy_lm", "types"}
"""Modules beside the packages: the face, and the nouns that every room shares."""
CORNERS = {
    "torch": ["model_files.architectures", "slow", "engine", "policy_lm", "cli.doctor"],
    "gepa": ["fast"],
    "vllm": ["engine.vllm.served", "engine.vllm.transfer"],
    "accelerate": ["monitoring.tracking"],
    "trl": ["slow"],
    "peft": ["engine.lora"],
    "bitsandbytes": ["slow.adamw", "slow.quantized"],
    "scipy": ["run.paired", "sizing.from_run"],
    "fsspec": ["run.storage"],
    "simpy": ["sizing.simulate"],
    "ray": ["cluster", "engine.vllm.on_ray"],
    "matplotlib": ["report.charts"],
    "jinja2": ["report.page", "engine.chat"],
    "rich": ["monitoring.progress", "report.summary", "cli"],
    "typer": ["cli"],
    "yaml": ["project"],
    **{name: ["serve"] for name in ("fastapi", "fastapi_offline", "starlette", "uvicorn", "prometheus_client")},
}
"""Library -> where it may be imported."""


@cache
def modules() -> dict[str, Path]:
    return {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
        for path in PACKAGE.rglob("*.py")
        if path.name != "__init__.py"
    }


@cache
def imports(path: Path) -> frozenset[str]:
    """Every module that a file imports, at any depth, type checking left out."""
    tree = ast.parse(path.read_text())
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    found: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return frozenset(found)


def room_of(module: str) -> str:
    return module.split(".")[0]


def layer_of(room: str) -> int:
    return next(i for i, layer in enumerate(LAYERS) if room in layer)


@pytest.mark.parametrize("module", sorted(modules()))
def test_imports_run_one_way(module):
    for imported in imports(modules()[module]):
        if not imported.startswith("dspy_fst."):
            continue
        target = room_of(imported.removeprefix("dspy_fst."))
        same_room = target == room_of(module)
        assert same_room or layer_of(target) < layer_of(room_of(module)), f"{module} must not import {imported}"


def test_no_modules_import_each_other_in_a_circle():
    known = {f"dspy_fst.{name}": name for name in modules()}
    needs = {name: {known[found] for found in imports(path) if found in known} for name, path in modules().items()}
    TopologicalSorter(needs).prepare()  # raises CycleError, which names the circle


def test_the_root_holds_the_face_and_the_nouns_alone():
    assert {path.stem for path in PACKAGE.glob("*.py")} == {*ROOT, "__init__"}


@pytest.mark.parametrize("room", sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py")))
def test_a_room_says_what_goes_in_and_what_comes_out(room):
    contract = ast.get_docstring(ast.parse((PACKAGE / room / "__init__.py").read_text())) or ""
    assert len(contract.split()) >= 15
    assert room in {name for layer in LAYERS for name in layer}


@pytest.mark.parametrize("module", sorted(modules()))
def test_libraries_stay_in_their_corner(module):
    for imported in imports(modules()[module]):
        allowed = CORNERS.get(imported.split(".")[0])
        if allowed is not None:
            assert any(module == place or module.startswith(place + ".") for place in allowed), f"{module}: {imported}"


def test_mypy_follows_the_imports_of_every_library_but_these():
    overrides = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["tool"]["mypy"]["overrides"]
    skipped = {name for override in overrides if override.get("follow_imports") for name in override["module"]}
    assert skipped == {"accelerate.*", "dspy.signatures.*", "scipy.*", "trl.*", "vllm.*"}


def test_any_stands_only_where_a_value_of_a_library_or_a_user_passes():
    assert sum(uses_of_any(source.tree) for source in sources(PACKAGE)) <= 211


def test_the_files_that_contributors_are_pointed_at_exist():
    page = (PACKAGE.parent / "CONTRIBUTING.md").read_text()
    named = set(re.findall(r"`((?:[a-z_]+/)+(?:[a-z_]+[.]py)?)`", page))
    places = (PACKAGE.parent, PACKAGE)
    assert named
    assert [name for name in named if not any((place / name).exists() for place in places)] == []
