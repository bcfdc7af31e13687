"""Cards as their vendors describe them, and what is assumed of the machines around them. Every number has its source.

A data sheet tells peaks. The shares of them that a run reaches stand below as named constants, each measured here or
said to be assumed.
"""

from dataclasses import dataclass

from dspy_fst.errors import ConfigurationError
from dspy_fst.formatting.numbers import GIB

NODE = 8
"""Cards of one machine (HGX and DGX boards have eight; also assumed of other cards)."""
UPDATE_SHARE = 0.09
"""Share of a card's dense bfloat16 FLOP/s that an update reaches (measured on one H100 at 1.7B and 8B: 0.086 and 0.093,
`benchmarks/results/gpu_check.json`, column ``mfu_read``). The reference's pass is inside it."""
READ_SHARE = 0.6
"""Share of a card's memory bandwidth that decoding reaches (assumed)."""
PROMPT_SHARE = 0.4
"""Share of a card's dense bfloat16 FLOP/s that reading prompts, or many rows of a decoding step, reaches (assumed)."""
LINK_SHARE = 0.7
"""Share of a link's bandwidth that collectives between trainer cards reach (assumed)."""
STEP_S = 0.002
"""Seconds of a decoding step beside the card's work: scheduling and launches (assumed)."""
GATHER_S = 10e-6
"""Seconds of one all-reduce of a few rows between the cards of an engine; a layer has two (assumed)."""
PROGRAM_S = 0.002
"""Seconds of Python in one process for each call: DSPy's rendering, HTTP and parsing (assumed; see docs/sizing.md for
what the laboratory's calls took)."""
NETWORK = 50e9
"""Bytes a second of one card's link to other machines: 400 Gbit/s (NVIDIA DGX H100 data sheet: eight such ports)."""
LOCAL_WRITE, LOCAL_READ = 2e9, 4e9
"""Bytes a second of one machine's NVMe disk (assumed)."""
SHARED_STORAGE = 10e9
"""Bytes a second of storage that several machines share, all readers together (assumed)."""
VERIFIED = 1e9
"""Bytes a second that a server compares after a publish (assumed; the folder is read again, and each tensor hashed and
compared)."""
REFLECTION_S = 20.0
"""Seconds of one reflection by a hosted LM (assumed)."""


@dataclass(frozen=True)
class CardSheet:
    """One card, by its data sheet.

    >>> CARDS["h100"].bandwidth
    3350000000000.0
    """

    name: str
    memory: int
    """Bytes that torch sees, in whole GiB: some less than the vendor's gigabytes, e.g. 22 GiB of an L4's 24 GB."""
    bandwidth: float
    """Bytes a second of its memory."""
    flops: float
    """Dense bfloat16 operations a second, without sparsity."""
    link: float
    """Bytes a second, one way, to another card of the machine: NVLink, or PCIe where there is none."""
    source: str


CARDS = {
    card.name: card
    for card in (
        CardSheet("l4", 22 * GIB, 300e9, 121e12, 32e9, "NVIDIA L4 data sheet (242 TFLOPS with sparsity)"),
        CardSheet("rtx4090", 23 * GIB, 1008e9, 165e12, 32e9, "NVIDIA Ada GPU architecture whitepaper, appendix A"),
        CardSheet("l40s", 44 * GIB, 864e9, 362e12, 32e9, "NVIDIA L40S data sheet (733 TFLOPS with sparsity)"),
        CardSheet("a100", 79 * GIB, 2039e9, 312e12, 300e9, "NVIDIA A100 80GB SXM data sheet"),
        CardSheet("h100", 79 * GIB, 3350e9, 989e12, 450e9, "NVIDIA H100 SXM data sheet (1,979 TFLOPS with sparsity)"),
        CardSheet("h200", 139 * GIB, 4800e9, 989e12, 450e9, "NVIDIA H200 SXM data sheet"),
        CardSheet("b200", 178 * GIB, 7700e9, 2250e12, 900e9, "NVIDIA HGX B200 data sheet, an eighth of the board"),
    )
}
"""Name -> card. The vendor's figures as published tables repeat them: the sheets themselves were not at hand. FLOP/s
are dense. NVLink is half of what is told for both ways. Memory is the "total capacity" of torch's own errors, as they
are quoted in public."""


def card_named(name: str) -> CardSheet:
    """
    >>> card_named("H100").flops
    989000000000000.0

    Raises:
        ConfigurationError: no such card is known; with those that are.
    """
    if (card := CARDS.get(name.lower().replace("-", "").replace(" ", ""))) is None:
        raise ConfigurationError([f"card={name!r} is not known; known cards: {', '.join(CARDS)}"])
    return card
