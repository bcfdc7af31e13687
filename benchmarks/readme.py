"""Makes the tables of README.md, BENCHMARKS.md and the documentation from the figures in benchmarks/results.

python -m programs.lab.demo --run-dir runs/readme && cp runs/readme/figures.json benchmarks/results/demo.json
python -m benchmarks.throughput
python -m benchmarks.durability && python -m benchmarks.durability --engine vllm --kills 4
python -m benchmarks.soak
python -m benchmarks.serving
python -m benchmarks.programs
python -m benchmarks.sync
python -m benchmarks.copies --before A_CHECKOUT_OF_845e963
python -m benchmarks.real_model
python -m benchmarks.update_memory --before A_CHECKOUT_OF_845e963
python -m benchmarks.update_speed --before A_CHECKOUT_OF_845e963
python -m benchmarks.warm_start --run-dir runs/warm
python -m benchmarks.dspy_optimizers --run-dir runs/dspy-optimizers
python -m benchmarks.language.base
python -m benchmarks.readme && make pages
"""

import json
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu_check.tables import published
from benchmarks.real_model.tables import TABLES as OF_REAL_MODEL
from benchmarks.update_memory import told as update_memory
from benchmarks.update_speed import told as update_speed

RESULTS = Path(__file__).parent / "results"
README, BENCHMARKS = (Path(__file__).parent.parent / name for name in ("README.md", "BENCHMARKS.md"))


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def figure(value: dict[str, float | None], form: str = ".2f") -> str:
    error = value["standard_error"]
    return f"{value['mean']:{form}}" + ("" if error is None else f" ± {error:{form}}")


def demo(figures: dict[str, Any]) -> str:
    """The two-by-two, its margin, drift and cost."""
    cells, runs = figures["cells"], figures["runs"]
    joint = runs[0]["cells"]["trained weights, evolved instructions"]
    rows = [
        [f"**{name} instructions**", *(figure(cells[f"{w} weights, {name} instructions"]) for w in ("base", "trained"))]
        for name in ("seed", "evolved")
    ]
    head = f"mean@{joint['k']}, {joint['problems']} held-out problems, {len(runs)} runs"
    spent = {name: value["mean"] for name, value in figures["spent"].items()}
    drift = {name: figure(value, ".3f") for name, value in figures["drift"].items() if name.endswith("per token")}
    return "\n".join(
        [
            table([head, "base weights", "trained weights"], rows),
            "",
            f"The joint cell is best by {figure(figures['joint_margin'])} (± is the standard error over the runs).",
            "; ".join(f"{name}: {value} nats" for name, value in drift.items()) + ".",
            f"A run spends {spent['fast: rollouts']:,.0f} rollouts and {spent['fast: reflections']:.0f} reflections on "
            f"text, {spent['slow: rollouts']:,.0f} rollouts and {spent['slow: weight updates']:.0f} updates on "
            "weights.",
        ]
    )


def measured(what: str, rows: dict[str, Any]) -> str:
    """Medians with aims and spread."""
    body = [[name, row["aim"], f"{row['median']:.2g}", spread(row["values"])] for name, row in rows.items()]
    return table([what, "aim", "median", "spread"], body)


def spread(values: list[float]) -> str:
    return "one run" if len(values) == 1 else f"{min(values):.2g} to {max(values):.2g}"


def throughput(rows: dict[str, Any]) -> str:
    return measured("ratio", rows)


def serving(rows: dict[str, Any]) -> str:
    """Medians of ratios; totals of error counts, because the median of [0, 0, 37] would hide them."""
    body = [
        [name, row["aim"], f"{row['sum']:,}" if "sum" in row else f"{row['median']:.2g}", spread(row["values"])]
        for name, row in rows.items()
    ]
    return table(["what", "aim", "median (error counts: total)", "spread"], body)


def durability(figures: dict[str, Any]) -> str:
    """Killed runs that ended as the uninterrupted one."""
    rows = [
        [name, str(row["trials_made"]), str(row["deaths"]), str(row["equal"]), str(row["most_acts_paid_twice"])]
        for name, row in sorted(figures.items())
    ]
    return table(["engine", "runs", "kills", "equal", "search operations repeated, at most"], rows)


def soak(figures: dict[str, Any]) -> str:
    """What grew from one cycle or run to the next (Theil-Sen slopes)."""
    rows = [
        [
            name,
            f"{slopes['memory'] / 1e3:.0f} kB",
            *(f"{slopes[what]:.2g}" for what in ("handles", "threads", "processes")),
        ]
        for name, slopes in ((name, row["slopes"]) for name, row in figures.items())
    ]
    return table(["growth in each of", "memory", "file handles", "threads", "processes"], rows)


def sync(results: Mapping[str, Any]) -> str:
    """How often each check after a publish judged rightly, of the seeds."""
    rows = []
    for name, result in results.items():
        for what, row in result["rows"].items():
            right, former = (f"{row[check]} of {result['seeds']}" for check in ("right", "former"))
            gap = f"{max(row['gaps']):.2g}" if "gaps" in row else ""
            rows.append([name, what, right, former, gap])
    head = ["engine, precision", "what is served", "judged rightly", "by the former check", "largest mean gap, nats"]
    return table(head, rows)


