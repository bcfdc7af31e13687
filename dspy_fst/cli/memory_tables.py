"""Tables of the memory and disk that a run needs, for `check` and `sizes`, and the options that describe a machine."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal, TypedDict

import typer

from dspy_fst.cli.printer import Printer
from dspy_fst.formatting.numbers import GIB, MIB, format_bytes

if TYPE_CHECKING:
    from dspy_fst.memory import Available, MemoryPlan

UNITS = {"GIB": GIB, "G": GIB, "GB": 10**9, "MIB": MIB, "M": MIB, "MB": 10**6, "": GIB}
"""Unit -> bytes. A number without a unit is in GiB: what vendors call an 80 GB card has about 80 GiB."""
COMPUTED = (
    "computed, not measured here: on one H100 the peaks of four updates, without vLLM, were met to -2 to +5 %; "
    "what vLLM takes was not measured"
)
"""Of figures for a card; `benchmarks/results/gpu_check.json` holds the peaks."""

Card = Annotated[
    str | None,
    typer.Option("--gpu", metavar="SIZE", help="Imagine a card of this size, e.g. 24GiB, instead of this machine."),
]
Cards = Annotated[
    int,
    typer.Option("--cards", min=1, max=2, help="How many such cards: the engine gets the second. Nothing is sharded."),
]


class PlaceNeeds(TypedDict):
    """What a run needs of one place, in bytes."""

    place: str
    """E.g. ``"memory"``, ``"GPU 0"`` or ``"disk"``."""
    certain: int
    expected: int
    at_most: int
    free: int | None
    """None where it is not known."""
    parts: dict[str, int]
    """Who needs it -> the certain bytes."""
    made_of: dict[str, dict[str, int]]
    """Who needs it -> what for -> the bytes, where that is known."""


class MicroBatchSize(TypedDict):
    """The size of a micro-batch."""

    tokens: int | Literal["auto"]
    """``"auto"`` before anything is known of the model."""
    chosen: bool
    """Whether ``micro_batch_tokens="auto"`` chose it."""


def described_room(gpu: str | None, cards: int) -> "Available | None":
    """The machine that --gpu and --cards describe; None for this machine."""
    if gpu is None:
        if cards > 1:
            raise typer.BadParameter("say how large each card is: --gpu 24GiB --cards 2")
        return None
    card = read_size(gpu)
    from dspy_fst.memory import imagined_machine  # imported after the options are checked: it takes seconds

    return imagined_machine(card, cards)


def read_size(text: str) -> int:
    """A size that a person wrote, in bytes.

    >>> read_size("24GiB") == read_size("24") == 24 * 2**30
    True
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if match is None or match[2].upper() not in UNITS or not float(match[1]) > 0:
        raise typer.BadParameter(f"{text!r} is no size; write one like 24GiB or 80GB")
    return int(float(match[1]) * UNITS[match[2].upper()])


def requirements(memory_plan: "MemoryPlan | None") -> list[PlaceNeeds] | None:
    """The needs by place; None before anything is known of the model."""
    from dspy_fst.memory import UNKNOWN

    if memory_plan is None:
        return None
    return [
        {
            "place": requirement.place,
            "certain": requirement.certain,
            "expected": requirement.expected,
            "at_most": requirement.at_most,
            "free": None if requirement.free == UNKNOWN else requirement.free,
            "parts": {allocation.part: allocation.certain for allocation in requirement.allocations},
            "made_of": {allocation.part: dict(allocation.made_of) for allocation in requirement.allocations},
        }
        for requirement in memory_plan.requirements
    ]


def show_needs(out: Printer, places: Sequence[PlaceNeeds]) -> None:
    """The table of places, then a line for each place with who needs it."""
    out.table(
        ("where", "taken", "expected", "at most", "free"),
        [
            (
                n["place"],
                format_bytes(n["certain"]),
                format_bytes(n["expected"]),
                format_bytes(n["at_most"]),
                _free(n),
            )
            for n in places
        ],
    )
    for need in places:
        parts = ", ".join(f"{format_bytes(size)} {who}" for who, size in need["parts"].items() if size)
        if parts:
            out.line(f"{need['place']}: {parts}")
        for who, made_of in need["made_of"].items():
            if made_of:
                out.line(f"{who}: {', '.join(f'{format_bytes(size)} {what}' for what, size in made_of.items())}")


def show_micro_batch(out: Printer, batch: MicroBatchSize) -> None:
    """One sentence."""
    by = "chosen by micro_batch_tokens=auto" if batch["chosen"] else "as the recipe says"
    size = batch["tokens"] if batch["tokens"] == "auto" else f"{batch['tokens']:,}"
    out.line(f"micro-batches of {size} tokens, {by}")


def show_gradient_checkpointing(out: Printer, on: bool) -> None:
    """One sentence, where layers are computed again."""
    if on:
        out.line("gradient checkpointing is on: layers are computed again in the backward pass, so that an update fits")


def _free(place: PlaceNeeds) -> str:
    return "not looked at" if place["free"] is None else format_bytes(place["free"])
