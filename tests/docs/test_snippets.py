"""Every snippet and command that the README and the documentation show is run, or checked against the code."""

import ast
import importlib
import importlib.util
import inspect
import json
import re
import shlex
import tomllib
from dataclasses import fields
from urllib.parse import urlparse

import pytest
import yaml
from typer.main import get_command

import dspy_fst
from dspy_fst import FSTConfig, FSTOptimizer, PolicyLM
from dspy_fst.cli import app
from dspy_fst.engine.options import InProcessSettings
from dspy_fst.engine.vllm.server_settings import VLLMSettings
from dspy_fst.policy_lm import policy_of
from dspy_fst.project.project_file import Project, load_project
from dspy_fst.serve.serving_settings import RESERVED, ServeSettings
from programs.lab import BASE, FeedbackProposer, build
from tests.docs.pages import PAGES, ROOT, commands, fences

TINY = {
    "cycles": 1,
    "steps_per_cycle": 1,
    "problems_per_step": 4,
    "population_size": 2,
    "group_size": 4,
    "anchors": 4,
    "search_rollouts": 9,
    "learning_rate": 5e-4,
    "warmup_steps": 0,
}
KNOWN_TOOLS = {".", "cd", "export", "hf", "ssh", "vllm"}
"""Commands on the pages that are not ours and have nothing here to be held against."""
MINIMAL = {
    "program": "my_program:Coder",
    "metric": "my_program:metric",
    "trainset": "my_program:train",
    "model": "a-model",
    "run_dir": "run",
}
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """What a snippet may name without having made it: a program of the laboratory and what came of training it."""
    lab = build(train=8, val=4, test=4)
    lab.program.set_lm(PolicyLM(BASE, engine="in_process", max_tokens=16))
    made = FSTOptimizer(
        metric=lab.metric,
        propose=FeedbackProposer(),
        run_dir=tmp_path_factory.mktemp("run") / "run",
        progress=False,
        **TINY,
    ).compile(lab.program, trainset=lab.trainset, valset=lab.valset)
    yield {
        "program": lab.program,
        "metric": lab.metric,
        "trainset": lab.trainset,
        "valset": lab.valset,
        "testset": lab.testset,
        "compiled": made,
    }
    policy_of(made).release()


# ---- Python ------------------------------------------------------------------------------------


@pages
@pytest.mark.usefixtures("dspy_may_be_configured")
def test_the_python_snippets_of_a_page_run_one_after_the_other(page, compiled, tmp_path, monkeypatch):
    snippets = [fence for fence in fences(page, "python") if not fence.mark]
    monkeypatch.chdir(tmp_path)
    names = dict(compiled) if snippets else {}
    for fence in snippets:
        exec(compile(fence.text, fence.where, "exec"), names)


@pages
def test_the_snippets_that_cannot_run_here_compile_and_name_what_exists(page):
    everything = "\n".join(fence.text for fence in fences(page, "python"))
    for fence in fences(page, "python"):
        tree = ast.parse(fence.text, fence.where)
        if fence.mark:
            assert list(_wrong_names(tree, _imported(ast.parse(everything)))) == [], fence.where


def _imported(tree):
    """Name in the snippets -> what of the package it stands for; also of what is made by calling a class."""
    known = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "dspy_fst":
            module = importlib.import_module(node.module)
            known |= {alias.asname or alias.name: getattr(module, alias.name) for alias in node.names}
        elif isinstance(node, ast.Import) and any(alias.name == "dspy_fst" for alias in node.names):
            known["dspy_fst"] = dspy_fst
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
            made = _resolved(node.value.func, known)
            if inspect.isclass(made) and isinstance(node.targets[0], ast.Name):
                known[node.targets[0].id] = made
    return known


def _resolved(node, known):
    """The object of the package that an expression names; None when it is none."""
    if isinstance(node, ast.Name):
        return known.get(node.id)
    if isinstance(node, ast.Attribute) and (owner := _resolved(node.value, known)) is not None:
        return getattr(owner, node.attr)
    return None


def _wrong_names(tree, known):
    """Arguments in the snippet that the package's functions do not take."""
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        function = _resolved(call.func, known)
        if function is None:
            continue
        parameters = inspect.signature(function).parameters
        allowed = {*parameters, *(FSTConfig.model_fields if function is FSTOptimizer else ())}
        yield from (keyword.arg for keyword in call.keywords if keyword.arg not in allowed)
        for keyword in call.keywords:
            if keyword.arg == "engine_options" and isinstance(keyword.value, ast.Dict):
                options = {field.name for kind in (VLLMSettings, InProcessSettings) for field in fields(kind)}
                yield from {key.value for key in keyword.value.keys} - options


