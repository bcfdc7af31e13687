"""What a run takes and what is free, as `check` and `sizes` tell it; and machines that a user describes."""

import re
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dspy_fst.cli.printer import Printer
from dspy_fst.run.written import GIB, MIB, format_bytes

if TYPE_CHECKING:
    from dspy_fst.memory import Available, MemoryPlan

UNITS = {"GIB": GIB, "G": GIB, "GB": 10**9, "MIB": MIB, "M": MIB, "MB": 10**6, "": GIB}
"""Unit -> bytes. A bare number is of GiB: what vendors call an 80 GB card has about 80 GiB."""
UNTRIED = "computed, not measured: this package has not run on a GPU"

Card = Annotated[
    str | None,
    typer.Option("--gpu", metavar="SIZE", help="Imagine a card of this size, e.g. 24GiB, instead of this machine."),
]
Cards = Annotated[
    int,
    typer.Option("--cards", min=1, max=2, help="How many such cards: the engine gets the second. Nothing is sharded."),
]


def described_room(gpu: str | None, cards: int) -> "Available | None":
    """The machine that --gpu and --cards describe; None: this one."""
    if gpu is None:
        if cards > 1:
            raise typer.BadParameter("say how large each card is: --gpu 24GiB --cards 2")
        return None
    card = read_size(gpu)
    from dspy_fst.memory import imagined_machine  # after what may be wrong with the options: it takes seconds

    return imagined_machine(card, cards)


def read_size(text: str) -> int:
    """Bytes of a size that a person wrote.

    >>> read_size("24GiB") == read_size("24") == 24 * 2**30
    True
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if found is None or found[2].upper() not in UNITS or not float(found[1]) > 0:
        raise typer.BadParameter(f"{text!r} is no size; write one like 24GiB or 80GB")
    return int(float(found[1]) * UNITS[found[2].upper()])


def requirements(memory_plan: "MemoryPlan | None") -> list[dict[str, Any]] | None:
    """Bytes by place; None before anything is known of the model. ``free`` is None where nobody looked."""
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
        }
        for requirement in memory_plan.requirements
    ]


def micro_batch(memory_plan: "MemoryPlan | None") -> dict[str, Any] | None:
    """The tokens of a micro-batch, and whether they were chosen."""
    return None if memory_plan is None else {"tokens": memory_plan.micro_batch_tokens, "chosen": memory_plan.chosen}


def show_needs(out: Printer, told: list[dict[str, Any]]) -> None:
    """The table of places, and of whom each is taken by."""
    out.table(
        ("where", "taken", "expected", "at most", "free"),
        [
            (n["place"], *(format_bytes(n[k]) for k in ("certain", "expected", "at_most")), _free(n["free"]))
            for n in told
        ],
    )
    for requirement in told:
        parts = ", ".join(f"{format_bytes(size)} {part}" for part, size in requirement["parts"].items() if size)
        if parts:
            out.line(f"{requirement['place']}: {parts}")


def show_micro_batch(out: Printer, told: dict[str, Any]) -> None:
    """One sentence."""
    by = "chosen by micro_batch_tokens=auto" if told["chosen"] else "as the recipe says"
    out.line(f"micro-batches of {told['tokens']:,} tokens, {by}")


def _free(amount: int | None) -> str:
    return "not looked at" if amount is None else format_bytes(amount)
