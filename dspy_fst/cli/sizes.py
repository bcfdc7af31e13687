"""`dspy-fst sizes`: the GPU memory, main memory and disk that training a model needs. A config is enough."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypedDict

import typer

from dspy_fst.cli.common import Debug, Json, errors_as_text
from dspy_fst.cli.memory_tables import (
    COMPUTED,
    Card,
    Cards,
    MicroBatchSize,
    PlaceNeeds,
    described_room,
    requirements,
    show_gradient_checkpointing,
    show_micro_batch,
    show_needs,
)
from dspy_fst.cli.printer import Printer
from dspy_fst.errors import ConfigurationError
from dspy_fst.formatting.numbers import GIB, format_bytes
from dspy_fst.model_files.hub import known_models, unknown_fault

if TYPE_CHECKING:
    from dspy_fst.config import FSTConfig
    from dspy_fst.engine.making import EngineKind
    from dspy_fst.memory import Available, MemoryPlan, ModelSize, Workload

LONGEST_REPLY = 1024
"""Tokens: the default ``max_tokens`` of a PolicyLM."""
TABLE_CARDS = (24, 48, 80)
"""GiB of the cards in the table."""


class SizesOutcome(TypedDict):
    """Everything that ``sizes`` reports of one model; with ``--json`` these are the keys."""

    model: str
    parameters: int
    fits: bool
    expected_to_fit: bool
    reply_limit: int | None
    """Tokens of the longest reply that fits alone, where a longer one may come; None where every reply fits."""
    sure: bool
    engine: str
    """``"vllm"`` or ``"in_process"``."""
    engine_options: dict[str, float]
    micro_batch_tokens: MicroBatchSize
    gradient_checkpointing: bool
    trained: str
    needs: list[PlaceNeeds]
    written: str
    disk_advice: str
    faults: list[str]
    warnings: list[str]
    source: str


def sizes(
    model: Annotated[
        str | None, typer.Argument(help="A folder with a config.json, with weights or without; or a hub's model.")
    ] = None,
    gpu: Card = None,
    cards: Cards = 1,
    kl: Annotated[
        bool, typer.Option("--kl/--no-kl", help="With the recipe's KL to the start, or with kl_coefficient=0.")
    ] = True,
    lora: Annotated[
        bool, typer.Option("--lora/--all-weights", help="Train a LoRA adapter of rank 16, or all weights.")
    ] = False,
    micro_batch_tokens: Annotated[
        str, typer.Option(metavar="N", help="Tokens of a micro-batch; auto takes the most that fit.")
    ] = "auto",
    max_tokens: Annotated[
        int,
        typer.Option(
            min=1, metavar="N", help="Tokens of the longest reply: one that is longer than a micro-batch comes alone."
        ),
    ] = LONGEST_REPLY,
    table: Annotated[
        bool, typer.Option("--table", help="Well-known models against cards of 24, 48 and 80 GiB, as Markdown.")
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """What training a model needs of GPUs, memory and disk.

    The recipe's defaults, with all weights or a LoRA adapter. `dspy-fst check` reports the same for a project.
    """
    with errors_as_text(debug):
        if table:
            typer.echo(size_table())
            return
        if model is None:
            raise typer.BadParameter("name a model, or ask for --table")
        if fault := unknown_fault(model):  # checked before the imports below, which take seconds
            raise ConfigurationError([fault])
        outcome = _outcome(model, described_room(gpu, cards), _recipe(kl, micro_batch_tokens, lora), max_tokens)
        typer.echo(json.dumps(outcome)) if as_json else _show(outcome)


def _recipe(kl: bool, tokens: str, lora: bool = False) -> "FSTConfig":
    from dspy_fst.config import make_config

    settings: dict[str, object] = {"adapter": "lora" if lora else None} | ({} if kl else {"kl_coefficient": 0.0})
    config, faults = make_config({**settings, "micro_batch_tokens": int(tokens) if tokens.isdigit() else tokens})
    if config is None:
        raise ConfigurationError(faults)
    return config


def _outcome(model: str, room: "Available | None", config: "FSTConfig", max_tokens: int) -> SizesOutcome:
    from dspy_fst.engine.making import resolve_kind
    from dspy_fst.memory import available_now, find_size, plan_for

    size = find_size(model)
    where = room or available_now(Path.cwd())
    kind = "vllm" if where.imagined else resolve_kind("auto")
    workload = _workload(model, size, max_tokens, config, where, kind)
    memory_plan, options = plan_for(workload, config, where), dict(workload.options)
    return {
        "model": model,
        "parameters": size.parameters,
        "fits": not memory_plan.faults() and memory_plan.expected_to_fit and memory_plan.reply_limit is None,
        "expected_to_fit": not memory_plan.faults() and memory_plan.expected_to_fit,
        "reply_limit": memory_plan.reply_limit,
        "sure": not [*memory_plan.faults(), *memory_plan.doubts()],
        "engine": kind,
        "engine_options": options,
        "micro_batch_tokens": {"tokens": memory_plan.micro_batch_tokens, "chosen": memory_plan.chosen},
        "gradient_checkpointing": memory_plan.gradient_checkpointing,
        "trained": memory_plan.choice,
        "needs": requirements(memory_plan) or [],
        "written": memory_plan.writes.words,
        "disk_advice": disk_advice(memory_plan),
        "faults": memory_plan.faults(),
        "warnings": memory_plan.warnings(),
        "source": COMPUTED if where.on_gpu else "computed; benchmarks/sizes.py holds it against measured peaks",
    }


def _workload(
    model: str, size: "ModelSize", max_tokens: int, config: "FSTConfig", room: "Available", kind: "EngineKind"
) -> "Workload":
    """The model and its engine, which gets the share of a card with which the run fits."""
    from dspy_fst.memory import Workload, fitting_share

    workload = Workload(model, size, kind, longest_reply=max_tokens)
    if kind != "vllm" or not room.on_gpu:
        return workload
    return replace(workload, options={"gpu_memory_utilization": fitting_share(workload, config, room)})


def disk_advice(memory_plan: "MemoryPlan") -> str:
    """What each update writes, and the settings that write less."""
    writes = memory_plan.writes
    return (
        f"each update writes {format_bytes(writes.weights)} of weights and {format_bytes(writes.state)} of state; "
        "checkpoint_every=6 writes a state every sixth update, keep_states=1 and keep_weights=1 keep fewer"
    )


def _show(outcome: SizesOutcome) -> None:
    out = Printer()
    out.heading(f"{outcome['model']}: {outcome['parameters']:,} parameters")
    show_needs(out, outcome["needs"])
    if outcome["expected_to_fit"]:
        show_micro_batch(out, outcome["micro_batch_tokens"])
        show_gradient_checkpointing(out, outcome["gradient_checkpointing"])
    out.line(outcome["trained"])
    options = ", ".join(f"{name}: {value:g}" for name, value in outcome["engine_options"].items())
    out.line(f"engine: {outcome['engine']}{f', engine_options: {{{options}}}' if options else ''}")
    out.line(outcome["written"])
    out.line(outcome["disk_advice"])
    out.line(outcome["source"])
    out.heading(_verdict(outcome))
    for line in (*outcome["faults"], *outcome["warnings"]):
        out.line(f"- {line}")


def _verdict(outcome: SizesOutcome) -> str:
    if outcome["sure"]:
        return "It fits"
    if outcome["fits"]:
        return "It is expected to fit"
    if outcome["expected_to_fit"] and outcome["reply_limit"]:
        return f"It fits only if replies stay under {outcome['reply_limit'] + 1} tokens; lower max_tokens"
    return "It does not fit"


# ---- the table ---------------------------------------------------------------------------------


WAYS = {"all, KL": (True, False), "all, no KL": (False, False), "LoRA, KL": (True, True)}
"""What is trained -> whether there is a KL, and whether a LoRA adapter is trained."""


def size_table() -> str:
    """Markdown: for each well-known model the micro-batch that fits on one card and on two."""
    head = ["model", "parameters", "trained", "trainer", "vLLM, least", "state in memory", "disk, kept"]
    head += [f"{card} GiB{' x 2' * (cards == 2)}" for card in TABLE_CARDS for cards in (1, 2)]
    lines = [head, ["---"] * len(head), *_rows()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _rows() -> Iterator[list[str]]:
    from dspy_fst.memory import find_size

    for model in known_models():
        size = find_size(model)
        for way, (kl, lora) in WAYS.items():
            yield _row(model, size, _recipe(kl, "auto", lora), way)


def _row(model: str, size: "ModelSize", config: "FSTConfig", way: str) -> list[str]:
    from dspy_fst.memory import DISK, MEMORY, imagined_machine, least_served, plan_for

    memory_plans = []
    for card in TABLE_CARDS:
        for cards in (1, 2):
            room = imagined_machine(card * GIB, cards)
            workload = _workload(model, size, LONGEST_REPLY, config, room, "vllm")
            memory_plans.append(plan_for(workload, config, room))
    taken = {
        allocation.part: allocation.certain
        for requirement in memory_plans[0].requirements
        for allocation in requirement.allocations
    }
    kept = {requirement.place: requirement.certain for requirement in memory_plans[0].requirements}
    amounts = (taken["the trainer"], least_served(workload, config), kept[MEMORY], kept[DISK])
    return [
        model.partition("/")[2],
        f"{size.parameters / 1e9:.2f}B",
        way,
        *(f"{amount / GIB:.1f}" for amount in amounts),
        *map(_fitting, memory_plans),
    ]


def _fitting(memory_plan: "MemoryPlan") -> str:
    """Tokens of the largest micro-batch that fits; in brackets where it is only expected to fit."""
    if memory_plan.faults() or not memory_plan.expected_to_fit:
        return "no"
    return f"({memory_plan.micro_batch_tokens:,})" if memory_plan.doubts() else f"{memory_plan.micro_batch_tokens:,}"