def test_a_snippet_that_names_an_unknown_setting_is_found():
    imports, calls = (
        "from dspy_fst import FSTOptimizer, PolicyLM",
        "FSTOptimizer(cycels=2), PolicyLM(engine_options={'x': 1})",
    )
    tree = ast.parse(f"{imports}\n{calls}")
    assert list(_wrong_names(tree, _imported(tree))) == ["cycels", "x"]


# ---- commands ----------------------------------------------------------------------------------


@pages
def test_every_command_on_a_page_could_be_given(page):
    assert [f"{line}: {fault}" for line in commands(page) if (fault := _fault(line))] == []


def _fault(line):
    """Why a command line could not be given, or what stands in for it; None when it could."""
    words = shlex.split(line, comments=True)
    while words and re.fullmatch(r"\w+=\S*", words[0]):
        words.pop(0)
    tool, *arguments = words
    tool = tool.removeprefix(".venv/bin/")
    if tool in CHECKS:
        return CHECKS[tool](arguments)
    return None if tool in KNOWN_TOOLS else "nobody knows how to check it"


def _dspy_fst_fault(arguments):
    group = get_command(app)
    context = group.make_context("dspy-fst", [], resilient_parsing=True)
    if arguments[0].startswith("-"):
        known = [option for parameter in group.get_params(context) for option in parameter.opts]
        return None if arguments[0] in known else f"there is no option {arguments[0]}"
    try:
        name, command, rest = group.resolve_command(context, arguments)
        command.make_context(name, rest, parent=context)
    except Exception as error:  # typer's usage errors, which are its own copies of click's
        return f"{type(error).__name__}: {error}"
    return None


def _make_fault(arguments):
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    unknown = [word for word in arguments if "=" not in word and word not in targets]
    variables = [word.split("=")[0] for word in arguments if "=" in word]
    unknown += [name for name in variables if f"$({name})" not in (ROOT / "Makefile").read_text()]
    return f"the Makefile has no {unknown}" if unknown else None


def _python_fault(arguments):
    assert arguments[0] == "-m"
    return None if importlib.util.find_spec(arguments[1]) else f"there is no module {arguments[1]}"


def _pip_fault(arguments):
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    wanted = {extra for word in arguments for extra in re.findall(r"\w[\w-]*", "".join(re.findall(r"\[.*\]", word)))}
    return f"there are no extras {wanted - set(extras)}" if wanted - set(extras) else None


def _curl_fault(arguments):
    settings = ServeSettings(no_key=True)
    (url,) = [word for word in arguments if word.startswith("http")]
    if urlparse(url).path not in (settings.path, settings.stream_path, *RESERVED):
        return f"nothing is served at {url}"
    if "-d" in arguments and set(json.loads(arguments[arguments.index("-d") + 1])) - {"inputs", "seed"}:
        return "the body is not what the program's endpoint takes"
    return None


CHECKS = {
    "dspy-fst": _dspy_fst_fault,
    "make": _make_fault,
    "python": _python_fault,
    "pip": _pip_fault,
    "curl": _curl_fault,
}


@pytest.mark.parametrize(
    "line",
    [
        "dspy-fst run",
        "dspy-fst run FILE --trakc x",
        "dspy-fst serve run --choice worst",
        "dspy-fst trian FILE",
        "dspy-fst --versoin",
        "make domo",
        "python -m benchmarks.nothing",
        "pip install '.[vlm]'",
        "curl http://127.0.0.1:8000/v2/program",
        "nonsense",
    ],
)
def test_a_command_that_could_not_be_given_is_found(line):
    assert _fault(line)


# ---- project files and data --------------------------------------------------------------------


@pages
def test_the_yaml_of_a_page_is_a_project_file_or_a_part_of_one(page, tmp_path):
    for fence in fences(page, "yaml"):
        data = yaml.safe_load(fence.text)
        assert set(data) <= set(Project.model_fields), fence.where
        whole = data if "program" in data else {**MINIMAL, **data}
        path = tmp_path / "project.yaml"
        path.write_text(fence.text if whole is data else yaml.safe_dump(whole))
        load_project(path)


@pages
def test_every_fence_is_of_a_language_that_is_checked(page):
    kinds = set(re.findall(r"^```(\w+)$", page.read_text(), re.MULTILINE))
    generated = {"pycon", "console"}  # written from docstrings and from the commands
    assert kinds <= {"python", "bash", "yaml", "text", *generated}
