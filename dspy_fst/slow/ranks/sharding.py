"""A policy's weights in parts, a part on each rank (torch's FSDP2), and whole again.

In: a policy that every rank has read whole. Out: the same policy, of which each rank keeps its share of every weight, a
`DTensor`, and therefore of every gradient and moment.

- A layer's weights are put together while it computes. Those outside the layers (embedding, norms, head) are whole from
  the policy's forward to the end of its backward: the head may be the embedding, and its gradient is computed between
  the two (`slow.head`).
- Gradients are summed over ranks, and not averaged: a micro-batch's loss is its share of a sum.
- What a micro-batch did not use, e.g. another LoRA adapter, has a gradient of zero: another rank's may have used it.

Ranks wait for each other in every forward and backward, so all make the same number of them in the same order. Read
from torch 2.13 (`distributed/fsdp/_fully_shard`).
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from dspy_fst.errors import TrainingError
from dspy_fst.slow.layers import outermost_layers
from dspy_fst.slow.ranks.ranks import whole


def shard(policy: nn.Module, device: torch.device, ranks: int) -> None:
    """Leave this rank's share of the policy's weights on the device, one layer after the other.

    Raises:
        TrainingError: torch cannot share out one of the tensors, e.g. a single number.
    """
    mesh = init_device_mesh(device.type, (ranks,))
    units = [*outermost_layers(policy), policy]
    try:
        for unit in units:
            fully_shard(unit, mesh=mesh)
    except (ValueError, NotImplementedError) as error:
        raise TrainingError(f"sharding='fsdp': torch cannot shard this model ({error}); use sharding=None") from error
    for unit in units:
        assert isinstance(unit, FSDPModule)
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)
        unit.set_reduce_scatter_unused_params(True, recurse=False)


def let_go(policy: nn.Module) -> None:
    """Keep this rank's share alone again, after a forward that no backward follows."""
    if isinstance(policy, FSDPModule):
        policy.reshard()


def gathered(tensors: Mapping[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
    """The whole tensors in main memory, one after the other. A call of all ranks.

    Args:
        keep: Whether this rank wants them; else the result is empty.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        together = whole(tensor)
        if keep:
            found[name] = together.cpu()
    return found


def part_for(parameter: Tensor, tensor: Tensor) -> Tensor:
    """This rank's share of a whole tensor, as it has one of the parameter; the tensor itself where nothing is shared,
    or where it is shared out already.

    Every rank gives the same tensor.
    """
    if not isinstance(parameter, DTensor) or isinstance(tensor, DTensor):
        return tensor
    part = distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)
    return part.clone()  # else the share is a view, which keeps the whole tensor in memory
