"""A vLLM server as an engine: launched here or elsewhere, with its weights swapped in place.

The contract of this file:

- Nothing starts before the first ``load``.
- Everything that was started is ended.
- Every reply is sampled by a single weight version.
- Every wait has a limit, which its error names.

vLLM's flags are in `launch.py`. Written for vLLM 0.32 (CPU) and 0.33; what differs on a GPU (dtype, CUDA graphs) is
untried.
"""

import logging
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial

from dspy.lm15 import Request

from dspy_fst.engine.base import Checkpoint, Completion, Holding
from dspy_fst.engine.chat import fitted
from dspy_fst.engine.replies import UNREAD, ReplyReader, with_stop_tokens
from dspy_fst.engine.vllm.address import Address
from dspy_fst.engine.vllm.attachable import require_attachable, require_processed_logprobs
from dspy_fst.engine.vllm.client import VLLMClient
from dspy_fst.engine.vllm.diagnosis import last_words, obituary
from dspy_fst.engine.vllm.launch import HOW_TO_ATTACH, lora_places
from dspy_fst.engine.vllm.launched import Launch, Process, launch_here
from dspy_fst.engine.vllm.lora_client import LoRAClient
from dspy_fst.engine.vllm.lora_files import LoRANeeds
from dspy_fst.engine.vllm.lora_versions import UNLOADED, LoRAVersions, Target
from dspy_fst.engine.vllm.prompts import Prompts
from dspy_fst.engine.vllm.server_settings import NO_LORA, VLLMSettings, vllm_faults
from dspy_fst.engine.vllm.sleep_mode import Doubt, fall_asleep, wake_up
from dspy_fst.engine.vllm.ways import Way, way_to
from dspy_fst.engine.weights_lock import WeightsLock
from dspy_fst.errors import EngineError, NoAnswerError, ServerDiedError
from dspy_fst.types import WeightsVersion

logger = logging.getLogger(__name__)

_READINESS_POLL_S = 0.25
_PROGRESS_EVERY_S = 15.0
_DEATH_NOTICE_S = 3.0
"""How long to wait, after a connection broke, for the server to end, so that the error can tell why."""
_WIND_UP_S = 60.0
"""The same for a server whose engine has died, as its health check or its closed port says. It is killed then."""


