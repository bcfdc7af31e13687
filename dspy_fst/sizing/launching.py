"""How a run is started on a layout: what its project file says of the layout, and the command."""

import shlex

from dspy_fst.sizing.layout import Layout
from dspy_fst.sizing.machine import NODE, CardSheet


def sections_for(layout: Layout, card: CardSheet) -> dict[str, dict[str, object]]:
    """Sections of a project file, as far as they depend on the layout.

    On several machines the servers of the engines are launched by hand, each on cards of one machine.
    """
    options: dict[str, object]
    if layout.machines > 1:
        options = {"attach_url": [f"http://SERVER-{number}:8000" for number in range(1, layout.engines + 1)]}
    else:
        share = int(100 * (layout.served + layout.cache) / card.memory) / 100
        options = {"gpu_memory_utilization": share}
        if not layout.shared:
            options |= {"servers": layout.engines, "cards": list(range(layout.trainers, layout.cards))}
        if layout.group > 1:
            options["extra_args"] = ["--tensor-parallel-size", str(layout.group)]
    policy: dict[str, object] = {"engine": "vllm", "engine_options": options}
    return {"policy": policy, **({"recipe": {"sharding": "fsdp"}} if layout.trainers > 1 else {})}


def command_for(layout: Layout, file: str) -> str:
    """The command that starts the run, on every machine with trainer cards."""
    run = f"run {shlex.quote(file)}"
    if layout.trainers == 1:
        return f"dspy-fst {run}"
    nodes = -(-layout.trainers // NODE)
    meet = f"--nnodes {nodes} --rdzv-backend c10d --rdzv-endpoint FIRST_MACHINE:29500 " if nodes > 1 else ""
    return f"torchrun {meet}--nproc-per-node {min(layout.trainers, NODE)} -m dspy_fst.cli {run}"
