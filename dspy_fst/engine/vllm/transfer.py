"""Weights from this process's card to a server's workers, by vLLM's weight transfer over NCCL or CUDA IPC.

The contract of this file:

- What is sent are the tensors of a published folder, read here. So names, shapes, types and an untied head are those of
  a swap from the disk, and any version can be sent. The server does not read the folder.
- They are sent a second time to be compared: each worker compares the tensors that it uses with those that arrive.
- Every wait ends. vLLM waits for NCCL without a limit, so it is called in a thread that is given up after
  ``load_timeout_s``, or as soon as the server refuses.

Read from vLLM 0.32 (`distributed/weight_transfer`, `entrypoints/rl`). Its engines of both sides were run with a server
on a CPU, with stand-ins for NCCL, CUDA's streams and CUDA IPC. None of these three has been run.
"""

import base64
import pickle
import socket
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError, wait
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, TypeVar
from urllib.parse import urlsplit

from safetensors import safe_open

from dspy_fst.engine.base import Holding
from dspy_fst.engine.machine import free_port, has_gpu
from dspy_fst.engine.vllm.client import QUICK_TIMEOUT_S, VLLMClient
from dspy_fst.engine.vllm.server_settings import BUFFER_BYTES
from dspy_fst.engine.vllm.wire import WorkerAnswer, read_holding, said
from dspy_fst.errors import EngineError, NoAnswerError
from dspy_fst.run.settling import settle_in_thread

if TYPE_CHECKING:
    from torch import Tensor

Backend = Literal["nccl", "ipc"]
T = TypeVar("T")
_PARTING_S = 5.0
"""Longest wait for a server to let go of the connection (ours)."""


class _Turns:
    """A lock that goes to those who wait in the order of their asking."""

    def __init__(self) -> None:
        self._line: deque[object] = deque()
        self._moved = threading.Condition()

    @contextmanager
    def turn(self, longest_s: float) -> Iterator[None]:
        """
        Args:
            longest_s: The longest turn, in seconds; the wait is as long for each one ahead.

        Raises:
            NoAnswerError: those ahead took longer.
        """
        place = object()
        with self._moved:
            limit_s = longest_s * len(self._line)
            self._line.append(place)
        try:
            with self._moved:
                if not self._moved.wait_for(lambda: self._line[0] is place, limit_s):
                    raise NoAnswerError(f"waited {limit_s:g} s in vain for weight transfers to other servers to end")
            yield
        finally:
            with self._moved:
                self._line.remove(place)
                self._moved.notify_all()


_TURNS = _Turns()
"""One is taken to connect and to send: the senders to a fleet's servers would share CUDA streams and the card's
memory."""


class Sender(Protocol):
    """vLLM's trainer engine, which drives a server through a client and takes the tensors from a source."""

    client: "_Control"
    source: "_Folder | None"

    def send_weights(self) -> None: ...
    def shutdown(self) -> None: ...


class Transfer:
    """The way of weights to one server. Thread-safe: of all servers, one is sent to at a time.

    Args:
        client: Of the server, which was launched for this backend.
        backend: vLLM's name of it.
        how_to_launch: Ends the error for a server that was not.

    Raises:
        EngineError: the server was launched without this backend or without our worker extension; nothing was sent.
        NoAnswerError: no connection came about in time.
    """

    def __init__(self, client: VLLMClient, backend: Backend, how_to_launch: str):
        self._client, self._backend = client, backend
        self._require_launched_for_it(how_to_launch)
        with self._turn():
            self._sender: Sender | None = self._connected()

    def swap(self, folder: Path) -> None:
        """Swap a folder's weights in, after the requests in flight; see `VLLMClient.swap_weights`.

        Raises:
            EngineError: the server refused, or the transfer did not end in time. Its weights are unknown then.
        """
        self._client.swap_weights(lambda: self._send(folder, _Control(self._client)))

    def held(self, folder: Path) -> Holding:
        """Have each worker compare the tensors that it uses with the folder's, which are sent; see `Scorer.held`."""
        control = _Comparing(self._client)
        self._send(folder, control)
        return read_holding(control.answers)

    def close(self) -> None:
        """Let go of the connection on both sides. May be called twice."""
        if self._sender is not None:  # after a transfer that failed the server may be stuck in it
            self._part()
        self._leave()

    def _part(self) -> None:
        """Have the server let go of its side."""
        with suppress(NoAnswerError):  # it may have ended
            self._client.send("POST", "/shutdown_weight_transfer_engine", timeout_s=_PARTING_S)

    def _leave(self) -> None:
        sender, self._sender = self._sender, None
        if sender is not None:
            sender.shutdown()

    def _send(self, folder: Path, control: "_Control") -> None:
        with self._turn():
            try:
                sender = self._sender or self._connected()
                sender.client = control
                sender.source = _Folder(folder)
                self._sender = sender
                self._within_limit(sender.send_weights, control)
                sender.source = None
            except BaseException:
                self._leave()  # the other side may wait for tensors that never come
                raise

    def _turn(self) -> AbstractContextManager[None]:
        """This server's, which is to connect and to send at the most; each ends after the limit."""
        return _TURNS.turn(QUICK_TIMEOUT_S + 2 * self._limit_s)

    @property
    def _limit_s(self) -> float:
        return self._client.load_timeout_s

    def _require_launched_for_it(self, how_to_launch: str) -> None:
        found: Sequence[object] | None = self._client.run("dspy_fst_transfer_backend", optional=True)
        if found is None or any(backend != self._backend for backend in found):
            has = "without our worker extension" if found is None else f"with the weight transfer {found[0] or 'off'}"
            raise EngineError(
                f"weight_transfer is {self._backend!r}, and vLLM at {self._client.address.url} was launched {has}. "
                f'Launch it with --weight-transfer-config \'{{"backend": "{self._backend}"}}\', or leave '
                f"weight_transfer unset. {how_to_launch}"
            )

    def _connected(self) -> Sender:
        """Both sides meet: over NCCL as one group, this process first; for IPC there is nothing but to agree."""
        from vllm.distributed.weight_transfer import WeightTransferTrainerFactory
        from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

        if self._backend == "ipc":
            facts = IPCTrainerInitInfo(rank=0)
        else:
            workers = said(self._client.call("GET", "/get_world_size", timeout_s=QUICK_TIMEOUT_S))["world_size"]
            host = _own_address(self._client.address.url)
            port = free_port(host)
            facts = NCCLTrainerInitInfo(host, port, workers + 1, packed_buffer_size_bytes=BUFFER_BYTES, rank=0)
        control = _Control(self._client)

        def meet() -> Sender:
            sender: Sender = WeightTransferTrainerFactory.trainer_init(facts, client=control, source=())
            return sender

        def let_go(late: Sender) -> None:
            self._part()
            late.shutdown()

        return self._within_limit(meet, control, let_go)

    def _within_limit(
        self, job: Callable[[], T], control: "_Control", unwanted: Callable[[T], None] | None = None
    ) -> T:
        """What the job returns, or the first error of the server.

        Args:
            unwanted: Given what the job returns after it was given up.
        """
        outcome: Future[T] = Future()
        control.tell = outcome.set_exception
        settle_in_thread(outcome, job, "weight transfer", unwanted)
        what = f"the weight transfer ({self._backend}) to vLLM at {self._client.address.url}"
        wait([outcome], self._limit_s)
        if outcome.cancel():  # it has no result, and takes none any more
            raise NoAnswerError(f"{what} did not end within {self._limit_s:g} s (load_timeout_s)")
        try:
            return outcome.result()
        except EngineError:
            raise
        except Exception as error:  # of vLLM, NCCL or CUDA in this process
            raise EngineError(f"{what} failed: {error!r}") from error


