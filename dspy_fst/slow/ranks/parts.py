"""A state in parts, by torch.distributed.checkpoint (DCP): each rank writes its share of the tensors, and reads it.

In: tensors of which each rank holds a share (`DTensor`), and others that rank 0 alone writes. Out: a folder from which
any number of ranks reads what it holds, or a process alone everything, without torch.distributed.

trainer/.metadata       name, shape and type of each tensor, and which parts of it lie where
trainer/__0_0.distcp    the parts that rank 0 held; one file of each rank

No tensor is ever put together here to be written: a rank copies one of its parts at a time to main memory.

DCP pickles its metadata. It is read as data: what names another thing than DCP's own records is refused. Read from
torch 2.13 (`distributed/checkpoint/filesystem.py`).
"""

import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import STORAGE_TYPES, Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor
from torch.futures import Future

from dspy_fst.errors import RankError, briefly
from dspy_fst.run.files import DCP_METADATA

DCP = "torch.distributed.checkpoint"
RECORDS = {
    *((f"{DCP}.metadata", name) for name in ("Metadata", "TensorStorageMetadata", "TensorProperties", "StorageMeta")),
    *((f"{DCP}.metadata", name) for name in ("ChunkStorageMetadata", "MetadataIndex", "_MEM_FORMAT_ENCODING")),
    *((f"{DCP}.filesystem", "_StorageInfo"), ("torch", "Size"), ("torch.serialization", "_get_layout")),
    ("pathlib", "PosixPath"),
}
"""What DCP's metadata is made of, beside types of numbers."""
UNSEEN = "{path} is not seen there; put run_dir where the machines of all ranks see it"


def save_parts(tensors: Mapping[str, Tensor], folder: Path, group: ProcessGroup) -> None:
    """Write a share into an existing folder. A call of all ranks.

    Args:
        group: One of gloo, that nothing else uses meanwhile.

    Raises:
        OSError: the disk of a rank, which is named, refused to write. All ranks have the same.
        RankError: a rank, which is named, cannot write its share for another reason, or does not see the folder.
        RuntimeError: a rank is gone.
    """
    try:
        # Without copies ahead: they would be waited for on the current card of this thread, which may be another one.
        dcp.save(dict(tensors), storage_writer=_Writer(folder, per_thread_copy_ahead=0), process_group=group)
    except CheckpointException as error:
        rank, failure = min((rank, wrapped[0]) for rank, wrapped in error.failures.items())
        if isinstance(failure, OSError) and failure.errno:
            raise OSError(failure.errno, f"rank {rank}: {failure.strerror}") from failure
        raise RankError(f"rank {rank} cannot write its part of a state: {briefly(failure)}") from failure


def read_parts(folder: Path, shares: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a state; what another rank holds is neither read nor waited for.

    Args:
        shares: Name of a parameter -> the parameter. Of a tensor ``KIND/PARAMETER`` that is as large, what is read is
            shared out as the parameter is.

    Raises:
        ValueError, OSError: they cannot be read.
    """
    reader = _Reader(folder)
    try:
        facts = reader.read_metadata().state_dict_metadata
        tensors = {name: _place_of(one, shares.get(name.partition("/")[2])) for name, one in facts.items()}
        with warnings.catch_warnings():  # that it reads alone
            warnings.simplefilter("ignore", UserWarning)
            dcp.load(tensors, storage_reader=reader, no_dist=True)
    except CheckpointException as error:
        ((failure, _),) = error.failures.values()
        if not isinstance(failure, Exception):
            raise failure from None  # a signal's, which DCP holds for a failure of the reading
        raise ValueError(briefly(failure)) from failure
    except (OSError, ValueError):
        raise
    except Exception as error:  # a damaged pickle may end in any, or become any object
        raise ValueError(f"{folder / DCP_METADATA}: {briefly(error)}") from error
    return tensors


def _place_of(facts: STORAGE_TYPES, like: Tensor | None) -> Tensor:
    """An empty tensor for one that was written."""
    if not isinstance(facts, TensorStorageMetadata):
        raise TypeError("it holds something else than tensors")
    number = facts.properties.dtype
    if isinstance(like, DTensor) and (like.shape, like.dtype) == (facts.size, number):
        return torch.empty_like(like, requires_grad=False)
    return torch.empty(facts.size, dtype=number)


class _Writer(dcp.FileSystemWriter):
    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        if not Path(self.path).is_dir():  # DCP would make one, on a disk of this machine's own
            raise RankError(UNSEEN.format(path=self.path))
        return super().prepare_local_plan(plan)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        try:
            return super().write_data(plan, planner)
        except Exception as error:
            if (disk := _of_disk(error)) is None:
                raise
            raise disk from None  # another rank is sent an error without what it came from

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        for place in (written.storage_data for of_rank in results for written in of_rank):
            file = Path(self.path) / place.relative_path
            if not file.exists() or file.stat().st_size < place.offset + place.length:
                raise RankError(UNSEEN.format(path=f"the whole of {file}"))
        super().finish(metadata, results)


def _of_disk(error: BaseException | None) -> OSError | None:
    """What the disk said, where an error came up while its error was handled: torch's archives raise one of their own.
    None: it said nothing."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


class _Reader(dcp.FileSystemReader):
    def read_metadata(self, *arguments: object, **options: object) -> Metadata:
        with (Path(self.path) / DCP_METADATA).open("rb") as file:
            found = _Records(file).load()
        if not isinstance(found, Metadata):
            raise TypeError("it holds no metadata")
        return found


class _Records(pickle.Unpickler):
    """Reads DCP's records, and runs no code that a file names."""

    def find_class(self, module: str, name: str) -> object:
        number = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if number or (module, name) in RECORDS:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which is none of DCP's records")
