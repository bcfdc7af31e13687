"""Imports run one way, and heavy or foreign libraries stay in their corner."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "dspy_fst"
LAYERS = [
    ["errors", "tables"],
    ["types", "architectures"],
    [
        "config",
        "engine.base",
        "engine.queueing",
        "engine.served",
        "engine.chat",
        "engine.chat_template",
        "engine.prompts",
        "preflight.environment",
        "preflight.hub",
        "preflight.known_models",
        "preflight.model_folder",
        "preflight.model_kind",
        "preflight.reach",
        "preflight.vllm_start",
        "run.secrets",
    ],
    ["plan", "slow", "rollout", "engine", "run", "preflight.adapter_folder", "preflight.chat_template"],
    ["fast", "report", "preflight.own_adapters", "preflight.parts", "preflight.precision", "preflight.restarts"],
    ["policy_stream"],
    ["policy"],
    ["publishing", "observing", "asking_faults"],
    ["validation", "program_state"],
    ["documents", "fingerprints"],
    ["fit", "opening"],
    ["preflight.score_scale", "validating"],
    ["session", "continuing"],
    ["preflight.first_rollouts", "preflight.parse_trial", "preflight.what_helps"],
    ["prepare", "saved", "past", "card"],
    ["asking", "compiled", "export", "kept"],
    ["optimizer", "evaluation"],
    ["naming", "settings_file"],
    ["project_parts"],
    ["project"],
    ["recorded"],
    ["interop", "serve", "templates"],
    ["cli"],
]
"""From below to above. A module imports from lower layers, or from its own folder."""
CORNERS = {
    "torch": ["architectures", "slow", "engine", "policy", "cli.doctor"],
    "gepa": ["fast"],
    "vllm": ["engine.served"],
    "accelerate": ["report.tracking"],
    "trl": ["slow"],
    "scipy": ["run.paired"],
    "matplotlib": ["report.charts"],
    "jinja2": ["report.page", "engine.prompts"],
    "rich": ["report", "cli"],
    "typer": ["cli"],
    "yaml": ["project", "settings_file"],
    **{name: ["serve"] for name in ("fastapi", "fastapi_offline", "starlette", "uvicorn", "prometheus_client")},
}
"""Library -> where it may be imported."""


def modules() -> dict[str, Path]:
    return {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
        for path in PACKAGE.rglob("*.py")
        if path.name != "__init__.py"
    }


def imports(path: Path) -> set[str]:
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
    return found


def layer_of(module: str) -> int:
    named = [i for i, layer in enumerate(LAYERS) for name in layer if module == name]
    parts = [i for i, layer in enumerate(LAYERS) for name in layer if module.startswith(name + ".")]
    return (named or parts)[0]


@pytest.mark.parametrize("module", sorted(modules()))
def test_imports_run_one_way(module):
    for imported in imports(modules()[module]):
        if not imported.startswith("dspy_fst."):
            continue
        target = imported.removeprefix("dspy_fst.")
        same_folder = "." in module and target.split(".")[0] == module.split(".")[0]
        assert same_folder or layer_of(target) < layer_of(module), f"{module} must not import {target}"


@pytest.mark.parametrize("module", sorted(modules()))
def test_libraries_stay_in_their_corner(module):
    for imported in imports(modules()[module]):
        allowed = CORNERS.get(imported.split(".")[0])
        if allowed is not None:
            assert any(module == place or module.startswith(place + ".") for place in allowed), f"{module}: {imported}"
