"""Whether a run can be played on its Ray cluster, as far as can be known without joining it."""

from collections.abc import Iterator, Sequence

import dspy

from dspy_fst.cluster.connecting import address_faults
from dspy_fst.config import FSTConfig
from dspy_fst.engine.machine import Launch
from dspy_fst.policy_lm import PolicyLM


def cluster_faults(
    address: str | None,
    student: object,
    metric: object,
    trainset: Sequence[dspy.Example],
    valset: Sequence[dspy.Example] | None,
) -> Iterator[str]:
    """Why the cluster cannot be joined, or what of the run cannot be sent there.

    Args:
        address: The setting ``ray``; nothing is asked for None.
    """
    if address is None:
        return
    faults = [*address_faults(address)]
    yield from faults
    if not faults:
        from dspy_fst.cluster.shipping import shipping_faults  # imports Ray

        yield from shipping_faults(student=student, metric=metric, trainset=trainset, valset=valset)


def rank_faults(config: FSTConfig) -> Iterator[str]:
    """Why a run cannot have the ranks that it asks for, as far as this process knows."""
    if config.ranks == 1:
        return
    asked = f"ranks={config.ranks}"
    if config.ray is None:
        yield f"{asked}: the others are actors of a Ray cluster; name it with ray (--ray ADDRESS), or use torchrun"
    if (world := Launch.of().world) > 1:
        yield f"{asked}: a launcher has started {world} processes already (WORLD_SIZE); use ranks or the launcher"


def transfer_rank_faults(config: FSTConfig, policy: PolicyLM) -> Iterator[str]:
    """Why new weights cannot reach the engine of a run with several ranks in the way that its options say."""
    ranks = max(config.ranks, Launch.of().world)
    if ranks > 1 and policy.handle.options.get("weight_transfer") == "ipc":
        yield (
            f"weight_transfer is 'ipc', and {ranks} processes train: vLLM would wait for the others, which hold no "
            "weights on the server's card; leave it unset"
        )
