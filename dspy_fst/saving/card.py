"""The model card of an exported program, made from the run's events and the saved program alone."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import dspy

from dspy_fst.config import FSTConfig
from dspy_fst.formatting.demo_texts import readable
from dspy_fst.formatting.numbers import interval, number, plain, share, with_error
from dspy_fst.report.costs import REFLECTION_LM, labels_of
from dspy_fst.report.evaluated import Evaluated, Score, TwoByTwo
from dspy_fst.report.run_record import RunRecord, best
from dspy_fst.report.verdict import validations_table, verdict
from dspy_fst.rollout.chat_adapters import DSPY_ADAPTERS, SavedAdapter, code_of
from dspy_fst.rollout.components import in_python
from dspy_fst.run.directory import Event
from dspy_fst.saving.format import SavedPolicy
from dspy_fst.types import Population

MERGED = (
    "A LoRA adapter was trained, and is merged into the weights in float32. In bfloat16 a part of what it learnt may "
    "round away."
)
EVALUATION = ("split", "problems", "candidate", "weights", "cycle", "seed", "k", "mean@k", "95% interval")
ELSEWHERE = (
    "The weights are in the run's directory, on the machine of the run. `dspy-fst export RUN_DIR FOLDER` writes them, "
    "these instructions and a card that says how to use them."
)
TRAINED = "trained together by Fast-Slow Training ([arXiv 2605.12484](https://arxiv.org/abs/2605.12484)) with dspy_fst"
TAGS = ("dspy", "dspy-fst", "fast-slow-training", "gepa", "reinforcement-learning")


@dataclass(frozen=True)
class Facts:
    """The contents of a card."""

    population: Population
    policy: SavedPolicy
    saved_by: str
    """The version of dspy_fst that saved the program, e.g. ``"0.2.0"``."""
    packages: Mapping[str, str]
    """Package -> its version at the time of the export."""
    record: RunRecord | None
    """The run's record; None when the program was saved outside of its run directory."""
    plan: Event
    """The run's plan event; empty without a run."""
    base: str | None
    """Hub name of the trained model; None for a local folder."""
    base_folder: Path | None = None
    """The folder of the trained model on the run's machine. Cards of whole weights do not tell it."""
    merged: bool = False
    """Whether the weights are a base and the LoRA adapter that was trained on it."""
    foreign_code: bool = False
    """Whether a dspy.Flex may have another source than a fresh program has."""
    speakers: tuple[str, ...] = ()
    """The predictors whose weights these are, where the program's others have other ones; empty: all."""

    @property
    def rounded(self) -> str | None:
        """How the run rounded the base below its LoRA adapters (``quantized_base``); None: not."""
        return None if self.record is None else self.record.config.get("quantized_base")


def model_card(facts: Facts) -> str:
    """Markdown with YAML front matter."""
    return joined([front_matter(facts), _head(facts), _use(facts), *story(facts)])


def run_card(facts: Facts) -> str:
    """The card of a run, for a place where its weights do not lie beside it."""
    return joined([front_matter(facts), _head(facts), ELSEWHERE, *story(facts)])


def story(facts: Facts) -> Iterator[str]:
    """The sections that do not depend on what the folder holds: training, texts, scores and versions."""
    yield from _training(facts)
    yield _population(facts)
    yield from _scores(facts)
    yield _versions(facts)


def joined(parts: Sequence[str]) -> str:
    """Sections as one document; empty ones are left out."""
    return "\n\n".join(part for part in parts if part) + "\n"


def front_matter(
    facts: Facts, library: str = "transformers", more: Sequence[str] = (), tags: Sequence[str] = ()
) -> str:
    """The card's YAML head.

    Args:
        library: The one that loads the folder.
        more: Further lines.
        tags: Further tags.
    """
    lines = ["---", f"library_name: {library}", "pipeline_tag: text-generation"]
    if facts.base is not None:
        lines.append(f"base_model: {json.dumps(facts.base)}")  # a JSON string is a YAML string
    return "\n".join([*lines, *more, "tags:", *(f"- {tag}" for tag in (*TAGS, *tags)), "---"])


def _head(facts: Facts) -> str:
    base = f"`{facts.base}`" if facts.base else "a local model"
    return (
        f"# {program_named(facts)} and its model\n\n"
        f"The weights of {base} and the instructions of a [DSPy](https://dspy.ai) program, {TRAINED}. The weights were "
        f"trained with these instructions: use both.{_whose(facts)}{nothing_learned(facts)}"
    )


def program_named(facts: Facts) -> str:
    """How a card's title names the program."""
    return f"`{facts.plan['program']}`" if "program" in facts.plan else "A DSPy program"


def _whose(facts: Facts) -> str:
    """A paragraph where the folder holds the weights of some predictors only."""
    if not facts.speakers:
        return ""
    others = [name for name in facts.policy.predictors if name not in facts.speakers]
    elsewhere = f" {_names(others)} of this program speak with other weights." if others else ""
    return f"\n\nThese are the weights of the predictors {_names(facts.speakers)}.{elsewhere}"


