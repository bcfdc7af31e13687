"""How a run is started on a layout: what its project file says of the layout, and the command."""

import shlex

from dspy_fst.sizing.layout import Layout
from dspy_fst.sizing.machine import CardSheet


def sections_for(layout: Layout, card: CardSheet) -> dict[str, dict[str, object]]:
    """Sections of a project file, as far as they depend on the layout.

    On several machines Ray places servers and trainer ranks.
    """
    share = int(100 * (layout.served + layout.cache) / card.memory) / 100
    options: dict[str, object] = {"gpu_memory_utilization": share}
    recipe: dict[str, object] = {"sharding": "fsdp"} if layout.trainers > 1 else {}
    if layout.machines > 1:
        options |= {"servers": layout.engines, "on_ray": True}
        recipe |= {"ray": "auto", **({"ranks": layout.trainers} if layout.trainers > 1 else {})}
    elif not layout.shared:
        options |= {"servers": layout.engines, "cards": list(range(layout.trainers, layout.cards))}
    if layout.group > 1:
        options["extra_args"] = ["--tensor-parallel-size", str(layout.group)]
    policy: dict[str, object] = {"engine": "vllm", "engine_options": options}
    return {"policy": policy, **({"recipe": recipe} if recipe else {})}


def command_for(layout: Layout, file: str) -> str:
    """The command that starts the run; on several machines on that of the trainer's first card."""
    run = f"run {shlex.quote(file)}"
    if layout.trainers == 1 or layout.machines > 1:
        return f"dspy-fst {run}"
    return f"torchrun --nproc-per-node {layout.trainers} -m dspy_fst.cli {run}"