class VLLMServer:
    """Engine over a vLLM server. Thread-safe. ``close`` ends it; otherwise the end of the process does.

    After ``close``, ``load`` starts a new server.

    Args:
        settings: How to launch or reach the server.
        launch: Launches it, where no ``attach_url`` is set.
    """

    def __init__(self, settings: VLLMSettings | None = None, launch: Launch = launch_here):
        self.settings = settings or VLLMSettings()
        self._launch_process = launch
        self._lock = WeightsLock()
        self._asleep = ExitStack()
        """Holds the lock while the server sleeps."""
        self.doubt = Doubt()
        """Arises in a sleep. Who put the server to sleep settles it; `load` alone does not."""
        self._weights: WeightsVersion | None = None
        self._process: Process | None = None
        self._client: VLLMClient | None = None
        self._way: Way | None = None
        """How weights reach the server; None while there is none."""
        self._loras: LoRAVersions | None = None
        """The LoRA adapters; None: the server was started for whole weights, or not at all."""
        self._reader, self._prompts = UNREAD, Prompts(UNREAD)
        self._killed_because: str | None = None
        self._answered_at = 0.0
        self._tokens_processed = ""

    @property
    def weights(self) -> WeightsVersion | None:
        """The version served now; None before the first load, and after a load that failed half-way."""
        return self._weights if self._loras is None else self._loras.version

    @property
    def address(self) -> Address | None:
        """Where the server listens, and its key, for other clients; None if nothing is served."""
        return self._client.address if self._client else None

    @property
    def in_flight(self) -> int:
        """Number of requests that wait for tokens now; 0 while weights are loaded or compared."""
        return self._lock.samplers

    def progress(self, timeout_s: float) -> tuple[float, str]:
        """A mark that changes whenever a reply arrives or tokens are processed.

        Waits at most ``timeout_s`` seconds for the server. Without an answer its token counters count as unchanged.
        """
        if (client := self._client) is not None:
            with suppress(Exception):  # an error would end the watchdog, and a later hang would go unnoticed
                self._tokens_processed = client.tokens_processed(timeout_s)
        return self._answered_at, self._tokens_processed

    def kill(self, reason: str) -> None:
        """End the server at once, even if it is suspended or hangs. Requests in flight fail with this reason."""
        if (process := self._process) is not None:
            self._killed_because = reason
            process.kill()

    def load(self, checkpoint: Checkpoint) -> None:
        """Serve these weights. The first call launches the server; later calls swap the weights in place.

        Whole weights are swapped after the requests in flight, which finish under the weights they started with, and
        later requests wait. LoRA adapters are loaded beside the requests in flight; see `LoRAVersions`.

        Raises:
            EngineError: the folder, the launch or the swap is at fault, the running server can only serve these weights
                after a restart, or a wait exceeded its limit. After a failed launch or swap nothing is sampled until a
                load succeeds.
        """
        require_checkpoint(checkpoint)
        if reason := self.restart_reason(checkpoint):
            raise EngineError(f"weights {checkpoint.version} need a server that is started anew: {reason}")
        if self._loras is not None:
            with self._explaining_death():
                self._loras.load(checkpoint)
            return
        with self._lock.loading(self.settings.request_timeout_s), self._explaining_death():
            self._weights = None
            if (way := self._way) is None:
                self._start(checkpoint)
            else:
                way.swap(checkpoint.path.resolve())
            self._weights = checkpoint.version

    def sleep(self, level: int) -> None:
        """Give the GPU memory back, after the calls in flight; later ones wait until `wake`. See `sleep_mode`.

        Raises:
            EngineError: calls were still in flight after their limit, or the server did not fall asleep in time.
        """
        self._asleep.enter_context(self._lock.loading(self.settings.request_timeout_s, "a sleep"))
        self.doubt.arise()
        with self._explaining_death():
            fall_asleep(self._require_client(), level)

    def wake(self) -> None:
        """Take the memory again; calls get in once `doubt` is settled. EngineError: it does not wake in time."""
        with self._asleep, self._explaining_death():
            wake_up(self._require_client())
        if self._loras is not None:
            self._loras.distrust_base()

    def restart_reason(self, checkpoint: Checkpoint) -> str | None:
        """Why the running server cannot go over to these weights without a restart; None if it can, or none runs.

        Raises:
            EngineError: vLLM cannot serve one of the LoRA adapters at all.
        """
        if self._client is None:
            return None
        if self._loras is not None:
            return self._loras.refuses(checkpoint)
        return "it was started without LoRA adapters" if checkpoint.adapters else None

    def complete(
        self, request: Request, seed: int, prompt_ids: tuple[int, ...] | None = None, adapter: str | None = None
    ) -> Completion:
        """Sample one reply from the untruncated distribution; see ``Engine.complete``."""
        with self._asking(request, adapter) as (client, target, sent):
            ask = partial(client.sample, sent, seed, target.version, model=target.model)
            completion = ask(prompt_ids) if prompt_ids else self._prompts.asked(request, ask)
        return self._reader.read(completion, request)

    def stream(self, request: Request, seed: int, adapter: str | None = None) -> Generator[str, None, Completion]:
        """`complete`, with the text yielded in pieces; thoughts and tool calls are in it as the model writes them."""
        with self._asking(request, adapter) as (client, target, sent):
            completion = yield from client.stream(sent, seed, target.version, target.model)
        return self._reader.read(completion, request)

    def score(self, sequences: Sequence[Sequence[int]], adapter: str | None = None) -> list[list[float]]:
        """Log-probability of every token but the first of each sequence, at temperature 1.

        A sequence must be at least one token shorter than ``max_model_len``.
        """
        if not sequences:
            return []
        if self._loras is not None and (self._loras.head_is_adapted or self.settings.attach_url is not None):
            return self._score_alone(sequences, adapter)
        with self._serving() as client, self._target(adapter) as target:
            return client.score(sequences, target.model)

    def _score_alone(self, sequences: Sequence[Sequence[int]], adapter: str | None) -> list[list[float]]:
        """`score`, one sequence at a time and with no other request in flight.

        On a CPU, vLLM 0.32 dies of a score that is not alone in its batch if it was started with LoRA on the LM head.
        So it is by default, which an attached server may have.
        """
        with self._lock.loading(self.settings.request_timeout_s), self._explaining_death():
            self.doubt.refuse()
            client = self._require_client()
            with self._target(adapter) as target:
                return [client.score([sequence], target.model)[0] for sequence in sequences]

    def held(self, checkpoint: Checkpoint) -> Holding | None:
        """Compare the weights in use with the folder's; None for an attached server without our worker extension."""

        def compare_folder() -> Holding | None:
            if (way := self._way) is None:  # another thread closed the engine
                raise EngineError(UNLOADED)
            return way.held(checkpoint.path.resolve())

        with self._serving(sampling=False):
            return compare_folder() if self._loras is None else self._loras.held(checkpoint, compare_folder)

    @contextmanager
    def _asking(self, request: Request, adapter: str | None) -> Iterator[tuple[VLLMClient, Target, Request]]:
        """The server, what the request is sampled from, and the request fitted to the server's chat template."""
        with self._serving() as client, self._target(adapter) as target:
            self._reader.check(request)
            yield client, target, with_stop_tokens(fitted(request, self._reader.traits), self._reader.stop_ids)

    @contextmanager
    def _target(self, adapter: str | None) -> Iterator[Target]:
        """What a call is sampled from, which the server keeps in this block."""
        if self._loras is not None:
            with self._loras.calling(adapter) as target:
                yield target
            return
        if self._weights is None:
            raise EngineError(UNLOADED)
        if adapter is not None:
            raise EngineError(f"weights {self._weights} have no LoRA adapter {adapter!r}; they have none")
        yield Target(None, self._weights)

    @contextmanager
    def _serving(self, *, sampling: bool = True) -> Iterator[VLLMClient]:
        """The server, whose whole weights do not change in this block. If it dies, the error quotes its log's end.

        Args:
            sampling: Whether the server processes tokens in the block. If so, the watchdog kills it when it does not.
        """
        lock = self._lock.sampling if sampling else self._lock.checking
        with lock(self.settings.request_timeout_s), self._explaining_death():
            self.doubt.refuse()
            yield self._require_client()
            self._answered_at = time.monotonic()

    def expect(self, callers: int) -> None:
        """Nothing to do: vLLM batches whatever is in flight."""

    def close(self, *, keep_log: bool = False) -> None:
        """End the server if it was launched here, and close the connections. May be called twice.

        Args:
            keep_log: Keep a temporary log, to see why the server failed.
        """
        process, client, way = self._process, self._client, self._way
        self._process = self._client = self._way = self._loras = self._weights = None
        if process is not None:
            process.stop(keep_log=keep_log)
        if way is not None:
            way.close()
        if client is not None:
            client.close()
        self._asleep.close()  # calls that wait for it to wake fail now

    def _require_client(self) -> VLLMClient:
        if self._client is None or self.weights is None:
            raise EngineError(UNLOADED)
        return self._client

    def _start(self, checkpoint: Checkpoint) -> None:
        if faults := vllm_faults(self.settings):
            raise EngineError("cannot start vLLM: " + "; ".join(faults))
        needs = LoRANeeds.of(checkpoint.adapters) if checkpoint.adapters else None
        if needs is not None and self.settings.weight_transfer != "disk":
            raise EngineError(NO_LORA.format(way=self.settings.weight_transfer))
        url = self.settings.attach_url
        self._client, self._way = self._launch(checkpoint, needs) if url is None else self._attach(str(url), checkpoint)
        self._reader = ReplyReader.load(checkpoint.path)
        self._prompts = Prompts(self._reader)
        if needs is not None:
            self._loras = self._versions(self._client, checkpoint, needs)
            self._loras.load(checkpoint)

    def _versions(self, client: VLLMClient, checkpoint: Checkpoint, needs: LoRANeeds) -> LoRAVersions:
        """The LoRA adapters of a server that was just launched or attached to; none is loaded yet."""
        attached = self.settings.attach_url is not None
        loras = LoRAClient(client) if self._process is None else LoRAClient(client, self._process.folder)
        loras.note_names(HOW_TO_ATTACH, optional=attached)
        capacity = None if attached else lora_places(self.settings, needs)[1]
        return LoRAVersions(loras, checkpoint, needs, capacity=capacity, wait_s=self.settings.request_timeout_s)

    def _attach(self, url: str, checkpoint: Checkpoint) -> tuple[VLLMClient, Way]:
        address = Address(url.rstrip("/").removesuffix("/v1"), self.settings.api_key, through_proxy=True)
        client = self._new_client(address)
        way: Way | None = None
        try:
            require_attachable(client, self.settings.max_model_len, checkpoint.path)
            way = way_to(client, self.settings)
            if checkpoint.adapters:  # their base is not swapped: the server must have been launched on it
                LoRAClient(client).require(HOW_TO_ATTACH)
            else:
                way.swap(checkpoint.path.resolve())  # also resumes a server that was left paused
            require_processed_logprobs(client)
        except BaseException:
            if way is not None:
                way.close()
            client.close()
            raise
        return client, way

    def _launch(self, checkpoint: Checkpoint, loras: LoRANeeds | None) -> tuple[VLLMClient, Way]:
        launched = self._launch_process(self.settings, checkpoint.path.resolve(), loras)
        self._process, self._killed_because = launched.process, None
        client: VLLMClient | None = None
        try:
            client = self._new_client(launched.address())
            self._wait_until_ready(launched.process, client)
            way = way_to(client, self.settings, launched.process.folder)
        except BaseException:
            if client is not None:
                client.close()
            self._process = None
            launched.process.stop(keep_log=True)
            raise
        return client, way

    def _new_client(self, address: Address) -> VLLMClient:
        limits = self.settings
        return VLLMClient(address, request_timeout_s=limits.request_timeout_s, load_timeout_s=limits.load_timeout_s)

    def _wait_until_ready(self, process: Process, client: VLLMClient) -> None:
        logger.info("starting vLLM at %s; its output goes to %s", client.address.url, process.log_path)
        began = time.monotonic()
        progress_at = _PROGRESS_EVERY_S
        while not _answers(client):
            elapsed = time.monotonic() - began
            if process.exits_within(_READINESS_POLL_S):
                raise EngineError(f"vLLM ended after {elapsed:.0f} s while starting, {obituary(process)}")
            if elapsed > self.settings.startup_timeout_s:
                raise EngineError(
                    f"vLLM was not ready after {self.settings.startup_timeout_s:g} s (startup_timeout_s), "
                    f"{last_words(process)}"
                )
            if elapsed > progress_at:
                progress_at += _PROGRESS_EVERY_S
                logger.info("vLLM is starting (%.0f s): %s", elapsed, (process.output() or [""])[-1])
        client.find_model()
        client.find_rows()
        logger.info("vLLM was ready after %.0f s", time.monotonic() - began)

    @contextmanager
    def _explaining_death(self) -> Iterator[None]:
        """If the server has died, replace the error of its broken connection by one that quotes the end of its log."""
        try:
            yield
        except NoAnswerError as error:
            process = self._process
            if process is None or not self._ends(process):
                raise
            killed = f"vLLM was killed: {self._killed_because}" if self._killed_because else "vLLM died"
            raise ServerDiedError(
                f"{killed}, {obituary(process)}\nclose() the engine; load() then starts a new server"
            ) from error

    def _ends(self, process: Process) -> bool:
        """Whether the server has ended, or ends now as its engine died; False if it is slow or refused a request."""
        if process.exits_within(_DEATH_NOTICE_S):
            return True
        client = self._client
        if client is None or not client.engine_died():
            return False
        if not process.exits_within(_WIND_UP_S):
            self.kill(f"its engine died or it closed its port, and it did not end within {_WIND_UP_S:g} s")
        return process.exits_within(_DEATH_NOTICE_S)


def _answers(client: VLLMClient) -> bool:
    try:
        client.ping()
    except EngineError:
        return False
    return True


def require_checkpoint(checkpoint: Checkpoint) -> None:
    """Raises EngineError unless the folder holds a config and weights, and its LoRA adapters can be served."""
    where = f"checkpoint {checkpoint.version}: {checkpoint.path}"
    if not (checkpoint.path / "config.json").is_file():
        raise EngineError(f"{where} is no Hugging Face folder (no config.json)")
    if not any(checkpoint.path.glob("*.safetensors")):
        raise EngineError(f"{where} holds no *.safetensors file")
    if checkpoint.adapters:
        LoRANeeds.of(checkpoint.adapters)