def _names(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def nothing_learned(facts: Facts) -> str:
    """A sentence when the run changed no weights, so that they are the base model's."""
    if facts.record is None or not facts.record.ending.nothing_learned:
        return ""
    return f"\n\nIn this run {facts.record.ending.words}; the weights are those that it started from."


def _use(facts: Facts) -> str:
    speak = [name for name in facts.policy.predictors if not facts.speakers or name in facts.speakers]
    precision, adapted = (" --dtype float32", f"\n\n{MERGED}") if facts.merged else ("", "")
    return f"""## Use

`FOLDER` is this folder. With any server that speaks OpenAI's protocol, and DSPy alone:

```
vllm serve FOLDER --generation-config vllm{precision}   # not the base model's own sampling defaults
```

```python
import dspy

program = ...  # a fresh program of the same class
program.load("FOLDER/program.json")  # the best instructions
lm = dspy.LM("openai/FOLDER", api_base="http://localhost:8000/v1", api_key="none")
{predictor_lines(facts, dict.fromkeys(speak, "lm"))}{chat_adapter_lines(facts)}
```{_with_dspy_fst(facts)}

The weights alone: `transformers.AutoModelForCausalLM.from_pretrained("FOLDER")`.{adapted}{frozen_note(facts)}"""


def _with_dspy_fst(facts: Facts) -> str:
    """How dspy_fst loads the folder; empty where it holds the weights of some predictors only."""
    if facts.speakers:
        return ""
    trusted = ", trust_code=True" if facts.foreign_code else ""
    warning = " `trust_code=True` takes up the evolved sources of its `dspy.Flex`; read them first." if trusted else ""
    return f"""

With dspy_fst, which also gives the whole population and serves the weights itself.{warning}

```python
import dspy_fst

program = dspy_fst.load("FOLDER", program{trusted})
```"""


def predictor_lines(facts: Facts, lms: Mapping[str, str]) -> str:
    """Python lines that give predictors their LMs with the sampling of the training.

    Args:
        lms: Predictor -> the expression of its LM.
    """
    sampling = facts.policy.predictors
    return "\n".join(
        f"{in_python(name)}.lm = {lm}.copy(temperature={sampling[name].temperature:g}, "
        f"max_tokens={sampling[name].max_tokens})"
        for name, lm in lms.items()
    )


def frozen_note(facts: Facts) -> str:
    """A paragraph for each predictor with a frozen LM."""
    return "".join(
        f"\n\nThe predictor `{name}` spoke with the frozen LM `{model}`; set one on it."
        for name, model in facts.policy.frozen.items()
    )


def chat_adapter_lines(facts: Facts) -> str:
    """Python lines that configure the adapter of the training; empty where none was recorded."""
    saved = facts.policy.adapter
    if saved is None:
        return ""
    lines = [
        *code_of(_without_second_call(saved)),
        "dspy.configure(adapter=adapter)  # the weights were trained through it",
    ]
    return "".join(f"\n{line}" for line in lines)


def _without_second_call(saved: SavedAdapter) -> SavedAdapter:
    """The adapter without the fallback call in JSON: DSPy's LMs would make it where the recorded setting says so, and
    rollouts never did. JSONAdapter and its subclasses have no fallback."""
    asks_again = saved.settings.get("use_json_adapter_fallback")
    if not asks_again or issubclass(DSPY_ADAPTERS.get(saved.name, dspy.Adapter), dspy.JSONAdapter):
        return saved
    return saved.model_copy(update={"settings": {**saved.settings, "use_json_adapter_fallback": False}})


# ---- training ----------------------------------------------------------------------------------


def _training(facts: Facts) -> Iterator[str]:
    record = facts.record
    if record is None:
        yield "## Training\n\nThe program was saved outside of its run's directory, so the card cannot tell of it."
        return
    yield "## Training\n\n" + table(("what", ""), _described(facts, record))
    yield from _recipe(record)
    yield "### Costs\n\n" + table(("what", "spent"), _spent(record))
    if record.lost:
        yield "Rollouts that were masked (not measured) or failed (scored as failures):\n\n" + table(
            ("reason", "rollouts"), [(reason, f"{count:,}") for reason, count in record.lost.items()]
        )
    if record.warnings:
        yield "Warnings of the run:\n\n" + "\n".join(f"- {_inline(warning.text)}" for warning in record.warnings)


def _described(facts: Facts, record: RunRecord) -> list[tuple[str, object]]:
    """What was trained on what, and how."""
    plan = facts.plan
    rows = {
        "program": plan.get("program"),
        "trained predictors": ", ".join(plan.get("trained", ())) or None,
        "metric": str(plan["metric"]).split()[0] if "metric" in plan else None,
        "examples for training": plan.get("examples", {}).get("trainset"),
        "examples for validation": plan.get("examples", {}).get("valset"),
        "engine": plan.get("engine"),
        "method": record.config.get("method"),
        "searches": len(record.cycles),
        "steps": len(record.steps),
        "weights": record.weights,
        "base": f"its linear layers hold numbers that were rounded to {facts.rounded}" if facts.rounded else None,
    }
    return [(name, value) for name, value in rows.items() if value is not None]


def _recipe(record: RunRecord) -> Iterator[str]:
    """The settings that differ from the defaults, if any do."""
    defaults = FSTConfig.model_construct().model_dump(mode="json")
    changed = [(name, value) for name, value in record.config.items() if value != defaults.get(name)]
    if changed:
        yield "### Recipe\n\nSettings that differ from the defaults of `FSTConfig`:\n\n" + table(
            ("setting", "value"), [(name, json.dumps(value)) for name, value in changed]
        )


def _spent(record: RunRecord) -> list[tuple[str, str]]:
    spent = {label: record.costs.count(name) for name, label in labels_of(record.costs).items()}
    spent["seconds from the first event to the last"] = round(sum(record.costs.seconds.values()))
    asked = record.costs.reflection_lm
    return [
        *((name, f"{value:,}") for name, value in spent.items()),
        *([(REFLECTION_LM, asked.words)] * bool(asked.calls)),
    ]


def _population(facts: Facts) -> str:
    """Every text, best first."""
    population = facts.population
    score_of = {m.digest: score for m, score in zip(population.members, population.scores, strict=True)}
    validated = facts.record is not None and any(node.validation is not None for node in facts.record.nodes)
    kind = "validation score" if validated else "score"
    parts = ["## Instructions\n\nThe population, best first; `program.json` holds the first."]
    for member in population.unique():
        parts.append(f"### `{member.digest}`, {kind} {number(score_of[member.digest])}")
        parts += [f"`{name}`:\n\n{_fenced(readable(name, text))}" for name, text in member.texts.items()]
    return "\n\n".join(parts)


def _scores(facts: Facts) -> Iterator[str]:
    record = facts.record
    if record is None:
        return
    measured = {
        "mean training reward, first step": next(iter(record.rewards), None),
        "mean training reward, last step": next(reversed(record.rewards), None),
        "validation score, best candidate": best([node.validation for node in record.nodes]),
    }
    shown = [(name, number(value)) for name, value in measured.items() if value is not None]
    if shown or record.validations or record.evaluations or record.two_by_two:
        yield "## Scores"
    if shown:
        yield table(("what", "score"), shown)
    if record.validations:
        made = validations_table(record)
        yield f"{made.title}: {_inline(verdict(record))}\n\n" + table(made.columns, made.rows)
    if record.evaluations:
        yield "Evaluations:\n\n" + table(EVALUATION, [_evaluation(evaluation) for evaluation in record.evaluations])
    if record.two_by_two:
        yield _crossed(record.two_by_two)
    if record.seen:
        yield "No test on problems that the run never saw:\n\n" + "\n".join(f"- {sentence}" for sentence in record.seen)


def _evaluation(row: Evaluated) -> tuple[str, ...]:
    """A row under the columns EVALUATION."""
    problems = share(row.problems, row.problems_of_split) + ("" if row.limit is None else f", limit {row.limit}")
    conditions = (row.candidate, row.weights, row.cycle, row.seed, row.k)
    return (plain(row.split), problems, *map(plain, conditions), number(row.mean), interval(row.low, row.high))


def _crossed(measured: TwoByTwo[Score]) -> str:
    """The conditions of the measurement and its four cells."""

    def line(row: str) -> list[str]:
        return [with_error(*(measured.at(row, column) or (None, None))) for column in measured.columns]

    columns = ("mean ± standard error", *(f"{column} weights" for column in measured.columns))
    under = f" ({_inline(measured.words)})" if measured.words else ""
    rows = [(f"{row} instructions", *line(row)) for row in measured.rows]
    return f"What each half brought{under}:\n\n" + table(columns, rows)


def _versions(facts: Facts) -> str:
    rows = [("dspy-fst that saved the program", facts.saved_by)]
    rows += [(f"{name} at the export", version) for name, version in facts.packages.items()]
    return "## Versions\n\n" + table(("package", "version"), rows)


# ---- Markdown ----------------------------------------------------------------------------------


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(_inline(cell) for cell in line) + " |" for line in lines)


def _inline(value: object) -> str:
    """A value inside a line, with every character escaped that would end the cell or open a tag or a link."""
    flat = " ".join(plain(value).split())
    return re.sub(r"([\\|<>`\[\]*_])", r"\\\1", flat) if flat != "---" else flat


def _fenced(text: str) -> str:
    """A fenced block whose fence is longer than any in the text."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"
