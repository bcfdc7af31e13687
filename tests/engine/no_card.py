"""What stands in for NCCL, CUDA's streams and CUDA IPC on a CPU, below vLLM's own weight transfer on both sides.

A broadcast goes through the store by which a group's processes find each other. Another process's memory is a file.
vLLM loads `install` in each process of a server as a plugin.
"""

import os
import tempfile
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from dspy_fst.engine.vllm.launched import Launch, launch_here

ROOT = Path(__file__).parents[2]


class StoreGroup:
    """As PyNcclCommunicator is used by a transfer."""

    def __init__(self, group):
        self.group = group

    def broadcast(self, tensor: Tensor, src: int, stream: object = None) -> None:
        tensor.copy_(self.group.broadcast(tensor, src))

    def destroy(self) -> None:
        """Whoever waits for a broadcast gets an error, as the store goes with its group."""
        self.group = None


def join(master_address: str, master_port: int, rank: int, world_size: int, device: object) -> StoreGroup:
    from vllm.distributed.utils import StatelessProcessGroup

    return StoreGroup(StatelessProcessGroup.create(master_address, master_port, rank, world_size))


def export(tensor: Tensor) -> tuple[None, tuple[object, ...]]:
    with tempfile.NamedTemporaryFile(suffix=".pt", delete=False) as file:
        torch.save(tensor, file)
    return None, (file.name, *[0] * 6)


def rebuild(path: str, *_: object) -> Tensor:
    tensor: Tensor = torch.load(path)
    Path(path).unlink()
    return tensor


class Either:
    """vLLM's engine of a worker for NCCL, or the one for IPC, as the trainer introduces itself."""

    def __init__(self, *arguments: object):
        from vllm.distributed.weight_transfer import ipc_engine, nccl_engine

        self.nccl = nccl_engine.NCCLWeightTransferEngine(*arguments)
        self.ipc = ipc_engine.IPCWeightTransferEngine(*arguments)
        self.engine = self.nccl

    def parse_init_info(self, facts):
        self.engine = self.nccl if "master_address" in facts else self.ipc
        return self.engine.parse_init_info(facts)

    def __getattr__(self, name: str):
        return getattr(self.engine, name)


def install(put=setattr) -> None:
    """
    Args:
        put: `setattr`, or one that is undone.
    """
    from vllm.distributed.weight_transfer import factory, ipc_engine, nccl_common, packed_tensor

    stream = SimpleNamespace(synchronize=lambda: None)
    engines = factory.WeightTransferEngineFactory
    put(engines, "_registry", {**engines._registry, "nccl": lambda: Either})
    put(nccl_common, "stateless_init_process_group", join)
    put(packed_tensor, "_get_streams", lambda device, buffers: [stream] * buffers)
    # Set in the environment, as for IPC, it would also let answers pass that vLLM refuses to send in a run over NCCL.
    put(ipc_engine, "envs", SimpleNamespace(VLLM_ALLOW_INSECURE_SERIALIZATION=True))
    put(ipc_engine, "reduce_tensor", export)
    put(ipc_engine, "rebuild_cuda_tensor", rebuild)
    put(torch.cuda, "stream", lambda stream: nullcontext())
    put(torch.cuda, "ipc_collect", lambda: None)
    put(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="no card"))
    put(torch.accelerator, "current_device_index", lambda: 0)


def launched_for_transfer(folder: Path) -> Launch:
    """Launches a server for transfers over what stands in for NCCL; its plugin is put into the folder."""
    facts = folder / "no_card-0.dist-info"
    facts.mkdir(parents=True)
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: no-card\nVersion: 0\n")
    (facts / "entry_points.txt").write_text("[vllm.general_plugins]\nno_card = tests.engine.no_card:install\n")
    path = os.pathsep.join([str(folder), str(ROOT), os.environ.get("PYTHONPATH", "")])

    def launch(settings, model, loras):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PYTHONPATH", path)
            return launch_here(replace(settings, weight_transfer="nccl"), model, loras)

    return launch