class _Control:
    """What vLLM's trainer engine asks of the server, by the endpoints that vLLM has for it."""

    def __init__(self, client: VLLMClient):
        self._client = client
        self.tell: Callable[[BaseException], None] = lambda error: None
        """Told the first failure at once: vLLM may learn of it only after tensors that nobody takes any more."""

    def init_weight_transfer_engine(self, init_info: Mapping[str, object]) -> None:
        self._ask(lambda: self._post("/init_weight_transfer_engine", {"init_info": init_info}))

    def start_weight_update(self) -> None:
        self._ask(lambda: self._post("/start_weight_update"))

    def update_weights(self, update_info: Mapping[str, object]) -> None:
        self._ask(lambda: self._post("/update_weights", {"update_info": _as_json(update_info)}))

    def finish_weight_update(self) -> None:
        self._ask(lambda: self._post("/finish_weight_update"))

    def _post(self, path: str, body: object = None) -> None:
        self._client.call("POST", path, json=body, timeout_s=self._client.load_timeout_s)

    def _ask(self, ask: Callable[[], None]) -> None:
        try:
            ask()
        except BaseException as error:
            with suppress(InvalidStateError):  # nobody waits any more
                self.tell(error)
            raise


class _Comparing(_Control):
    """Has the tensors compared instead of loaded."""

    answers: "list[WorkerAnswer]"

    def start_weight_update(self) -> None:
        pass

    def update_weights(self, update_info: Mapping[str, object]) -> None:
        self._ask(lambda: self._compare(update_info))

    def finish_weight_update(self) -> None:
        pass

    def _compare(self, update_info: Mapping[str, object]) -> None:
        self.answers = self._client.run("dspy_fst_compare_sent", update_info=_as_json(update_info)) or []


class _Folder:
    """A folder's tensors as vLLM's `WeightSource`: described, and read one by one onto the card."""

    def __init__(self, folder: Path):
        self._files = [safe_open(file, "pt") for file in sorted(folder.glob("*.safetensors"))]
        self._device = "cuda" if has_gpu() else "cpu"

    def metadata(self) -> list[object]:
        from vllm.distributed.weight_transfer import ParamMeta

        return [ParamMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self._tensors()]

    def __iter__(self) -> "Iterator[tuple[str, Tensor]]":
        for name, tensor in self._tensors():
            yield name, tensor.to(self._device)

    def _tensors(self) -> "Iterator[tuple[str, Tensor]]":
        """They lie in the file until their numbers are looked at."""
        for file in self._files:
            for name in file.keys():  # noqa: SIM118 - no mapping
                yield name, file.get_tensor(name)


def _as_json(update_info: Mapping[str, object]) -> dict[str, object]:
    """With CUDA's handles of memory as pickles, the form in which vLLM takes them over HTTP."""
    sent = dict(update_info)
    if (handles := sent.pop("ipc_handles", None)) is not None:
        sent["ipc_handles_pickled"] = base64.b64encode(pickle.dumps(handles)).decode()
    return sent


def _own_address(url: str) -> str:
    """The address of this machine that the server's machine reaches, as this one would reach it."""
    host = urlsplit(url).hostname
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # a datagram socket sends nothing to connect
            probe.connect((host, 9))
            address: str = probe.getsockname()[0]
    except OSError as error:
        raise EngineError(f"this machine has no IPv4 route to {host}, where weights are to be sent: {error}") from error
    return address
