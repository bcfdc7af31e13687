"""How the code is laid out, in numbers, beside another commit's: ``python -m benchmarks.house [--before CHECKOUT]``.

A circle counts imports for type checking, too. One step is watched in a small run of the laboratory: the files and
functions of the package that are entered from the first call of the step's sampling to the optimizer's own step.
"""

import argparse
import ast
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

LONG_FILE, LONG_FUNCTION = 400, 40
"""Lines. A function's docstring and comments are not counted."""
HERE = Path(__file__).parent.parent


@dataclass(frozen=True)
class Source:
    """One module: its name below the package, its text and its tree."""

    name: str
    text: str
    tree: ast.Module

    @property
    def functions(self) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
        return (node for node in ast.walk(self.tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def sources(package: Path) -> list[Source]:
    paths = sorted(path for path in package.rglob("*.py") if "templates" not in path.parts)
    return [
        Source(".".join(path.relative_to(package).with_suffix("").parts), text, ast.parse(text))
        for path in paths
        for text in [path.read_text("utf-8")]
    ]


def measured(checkout: Path) -> dict[str, object]:
    """Name of a measurement -> value; lists name what was counted."""
    found = sources(checkout / "dspy_fst")
    lengths = {f"{source.name}.{node.name}": code_lines(node) for source in found for node in source.functions}
    files = {source.name: len(source.text.splitlines()) for source in found}
    graph = import_graph(found)
    return {
        "modules at the root": sorted(name for name in files if "." not in name and name != "__init__"),
        "files": len(files),
        "lines": sum(files.values()),
        "functions": sum(1 for source in found for _ in source.functions),
        f"files over {LONG_FILE} lines": {name: count for name, count in files.items() if count > LONG_FILE},
        f"functions over {LONG_FUNCTION} lines": {n: count for n, count in lengths.items() if count > LONG_FUNCTION},
        "Any": sum(uses_of_any(source.tree) for source in found),
        "dict[str, Any]": sum(source.text.count("dict[str, Any]") for source in found),
        "circles of modules": circles(graph),
        "circles of packages": circles(by_package(graph)),
        "file names that stand twice": twice(Counter(name.split(".")[-1] for name in files) - Counter("__init__")),
        "class names that stand twice": twice(Counter(node.name for node in classes(found))),
        "functions with the same body": same_bodies(found),
    }


def code_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of the body's statements, the docstring left out."""
    documented = ast.get_docstring(function, clean=False) is not None
    body = function.body[1:] if documented else function.body
    return (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0


def uses_of_any(tree: ast.Module) -> int:
    return sum(isinstance(node, ast.Name) and node.id == "Any" for node in ast.walk(tree))


def classes(found: list[Source]) -> Iterator[ast.ClassDef]:
    return (node for source in found for node in source.tree.body if isinstance(node, ast.ClassDef))


def twice(counts: Mapping[str, int]) -> dict[str, int]:
    return {name: count for name, count in sorted(counts.items()) if count > 1 and name not in ("__init__", "__main__")}


def same_bodies(found: list[Source]) -> list[str]:
    """Functions of at least three statements, or of one long one, whose code is equal but for the name."""
    homes: dict[str, list[str]] = defaultdict(list)
    for source in found:
        for node in source.functions:
            body = node.body[1:] if ast.get_docstring(node) is not None else node.body
            code = "\n".join(ast.dump(statement) for statement in body)
            if len(code) > 300:
                homes[code].append(f"{source.name}.{node.name}")
    return [" = ".join(names) for names in homes.values() if len(names) > 1]


def import_graph(found: list[Source]) -> dict[str, set[str]]:
    known = {source.name for source in found}
    graph: dict[str, set[str]] = {source.name: set() for source in found}
    for source in found:
        for node in ast.walk(source.tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dspy_fst."):
                home = str(node.module).removeprefix("dspy_fst.")
                graph[source.name] |= {
                    name for name in (home, *(f"{home}.{a.name}" for a in node.names)) if name in known
                }
        graph[source.name].discard(source.name)
    return graph


def by_package(graph: Mapping[str, set[str]]) -> dict[str, set[str]]:
    packages: dict[str, set[str]] = defaultdict(set)
    for module, targets in graph.items():
        home = module.split(".")[0]
        packages[home] |= {target.split(".")[0] for target in targets} - {home}
    return packages


def circles(graph: Mapping[str, set[str]]) -> list[str]:
    """Sets of nodes that reach one another, by reachability: the graphs are small."""
    reached = {node: _reached(graph, node) for node in graph}
    found = {frozenset({node, *(other for other in reached[node] if node in reached.get(other, ()))}) for node in graph}
    return sorted(" <-> ".join(sorted(circle)) for circle in found if len(circle) > 1)


def _reached(graph: Mapping[str, set[str]], start: str) -> set[str]:
    seen: set[str] = set()
    ahead = list(graph.get(start, ()))
    while ahead:
        node = ahead.pop()
        if node not in seen:
            seen.add(node)
            ahead += graph.get(node, ())
    return seen


STEP = """
import json, sys, threading
from pathlib import Path
import dspy, torch
import dspy_fst
from programs.lab import BASE, FeedbackProposer, build
home = str(Path(dspy_fst.__file__).parent)
entered, watching = set(), False
def enter(frame, event, argument):
    global watching
    code = frame.f_code
    if event != "call" or not code.co_filename.startswith(home):
        return
    if code.co_name in ("play", "sample") and code.co_filename.endswith("session.py"):
        watching = True
    if watching:
        entered.add((code.co_filename[len(home) + 1:], code.co_qualname))
stepped = torch.optim.AdamW.step
def step(*arguments, **named):
    global watching
    watching = False
    return stepped(*arguments, **named)
torch.optim.AdamW.step = step
threading.setprofile(enter)
sys.setprofile(enter)
lab = build(train=8, val=1, test=1)
lab.program.set_lm(dspy_fst.PolicyLM(BASE, engine="in_process", max_tokens=16, temperature=1.0))
dspy_fst.FSTOptimizer(
    metric=lab.metric, propose=FeedbackProposer(seed=0), run_dir=sys.argv[1], progress=False, method="rl", cycles=1,
    steps_per_cycle=1, problems_per_step=8, group_size=16, population_size=1,
).compile(lab.program, trainset=lab.trainset)
sys.setprofile(None)
print("ENTERED" + json.dumps(sorted(entered)))
"""


def entered_by_one_step(checkout: Path) -> list[tuple[str, str]]:
    """(file, function) of the package, entered from a step's sampling to the optimizer's step."""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "-c", STEP, str(Path(folder) / "run")],
            cwd=checkout,
            env={**os.environ, "PYTHONPATH": str(checkout)},
            capture_output=True,
            text=True,
            timeout=600,
        )
    lines = [line for line in done.stdout.splitlines() if line.startswith("ENTERED")]
    if not lines:
        raise SystemExit(f"the watched run of {checkout} failed:\n{done.stderr[-3000:]}")
    return [tuple(pair) for pair in json.loads(lines[0].removeprefix("ENTERED"))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--before", type=Path, help="a checkout of the commit to compare with")
    parser.add_argument("--names", action="store_true", help="name what was counted")
    arguments = parser.parse_args()
    checkouts = [*([arguments.before.resolve()] if arguments.before else []), HERE]
    columns = []
    for checkout in checkouts:
        step = entered_by_one_step(checkout)
        files = sorted({file for file, _ in step})
        columns.append(
            {**measured(checkout), "files entered by one step": files, "functions entered by one step": len(step)}
        )
    print("| measured | " + " | ".join(["before", "now"][-len(columns) :]) + " |")
    print("| --- |" + " ---: |" * len(columns))
    for name in columns[-1]:
        print(f"| {name} | " + " | ".join(str(_count(column[name])) for column in columns) + " |")
    if arguments.names:
        for name, value in columns[-1].items():
            if not isinstance(value, int) and value:
                print(f"\n{name}: {value}")


def _count(value: object) -> object:
    return len(value) if isinstance(value, list | dict) else value


if __name__ == "__main__":
    main()