def copies(results: Mapping[str, Any]) -> str:
    """Peak memory over the program's own, of this version and of the one before the copier."""
    rows = [
        [
            version,
            figure["kind"],
            f"{figure['array_bytes'] / 1e6:,.0f} MB",
            str(figure["threads"]),
            *(f"{figure[f'{what}_bytes'] / 1e6:,.0f} MB" for what in ("own", "peak")),
            f"{figure['ratio']:.2f}",
        ]
        for version, figures in (("now", results["now"]), ("845e963", results["before"]))
        for figure in figures
    ]
    return table(["version", "what runs", "array", "at once", "own", "peak", "peak / own"], rows)


def warm_start(figures: Mapping[str, Any]) -> str:
    """Replies to held-out sentences of each weights, and what they cost."""
    free = dict.fromkeys(("rollouts", "updates", "warm_updates", "warm_tokens"), 0)
    learnt = {**free, **{name: figures["arms"]["warm"]["spent"][name] for name in ("warm_updates", "warm_tokens")}}
    alone = "FST alone, stopped as nothing parsed" if figures["arms"]["plain"]["stopped"] else "FST alone"
    of = {
        "as the model is": (figures["replies"]["base"], free),
        alone: (figures["arms"]["plain"]["replies"], figures["arms"]["plain"]["spent"]),
        "after the warm start": (figures["replies"]["after the warm start"], learnt),
        "after the warm start and FST": (figures["arms"]["warm"]["replies"], figures["arms"]["warm"]["spent"]),
    }
    rows = [
        [name, f"{said['parsed']:.2f}", f"{said['accuracy']:.2f}", *(f"{cost[what]:,}" for what in free)]
        for name, (said, cost) in of.items()
    ]
    costs = ["rollouts", "updates", "supervised updates", "tokens learnt in them"]
    return table(["weights", "replies that parse", "accuracy", *costs], rows)


def language_base(lines: Mapping[str, Mapping[str, Any]]) -> str:
    """What SmolLM2 does on the tasks in English before any run, under which adapter, texts and weights."""
    tasks, states = list(dict.fromkeys(line["task"] for line in lines.values())), ("seed", "expert", "warm")

    def place(line: Mapping[str, Any]) -> tuple[int, str, int]:
        return tasks.index(line["task"]), line["adapter"], states.index(line["state"])

    rows = [
        [line["task"], line["adapter"], line["state"], *(f"{line[what]:.2f}" for what in ("parsed", "accuracy"))]
        for line in sorted(lines.values(), key=place)
    ]
    replies = sorted({str(line["replies"]) for line in lines.values()})
    head = ["task", "adapter", "state", f"share of {' or '.join(replies)} replies that parse", "accuracy"]
    return table(head, rows)


def dspy_optimizers(figures: Mapping[str, Any]) -> str:
    """Held-out accuracy before and after each of DSPy's optimizers, over seeds."""
    rows = []
    for engine, arms in figures.items():
        for name, seeds in arms.items():
            runs = list(seeds.values())
            accuracies = (_mean([run[when] for run in runs]) for when in ("before", "after"))
            costs = (f"{statistics.fmean(run['spent'][what] for run in runs):,.0f}" for what in ("rollouts", "updates"))
            rows.append([engine.replace("_", " "), name, str(len(runs)), *accuracies, *costs])
    return table(["engine", "optimizer", "seeds", "before", "after", "rollouts", "updates"], rows)


def spent(result: Mapping[str, Any]) -> int:
    """Rollouts in all; those on the validation set, the same for each candidate of every arm, are outside."""
    return int(result["search rollouts"] + result["training rollouts"])


def program_table(results: Sequence[Mapping[str, Any]]) -> str:
    """Held-out accuracy and rollouts of each program's arms, over seeds."""
    rows = []
    for program, arm in dict.fromkeys((run["program"], run["arm"]) for run in results):
        runs = [run for run in results if (run["program"], run["arm"]) == (program, arm)]
        if arm == "fst":
            rows.append([program, "as it was", _mean([run["accuracy of the seed program"] for run in runs]), "0"])
        rows.append(
            [program, arm, _mean([run["accuracy"] for run in runs]), f"{statistics.fmean(map(spent, runs)):,.0f}"]
        )
    return table(["program", "arm", "held-out accuracy (lowest to highest seed)", "rollouts of all kinds"], rows)


def _mean(values: Sequence[float]) -> str:
    return f"{statistics.fmean(values):.2f} ({min(values):.2f} to {max(values):.2f})"


TABLES: dict[str, Callable[[Any], str]] = {
    "programs": program_table,
    "demo": demo,
    "throughput": throughput,
    "durability": durability,
    "soak": soak,
    "gpu_check": published,
    "serving": serving,
    "sync": sync,
    "copies": copies,
    "update_memory": update_memory,
    "update_speed": update_speed,
    "warm_start": warm_start,
    "dspy_optimizers": dspy_optimizers,
    "language_base": language_base,
}


def render(text: str) -> str:
    """A page with its tables made anew."""
    for name, made in tables().items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        text = pattern.sub(lambda match, made=made: f"{match[1]}{made}\n{match[2]}", text)  # type: ignore[misc]
    return text


def tables() -> dict[str, str]:
    """Name -> the table of the committed figures."""
    real = _results("real_model")
    ours = {name: write(_results(name)) for name, write in TABLES.items()}
    return ours | {f"real_{part}": table(*write(real)) for part, write in OF_REAL_MODEL.items() if part in real}


def _results(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text())


if __name__ == "__main__":
    for page in (README, BENCHMARKS):
        page.write_text(render(page.read_text()))
